# SPDX-License-Identifier: Apache-2.0
"""What `kvcomm demo` is asked for, checked before a server starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvcomm_vllm.config.file import load_file
from kvcomm_vllm.evaluation.bench.columns import KVCOMM, OFF, OWN, Column
from kvcomm_vllm.evaluation.bench.options import Options
from kvcomm_vllm.evaluation.demo.scenes import AGENTS, Scene, scene_of
from kvcomm_vllm.evaluation.workloads.rows import DATA, DataError
from kvcomm_vllm.evaluation.workloads.task import Task

# As it comes: requests carry no hint, the configuration decides.
OURS = Column(KVCOMM, KVCOMM)


@dataclass(frozen=True)
class DemoOptions:
    """A demo in full.

    Args:
        bench: servers and columns.
        tasks: what is timed; ``extra``: what is played for the picture.
        config: the file of the plugin's settings.
        full: plain vLLM has a server of its own.
    """

    bench: Options
    scene: Scene
    tasks: list[Task]
    extra: Task
    answer_tokens: int
    config: Path
    full: bool


def read_options(
    model: str,
    out: Path,
    questions: int | None = None,
    answer_tokens: int | None = None,
    config: Path | None = None,
    data: Path | None = None,
    server_args: list[str] | None = None,
    *,
    scene: str = AGENTS.name,
    full: bool = False,
    quick: bool = False,
) -> DemoOptions:
    """The preset, and what the user has said instead.

    Raises:
        DataError: two presets, no such scene, too short an answer, or unusable questions.
        ConfigError: an unusable configuration file.
    """
    if quick and full:
        raise DataError("--quick and --full are two things")
    chosen = scene_of(scene)
    few, short = chosen.full if full else chosen.quick
    tokens = answer_tokens or short
    if tokens < chosen.least_answer:
        raise DataError(f"--answer-tokens must be {chosen.least_answer} or more, not {tokens}")
    file = config or Path(str(DATA / "demo.yaml"))
    plain = OWN if full else OFF
    bench = Options(
        model,
        out,
        workloads={},
        columns=[OURS, *(plain[name] for name in chosen.columns)],
        tasks=0,
        config=load_file(file),
        server_args=server_args or [],
    )
    *timed, extra = chosen.tasks((questions or few) + 1, tokens, data)
    return DemoOptions(bench, chosen, timed, extra, tokens, file, full)
