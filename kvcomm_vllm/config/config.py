# SPDX-License-Identifier: Apache-2.0
"""The configuration: every key once, with its default, its meaning and what it allows.

Imports neither torch nor vLLM, so that both halves and the command line can use it at no cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from operator import attrgetter
from typing import Any

from kvcomm_vllm.config.estimator import EstimatorConfig
from kvcomm_vllm.config.key import MOST, Key, key
from kvcomm_vllm.config.mapping import ConfigError, Reader
from kvcomm_vllm.config.moved import MOVED, moved_warning
from kvcomm_vllm.config.paper import PaperConfig
from kvcomm_vllm.config.secondary import SecondaryTiers
from kvcomm_vllm.config.tiers import TiersConfig
from kvcomm_vllm.config.trace import TraceConfig

REPORTS = ("auto", "coarse", "full", "off")
MODES = ("off", "rotate", "seam", "anchor", "paper")


@dataclass(frozen=True)
class KVCommConfig:
    """All settings of the plugin. Build it with :meth:`from_mapping`, which checks every value."""

    mode: str = key(
        "anchor",
        "How other agents' KV is reused: off = not at all, rotate = moved to its new position as "
        "it is, seam = moved, with each span's first tokens and the text between spans computed, "
        "anchor = seam, and corrected with learned deviations wherever a placeholder (the place in "
        "a prompt where text arrives) is warm, paper = the KVCOMM paper's method, for comparison "
        "(needs paper.memory_mb).",
        choices=MODES,
    )
    default_on: bool = key(
        True,
        "Serve every request with reuse; false = only requests that name a mode in their hints.",
    )
    seam_tokens: int = key(
        16,
        "First tokens of each reused span that are computed anyway (modes seam and anchor).",
        low=0,
        high=4096,
    )
    anchor_seam_tokens: int = key(
        8,
        "The same for spans that are corrected; never more than seam_tokens (mode anchor).",
        low=0,
        high=4096,
    )
    min_anchors: int = key(
        2,
        "Anchors a placeholder needs before its spans are corrected; the second one is the first "
        "test.",
        low=2,
        high=MOST,
    )
    max_anchors: int = key(
        50,
        "Anchors after which a placeholder is not taught any more.",
        low=2,
        high=MOST,
    )
    max_anchor_error: float = key(
        0.8,
        "A placeholder is corrected only while its correction, tested on each new anchor before "
        "learning it, leaves at most this share of the deviation; otherwise it is served as in "
        "mode seam.",
        low=0.0,
        high=1.0,
    )
    bootstrap_requests: int = key(
        0,
        "Requests per new placeholder that are served exactly, so that it learns from them at no "
        "cost.",
        low=0,
        high=MOST,
        when_zero="learn by audits alone",
    )
    audits: bool = key(
        True,
        "Recompute served prompts exactly while the engine is idle, to learn from them and to "
        "measure how far answers were from exact. Without, nothing is measured, and placeholders "
        "learn from requests alone that are served exactly (bootstrap_requests, hint learn); what "
        "heal does is another matter.",
    )
    heal: str = key(
        "idle",
        "What becomes of requests that were served approximately: idle = their exact KV is "
        "computed while the engine is idle, and put into vLLM's prefix cache as if they had been "
        "served exactly, for whoever goes on from them or quotes them; off = they stay as they "
        "are.",
        choices=("idle", "off"),
    )
    fidelity_budget: float = key(
        0.0,
        "How far from exact answers may be: the most nats that the KL of the first token may have "
        "in the mean of a placeholder's audited requests (say 0.02). Beyond, it gets longer seams, "
        "then its text is computed, until audits of requests that try it again find it better "
        "(modes rotate, seam and anchor).",
        low=0.0,
        high=100.0,
        when_zero="no limit",
    )
    audit_idle_seconds: float = key(
        5.0,
        "How long the engine must have been idle before it learns or heals; any request ends that.",
        low=0.0,
        high=3600.0,
    )
    audit_tokens: int = key(
        64,
        "Tokens recomputed in one piece; the longest a request that arrives then has to wait for.",
        low=1,
        high=MOST,
    )
    audit_share: float = key(
        1.0,
        "Largest share of the idle time behind audit_idle_seconds that is spent so.",
        low=0.001,
        high=1.0,
    )
    learn_from_approximate: bool = key(
        True,
        "Whether text whose source KV is itself approximate teaches its placeholder.",
    )
    anchor_memory_mb: int = key(
        1024,
        "Memory reserved at start for what placeholders have learned, beside vLLM's own (per "
        "rank); less where 1024 MiB would not stay free on a GPU.",
        low=0,
        high=MOST,
        when_zero="no anchors: mode anchor is mode seam",
    )
    max_placeholders: int = key(
        10_000,
        "Most placeholders remembered, with or without anchors; the least recently used go first.",
        low=1,
        high=MOST,
    )
    min_span_tokens: int = key(
        32,
        "Fewest tokens a span must save behind its seam; shorter shared text is computed.",
        low=1,
        high=MOST,
    )
    min_reuse_tokens: int = key(
        32,
        "Fewest tokens a plan must take from other requests to be carried out.",
        low=1,
        high=MOST,
    )
    min_reuse_share: float = key(
        0.3,
        "Smallest share of reused tokens among reused and computed-in-holes ones that is worth it.",
        low=0.0,
        high=1.0,
    )
    private_price: float = key(
        0.25,
        "Reused tokens asked for each token that is computed behind the first of them: it becomes "
        "approximate, and private to its request.",
        low=0.0,
        high=100.0,
    )
    max_unseen_share: float = key(
        0.7,
        "Text is reused only where its KV has seen enough of what stands before it: at most this "
        "share of that, a mean over its tokens, may be new to it.",
        low=0.0,
        high=1.0,
    )
    max_refresh_share: float = key(
        0.5,
        "Reused tokens that repeated something where their KV was computed and do not here, or "
        "the other way around, are computed again; where an agent's own prompt was edited, also "
        "the first tokens behind that, and as many of what it has copied for the longest time. "
        "Text of which more than such a share is due is computed as a whole (modes seam and "
        "anchor).",
        low=0.0,
        high=1.0,
        when_zero="none is computed again",
    )
    reuse_approximate: bool = key(
        True,
        "Whether KV that is itself approximate (computed after reused text) may be a source.",
    )
    keep_last_page: bool = key(
        True,
        "Keep a request's last, partly filled page until it is evicted like any other; vLLM drops "
        "it, and with it up to a page of every message.",
    )
    window_tokens: int = key(
        16,
        "Tokens hashed per index entry; shared text shorter than twice this may be overlooked.",
        low=4,
        high=256,
    )
    max_sequences: int = key(
        10_000,
        "Most earlier requests the index remembers; the oldest go first.",
        low=1,
        high=MOST,
    )
    max_hole_tokens: int = key(
        0,
        "Most tokens of seams and gaps computed in one step, on top of what vLLM computes in it; "
        "plans with more are spread over several steps, within vLLM's own token budget.",
        low=0,
        high=MOST,
        when_zero="a quarter of the engine's max_num_batched_tokens, 2048 at most; all of it for a "
        "request that is alone",
    )
    share_inflight_seconds: float = key(
        5.0,
        "Longest time a request waits for another one that is prefilling the same text.",
        low=0.0,
        high=600.0,
        when_zero="never wait",
    )
    hybrid_kv_cache: bool = key(
        False,
        "For models whose layers attend to a window in part: leave vLLM's hybrid KV cache manager "
        "on, which drops what lies behind the window; without, such layers keep all KV, and take "
        "as much of it as the others. Nothing is learned then (mode anchor is mode seam), nothing "
        "is healed, and text is computed where the KV of its window is gone. Has no effect beside "
        "other connectors, tiers, LoRA adapters, speculative decoding and KV events, with KV heads "
        "of several sizes, or with layers that see a chunk of the text (Llama 4).",
    )
    report: str = key(
        "auto",
        "What a response's kv_transfer_params.kvcomm tells of shared text: off = nothing, coarse = "
        "tokens by treatment in whole pages, full = all of it, and matches may end at any token, "
        "auto = full for requests with a cache_salt, coarse without (docs/security.md).",
        choices=REPORTS,
    )
    self_check: bool = key(
        True,
        "Check at start that KV is read, written, rotated and corrected as it should be; reuse is "
        "off if it is not.",
    )
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    paper: PaperConfig = field(default_factory=PaperConfig)
    tiers: TiersConfig = field(default_factory=TiersConfig)
    trace: TraceConfig = field(default_factory=TraceConfig)
    # names of the previous version that keys were given by; no key itself
    moved: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, object], origin: str) -> KVCommConfig:
        """The configuration that ``mapping`` describes; keys it leaves out keep their defaults.

        Args:
            mapping: key -> value, as read from YAML or JSON; a block's value is such a mapping.
            origin: where it came from (a file name, a flag), for error messages.

        Raises:
            ConfigError: unknown keys, wrong types, values out of range; all of them at once.
        """
        config: KVCommConfig
        config, moved = _reader().read(mapping, origin)
        problems = [*config.tiers.problems()]
        if config.mode == "paper" and not config.paper.memory_mb:
            problems.append("paper.memory_mb: mode paper needs a memory for its anchors, e.g. 1024")
        if problems:
            raise ConfigError.of(problems, origin)
        return replace(config, moved=moved)

    def to_mapping(self, *, as_given: bool = False) -> dict[str, Any]:
        """All keys with their values; can be written as JSON and read by :meth:`from_mapping`.

        Args:
            as_given: keys that were given by an old name keep it, for who reads it to warn of.
        """
        mapping = asdict(self)
        # plain values, with passwords
        mapping["tiers"]["shared"] = self.tiers.shared[:]
        mapping["tiers"]["secondary_tiers"] = self.tiers.secondary_tiers.plain()
        del mapping["moved"]
        for old in self.moved if as_given else ():
            first, _, rest = MOVED[old].partition(".")
            mapping[old] = mapping[first].pop(rest) if rest else mapping.pop(first)
        return mapping

    def values(self) -> dict[str, bool | int | float | str | SecondaryTiers]:
        """Every key's value, by the names of :func:`keys`."""
        return {name: attrgetter(name)(self) for name in keys()}

    def describe(self) -> str:
        """The effective configuration in one line; a star marks what differs from the default."""
        return ", ".join(
            f"{name}={_plain(value)}{'' if value == keys()[name].default else '*'}"
            for name, value in self.values().items()
        )

    def warnings(self) -> tuple[str, ...]:
        """Old names of keys, and combinations that are allowed but defeat themselves: a sentence
        each.
        """
        found = [moved_warning(self.moved)] if self.moved else []
        sure = 2 * self.window_tokens - 1
        if self.min_span_tokens < sure:
            found.append(
                f"min_span_tokens={self.min_span_tokens}: with window_tokens="
                f"{self.window_tokens} only shared text of {sure} tokens or more is always found"
            )
        if self.fidelity_budget and not self.audits:
            found.append("fidelity_budget has no effect without audits")
        return tuple(found)


@cache
def _reader() -> Reader:
    return Reader(KVCommConfig, MOVED)


def keys() -> dict[str, Key]:
    """Every configuration key by name, in the order of declaration: ``mode``,
    ``estimator.ridge``.
    """
    return _reader().keys


def blocks() -> dict[str, type]:
    """What holds keys of its own, by name."""
    return _reader().blocks


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
