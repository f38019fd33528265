# SPDX-License-Identifier: Apache-2.0
"""The whole demo on real servers, with the first layers of a real model: what it promises are
counts of tokens, and which these are does not depend on how well the model answers.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.http, pytest.mark.model]
pytest.importorskip("openai", reason="the bench extra is not installed")
pytest.importorskip("matplotlib", reason="the bench extra is not installed")

from serving import AS_ON_ONE_GPU  # noqa: E402

ANSWER_TOKENS = 40
TIMEOUT_SECONDS = 1500


def shown(model: str, out: Path, *options: str) -> dict[str, Any]:
    """The report of a demo that has printed its table, drawn its picture and stopped its server."""
    command = [sys.executable, "-m", "kvcomm_vllm.cli.main", "demo", "--model", model]
    command += ["--quick", "--out", str(out), f"--server-arg={AS_ON_ONE_GPU}", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Time to first token" in done.stdout
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    left = subprocess.run(["pgrep", "-f", f"{model} .*{out}"], capture_output=True)
    assert left.returncode == 1, "a server is still running"
    found: dict[str, Any] = json.loads((out / "demo.json").read_text())
    return found


def test_the_demo_shows_reuse_from_the_second_agent_on(short_smollm2: str, tmp_path: Path) -> None:
    report = shown(short_smollm2, tmp_path, "--answer-tokens", str(ANSWER_TOKENS))

    first, *later = report["agents"]
    assert first["reused"] == 0, "the first agent of a new question has nothing to reuse"
    for row in later:
        assert row["reused"] > row["prompt_tokens"] / 3
    # a note that says nearly what an earlier one says is a second copy, and computed
    assert later[-1]["reused"] > later[0]["reused"]
    for row in report["agents"]:
        assert row["local"] + row["reused"] + row["computed"] == row["prompt_tokens"]

    for call in report["calls"]:
        cached = call["cached_tokens"]
        assert cached["plain"] == 0, "the salted request must find an empty cache"
        assert 0 < cached["prefix_cache"] < call["prompt_tokens"] / 2, "only the system prompt"

    for agent in report["trace"][1:]:
        spans = agent["report"]["spans"]
        assert {kind for _, _, kind in spans} == {"local", "reused", "computed"}
        assert spans[0][0] == 0
        assert spans[-1][1] == agent["prompt_tokens"]


def test_behind_an_edit_most_of_the_prompt_is_reused_and_plain_vllm_computes_it(
    short_smollm2: str, tmp_path: Path
) -> None:
    report = shown(short_smollm2, tmp_path, "--scene", "edit", "--answer-tokens", "1")
    first, *edits = report["edits"]
    assert first["computed_kvcomm"] == first["computed_plain"] == first["prompt_tokens"]
    assert len(edits) == 8
    for row in edits:
        assert row["computed_kvcomm"] < row["prompt_tokens"] / 4 < row["computed_plain"]
    assert [call["agent"] for call in report["calls"]] == [row["edit"] for row in report["edits"]]
    for call in report["calls"]:
        treated = call["treatment"]
        total = treated["local"] + treated["reused"] + treated["computed"]
        assert total == call["prompt_tokens"]
