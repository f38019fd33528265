# SPDX-License-Identifier: Apache-2.0
"""Texts generated from the code: the commented YAML file and the tables of keys and reasons.

``python -m kvcomm_vllm.config.docs`` writes them; a test fails when they differ from the code.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from kvcomm_vllm.config.config import blocks, keys
from kvcomm_vllm.reasons import Reason

_YAML_HEADER = """\
# SPDX-License-Identifier: Apache-2.0
# Every key of kvcomm_vllm with its default. A file needs only the keys it changes. Use it with
#   vllm serve MODEL --kv-connector kvcomm --kvcomm-config FILE.yaml
# Written by `python -m kvcomm_vllm.config.docs`; a test fails when it differs from the code.
"""

_TABLE_HEADER = """\
# Configuration

Keys of the YAML file given with `--kvcomm-config`, and of `kv_connector_extra_config` in
`--kv-transfer-config`. An unknown key, a wrong type or a value out of range is refused at start.
Generated from `kvcomm_vllm/config/`.

A key with a point, as `paper.gamma`, stands below the first part of its name:

```yaml
mode: paper
paper:
  memory_mb: 2048
  gamma: 0.5
```

Most people need four: `mode`, `seam_tokens`, `anchor_memory_mb` and `report`.
"""
_HEAD = "| Key | Default | Allowed | Meaning |\n|---|---|---|---|\n"

# Every key stands in one group; a test sees to that.
GROUPS = {
    "What most people need": ("mode", "seam_tokens", "anchor_memory_mb", "report"),
    "Which requests and engines": ("default_on", "self_check", "hybrid_kv_cache"),
    "What is worth reusing": (
        *("min_span_tokens", "min_reuse_tokens", "min_reuse_share", "private_price"),
        *("max_unseen_share", "max_refresh_share", "reuse_approximate", "max_hole_tokens"),
        "share_inflight_seconds",
    ),
    "What is remembered": ("window_tokens", "max_sequences", "keep_last_page"),
    "Beyond the KV cache": (
        *("tiers.host_gb", "tiers.disk_path", "tiers.disk_gb", "tiers.shared"),
        *("tiers.shared_ttl_seconds", "tiers.secondary_tiers", "tiers.wait_seconds"),
    ),
    "What is written down": ("trace.file", "trace.max_mb", "trace.tokens"),
    "Anchors: when they are learned and used": (
        *("anchor_seam_tokens", "min_anchors", "max_anchors", "max_anchor_error"),
        *("bootstrap_requests", "learn_from_approximate", "max_placeholders"),
    ),
    "What is done while the engine is idle": (
        *("audits", "heal", "fidelity_budget", "audit_idle_seconds", "audit_tokens", "audit_share"),
    ),
    "Constants of the estimator (leave them alone)": (
        *("estimator.head_tokens", "estimator.mean_prior", "estimator.ridge"),
        *("estimator.ridge_tokens", "estimator.map_inputs", "estimator.map_rank"),
    ),
    "Mode paper": (
        *("paper.memory_mb", "paper.anchors", "paper.gamma", "paper.top_p"),
        *("paper.temperature", "paper.window", "paper.quirks"),
    ),
}

_REASONS_HEADER = """\
# Why something was not reused

The same word appears in the log, in the label `reason` of the metrics and in the report of a
response. Generated from `kvcomm_vllm/reasons.py`.
"""


def render_yaml() -> str:
    """The text of ``configs/kvcomm.yaml``: every key with its meaning, range and default."""
    parts, block = [_YAML_HEADER], ""
    for dotted, key in keys().items():
        *outer, name = dotted.split(".")
        if outer and outer[0] != block:
            block = outer[0]
            doc = (blocks()[block].__doc__ or "").strip()
            parts.append(f"\n# {doc}\n{block}:")
        indent = "  " * len(outer)
        comment = f"{indent}# "
        doc = textwrap.fill(key.doc, 100, initial_indent=comment, subsequent_indent=comment)
        value = _plain(key.default)
        allowed = f"{comment}Allowed: {key.allowed}. Default: {value}."
        parts.append(f"\n{doc}\n{allowed}\n{indent}{name}: {value}\n")
    return "".join(parts)


def render_config_table() -> str:
    """The text of ``docs/config.md``: a table per group, a row per key."""
    known, parts = keys(), [_TABLE_HEADER]
    for title, names in GROUPS.items():
        parts.append(f"\n## {title}\n\n{_HEAD}")
        for name in names:
            key = known[name]
            parts.append(f"| `{name}` | `{_plain(key.default)}` | {key.allowed} | {key.doc} |\n")
    return "".join(parts)


def render_reasons_table() -> str:
    """The text of ``docs/reasons.md``: one row per reason, a table per scope."""
    parts = [_REASONS_HEADER]
    for scope in dict.fromkeys(reason.scope for reason in Reason):
        parts.append(f"\n## {scope.title}\n\n| Reason | Meaning |\n|---|---|\n")
        parts += [f"| `{r.value}` | {r.explanation} |\n" for r in Reason if r.scope is scope]
    return "".join(parts)


def generated(root: Path) -> dict[Path, str]:
    """Every generated file under the repository root ``root`` with the text it should have."""
    return {
        root / "configs" / "kvcomm.yaml": render_yaml(),
        root / "docs" / "config.md": render_config_table(),
        root / "docs" / "reasons.md": render_reasons_table(),
    }


def _plain(value: object) -> str:
    return json.dumps(value).strip('"') or "''"


if __name__ == "__main__":
    for path, text in generated(Path(__file__).resolve().parents[2]).items():
        path.write_text(text, encoding="utf-8")
