# SPDX-License-Identifier: Apache-2.0
"""The command's options, its means, table, JSON and picture; without an engine."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("matplotlib", reason="the bench extra is not installed")

from kvcomm_vllm.cli.main import app
from kvcomm_vllm.evaluation.fidelity.figure import lines, write_figure
from kvcomm_vllm.evaluation.fidelity.measure import Score
from kvcomm_vllm.evaluation.fidelity.options import anchor_points, points
from kvcomm_vllm.evaluation.fidelity.report import render_table, summarise, write_json
from kvcomm_vllm.evaluation.modes import hints_of
from kvcomm_vllm.evaluation.workloads.rows import DataError
from kvcomm_vllm.hints import parse_hints

ONE = Score(
    workload="judge",
    mode="seam16",
    anchors=0,
    case="q, shuffled",
    group="q",
    kl1=0.02,
    kl_mean=0.01,
    top1=1.0,
    clear=1.0,
    prefix=0.5,
    said=2.0,
    dense_said=2.0,
    same_answer=True,
    prompt_tokens=100,
    local=10,
    reused=60,
    computed=30,
    corrected=0,
)
OTHER = replace(ONE, case="q, reversed", kl_mean=0.03, said=1.0, same_answer=False)
LEARNT = [
    replace(s, mode="anchor16", anchors=n, anchor_mb=12.0 * n)
    for n in (20, 0)
    for s in (ONE, OTHER)
]
SCORES = [ONE, OTHER, *LEARNT]


def test_names_of_modes_are_hints_the_server_takes() -> None:
    assert hints_of("rotate") == {"mode": "rotate"}
    assert hints_of("seam") == {"mode": "seam"}
    assert hints_of("anchor0") == {"mode": "anchor", "seam_tokens": 0}
    for name in ("rotate", "seam", "seam4", "anchor", "anchor16"):
        assert parse_hints({"kvcomm": hints_of(name)}).mode == hints_of(name)["mode"]
    for name in ("rotate4", "seam-1", "seam 16", "seam999999", ""):
        with pytest.raises(DataError, match="seam"):
            hints_of(name)


def test_only_modes_that_learn_are_measured_at_several_points() -> None:
    assert anchor_points([20], curve=False) == (0, 20)
    assert anchor_points([20], curve=True) == (0, 1, 2, 5, 10, 20)
    assert anchor_points([5], curve=True) == (0, 1, 2, 5)
    assert points(["seam4", "anchor4"], (0, 5)) == [("seam4", 0), ("anchor4", 0), ("anchor4", 5)]


def test_means_are_over_the_prompts_of_a_point() -> None:
    seam, *_ = summaries = summarise(SCORES)
    assert [(s.mode, s.anchors) for s in summaries] == [
        ("seam16", 0),
        ("anchor16", 20),
        ("anchor16", 0),
    ]
    assert seam.kl_mean == pytest.approx(0.02)
    assert (seam.prompts, seam.reused, seam.same_answer) == (2, 0.6, 0.5)
    assert (seam.consistency, seam.dense_consistency) == (0.0, 1.0)


def test_the_table_shows_every_point_within_eighty_columns() -> None:
    console = Console(width=80)
    with console.capture() as shown:
        console.print(render_table("judge", summarise(SCORES), 24))
    text = shown.get()
    assert "…" not in text
    assert text.count("anchor16 ") == 2
    assert "0.0200" in text
    assert "0% (100%)" in text
    assert "anchor16, 20: 240 MB" in text


def test_columns_without_a_value_are_left_out() -> None:
    plain = replace(ONE, group="alone", said=None, dense_said=None, same_answer=None)
    headings = [column.header for column in render_table("rag", summarise([plain]), 24).columns]
    assert not {"\nanswer", "both\norders"} & set(headings)


def test_the_file_holds_every_prompt_and_is_the_same_for_the_same_numbers(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_json(tmp_path / name, {"seed": 0}, summarise(SCORES), SCORES)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    content = json.loads((tmp_path / "a").read_text())
    assert content["settings"] == {"seed": 0}
    assert len(content["summary"]) == 3
    assert content["prompts"][0] == {**content["prompts"][0], "case": "q, shuffled", "reused": 60}


def test_the_picture_has_a_line_per_mode_in_the_order_of_anchors(tmp_path: Path) -> None:
    summaries = summarise(SCORES)
    assert lines(summaries)["anchor16"][0] == [0, 20]
    write_figure(tmp_path / "f.png", summaries, "a model")
    assert (tmp_path / "f.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modes", "rotate,fast"], "'fast' is no mode"),
        (["--modes", ","], "--modes: names nothing"),
        (["--workload", "chess"], "'chess' is no workload; there are gsm8k3"),
        (["--anchors", "many"], "--anchors: 'many' must be whole numbers"),
        (["--prompts", "9999", "--modes", "rotate"], "too few for 9999 prompts"),
        (["--jsonl", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["--data", "nowhere"], "cannot be read"),
        (["--dtype", "int8"], "--dtype: 'int8' must be one of auto, bfloat16, float16, float32"),
    ],
)
def test_bad_options_are_refused_in_one_line_before_an_engine_starts(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["fidelity", "--model", "m", "--out", str(out), *arguments]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not out.exists()
