# SPDX-License-Identifier: Apache-2.0
"""Contract with vLLM's CUDA backends: builders of our own are made of the same arguments as
vLLM's, read pages of the same size, and share the same workspace.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import mocked_cuda
import pytest
import torch

from kvcomm_vllm.compat.metadata import common_metadata, metadata_builders

CPU = torch.device("cpu")
HOPPER, BLACKWELL = [9, 0], [10, 0]
# backend, GPU, tokens per page of the engine, of its kernels, head size
PAGES = [
    ("TRITON_ATTN", HOPPER, 32, 32, 128),
    ("TRITON_ATTN", HOPPER, 128, 128, 128),
    ("FLASH_ATTN", HOPPER, 32, 32, 128),
    ("FLASH_ATTN", HOPPER, 128, 128, 128),
    ("FLASH_ATTN", BLACKWELL, 256, 128, 256),
    ("FLASHINFER", HOPPER, 32, 32, 128),
    ("FLASHINFER", HOPPER, 128, 64, 128),
    ("FLASHINFER", HOPPER, 256, 64, 128),
    ("FLEX_ATTENTION", HOPPER, 64, 64, 128),
    ("TRITON_FLASH_ATTN", HOPPER, 128, 128, 256),
    ("TRITON_FLASHINFER", BLACKWELL, 64, 64, 256),
    ("TRITON_FLASHINFER", BLACKWELL, 128, 64, 256),
]
numbers = itertools.count()


@pytest.fixture(scope="module")
def make_config(tiny_llama: str) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    def make(block_size: int) -> Any:
        args = EngineArgs(
            model=tiny_llama, block_size=block_size, max_model_len=2048, dtype="bfloat16"
        )
        return args.create_engine_config()

    return make


@pytest.fixture
def serve(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An engine's model runner with one attention group, as far as it is looked at, and the
    arguments of every builder that was made.
    """

    def build(
        backend_name: str, capability: list[int], block_size: int, head: int
    ) -> tuple[Any, list[Any]]:
        from vllm.config import set_current_vllm_config
        from vllm.v1.attention.backends.registry import AttentionBackendEnum
        from vllm.v1.worker.utils import select_common_block_size

        monkeypatch.setattr(mocked_cuda, "CAPABILITY", capability)
        config = make_config(block_size)
        with set_current_vllm_config(config):
            backend = AttentionBackendEnum[backend_name].get_class()
            name = f"layers.{next(numbers)}.attn"
            _, group = mocked_cuda.group_of(backend, config, name, head_size=head)
            seen = record(monkeypatch, backend.get_builder_cls())
            kernel = select_common_block_size(block_size, [backend], [group.kv_cache_spec])
            group.create_metadata_builders(config, CPU, kernel)
        runner = SimpleNamespace(
            vllm_config=config, device=CPU, attn_groups=[[group]], kernel_block_sizes=[kernel]
        )
        return runner, seen

    return build


def record(patch: pytest.MonkeyPatch, builder: type) -> list[Any]:
    """The arguments of every builder of this class that is made from now on."""
    seen: list[Any] = []
    made = builder.__init__  # type: ignore[misc]

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        seen.append((args, kwargs))
        made(self, *args, **kwargs)

    patch.setattr(builder, "__init__", init)
    return seen


@pytest.mark.parametrize(("name", "capability", "block_size", "kernel", "head"), PAGES)
def test_builders_get_the_arguments_of_vllms_own(
    serve: Any, name: str, capability: list[int], block_size: int, kernel: int, head: int
) -> None:
    runner, seen = serve(name, capability, block_size, head)
    (ours,) = metadata_builders(runner)
    theirs, own = seen
    assert own == theirs
    ((group,),) = runner.attn_groups
    assert type(ours._builder) is type(group.get_metadata_builder())
    assert ours._builder is not group.get_metadata_builder()
    assert (ours.block_size, ours.kernel_block_size) == (block_size, kernel)


@pytest.mark.parametrize(
    ("name", "capability"),
    [("FLASHINFER", HOPPER), ("FLASHINFER", BLACKWELL), ("TRITON_FLASHINFER", BLACKWELL)],
)
def test_flashinfer_works_in_one_buffer(serve: Any, name: str, capability: list[int]) -> None:
    runner, _ = serve(name, capability, 64, 256)
    (ours,) = metadata_builders(runner)
    ((group,),) = runner.attn_groups
    theirs = group.get_metadata_builder()
    own = getattr(ours._builder, "causal_builder", ours._builder)
    real = getattr(theirs, "causal_builder", theirs)
    assert own is not real
    assert own._workspace_buffer is not None
    assert own._workspace_buffer is real._workspace_buffer


def common() -> Any:
    """Two rows of a request: a hole in its first page, one behind it."""

    def whole(*numbers: int) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    return common_metadata(
        query_start_loc=whole(0, 8, 16),
        query_start_loc_cpu=whole(0, 8, 16),
        seq_lens=whole(16, 140),
        seq_lens_cpu_upper_bound=whole(16, 140),
        num_reqs=2,
        num_actual_tokens=16,
        max_query_len=8,
        max_seq_len=140,
        block_table_tensor=torch.tensor([[3, 5], [3, 5]], dtype=torch.int32),
        slot_mapping=torch.arange(16),
        causal=True,
        positions=torch.arange(16),
        is_prefilling=torch.ones(2, dtype=torch.bool),
    )


@pytest.mark.parametrize("name", ["FLASH_ATTN", "TRITON_ATTN"])
@pytest.mark.parametrize("kernel", [128, 64])
def test_metadata_names_the_pages_that_kernels_read(
    serve: Any, name: str, kernel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    backend = AttentionBackendEnum[name].get_class()
    sizes = staticmethod(lambda spec=None: [kernel])
    monkeypatch.setattr(backend, "get_supported_kernel_block_sizes", sizes)
    runner, _ = serve(name, HOPPER, 128, 128)
    (ours,) = metadata_builders(runner)
    row = [3, 5] if kernel == 128 else [6, 7, 10, 11]
    assert ours.build(common()).block_table.tolist() == [row, row]


def test_full_graphs_keep_their_own_scheduler_metadata(serve: Any) -> None:
    """A captured graph reads vLLM's buffer; ours must be another."""
    runner, _ = serve("FLASH_ATTN", HOPPER, 32, 128)
    (ours,) = metadata_builders(runner)
    ((group,),) = runner.attn_groups
    own, theirs = ours._builder, group.get_metadata_builder()
    assert theirs.use_full_cuda_graph
    assert own.scheduler_metadata is not theirs.scheduler_metadata
