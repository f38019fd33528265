# SPDX-License-Identifier: Apache-2.0
"""All stages, from the kernels up; and the same for a machine without a GPU, as a rehearsal."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gpu_proof import readers
from gpu_proof.stage import Stage
from kvcomm_vllm.cli.serve_command import CPU_ENV

TOOLS = Path(__file__).resolve().parent.parent
ROOT = TOOLS.parent
PYTHON = sys.executable
PYTEST = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider")
# What is promised of outputs, and how they come about.
CORE = tuple(
    f"tests/engine/test_{name}.py" for name in ("exactness", "compiled", "anchors", "taint")
)
SHARE = 0.3  # of the GPU's memory for an engine: tests have two at a time
BACKENDS = ("TRITON_ATTN", "FLASH_ATTN", "FLASHINFER")
PACKAGES = {"FLASH_ATTN": "vllm.vllm_flash_attn", "FLASHINFER": "flashinfer"}
RUNNERS = {"V1": "0", "V2": "1"}
COLUMNS = "plain,rotate,seam,anchor"


@dataclass(frozen=True)
class Setting:
    """Args:
    model: with weights and a tokenizer.
    dummy: the folder of a model of full size without weights.
    gpu: False = a rehearsal of the whole on a CPU.
    """

    model: Path
    dummy: Path
    out: Path
    gpu: bool


def stages(setting: Setting) -> Iterator[Stage]:
    """In the order in which they are run: what fails early explains what fails late."""
    on_device = {"KVCOMM_KERNELS_ON_DEVICE": "1"} if setting.gpu else {}
    yield _tests("kernels", "Are kernels right on the device?", ("tests/kernels",), 600, on_device)
    yield _compile(setting)
    yield _speed(setting)
    yield from _engines(setting)
    yield _steps(setting)
    yield _agents(setting)


def _tests(
    name: str,
    question: str,
    what: tuple[str, ...],
    limit: float,
    environment: dict[str, str],
    lacking: Callable[[], str | None] = lambda: None,
) -> Stage:
    command = (*PYTEST, *what, "--junit-xml")
    return Stage(name, question, command, limit, readers.tests, environment, lacking)


def _compile(setting: Setting) -> Stage:
    capability = () if setting.gpu else ("--capability", "90")
    command = (PYTHON, str(TOOLS / "gpu_proof/compile_times.py"), *capability)
    return Stage("compile", "How long does a kernel take to compile?", command, 300, readers.plain)


def _speed(setting: Setting) -> Stage:
    tiny = ("--shapes", "smollm2", "--tokens", "256", "--repeats", "2")
    work = ("--shapes", "8b", "8b-fp8", "70b-tp4") if setting.gpu else tiny
    command = (PYTHON, str(ROOT / "benchmarks/kernels.py"), *work, "--json")
    return Stage("speed", "How fast are kernels beside a copy?", command, 300, readers.kernels)


def _engines(setting: Setting) -> Iterator[Stage]:
    if not setting.gpu:
        yield _tests("engines", "Are outputs right?", CORE[:1], 600, engine({}))
        return
    shared = {"gpu_memory_utilization": SHARE}
    default = engine({**shared, "enforce_eager": False})
    question = "Are outputs right, as users start it?"
    yield _tests("engines", question, ("tests/engine",), 900, default)
    for backend in BACKENDS:
        for runner, number in RUNNERS.items():
            for eager in (True, False):
                how = "eager" if eager else "compiled"
                options = {**shared, "attention_backend": backend, "enforce_eager": eager}
                yield _tests(
                    f"engines-{backend.lower()}-{runner.lower()}-{how}",
                    f"The same on {backend}, model runner {runner}, {how}?",
                    CORE,
                    300,
                    {**engine(options), "VLLM_USE_V2_MODEL_RUNNER": number},
                    partial(_lacks, backend),
                )
    strict = engine({**shared, "enforce_eager": False, "jit_monitor_mode": "error"})
    yield _tests(
        "strict",
        "Does a request neither wait for the device nor compile anything?",
        CORE,
        300,
        {**strict, "VLLM_GPU_SYNC_CHECK": "error"},
    )


def engine(options: dict[str, Any]) -> dict[str, str]:
    """What tests/engine/engines.py starts its engines with, over its own options."""
    return {"KVCOMM_TEST_ENGINE": json.dumps(options)}


def _lacks(backend: str) -> str | None:
    package = PACKAGES.get(backend)
    try:
        there = package is None or importlib.util.find_spec(package) is not None
    except ImportError:
        there = False
    return None if there else f"{package} is not installed"


def _steps(setting: Setting) -> Stage:
    options: dict[str, Any] = {"max_model_len": 8192, "max_num_batched_tokens": 8192}
    more: tuple[str, ...] = ()
    if not setting.gpu:
        options |= {"enforce_eager": True, "block_size": 32}
        more = ("--repeats", "2", "--scale", "0.2")
    script = str(TOOLS / "gpu_proof/steps.py")
    command = (
        *(PYTHON, script, "--model", str(setting.dummy)),
        *("--options", json.dumps(options), *more),
    )
    question = "How long do loads and side forwards take?"
    environment = {} if setting.gpu else CPU_ENV
    return Stage("steps", question, command, 600, readers.plain, environment)


def _agents(setting: Setting) -> Stage:
    """The paper's setting for times, on two servers side by side."""
    lengths = (5, 512, 1024, 512, 20) if setting.gpu else (2, 32, 64, 8, 1)
    names = ("agents", "prefix-tokens", "input-tokens", "output-tokens", "tasks")
    command = [PYTHON, "-m", "kvcomm_vllm.cli.main", "bench", "--model", str(setting.dummy)]
    command += ["--workload", "synthetic", "--columns", COLUMNS if setting.gpu else "plain,rotate"]
    for name, value in zip(names, lengths, strict=True):
        command += [f"--{name}", str(value)]
    command += ["--server-arg=--load-format=dummy"]
    if setting.gpu:
        command += ["--server-arg=--gpu-memory-utilization=0.4"]
    return Stage(
        "agents",
        "How much sooner does the fifth agent answer?",
        (*command, "--out"),
        1200 if setting.gpu else 600,
        readers.agents,
    )
