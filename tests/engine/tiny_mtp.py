# SPDX-License-Identifier: Apache-2.0
"""Models of ``tiny_families`` with one more layer, which guesses the token after next: it is of the
same kind, with what puts an embedding and a hidden state together.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiny_families import FAMILIES, save_family

if TYPE_CHECKING:
    import torch

    Weights = dict[str, torch.Tensor]


def save_mtp(folder: Path) -> None:
    """A MiMo, which is a Qwen2, and ``MiMoMTPModel``."""
    norms = ("token_layernorm", "hidden_layernorm", "final_layernorm")
    weights, guesses = _one_more_layer("qwen2, pages of 128", folder, norms, "input_proj")
    weights |= {f"model.mtp_layers.0.{name}": weight for name, weight in guesses.items()}
    _save(weights, folder, architectures=["MiMoForCausalLM"])


def save_deepseek_mtp(folder: Path) -> None:
    """A DeepSeek V3 and ``DeepSeekMTPModel``."""
    norms = ("enorm", "hnorm", "shared_head.norm")
    weights, guesses = _one_more_layer("deepseek v3", folder, norms, "eh_proj")
    guesses["embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    guesses["shared_head.head.weight"] = weights["lm_head.weight"].clone()
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"] - 1
    weights |= {f"model.layers.{layers}.{name}": weight for name, weight in guesses.items()}
    _save(weights, folder)


def _one_more_layer(
    name: str, folder: Path, norms: Sequence[str], joint: str
) -> tuple[Weights, Weights]:
    """Weights of a family's model, and those of the layer behind them by their names in it."""
    import torch
    from safetensors.torch import load_file

    family = FAMILIES[name]
    layers = family.settings()["num_hidden_layers"]
    save_family(replace(family, config={**family.config, "num_hidden_layers": layers + 1}), folder)
    weights = load_file(folder / "model.safetensors")
    prefix = f"model.layers.{layers}."
    own = [name for name in weights if name.startswith(prefix)]
    guesses = {name.removeprefix(prefix): weights.pop(name) for name in own}
    embedding = weights["model.embed_tokens.weight"]
    width, generator = embedding.shape[1], torch.Generator().manual_seed(1)
    for norm in norms:
        drawn = 1 + 0.3 * torch.randn(width, generator=generator)
        guesses[f"{norm}.weight"] = drawn.to(embedding.dtype)
    drawn = torch.randn(width, 2 * width, generator=generator) * (2 * width) ** -0.5
    guesses[f"{joint}.weight"] = drawn.to(embedding.dtype)
    return weights, guesses


def _save(weights: Weights, folder: Path, **changes: Any) -> None:
    """The model's own layers are one less than were made."""
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    if "layer_types" in config:
        config["layer_types"].pop()
    config |= {"num_nextn_predict_layers": 1, **changes}
    (folder / "config.json").write_text(json.dumps(config))
