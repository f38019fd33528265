# SPDX-License-Identifier: Apache-2.0
"""Runs the tests in ``test_*_interpreted.py`` in one child process under Triton's interpreter.

Triton decides when it is imported whether kernels are compiled or interpreted, and other tests of
the same run (vLLM's own) must not be interpreted. So those tests are collected here as usual, the
selected ones run in a child pytest with TRITON_INTERPRET=1, and each reports the child's result as
its own. With the variable already set, or on a machine whose Triton has a device (set
KVCOMM_KERNELS_ON_DEVICE=1), they run in place.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RESULTS = "KVCOMM_INTERPRETED_RESULTS"
IN_PLACE = os.environ.get("TRITON_INTERPRET") == "1" or "KVCOMM_KERNELS_ON_DEVICE" in os.environ
_child_results = pytest.StashKey[dict[str, tuple[str, str]]]()


def _interpreted(item: pytest.Item) -> bool:
    return item.path.name.endswith("_interpreted.py")


def _run_child(session: pytest.Session, folder: Path) -> dict[str, tuple[str, str]]:
    selected, written = folder / "selected.txt", folder / "results.jsonl"
    ids = [item.nodeid for item in session.items if _interpreted(item)]
    selected.write_text("\n".join(ids))
    # One thread: blocks of a few kilobytes are not worth waking a pool for.
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", RESULTS: str(written)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"@{selected}"]
    done = subprocess.run(
        command, cwd=session.config.rootpath, env=env, capture_output=True, text=True, check=False
    )
    if not written.exists():
        pytest.fail(f"the interpreter process ran no test:\n{done.stdout}{done.stderr}")
    lines = (json.loads(line) for line in written.read_text().splitlines())
    return {line["id"]: (line["outcome"], line["text"]) for line in lines}


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Report the child's result in place of running the test here."""
    if IN_PLACE or not _interpreted(pyfuncitem):
        return None
    stash = pyfuncitem.session.stash
    if _child_results not in stash:
        factory = pyfuncitem.config._tmp_path_factory  # type: ignore[attr-defined]
        stash[_child_results] = _run_child(pyfuncitem.session, factory.mktemp("interpreted"))
    outcome, text = stash[_child_results].get(
        pyfuncitem.nodeid, ("failed", "the interpreter process did not report this test")
    )
    if outcome == "skipped":
        pytest.skip(text)
    if outcome != "passed":
        pytest.fail(text, pytrace=False)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the child: write every result where the parent reads it."""
    target = os.environ.get(RESULTS)
    if target is None or (report.when != "call" and report.outcome == "passed"):
        return
    line = {"id": report.nodeid, "outcome": report.outcome, "text": report.longreprtext}
    with Path(target).open("a") as file:
        file.write(json.dumps(line) + "\n")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Interpreting and compiling takes minutes: not for the fast lane."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slow)
