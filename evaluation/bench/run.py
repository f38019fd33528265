# SPDX-License-Identifier: Apache-2.0
"""A run of `kvcomm bench`: servers, measurements, report; or what of that is left to do."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from kvcomm_vllm.cli.machine import cores, is_cpu_build
from kvcomm_vllm.evaluation.bench.columns import KVCOMM, PLAIN, Column
from kvcomm_vllm.evaluation.bench.driver import Driver
from kvcomm_vllm.evaluation.bench.journal import Journal
from kvcomm_vllm.evaluation.bench.lockstep import SPIN_SECONDS, Rest
from kvcomm_vllm.evaluation.bench.options import Options, read_options
from kvcomm_vllm.evaluation.bench.plan import make_plan
from kvcomm_vllm.evaluation.bench.probe import rehearse
from kvcomm_vllm.evaluation.bench.resume import (
    check_same,
    new_settings,
    options_of,
    read_settings,
    write_settings,
)
from kvcomm_vllm.evaluation.bench.runner import Runner, stopwatch
from kvcomm_vllm.evaluation.bench.servers import Served, describe_servers, serving
from kvcomm_vllm.evaluation.report import write_report
from kvcomm_vllm.evaluation.serving.counters import KVCommMeter
from kvcomm_vllm.evaluation.serving.screen import progress_bar, say
from kvcomm_vllm.evaluation.serving.server import stop_at_sigterm
from kvcomm_vllm.evaluation.workloads.rows import DataError


def run_command(
    given: set[str],
    console: Console,
    *,
    out: Path,
    resume: bool,
    report: Path | None,
    **options: Any,
) -> None:
    """A run, or what is left of one, and its report; or the report alone.

    Args:
        given: the options that the user has named.
        options: see :func:`read_options`.

    Raises:
        UserError: an option that cannot be used; a server that does not start, or does not serve.
    """
    if report is not None:
        _only(given, "--report")
    elif resume:
        _only(given, "--resume", "--out")
        run_bench(options_of(out), console)
    else:
        run_bench(read_options(out=out, **options), console)
    for path in write_report(report or out):
        say(console, f"Written: {path}")


def _only(given: set[str], *allowed: str) -> None:
    """Refuse options that would have no effect."""
    for option in sorted(given - set(allowed)):
        raise DataError(f"{option} has no place beside {allowed[0]}")


def run_bench(options: Options, console: Console) -> None:
    """Measure what is not in ``options.out`` yet.

    Raises:
        DataError: unusable data, or a folder with another run.
        ServerError, RequestError: a server does not start, or does not serve.
        OSError: the folder cannot be written.
    """
    plan = make_plan(options)
    settings = read_settings(options.out)
    if settings is None:
        settings = new_settings(options, plan)
    else:
        check_same(options.out, settings["options"], options.settings())
    if settings["complete"]:
        say(console, f"{options.out} holds this run in full.")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    stop_at_sigterm()
    _session(options, settings, console)
    late = settings["sessions"][-1]["late"]
    if late:
        say(console, f"Note: {late} times the server had not learned all when asked again.")


def _session(options: Options, settings: dict[str, Any], console: Console) -> None:
    """From the start of the servers to their end."""
    session = {
        "command": ["kvcomm", *sys.argv[1:]],
        "load_before": look_busy(console),
        "seconds": 0.0,
        "late": 0,
    }
    with progress_bar(console) as progress, serving(options, progress) as servers:
        unserved = rehearse(options.columns, servers)
        for name, problem in unserved.items():
            say(console, f"Column {name} is not served: {problem}")
        clock = stopwatch()
        served = [column for column in options.columns if column.name not in unserved]
        drivers = make_drivers(served, servers, clock)
        settings["sessions"].append(session)
        settings["servers"] += describe_servers(servers)
        for name, column in settings["columns"].items():
            column["not_served"] = unserved.get(name)
        write_settings(options.out, settings)
        plan = make_plan(options, unserved)
        journal, number = Journal(options.out, plan), len(settings["sessions"]) - 1
        runner = Runner(drivers, servers, journal, resting(), progress, clock, number)
        try:
            runner.run(plan)
            settings["complete"] = True
        finally:
            session["seconds"] = round(clock(), 1)
            session["late"] = sum(driver.late for driver in drivers.values())
            write_settings(options.out, settings)


def look_busy(console: Console) -> float:
    """The load of the machine, and a note if it leaves too little room."""
    load = os.getloadavg()[0]
    if load > cores() / 2:
        say(console, f"Note: this machine is busy (load {load:.1f}), so times will scatter.")
    return round(load, 2)


def resting() -> Rest:
    """On larger machines other processes have cores of their own."""
    return Rest(SPIN_SECONDS if is_cpu_build() else 0.0)


def make_drivers(
    columns: list[Column],
    servers: dict[str, Served],
    clock: Callable[[], float],
    *,
    floor: bool = True,
) -> dict[str, Driver]:
    """A driver per column; those of the kvcomm server share a meter.

    Args:
        floor: time full hits on ``plain``.
    """
    meter = None
    if any(column.server == KVCOMM for column in columns):
        server = servers[KVCOMM].server
        assert server is not None
        meter = KVCommMeter(server.base_url)
        meter.settle()
    return {
        column.name: Driver(
            column,
            servers[column.server].client,
            clock,
            meter=meter if column.server == KVCOMM else None,
            floor=floor and column.name == PLAIN,
        )
        for column in columns
    }
