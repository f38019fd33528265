# SPDX-License-Identifier: Apache-2.0
"""What tests of several folders ask for by name: models, and what audits have found; and how tests
are shared out where several processes run them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported
    cores = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores, 1)))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import support_record
from child_tests import scope_of
from short_model import save_short
from tiny_model import save_tiny_llama

if TYPE_CHECKING:
    from valkey_server import ValkeyServer

    from kvcomm_vllm.messages import Divergence

ROOT = Path(__file__).resolve().parent.parent

# nothing here is judged by how long it takes on a machine that may be busy
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


pytest_addoption = support_record.pytest_addoption
pytest_configure = support_record.pytest_configure


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file stays in one process, with its engines and servers; so do those of one child."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid)

    return Files(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A soak takes its minutes only where it is asked for by its marker: ``make soak``."""
    if "soak" in config.option.markexpr:
        return
    soaks = [item for item in items if item.get_closest_marker("soak")]
    if soaks:
        config.hook.pytest_deselected(items=soaks)
        items[:] = [item for item in items if item not in soaks]


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Folder of SmolLM2-135M-Instruct (bf16), or skip."""
    return made_by("make model", "SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def short_smollm2(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of SmolLM2's first layers, with its tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("short") / Path(smollm2).name
    save_short(Path(smollm2), folder)
    return str(folder)


@pytest.fixture(scope="session")
def qwen() -> str:
    """Folder of Qwen2.5-Coder-0.5B-Instruct (bf16), or skip."""
    return made_by("make model-qwen", "Qwen2.5-Coder-0.5B-Instruct")


def made_by(command: str, name: str) -> str:
    """Folder of the model that ``command`` makes, or skip."""
    folder = ROOT / "models" / name
    if not (folder / "config.json").exists():
        pytest.skip(f"run {command}")
    return str(folder)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random 3-layer Llama that vLLM loads in no time; the same weights every time."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    save_tiny_llama(folder)
    return str(folder)


@pytest.fixture(scope="session")
def running_valkey() -> Iterator[ValkeyServer]:
    """In a process of its own until the tests end, or skip."""
    from valkey_server import started

    server = started()
    yield server
    server.kill()


@pytest.fixture
def valkey_server(running_valkey: ValkeyServer) -> ValkeyServer:
    """An empty Valkey server, or skip."""
    running_valkey.as_new()
    return running_valkey


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, Divergence]]:
    """What audits have counted, by agent; vLLM takes the counts away with every step."""
    from kvcomm_vllm.metrics import KVCommStats

    found: list[tuple[str | None, Divergence]] = []
    monkeypatch.setattr(
        KVCommStats, "count_audit", lambda stats, agent, answer: found.append((agent, answer))
    )
    return found
