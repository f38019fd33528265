# SPDX-License-Identifier: Apache-2.0
"""Tests that need another process: they are collected as usual, the selected ones run in one child
pytest with another environment, and each reports the child's result as its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETED_FILES, MOCKED_FILES = "_interpreted.py", "_mocked_cuda.py"


def scope_of(nodeid: str) -> str:
    """What of a test must run in one process: its file, or all files of its child."""
    file = nodeid.split("::", 1)[0]
    children = (INTERPRETED_FILES, MOCKED_FILES)
    return next((child for child in children if file.endswith(child)), file)


class ChildTests:
    """The tests of files whose names end in ``suffix``; its methods are hooks of a conftest.

    Args:
        name: of the variable that tells the child where to write its results.
        environment: what the child has besides ours.
        in_place: they run here after all.
    """

    def __init__(
        self, suffix: str, name: str, environment: dict[str, str], in_place: bool = False
    ) -> None:
        self.suffix = suffix
        self.name = name
        self.environment = environment
        self.in_place = in_place or name in os.environ
        self._results = pytest.StashKey[dict[str, tuple[str, str]]]()

    def chosen(self, item: pytest.Item) -> bool:
        return item.path.name.endswith(self.suffix)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Function) -> None:
        """Leave fixtures to the child, too."""
        if not self.in_place and self.chosen(item):
            item.fixturenames.clear()

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool | None:
        """Report the child's result in place of running the test here."""
        if self.in_place or not self.chosen(pyfuncitem):
            return None
        stash = pyfuncitem.session.stash
        if self._results not in stash:
            factory = pyfuncitem.config._tmp_path_factory  # type: ignore[attr-defined]
            stash[self._results] = self._run(pyfuncitem.session, factory.mktemp("child"))
        outcome, text = stash[self._results].get(
            pyfuncitem.nodeid, ("failed", "the child process did not report this test")
        )
        if outcome == "skipped":
            pytest.skip(text)
        if outcome != "passed":
            pytest.fail(text, pytrace=False)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """In the child: write every result where the parent reads it."""
        target = os.environ.get(self.name)
        if target is None or (report.when != "call" and report.outcome == "passed"):
            return
        line = {"id": report.nodeid, "outcome": report.outcome, "text": report.longreprtext}
        with Path(target).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _run(self, session: pytest.Session, folder: Path) -> dict[str, tuple[str, str]]:
        selected, written = folder / "selected.txt", folder / "results.jsonl"
        selected.write_text("\n".join(i.nodeid for i in session.items if self.chosen(i)))
        env = {**os.environ, **self.environment, self.name: str(written)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"@{selected}"]
        done = subprocess.run(
            command,
            cwd=session.config.rootpath,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        if not written.exists():
            pytest.fail(f"the child process ran no test:\n{done.stdout}{done.stderr}")
        lines = (json.loads(line) for line in written.read_text().splitlines())
        return {line["id"]: (line["outcome"], line["text"]) for line in lines}
