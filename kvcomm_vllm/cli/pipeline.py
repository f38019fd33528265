# SPDX-License-Identifier: Apache-2.0
"""The five-agent pipeline: live on one server, replayed call by call on another."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvcomm_vllm.cli.agents import Agent, Note, agent_messages, rehearsal_messages
from kvcomm_vllm.cli.client import Answer, ChatClient, Message
from kvcomm_vllm.cli.questions import Question
from kvcomm_vllm.cli.treatment import Treatment, TreatmentMeter

Step = Callable[[str], None]


@dataclass(frozen=True)
class LiveCall:
    """One agent's turn on the kvcomm server: its exact prompt, and how it was served."""

    question: str
    agent: Agent
    messages: list[Message]
    answer: Answer
    treatment: Treatment | None


@dataclass(frozen=True)
class Replay:
    """The same prompt on plain vLLM: without any cached prefix, and with the agent's own."""

    cold: Answer
    warm: Answer


@dataclass(frozen=True)
class TracedCall:
    """One agent's turn with the server's own report of every span of the prompt."""

    agent: Agent
    answer: Answer
    report: dict[str, Any]


def rehearse(client: ChatClient, agents: list[Agent], step: Step) -> None:
    """Fill prefix caches with all system prompts, and run every code path once, untimed."""
    for agent in agents:
        step(agent.name)
        client.stream(rehearsal_messages(agent), 2)


def run_live(
    client: ChatClient,
    meter: TreatmentMeter,
    agents: list[Agent],
    questions: list[Question],
    answer_tokens: int,
    step: Step,
    after: Callable[[LiveCall], None] = lambda call: None,
) -> list[LiveCall]:
    """Let the agents work on each question, quoting what this server has answered before.

    `after` is called with each turn before the next one begins.
    """
    calls = []
    for number, question in enumerate(questions, 1):
        notes: list[Note] = []
        for agent in agents:
            step(f"question {number}, {agent.name}")
            # The own system prompt is the most recently used entry of the cache before every
            # timed call, here and in the replay, so that evictions cannot favour either side.
            meter.take(client.stream(rehearsal_messages(agent), 1).prompt_tokens)
            messages = agent_messages(agent, question.task, notes)
            answer = client.stream(messages, answer_tokens)
            treatment = meter.take(answer.prompt_tokens)
            call = LiveCall(question.id, agent, messages, answer, treatment)
            calls.append(call)
            notes.append(Note(agent.name, answer.text))
            after(call)
    return calls


def replay_call(client: ChatClient, call: LiveCall, answer_tokens: int) -> Replay:
    """Send a recorded prompt twice to a plain server with prefix caching.

    A cache salt of its own gives the second request an empty prefix cache, so one server serves
    both columns.
    """
    client.stream(rehearsal_messages(call.agent), 1)
    warm = client.stream(call.messages, answer_tokens)
    salt = f"cold {call.question} {call.agent.name}"
    cold = client.stream(call.messages, answer_tokens, cache_salt=salt)
    return Replay(cold, warm)


def run_traced(
    client: ChatClient, agents: list[Agent], question: Question, answer_tokens: int, step: Step
) -> list[TracedCall]:
    """One more question without streaming, because only such responses carry the report."""
    calls = []
    notes: list[Note] = []
    for agent in agents:
        step(f"traced question, {agent.name}")
        answer = client.complete(agent_messages(agent, question.task, notes), answer_tokens)
        params = answer.extra.get("kv_transfer_params")
        report = params.get("kvcomm") if isinstance(params, dict) else None
        calls.append(TracedCall(agent, answer, report if isinstance(report, dict) else {}))
        notes.append(Note(agent.name, answer.text))
    return calls


def equal_leading_share(first: tuple[int, ...], second: tuple[int, ...]) -> float:
    """Share of leading tokens on which two greedy answers agree, in 0..1.

    The length of the common prefix over the length of the longer answer; 1 if both are empty.
    """
    longest = max(len(first), len(second))
    if not longest:
        return 1.0
    pairs = zip(first, second, strict=False)
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
    return equal / longest
