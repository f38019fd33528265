# SPDX-License-Identifier: Apache-2.0
"""Origin of KV: in which request each token's KV was computed, and what it saw there.

KV is copied from prompt to prompt, also copies of copies, so the request in whose pages it lies
need not be the one that computed it.
"""

from __future__ import annotations

import numpy as np

from kvcomm_vllm.scheduler.index import I32, Births, Origin, Sequence
from kvcomm_vllm.scheduler.repeats import Marks, repeats
from kvcomm_vllm.scheduler.spans import Plan, Source

# A prompt's first tokens tell agents apart; more would reach into what they are told.
LEAD_TOKENS = 32
ELSEWHERE = -1  # computed for another agent
OWN = np.iinfo(np.int32).max  # by the request itself, which has no number as long as it is planned


def same_agent(one: I32, other: I32) -> bool:
    """Whether two token sequences begin as one agent's prompts do."""
    return np.array_equal(one[:LEAD_TOKENS], other[:LEAD_TOKENS])


def numbered(found: Origin | None, sequence_id: int) -> Origin | None:
    """The same, where the request has its number."""
    if found is None:
        return None
    return Origin(found.repeats, np.where(found.born == OWN, np.int32(sequence_id), found.born))


def origin(sequence: Sequence) -> Origin:
    """That of a stored sequence. Where it was not kept, all of it was computed where it stands."""
    known, tokens = sequence.origin, len(sequence.tokens)
    if known is None or len(known.born) < tokens:
        found = repeats(sequence.tokens)
        births: Births = np.broadcast_to(np.int32(sequence.id), tokens)  # takes no memory
        if known is not None:
            found[: len(known.born)] = known.repeats
            births = np.concatenate([known.born, births[len(known.born) :]])
        sequence.origin = known = Origin(found, births)
    return known


def computed_where_it_stands(sequence: Sequence, tokens: int) -> None:
    """The first tokens of a sequence have been computed again in their own context."""
    if sequence.origin is None:
        return
    known, own = origin(sequence), np.full(tokens, sequence.id, np.int32)
    sequence.origin = Origin(
        np.concatenate([repeats(sequence.tokens)[:tokens], known.repeats[tokens:]]),
        np.concatenate([own, known.born[tokens:]]),
    )


def saw(source: Source, start: int, end: int) -> Marks:
    """What of a source's tokens at these positions was repeated where their KV was computed."""
    found: Marks = origin(source.sequence).repeats[source.place_of(start) : source.place_of(end)]
    return found


def born(source: Source, prompt: I32, start: int, end: int) -> Births:
    """In which earlier prompt of the same agent the KV of a source's tokens was computed, as the
    number of its sequence.
    """
    if not same_agent(source.sequence.tokens, prompt):
        return np.full(end - start, ELSEWHERE, np.int32)
    return origin(source.sequence).born[source.place_of(start) : source.place_of(end)]


def origin_by(prompt: I32, own: Marks, plan: Plan | None, local: Origin | None) -> Origin:
    """That of a prompt as it is served: what is loaded has the origin that it has in its source.

    Args:
        own: what repeats in the prompt itself.
        local: the origin of its local hit; None if that is exact.
    """
    found = Origin(own.copy(), np.full(len(own), OWN, np.int32))
    if local is not None:
        found.repeats[: len(local.born)] = local.repeats
        found.born[: len(local.born)] = local.born
    for span in plan.spans if plan else ():
        start, end = span.start, span.end
        found.repeats[start:end] = saw(span.source, start, end)
        found.born[start:end] = born(span.source, prompt, start, end)
    return found
