# SPDX-License-Identifier: Apache-2.0
"""What an engine is set to that no model could reuse with.

Asked twice: of arguments, so that vLLM gives nothing up for a connector that is of no use, and of
the finished engine, whose arguments may have been seen by nobody (a ``MultiConnector``'s part, a
configuration that was put together by hand), and which vLLM changes where a model wants it.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcomm_vllm.reasons import Reason


@dataclass(frozen=True)
class EngineSettings:
    """What is looked at, whether it was asked for or is so by now.

    Args:
        prefix_caching: as far as is known.
        pipeline_ranks: over which layers are spread.
        context_ranks: over which the tokens of a page are spread.
        expert_ranks: data-parallel ones that have to run a mixture of experts together.
        drafts: tokens are guessed ahead by what has KV of its own, or may have.
    """

    prefix_caching: bool
    pipeline_ranks: int
    context_ranks: int
    expert_ranks: int
    drafts: bool


def unsupported_settings(settings: EngineSettings) -> Reason | None:
    """The first of them that rules reuse out, or None."""
    checks = (
        (not settings.prefix_caching, Reason.PREFIX_CACHING_OFF),
        (settings.pipeline_ranks > 1, Reason.PIPELINE_PARALLEL),
        (settings.context_ranks > 1, Reason.CONTEXT_PARALLEL),
        (settings.expert_ranks > 1, Reason.EXPERTS_DATA_PARALLEL),
        (settings.drafts, Reason.SPEC_DECODE),
    )
    return next((reason for found, reason in checks if found), None)
