# SPDX-License-Identifier: Apache-2.0
"""The servers of a run: those started here, and clients for all of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import openai
import yaml
from rich.progress import Progress

from kvcomm_vllm.cli.machine import is_cpu_build
from kvcomm_vllm.cli.serve_command import served_name
from kvcomm_vllm.evaluation.bench.columns import KVCOMM, PLAIN, Endpoint
from kvcomm_vllm.evaluation.bench.options import Options
from kvcomm_vllm.evaluation.serving.client import ChatClient, RefusedError, RequestError
from kvcomm_vllm.evaluation.serving.screen import started
from kvcomm_vllm.evaluation.serving.server import Server

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


def describe_servers(servers: dict[str, Served]) -> list[dict[str, Any]]:
    """Those that were started here; JSON-able."""
    own = [served.server for served in servers.values() if served.server is not None]
    return [{**asdict(server), "log": str(server.log)} for server in own]


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
