# SPDX-License-Identifier: Apache-2.0
"""How everything in the report is counted, for its readers."""

from __future__ import annotations

from kvcomm_vllm.evaluation.report.content import Content
from kvcomm_vllm.evaluation.report.intervals import FEWEST_UNITS, RESAMPLES


def definitions(content: Content) -> list[tuple[str, str]]:
    """Terms and how they are counted."""
    allowed = content.allowance
    return [
        (
            "Time to first token",
            "From sending a request to the first chunk that carries a token, seen by the client.",
        ),
        (
            "95% intervals",
            f"{RESAMPLES:,} bootstrap resamples of whole tasks (of groups of tasks, where the same "
            "candidates are shown in several orders), seeded. They say how tasks vary within this "
            f"run. Fewer than {FEWEST_UNITS} tasks give no interval, a dozen one that is too "
            "narrow.",
        ),
        (
            "Significantly below plain",
            "The whole 95% interval of the paired difference of scores lies below zero. Intervals "
            "are not widened for the number of columns and workloads, so one false alarm in forty "
            "is to be expected.",
        ),
        (
            "Repeated tokens",
            "Prompt tokens in a run of 16 or more that an earlier request of the same column had "
            "in its prompt or answer: what nobody would have to compute.",
        ),
        (
            "A call that quotes shared text",
            "More repeated tokens beyond the cached prefix of the call's own than a call that "
            "reuses all of them may lack (next line). Others repeat a few words of template.",
        ),
        (
            "Reusing all of it",
            f"Not more of these tokens were computed than a seam of {allowed.seam} for each run of "
            f"text, and up to {allowed.page - 1} in the page where the cached prefix ends. Texts "
            "in another order than before are a run each. A missed run that is shorter than what "
            "all runs of the call may lack together is not noticed.",
        ),
        (
            "How the paper counts",
            "Its reuse rate is the share of agent calls all of whose placeholders were shared; one "
            "new placeholder makes the whole call dense. A first agent's question is computed by a "
            "forward of its own there, and then counts as shared; here it is a dense read, and the "
            "call counts as one that quotes nothing. Its times leave out calls that build anchors "
            "and calls that fall back to dense; here all calls count.",
        ),
    ]
