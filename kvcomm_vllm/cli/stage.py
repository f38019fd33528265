# SPDX-License-Identifier: Apache-2.0
"""What demo and bench run on: the servers, and the progress on the screen."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvcomm_vllm.cli.machine import is_cpu_build
from kvcomm_vllm.cli.serve_command import serve_command, serve_env
from kvcomm_vllm.cli.server import Server, free_port, running


class Serving(Protocol):
    """What the user has said about servers: the model, the folder of their logs, the plugin's
    configuration file, and further arguments.
    """

    @property
    def model(self) -> str: ...
    @property
    def out(self) -> Path: ...
    @property
    def config(self) -> Path | None: ...
    @property
    def server_args(self) -> list[str]: ...


Asked = TypeVar("Asked", bound=Serving)


@dataclass(frozen=True)
class DemoOptions:
    """What the user has asked for.

    `side_by_side` keeps both servers running and sends them each prompt in turn, so that a change
    of the machine's speed hits both; otherwise they run one after the other, which is needed
    where they do not fit into memory together.
    """

    model: str
    out: Path
    questions: int
    answer_tokens: int
    side_by_side: bool
    data: Path | None = None
    config: Path | None = None
    server_args: list[str] = field(default_factory=list)


def progress_bar(console: Console) -> Progress:
    """The bar that `Stage` draws on; it leaves nothing behind."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True)


@dataclass(frozen=True)
class Stage(Generic[Asked]):
    """Starts servers and shows what is going on."""

    options: Asked
    console: Console
    progress: Progress

    def say(self, text: str) -> None:
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def server(self, title: str, log_name: str, connector: bool) -> Iterator[Server]:
        """A running server, with a progress line while it starts. Errors: ServerError."""
        options = self.options
        on_gpu = not is_cpu_build()
        port = free_port()
        command = serve_command(
            options.model,
            port,
            on_gpu=on_gpu,
            connector=connector,
            config=options.config,
            extra=options.server_args,
        )
        env = serve_env(options.model, on_gpu=on_gpu)
        log = options.out / log_name
        self.say(f"Starting {title} (log: {log})")
        task = self.progress.add_task(f"{title} is starting", total=None)
        try:
            with running(title, command, port, env, log) as server:
                self.progress.remove_task(task)
                self.say(f"  ready after {server.start_seconds:.0f} s")
                yield server
        finally:
            if task in self.progress.task_ids:
                self.progress.remove_task(task)

    @contextlib.contextmanager
    def steps(self, title: str, total: int) -> Iterator[Callable[[str], None]]:
        """A progress bar over `total` steps; call the result when one begins."""
        task = self.progress.add_task(title, total=total)
        begun = 0

        def step(what: str) -> None:
            nonlocal begun
            self.progress.update(task, completed=begun, description=f"{title}: {what}")
            begun += 1
            if not self.console.is_terminal:
                self.say(f"  {title} {begun}/{total}: {what}")

        start = time.monotonic()
        try:
            yield step
        finally:
            self.progress.remove_task(task)
        self.say(f"  {title}: {total} steps in {time.monotonic() - start:.0f} s")
