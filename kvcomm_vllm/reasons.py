# SPDX-License-Identifier: Apache-2.0
"""Why something was not reused: one word each, the same in log, metric label, response and docs."""

from __future__ import annotations

import enum

from kvcomm_vllm.wording import shown


class Scope(enum.Enum):
    """What a reason speaks about."""

    ENGINE = "engine"
    REQUEST = "request"

    @property
    def title(self) -> str:
        """Heading of this scope in the docs."""
        return {
            Scope.ENGINE: "The whole engine: reuse is off, every request is served exactly",
            Scope.REQUEST: "One request",
        }[self]


class Reason(enum.StrEnum):
    """A reason; ``.value`` is the word, ``.explanation`` one sentence for users, ``.scope`` whom it
    concerns. Being a ``str`` it can be written to JSON and metrics as it is.
    """

    explanation: str
    scope: Scope

    def __new__(cls, word: str, scope: Scope, explanation: str) -> Reason:
        member = str.__new__(cls, word)
        member._value_ = word
        member.scope = scope
        member.explanation = explanation
        return member

    @classmethod
    def of(cls, word: str) -> Reason:
        """The reason whose word this is.

        Raises:
            ValueError: there is none, as of a word that another version of kvcomm has said.
        """
        for reason in cls:
            if reason.value == word:
                return reason
        raise ValueError(f"{shown(word)} is no reason that this version of kvcomm knows")

    SPARSE_ATTENTION = (
        "sparse_attention",
        Scope.ENGINE,
        "The model attends to tokens that an indexer picks (DeepSeek V3.2 and V4, GLM-5); the "
        "indexer has a cache of its own, which is not moved.",
    )
    MAMBA = (
        "mamba",
        Scope.ENGINE,
        "The model has layers with a running state (Mamba, linear attention) and no KV per token.",
    )
    ENCODER_DECODER = (
        "encoder_decoder",
        Scope.ENGINE,
        "vLLM runs no KV connector with encoder-decoder models.",
    )
    POOLING = (
        "pooling",
        Scope.ENGINE,
        "The model does not generate text (embedding, classification, reward).",
    )
    DIFFUSION = (
        "diffusion",
        Scope.ENGINE,
        "The model generates by diffusion, which rewrites KV that is already stored.",
    )
    ABSOLUTE_POSITIONS = (
        "absolute_positions",
        Scope.ENGINE,
        "Positions are part of the token embeddings, so KV cannot be moved.",
    )
    SLIDING_WINDOW_HYBRID = (
        "sliding_window_hybrid",
        Scope.ENGINE,
        "The hybrid KV cache manager, which drops pages outside the window, was forced on without "
        "hybrid_kv_cache, or has other groups than one of full attention and some with a window.",
    )
    SLIDING_WINDOW_ONLY = (
        "sliding_window_only",
        Scope.ENGINE,
        "All layers attend to a window only; vLLM drops pages behind it while a request runs.",
    )
    UNEVEN_HEADS = (
        "uneven_heads",
        Scope.ENGINE,
        "Layers have KV heads of different number or size, and the model is not Gemma 4, or shares "
        "KV among its layers, or tiers or other connectors are to copy its pages.",
    )
    KV_QUANTISED = (
        "kv_quantised",
        Scope.ENGINE,
        "The KV cache has a packed format (--kv-cache-dtype, or as its checkpoint asks for) that "
        "cannot be read back.",
    )
    KV_OFFLOADING = (
        "kv_offloading",
        Scope.ENGINE,
        "--kv-offloading-size installs another KV connector, which kvcomm's own tiers cannot stand "
        "in for (--kv-offloading-backend, or vLLM before 0.32); only one can be in use.",
    )
    OTHER_CONNECTOR = (
        "other_connector",
        Scope.ENGINE,
        "A MultiConnector has kvcomm beside a connector that could hand approximate KV to exact "
        "requests (it names KV by tokens, or sends it to another engine), or that is not known. "
        "Beside OffloadingConnector KV is reused.",
    )
    PREFIX_CACHING_OFF = (
        "prefix_caching_off",
        Scope.ENGINE,
        "Prefix caching is switched off; its pages are what reuse reads from.",
    )
    PIPELINE_PARALLEL = (
        "pipeline_parallel",
        Scope.ENGINE,
        "Layers are spread over pipeline stages, which the side forward cannot cross.",
    )
    CONTEXT_PARALLEL = (
        "context_parallel",
        Scope.ENGINE,
        "The tokens of a page are spread over ranks (context parallelism).",
    )
    EXPERTS_DATA_PARALLEL = (
        "experts_data_parallel",
        Scope.ENGINE,
        "A mixture of experts over data-parallel ranks, which must run every forward together.",
    )
    SPEC_DECODE = (
        "spec_decode",
        Scope.ENGINE,
        "Tokens are drafted in a way that is not known (Medusa, DFlash, a class of one's own, MTP "
        "of several modules). Beside the methods ngram, ngram_gpu and suffix, which look tokens "
        "up, KV is reused, and beside eagle, eagle3, mtp and draft_model, whose KV is moved with "
        "the model's.",
    )
    FLASHINFER_WINDOWS = (
        "flashinfer_windows",
        Scope.ENGINE,
        "FlashInfer's kernels need windowed layers in a KV cache group of their own, which there "
        "is not beside a connector; another --attention-backend can reuse.",
    )
    EXPANDABLE_SEGMENTS = (
        "expandable_segments",
        Scope.ENGINE,
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True is set, beside which vLLM takes no KV "
        "connector; without it, or with --enable-cumem-allocator, KV is reused.",
    )
    UNKNOWN_ADAPTERS = (
        "unknown_adapters",
        Scope.ENGINE,
        "LoRA is enabled, and how vLLM makes adapters active is not known (before 0.32), or ranks "
        "or image towers have adapters of their own (expert parallelism, "
        "enable_tower_connector_lora).",
    )
    UNKNOWN_BACKEND = (
        "unknown_backend",
        Scope.ENGINE,
        "The attention backend of a layer is not known; its pages cannot be read safely.",
    )
    UNKNOWN_LAYOUT = (
        "unknown_layout",
        Scope.ENGINE,
        "The KV pages have a shape, strides or block size that is not known.",
    )
    ROPE_UNSUPPORTED = (
        "rope_unsupported",
        Scope.ENGINE,
        "The rotary embedding of a layer is of a kind that cannot be undone and redone, or, with "
        "M-RoPE, the model puts text elsewhere than the numbers of its tokens say.",
    )
    FOREIGN_WORKER = (
        "foreign_worker",
        Scope.ENGINE,
        "Another engine in this process owns vLLM's one KV connector; only the first can reuse.",
    )
    SELF_CHECK_FAILED = (
        "self_check_failed",
        Scope.ENGINE,
        "The check at start read back something else than it had written, rotated or corrected.",
    )

    DISABLED_AT_START = (
        "disabled_at_start",
        Scope.REQUEST,
        "The workers have not yet said whether they can reuse.",
    )
    MODE_OFF = (
        "mode_off",
        Scope.REQUEST,
        "The configuration or the request's hints say mode off.",
    )
    NOT_ASKED = (
        "not_asked",
        Scope.REQUEST,
        "default_on is false and the request's hints name no mode.",
    )
    BAD_HINTS = (
        "bad_hints",
        Scope.REQUEST,
        "The request's kv_transfer_params.kvcomm is malformed. Over HTTP it is refused; offline "
        "the request is served exactly.",
    )
    NO_MATCH = (
        "no_match",
        Scope.REQUEST,
        "No earlier request that may be used holds text of this prompt beyond its cached prefix "
        "(min_span_tokens or more; the hint spans and reuse_approximate narrow that down).",
    )
    TOO_SHORT = (
        "too_short",
        Scope.REQUEST,
        "Each shared text is shorter than its seam and min_span_tokens together.",
    )
    LOADED_ELSEWHERE = (
        "loaded_elsewhere",
        Scope.REQUEST,
        "Another connector, which is listed before kvcomm or for which kvcomm left the request, "
        "loads its beginning; vLLM lets only one load for a request.",
    )
    SOURCE_EVICTED = (
        "source_evicted",
        Scope.REQUEST,
        "The pages that held the text were given to other requests.",
    )
    TOO_LITTLE = (
        "too_little",
        Scope.REQUEST,
        "Too few tokens (min_reuse_tokens) or too small a share (min_reuse_share) to be worth it.",
    )
    COSTS_PREFIX = (
        "costs_prefix",
        Scope.REQUEST,
        "Little would be saved beside the text behind it, which would become approximate and "
        "private (private_price): it is computed, and its prefix stays for all.",
    )
    PROMPT_LOGPROBS = (
        "prompt_logprobs",
        Scope.REQUEST,
        "The request asks for log-probabilities of its prompt, so all of it is computed.",
    )
    PROMPT_EMBEDS = (
        "prompt_embeds",
        Scope.REQUEST,
        "The prompt was given as embeddings; there are no token ids to match.",
    )
    MULTIMODAL = (
        "multimodal",
        Scope.REQUEST,
        "The prompt holds images, audio or video. None of it is reused, or a source: with M-RoPE "
        "the text beside them has other positions. Text alone is reused on such models.",
    )
    STREAMING_INPUT = (
        "streaming_input",
        Scope.REQUEST,
        "The prompt arrives in pieces, and vLLM takes back tokens between them.",
    )
    ADAPTER_REPLACED = (
        "adapter_replaced",
        Scope.REQUEST,
        "The weights of the request's LoRA adapter were replaced while it waited.",
    )
    ADAPTER_HOLES = (
        "adapter_holes",
        Scope.REQUEST,
        "More is to be computed between shared texts than one step takes (max_hole_tokens, or "
        "vLLM's token budget). Other requests wait for it in pieces; one with a LoRA adapter "
        "cannot, since meanwhile its adapter may not be in use.",
    )
    WINDOW_HOLES = (
        "window_holes",
        Scope.REQUEST,
        "More is to be computed between shared texts than one step takes (max_hole_tokens, or "
        "vLLM's token budget), which layers with windows in pages of their own (hybrid_kv_cache) "
        "cannot wait for in pieces.",
    )
    LEARNING = (
        "learning",
        Scope.REQUEST,
        "Served exactly so that its placeholders learn from it (hint learn, bootstrap_requests, or "
        "a message that the gate of mode paper did not let pass).",
    )
    NO_PAPER_MEMORY = (
        "no_paper_memory",
        Scope.REQUEST,
        "Mode paper has no place for anchors: paper.memory_mb is too small, or there are several "
        "tensor- or data-parallel ranks.",
    )
    NO_ROOM = (
        "no_room",
        Scope.REQUEST,
        "There were no free pages to load into.",
    )
    OUT_OF_CONTEXT = (
        "out_of_context",
        Scope.REQUEST,
        "The KV of the shared text has seen too little of what it would stand behind "
        "(max_unseen_share) to be of use.",
    )
    FIDELITY = (
        "fidelity",
        Scope.REQUEST,
        "Audits found what its placeholders reuse too far from exact (fidelity_budget), so nothing "
        "that is worth it is left; it is tried again now and then.",
    )
    LOAD_FAILED = (
        "load_failed",
        Scope.REQUEST,
        "A worker could neither load the KV nor compute the tokens in the same step; vLLM computed "
        "them or, where it cannot (asynchronous scheduling, model runner V2), ended the request.",
    )
    LOAD_REPAIRED = (
        "load_repaired",
        Scope.REQUEST,
        "A worker could not load the KV; the tokens were computed in the same step instead.",
    )
