# SPDX-License-Identifier: Apache-2.0
"""Our builders of attention metadata are made like vLLM's own, and share what those share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from since import since
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.utils import AttentionGroup

from kvcomm_vllm.compat.metadata import (
    MetadataBuilder,
    common_metadata,
    kernel_table,
    metadata_builders,
)

CPU = torch.device("cpu")
SPEC = FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=32, dtype=torch.bfloat16)
CONFIG = SimpleNamespace(
    model_config=SimpleNamespace(max_model_len=1024),
    scheduler_config=SimpleNamespace(max_num_seqs=4),
    parallel_config=SimpleNamespace(decode_context_parallel_size=1),
)
TABLE = torch.tensor([[1, 2], [5, 0]], dtype=torch.int32)
HALVES = [[2, 3, 4, 5], [10, 11, 0, 1]]


class Builder:
    """Keeps its arguments; what it builds is the block table it was given."""

    requires_block_table_width: ClassVar[bool] = False

    def __init__(self, kv_cache_spec: Any, layer_names: Any, config: Any, device: Any) -> None:
        self.kv_cache_spec = kv_cache_spec
        self.arguments: tuple[Any, ...] = (kv_cache_spec, layer_names, config, device)

    def build(self, common_prefix_len: int, common: Any) -> torch.Tensor:
        assert common_prefix_len == 0
        table: torch.Tensor = common.block_table_tensor
        return table

    def set_kernel_block_size(self, kernel_block_size: int) -> None:
        """What vLLM 0.30 tells every builder."""


class WideBuilder(Builder):
    requires_block_table_width = True

    def __init__(self, *arguments: Any, block_table_width: int) -> None:
        super().__init__(*arguments)
        self.arguments += (block_table_width,)


class WorkingBuilder(Builder):
    """One that needs a large buffer, like FlashInfer's."""

    made: ClassVar[list[torch.Tensor]] = []

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.workspace: torch.Tensor | None = None

    def _get_workspace_buffer(self) -> torch.Tensor:
        if self.workspace is None:
            self.workspace = torch.zeros(1)
            self.made.append(self.workspace)
        return self.workspace

    def set_workspace_buffer(self, workspace: torch.Tensor) -> None:
        self.workspace = workspace


def backend(builder: type[Builder]) -> Any:
    """An attention backend whose kernels read pages of 64 tokens."""
    return SimpleNamespace(
        get_builder_cls=lambda: builder,
        get_supported_kernel_block_sizes=lambda spec=None: [64],
        get_name=lambda: "SIXTY_FOUR",
    )


@dataclass(eq=False)
class OldGroup:
    """What vLLM 0.28 - 0.31 have in the place of 0.32's ``AttentionGroup``."""

    backend: Any
    layer_names: list[str]
    kv_cache_spec: Any
    kv_cache_group_id: int
    metadata_builders: list[Any] = field(default_factory=list)

    def create_metadata_builders(
        self,
        vllm_config: Any,
        device: Any,
        kernel_block_size: int | None = None,
        num_metadata_builders: int = 1,
    ) -> None:
        spec = replace(self.kv_cache_spec, block_size=kernel_block_size)
        builder = self.backend.get_builder_cls()
        self.metadata_builders = [builder(spec, self.layer_names, vllm_config, device)]

    def get_metadata_builder(self, ubatch_id: int = 0) -> Any:
        return self.metadata_builders[ubatch_id]


def group(kind: type, builder: type[Builder], kernel_block_size: int = 64) -> Any:
    made = kind(backend(builder), ["layer 0", "layer 1"], SPEC, 0)
    made.create_metadata_builders(CONFIG, CPU, kernel_block_size)
    return made


def runner(groups: list[Any], **sizes: list[int]) -> Any:
    return SimpleNamespace(vllm_config=CONFIG, device=CPU, attn_groups=[groups], **sizes)


def common(table: torch.Tensor) -> Any:
    rows = len(table)
    ends = torch.arange(rows, dtype=torch.int32)
    return common_metadata(
        query_start_loc=ends,
        query_start_loc_cpu=ends,
        seq_lens=ends,
        seq_lens_cpu_upper_bound=ends,
        num_reqs=rows,
        num_actual_tokens=rows,
        max_query_len=1,
        max_seq_len=1,
        block_table_tensor=table,
        slot_mapping=ends.long(),
        causal=True,
    )


@pytest.mark.parametrize("sizes", ["kernel_block_sizes", "_kernel_block_sizes"])
@pytest.mark.parametrize("kind", [AttentionGroup, OldGroup])
@pytest.mark.parametrize("builder", [Builder, WideBuilder])
def test_a_builder_is_made_with_the_arguments_of_vllms(
    kind: type, builder: type[Builder], sizes: str
) -> None:
    if kind is OldGroup and builder is WideBuilder:
        pytest.skip("the stand-in knows no widths")
    vllms = group(kind, builder)
    (ours,) = metadata_builders(runner([vllms], **{sizes: [64]}))
    own, theirs = ours._builder, vllms.get_metadata_builder()
    assert own is not theirs
    assert type(own) is builder
    assert own.arguments == theirs.arguments
    assert (ours.block_size, ours.kernel_block_size) == (128, 64)
    assert ours.layer_names == vllms.layer_names


@pytest.mark.parametrize("kind", [AttentionGroup, OldGroup])
def test_block_tables_are_mapped_to_the_pages_of_kernels(kind: type) -> None:
    ours = MetadataBuilder(group(kind, Builder), CONFIG, CPU, 64)
    assert ours.build(common(TABLE)).tolist() == HALVES


@since("0.32", "the tables of kernels' pages")
def test_a_second_batch_does_not_change_the_tables_of_vllms_step() -> None:
    vllms = group(AttentionGroup, Builder)
    theirs = vllms.build_metadata(common(TABLE))
    ours = MetadataBuilder(vllms, CONFIG, CPU, 64)
    ours.build(common(TABLE + 3))
    assert theirs.tolist() == HALVES
    assert vllms.metadata_builders[0] is vllms.get_metadata_builder()


def test_tables_of_pages_that_kernels_read_stay_as_they_are() -> None:
    assert kernel_table(TABLE, 1) is TABLE


@pytest.mark.parametrize("kind", [AttentionGroup, OldGroup])
def test_no_second_workspace_is_made(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WorkingBuilder, "made", [])
    vllms = group(kind, WorkingBuilder)
    ours = MetadataBuilder(vllms, CONFIG, CPU, 64)
    assert ours._builder._get_workspace_buffer() is vllms.get_metadata_builder().workspace
    assert len(WorkingBuilder.made) == 1


def test_where_vllms_builder_has_no_workspace_ours_gets_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A composite whose children have none answers None."""
    monkeypatch.setattr(WorkingBuilder, "_get_workspace_buffer", lambda self: None)
    ours = MetadataBuilder(group(AttentionGroup, WorkingBuilder), CONFIG, CPU, 64)
    assert ours._builder.workspace is None


def test_backends_choose_their_kernels_by_the_engines_configuration() -> None:
    """FlashInfer asks for it when it says which pages it reads."""
    from vllm.config import get_current_vllm_config_or_none

    asked: list[Any] = []

    class Asking(Builder):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            asked.append(get_current_vllm_config_or_none())

    metadata_builders(runner([group(AttentionGroup, Asking)], kernel_block_sizes=[64]))
    assert asked == [None, CONFIG]
