# SPDX-License-Identifier: Apache-2.0
"""What a user gets from pip, and what must not happen in a checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from email import message_from_string
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

import pytest

import kvcomm_vllm

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"kernels", "evaluation"}  # of their own for readers, parts of the package for Python


def python(code: str, cwd: Path, path: Path | None = None) -> str:
    """Output of ``code`` in a fresh interpreter started in ``cwd``, with ``path`` first on it."""
    environment = {**os.environ, "PYTHONPATH": str(path) if path else ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CHECKOUTS = ["with the symlinks", "symlinks lost on the way"]


@pytest.fixture(scope="module", params=[pytest.param(c, marks=pytest.mark.slow) for c in CHECKOUTS])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the checkout; archives may drop the symlinks in kvcomm_vllm."""
    copy = tmp_path_factory.mktemp("checkout") / "kvcomm"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    skip = shutil.ignore_patterns("__pycache__")
    for name in FOLDERS | {"kvcomm_vllm"}:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=skip)
    if request.param != "with the symlinks":
        for name in FOLDERS:
            (copy / "kvcomm_vllm" / name).unlink()
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*build, "-w", "dist"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next((copy / "dist").glob("*.whl"))


def names_in(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def test_wheel_has_every_file_of_the_checkout_exactly_once(wheel: Path) -> None:
    checkout = wheel.parent.parent
    own = [f.relative_to(checkout) for f in (checkout / "kvcomm_vllm").rglob("*") if f.is_file()]
    expected = {str(f) for f in own if not (FOLDERS | {"__pycache__"}) & set(f.parts)}
    for folder in FOLDERS:
        files = [f for f in (checkout / folder).rglob("*") if f.is_file()]
        expected |= {f"kvcomm_vllm/{f.relative_to(checkout)}" for f in files}
    found = Counter(name for name in names_in(wheel) if ".dist-info/" not in name)
    assert set(found) == expected
    assert set(found.values()) == {1}


def test_wheel_adds_no_other_top_level_package(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in names_in(wheel)}
    assert tops == {"kvcomm_vllm", f"kvcomm_vllm-{kvcomm_vllm.__version__}.dist-info"}


@pytest.mark.parametrize("module", ["pages", "cpu.runs"])
def test_unpacked_wheel_imports_its_kernels_from_itself(
    wheel: Path, module: str, tmp_path: Path
) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = f"import importlib.util as u; print(u.find_spec('kvcomm_vllm.kernels.{module}').origin)"
    origin = Path(python(code, cwd=tmp_path, path=tmp_path))
    assert origin == tmp_path / "kvcomm_vllm/kernels" / f"{module.replace('.', '/')}.py"


def test_metadata_states_the_one_version_and_requires_no_vllm(wheel: Path) -> None:
    folder = f"kvcomm_vllm-{kvcomm_vllm.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = message_from_string(archive.read(f"{folder}/METADATA").decode())
        entry_points = archive.read(f"{folder}/entry_points.txt").decode()
    assert metadata["Version"] == kvcomm_vllm.__version__
    requirements = metadata.get_all("Requires-Dist") or []
    hard = [r for r in requirements if "extra ==" not in r]
    assert hard
    assert not [r for r in hard if r.startswith(("vllm", "torch", "transformers"))]
    extras = {"cpu", "cuda", "bench", "demo", "dev", "shared"}
    assert set(metadata.get_all("Provides-Extra") or []) >= extras
    assert "kvcomm = kvcomm_vllm.plugin:register" in entry_points


@pytest.mark.slow
@pytest.mark.parametrize("folder", [ROOT, ROOT / "tests"], ids=["root", "tests"])
def test_transformers_does_not_take_our_kernels_for_the_package_of_that_name(folder: Path) -> None:
    try:
        distribution("kernels")
    except PackageNotFoundError:
        pass
    else:
        pytest.skip("the package kernels of PyPI is installed")
    if find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    code = "from transformers.utils import is_kernels_available as k; print(k())"
    assert python(code, cwd=folder) == "False"


def test_no_folder_of_the_checkout_becomes_a_package_that_shadows_another() -> None:
    # pytest puts tests/ on the path: a package tests/http would hide the one of the standard
    # library, and kernels/ the one of PyPI.
    roots = [ROOT / "kernels", *(d for d in (ROOT / "tests").iterdir() if d.is_dir())]
    assert [str(d) for d in roots if (d / "__init__.py").exists()] == []


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_checkout_without_installation_finds_folders_through_symlinks(name: str) -> None:
    link = ROOT / "kvcomm_vllm" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    # -S: no site-packages, so no editable install can answer.
    code = f"import kvcomm_vllm.{name} as m; print(list(m.__path__)[0])"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).resolve() == ROOT / name


def test_the_package_works_without_the_measuring_tools(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    shutil.rmtree(tmp_path / "kvcomm_vllm" / "evaluation")
    code = (
        "import sys; "  # an editable install would find what is missing here
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in "
        "getattr(f, '__module__', type(f).__module__)]; "
        "from typer.testing import CliRunner; from kvcomm_vllm.cli.main import app; "
        "run = CliRunner().invoke; print(run(app, ['--version']).output, "
        "run(app, ['demo', '--model', 'm']).output)"
    )
    output = python(code, cwd=tmp_path, path=tmp_path)
    assert f"kvcomm-vllm {kvcomm_vllm.__version__}" in output
    assert "kvcomm demo needs kvcomm_vllm.evaluation" in " ".join(output.split())
