# SPDX-License-Identifier: Apache-2.0
"""A run of `kvcomm fidelity`: engine, measurements, table, JSON, picture."""

from __future__ import annotations

from functools import partial

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kvcomm_vllm.cli.machine import cores, cpu_model, describe_versions, gpus
from kvcomm_vllm.evaluation.fidelity.bench import Bench
from kvcomm_vllm.evaluation.fidelity.figure import write_figure
from kvcomm_vllm.evaluation.fidelity.measure import measure, steps
from kvcomm_vllm.evaluation.fidelity.options import Options
from kvcomm_vllm.evaluation.fidelity.report import LEGEND, render_table, summarise, write_json


def run_fidelity(options: Options, console: Console) -> None:
    """Measure, print one table per workload, write fidelity.json and fidelity.png.

    Raises:
        BenchError: the engine cannot start, or cannot reuse.
        OSError: the folder for results cannot be written.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    log = Console(stderr=True)
    with log.status(f"Starting vLLM with {options.model}"):
        bench = Bench(options.model, options.plugin, dtype=options.dtype)
    scores = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=log) as progress:
            for study in options.studies:
                total = steps(study, options.points)
                task = progress.add_task(study.workload, total=total)
                scores += measure(
                    bench,
                    study,
                    options.points,
                    options.tokens,
                    done=partial(progress.advance, task),
                    exact_sources=options.exact_sources,
                )
    finally:
        bench.close()
    summaries = summarise(scores)
    settings = {**options.settings(), "versions": describe_versions()}
    write_json(options.out / "fidelity.json", settings, summaries, scores)
    machine = ", ".join(gpus()) or f"{cpu_model()}, cores: {cores()}"
    write_figure(options.out / "fidelity.png", summaries, f"{settings['model']}, {machine}")
    for study in options.studies:
        found = [summary for summary in summaries if summary.workload == study.workload]
        console.print(render_table(study.workload, found, options.tokens))
    console.print(LEGEND, style="dim", highlight=False)
    written = f"{options.out / 'fidelity.json'}, {options.out / 'fidelity.png'}"
    console.print(f"\nWritten: {written}", highlight=False, soft_wrap=True)
