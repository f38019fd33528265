# SPDX-License-Identifier: Apache-2.0
"""The servers of a run: those started here, and clients for all of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvcomm_vllm.cli.machine import is_cpu_build
from kvcomm_vllm.cli.serve_command import serve_command, serve_env, served_name
from kvcomm_vllm.evaluation.bench.columns import KVCOMM, PLAIN, Endpoint
from kvcomm_vllm.evaluation.bench.options import Options
from kvcomm_vllm.evaluation.serving.client import ChatClient, RefusedError, RequestError
from kvcomm_vllm.evaluation.serving.server import Server, free_port, running

TITLES = {PLAIN: "plain vLLM", KVCOMM: "vLLM with kvcomm"}
CONFIG = "kvcomm.yaml"
# Two servers on one device: each its half, less what others use of it.
SHARE = "--gpu-memory-utilization"
HALF = "0.45"


@dataclass(frozen=True)
class Served:
    """A client, and its server if that was started here."""

    client: ChatClient
    server: Server | None = None


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


@contextlib.contextmanager
def serving(options: Options, progress: Progress) -> Iterator[dict[str, Served]]:
    """Servers by name, started one after the other, until the block ends.

    Raises:
        ServerError: one does not start, or dies.
        RequestError: an endpoint does not answer.
    """
    needed = {column.server for column in options.columns}
    own = [name for name in (PLAIN, KVCOMM) if name in needed]
    config = options.out / CONFIG
    if KVCOMM in own:
        config.write_text(yaml.safe_dump(options.config.to_mapping(), sort_keys=False))
    with contextlib.ExitStack() as stack:
        found: dict[str, Served] = {}
        for name in own:
            starting = started(
                TITLES[name],
                options.model,
                options.out / f"server-{name}.log",
                progress,
                connector=name == KVCOMM,
                config=config,
                extra=_arguments(options, len(own)),
            )
            server = stack.enter_context(starting)
            client = ChatClient(server.base_url, served_name(options.model))
            found[name] = Served(client, server)
        for name, endpoint in options.endpoints.items():
            found[name] = Served(foreign_client(name, endpoint))
        for one in found.values():
            stack.callback(one.client.close)
        yield found


def _arguments(options: Options, servers: int) -> list[str]:
    given = options.server_args
    told = any(argument.startswith(SHARE) for argument in given)
    if is_cpu_build() or servers < 2 or told:
        return given
    return [SHARE, HALF, *given]


def foreign_client(name: str, endpoint: Endpoint) -> ChatClient:
    """A client that says no more than the server understands.

    Raises:
        RequestError: it does not answer.
    """
    key = os.environ.get("OPENAI_API_KEY", "EMPTY")
    model = endpoint.model or _first_model(name, endpoint, key)
    hello = [{"role": "user", "content": "Hello"}]
    client = ChatClient(endpoint.url, model, api_key=key)
    try:
        client.stream(hello, 2, "bench hello")
    except RefusedError:
        client.close()
        client = ChatClient(endpoint.url, model, api_key=key, vllm=False)
        client.stream(hello, 2)
    return client


def _first_model(name: str, endpoint: Endpoint, key: str) -> str:
    try:
        with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=key, max_retries=0) as client:
            return next(iter(client.models.list())).id
    except (openai.OpenAIError, StopIteration) as error:
        raise RequestError(f"endpoint {name}: {endpoint.url} names no model ({error})") from error
