# SPDX-License-Identifier: Apache-2.0
"""A rehearsal of every column: all code has run once, and what is not served is known."""

from __future__ import annotations

from kvcomm_vllm.evaluation.bench.columns import Column
from kvcomm_vllm.evaluation.bench.servers import Served
from kvcomm_vllm.evaluation.serving.client import ChatClient, RefusedError
from kvcomm_vllm.evaluation.workloads.notes import load_agents, rehearsal
from kvcomm_vllm.reasons import Reason, Scope

TOKENS = 4
NO_REPORT = "vLLM runs without the plugin (its log says why), or report is false in --config"


def rehearse(columns: list[Column], servers: dict[str, Served]) -> dict[str, str]:
    """Two agents are asked about the same text.

    Returns why columns are not served, by name.

    Raises:
        RequestError: a server does not serve at all.
    """
    found = {}
    for column in columns:
        problem = _problem(column, servers[column.server].client)
        if problem is not None:
            found[column.name] = problem
    return found


def _problem(column: Column, client: ChatClient) -> str | None:
    salt = f"rehearsal {column.name}"
    for agent in load_agents()[:2]:
        messages = rehearsal(agent).messages()
        try:
            client.stream(messages, TOKENS, salt, hints=column.hints)
            if column.hints is None:
                continue
            # one that is not streamed says how it was served, whatever middleware the server has
            answer = client.complete(messages, TOKENS, f"{salt} again", hints=column.hints)
        except RefusedError as error:
            return str(error)
        if (report := answer.report) is None:
            return f"its responses carry no report: {NO_REPORT}"
        for word in report.get("declined", {}):
            try:
                reason = Reason.of(word)
            except ValueError as error:  # an endpoint that somebody else has started
                return str(error)
            if reason.scope is Scope.ENGINE or reason is Reason.NO_PAPER_MEMORY:
                return f"{word}: {reason.explanation}"
    return None
