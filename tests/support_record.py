# SPDX-License-Identifier: Apache-2.0
"""What has been run of each model family and option, for ``docs/support.md``.

``@pytest.mark.support(COLUMN, ROW)`` says of which promise a test is the proof; without a ROW it is
the family, or architecture, that the test is parametrised with. ``pytest --record-support FILE``
writes how these tests ended into a JSON file: vLLM's version -> row -> column -> outcome. What the
file holds of other rows and versions stays.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from kvcomm_vllm.guards.version import installed_version

COLUMNS = ("reuse", "exactness", "layer 0", "memory", "mixed")
PARAMETERS = ("run", "hybrid", "both", "refused", "architecture")  # that name a row
_PLACE, _VALUE = "support place", "support value"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-support", metavar="FILE", help="what was run, for docs/support.md")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--record-support")
    if path is not None:
        elsewhere = hasattr(config, "workerinput")
        config.pluginmanager.register(SupportRecord(Path(path).absolute(), elsewhere))


class SupportRecord:
    """A plugin of pytest.

    Args:
        path: of the JSON file.
        elsewhere: another process hears of all tests; this one names their places to it.
    """

    def __init__(self, path: Path, elsewhere: bool) -> None:
        self.path = path
        self.elsewhere = elsewhere
        self._rows: dict[str, dict[str, Any]] = defaultdict(dict)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        for mark in item.iter_markers("support"):
            item.user_properties.append((_PLACE, (row_of(mark, item), mark.args[0])))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.elsewhere or (report.when != "call" and report.outcome == "passed"):
            return
        told = dict(report.user_properties).get(_VALUE, "passed")
        for name, place in report.user_properties:
            if name == _PLACE and report.outcome != "skipped":
                row, column = place
                self._note(row, column, told if report.outcome == "passed" else "failed")

    def _note(self, row: str, column: str, outcome: Any) -> None:
        """Of several tests of one place the worst counts."""
        if self._rows[row].get(column) != "failed":
            self._rows[row][column] = outcome
        self._write()

    def _write(self) -> None:
        found = json.loads(self.path.read_text()) if self.path.exists() else {}
        version = (installed_version() or "").partition("+")[0]
        of_version = found.setdefault(version, {})
        for row, outcomes in self._rows.items():
            of_version[row] = {**of_version.get(row, {}), **outcomes}
        self.path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def row_of(mark: pytest.Mark, item: pytest.Item) -> str:
    column, *row = mark.args
    assert column in COLUMNS
    if row:
        return str(row[0])
    parameters = item.callspec.params  # type: ignore[attr-defined]
    return str(next(parameters[name] for name in PARAMETERS if name in parameters))


def tell(request: pytest.FixtureRequest, value: Any) -> None:
    """What is recorded of a test that passes, in place of "passed"."""
    request.node.user_properties.append((_VALUE, value))
