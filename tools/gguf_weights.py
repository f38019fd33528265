# SPDX-License-Identifier: Apache-2.0
"""Unpack the weights of a GGUF file one tensor at a time: never more than one of them is fp32."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

# Families whose tensors a GGUF file holds as they are. In others some are permuted or shifted,
# and transformers knows how.
STRAIGHT = {"qwen2": gguf.MODEL_ARCH.QWEN2}
HEAD, EMBEDDING = "output.weight", "token_embd.weight"


def unpack(path: Path, config: Any, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The tensors called ``names`` in transformers, as bf16, from the GGUF file at ``path``.

    Where embeddings are tied and the file has an output head all the same, the one tensor is
    unpacked from the head: that is packed finer.

    Raises:
        SystemExit: the file lacks a tensor, or has one that the model does not.
    """
    places = gguf_names(names, config)
    packed = {str(tensor.name): tensor for tensor in gguf.GGUFReader(path).tensors}
    tied = config.tie_word_embeddings
    if tied and HEAD in packed:
        packed[EMBEDDING] = packed.pop(HEAD)
    differing = packed.keys() ^ {EMBEDDING if tied and p == HEAD else p for p in places.values()}
    if differing:
        raise SystemExit(f"{path.name} does not fit its model: {', '.join(sorted(differing))}")
    unpacked = {place: _bf16(tensor) for place, tensor in packed.items()}
    if tied:
        unpacked[HEAD] = unpacked[EMBEDDING]
    return {name: unpacked[place] for name, place in places.items()}


def gguf_names(names: Iterable[str], config: Any) -> dict[str, str]:
    """What a GGUF file calls each of the tensors called ``names`` in transformers."""
    known = gguf.get_tensor_name_map(STRAIGHT[config.model_type], config.num_hidden_layers)
    return {n: known.get_name(n, try_suffixes=(".weight", ".bias")) or n for n in names}


def _bf16(tensor: Any) -> torch.Tensor:
    values = np.require(gguf.dequantize(tensor.data, tensor.tensor_type), requirements="W")
    return torch.from_numpy(values).to(torch.bfloat16)
