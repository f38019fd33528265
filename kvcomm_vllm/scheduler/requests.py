# SPDX-License-Identifier: Apache-2.0
"""How a new request is to be treated: by the configuration, its hints, and what kind of request it
is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.hints import HintError, Hints, parse_hints
from kvcomm_vllm.messages import Adapter
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.scheduler.planner import Limits
from kvcomm_vllm.scheduler.state import RequestState, namespace_of

if TYPE_CHECKING:
    from vllm.v1.request import Request


def new_state(
    request: Request,
    config: KVCommConfig,
    secret: bytes,
    engine_off: Reason | None = None,
    adapter: Adapter | None = None,
) -> RequestState:
    """Hints that cannot be used are counted and named in the report; what its sender meant may have
    been an exact answer, so that is what the request gets.

    Args:
        secret: makes tenants' keys of their cache salts.
        adapter: of the request.
    """
    hints, message, refused = Hints(), "", None
    try:
        hints = parse_hints(request.kv_transfer_params)
    except HintError as error:
        message, refused = str(error), Reason.BAD_HINTS
    asked = config.default_on or hints.mode is not None
    mode = hints.mode or (config.mode if asked else "off")
    apart = unshareable(request)
    off = engine_off or apart or refused
    if off is None and request.skip_reading_prefix_cache:
        off = Reason.PROMPT_LOGPROBS
    if off is None and mode == "off":
        off = Reason.MODE_OFF if asked else Reason.NOT_ASKED
    return RequestState.new(
        request,
        limits=None if off else limits_of(mode, hints, config),
        off=off,
        hints=hints,
        mode="off" if off else mode,
        shareable=apart is None,
        trusted=request.cache_salt is not None or config.report == "full",
        namespace=namespace_of(request, secret, adapter),
        adapter=adapter,
        message=message,
    )


def unshareable(request: Request) -> Reason | None:
    """Why this request can neither reuse nor be reused, if so: its KV does not follow from token
    ids alone, or these do not stay.
    """
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        return Reason.PROMPT_EMBEDS
    if request.mm_features:
        return Reason.MULTIMODAL
    if getattr(request, "resumable", False):
        return Reason.STREAMING_INPUT
    return None


def limits_of(mode: str, hints: Hints, config: KVCommConfig) -> Limits:
    seam = config.seam_tokens if hints.seam_tokens is None else hints.seam_tokens
    return Limits(
        seam_tokens=0 if mode in ("rotate", "paper") else seam,
        anchor_seam_tokens=config.anchor_seam_tokens if hints.seam_tokens is None else seam,
        min_span_tokens=config.min_span_tokens,
        min_reuse_tokens=config.min_reuse_tokens,
        min_reuse_share=config.min_reuse_share,
        private_price=config.private_price,
        max_unseen_share=config.max_unseen_share,
        max_refresh_share=0.0 if mode in ("rotate", "paper") else config.max_refresh_share,
    )
