# SPDX-License-Identifier: Apache-2.0
"""`kvcomm bench` on real servers with a real model: records, interruption, repetition."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.http, pytest.mark.model]
pytest.importorskip("openai", reason="the bench extra is not installed")

from kvcomm_vllm.evaluation.bench.records import VARYING  # noqa: E402

TIMEOUT_SECONDS = 1500
COLUMNS = ["plain_nocache", "plain", "anchor", "paper"]
AGENTS, TASKS, STREAM = 2, 3, 1


def command(model: str, out: Path) -> list[str]:
    sizes = {"agents": AGENTS, "prefix-tokens": 48, "input-tokens": 160, "output-tokens": 12}
    config = out.with_suffix(".yaml")
    # three tasks of random words teach little; here it is enough that they are corrected at all
    config.write_text("max_anchor_error: 1.0\n")
    return [
        *[sys.executable, "-m", "kvcomm_vllm.cli.main", "bench", "--model", model],
        *["--workload", "synthetic", "--tasks", str(TASKS), "--stream", str(STREAM)],
        *["--columns", ",".join(COLUMNS), "--config", str(config), "--out", str(out)],
        *(part for name, size in sizes.items() for part in (f"--{name}", str(size))),
    ]


def run(model: str, out: Path) -> None:
    done = subprocess.run(
        command(model, out), capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr


def rows(out: Path) -> list[dict[str, Any]]:
    """Whole records; the last line may be on its way."""
    path = out / "records.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.fixture(scope="module")
def whole(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted."""
    out = tmp_path_factory.mktemp("whole")
    run(smollm2, out)
    return out


def of_column(out: Path, column: str) -> list[dict[str, Any]]:
    calls = [row for row in rows(out) if row["kind"] == "call" and row["phase"] == "lockstep"]
    return [row for row in calls if row["column"] == column and not row["warmup"]]


def test_every_column_has_every_call_of_every_task(whole: Path) -> None:
    for column in COLUMNS:
        found = of_column(whole, column)
        assert len(found) == AGENTS * TASKS, column
        assert all(row["output_tokens"] == 12 for row in found)
    settings = json.loads((whole / "run.json").read_text())
    assert settings["complete"]
    assert len(settings["servers"]) == 2
    assert not any(column["not_served"] for column in settings["columns"].values())
    assert settings["sessions"][0]["late"] == 0


def test_the_servers_did_what_the_columns_say(whole: Path) -> None:
    assert all(row["cached_tokens"] == 0 for row in of_column(whole, "plain_nocache"))
    for row in of_column(whole, "plain"):
        assert row["full_hit_ms"] > 0
        assert row["reused"] is None
    for row in of_column(whole, "anchor"):
        assert row["local"] + row["reused"] + row["computed"] == row["prompt_tokens"]
        assert bool(row["reused"]) == (row["index"] > 0), "the first agent has nobody to quote"
        assert row["repeated_tokens"] <= row["prompt_tokens"]
    memory = [row for row in rows(whole) if row["kind"] == "memory"]
    assert any(row["anchors"] for row in memory if row["column"] == "anchor"), "nothing was learned"
    assert any(row["corrected"] for row in of_column(whole, "anchor")), "what was learned is unused"
    assert {row["column"] for row in memory} == {"plain", "anchor"}
    assert all(row["resident_mb"] > 100 for row in memory)
    assert all(row["kv_usage"] == 0 for row in memory), "pages are held while nobody is served"


def _same(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All but times."""
    return [{name: value for name, value in row.items() if name not in VARYING} for row in found]


def ended(out: Path) -> set[tuple[str, str]]:
    """Phase and name of the tasks that are timed and have ended."""
    found = [row for row in rows(out) if row["kind"] == "task" and not row["warmup"]]
    return {(row["phase"], row["task"]) for row in found}


def test_an_interrupted_run_agrees_with_one_that_was_not_and_is_continued(
    smollm2: str, tmp_path: Path, whole: Path
) -> None:
    running = subprocess.Popen(
        command(smollm2, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + TIMEOUT_SECONDS
        while not ended(tmp_path):
            assert running.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        # not SIGINT, which what was started in the background may be set to ignore
        running.send_signal(signal.SIGTERM)
        assert running.wait(TIMEOUT_SECONDS) == 128 + signal.SIGTERM
    finally:
        running.kill()
    kept = rows(tmp_path)
    assert _same(kept) == _same(rows(whole))[: len(kept)]
    assert ended(tmp_path) < ended(whole)

    resumed = [sys.executable, "-m", "kvcomm_vllm.cli.main", "bench", "--resume"]
    done = subprocess.run(
        [*resumed, "--out", str(tmp_path)], capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(tmp_path)[: len(kept)] == kept
    assert ended(tmp_path) == ended(whole)
    left = subprocess.run(["pgrep", "-f", f"{smollm2} .*{tmp_path}"], capture_output=True)
    assert left.returncode == 1, "a server is still running"
