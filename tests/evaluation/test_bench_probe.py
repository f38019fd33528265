# SPDX-License-Identifier: Apache-2.0
"""What a server does not serve is known before anything is measured."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("openai", reason="the bench extra is not installed")

from kvcomm_vllm.evaluation.bench.columns import KVCOMM, OWN, PLAIN
from kvcomm_vllm.evaluation.bench.probe import rehearse
from kvcomm_vllm.evaluation.bench.servers import Served
from kvcomm_vllm.evaluation.serving.client import Answer, RefusedError


class Client:
    """Serves ``anchor`` only, where it declines with ``word``; ``reports``: it has the plugin."""

    def __init__(self, reports: bool = True, word: str = "no_match") -> None:
        self.reports = reports
        self.word = word

    def stream(self, messages: Any, tokens: int, salt: str, *, hints: Any) -> None:
        if hints and hints["kvcomm"]["mode"] == "rotate":
            raise RefusedError("kvcomm.mode: 'rotate' is not allowed")

    def complete(self, messages: Any, tokens: int, salt: str, *, hints: Any) -> Answer:
        mode = hints["kvcomm"]["mode"]
        declined = {
            "paper": {"no_paper_memory": 1},
            "seam": {"mamba": 1},
            "anchor": {self.word: 1},
        }
        params = {"kvcomm": {"declined": declined[mode]}} if self.reports else None
        return Answer("", (), 1, 0, None, 1.0, {"kv_transfer_params": params})


def test_columns_that_are_refused_or_declined_as_a_whole_are_named_with_the_reason() -> None:
    client: Any = Client()
    servers = {PLAIN: Served(client), KVCOMM: Served(client)}
    found = rehearse(list(OWN.values()), servers)
    assert set(found) == {"rotate", "seam", "paper"}
    assert "not allowed" in found["rotate"]
    assert found["seam"].startswith("mamba: ")
    assert "paper.memory_mb" in found["paper"]


def test_a_server_that_dropped_the_plugin_is_not_measured_as_if_it_had_it() -> None:
    client: Any = Client(reports=False)
    servers = {PLAIN: Served(client), KVCOMM: Served(client)}
    found = rehearse(list(OWN.values()), servers)
    assert "no report" in found["anchor"]
    assert "plain" not in found


def test_a_reason_of_another_versions_server_is_named_and_ends_no_bench() -> None:
    client: Any = Client(word="moon_phase")
    servers = {PLAIN: Served(client), KVCOMM: Served(client)}
    found = rehearse(list(OWN.values()), servers)
    assert found["anchor"] == "'moon_phase' is no reason that this version of kvcomm knows"
    assert "plain" not in found
