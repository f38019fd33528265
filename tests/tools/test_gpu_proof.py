# SPDX-License-Identifier: Apache-2.0
"""`make gpu`: stages end by themselves, say why they failed, run once, and fill a table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import prove_gpu
from gpu_proof import page, readers, stage
from gpu_proof.dummy_model import SHAPES, make
from gpu_proof.stages import Setting, stages

ROOT = Path(__file__).resolve().parents[2]
WRITE = "import json,sys; json.dump({'ms': 2.5}, open(sys.argv[-1], 'w'))"


def of(code: str, limit: float = 60.0, lack: str | None = None) -> stage.Stage:
    command = (sys.executable, "-c", code)
    return stage.Stage(
        "one", "Does it?", command, limit, readers.plain, {"WORD": "there"}, lambda: lack
    )


def test_a_stage_that_ends_well_gives_its_figures(tmp_path: Path) -> None:
    found = stage.carry_out(of(WRITE), tmp_path)
    assert (found.status, found.figures) == ("passed", {"ms": 2.5})
    assert found.command.startswith("WORD=there ")


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os; print(os.environ['WORD']); raise SystemExit(3)", "status 3: there"),
        ("pass", "FileNotFoundError"),
        ("import sys; open(sys.argv[-1], 'w').write('{')", "JSONDecodeError"),
    ],
)
def test_a_stage_that_does_not_says_why(code: str, why: str, tmp_path: Path) -> None:
    found = stage.carry_out(of(code), tmp_path)
    assert found.status == "failed"
    assert why in found.why


@pytest.mark.slow
def test_a_stage_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    found = stage.carry_out(of(code, limit=5.0), tmp_path)
    assert found.why == "took longer than 5 s"
    assert gone(int((tmp_path / "child").read_text()))


def gone(pid: int) -> bool:
    """Ended, or waiting for its parent to notice."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] == "Z":
                return True
            os.kill(pid, 0)
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


def test_what_a_stage_lacks_is_told_and_nothing_is_run(tmp_path: Path) -> None:
    found = stage.carry_out(of(WRITE, lack="no such thing"), tmp_path)
    assert (found.status, found.why) == ("not run", "no such thing")
    assert not list(tmp_path.iterdir())


def test_what_passed_is_not_run_again_and_what_failed_is(tmp_path: Path) -> None:
    about = {"device": "NVIDIA Some 1", "commit": "abc"}

    def run(code: str, again: bool = False, only: list[str] | None = None) -> str | None:
        found = prove_gpu.once(of(code), tmp_path, about, again, only)
        return found and found.status

    assert run("pass", only=["another"]) is None
    assert run("pass") == "failed"
    assert run(WRITE) == "passed"
    assert run("pass") == "passed"
    assert run("pass", again=True, only=["another"]) == "passed"
    assert run("pass", again=True) == "failed"
    assert prove_gpu.once(of("pass"), tmp_path, {**about, "commit": "d"}, False, ["two"]) is None


def test_figures_are_read_from_what_stages_write(tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    tests.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">'
        '<testcase classname="a" name="b"><failure/></testcase>'
        '<testcase classname="a" name="c"/></testsuite></testsuites>'
    )
    assert readers.tests(tests) == {"passed": 1, "skipped": 1, "broken": ["a::b"]}
    tests.write_text('<testsuites><testsuite tests="1" skipped="1"/></testsuites>')
    with pytest.raises(ValueError, match="no test passed"):
        readers.tests(tests)

    rows = [
        call(column, task, index, ms * (index + 1))
        for column, ms in (("plain", 80.0), ("anchor", 10.0))
        for task in range(3)
        for index in range(2)
    ]
    warm = {**call("anchor", 9, 1, 1e9), "warmup": True}
    lines = [json.dumps(row) for row in [*rows, warm, {"kind": "memory"}]]
    (tmp_path / "records.jsonl").write_text("\n".join(lines) + "\n")
    assert readers.agents(tmp_path) == {
        "agents": 2,
        "tasks": 3,
        "ttft ms": {"plain": 160.0, "anchor": 20.0},
        "sooner": {"anchor": 8.0},
    }


def call(column: str, task: int, index: int, ms: float) -> dict[str, Any]:
    fields = {"column": column, "task": str(task), "index": index, "ttft_ms": ms}
    return {"kind": "call", "phase": "lockstep", "warmup": False, **fields}


def test_the_page_tells_what_passed_failed_and_was_not_run(tmp_path: Path) -> None:
    outcomes = [
        stage.Outcome("a", "Is A right?", "passed", seconds=2.0, figures={"broken": [], "ms": 1.5}),
        stage.Outcome("b", "Is B?", "failed", "status 1: a | b\nc"),
        stage.Outcome("c", "Is C?", "not run", "flashinfer is not installed"),
    ]
    written = page.write({"device": "NVIDIA H200", "commit": "abc"}, outcomes, tmp_path)
    assert written.name == "nvidia-h200.md"
    text = written.read_text()
    assert "| Is A right? | passed | 2 | ms 1.5 |" in text
    assert "| Is B? | **failed** | 0 | status 1: a / b c |" in text
    assert "| Is C? | not run | 0 | flashinfer is not installed |" in text
    kept = json.loads((tmp_path / "nvidia-h200.json").read_text())
    assert [row["status"] for row in kept["stages"]] == ["passed", "failed", "not run"]


def test_stages_have_names_of_their_own_and_run_what_is_there(tmp_path: Path) -> None:
    found = list(stages(Setting(tmp_path, tmp_path, tmp_path, gpu=True)))
    assert len({one.name for one in found}) == len(found)
    for one in found:
        for part in one.command:
            if part.endswith(".py"):
                assert (ROOT / part).exists(), part


def test_without_a_device_nothing_is_run(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/prove_gpu.py"), "--model", str(tmp_path)]
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "nothing was run" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.model
def test_steps_are_measured_on_an_engine_of_dummy_weights(
    smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(SHAPES["tiny"], Path(smollm2), tmp_path / "model")
    setting = Setting(Path(smollm2), tmp_path / "model", tmp_path, gpu=False)
    (steps,) = (one for one in stages(setting) if one.name == "steps")
    found = stage.carry_out(steps, tmp_path)
    assert found.status == "passed", found.why
    figures = found.figures
    assert figures["side forward of 64 tokens, ms"]["all"] > 0
    assert figures["prompt"]["reused share"] > 0.7
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
