# SPDX-License-Identifier: Apache-2.0
"""Counters: what happens to prompt tokens and requests, on ``/metrics`` and in vLLM's periodic log
line.

A reused token counts when every worker has confirmed its load, never when it was merely planned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvcomm_vllm.reasons import Reason

if TYPE_CHECKING:
    from kvcomm_vllm.messages import Divergence
    from kvcomm_vllm.scheduler.state import RequestState


@dataclass(frozen=True)
class Metric:
    """One Prometheus counter (exported with the suffix ``_total``) and its label beside vLLM's
    own.
    """

    name: str
    label: str
    documentation: str


METRICS = {
    "tokens": Metric(
        "vllm:kvcomm_tokens",
        "treatment",
        "Prompt tokens of finished requests: local (vLLM's prefix cache), reused, computed; "
        "corrected is the part of reused that anchors corrected, from_approximate the part whose "
        "source was itself approximate, local_approximate the part of local that is (own earlier "
        "turns).",
    ),
    "requests": Metric(
        "vllm:kvcomm_requests",
        "outcome",
        "Finished requests: reused, declined, off; failed is a load that failed (its tokens were "
        "computed instead), aborted a request that ended (its client hung up) before it was served "
        "with or without reuse.",
    ),
    "reasons": Metric("vllm:kvcomm_reasons", "reason", "Why finished requests reused nothing."),
    "asked_again": Metric(
        "vllm:kvcomm_asked_again",
        "why",
        "How often vLLM was told to ask about a request again, a step later: loading, adopted, "
        "in_flight, probe, step_full, returning, not_written.",
    ),
    "seconds": Metric(
        "vllm:kvcomm_seconds",
        "phase",
        "Time spent planning (scheduler), loading, in side forwards, learning, and storing and "
        "returning pages of tiers (beside the rest); where kernels run asynchronously (CUDA), the "
        "time until they are launched.",
    ),
    "lessons": Metric(
        "vllm:kvcomm_lessons",
        "outcome",
        "Requests that wait for the engine to be idle: queued, then learned (anchors were learned "
        "from them), healed (if not), audited (if only compared), dropped (pages gone, too many) "
        "or failed; what is queued and none of these still waits.",
    ),
    "healed": Metric(
        "vllm:kvcomm_healed_tokens",
        "how",
        "Tokens served approximately whose true KV is in vLLM's prefix cache now: computed while "
        "idle, or found there, as another request had it.",
    ),
    "placeholders": Metric(
        "vllm:kvcomm_placeholders",
        "event",
        "Placeholders that were gained (their first anchor was learned) and lost (evicted, reset); "
        "the difference is what is held.",
    ),
    "taught": Metric(
        "vllm:kvcomm_taught",
        "source",
        "Anchors learned, by whether the KV they start from was exact or approximate itself.",
    ),
    "audit_requests": Metric(
        "vllm:kvcomm_audit_requests",
        "agent",
        "Requests served approximately whose first token's probabilities were computed again over "
        "exact KV, by their hint agent; those of more agents than are counted apart are 'other'.",
    ),
    "audit_same_top": Metric(
        "vllm:kvcomm_audit_same_top",
        "agent",
        "Those of which the likeliest first token was the same.",
    ),
    "fidelity": Metric(
        "vllm:kvcomm_fidelity_placeholders",
        "event",
        "Placeholders that audits found beyond fidelity_budget: longer_seams_gained, computed_lost "
        "and so on; the difference of both is how many are treated so.",
    ),
    "trace": Metric(
        "vllm:kvcomm_trace_records",
        "outcome",
        "Records of finished requests for trace.file: written, or dropped as the disk was full or "
        "too slow; counted with the next request.",
    ),
    "anchors": Metric("vllm:kvcomm_anchors", "event", "Anchors gained and lost, likewise."),
    "tier_pages": Metric(
        "vllm:kvcomm_tier_pages",
        "event",
        "Pages of requests that have ended: stored in the host pool, lost (not stored, as a copy "
        "failed or was given up), returned to the KV cache for a request that reads them.",
    ),
    "tier_bytes": Metric(
        "vllm:kvcomm_tier_bytes",
        "event",
        "Bytes copied between the KV cache and the host pool, by each rank: stored, returned.",
    ),
    "tier_queries": Metric(
        "vllm:kvcomm_tier_queries",
        "tier",
        "Pages that requests looked for in a tier: host (the pool), disk, shared, or what vLLM "
        "calls one of its own.",
    ),
    "tier_hits": Metric("vllm:kvcomm_tier_hits", "tier", "Those of them that lay there."),
    "tier_read_bytes": Metric(
        "vllm:kvcomm_tier_read_bytes", "tier", "Bytes read from a tier into the host pool."
    ),
    "tier_read_seconds": Metric(
        "vllm:kvcomm_tier_read_seconds", "tier", "Time that took, in threads of its own."
    ),
    "tier_written_bytes": Metric(
        "vllm:kvcomm_tier_written_bytes", "tier", "Bytes given from the host pool to a tier."
    ),
    "tier_written_seconds": Metric(
        "vllm:kvcomm_tier_written_seconds", "tier", "Time that took, in threads of its own."
    ),
    "tier_failures": Metric(
        "vllm:kvcomm_tier_failures",
        "tier",
        "Transfers between the host pool and a tier of which some pages were not there, not whole, "
        "or not taken.",
    ),
    "tier_dropped": Metric(
        "vllm:kvcomm_tier_dropped",
        "tier",
        "Pages that were removed from a tier, as others needed their room.",
    ),
    "runs": Metric("vllm:kvcomm_runs", "phase", "How often each phase ran."),
}

# Each observation is reported as it is.
HISTOGRAMS = {
    "audit_kl": Metric(
        "vllm:kvcomm_audit_kl",
        "agent",
        "KL(exact || served) of audited requests' first token, in nats.",
    ),
}
KL_BUCKETS = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 3.0)
MAX_AGENTS = 32  # counted apart; a client can make up as many names as it likes
OTHER_AGENTS = "other"


class KVCommStats(KVConnectorStats):
    """Counts since the last report. ``data`` maps ``"metric/label value"`` to a number, or to the
    observations of a histogram.
    """

    data: dict[str, Any]
    _held: tuple[int, int] = (0, 0)
    _agents: frozenset[str] = frozenset()

    def _add(self, metric: str, label: str, amount: float = 1) -> None:
        key = f"{metric}/{label}"
        self.data[key] = self.data.get(key, 0) + amount

    def count_audit(self, agent: str | None, divergence: Divergence) -> None:
        """A request was compared with what exact KV would have given; no agent's is ''."""
        name = agent or ""
        if len(self._agents) < MAX_AGENTS:
            self._agents |= {name}
        label = name if name in self._agents else OTHER_AGENTS
        self._add("audit_requests", label)
        if divergence.same_top:
            self._add("audit_same_top", label)
        self.data.setdefault(f"audit_kl/{label}", []).append(divergence.kl)

    def count_reason(self, reason: str) -> None:
        self._add("reasons", reason)

    def count_asked_again(self, why: str) -> None:
        self._add("asked_again", why)

    def count_lesson(self, outcome: str) -> None:
        self._add("lessons", outcome)

    def count_healed(self, computed: int, found: int) -> None:
        for how, tokens in (("computed", computed), ("found", found)):
            if tokens:
                self._add("healed", how, tokens)

    def count_taught(self, approximate: bool) -> None:
        self._add("taught", "approximate" if approximate else "exact")

    def count_fidelity(self, before: str, now: str) -> None:
        """A placeholder is treated in another way."""
        self._add("fidelity", f"{before}_lost")
        self._add("fidelity", f"{now}_gained")

    def count_held(self, placeholders: int, anchors: int) -> None:
        """What is held now; counted is what has changed since the last call."""
        for metric, before, now in zip(
            ("placeholders", "anchors"), self._held, (placeholders, anchors), strict=True
        ):
            if now != before:
                self._add(metric, "gained" if now > before else "lost", abs(now - before))
        self._held = placeholders, anchors

    def count_trace(self, written: int, dropped: int) -> None:
        for outcome, records in (("written", written), ("dropped", dropped)):
            if records:
                self._add("trace", outcome, records)

    def count_tier_pages(self, event: str, pages: int) -> None:
        if pages:
            self._add("tier_pages", event, pages)

    def count_tier(self, metric: str, tier: str, amount: float) -> None:
        """Args:
        metric: ``tier_queries`` and its like.
        """
        if amount:
            self._add(metric, tier, amount)

    def count_transfer(self, stored: bool, size: int, seconds: float) -> None:
        """A rank has copied pages."""
        self._add("tier_bytes", "stored" if stored else "returned", size)
        self.add_seconds("storing" if stored else "returning", seconds)

    def add_seconds(self, phase: str, seconds: float) -> None:
        self._add("seconds", phase, seconds)
        self._add("runs", phase)

    def count_request(self, state: RequestState) -> None:
        if state.outcome != "aborted":
            for label, tokens in {**state.counts(), **state.parts()}.items():
                if tokens:
                    self._add("tokens", label, tokens)
        for reason in state.declined:
            self.count_reason(reason)
        self._add("requests", state.outcome)

    def take(self) -> KVCommStats | None:
        """What has been counted since the last call, or None."""
        if not self.data:
            return None
        taken = KVCommStats(data=self.data)
        self.data = {}
        return taken

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVCommStats:
        total = dict(self.data)
        for key, value in other.data.items():
            total[key] = total[key] + value if key in total else value
        return KVCommStats(data=total)

    def reduce(self) -> dict[str, int | float]:
        """One line for vLLM's log: tokens by treatment and the time planning and loading took."""
        line: dict[str, int | float] = {}
        for key, value in sorted(self.data.items()):
            metric, label = key.split("/", 1)
            if metric == "tokens":
                line[f"kvcomm {label} tokens"] = int(value)
            elif metric == "seconds":
                line[f"kvcomm {label} ms"] = round(1e3 * value, 1)
        return line

    def is_empty(self) -> bool:
        return not self.data


class KVCommPromMetrics(KVConnectorPromMetrics):
    """Registers ``METRICS`` and adds the engines' counts to them.

    Attributes:
        here: those of this process, the API server's, if it has any.
    """

    here: ClassVar[KVCommPromMetrics | None] = None

    def __init__(
        self, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine: Any
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine)
        KVCommPromMetrics.here = self
        self._counters = {
            key: self._counter_cls(
                name=metric.name,
                documentation=metric.documentation,
                labelnames=[*labelnames, metric.label],
            )
            for key, metric in METRICS.items()
        }
        self._histograms = {
            key: self._histogram_cls(
                name=metric.name,
                documentation=metric.documentation,
                labelnames=[*labelnames, metric.label],
                buckets=KL_BUCKETS,
            )
            for key, metric in HISTOGRAMS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for key, value in transfer_stats_data.items():
            metric, label = key.split("/", 1)
            if metric in HISTOGRAMS:
                for one in value:
                    self._histograms[metric].labels(*labels, label).observe(one)
            else:
                self._counters[metric].labels(*labels, label).inc(value)


def count_here(reason: Reason) -> None:
    """Count what the API server itself decides, before there is a request: under the first
    engine's name.
    """
    here = KVCommPromMetrics.here
    if here is not None:
        here.observe({f"reasons/{reason.value}": 1}, min(here.per_engine_labelvalues))
