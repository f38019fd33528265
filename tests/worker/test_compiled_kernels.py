# SPDX-License-Identifier: Apache-2.0
"""No request compiles a kernel: all that one can meet has been met at start.

Launches are recorded with the key under which Triton looks for a compiled kernel: types,
alignments, constants and options, computed by Triton's own code for a GPU. Nothing is launched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.kernels.pages import Packing, PageGroup
from kvcomm_vllm.messages import AnchorRows, EstimateOp, LoadOp, ProbeOp, RequestOps
from kvcomm_vllm.worker import accelerator
from kvcomm_vllm.worker.corrections.anchor import Anchors
from kvcomm_vllm.worker.corrections.base import Ground
from kvcomm_vllm.worker.corrections.paper import PaperArena
from kvcomm_vllm.worker.kv_view import LayerGroup
from kvcomm_vllm.worker.load import load_kernel, run_loads, token_moves, warm_up_loads
from kvcomm_vllm.worker.rope import Rope, no_rope

PAGE, PAGES, HEADS = 16, 600, 3
FIRST, EACH = 180, 135  # pages behind all sources, and of a request
EXAMPLES = settings(max_examples=20, deadline=None, derandomize=True)
Key = tuple[Any, ...]


@dataclass
class Launches:
    """Keys of all launches so far."""

    keys: set[Key] = field(default_factory=set)

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        backend = make_backend(GPUTarget("cuda", 90, 32))
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, key, options = binder(*args, **kwargs)
        self.keys.add((kernel.__name__, *map(str, key), str(sorted(options.items()))))


@pytest.fixture(scope="module")
def launches() -> Iterator[Launches]:
    """On a device whose memory is host memory."""
    from triton.runtime.jit import JITFunction

    made = Launches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda kernel, *a, **k: made.run(kernel, *a, **k))
        patch.setattr(accelerator, "accelerated", lambda _: True)
        patch.setattr("kvcomm_vllm.worker.upload.send", lambda data, _: data.clone())
        yield made


def layer_group(layers: int, dim: int, rotary: int, dtype: torch.dtype) -> LayerGroup:
    caches = [torch.zeros(PAGES, HEADS, PAGE, 2 * dim, dtype=dtype) for _ in range(layers)]
    angle = torch.arange(9000)[:, None] / 50 ** (torch.arange(rotary // 2) / max(1, rotary // 2))
    rope = Rope(angle.cos(), angle.sin(), False) if rotary else no_rope()
    return LayerGroup(
        (), PageGroup(tuple(caches), Packing.STRIDED, dim, rope.rotary_dim), rope, None
    )


@dataclass
class Rank:
    """All that serves requests, made and warmed as at start."""

    groups: list[LayerGroup]
    anchors: Anchors
    paper: PaperArena

    def serve(self, requests: list[RequestOps], probes: list[ProbeOp]) -> None:
        plain = [(ops.block_ids, load) for ops in requests for load in ops.loads if load.entry < 0]
        kernel, device = load_kernel(torch.device("cpu")), torch.device("cpu")
        if plain:
            run_loads(self.groups, token_moves(plain, PAGE, device), kernel)
        for correction in (self.anchors, self.paper):
            correction.load(requests)
        for probe in probes:
            self.paper.distances_of(probe)


@pytest.fixture(scope="module")
def rank(launches: Launches) -> Rank:
    """Two layer groups: one layer, which has no deviation; and three that are not rotated."""
    groups = [
        layer_group(1, 64, 64, torch.bfloat16),
        layer_group(3, 80, 0, torch.bfloat16),
    ]
    settings = {
        "mode": "anchor",
        "anchor_memory_mb": 64,
        "estimator": {"map_inputs": 100},
        "paper": {"memory_mb": 4},
    }
    config = KVCommConfig.from_mapping(settings, "test")
    ground = Ground(groups, config, PAGE, alone=True, single=True)
    warm_up_loads(groups, load_kernel(torch.device("cpu")))
    return Rank(groups, Anchors(ground), PaperArena(ground))


def load_op(first: int, length: int, entry: int, mapped: bool, index: int) -> LoadOp:
    blocks = list(range(first, first + -(-(length + 5) // PAGE)))
    return LoadOp(blocks, 5, 40, 7, length, entry, index, mapped)


loads = st.builds(
    load_op,
    first=st.integers(0, 20),
    length=st.one_of(st.integers(1, 40), st.sampled_from([16, 1024, 1040, 2048])),
    entry=st.integers(-1, 3),
    mapped=st.booleans(),
    index=st.integers(-5, 100),
)


def ops_of(given_loads: list[LoadOp]) -> list[RequestOps]:
    """Each load into pages of its own request, behind all sources."""
    return [
        RequestOps(str(number), list(range(FIRST + EACH * number, PAGES)), [load], [])
        for number, load in enumerate(given_loads)
    ]


@EXAMPLES
@given(step=st.lists(loads, min_size=1, max_size=3))
def test_loads_meet_no_kernel_that_was_not_met_at_start(
    rank: Rank, launches: Launches, step: list[LoadOp]
) -> None:
    known = set(launches.keys)
    rank.serve(ops_of(step), [])
    assert launches.keys <= known


@EXAMPLES
@given(
    tokens=st.integers(1, 50),
    anchors=st.lists(st.integers(0, 300), min_size=1, max_size=5),
    behind=st.integers(0, 20),
)
def test_probes_and_estimates_meet_no_kernel_that_was_not_met_at_start(
    rank: Rank, launches: Launches, tokens: int, anchors: list[int], behind: int
) -> None:
    known = set(launches.keys)
    base = load_op(0, tokens, -1, True, 0)
    rows = [AnchorRows(start, tokens, behind) for start in anchors]
    start = base.prompt_start + tokens
    stop = start + behind
    estimate = EstimateOp(base, rows, start, stop, stop, [behind] * len(rows))
    ops = RequestOps("0", list(range(FIRST, PAGES)), [], [], [estimate])
    rank.serve([ops], [ProbeOp("0", [(base, rows)])])
    assert launches.keys <= known


def test_every_kernel_is_met_at_start(rank: Rank, launches: Launches) -> None:
    assert {key[0] for key in launches.keys} == {
        *("turns_kernel", "load_kernel", "collect_kernel", "fold_kernel", "code_kernel"),
        *("load_coded_kernel", "load_sum_kernel", "distance_kernel"),
    }
