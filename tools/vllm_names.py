# SPDX-License-Identifier: Apache-2.0
"""Which names this package takes from vLLM that another vLLM does not have.

Usage: python tools/vllm_names.py FOLDER

FOLDER holds the package ``vllm``: an installed one's site-packages, or a wheel that was unpacked
(``pip download --no-deps vllm==0.33.0``). Nothing of it is imported, so that its compiled parts are
not needed, and nothing is known of what its functions do.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = ("kvcomm_vllm", "kernels", "evaluation")


def taken(folder: Path) -> Iterator[tuple[str, str, Path]]:
    """Module of vLLM, name in it, and the file in ``folder`` that imports it.

    What is imported inside ``try`` is left out: it says itself what is to be done without.
    """
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tried = {
            id(inner)
            for attempt in ast.walk(tree)
            if isinstance(attempt, ast.Try)
            for statement in attempt.body
            for inner in ast.walk(statement)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or id(node) in tried:
                continue
            if node.module and node.module.partition(".")[0] == "vllm":
                for alias in node.names:
                    yield node.module, alias.name, path


def missing(site: Path, folder: Path) -> list[str]:
    """What of :func:`taken` is not in ``site``'s vLLM, a line each."""
    return [
        f"{path.relative_to(folder)}: {module} has no {name}"
        for module, name, path in taken(folder)
        if not has(site, module, name)
    ]


def has(site: Path, module: str, name: str) -> bool:
    if _file(site, f"{module}.{name}") is not None:
        return True
    names = _names(site, module)
    return name in names or any(has(site, star, name) for star in names if star.startswith("vllm."))


@cache
def _names(site: Path, module: str) -> frozenset[str]:
    """What a module binds or mentions at any depth (``__getattr__`` may hand names on as strings),
    and the modules of which it takes everything.
    """
    path = _file(site, module)
    if path is None:
        return frozenset()
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.add(name)
            case ast.ClassDef(name=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                found.update(alias.asname or alias.name for alias in names)
                if isinstance(node, ast.ImportFrom) and names[0].name == "*":
                    found.add(_absolute(node, module, path))
            case ast.Constant(value=str(name)) if name.isidentifier():
                found.add(name)
    return frozenset(found)


def _absolute(node: ast.ImportFrom, module: str, path: Path) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    parents = parts[: len(parts) - node.level + 1]
    return ".".join([*parents, *filter(None, [node.module])])


def _file(site: Path, module: str) -> Path | None:
    base = site.joinpath(*module.split("."))
    found = (path for path in (base / "__init__.py", base.with_suffix(".py")) if path.exists())
    return next(found, None)


def main() -> None:
    """Print what is missing; exit with status 1 if anything is."""
    site = Path(sys.argv[1]).absolute()
    lines = [line for ours in OURS for line in missing(site, ROOT / ours)]
    print("\n".join(lines) or "nothing is missing")
    raise SystemExit(bool(lines))


if __name__ == "__main__":
    main()
