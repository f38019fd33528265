# SPDX-License-Identifier: Apache-2.0
"""How long and how hard a soak is."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

LIMIT = 1024  # tokens, vLLM's ``--max-model-len``


@dataclass(frozen=True)
class Options:
    """Args:
    seconds: all rounds together, the server's start not counted.
    storm: seconds of a round in which clients send new requests.
    blocks: pages of the KV cache, of 32 tokens; far fewer than the clients could use.
    compared: requests a round that are compared with dense ones.
    plain: 1 = without the plugin, to see what of all this is vLLM's own.
    """

    model: str
    out: Path = Path("out/soak")
    seconds: float = 600.0
    seed: int = 20261128
    clients: int = 24
    storm: float = 90.0
    blocks: int = 40
    compared: int = 6
    plain: int = 0


def parse(arguments: list[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in vars(Options("")).items():
        if name == "model":
            parser.add_argument("--model", required=True)
        else:
            parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.set_defaults(out=Options("").out)
    return Options(**vars(parser.parse_args(arguments)))
