# SPDX-License-Identifier: Apache-2.0
"""The distance of two distributions of the next token."""

from __future__ import annotations

import math

import pytest
import torch

from kvcomm_vllm.worker.compare import divergence


def test_it_is_the_kl_divergence_in_nats() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.6, 0.1])
    found = divergence(p.log() + 5, q.log() - 3)
    assert found is not None
    wanted = 0.7 * math.log(0.7 / 0.3) + 0.2 * math.log(0.2 / 0.6)
    assert found.kl == pytest.approx(wanted, rel=1e-5)
    assert not found.same_top


def test_equal_logits_have_none_and_it_is_never_negative() -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    found = divergence(logits, logits.clone())
    assert found is not None
    assert found.kl == 0.0
    assert found.same_top
    near = divergence(logits, logits + 1e-7)
    assert near is not None
    assert near.kl >= 0.0


def test_tokens_that_can_never_follow_count_for_nothing() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0])
    padded = torch.cat([logits, torch.tensor([-torch.inf])])
    other = torch.tensor([2.0, 1.0, 3.0])
    plain = divergence(logits, other)
    masked = divergence(padded, torch.cat([other, torch.tensor([-torch.inf])]))
    assert plain is not None
    assert masked is not None
    assert masked.kl == pytest.approx(plain.kl)


def test_logits_that_are_no_numbers_say_nothing() -> None:
    broken = torch.tensor([1.0, math.nan])
    assert divergence(broken, torch.tensor([1.0, 2.0])) is None
