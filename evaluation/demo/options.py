# SPDX-License-Identifier: Apache-2.0
"""What `kvcomm demo` is asked for, checked before a server starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvcomm_vllm.config.file import load_file
from kvcomm_vllm.evaluation.bench.columns import KVCOMM, NO_CACHE, OFF, OWN, PLAIN, Column
from kvcomm_vllm.evaluation.bench.options import Options
from kvcomm_vllm.evaluation.workloads.notes import Question, load_questions
from kvcomm_vllm.evaluation.workloads.rows import DATA, DataError

# As it comes: requests carry no hint, the configuration decides.
OURS = Column(KVCOMM, KVCOMM)


# How much is shown: so many questions, notes of so many tokens.
QUICK, FULL = (1, 48), (2, 128)


@dataclass(frozen=True)
class DemoOptions:
    """A demo in full.

    Args:
        bench: servers and columns.
        extra: the question that is asked for the picture.
        config: the file of the plugin's settings.
        full: plain vLLM has a server of its own.
    """

    bench: Options
    questions: list[Question]
    extra: Question
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
    full: bool = False,
    quick: bool = False,
) -> DemoOptions:
    """The preset, and what the user has said instead.

    Raises:
        DataError: two presets, or unusable questions.
        ConfigError: an unusable configuration file.
    """
    if quick and full:
        raise DataError("--quick and --full are two things")
    few, short = FULL if full else QUICK
    file = config or Path(str(DATA / "demo.yaml"))
    plain = OWN if full else OFF
    bench = Options(
        model,
        out,
        workloads={},
        columns=[OURS, plain[PLAIN], plain[NO_CACHE]],
        tasks=0,
        config=load_file(file),
        server_args=server_args or [],
    )
    *timed, extra = load_questions((questions or few) + 1, data)
    return DemoOptions(bench, timed, extra, answer_tokens or short, file, full)
