# SPDX-License-Identifier: Apache-2.0
"""What a step with reuse asks of a device beside its forwards: few launches, few copies, and
nothing that the host waits for.
"""

from __future__ import annotations

import pytest
from fake_device import Count, counting, request, worker

from kvcomm_vllm.messages import RequestOps, StepMessage


def count(requests: list[RequestOps]) -> Count:
    with pytest.MonkeyPatch.context() as patch:
        half = worker(patch)
        with counting() as counted:
            half.run(StepMessage(requests=requests))
        report = half.take_report()
    assert report is not None
    assert report.done == {ops.request_id for ops in requests}, "the step failed"
    return counted


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("requests", [1, 8])
def test_a_step_of_many_spans_takes_few_copies_and_launches_and_waits_for_none(
    requests: int, warm: bool
) -> None:
    step = [request(number, spans=5, length=512, warm=warm) for number in range(requests)]
    counted = count(step)
    assert counted.copies <= 3
    assert counted.waits == 0
    # for every 1,024 tokens of warm spans: turns, features, folding, codes, load
    chunks = -(-requests * 5 * 512 // 1024)
    assert counted.launches <= (5 * chunks if warm else 2)
    assert counted.launches <= 150


def test_launches_and_copies_depend_on_tokens_not_on_placeholders() -> None:
    one = count([request(0, spans=1, length=1000)])
    many = count([request(0, spans=40, length=25)])
    assert (one.copies, one.launches) == (many.copies, many.launches)


def test_memory_taken_on_the_way_does_not_grow_with_the_prompt() -> None:
    """But for the lists of what lies where."""
    short, long = (count([request(0, spans=1, length=tokens)]) for tokens in (2048, 20_480))
    assert 40_000 < short.peak_bytes / 1024 < 60_000  # of so many tokens at a time, so much each
    assert long.peak_bytes - short.peak_bytes <= 18_432 * 60
