# SPDX-License-Identifier: Apache-2.0
"""Options are checked before a server starts, and decide who may continue a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("openai", reason="the bench extra is not installed")

from kvcomm_vllm.cli.main import app
from kvcomm_vllm.evaluation.bench.options import Options, read_options
from kvcomm_vllm.evaluation.bench.plan import make_plan, rotated
from kvcomm_vllm.evaluation.bench.presets import FULL, QUICK
from kvcomm_vllm.evaluation.bench.records import LOAD, LOCKSTEP, STREAM
from kvcomm_vllm.evaluation.bench.resume import check_same, options_of, write_settings
from kvcomm_vllm.evaluation.workloads import WORKLOADS
from kvcomm_vllm.evaluation.workloads.rows import DataError

SMALL: dict[str, Any] = {"workloads": ["synthetic"], "tasks": 3, "columns": "plain,anchor"}


def options(out: Path = Path("o"), **given: Any) -> Options:
    return read_options("m", out, **{**SMALL, **given})


@pytest.mark.parametrize("preset", [QUICK, FULL], ids=["quick", "full"])
def test_presets_name_workloads_and_options_that_exist(preset: Any) -> None:
    for name, given in preset["workloads"].items():
        assert set(given) <= set(WORKLOADS[name].options)
    found = read_options("m", Path("o"), full=preset is FULL)
    assert found.workloads == preset["workloads"]
    assert ",".join(column.name for column in found.columns) == preset["columns"]
    assert (found.rate, found.stream) == (preset["rate"], preset["stream"])
    assert make_plan(read_options("m", Path("o"), full=preset is FULL, tasks=1, rate=0.01))


def test_what_is_said_wins_over_the_preset() -> None:
    found = options(input_tokens=99, seed=3, rate=0.5, stream=7)
    assert found.workloads["synthetic"] == {**QUICK["workloads"]["synthetic"], "input_tokens": 99}
    assert (found.tasks, found.seed, found.rate, found.stream) == (3, 3, 0.5, 7)
    assert found.load_seconds > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"columns": "plain,sem"}, "'sem' is no column"),
        ({"columns": ","}, "no column"),
        ({"workloads": ["maths"]}, "'maths' is no workload"),
        ({"workloads": ["rag"], "agents": 3}, "--agents"),
        ({"endpoints": ["http://host"]}, "NAME=URL"),
        ({"endpoints": ["plain=http://host"]}, "'plain' already"),
    ],
)
def test_an_option_that_cannot_be_used_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        options(**given)


def test_endpoints_are_columns_of_their_own() -> None:
    found = options(columns="plain", endpoints=["other=http://host:1/v1", "b=https://b,big"])
    assert [column.name for column in found.columns] == ["plain", "other", "b"]
    assert found.endpoints["other"].url == "http://host:1"
    assert found.endpoints["b"].model == "big"
    alone = options(columns="other", endpoints=["other=http://host:1"])
    assert [column.name for column in alone.columns] == ["other"]


def test_the_plugin_is_set_up_for_all_columns_and_the_users_file_is_kept(tmp_path: Path) -> None:
    assert options().config.mode == "anchor"
    assert options().config.paper.memory_mb == 0
    assert options(columns="paper").config.paper.memory_mb > 0
    assert options().config.audit_idle_seconds < 1.0
    assert options().config.audit_share == 1.0
    assert options().config.heal == "off", "sources are as they were served"
    file = tmp_path / "c.yaml"
    file.write_text("mode: seam\nseam_tokens: 4\naudit_idle_seconds: 2.5\npaper: {memory_mb: 77}\n")
    found = options(columns="paper", config=file).config
    assert (found.mode, found.seam_tokens) == ("anchor", 4)
    assert (found.audit_idle_seconds, found.paper.memory_mb) == (2.5, 77)


def test_warm_up_timed_load_and_stream_tasks_are_all_different() -> None:
    studies = make_plan(options(rate=0.5, load_seconds=20.0, stream=4))
    assert [study.phase for study in studies] == [LOCKSTEP, LOAD, STREAM]
    lockstep, load, stream = studies
    seen = [study.warmup.id for study in (lockstep, stream)]
    seen += [task.id for study in studies for unit in study.units for task in unit.tasks[:1]]
    seen += [task.id for task in load.units[0].tasks[1:]]
    assert len(set(seen)) == len(seen) - 1, "only under load have columns the same tasks"
    assert load.warmup.id == lockstep.warmup.id
    assert load.units[0].tasks == load.units[1].tasks
    assert load.units[0].times == load.units[1].times


def test_too_few_tasks_for_a_load_are_refused() -> None:
    with pytest.raises(DataError, match="left for"):
        make_plan(options(workloads=["coding"], rate=50.0, load_seconds=60.0))


def test_over_the_units_every_column_is_first_and_servers_stay_together() -> None:
    names = ["plain_nocache", "plain", "seam", "anchor"]
    servers = {"plain_nocache": "p", "plain": "p", "seam": "k", "anchor": "k"}
    orders = [rotated(names, servers, number) for number in range(4)]
    assert {order[0] for order in orders} == set(names)
    for order in orders:
        assert sorted(order) == sorted(names)
        assert servers[order[0]] == servers[order[1]] != servers[order[2]] == servers[order[3]]


def test_a_column_that_is_not_served_leaves_the_plan() -> None:
    asked = options(rate=0.5, load_seconds=20.0, stream=2)
    kept = make_plan(asked, {"anchor": "why"})
    assert {name for study in kept for unit in study.units for name in unit.columns} == {"plain"}
    assert [len(study.units) for study in kept] == [3, 1, 2]
    assert make_plan(asked, {"anchor": "", "plain": ""}) == []


def test_a_run_is_continued_by_the_same_options_alone(tmp_path: Path) -> None:
    first = options(tmp_path, endpoints=["other=http://host,m"], data=tmp_path / "d", stream=2)
    write_settings(tmp_path, {"options": first.settings(), "complete": False})
    again = options_of(tmp_path)
    assert again.settings() == first.settings()
    assert again.out == tmp_path
    check_same(tmp_path, first.settings(), again.settings())
    other = options(tmp_path, endpoints=["other=http://host,m"], seed=1, tasks=4)
    with pytest.raises(DataError, match=r"(?s)tasks: 3 there, 4 here.*seed: 0 there, 1 here"):
        check_same(tmp_path, first.settings(), other.settings())


def refused(*args: str) -> str:
    """Run `kvcomm bench` in this process; it must fail with a message and without a traceback."""
    result = CliRunner().invoke(app, ["bench", *args])
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    return " ".join(result.output.split())


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "o")]
    assert "--model" in refused(*out)
    assert "two things" in refused("--model", "m", "--quick", "--full", *out)
    assert "no run to continue" in refused("--resume", *out)
    assert "--seed has no place" in refused("--resume", "--seed", "1", *out)
    assert "--workload has no place" in refused("--resume", "--workload", "rag", *out)
    assert "--out has no place" in refused("--report", str(tmp_path), *out)
    assert "records.jsonl" in refused("--report", str(tmp_path))
    assert not (tmp_path / "o").exists()
