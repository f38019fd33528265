# SPDX-License-Identifier: Apache-2.0
"""`kvcomm demo`: five agents on a real server, with the plugin and without it."""

import os
import sys
import time
from dataclasses import asdict
from typing import Any

from rich.console import Console

from kvcomm_vllm.cli.agents import load_agents
from kvcomm_vllm.cli.machine import cores, describe_machine, describe_versions
from kvcomm_vllm.cli.measure import Outcome, measure_in_turn, measure_side_by_side
from kvcomm_vllm.cli.questions import load_questions
from kvcomm_vllm.cli.report import LEGEND, agent_rows, headline, render_table, write_json
from kvcomm_vllm.cli.serve_command import served_name
from kvcomm_vllm.cli.server import stop_at_sigterm
from kvcomm_vllm.cli.stage import DemoOptions, Stage, progress_bar
from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.config_file import load_file


def _settings(options: DemoOptions, config: KVCommConfig, outcome: Outcome) -> dict[str, Any]:
    return {
        "command": ["kvcomm", *sys.argv[1:]],
        "model": options.model,
        "questions": list(dict.fromkeys(call.question for call in outcome.calls)),
        "answer_tokens": options.answer_tokens,
        "order": "side by side" if options.side_by_side else "one server at a time",
        "sampling": {"temperature": 0.0, "seed": 0},
        "config": {
            "file": str(options.config) if options.config else None,
            "effective": config.to_mapping(),
        },
        "versions": describe_versions(),
        "machine": describe_machine(),
        "servers": [{**asdict(server), "log": str(server.log)} for server in outcome.servers],
    }


def _present(
    options: DemoOptions, settings: dict[str, Any], outcome: Outcome, console: Console
) -> None:
    # matplotlib takes a second to import, which a refused option should not have to wait for.
    from kvcomm_vllm.cli.figure import write_figure

    rows = agent_rows(outcome.calls, outcome.replays)
    machine = settings["machine"]
    hardware = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['cores']} cores"
    report, picture = options.out / "demo.json", options.out / "demo.png"
    write_json(report, settings, rows, outcome.calls, outcome.replays, outcome.traced)
    write_figure(picture, rows, outcome.traced, served_name(options.model), hardware)
    console.print()
    console.print(render_table(rows, len(settings["questions"]), options.answer_tokens))
    console.print(LEGEND, style="dim", highlight=False, soft_wrap=True)
    console.print()
    console.print(headline(rows), highlight=False)
    console.print(
        f"Report:  {report}\nPicture: {picture}\nTotal:   {settings['total_seconds']:.0f} s",
        highlight=False,
        soft_wrap=True,
    )


def run_demo(options: DemoOptions, console: Console) -> None:
    """Measure, print the table, write demo.json and demo.png.

    The pipeline runs live with kvcomm, whose own answers are quoted onwards as they would be in
    use; plain vLLM is given exactly those prompts, so that all columns time the same text.
    Errors: DataError, ConfigError, ServerError, RequestError.
    """
    start = time.monotonic()
    config = load_file(options.config) if options.config else KVCommConfig()
    *timed, extra = load_questions(options.questions + 1, options.data)
    options.out.mkdir(parents=True, exist_ok=True)
    stop_at_sigterm()
    load = os.getloadavg()[0]
    with progress_bar(console) as progress:
        stage = Stage(options, console, progress)
        if load > cores() / 2:
            stage.say(f"Note: this machine is busy (load {load:.1f}), so times will scatter.")
        measure = measure_side_by_side if options.side_by_side else measure_in_turn
        outcome = measure(stage, load_agents(), timed, extra)
    settings = _settings(options, config, outcome)
    settings["load_before"] = round(load, 2)
    settings["total_seconds"] = round(time.monotonic() - start, 1)
    _present(options, settings, outcome, console)
