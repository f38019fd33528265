# SPDX-License-Identifier: Apache-2.0
"""What people see while servers start and work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvcomm_vllm.cli.machine import is_cpu_build
from kvcomm_vllm.cli.serve_command import serve_command, serve_env
from kvcomm_vllm.evaluation.serving.server import Server, free_port, running


def progress_bar(console: Console) -> Progress:
    """A bar that leaves nothing behind."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True)


def say(console: Console, text: str) -> None:
    """A line on the screen, word for word."""
    console.print(escape(text), highlight=False, soft_wrap=True)


@contextlib.contextmanager
def started(
    title: str,
    model: str,
    log: Path,
    progress: Progress,
    *,
    connector: bool = True,
    config: Path | None = None,
    extra: list[str] | None = None,
) -> Iterator[Server]:
    """A running server, with a progress line while it starts.

    Args:
        connector: turns the plugin on; ``config`` is its file.
        extra: further arguments of `vllm serve`.

    Raises:
        ServerError: it does not start, or dies.
    """
    on_gpu = not is_cpu_build()
    port = free_port()
    command = serve_command(
        model, port, on_gpu=on_gpu, connector=connector, config=config, extra=extra or []
    )
    say(progress.console, f"Starting {title} (log: {log})")
    task = progress.add_task(f"{title} is starting", total=None)
    try:
        with running(title, command, port, serve_env(model, on_gpu=on_gpu), log) as server:
            progress.remove_task(task)
            say(progress.console, f"  ready after {server.start_seconds:.0f} s")
            yield server
    finally:
        if task in progress.task_ids:
            progress.remove_task(task)
