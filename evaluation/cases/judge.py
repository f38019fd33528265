# SPDX-License-Identifier: Apache-2.0
"""What a reply is judged by: status, reuse, distance to dense, and the case's own expectations.

Expectations (``expect``): ``status``, an HTTP status other than 200; ``shared``, tokens of the
prompt that lie in earlier requests' pages; ``kl``, compare with dense; ``report``, the reply must
carry one; ``off``, the same request must also be served without reuse where it asks for that;
``valid_json``, ``choice``, the text obeys its constraint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvcomm_vllm.evaluation.cases.client import Reply

REUSED_SHARE = 0.8
CLEAR = math.log(2)


def divergence(dense: Mapping[str, float], other: Mapping[str, float]) -> float:
    """KL(dense || other) in nats over the candidates that both name, all others taken as one.

    Taking outcomes together can only lower it, so this is a lower bound of the true one.
    """
    common = dense.keys() & other.keys()
    pairs = [(dense[token], other[token]) for token in common]
    rests = [1 - sum(math.exp(log) for log in logs) for logs in zip(*pairs, strict=True)]
    if len(rests) == 2:
        pairs.append((math.log(max(rests[0], 1e-9)), math.log(max(rests[1], 1e-9))))
    return max(0.0, sum(math.exp(p) * (p - q) for p, q in pairs))


@dataclass(frozen=True)
class Verdict:
    """One request as it was served. Counts are the report's; None = it had no report.

    Args:
        kl: of the first token, in nats; ``same_top`` whether the likeliest one is dense's,
            ``clear`` whether that is twice as likely as the next.
        faults: what was expected and does not hold.
    """

    case: str
    number: int
    status: int
    seconds: float
    prompt: int | None = None
    local: int | None = None
    reused: int | None = None
    computed: int | None = None
    from_approximate: int | None = None
    declined: str = ""
    shared: int | None = None
    kl: float | None = None
    same_top: bool | None = None
    clear: bool | None = None
    faults: tuple[str, ...] = ()


def judge(
    case: str,
    number: int,
    expect: Mapping[str, Any],
    reply: Reply,
    dense: Reply | None,
    off: Reply | None,
) -> Verdict:
    """
    Args:
        dense: the same request served exactly, by itself.
        off: the same request with mode off beside the others, where it is expected to be exact.
    """
    report = reply.report or {}
    counts = {name: report.get(name) for name in ("local", "reused", "computed")}
    kl = same = clear = None
    if reply.top and dense is not None and dense.top:
        kl = divergence(dense.top, reply.top)
        first, second = sorted(dense.top.values(), reverse=True)[:2]
        clear = first - second >= CLEAR
        same = max(reply.top, key=reply.top.__getitem__) == max(
            dense.top, key=dense.top.__getitem__
        )
    return Verdict(
        case=case,
        number=number,
        status=reply.status,
        seconds=round(reply.seconds, 2),
        prompt=report.get("prompt_tokens"),
        **counts,
        from_approximate=report.get("from_approximate"),
        declined=" ".join(report.get("declined") or {}),
        shared=expect.get("shared"),
        kl=kl,
        same_top=same,
        clear=clear,
        faults=tuple(_faults(expect, reply, off)),
    )


def _faults(expect: Mapping[str, Any], reply: Reply, off: Reply | None) -> list[str]:
    wanted = expect.get("status", 200)
    if reply.status != wanted:
        return [f"status {reply.status}, not {wanted}"]
    found = []
    report = reply.report or {}
    if expect.get("report") and not report:
        found.append("no report")
    if report and expect.get("shared"):
        kept = report["local"] + report["reused"]
        if kept < REUSED_SHARE * expect["shared"]:
            found.append(f"{kept} of {expect['shared']} shared tokens")
    if expect.get("valid_json") and not _is_json(reply.text):
        found.append("not JSON")
    if off is not None and (off.report or {}).get("reused"):
        found.append("reused although off")
    return found


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
