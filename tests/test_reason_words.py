# SPDX-License-Identifier: Apache-2.0
"""Promises of reasons: each is found by its word, and a word that is none is named."""

from __future__ import annotations

import pytest

from kvcomm_vllm.reasons import Reason


def test_a_reason_is_found_by_its_word() -> None:
    assert [Reason.of(reason.value) for reason in Reason] == list(Reason)


@pytest.mark.parametrize("word", ["moon_phase", "", "Mamba", "MAMBA"])
def test_a_word_that_is_no_reason_is_named(word: str) -> None:
    with pytest.raises(ValueError, match=f"^'{word}' is no reason that this version"):
        Reason.of(word)
