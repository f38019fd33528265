# SPDX-License-Identifier: Apache-2.0
"""A folder is a process: what decides imports no torch, what acts knows no plans, and what measures
is needed by nobody.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kvcomm_vllm"
PRODUCT = "kvcomm_vllm"


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports, wherever in it; not those for its types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            for_types.update(child for line in node.body for child in ast.walk(line))
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def lies_in(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "evaluation" not in path.parts)


FORBIDDEN = {
    "scheduler": ("torch", "triton", f"{PRODUCT}.worker", f"{PRODUCT}.kernels", f"{PRODUCT}.cli"),
    "worker": (f"{PRODUCT}.scheduler", f"{PRODUCT}.front", f"{PRODUCT}.cli"),
    "front": ("torch", f"{PRODUCT}.scheduler", f"{PRODUCT}.worker", f"{PRODUCT}.cli"),
    "estimate": (
        "torch",
        "triton",
        f"{PRODUCT}.worker",
        f"{PRODUCT}.kernels",
        f"{PRODUCT}.front",
        f"{PRODUCT}.cli",
    ),
    "config": ("torch", "vllm", f"{PRODUCT}.scheduler", f"{PRODUCT}.worker"),
}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_a_folder_is_a_process(folder: str) -> None:
    found = files(PACKAGE / folder)
    assert found
    for path in found:
        wrong = [name for name in imported(path) if lies_in(name, *FORBIDDEN[folder])]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_kernels_know_no_vllm_and_nothing_of_the_product() -> None:
    found = files(ROOT / "kernels")
    assert found
    for path in found:
        wrong = [
            name
            for name in imported(path)
            if lies_in(name, "vllm")
            or (lies_in(name, PRODUCT) and not lies_in(name, PRODUCT, f"{PRODUCT}.kernels"))
        ]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_what_serves_does_not_need_what_measures() -> None:
    for path in files(PACKAGE):
        if "cli" in path.relative_to(PACKAGE).parts:
            continue  # its commands import it when they are called
        wrong = [name for name in imported(path) if lies_in(name, f"{PRODUCT}.evaluation")]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_what_serves_does_not_need_what_estimates() -> None:
    for path in files(PACKAGE):
        if not {"cli", "estimate"} & set(path.relative_to(PACKAGE).parts):
            wrong = [name for name in imported(path) if lies_in(name, f"{PRODUCT}.estimate")]
            assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_the_index_has_one_door() -> None:
    index = PACKAGE / "scheduler" / "index"
    door = f"{PRODUCT}.scheduler.index"
    behind = {f"{door}.{path.stem}" for path in index.glob("*.py")}
    for path in files(PACKAGE):
        if path.parent != index:
            wrong = [name for name in imported(path) if lies_in(name, *behind)]
            assert not wrong, f"{path.relative_to(ROOT)} goes round the door: {wrong}"
