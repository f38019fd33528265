# SPDX-License-Identifier: Apache-2.0
"""Promises of ``trace.file``: where nothing can be written is told at start, with what is allowed;
and reading a configuration looks at no disk, as workers on other machines read it, too.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvcomm_vllm.compat import cli
from kvcomm_vllm.config import ConfigError, KVCommConfig
from kvcomm_vllm.config.trace import FORM, TraceConfig


@pytest.fixture
def no_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Access as it is for who is not root: by the bits of the owner."""

    def access(path: str | Path, mode: int) -> bool:
        return (os.stat(path).st_mode >> 6) & mode == mode

    monkeypatch.setattr("kvcomm_vllm.config.trace.os.access", access)


@pytest.mark.usefixtures("no_root")
@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("new.jsonl", None),
        ("old.jsonl", None),
        ("absent/trace.jsonl", "lies in a folder that does not exist"),
        ("locked/trace.jsonl", "lies in a folder that cannot be written to"),
        ("old.jsonl/trace.jsonl", "lies in no folder"),
        ("locked", "is a folder"),
        ("pipe", "is no regular file"),
        ("link", "is no regular file"),
        ("read_only.jsonl", "cannot be written to"),
        ("x" * 300, "cannot be used (File name too long)"),
    ],
)
def test_a_place_where_nothing_can_be_written_is_refused_with_the_reason(
    tmp_path: Path, place: str, why: str | None
) -> None:
    (tmp_path / "old.jsonl").write_text("{}\n")
    (tmp_path / "read_only.jsonl").write_text("{}\n")
    (tmp_path / "read_only.jsonl").chmod(0o400)
    (tmp_path / "locked").mkdir(mode=0o500)
    (tmp_path / "link").symlink_to("old.jsonl")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.iterdir())
    found = [*TraceConfig(str(tmp_path / place)).problems()]
    assert sorted(tmp_path.iterdir()) == before, "asking makes nothing"
    if why is None:
        assert found == []
        return
    (line,) = found
    assert line.startswith("trace.file: '")
    assert line.endswith(f"' {why}; allowed: {FORM}")
    if len(place) < 100:
        assert place in line


def test_no_file_is_in_order_and_a_name_alone_lies_where_the_server_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert [*TraceConfig().problems()] == []
    assert [*TraceConfig("trace.jsonl").problems()] == []
    assert TraceConfig("trace.jsonl").of_rank(0) == tmp_path / "trace.jsonl"
    assert TraceConfig("logs/trace.jsonl").of_rank(2) == tmp_path / "logs" / "trace.dp2.jsonl"
    assert TraceConfig("trace").of_rank(1).name == "trace.dp1"


def test_an_engine_is_not_started_with_it_and_a_configuration_is_read_all_the_same(
    tmp_path: Path,
) -> None:
    place = tmp_path / "absent" / "trace.jsonl"
    given = {"trace": {"file": str(place)}}
    assert KVCommConfig.from_mapping(given, "test").trace.file == str(place)
    file = tmp_path / "my.yaml"
    file.write_text(f"trace:\n  file: {place}\n")
    with pytest.raises(ConfigError, match=r"my\.yaml: trace\.file: .* does not exist; allowed: "):
        cli.transfer_config(str(file))
    transfer = cli.transfer_config(None)
    transfer.kv_connector_extra_config["trace"]["file"] = str(place)
    with pytest.raises(ConfigError, match=r"extra_config: trace\.file: "):
        cli.checked(transfer)
