# SPDX-License-Identifier: Apache-2.0
"""``python -m evaluation.soak.run --model MODEL --seconds 600``: storms and calms on one server.

In a storm all clients send whatever the script has, while caches are reset and the engine is
paused; then the server is left alone and looked at. What does not hold is a fault; each is kept
with the request that shows it.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvcomm_vllm.cli.serve_command import serve_command, serve_env, served_name
from kvcomm_vllm.evaluation.serving.metrics_page import read_page
from kvcomm_vllm.evaluation.serving.server import Server, free_port, running, stop_at_sigterm
from kvcomm_vllm.evaluation.soak.calm import Calm
from kvcomm_vllm.evaluation.soak.checks import faults_of
from kvcomm_vllm.evaluation.soak.clients import storm
from kvcomm_vllm.evaluation.soak.dense import compare
from kvcomm_vllm.evaluation.soak.events import trouble
from kvcomm_vllm.evaluation.soak.meter import Log, memory_mb, wrong_lines
from kvcomm_vllm.evaluation.soak.options import LIMIT, Options, parse
from kvcomm_vllm.evaluation.soak.promises import Fault, Promise
from kvcomm_vllm.evaluation.soak.result import Result, Round, write
from kvcomm_vllm.evaluation.soak.script import Script

SETTINGS = "audit_idle_seconds: 0.5\nanchor_memory_mb: 64\nmax_sequences: 400\n"
EVENT_GAP = 20.0  # seconds between two things an operator does


@contextlib.contextmanager
def soaked(options: Options) -> Iterator[Server]:
    """A server short of memory, with the routes for developers; its answers are float32."""
    options.out.mkdir(parents=True, exist_ok=True)
    config = options.out / "kvcomm.yaml"
    config.write_text(SETTINGS)  # read with the plugin only
    extra = ["--dtype", "float32", "--max-model-len", str(LIMIT)]
    extra += ["--num-gpu-blocks-override", str(options.blocks), "--max-num-batched-tokens", "512"]
    extra += ["--enable-log-requests", "--no-log-error-stack", "--disable-uvicorn-access-log"]
    port = free_port()
    connector = not options.plain
    command = serve_command(
        options.model, port, on_gpu=False, connector=connector, config=config, extra=extra
    )
    env = serve_env(options.model, on_gpu=False)
    env |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with running("soak", command, port, env, options.out / "server.log") as server:
        yield server


def rounds(options: Options, server: Server, result: Result) -> None:
    """Storms and calms until the time is over; at least one of each."""
    model, script = served_name(options.model), Script(options.seed)
    log, rng = Log(server.log), random.Random(options.seed)
    end = time.monotonic() + options.seconds
    while not result.rounds or time.monotonic() + options.storm < end:
        began = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            troubled = pool.submit(trouble, server.base_url, rng, options.storm, EVENT_GAP)
            outcomes = storm(server.base_url, model, script, options.clients, options.storm)
            events = troubled.result()
        if read_page(server.base_url) is None:
            result.faults += [Fault(Promise.ALIVE, "", 0, f"see {server.log}")]
            return
        log.follow()
        calm = Calm(server.base_url, model, log, random.Random(rng.random()))
        reading = calm.drained()
        calm.learns()
        wrong = compare(server.base_url, model, outcomes, options.compared)
        calm.keeps_apart()
        calm.pauses()
        tries = calm.resets(everything=len(result.rounds) % 2 == 1)
        calm.balanced(reading)
        faults = [*faults_of(outcomes, events), *calm.faults, *wrong]
        result.add(
            Round(
                seconds=round(time.monotonic() - began, 1),
                outcomes=outcomes,
                events=events,
                reading=reading,
                resets=tries,
                memory_mb=memory_mb(server),
                faults=faults,
            )
        )
        print(result.rounds[-1].line(len(result.rounds)), flush=True)
    result.faults += [Fault(Promise.CLEAN, "", 0, line) for line in wrong_lines(server.log)]


def main(arguments: list[str] | None = None) -> Result:
    """Run it, write ``soak.json`` and ``soak.md`` into the folder, and return what was found."""
    options = parse(arguments)
    stop_at_sigterm()
    print(f"seed {options.seed}, {options.clients} clients, {options.seconds:.0f} s", flush=True)
    result = Result(options)
    try:
        with soaked(options) as server:
            rounds(options, server, result)
    finally:
        text = write(result, Path(options.out))
    print(text)
    return result


if __name__ == "__main__":
    raise SystemExit(bool(main().faults))
