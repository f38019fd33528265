# SPDX-License-Identifier: Apache-2.0
"""The doctor looks at tiers before an engine needs them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from valkey_server import ValkeyServer

from kvcomm_vllm.cli.checks import AdviceError, ProblemError
from kvcomm_vllm.cli.tier_checks import disk, host_pool, shared, tier_probes
from kvcomm_vllm.config.tiers import TiersConfig


def test_only_tiers_that_are_asked_for_are_looked_at(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("mode: seam\n")
    assert not tier_probes(config)
    config.write_text(f"tiers:\n  host_gb: 0.001\n  disk_path: {tmp_path / 'kv'}\n")
    assert [name for name, _ in tier_probes(config)] == ["host pool", "disk"]
    config.write_text("tiers: 3\n")
    assert not tier_probes(config), "another line says what is wrong with the file"


def test_a_pool_that_does_not_fit_fails_with_the_remedy() -> None:
    with pytest.raises(ProblemError, match=r"tiers\.host_gb is 60000.*--shm-size"):
        host_pool(TiersConfig(host_gb=60000))
    assert "0.001 GiB" in host_pool(TiersConfig(host_gb=0.001))


def test_a_disk_is_shown_with_its_speed(tmp_path: Path) -> None:
    tiers = TiersConfig(host_gb=1, disk_path=str(tmp_path / "kv"), disk_gb=0.01)
    assert "MB/s" in disk(tiers)
    assert not list((tmp_path / "kv").iterdir()), "nothing is left behind"
    os.chmod(tmp_path / "kv", 0o755)
    with pytest.raises(AdviceError, match="chmod 700"):
        disk(tiers)


def test_a_disk_with_too_little_room_is_a_remark(tmp_path: Path) -> None:
    with pytest.raises(AdviceError, match=r"tiers\.disk_gb is 1000000"):
        disk(TiersConfig(host_gb=1, disk_path=str(tmp_path), disk_gb=1e6))


def test_a_shared_server_is_shown_with_its_speed(valkey_server: ValkeyServer) -> None:
    assert "MB/s" in shared(TiersConfig(host_gb=1, shared=valkey_server.url))
    assert not valkey_server.client.keys("kvcomm:*"), "nothing is left behind"


def test_a_shared_server_that_cannot_be_reached_fails_without_its_password() -> None:
    with pytest.raises(
        ProblemError, match=r"127\.0\.0\.1:9/0: .*nothing would be shared"
    ) as caught:
        shared(TiersConfig(host_gb=1, shared="valkey://:secret@127.0.0.1:9"))
    assert "secret" not in str(caught.value)


def test_a_path_that_cannot_be_a_folder_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ProblemError, match="nothing would be kept"):
        disk(TiersConfig(host_gb=1, disk_path=str(tmp_path / "file" / "kv")))
