# SPDX-License-Identifier: Apache-2.0
"""The command's options, checked before a server starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.config.file import load_file
from kvcomm_vllm.evaluation.bench.columns import Column, Endpoint, choose_columns, read_endpoints
from kvcomm_vllm.evaluation.bench.presets import FULL, QUICK, STREAM_OPTIONS
from kvcomm_vllm.evaluation.workloads import workload
from kvcomm_vllm.evaluation.workloads.rows import DataError

# The bench waits for what is learned after each request, so that runs agree: no need to be shy.
# Under load nobody has the time to heal, so what is measured are sources as they were served.
WHILE_MEASURING = {"audit_idle_seconds": 0.05, "audit_share": 1.0, "heal": "off"}
PAPER_MEMORY_MB = 2048
SIZES = ("agents", "prefix_tokens", "input_tokens", "output_tokens")


@dataclass(frozen=True)
class Options:
    """A run in full.

    Args:
        workloads: names, and options of each.
        config: the kvcomm server's effective configuration.
    """

    model: str
    out: Path
    workloads: dict[str, dict[str, int]]
    columns: list[Column]
    tasks: int
    seed: int = 0
    rate: float = 0.0
    load_seconds: float = 0.0
    burst: int = 0
    stream: int = 0
    stream_options: dict[str, int] = field(default_factory=lambda: dict(STREAM_OPTIONS))
    data: Path | None = None
    endpoints: dict[str, Endpoint] = field(default_factory=dict)
    config: KVCommConfig = field(default_factory=KVCommConfig)
    server_args: list[str] = field(default_factory=list)

    def settings(self) -> dict[str, Any]:
        """All that has a say in what is measured; JSON-able. A run can be continued by options
        that are equal in these.
        """
        plain = {name: value for name, value in vars(self).items() if name != "out"}
        return {
            **plain,
            "columns": [column.name for column in self.columns],
            "data": str(self.data) if self.data else None,
            "endpoints": {name: vars(endpoint) for name, endpoint in self.endpoints.items()},
            "config": self.config.to_mapping(),
        }


def read_options(
    model: str | None,
    out: Path,
    *,
    quick: bool = False,
    full: bool = False,
    workloads: list[str] | None = None,
    endpoints: list[str] | None = None,
    config: Path | None = None,
    **given: Any,
) -> Options:
    """The preset, and what the user has said instead.

    Args:
        given: sizes, for all workloads that have them, and further fields of :class:`Options`;
            None = not said.

    Raises:
        DataError: an option that cannot be used.
        ConfigError: a configuration file that cannot.
    """
    if model is None:
        raise DataError("--model is needed")
    if quick and full:
        raise DataError("--quick and --full are two things")
    said = {name: value for name, value in given.items() if value is not None}
    sizes = {name: said.pop(name) for name in SIZES if name in said}
    if said.get("burst"):
        if said.get("rate"):
            raise DataError("--rate and --burst are two ways to arrive")
        said["rate"] = 0.0
    fields = (FULL if full else QUICK) | said
    foreign = read_endpoints(endpoints or [])
    names = [name.strip() for name in fields["columns"].split(",")]
    chosen = choose_columns([name for name in names if name], foreign)
    known = fields["workloads"]
    fields |= {
        "workloads": _with_sizes(workloads or list(known), known, sizes),
        "columns": chosen,
        "endpoints": foreign,
        "load_seconds": fields["load_seconds"] if fields["rate"] else 0.0,
        "config": bench_config(config, chosen),
    }
    return Options(model, out, **fields)


def _with_sizes(
    names: list[str], known: dict[str, dict[str, int]], sizes: dict[str, int]
) -> dict[str, dict[str, int]]:
    found = {}
    for name in dict.fromkeys(names):
        allowed = workload(name).options
        given = {key: value for key, value in sizes.items() if key in allowed}
        found[name] = {**known.get(name, {}), **given}
    for key in sizes:
        if not any(key in options for options in found.values()):
            raise DataError(f"--{key.replace('_', '-')}: no chosen workload has that option")
    return found


def bench_config(path: Path | None, columns: list[Column]) -> KVCommConfig:
    """The user's configuration, with what the columns need on one server; requests name their own
    mode.
    """
    values = (load_file(path) if path else KVCommConfig()).to_mapping()
    default = KVCommConfig()
    values["mode"] = "anchor"
    for key, value in WHILE_MEASURING.items():
        if values[key] == getattr(default, key):
            values[key] = value
    if any(column.name == "paper" for column in columns) and not values["paper"]["memory_mb"]:
        values["paper"]["memory_mb"] = PAPER_MEMORY_MB
    return KVCommConfig.from_mapping(values, "kvcomm bench")
