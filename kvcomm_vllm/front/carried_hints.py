# SPDX-License-Identifier: Apache-2.0
"""Hints go with whoever is served: from the body of an HTTP request, or a ``with`` block, to every
engine request that vLLM makes for it.

vLLM hands ``kv_transfer_params`` on where it makes one engine request of one API request. Where it
makes requests of its own (the beams of a beam search, scoring, decisions) they are lost, and with
them a client's word that it wants exact answers. A context variable is not lost: tasks inherit it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from vllm.sampling_params import SamplingParams

from kvcomm_vllm.hints import FIELD, parse_hints

PARAMS = "kv_transfer_params"


@dataclass(slots=True)
class Carried:
    """The hints of one API request, given as soon as its body has been read; None: it has none."""

    given: Mapping[str, Any] | None = None


_CARRIED: ContextVar[Carried | None] = ContextVar("kvcomm_hints", default=None)


@contextmanager
def carry() -> Iterator[Carried]:
    """What is put into the result goes with every engine request made inside, tasks included."""
    carried = Carried()
    token = _CARRIED.set(carried)
    try:
        yield carried
    finally:
        _CARRIED.reset(token)


@contextmanager
def hints(**given: Any) -> Iterator[None]:
    """Hints for all requests made inside that have none of their own, as
    ``with hints(mode="off"): llm.beam_search(...)``.

    Raises:
        HintError: see :func:`kvcomm_vllm.hints.parse_hints`.
    """
    parse_hints({FIELD: given})
    with carry() as carried:
        carried.given = given
        yield


def with_carried_hints(params: Any) -> Any:
    """``params`` of an engine request, with the carried hints if it has none of its own.

    The object given is never changed: callers share one among their requests. Pooling parameters,
    which hold no hints, come back as they are.
    """
    carried = _CARRIED.get()
    if carried is None or not carried.given or not isinstance(params, SamplingParams):
        return params
    extra = params.extra_args or {}
    transfer = extra.get(PARAMS) or {}
    if FIELD in transfer:
        return params
    params = copy.copy(params)
    params.extra_args = {**extra, PARAMS: {**transfer, FIELD: dict(carried.given)}}
    return params
