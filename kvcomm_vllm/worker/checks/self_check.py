# SPDX-License-Identifier: Apache-2.0
"""Start-up self-check: what vLLM writes into a page is read back, and moving a key equals computing
it in its new place.

Runs before the engine serves anything, on two pages that nobody uses yet, with the backend's own
write and the model's own rotary embedding as judges. A version of vLLM that changed its page layout
fails here, not in a user's answer.
"""

from __future__ import annotations

import torch

from kvcomm_vllm.compat.layers import write_kv
from kvcomm_vllm.kernels import packing
from kvcomm_vllm.kernels.pages import Packing, PageGroup
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.worker.checks.unsupported import Unsupported
from kvcomm_vllm.worker.kv_view import LayerGroup
from kvcomm_vllm.worker.load import LoadKernel, TokenMoves, run_loads

TOLERANCE = {1: 0.1, 2: 0.02, 4: 1e-4}  # relative RMS error by bytes per stored element
SHIFT = 5  # odd, so that pages are not aligned with each other
FP8_SPREAD = 100.0  # in units of the scale: of 448 that e4m3 holds, 4.4 standard deviations


def self_check(groups: list[LayerGroup], block_size: int, kernel: LoadKernel) -> None:
    """Raises ``Unsupported`` where a layer reads back something else than was written or
    rotated.
    """
    for group in groups:
        device = group.pages.layers[0].device
        source = torch.arange(block_size, 2 * block_size - SHIFT, device=device)
        target = source + block_size + SHIFT
        old = torch.arange(3, 3 + len(source), device=device)
        new = old + 2 * block_size + 1
        keys, moved, values = _native(group, old, new)
        spreads = [_spreads(group, index) for index in range(len(group.layers))]
        for layer, (k, v) in zip(group.layers, spreads, strict=True):
            write_kv(layer, keys * k, values * v, source)
        run_loads([group], TokenMoves(source, target, old, new), kernel)
        for index, (k, v) in enumerate(spreads):
            _compare(group, index, source, keys * k, values * v, "are not those that were written")
            _compare(group, index, target, moved * k, values * v, "are not those of their place")
            for slots in (source, target):
                packing.clear(group.pages, index, slots)


def _native(
    group: LayerGroup, old: torch.Tensor, new: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random K rotated by the model to both places, and V: ``[tokens, kv_heads, head_dim]``, V with
    ``value_dim``, in the model's dtype.
    """
    pages = group.pages
    generator = torch.Generator().manual_seed(0)
    shape = (len(old), pages.kv_heads)
    dtype = pages.layers[0].dtype if pages.layers[0].dtype.itemsize > 1 else torch.bfloat16
    plain, values = (
        torch.randn(*shape, dim, generator=generator).to(old.device, dtype)
        for dim in (pages.head_dim, pages.value_dim)
    )
    if group.rotary is None:
        return plain, plain, values
    native = getattr(group.rotary, "forward_native", group.rotary.forward)

    def rotated(positions: torch.Tensor) -> torch.Tensor:
        given = plain if pages.packing is Packing.LATENT else plain.flatten(1)  # as models do
        key: torch.Tensor = native(positions, given.clone(), given.clone())[1]
        return key.view_as(plain)

    return rotated(old), rotated(new), values


def _spreads(group: LayerGroup, index: int) -> tuple[float, float]:
    """Standard deviations of K and V that a layer's pages can hold: an fp8 cache saturates at 448
    of its scale, and scales of calibrated checkpoints are as small as their values.
    """
    pages = group.pages
    if pages.k_scales is None or pages.v_scales is None:
        return 1.0, 1.0
    return FP8_SPREAD * pages.k_scales[index], FP8_SPREAD * pages.v_scales[index]


def _compare(
    group: LayerGroup,
    index: int,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    complaint: str,
) -> None:
    name = group.layers[index].layer_name
    got = packing.read(group.pages, index, slots)
    require_close(group.pages, index, name, got, (keys, values), complaint)


def require_close(
    pages: PageGroup,
    index: int,
    name: str,
    got: tuple[torch.Tensor, torch.Tensor],
    want: tuple[torch.Tensor, torch.Tensor],
    complaint: str,
) -> None:
    """Raises ``Unsupported`` where K or V of a layer is farther off than its dtype rounds.

    Each by itself: where their scales differ, the larger one would hide the other's errors.
    """
    tolerance = TOLERANCE[pages.layers[index].element_size()]
    for what, read, right in zip(("keys", "values"), got, want, strict=True):
        error = float((read - right.float()).norm() / right.float().norm())
        if not error <= tolerance:
            detail = f"{name}: {what} that were read {complaint} (relative error {error:.2g})"
            raise Unsupported(Reason.SELF_CHECK_FAILED, detail)
