# SPDX-License-Identifier: Apache-2.0
"""The paper's setting for times: copy machines with long prefixes over a shared random input.

Each prompt is the agent's own prefix (the same in every task), the task's input (new in every
task), and the outputs of all earlier agents. Source: KVCOMM (arXiv 2510.12872), §4.2 and Tables 2
and 3; its lengths are the defaults.
"""

from __future__ import annotations

from kvcomm_vllm.evaluation.workloads.case import Case, chain
from kvcomm_vllm.evaluation.workloads.task import (
    MOST_AGENTS,
    TOKENS,
    Task,
    Workload,
    rng_of,
)
from kvcomm_vllm.evaluation.workloads.words import random_words

# Written around the words of a prefix, and counted with them.
INSTRUCTION = "You are copy machine number {number}. Write down again what you are given. "
INSTRUCTION_TOKENS = 16


def _task(
    number: int,
    seed: int,
    agents: int = 5,
    prefix_tokens: int = 512,
    input_tokens: int = 1024,
    output_tokens: int = 512,
) -> Task:
    """One team over a new input.

    Args:
        prefix_tokens: length of each agent's instructions.
        input_tokens: length of the shared input.
        output_tokens: length of each answer, whatever the model wants to write.
            For the three, see :func:`random_words` on how near the lengths are. Not counted: the
            tokens of the model's chat template, and about 10 for each answer that is quoted.
    """
    own = prefix_tokens - INSTRUCTION_TOKENS
    team = [
        (
            f"Machine {machine}",
            INSTRUCTION.format(number=machine)
            + random_words(own, rng_of(seed, f"machine {machine}")),
            "Write all of this down again.",
        )
        for machine in range(1, agents + 1)
    ]
    name = f"synthetic-{number}"
    text = random_words(input_tokens, rng_of(seed, f"input {number}"))
    return Task(Case(name, chain("Input", text, team), group=name), output_tokens, fixed=True)


WORKLOAD = Workload(
    name="synthetic",
    title="Copy machines over a shared random input and each other's outputs, all lengths given",
    tasks=_task,
    options={
        "agents": (1, MOST_AGENTS),
        "prefix_tokens": (2 * INSTRUCTION_TOKENS, None),
        "input_tokens": TOKENS,
        "output_tokens": TOKENS,
    },
)
