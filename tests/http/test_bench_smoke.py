# SPDX-License-Identifier: Apache-2.0
"""`kvcomm bench` on real servers with a real model: records, interruption, repetition.

One run serves all tests: it is interrupted, and continued on servers that know nothing of it. What
both sessions have in common is their warm-up.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.http, pytest.mark.model]
pytest.importorskip("openai", reason="the bench extra is not installed")

from serving import AS_ON_ONE_GPU, FRUGAL  # noqa: E402

from kvcomm_vllm.evaluation.bench.records import VARYING  # noqa: E402

TIMEOUT_SECONDS = 900
BENCH = [sys.executable, "-m", "kvcomm_vllm.cli.main", "bench"]
COLUMNS = ["plain_nocache", "plain", "anchor", "paper"]
AGENTS, TASKS, STREAM, ANSWER_TOKENS = 2, 3, 1, 4
SIZES = {"agents": AGENTS, "prefix-tokens": 48, "input-tokens": 96, "output-tokens": ANSWER_TOKENS}
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Continued:
    """A run in two sessions: the records, and those that the first one left behind."""

    folder: Path
    status: int
    kept: Rows

    @property
    def rows(self) -> Rows:
        return read(self.folder)

    def calls(self, column: str) -> Rows:
        """Timed ones, of all tasks."""
        return [
            row
            for row in self.rows
            if (row["kind"], row["phase"], row["column"]) == ("call", "lockstep", column)
            and not row["warmup"]
        ]


def read(folder: Path) -> Rows:
    """Whole records; the last line may be on its way."""
    path = folder / "records.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def ended(rows: Rows) -> set[tuple[str, str]]:
    """Phase and name of the tasks that are timed and have ended."""
    found = [row for row in rows if row["kind"] == "task" and not row["warmup"]]
    return {(row["phase"], row["task"]) for row in found}


def command(model: str, out: Path) -> list[str]:
    config = out / "given.yaml"
    # three tasks of random words teach little; here it is enough that they are corrected at all
    config.write_text(f"max_anchor_error: 1.0\n{FRUGAL}paper: {{memory_mb: 128}}\n")
    return [
        *[*BENCH, "--model", model, "--workload", "synthetic"],
        *["--tasks", str(TASKS), "--stream", str(STREAM), "--columns", ",".join(COLUMNS)],
        *["--config", str(config), "--out", str(out), f"--server-arg={AS_ON_ONE_GPU}"],
        *(part for name, size in SIZES.items() for part in (f"--{name}", str(size))),
    ]


@pytest.fixture(scope="module")
def run(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Continued:
    out = tmp_path_factory.mktemp("run")
    said = out / "said.txt"
    with said.open("wb") as sink:
        first = subprocess.Popen(command(smollm2, out), stdout=sink, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + TIMEOUT_SECONDS
        while not ended(read(out)):
            assert first.poll() is None, said.read_text()
            assert time.monotonic() < end
            time.sleep(0.05)
        # not SIGINT, which what was started in the background may be set to ignore
        first.send_signal(signal.SIGTERM)
        status = first.wait(TIMEOUT_SECONDS)
    finally:
        first.kill()
    kept = read(out)
    done = subprocess.run(
        [*BENCH, "--resume", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Continued(out, status, kept)


def test_every_column_has_every_call_of_every_task(run: Continued) -> None:
    for column in COLUMNS:
        found = run.calls(column)
        assert len(found) == AGENTS * TASKS, column
        assert all(row["output_tokens"] == ANSWER_TOKENS for row in found)
    settings = json.loads((run.folder / "run.json").read_text())
    assert settings["complete"]
    assert len(settings["servers"]) == 2 * 2, "a session has two"
    assert not any(column["not_served"] for column in settings["columns"].values())
    assert [session["late"] for session in settings["sessions"]] == [0, 0]


def test_the_servers_did_what_the_columns_say(run: Continued) -> None:
    assert all(row["cached_tokens"] == 0 for row in run.calls("plain_nocache"))
    for row in run.calls("plain"):
        assert row["full_hit_ms"] > 0
        assert row["reused"] is None
    for row in run.calls("anchor"):
        assert row["local"] + row["reused"] + row["computed"] == row["prompt_tokens"]
        assert bool(row["reused"]) == (row["index"] > 0), "the first agent has nobody to quote"
        assert row["repeated_tokens"] <= row["prompt_tokens"]
    memory = [row for row in run.rows if row["kind"] == "memory"]
    assert any(row["anchors"] for row in memory if row["column"] == "anchor"), "nothing was learned"
    learning = run.calls("anchor") + run.calls("paper")
    assert any(row["corrected"] for row in learning), "what was learned is unused"
    assert {row["column"] for row in memory} == {"plain", "anchor"}
    assert all(row["resident_mb"] > 100 for row in memory)
    assert all(row["kv_usage"] == 0 for row in memory), "pages are held while nobody is served"


def test_what_does_not_depend_on_time_is_the_same_on_other_servers(run: Continued) -> None:
    ignored = {*VARYING, "session"}
    first, second = (
        [
            {name: value for name, value in row.items() if name not in ignored}
            for row in run.rows
            if row["warmup"] and row["session"] == session and row["phase"] == "lockstep"
        ]
        for session in (0, 1)
    )
    assert [row["kind"] for row in first].count("call") == AGENTS * len(COLUMNS)
    assert first == second


def test_an_interrupted_run_is_continued_behind_its_last_task(run: Continued) -> None:
    assert run.status == 128 + signal.SIGTERM
    assert run.rows[: len(run.kept)] == run.kept
    assert len(ended(run.kept)) == 1
    assert len(ended(run.rows)) == TASKS + STREAM
    ours = f"--kvcomm-config {run.folder}"
    left = subprocess.run(["pgrep", "-f", "--", ours], capture_output=True)
    assert left.returncode == 1, "a server is still running"
