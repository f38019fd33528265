# SPDX-License-Identifier: Apache-2.0
"""Promises of the command line: ``vllm serve --kv-connector kvcomm [--kvcomm-config FILE]``.

The parser is vLLM's own; no engine is started.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from serve_arguments import make_arg_parser
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from kvcomm_vllm import plugin
from kvcomm_vllm.compat import cli, parts
from kvcomm_vllm.config import KVCommConfig, keys
from kvcomm_vllm.guards import version

OURS = {"kv_connector": "kvcomm", "kv_role": "kv_both"}


def transfer_json(**extra: object) -> str:
    return json.dumps({**OURS, "kv_connector_extra_config": extra})


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    """The parser of ``vllm serve``, with the plugin loaded."""
    plugin.register()
    top = FlexibleArgumentParser(prog="vllm")
    serve = top.add_subparsers(dest="subparser").add_parser("serve")
    make_arg_parser(serve)
    return top


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "my.yaml"
    path.write_text("seam_tokens: 4\n")
    return str(path)


def parse(parser: FlexibleArgumentParser, *args: str) -> AsyncEngineArgs:
    return AsyncEngineArgs.from_cli_args(parser.parse_args(["serve", "some-model", *args]))


def refusal(parser: FlexibleArgumentParser, capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What a refused command line prints as its error."""
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["serve", "some-model", *args])
    assert caught.value.code == 2
    return capsys.readouterr().err.split(" error: ", 1)[1].strip()


def test_without_our_flags_nothing_changes(parser: FlexibleArgumentParser) -> None:
    namespace = parser.parse_args(["serve", "some-model"])
    assert namespace.kv_transfer_config is None
    assert namespace.middleware == []


def test_the_name_alone_gives_the_default_configuration(parser: FlexibleArgumentParser) -> None:
    transfer = parse(parser, "--kv-connector", "kvcomm").kv_transfer_config
    assert transfer is not None
    assert (transfer.kv_connector, transfer.kv_role) == ("kvcomm", "kv_producer")
    assert transfer.kv_load_failure_policy == "recompute"
    assert transfer.kv_connector_extra_config == KVCommConfig().to_mapping()


@pytest.mark.parametrize(
    "flags",
    [
        ["--kv-connector", "kvcomm", "--kvcomm-config", "FILE"],
        ["--kvcomm-config", "FILE", "--kv-connector", "kvcomm"],
        ["--kvcomm-config=FILE"],
        ["--kvcomm_config", "FILE"],
    ],
    ids=" ".join,
)
def test_a_file_is_used_in_any_order_and_implies_the_connector(
    parser: FlexibleArgumentParser, config_file: str, flags: list[str]
) -> None:
    args = parse(parser, *(flag.replace("FILE", config_file) for flag in flags))
    assert args.kv_transfer_config is not None
    extra = args.kv_transfer_config.kv_connector_extra_config
    assert extra == KVCommConfig(seam_tokens=4).to_mapping()


def test_vllms_own_config_file_may_name_ours(
    parser: FlexibleArgumentParser, config_file: str, tmp_path: Path
) -> None:
    path = tmp_path / "vllm.yaml"
    path.write_text(f"kv-connector: kvcomm\nkvcomm-config: {config_file}\n")
    args = parse(parser, "--config", str(path))
    assert args.kv_transfer_config is not None
    assert args.kv_transfer_config.kv_connector_extra_config["seam_tokens"] == 4


@pytest.mark.parametrize("dotted", [False, True])
def test_plain_kv_transfer_config_works_too(parser: FlexibleArgumentParser, dotted: bool) -> None:
    wanted = {"seam_tokens": 4, "estimator": {"map_rank": 8}}
    flags = ["--kv-transfer-config", transfer_json(**wanted)]
    if dotted:
        flags = ["--kv-transfer-config.kv_connector", "kvcomm"]
        flags += ["--kv-transfer-config.kv_role", "kv_both"]
        flags += ["--kv-transfer-config.kv_connector_extra_config.seam_tokens", "4"]
        flags += ["--kv-transfer-config.kv_connector_extra_config.estimator.map_rank", "8"]
    transfer = parse(parser, *flags).kv_transfer_config
    assert transfer is not None
    assert transfer.kv_connector_extra_config == wanted


@pytest.mark.parametrize("ours", [["--kv-connector", "kvcomm"], ["--kvcomm-config", "FILE"]])
@pytest.mark.parametrize("ours_first", [True, False])
def test_both_ways_at_once_are_refused_in_any_order(
    parser: FlexibleArgumentParser,
    capsys: pytest.CaptureFixture[str],
    config_file: str,
    ours: list[str],
    ours_first: bool,
) -> None:
    mine = [flag.replace("FILE", config_file) for flag in ours]
    theirs = ["--kv-transfer-config", transfer_json()]
    said = refusal(parser, capsys, *(mine + theirs if ours_first else theirs + mine))
    assert said == cli._BOTH


def test_both_ways_at_once_are_refused_when_one_is_in_vllms_config_file(
    parser: FlexibleArgumentParser, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "vllm.yaml"
    path.write_text("kv-transfer-config:\n  kv_connector: kvcomm\n  kv_role: kv_both\n")
    said = refusal(parser, capsys, "--config", str(path), "--kv-connector", "kvcomm")
    assert said == cli._BOTH


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--kv-connector", "nixl"],
            "argument --kv-connector: 'nixl' is not allowed; allowed: kvcomm",
        ),
        (
            ["--kvcomm-config", "/dev/null"],
            "argument --kvcomm-config: /dev/null: cannot be read: not",
        ),
        (["--kvcomm-config", "absent.yaml"], "argument --kvcomm-config: absent.yaml: no such file"),
        (
            ["--kv-transfer-config", transfer_json(seam=1)],
            "argument --kv-transfer-config: kv_connector_extra_config: unknown key 'seam'",
        ),
        (
            ["--kv-transfer-config", transfer_json(private_price=1).replace("1}", "1e400}")],
            "argument --kv-transfer-config: kv_connector_extra_config: private_price: inf is not",
        ),
        (
            ["--kv-transfer-config", transfer_json(seam_tokens=10**400)],
            "argument --kv-transfer-config: kv_connector_extra_config: seam_tokens: <number of",
        ),
        (
            ["--kv-transfer-config", '{"kv_connector": "kvcomm", "kv_role": "kv_consumer"}'],
            "argument --kv-transfer-config: kv_role: 'kv_consumer' is not allowed; allowed: kv_",
        ),
    ],
)
def test_bad_values_are_refused_with_exit_code_2_and_the_reason(
    parser: FlexibleArgumentParser,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    said: str,
) -> None:
    assert refusal(parser, capsys, *flags).startswith(said)


def test_other_connectors_pass_unchecked(parser: FlexibleArgumentParser) -> None:
    given = {"kv_connector": "ExampleConnector", "kv_role": "kv_producer"}
    namespace = parser.parse_args(["serve", "m", "--kv-transfer-config", json.dumps(given)])
    assert namespace.kv_transfer_config.kv_connector == "ExampleConnector"
    assert namespace.middleware == []


@pytest.mark.parametrize(
    "ours", [["--kv-connector", "kvcomm"], ["--kv-transfer-config", transfer_json()]]
)
def test_the_server_looks_at_bodies_beside_the_users_own_middleware(
    parser: FlexibleArgumentParser, ours: list[str]
) -> None:
    for flags in ([*ours, "--middleware", "a.b"], ["--middleware", "a.b", *ours]):
        namespace = parser.parse_args(["serve", "some-model", *flags])
        assert sorted(namespace.middleware) == ["a.b", *sorted(cli.MIDDLEWARE)]
    namespace = parser.parse_args(["serve", "some-model", "--middleware", "a.b", *ours])
    assert namespace.middleware == [*cli.MIDDLEWARE, "a.b"], "ours are next to the routes"


def test_a_flag_that_vllm_has_come_to_own_is_left_alone(config_file: str) -> None:
    theirs = FlexibleArgumentParser()
    theirs.add_argument("--kv-connector", default="auto")
    theirs.add_argument("--kv-transfer-config", type=json.loads)
    cli.add_flags(theirs)
    namespace = theirs.parse_args(["--kv-connector", "nixl", "--kv-transfer-config", "null"])
    assert (namespace.kv_connector, namespace.kv_transfer_config) == ("nixl", None)
    namespace = theirs.parse_args(["--kvcomm-config", config_file])
    assert namespace.kv_transfer_config.kv_connector == "kvcomm"


def test_registering_again_changes_nothing_and_imports_no_connector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plugin.register()
    monkeypatch.delitem(sys.modules, plugin.CONNECTOR_MODULE, raising=False)
    before = dict(KVConnectorFactory._registry)
    plugin.register()
    assert KVConnectorFactory._registry == before
    assert set(parts.NAMES) <= set(before)
    assert plugin.CONNECTOR_MODULE not in sys.modules


def test_an_unsupported_vllm_gets_a_warning_instead_of_the_plugin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(version, "check_vllm", lambda: "vLLM is too old")
    monkeypatch.setattr(KVConnectorFactory, "_registry", {})
    monkeypatch.setattr(cli.logger, "warning", lambda text, *a: said.append(text % a))
    plugin.register()
    assert said == ["kvcomm is not available: vLLM is too old"]
    assert KVConnectorFactory._registry == {}


def test_a_failing_registration_does_not_stop_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def fail() -> None:
        raise RuntimeError("vLLM has moved something")

    monkeypatch.setattr(cli, "install", fail)
    monkeypatch.setattr(cli.logger, "warning", lambda text, *a: said.append(text % a))
    plugin.register()
    assert said == ["kvcomm is not available: RuntimeError: vLLM has moved something"]


@pytest.fixture(scope="module")
def vllm_serve() -> object:
    """Runs the real ``vllm serve`` with arguments that end before an engine starts."""

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    return run


@pytest.mark.slow
def test_help_explains_both_flags(vllm_serve: object) -> None:
    done = vllm_serve("--help=KVCommConfig")  # type: ignore[operator]
    assert done.returncode == 0
    assert "--kv-connector NAME" in done.stdout
    assert "--kvcomm-config FILE" in done.stdout
    for name in keys():
        assert f"{name}=" in done.stdout


@pytest.mark.slow
def test_a_bad_file_ends_the_real_command_without_a_traceback(
    vllm_serve: object, tmp_path: Path
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("seam_token: 4\n")
    done = vllm_serve("some-model", "--kvcomm-config", str(path))  # type: ignore[operator]
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert f"{path}: unknown key 'seam_token'; did you mean 'seam_tokens'?" in last


def test_the_namespace_survives_being_copied(parser: FlexibleArgumentParser) -> None:
    """vLLM hands parsed arguments to its API server processes by pickling them."""
    import pickle

    namespace = parser.parse_args(["serve", "some-model", "--kv-connector", "kvcomm"])
    copy: argparse.Namespace = pickle.loads(pickle.dumps(namespace))
    assert copy.kv_transfer_config == namespace.kv_transfer_config
