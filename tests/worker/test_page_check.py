# SPDX-License-Identifier: Apache-2.0
"""Block tables that attention reads differently from how pages are written are found at start."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from strided_layers import group_of, layer

from kvcomm_vllm.compat.layers import write_kv
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.worker.checks.page_check import check_page_sizes, page_fault
from kvcomm_vllm.worker.checks.unsupported import Unsupported
from kvcomm_vllm.worker.load import slots_of

BLOCK, HEADS, HEAD, LAYERS, VOCABULARY = 32, 2, 16, 3, 100
WIDTH = HEADS * HEAD
Reading = Callable[[list[int], torch.Tensor], torch.Tensor]


def right(table: list[int], tokens: torch.Tensor) -> torch.Tensor:
    """Slots of a sequence's tokens, as they are written."""
    return torch.tensor(table)[tokens // BLOCK] * BLOCK + tokens % BLOCK


class PagedModel:
    """A small transformer over pages, in the place of the side forward; ``reading`` is where its
    attention looks for a sequence's tokens.
    """

    def __init__(self, reading: Reading, kv_dtype: str = "float32", longest: int = 4096) -> None:
        self.reading = reading
        stored = torch.float32 if kv_dtype == "float32" else torch.uint8
        self.layers = [
            layer(f"layer {i}", torch.zeros(4, HEADS, BLOCK, 2 * HEAD, dtype=stored), kv_dtype)
            for i in range(LAYERS)
        ]
        self.group = group_of(self.layers)
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(VOCABULARY, WIDTH, generator=generator)
        self.weights = torch.randn(LAYERS, 4, WIDTH, WIDTH, generator=generator) / WIDTH**0.5
        self.forwards = 0
        config = SimpleNamespace(max_model_len=longest, get_vocab_size=lambda: VOCABULARY)
        self.runner = SimpleNamespace(model_config=config)

    def run(self, rows: list[Any], eager: bool = False) -> None:
        """As the side forward: every layer writes all rows before it attends."""
        assert eager
        self.forwards += 1
        hidden = [self.embedding[row.hole.tokens] for row in rows]
        for number, (each, weights) in enumerate(zip(self.layers, self.weights, strict=True)):
            for row, x in zip(rows, hidden, strict=True):
                slots = slots_of(row.block_ids, row.hole.start, len(row.hole.tokens), BLOCK)
                k, v = ((x @ weights[i]).view(-1, HEADS, HEAD) for i in (0, 1))
                write_kv(each, k, v, torch.from_numpy(slots))
            hidden = [
                x + self.attend(number, row, (x @ weights[2]).view(-1, HEADS, HEAD)) @ weights[3]
                for row, x in zip(rows, hidden, strict=True)
            ]

    def attend(self, number: int, row: Any, queries: torch.Tensor) -> torch.Tensor:
        from kvcomm_vllm.kernels import packing

        slots = self.reading(row.block_ids, torch.arange(row.end))
        k, v = packing.read(self.group.pages, number, slots)
        scores = torch.einsum("qhd,khd->hqk", queries, k) / HEAD**0.5
        ahead = torch.arange(row.end) > torch.arange(row.hole.start, row.end)[:, None]
        weights = scores.masked_fill(ahead, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)

    def fault(self) -> str | None:
        return page_fault([self.group], BLOCK, self)  # type: ignore[arg-type]


def manager_pages_as_kernel_pages(table: list[int], tokens: torch.Tensor) -> torch.Tensor:
    half = BLOCK // 2
    entries = torch.tensor([*table, 0, 0])  # what lies behind a row of a block table
    return entries[tokens // half] * half + tokens % half


def first_half_twice(table: list[int], tokens: torch.Tensor) -> torch.Tensor:
    return torch.tensor(table)[tokens // BLOCK] * BLOCK + tokens % (BLOCK // 2)


def another_page(table: list[int], tokens: torch.Tensor) -> torch.Tensor:
    return right([page + 1 for page in table], tokens)


def empty_page_before(table: list[int], tokens: torch.Tensor) -> torch.Tensor:
    return right([0, *table[1:]], tokens)


def other_way_round(table: list[int], tokens: torch.Tensor) -> torch.Tensor:
    return right(table[::-1], tokens)


def table_of_the_first_row(table: list[int], tokens: torch.Tensor) -> torch.Tensor:
    return right([1, 2], tokens)


WRONG = (
    manager_pages_as_kernel_pages,
    first_half_twice,
    another_page,
    empty_page_before,
    other_way_round,
    table_of_the_first_row,
)


@pytest.mark.parametrize("kv_dtype", ["float32", "fp8"])
def test_right_tables_pass_and_leave_no_kv_behind(kv_dtype: str) -> None:
    model = PagedModel(right, kv_dtype)
    assert model.fault() is None
    assert not any(each.kv_cache.any() for each in model.layers)


def test_the_check_is_a_few_forwards() -> None:
    model = PagedModel(right)
    model.fault()
    assert model.forwards <= 6


def test_models_of_random_small_weights_pass_and_wrong_tables_are_seen_in_them() -> None:
    """As ``--load-format dummy`` makes them: next to nothing that a token attends to shows."""
    for reading in (right, empty_page_before):
        model = PagedModel(reading)
        model.weights *= 1e-4
        model.embedding *= 1e-3
        assert (model.fault() is None) is (reading is right)


@pytest.mark.parametrize("reading", WRONG, ids=lambda reading: reading.__name__)
@pytest.mark.parametrize("kv_dtype", ["float32", "fp8"])
def test_wrong_tables_are_seen(reading: Reading, kv_dtype: str) -> None:
    assert PagedModel(reading, kv_dtype).fault() is not None


def test_a_server_of_one_request_at_a_time_passes() -> None:
    """Its forwards have a row each."""
    model = PagedModel(right)
    whole = model.run
    model.run = lambda rows, eager=False: [whole([row], eager) for row in rows]  # type: ignore[assignment,func-returns-value]
    assert model.fault() is None


def test_there_is_nothing_to_see_where_no_request_has_a_second_page() -> None:
    model = PagedModel(other_way_round, longest=BLOCK)
    assert model.fault() is None
    assert model.forwards == 0


def test_a_second_page_may_have_few_tokens() -> None:
    assert PagedModel(right, longest=BLOCK + 1).fault() is None
    assert PagedModel(empty_page_before, longest=BLOCK + 1).fault() is not None


def builder(**changes: Any) -> Any:
    settings = {"layer_names": ["a layer"], "block_size": 128, "kernel_block_size": 64, **changes}
    return SimpleNamespace(**settings)


def pages(tokens: int) -> dict[str, Any]:
    return {"a layer": SimpleNamespace(kv_cache=torch.zeros(4, 2, tokens, 2))}


def test_pages_of_the_size_that_attention_reads_pass() -> None:
    check_page_sizes(pages(64), [builder()], 128)
    check_page_sizes({}, [builder()], 128)  # a layer without a cache of its own


def test_pages_of_another_size_than_attention_reads_are_refused() -> None:
    with pytest.raises(Unsupported, match=r"a layer: pages of 128 tokens, .* of 64") as caught:
        check_page_sizes(pages(128), [builder()], 128)
    assert caught.value.reason is Reason.UNKNOWN_LAYOUT


def test_block_tables_in_other_pages_than_ours_are_refused() -> None:
    with pytest.raises(Unsupported, match="256-token pages, not 128") as caught:
        check_page_sizes(pages(64), [builder(block_size=256)], 128)
    assert caught.value.reason is Reason.UNKNOWN_LAYOUT
