# SPDX-License-Identifier: Apache-2.0
"""A stage: one command, how long it may take, and what is read from what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvcomm_vllm.evaluation.serving.server import log_tail, stop_group

Figures = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """Args:
    name: of its files, too.
    question: what it answers, for the table.
    command: without the place for its results, which comes last.
    limit_seconds: it is ended then, and counts as failed.
    read: figures from its results; raises ValueError where they say that something is wrong.
    lacking: why it cannot be run here, or None.
    """

    name: str
    question: str
    command: tuple[str, ...]
    limit_seconds: float
    read: Callable[[Path], Figures]
    environment: Mapping[str, str] = field(default_factory=dict)
    lacking: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Outcome:
    """``status``: ``passed``, ``failed`` or ``not run``; ``why`` for the latter two."""

    stage: str
    question: str
    status: str
    why: str = ""
    seconds: float = 0.0
    figures: Figures = field(default_factory=dict)
    command: str = ""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(vars(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Outcome:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def carry_out(stage: Stage, folder: Path) -> Outcome:
    """Run a stage in ``folder``, its output in a log there; nothing it does ends the others."""
    lack = stage.lacking()
    if lack is not None:
        return Outcome(stage.name, stage.question, "not run", lack)
    results, log = folder / f"{stage.name}.results", folder / f"{stage.name}.log"
    results.unlink(missing_ok=True)
    command = [*stage.command, str(results)]
    setting = " ".join(f"{key}={value}" for key, value in stage.environment.items())
    said = f"{setting} {' '.join(stage.command)}".strip()
    began = time.monotonic()
    why = _run(command, {**os.environ, **stage.environment}, log, stage.limit_seconds)
    seconds = round(time.monotonic() - began, 1)
    figures: Figures = {}
    try:
        figures = stage.read(results)
    except (OSError, ValueError, KeyError, TypeError, SyntaxError) as error:
        why = why or f"{type(error).__name__}: {error}"
    status = "failed" if why else "passed"
    return Outcome(stage.name, stage.question, status, why, seconds, figures, said)


def _run(command: list[str], environment: Mapping[str, str], log: Path, limit: float) -> str:
    """Why the command did not end well; empty if it did. Its children end with it."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            stop_group(process)
            return f"took longer than {limit:.0f} s"
        except BaseException:
            stop_group(process)
            raise
    if status == 0:
        return ""
    return f"status {status}: {log_tail(log)}"
