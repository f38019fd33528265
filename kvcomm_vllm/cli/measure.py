# SPDX-License-Identifier: Apache-2.0
"""Run the pipeline with kvcomm and the same prompts on plain vLLM, in one of two orders."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from kvcomm_vllm.cli.agents import Agent
from kvcomm_vllm.cli.client import ChatClient
from kvcomm_vllm.cli.pipeline import (
    LiveCall,
    Replay,
    TracedCall,
    rehearse,
    replay_call,
    run_live,
    run_traced,
)
from kvcomm_vllm.cli.questions import Question
from kvcomm_vllm.cli.serve_command import served_name
from kvcomm_vllm.cli.server import Server
from kvcomm_vllm.cli.stage import DemoOptions, Stage
from kvcomm_vllm.cli.treatment import TreatmentMeter

# vLLM's processes poll their shared memory for a second after the last request (SpinCondition), on
# cores that the other server would need for its first token.
SPIN_SECONDS = 1.2


@dataclass(frozen=True)
class Outcome:
    """Everything that was measured; `calls` and `replays` belong together one by one."""

    servers: list[Server]
    calls: list[LiveCall]
    replays: list[Replay]
    traced: list[TracedCall]


@contextlib.contextmanager
def _warm_server(
    stage: Stage[DemoOptions], agents: list[Agent], title: str, log_name: str, connector: bool
) -> Iterator[tuple[Server, ChatClient]]:
    with stage.server(title, log_name, connector) as server:
        client = ChatClient(server.base_url, served_name(stage.options.model))
        with contextlib.closing(client):
            with stage.steps("warm-up", len(agents)) as step:
                rehearse(client, agents, step)
            yield server, client


def _kvcomm(
    stage: Stage[DemoOptions], agents: list[Agent]
) -> contextlib.AbstractContextManager[tuple[Server, ChatClient]]:
    return _warm_server(stage, agents, "vLLM with kvcomm", "server-kvcomm.log", connector=True)


def _plain(
    stage: Stage[DemoOptions], agents: list[Agent]
) -> contextlib.AbstractContextManager[tuple[Server, ChatClient]]:
    return _warm_server(stage, agents, "plain vLLM", "server-plain.log", connector=False)


def _traced(
    stage: Stage[DemoOptions], client: ChatClient, agents: list[Agent], question: Question
) -> list[TracedCall]:
    with stage.steps("one more question for the picture", len(agents)) as step:
        return run_traced(client, agents, question, stage.options.answer_tokens, step)


def measure_side_by_side(
    stage: Stage[DemoOptions], agents: list[Agent], questions: list[Question], extra: Question
) -> Outcome:
    """Both servers at once; each prompt goes to plain vLLM as soon as kvcomm is at rest again."""
    tokens = stage.options.answer_tokens
    replays: list[Replay] = []

    def replay(call: LiveCall) -> None:
        time.sleep(SPIN_SECONDS)
        replays.append(replay_call(plain_client, call, tokens))
        time.sleep(SPIN_SECONDS)

    with _kvcomm(stage, agents) as (server, client):
        with _plain(stage, agents) as (plain_server, plain_client):
            meter = TreatmentMeter(server.base_url)
            with stage.steps("agents at work", len(agents) * len(questions)) as step:
                calls = run_live(
                    client,
                    meter,
                    agents,
                    questions,
                    tokens,
                    step,
                    after=replay,
                )
        traced = _traced(stage, client, agents, extra)
    return Outcome([server, plain_server], calls, replays, traced)


def measure_in_turn(
    stage: Stage[DemoOptions], agents: list[Agent], questions: list[Question], extra: Question
) -> Outcome:
    """One server at a time; plain vLLM is given all recorded prompts afterwards."""
    tokens = stage.options.answer_tokens
    total = len(agents) * len(questions)
    with _kvcomm(stage, agents) as (server, client):
        meter = TreatmentMeter(server.base_url)
        with stage.steps("agents at work with kvcomm", total) as step:
            calls = run_live(client, meter, agents, questions, tokens, step)
        traced = _traced(stage, client, agents, extra)
    replays = []
    with (
        _plain(stage, agents) as (plain_server, client),
        stage.steps("the same prompts on plain vLLM", total) as step,
    ):
        for call in calls:
            step(f"{call.question}, {call.agent.name}")
            replays.append(replay_call(client, call, tokens))
    return Outcome([server, plain_server], calls, replays, traced)
