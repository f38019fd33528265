# SPDX-License-Identifier: Apache-2.0
"""A device that is not there: what a step asks of it is counted, and nothing is carried out.

Its tensors have no memory (``meta``), so code that wants to know what is in one, which would wait
for a real device, fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.kernels.pages import Packing, PageGroup
from kvcomm_vllm.messages import HoleOp, LoadOp, RequestOps
from kvcomm_vllm.worker import side_forward
from kvcomm_vllm.worker.corrections.anchor import Anchors
from kvcomm_vllm.worker.corrections.base import Ground
from kvcomm_vllm.worker.corrections.residual import ResidualArena
from kvcomm_vllm.worker.equipment import Equipment
from kvcomm_vllm.worker.half import WorkerHalf
from kvcomm_vllm.worker.kv_view import LayerGroup
from kvcomm_vllm.worker.load import load_kernel
from kvcomm_vllm.worker.rope import Rope

DEVICE = torch.device("meta")
PAGE, POSITIONS, ENTRIES = 16, 200_000, 40
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Count(TorchDispatchMode):
    """Of what is asked of the device while it is the mode.

    Attributes:
        by_name: launches of each kernel.
        copies: transfers to it; ``waits``: those of them that the host may wait for, since their
            source is not pinned or they do not say ``non_blocking``.
        launches: kernels, torch's and Triton's.
        peak_bytes: of its memory that was alive at once, of what was made meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies = self.waits = self.launches = self.peak_bytes = 0
        self.by_name = Counter[str]()
        self.pinned = False
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def launched(self, name: str) -> None:
        self.launches += 1
        self.by_name[name] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), torch._C.DispatchKey.CompositeImplicitAutograd
        ):
            with self:
                return func.decompose(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = func(*args, **kwargs)
        there = [x for x in tree_leaves(made) if _there(x)]
        if not there:
            assert not any(_there(x) for x in given), f"{func} waits for the device"
            return made
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not view:
            self._keep(there)
        if func in COPIES and any(not _there(x) for x in given):
            self.copies += 1
            self.waits += not (self.pinned and (kwargs.get("non_blocking") or args[-1] is True))
        elif not view and not func.name().startswith(("aten::empty", "aten::new_empty")):
            self.launched(func.name())
        return made

    def _keep(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        gone = [key for key, (ref, _) in self._alive.items() if ref.expired()]
        for key in gone:
            del self._alive[key]
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._alive.values()))


def _there(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "meta"


@contextmanager
def counting() -> Iterator[Count]:
    """Counts what is asked meanwhile."""
    from triton.runtime.jit import JITFunction

    count = Count()

    def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
        count.launched(kernel.__name__)

    def sent(data: torch.Tensor, device: torch.device) -> torch.Tensor:
        # vLLM's own way leaves everything in host memory where an engine of this process, on CPU,
        # has replaced it
        count.pinned = True
        there = data.to(device, non_blocking=True)
        count.pinned = False
        return there

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        patch.setattr("kvcomm_vllm.worker.upload.send", sent)
        with count:
            yield count


def launching_nothing(patch: pytest.MonkeyPatch) -> None:
    """Lets Triton's kernels be asked for."""
    from triton.runtime.jit import JITFunction

    patch.setattr(JITFunction, "run", lambda *_, **__: None)


def llama_8b() -> LayerGroup:
    """KV pages of an 8B model on the device."""
    caches = tuple(
        torch.empty(4, 8, PAGE, 256, dtype=torch.bfloat16, device=DEVICE) for _ in range(32)
    )
    table = torch.empty(POSITIONS, 64, device=DEVICE)
    return LayerGroup(
        (), PageGroup(caches, Packing.STRIDED, 128, 128), Rope(table, table, False), None
    )


class _Builder:
    layer_names = ("layer",)
    number = 0

    def build(self, *_: Any) -> None:
        return None


def worker(patch: pytest.MonkeyPatch) -> WorkerHalf:
    """A rank whose model does nothing, with room for 40 warm placeholders."""
    launching_nothing(patch)
    patch.setattr(side_forward, "metadata_builders", lambda _: [_Builder()])
    patch.setattr(ResidualArena, "warm_up", lambda _: None)
    patch.setattr("kvcomm_vllm.worker.side_forward.forward_context", lambda *_: nullcontext())
    vllm_config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8192, max_num_seqs=256),
        model_config=SimpleNamespace(enable_prompt_embeds=False, supports_multimodal_inputs=False),
        parallel_config=SimpleNamespace(rank=0, tensor_parallel_size=1),
    )
    runner = SimpleNamespace(
        device=DEVICE, vllm_config=vllm_config, model=lambda **given: given["positions"]
    )
    patch.setattr("kvcomm_vllm.worker.half.find_model_runner", lambda: runner)
    config = KVCommConfig.from_mapping({"mode": "anchor", "anchor_memory_mb": 8000}, "test")
    group = llama_8b()
    anchors = Anchors(Ground([group], config, PAGE, alone=True, single=True))
    assert anchors.room >= ENTRIES
    half = WorkerHalf(config, vllm_config, PAGE)
    computes = side_forward.SideForward(runner, PAGE)
    half.ready = Equipment([group], load_kernel(DEVICE), computes, {"anchor": anchors})
    return half


def request(
    number: int, spans: int, length: int, *, warm: bool = True, hole: int = 16
) -> RequestOps:
    """One with so many reused spans, each behind a hole, each of a placeholder of its own."""
    pages = list(range(-(-spans * (length + hole) // PAGE)))
    loads, holes = [], []
    for span in range(spans):
        start = span * (length + hole)
        holes.append(HoleOp(start, [1] * hole))
        entry = (number * spans + span) % ENTRIES if warm else -1
        loads.append(LoadOp(pages, 3, 100, start + hole, length, entry, hole))
    return RequestOps(str(number), pages, loads, holes)
