# SPDX-License-Identifier: Apache-2.0
"""Probes: what stands in them before and behind the edit, what an answer is, and the tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("matplotlib", reason="the bench extra is not installed")

from kvcomm_vllm.cli.main import app
from kvcomm_vllm.evaluation.fidelity import run
from kvcomm_vllm.evaluation.fidelity.merge import merge
from kvcomm_vllm.evaluation.fidelity.options import Options, read_options
from kvcomm_vllm.evaluation.fidelity.probe_report import (
    ALL,
    DENSE_ROW,
    probe_table,
    summarise_probes,
    write_probes,
)
from kvcomm_vllm.evaluation.fidelity.probes import RIGHT, STALE, ProbeScore, said
from kvcomm_vllm.evaluation.fidelity.study import Study
from kvcomm_vllm.evaluation.modes import UNREFRESHED
from kvcomm_vllm.evaluation.workloads import PROBES, cases
from kvcomm_vllm.evaluation.workloads.case import Case, fill
from kvcomm_vllm.evaluation.workloads.lengths import about_tokens
from kvcomm_vllm.evaluation.workloads.probes import names
from kvcomm_vllm.evaluation.workloads.rows import DataError

KINDS = pytest.mark.parametrize("kind", PROBES)


def drawn(kind: str, seed: int = 0) -> list[Case]:
    return cases(kind, None, seed)[0]


def texts(case: Case) -> tuple[str, str]:
    """All of the prompt before the edit, and of the one behind it."""
    before, after = case.turns
    return before.system + before.user, after.system + fill(after.user, [before.reply])


@KINDS
def test_a_hundred_different_probes_can_be_drawn_and_are_the_same_for_a_seed(kind: str) -> None:
    found = drawn(kind)
    assert found == drawn(kind)
    assert found != drawn(kind, seed=1)
    assert len({case.turns for case in found}) == len({case.id for case in found}) >= 100
    asked = {case.turns[1].user.rpartition("User: ")[2] for case in found}
    assert len(asked) >= (3 if kind == "stale-clock" else 10)
    assert len({case.probe and case.probe.right for case in found}) >= (
        7 if kind in ("stale-tool", "stale-clock") else 20
    )


@KINDS
def test_the_old_value_stands_before_the_edit_alone(kind: str) -> None:
    for case in drawn(kind):
        before, after = texts(case)
        assert case.probe is not None
        right, stale = case.probe.right, case.probe.stale
        assert right != stale
        assert names(before, stale)
        assert not names(after, stale)
        assert names(after, right)
        if kind != "stale-tool":  # which has two tools before, of which one goes
            assert not names(before, right)


@KINDS
def test_but_for_one_line_the_session_goes_on_as_it_was(kind: str) -> None:
    for case in drawn(kind):
        before, after = case.turns
        assert after.user.startswith(before.user)
        old, new = (turn.system.splitlines() for turn in case.turns)
        assert len(set(old) - set(new)) == 1
        assert len(set(new) - set(old)) == (0 if kind == "stale-tool" else 1)
        behind = about_tokens(before.system + before.user)
        assert 450 <= behind <= 1000


def test_an_answer_is_what_its_first_telling_token_says() -> None:
    def step(best: int) -> torch.Tensor:
        return torch.eye(9)[best].log_softmax(-1)

    assert said([step(4)], [4], stale=7) == RIGHT
    assert said([step(7)], [4], stale=7) == STALE
    assert said([step(5)], [4], stale=7) is None
    assert said([step(2), step(7)], [2, 4], stale=7) == STALE
    assert said([step(3), step(7)], [2, 4], stale=7) is None, "it began as neither of them"


ONE = ProbeScore(
    workload="stale-clock",
    mode="anchor",
    anchors=0,
    case="clock-0",
    group="clock-0",
    kl1=0.02,
    kl_mean=0.02,
    top1=1.0,
    clear=1.0,
    prefix=1.0,
    said=RIGHT,
    dense_said=RIGHT,
    same_answer=True,
    prompt_tokens=100,
    local=10,
    reused=60,
    computed=30,
    corrected=0,
    form="time",
    token="1",
    dense_token="1",
    odds=2.0,
    dense_odds=3.0,
)
ANSWERS = [(RIGHT, RIGHT), (STALE, RIGHT), (STALE, STALE), (None, RIGHT), (RIGHT, STALE)]
SCORES = [
    replace(ONE, case=f"clock-{number}", said=now, dense_said=dense, kl1=0.01 * number)
    for number, (now, dense) in enumerate(ANSWERS * 4)
]


def test_stale_answers_are_counted_beside_those_of_dense() -> None:
    dense, mode = summarise_probes(SCORES)
    assert (dense.mode, mode.mode) == (DENSE_ROW, "anchor")
    assert (dense.right, dense.stale, dense.other) == (0.6, 0.4, 0.0)
    assert (mode.right, mode.stale, mode.other) == (0.4, 0.4, 0.2)
    assert mode.excess is not None
    assert mode.excess.value == pytest.approx(0.0)
    assert mode.excess.low is not None
    assert mode.excess.low < 0 < (mode.excess.high or 0)
    assert (mode.kl_mean, mode.kl_median) == (pytest.approx(0.095), pytest.approx(0.095))
    assert mode.kl_p95 == pytest.approx(0.1805)
    assert mode.computed == pytest.approx(0.3)


def test_where_nobody_differs_from_dense_the_interval_is_nothing() -> None:
    _, mode = summarise_probes([replace(score, said=score.dense_said) for score in SCORES])
    assert mode.excess is not None
    assert (mode.excess.low, mode.excess.value, mode.excess.high) == (0.0, 0.0, 0.0)


def test_all_kinds_together_stand_below_them() -> None:
    others = [replace(score, workload="stale-fact", mode="rotate") for score in SCORES]
    found = summarise_probes([*SCORES, *others])
    assert [(one.kind, one.mode) for one in found[-3:]] == [
        (ALL, DENSE_ROW),
        (ALL, "anchor"),
        (ALL, "rotate"),
    ]


def test_the_screen_shows_the_table_within_eighty_columns() -> None:
    long = [replace(score, mode=f"anchor16{UNREFRESHED}") for score in SCORES]
    console = Console(width=80)
    with console.capture() as shown:
        console.print(probe_table(summarise_probes(long), brief=True).screen())
    assert "…" not in shown.get()
    assert "anchor16" in shown.get()


def test_runs_of_a_few_probes_add_up_to_one(tmp_path: Path) -> None:
    settings = {"model": "m", "dtype": "bfloat16", "seed": 0, "versions": {"vllm": "1"}}
    halves = [SCORES[:12], [replace(SCORES[0], kl1=0.5), *SCORES[12:]]]
    for number, half in enumerate(halves):
        write_probes(tmp_path, f"part{number}", {**settings, "first": number}, half)
    files = [tmp_path / f"part{number}.json" for number in range(2)]
    common, scores = merge(files)
    assert common == settings
    assert len(scores) == len(SCORES)
    assert {score.case: score.kl1 for score in scores}["clock-0"] == 0.5, "the later one counts"
    write_probes(tmp_path, "other", {**settings, "model": "n"}, SCORES)
    with pytest.raises(DataError, match="are not the settings"):
        merge([files[0], tmp_path / "other.json"])
    assert json.loads(files[0].read_text())["summary"][1]["kind"] == "stale-clock"


def test_a_run_that_is_cut_off_keeps_the_kinds_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoEngine:
        def __init__(self, *args: object, **options: object) -> None: ...

        def close(self) -> None: ...

    def measured(bench: object, study: Study, *others: object) -> list[ProbeScore]:
        if study.workload == "stale-memory":
            raise KeyboardInterrupt
        return SCORES

    monkeypatch.setattr(run, "Bench", NoEngine)
    monkeypatch.setattr(run, "measure_probes", measured)
    asked = replace(options("stale-clock,stale-memory", "anchor"), out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run.run_fidelity(asked, Console(quiet=True))
    _, kept = merge([tmp_path / "probes.json"])
    assert kept == SCORES


def options(workload: str, modes: str) -> Options:
    return read_options(
        model="m",
        workload=workload,
        modes=modes,
        prompts=2,
        first=0,
        tokens=1,
        anchors="0",
        curve=False,
        jsonl=None,
        data=None,
        exact_sources=False,
        paper_gamma=0.3,
        dtype="float32",
        seed=0,
        out=Path("out"),
    )


def test_treatments_of_a_probe_do_not_read_each_other() -> None:
    assert options("probes", "rotate,anchor").plugin == {"reuse_approximate": False}
    assert options("judge", "rotate,anchor").plugin == {}


def test_a_mode_without_refresh_has_an_engine_of_its_own() -> None:
    found = options("stale-fact", f"anchor{UNREFRESHED},seam8{UNREFRESHED}")
    assert found.plugin == {"reuse_approximate": False, "max_refresh_share": 0.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modes", f"anchor,seam{UNREFRESHED}"], "need a run of their own"),
        (["--workload", "stale-fact,judge"], "probes need a run of their own"),
    ],
)
def test_what_cannot_be_measured_together_is_refused(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["fidelity", "--model", "m", "--anchors", "0", *arguments])
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
