# SPDX-License-Identifier: Apache-2.0
"""The files of a report: what stands first in them, what they never leave out."""

import json
from pathlib import Path

import pytest
from made_up_run import SETTINGS, save, task_row, write_run

pytest.importorskip("openai", reason="the bench extra is not installed")

from kvcomm_vllm.evaluation.report import write_report
from kvcomm_vllm.evaluation.workloads.rows import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with nothing to warn of."""
    folder = write_run(tmp_path_factory.mktemp("run"))
    assert [path.name for path in write_report(folder)] == ["report.json", "report.md"]
    return folder


@pytest.mark.slow
def test_a_significant_loss_is_said_first(tmp_path: Path) -> None:
    folder = write_run(tmp_path, tasks=20, stream=0, load=0, anchor_score=0.1)
    write_report(folder)
    alarm = "anchor scores significantly below plain vLLM on math: −"
    (found,) = json.loads((folder / "report.json").read_text())["alarms"]
    assert found.startswith(alarm)
    first = (folder / "report.md").read_text().splitlines()[0]
    assert first == f"**{found}**"


@pytest.mark.slow
def test_without_a_loss_there_is_no_alarm(folder: Path) -> None:
    assert json.loads((folder / "report.json").read_text())["alarms"] == []
    assert (folder / "report.md").read_text().splitlines()[0] == "# kvcomm bench"


@pytest.mark.slow
def test_equal_records_give_equal_files(folder: Path) -> None:
    names = ("report.json", "report.md")
    before = [(folder / name).read_bytes() for name in names]
    write_report(folder)
    assert [(folder / name).read_bytes() for name in names] == before


def test_markdown_tables_have_a_cell_for_every_heading(folder: Path) -> None:
    lines = (folder / "report.md").read_text().splitlines()
    tables = [lines[i - 1 :] for i, line in enumerate(lines) if line.startswith("| ---")]
    assert len(tables) >= 10
    for table in tables:
        rows = [line for line in table[: table.index("")] if line]
        assert len({line.count("|") for line in rows}) == 1
        assert len(rows) > 2


def test_conditions_are_stated(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    for fact in (
        "kvcomm bench --quick --model made-up/model --seed 7",
        "vllm 0.32.0",
        "2 cores",
    ):
        assert fact in text
    assert "Column paper: the server refuses this mode." in text
    assert "How the paper counts" in text


def test_what_was_not_measured_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path, tasks=2, stream=0, load=0)
    write_report(folder)
    text = (folder / "report.md").read_text().split("## Not measured")[1]
    for missing in ("(--rate)", "(--stream)", "A GPU", "Other runs, seeds"):
        assert missing in text


def test_settings_may_be_missing(tmp_path: Path) -> None:
    folder = save(tmp_path, [task_row("plain", "a")])
    with pytest.raises(DataError, match="nothing to report"):
        write_report(save(tmp_path / "empty", []))
    write_run(folder, tasks=1, stream=0, load=0, settings={})
    write_report(folder)
    text = (folder / "report.md").read_text()
    assert "Versions: not recorded" in text
    assert SETTINGS["machine"]["cpu"] not in text
