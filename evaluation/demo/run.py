# SPDX-License-Identifier: Apache-2.0
"""`kvcomm demo`: a scene on a real server, with the plugin and without it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import Progress

from kvcomm_vllm.cli.serve_command import served_name
from kvcomm_vllm.evaluation.bench.columns import KVCOMM, NO_CACHE, PLAIN
from kvcomm_vllm.evaluation.bench.driver import Driver
from kvcomm_vllm.evaluation.bench.lockstep import Floor, Running, play
from kvcomm_vllm.evaluation.bench.probe import rehearse
from kvcomm_vllm.evaluation.bench.records import LOCKSTEP, SkipRecord, Stand
from kvcomm_vllm.evaluation.bench.resume import about_run
from kvcomm_vllm.evaluation.bench.run import look_busy, make_drivers, resting
from kvcomm_vllm.evaluation.bench.runner import stopwatch
from kvcomm_vllm.evaluation.bench.servers import Served, describe_servers, serving
from kvcomm_vllm.evaluation.demo.options import OURS, DemoOptions
from kvcomm_vllm.evaluation.demo.table import Heard, Traced, write_json
from kvcomm_vllm.evaluation.serving.client import ChatClient, RefusedError
from kvcomm_vllm.evaluation.serving.screen import progress_bar, say
from kvcomm_vllm.evaluation.serving.server import stop_at_sigterm
from kvcomm_vllm.evaluation.workloads.task import Task

ONE_SERVER = (
    "Plain vLLM's times are taken on this server, with mode off, which gives plain vLLM's tokens\n"
    "(tests/engine/test_exactness.py, test_mode_off_gives_the_tokens_of_plain_vllm).\n"
    "--full starts plain vLLM beside it."
)


def run_demo(options: DemoOptions, console: Console) -> None:
    """Measure, print the table, write demo.json and demo.png.

    The agents quote what they answered with kvcomm, as they would in use; plain vLLM is given
    exactly those prompts, so that all columns time the same text.

    Raises:
        ServerError, RequestError: a server does not start, or does not serve.
        OSError: the folder for results cannot be written.
    """
    begun = time.monotonic()
    options.bench.out.mkdir(parents=True, exist_ok=True)
    stop_at_sigterm()
    load = look_busy(console)
    with progress_bar(console) as progress, serving(options.bench, progress) as servers:
        if not options.full:
            say(console, ONE_SERVER)
        for problem in rehearse(options.bench.columns, servers).values():
            raise RefusedError(problem)
        drivers = make_drivers(options.bench.columns, servers, stopwatch(), floor=False)
        calls = [
            call for task in options.tasks for call in _measured(task, options, drivers, progress)
        ]
        traced = _traced(servers[KVCOMM].client, options, progress)
        settings = _settings(options, servers)
    settings |= {"load_before": load, "total_seconds": round(time.monotonic() - begun, 1)}
    _present(options, settings, calls, traced, console)


def _measured(
    task: Task, options: DemoOptions, drivers: dict[str, Driver], progress: Progress
) -> list[Heard]:
    """One task in every column; each call is shown as soon as all have answered it."""
    found: list[Heard] = []

    def heard(turn: Sequence[Running]) -> None:
        by_name = {one.column: one for one in turn}
        ours, plain = by_name[OURS.name], by_name.get(NO_CACHE, by_name[PLAIN])
        call = task.call(ours.said[: len(found)])
        assert call is not None
        records = {name: one.records[-1] for name, one in by_name.items()}
        answers = {"plain": plain.texts[-1], "kvcomm": ours.texts[-1]}
        found.append(Heard(task.id, call.messages, records, answers))
        progress.update(bar, completed=len(found))
        say(progress.console, options.scene.line(found[-1]))

    bar = progress.add_task("agents at work", total=len(task.case.turns))
    step = partial(progress.update, bar)
    floor = Floor(resting(), stopwatch(), lambda what: step(description=what), heard)
    stand = Stand(options.scene.name, LOCKSTEP, task.id)
    played = play(task, stand, list(drivers.values()), floor, lead=OURS.name)
    progress.remove_task(bar)
    if isinstance(played, SkipRecord):
        raise RefusedError(played.error)
    return found


def _traced(client: ChatClient, options: DemoOptions, progress: Progress) -> list[Traced]:
    """One more task without streaming, because only such responses carry the report."""
    task = options.extra
    say(progress.console, f"  one more {options.scene.task} for the picture")
    found: list[Traced] = []
    said: list[str] = []
    while (call := task.call(said)) is not None:
        # with the salt of the timed question, under which all instructions are in the cache
        answer = client.complete(call.messages, call.max_tokens, OURS.salt(0))
        found.append(Traced(call.agent, answer.prompt_tokens, answer.report or {}))
        said.append(answer.text)
    return found


def _settings(options: DemoOptions, servers: dict[str, Served]) -> dict[str, Any]:
    return {
        **about_run(options.bench.model),
        "scene": options.scene.name,
        f"{options.scene.task}s": [task.id for task in options.tasks],
        "answer_tokens": options.answer_tokens,
        "order": "side by side" if options.full else "one server",
        "config": {
            "file": str(options.config),
            "effective": options.bench.config.to_mapping(),
        },
        "servers": describe_servers(servers),
    }


def _present(
    options: DemoOptions,
    settings: dict[str, Any],
    calls: list[Heard],
    traced: list[Traced],
    console: Console,
) -> None:
    # matplotlib takes a second to import, which a refused option should not have to wait for.
    from kvcomm_vllm.evaluation.demo.figure import write_figure

    scene, machine = options.scene, settings["machine"]
    rows = scene.rows(calls)
    hardware = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['cores']} cores"
    out = options.bench.out
    report, picture = out / "demo.json", out / "demo.png"
    write_json(report, settings, {f"{scene.row}s": rows}, calls, traced)
    write_figure(picture, scene, rows, traced, f"{served_name(options.bench.model)}, {hardware}")
    console.print()
    console.print(scene.table(rows, len(options.tasks), options.answer_tokens))
    console.print(scene.legend, style="dim", highlight=False, soft_wrap=True)
    console.print()
    console.print(scene.headline(rows), highlight=False)
    seconds = f"{settings['total_seconds']:.0f} s"
    say(console, f"Report:  {report}\nPicture: {picture}\nTotal:   {seconds}")
