# SPDX-License-Identifier: Apache-2.0
"""``python -m evaluation.cases.run FOLDER --model MODEL --out FILE``: all cases on a real server.

The server forgets everything between two cases. Each request is sent as its client would send it;
then those that are to be compared are sent again, served exactly.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from kvcomm_vllm.cli.machine import describe_machine, describe_versions
from kvcomm_vllm.cli.serve_command import serve_command, serve_env
from kvcomm_vllm.evaluation.cases.case import Case, fill, load_cases
from kvcomm_vllm.evaluation.cases.client import Reply, dense, post, send, with_logprobs
from kvcomm_vllm.evaluation.cases.judge import Verdict, judge
from kvcomm_vllm.evaluation.cases.table import markdown, summary
from kvcomm_vllm.evaluation.serving.server import Server, free_port, running, stop_at_sigterm

DEFAULTS = {"temperature": 0, "max_tokens": 8}


def run_case(base_url: str, case: Case, model: str) -> list[Verdict]:
    """Send a case's requests in order, then what they are compared with."""
    post(base_url, "/reset_prefix_cache?reset_external=true")
    bodies, replies = [], []
    answers: dict[int, str] = {}
    for number, request in enumerate(case.requests):
        body = fill({**DEFAULTS, **request.body, "model": model}, answers)
        reply = send(base_url, request.path, with_logprobs(request.path, body))
        answers[number] = reply.text
        bodies.append(body)
        replies.append(reply)
    found = []
    for number, (request, body, reply) in enumerate(
        zip(case.requests, bodies, replies, strict=True)
    ):
        exact: Reply | None = None
        off: Reply | None = None
        if request.expect.get("kl"):
            salted = dense(with_logprobs(request.path, body), f"{case.name} {number}")
            exact = send(base_url, request.path, salted)
        if request.expect.get("off"):
            hints = {"kv_transfer_params": {"kvcomm": {"mode": "off"}}}
            off = send(base_url, request.path, {**body, **hints})
        found.append(judge(case.name, number, request.expect, reply, exact, off))
    return found


@contextmanager
def case_server(
    model: str, folder: Path, config: Path | None, extra: list[str]
) -> Iterator[Server]:
    """A server with the plugin, and the routes for developers that resetting needs."""
    port = free_port()
    tools = ["--enable-auto-tool-choice", "--tool-call-parser=hermes"]
    more = ["--trust-request-chat-template", "--no-log-error-stack", *tools, *extra]
    command = serve_command(model, port, on_gpu=False, connector=True, config=config, extra=more)
    env = serve_env(model, on_gpu=False) | {"VLLM_SERVER_DEV_MODE": "1"}
    with running("cases", command, port, env, folder / "server.log") as server:
        yield server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, default=Path("out/cases/cases.json"))
    parser.add_argument("--config", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of names")
    parser.add_argument("--server-arg", action="append", default=[])
    options = parser.parse_args()
    stop_at_sigterm()
    cases = [
        case
        for case in load_cases(options.folder)
        if not options.only or case.name.startswith(tuple(options.only))
    ]
    verdicts: list[Verdict] = []
    with case_server(
        options.model, options.out.parent, options.config, options.server_arg
    ) as server:
        with_name = Path(options.model).name
        for case in cases:
            verdicts += run_case(server.base_url, case, with_name)
            print(markdown([v for v in verdicts if v.case == case.name]), flush=True)
    result = {
        "machine": describe_machine(),
        "versions": describe_versions(),
        "summary": summary(verdicts),
        "requests": [asdict(verdict) for verdict in verdicts],
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(verdicts) + "\n")
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
