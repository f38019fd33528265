# SPDX-License-Identifier: Apache-2.0
"""Ten minutes of everything at once on a server short of memory (``make soak``).

``SOAK_SECONDS`` and ``SOAK_SEED`` say how long and which script; results lie in ``out/soak``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvcomm_vllm.evaluation.soak.options import Options
from kvcomm_vllm.evaluation.soak.promises import Promise
from kvcomm_vllm.evaluation.soak.result import Result
from kvcomm_vllm.evaluation.soak.run import main
from kvcomm_vllm.evaluation.soak.script import DECK, KINDS

pytestmark = pytest.mark.soak

SHOWN = 5
DEFAULT = Options("")


@pytest.fixture(scope="module")
def soak(smollm2: str, pytestconfig: pytest.Config) -> Result:
    """One run for all tests of this module; what it says goes to the terminal as it comes."""
    arguments = ["--model", smollm2, "--out", str(Path(pytestconfig.rootpath, DEFAULT.out))]
    for name in ("seconds", "seed"):
        if given := os.environ.get(f"SOAK_{name.upper()}"):
            arguments += [f"--{name}", given]
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        return main(arguments)


@pytest.mark.parametrize("promise", Promise)
def test_what_must_hold_has_held(soak: Result, promise: Promise) -> None:
    broken = [fault for fault in soak.faults if fault.promise is promise]
    assert not broken, "\n".join(f"{one.kind} #{one.number} {one.detail}" for one in broken[:SHOWN])


def test_every_kind_of_request_was_sent(soak: Result) -> None:
    sent = {outcome.item.kind for outcome in soak.outcomes}
    assert len(soak.outcomes) < DECK or sent == {make.__name__ for make in KINDS}
    assert len(soak.outcomes) >= 24, "hardly anything was sent"


def test_the_server_was_short_of_memory(soak: Result) -> None:
    assert soak.reading.preemptions
    assert soak.reading.reasons["source_evicted"]


def test_text_was_reused_meanwhile(soak: Result) -> None:
    assert soak.reading.requests["reused"]
    assert soak.reading.tokens["reused"]
