# SPDX-License-Identifier: Apache-2.0
"""Random LoRA adapters for the tiny Llama, as PEFT writes them, large enough to be heard."""

import json
from pathlib import Path

RANK = 8
LAYERS = 3
# of the tiny Llama: (inputs, outputs)
MODULES = {
    "self_attn.q_proj": (64, 128),
    "self_attn.k_proj": (64, 64),
    "self_attn.v_proj": (64, 64),
    "self_attn.o_proj": (128, 64),
    "mlp.gate_proj": (64, 128),
    "mlp.up_proj": (64, 128),
    "mlp.down_proj": (128, 64),
}


def save_tiny_adapter(folder: Path, seed: int) -> None:
    """Write it to ``folder``, over what is there; the weights depend on ``seed`` alone."""
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for module, (inputs, outputs) in MODULES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            a = torch.randn(RANK, inputs, generator=draw) * 0.15
            b = torch.randn(outputs, RANK, generator=draw) * 0.15
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(module.split(".")[1] for module in MODULES),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
