# SPDX-License-Identifier: Apache-2.0
"""A run of `kvcomm fidelity`: engine, measurements, table, JSON, picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kvcomm_vllm.cli.machine import cores, cpu_model, describe_versions, gpus
from kvcomm_vllm.evaluation.fidelity.bench import Bench
from kvcomm_vllm.evaluation.fidelity.figure import write_figure
from kvcomm_vllm.evaluation.fidelity.measure import Score, measure, steps
from kvcomm_vllm.evaluation.fidelity.options import Options
from kvcomm_vllm.evaluation.fidelity.probe_report import (
    probe_table,
    summarise_probes,
    write_probes,
)
from kvcomm_vllm.evaluation.fidelity.probes import ProbeScore, measure_probes
from kvcomm_vllm.evaluation.fidelity.report import LEGEND, render_table, summarise, write_json
from kvcomm_vllm.evaluation.fidelity.study import Study


def run_fidelity(options: Options, console: Console) -> None:
    """Measure, print one table per workload, write fidelity.json and fidelity.png; of probes, one
    table for all, and probes.json and probes.md.

    Numbers are written behind each workload, so that a run that is cut off keeps what it has.

    Raises:
        BenchError: the engine cannot start, or cannot reuse.
        OSError: the folder for results cannot be written.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {**options.settings(), "versions": describe_versions()}
    log = Console(stderr=True)
    with log.status(f"Starting vLLM with {options.model}"):
        bench = Bench(options.model, options.plugin, dtype=options.dtype)
    try:
        if options.probes:
            _probes(bench, options, settings, console, log)
        else:
            _distances(bench, options, settings, console, log)
    finally:
        bench.close()


def _studies(options: Options, log: Console) -> Iterator[tuple[Study, Callable[[], None]]]:
    """All studies, under a bar each: what moves it on."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=log) as progress:
        for study in options.studies:
            total = len(study.scored) if options.probes else steps(study, options.points)
            task = progress.add_task(study.workload, total=total)
            yield study, partial(progress.advance, task)


def _probes(
    bench: Bench, options: Options, settings: dict[str, Any], console: Console, log: Console
) -> None:
    scores: list[ProbeScore] = []
    for study, done in _studies(options, log):
        scores += measure_probes(bench, study, options.points, done)
        write_probes(options.out, "probes", settings, scores)
    shown = probe_table(summarise_probes(scores), brief=True)
    console.print(shown.screen())
    console.print(shown.note, style="dim", highlight=False)
    _written(options, console, "probes.json", "probes.md")


def _distances(
    bench: Bench, options: Options, settings: dict[str, Any], console: Console, log: Console
) -> None:
    scores: list[Score] = []
    for study, done in _studies(options, log):
        scores += measure(
            bench,
            study,
            options.points,
            options.tokens,
            done,
            exact_sources=options.exact_sources,
            idle_seconds=options.idle_seconds,
        )
        summaries = summarise(scores)
        write_json(options.out / "fidelity.json", settings, summaries, scores)
    machine = ", ".join(gpus()) or f"{cpu_model()}, cores: {cores()}"
    write_figure(options.out / "fidelity.png", summaries, f"{settings['model']}, {machine}")
    for study in options.studies:
        found = [summary for summary in summaries if summary.workload == study.workload]
        console.print(render_table(study.workload, found, options.tokens))
    console.print(LEGEND, style="dim", highlight=False)
    _written(options, console, "fidelity.json", "fidelity.png")


def _written(options: Options, console: Console, *names: str) -> None:
    written = ", ".join(str(options.out / name) for name in names)
    console.print(f"\nWritten: {written}", highlight=False, soft_wrap=True)
