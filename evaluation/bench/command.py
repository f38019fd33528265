# SPDX-License-Identifier: Apache-2.0
"""What `kvcomm bench` does with the options that it was given."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from rich.console import Console

from kvcomm_vllm.evaluation.bench.options import SIZES, Options, read_options
from kvcomm_vllm.evaluation.bench.resume import options_of
from kvcomm_vllm.evaluation.bench.run import run_bench
from kvcomm_vllm.evaluation.report import write_report
from kvcomm_vllm.evaluation.workloads.rows import DataError


def run_command(options: dict[str, Any], given: Collection[str], console: Console) -> None:
    """A run, or what is left of one, and its report; or the report alone.

    Args:
        options: all of them; ``given``: those that the user has named.

    Raises:
        UserError: an option that cannot be used; a server that does not start, or does not serve.
    """
    folder = options["report"]
    if folder is not None:
        _only(given, "report")
    else:
        asked = _asked(options, given)
        folder = asked.out
        run_bench(asked, console)
    for path in write_report(Path(folder)):
        console.print(f"Written: {path}", highlight=False, soft_wrap=True, markup=False)


def _asked(options: dict[str, Any], given: Collection[str]) -> Options:
    if options["resume"]:
        _only(given, "resume", "out")
        return options_of(options["out"])
    if options["model"] is None:
        raise DataError("--model is needed")
    if options["quick"] and options["full"]:
        raise DataError("--quick and --full are two things")
    sizes = {name: options[name] for name in SIZES if options[name] is not None}
    plural = {"workload": "workloads", "endpoint": "endpoints", "server_arg": "server_args"}
    others = {*SIZES, "quick", "resume", "report"}
    named = {plural.get(k, k): value for k, value in options.items() if k not in others}
    return read_options(**named, sizes=sizes)


def _only(given: Collection[str], *allowed: str) -> None:
    """Refuse options that would have no effect.

    Raises:
        DataError: another option was given, which would have no effect.
    """
    for name in sorted(set(given) - set(allowed)):
        option = name.replace("_", "-")
        raise DataError(f"--{option} has no place beside --{allowed[0]}")
