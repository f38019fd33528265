# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvcomm_vllm.cli import checks, machine, serve_command
from kvcomm_vllm.cli.doctor import Status, run_checks
from kvcomm_vllm.cli.main import app
from kvcomm_vllm.guards import version


def test_a_bad_config_file_fails_and_names_key_and_file(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("seam_tokens: many\n")
    with pytest.raises(checks.ProblemError, match=r"c\.yaml: seam_tokens: 'many'"):
        checks.config_file(config)


def test_a_good_config_file_is_shown_as_it_takes_effect(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("seam_tokens: 8\n")
    assert "seam_tokens=8*" in checks.config_file(config)


def test_a_plugin_list_that_leaves_kvcomm_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(checks.ProblemError, match="VLLM_PLUGINS='other'"):
        checks.plugin()
    monkeypatch.setenv("VLLM_PLUGINS", "other,kvcomm")
    assert "kvcomm_vllm.plugin:register" in checks.plugin()


def test_an_allocator_that_keeps_the_plugin_out_is_named_with_the_ways_round_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False")
    assert "nothing" in checks.allocator()
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:True")
    with pytest.raises(checks.AdviceError, match=r"no KV connector.*--enable-cumem-allocator"):
        checks.allocator()


def test_connectors_beside_ours_are_named_and_an_older_vllm_is_a_remark(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(version, "installed_version", lambda: "0.32.1")
    assert "MultiConnector: OffloadingConnector; beside any other one reuse is off" in (
        checks.connectors()
    )
    monkeypatch.setattr(version, "installed_version", lambda: "0.31.0")
    with pytest.raises(checks.AdviceError, match=r"beside OffloadingConnector nobody has tried"):
        checks.connectors()


def test_a_torchvision_that_does_not_fit_fails_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "package_version", lambda name: "0.1")
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(checks.ProblemError, match=r"nms does not exist.*pip uninstall torchvision"):
        checks.torchvision()


def test_a_broken_vllm_command_is_a_remark_with_the_way_round_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve_command, "vllm_script", lambda: None)
    with pytest.raises(checks.AdviceError, match=r"python -m vllm\.entrypoints"):
        checks.vllm_command()


def test_a_model_folder_is_told_from_a_hub_id_and_from_a_broken_folder(tmp_path: Path) -> None:
    with pytest.raises(checks.AdviceError, match="hub"):
        checks.model("org/model")
    with pytest.raises(checks.ProblemError, match=r"config\.json"):
        checks.model(str(tmp_path))
    config = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(checks.ProblemError, match="safetensors"):
        checks.model(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert "LlamaForCausalLM, context 2048" in checks.model(str(tmp_path))


def test_a_server_that_is_not_there_fails() -> None:
    with pytest.raises(checks.ProblemError, match="does not answer"):
        checks.server("http://127.0.0.1:9/v1")


@pytest.mark.slow
def test_the_exit_status_follows_the_worst_check(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    healthy = run_checks()
    assert {check.name for check in healthy if check.status is Status.FAIL} == set()
    result = CliRunner().invoke(app, ["doctor", "--config", str(tmp_path / "none.yaml")])
    assert result.exit_code == 1
    assert "none.yaml: no such file" in " ".join(result.output.split())
