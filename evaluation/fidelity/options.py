# SPDX-License-Identifier: Apache-2.0
"""The command's options, checked before an engine starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcomm_vllm.cli.machine import serving_dtype
from kvcomm_vllm.evaluation.fidelity.study import Study, choose
from kvcomm_vllm.evaluation.modes import UNREFRESHED, asked
from kvcomm_vllm.evaluation.workloads import CASES, CHAINS, PROBES, cases
from kvcomm_vllm.evaluation.workloads.rows import DataError
from kvcomm_vllm.evaluation.workloads.user_file import user_cases

DTYPES = ("auto", "bfloat16", "float16", "float32")
PAPER_MEMORY_MB = 2048  # 20 anchors of some placeholders of a small model
CURVE = (1, 2, 5, 10)
# All modes read the same exact KV of the prompt before the edit. What one of them leaves behind is
# approximate: no source for the next, nor found by it in the prefix cache.
PROBING: dict[str, Any] = {"reuse_approximate": False}
LEARNING = ("anchor", "paper")  # modes to which anchors make a difference


@dataclass(frozen=True)
class Options:
    """A run in full: what is measured (``points`` are (mode, anchors)), on what, and where to."""

    model: str
    points: list[tuple[str, int]]
    studies: list[Study]
    tokens: int
    seed: int
    out: Path
    exact_sources: bool
    paper_gamma: float
    first: int
    dtype: str
    idle_seconds: float = 0.0

    @property
    def plugin(self) -> dict[str, Any]:
        """What the plugin has to be configured with for these modes."""
        found: dict[str, Any] = {}
        if any(mode == "paper" for mode, _ in self.points):
            found["paper"] = {"memory_mb": PAPER_MEMORY_MB, "gamma": self.paper_gamma}
        if any(mode.endswith(UNREFRESHED) for mode, _ in self.points):
            found["max_refresh_share"] = 0.0
        if self.idle_seconds:
            found |= {"audits": True, "heal": "idle"}
        return found | (PROBING if self.probes else {})

    @property
    def probes(self) -> bool:
        """Whether it is probes that are measured, and no other workload."""
        return self.studies[0].workload in PROBES

    def settings(self) -> dict[str, Any]:
        """For the report; JSON-able."""
        same = ("first", "tokens", "dtype", "exact_sources", "idle_seconds", "plugin", "seed")
        return {
            "model": Path(self.model).name if Path(self.model).is_dir() else self.model,
            "workloads": {study.workload: study.source for study in self.studies},
            "points": [{"mode": mode, "anchors": anchors} for mode, anchors in self.points],
            "prompts": len(self.studies[0].scored),
            **{name: getattr(self, name) for name in same},
        }


def read_options(
    *,
    workload: str,
    modes: str,
    prompts: int,
    anchors: str,
    curve: bool,
    jsonl: Path | None,
    data: Path | None,
    dtype: str,
    **others: Any,
) -> Options:
    """All that the user has said, checked.

    Args:
        others: further fields of :class:`Options`.

    Raises:
        DataError: an option that cannot be used, or data that are missing or too few.
    """
    if dtype not in DTYPES:
        raise DataError(f"--dtype: {dtype!r} must be one of {', '.join(DTYPES)}")
    named = _names(modes, "--modes")
    if len({name.endswith(UNREFRESHED) for name in named}) > 1:
        raise DataError(f"--modes: those that end in {UNREFRESHED!r} need a run of their own")
    measured = points(named, anchor_points(_numbers(anchors), curve))
    most = max(count for _, count in measured)
    if jsonl is not None:
        own = user_cases(jsonl)
        # a user's file is scored as far as it goes; what is left of it teaches
        chosen = [choose(jsonl.stem, jsonl.name, own, min(prompts, len(own)), most)]
    else:
        every = {"all": [*CASES], "chains": [*CHAINS], "probes": [*PROBES]}
        names = every.get(workload) or _names(workload, "--workload")
        if len({name in PROBES for name in names}) > 1:
            raise DataError("--workload: probes need a run of their own")
        chosen = []
        for name in names:
            found, source = cases(name, data, others["seed"])
            chosen.append(choose(name, source, found, prompts, most, others["first"]))
    return Options(points=measured, studies=chosen, dtype=serving_dtype(dtype), **others)


def anchor_points(anchors: list[int], curve: bool) -> tuple[int, ...]:
    """Numbers of anchors to measure, ascending: none, those given, and for a curve some between."""
    between = [n for n in CURVE if n < max(anchors)] if curve else []
    return tuple(sorted({0, *anchors, *between}))


def points(modes: list[str], anchors: tuple[int, ...]) -> list[tuple[str, int]]:
    """(mode, anchors) in the order they are measured; modes that do not learn have point 0 alone.

    Raises:
        DataError: see :func:`~kvcomm_vllm.evaluation.modes.hints_of`.
    """
    learns = {mode: asked(mode)["mode"] in LEARNING for mode in modes}
    return [(mode, n) for mode in modes for n in (anchors if learns[mode] else (0,))]


def _names(text: str, option: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise DataError(f"{option}: names nothing")
    return names


def _numbers(text: str) -> list[int]:
    names = _names(text, "--anchors")
    if not all(name.isdecimal() for name in names):
        raise DataError(f"--anchors: {text!r} must be whole numbers of cases, 0 or more")
    return [int(name) for name in names]
