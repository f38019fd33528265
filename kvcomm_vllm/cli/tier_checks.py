# SPDX-License-Identifier: Apache-2.0
"""The doctor's probes of tiers, as a config file asks for them."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from kvcomm_vllm.cli.checks import AdviceError, ProblemError
from kvcomm_vllm.config import ConfigError
from kvcomm_vllm.config.file import load_file
from kvcomm_vllm.config.tiers import TiersConfig

SHARED_MEMORY = Path("/dev/shm")
TRIED_MB = 64
ANSWER_SECONDS = 5.0
GIB = 2**30


def tier_probes(config: Path) -> list[tuple[str, Callable[[], str]]]:
    """Probes of the tiers that a config file asks for; none where it cannot be read, which another
    probe tells.
    """
    try:
        tiers = load_file(config).tiers
    except ConfigError:
        return []
    probes: list[tuple[str, Callable[[], str]]] = []
    if tiers.wanted:
        probes.append(("host pool", partial(host_pool, tiers)))
    if tiers.disk_path:
        probes.append(("disk", partial(disk, tiers)))
    if tiers.shared:
        probes.append(("shared tier", partial(shared, tiers)))
    return probes


def host_pool(tiers: TiersConfig, memory: Path = SHARED_MEMORY) -> str:
    """Room for the pool, which vLLM puts where its processes can share it."""
    free = shutil.disk_usage(memory).free / GIB
    if free < tiers.host_gb:
        raise ProblemError(
            f"{free:.1f} GiB are free in {memory}, tiers.host_gb is {tiers.host_gb}: engines would "
            "serve without tiers; give a container more (docker run --shm-size)"
        )
    return f"{tiers.host_gb} GiB of {free:.1f} GiB free in {memory}"


def disk(tiers: TiersConfig) -> str:
    """Whether pages can be kept there: rights, room and speed."""
    folder = Path(tiers.disk_path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        written, read = _speed(folder)
    except OSError as error:
        raise ProblemError(f"{folder}: {error}: nothing would be kept on disk") from error
    usage = shutil.disk_usage(folder)
    told = f"{folder}: writes {written:.0f} MB/s, reads {read:.0f} MB/s"
    if usage.free / GIB < tiers.disk_gb:
        free = f"{usage.free / GIB:.1f} GiB are free, tiers.disk_gb is {tiers.disk_gb}"
        raise AdviceError(f"{told}; {free}: when the disk is full, nothing more is kept")
    if os.stat(folder).st_mode & 0o077:
        raise AdviceError(f"{told}; others may look into it: chmod 700 {folder}")
    return told


def shared(tiers: TiersConfig) -> str:
    """Whether the server can be reached, and how fast it is."""
    try:
        import valkey

        from kvcomm_vllm.scheduler.tiers.server import client_of
    except ModuleNotFoundError as error:
        raise ProblemError(f"{error}; pip install 'kvcomm-vllm[shared]'") from error
    name, client = tiers.server.name, client_of(tiers.server, ANSWER_SECONDS)
    key, data = f"kvcomm:doctor:{os.urandom(8).hex()}", os.urandom(2**20)
    try:
        began = time.perf_counter()
        client.set(key, data, ex=60)
        written = time.perf_counter() - began
        began = time.perf_counter()
        found = client.getdel(key)
        read = time.perf_counter() - began
    except (valkey.ValkeyError, OSError) as error:
        raise ProblemError(f"{name}: {error}: nothing would be shared") from error
    if found != data:
        raise ProblemError(f"{name}: what was written did not come back: nothing would be shared")
    return f"{name}: writes {1 / written:.0f} MB/s, reads {1 / read:.0f} MB/s"


def _speed(folder: Path) -> tuple[float, float]:
    """MB/s of writing a file and of reading it back, which may come from memory.

    Raises:
        OSError: it cannot be written.
    """
    data = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for _ in range(TRIED_MB):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - began
        file.seek(0)
        began = time.perf_counter()
        while file.read(2**20):
            pass
        return TRIED_MB / written, TRIED_MB / (time.perf_counter() - began)
