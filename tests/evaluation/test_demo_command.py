# SPDX-License-Identifier: Apache-2.0
"""The servers' command line, and what users of `kvcomm` see when they get something wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvcomm_vllm.cli import machine
from kvcomm_vllm.cli.main import app
from kvcomm_vllm.cli.serve_command import max_model_tokens, serve_command, serve_env, served_name
from kvcomm_vllm.evaluation.demo.options import read_options


def arguments(connector: bool, config: Path | None = None, on_gpu: bool = False) -> list[str]:
    return serve_command(
        "org/model", 8123, on_gpu=on_gpu, connector=connector, config=config, extra=["--seed=1"]
    )


def model_folder(folder: Path, config: object) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_both_servers_differ_in_the_connector_alone(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    plain = arguments(connector=False, config=config)
    assert "--kv-connector" not in plain
    assert "--kvcomm-config" not in plain
    ours = arguments(connector=True, config=config)
    added = ["--kv-connector", "kvcomm", "--kvcomm-config", str(config)]
    assert ours == [*plain[:-1], *added, "--seed=1"]


def test_small_machine_flags_stay_off_a_gpu() -> None:
    assert "--enforce-eager" in arguments(connector=True)
    assert "--enforce-eager" not in arguments(connector=True, on_gpu=True)
    assert "VLLM_CPU_KVCACHE_SPACE" in serve_env("org/model", on_gpu=False, base={})
    assert "VLLM_CPU_KVCACHE_SPACE" not in serve_env("org/model", on_gpu=True, base={})


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("fpu avx2 fma", "float32"),
        ("fpu avx2 avx512f avx512_bf16", "auto"),
        ("fp asimd bf16", "auto"),
        ("", "auto"),
    ],
)
def test_a_cpu_that_would_emulate_bf16_serves_in_float32(
    monkeypatch: pytest.MonkeyPatch, flags: str, dtype: str
) -> None:
    """On one with AVX2 alone, bf16 takes five times as long."""
    monkeypatch.setattr(machine, "_cpuinfo", lambda *keys: flags)
    monkeypatch.setattr(machine, "is_cpu_build", lambda: True)
    command = arguments(connector=False)
    assert command[command.index("--dtype") + 1] == dtype
    assert "--dtype" not in arguments(connector=False, on_gpu=True)
    assert machine.serving_dtype("bfloat16") == "bfloat16"


def test_what_the_user_has_set_in_the_environment_wins(tmp_path: Path) -> None:
    base = {"VLLM_CPU_KVCACHE_SPACE": "9", "HF_HUB_OFFLINE": "0"}
    env = serve_env(str(tmp_path), on_gpu=False, base=base)
    assert base.items() <= env.items()


def test_only_a_local_folder_is_served_offline(tmp_path: Path) -> None:
    assert serve_env(str(tmp_path), on_gpu=True, base={})["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in serve_env("org/model", on_gpu=True, base={})
    assert served_name(str(tmp_path)) == tmp_path.name
    assert served_name("org/model") == "org/model"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 131072}, 8192),
        ({"max_position_embeddings": 2048}, 2048),
        ({"text_config": {"max_position_embeddings": 4096}}, 4096),
        ({}, None),
    ],
)
def test_no_more_context_is_asked_for_than_the_model_has(
    tmp_path: Path, config: object, expected: int | None
) -> None:
    assert max_model_tokens(model_folder(tmp_path, config)) == expected


def refused(*args: str) -> str:
    """Run `kvcomm` in this process; it must fail with a message and without a traceback."""
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def test_a_bad_config_file_is_refused_before_a_server_starts(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("sem_tokens: 3\n")
    output = refused("demo", "--model", "m", "--config", str(config), "--out", str(tmp_path / "o"))
    assert "sem_tokens" in output
    assert "seam_tokens" in output
    assert not (tmp_path / "o").exists()


def test_a_missing_question_file_is_refused_before_a_server_starts(tmp_path: Path) -> None:
    missing = tmp_path / "none.jsonl"
    output = refused("demo", "--model", "m", "--data", str(missing), "--out", str(tmp_path / "o"))
    assert "none.jsonl: cannot be read" in output
    assert not (tmp_path / "o").exists()


def test_the_command_starts_without_torch_vllm_or_matplotlib() -> None:
    code = (
        "import sys, kvcomm_vllm.cli.main; "
        "print(sorted({'torch', 'vllm', 'matplotlib', 'openai'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_demo_takes_one_server_unless_asked_for_more(tmp_path: Path) -> None:
    quick, full = (read_options("m", tmp_path, full=wanted) for wanted in (False, True))
    assert {column.server for column in quick.bench.columns} == {"kvcomm"}
    assert {column.server for column in full.bench.columns} == {"plain", "kvcomm"}
    names = {column.name: column for column in quick.bench.columns}
    assert names["plain"].hints == names["plain_nocache"].hints == {"kvcomm": {"mode": "off"}}
    assert names["kvcomm"].hints is None, "served as the configuration says"
    salts = [column.salt(number) for column in names.values() for number in (0, 1)]
    assert len(set(salts)) == 4, "the columns with a cache have one each, the other none"
    assert (len(quick.tasks), quick.answer_tokens) == (1, 40)
    assert (len(full.tasks), full.answer_tokens) == (2, 128)
    assert not full.bench.config.audits
    assert "two things" in refused("demo", "--model", "m", "--quick", "--full")


def test_a_scene_says_what_is_played_and_on_which_columns(tmp_path: Path) -> None:
    edit = read_options("m", tmp_path, scene="edit")
    assert [column.name for column in edit.bench.columns] == ["kvcomm", "plain"]
    assert {column.server for column in edit.bench.columns} == {"kvcomm"}, "one server"
    assert [len(task.case.turns) for task in (*edit.tasks, edit.extra)] == [9, 9]
    assert edit.tasks[0].case != edit.extra.case
    assert {task.max_tokens for task in edit.tasks} == {8}
    full = read_options("m", tmp_path, scene="edit", full=True, answer_tokens=1)
    assert {column.server for column in full.bench.columns} == {"plain", "kvcomm"}
    assert full.tasks[0].max_tokens == 1
    assert len(full.tasks) == 3


def test_what_a_scene_cannot_do_is_refused(tmp_path: Path) -> None:
    out = ("--model", "m", "--out", str(tmp_path / "o"))
    assert "no scene; there are agents, edit" in refused("demo", *out, "--scene", "edits")
    assert "8 or more" in refused("demo", *out, "--answer-tokens", "7")
    data = ("--data", str(tmp_path / "rows.jsonl"))
    assert "--data has no place" in refused("demo", *out, "--scene", "edit", *data)
    assert not (tmp_path / "o").exists()
