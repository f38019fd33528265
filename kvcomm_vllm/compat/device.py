# SPDX-License-Identifier: Apache-2.0
"""Of a worker's device: its memory, how data gets there, and the other ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def free_memory(device: torch.device) -> int | None:
    """Bytes that nobody holds on a GPU; None on CPU, where the operating system decides.

    What torch has kept for itself counts as held, though it would give it to whoever asks.
    """
    if device.type != "cuda":
        return None
    import torch

    return int(torch.cuda.mem_get_info(device)[0])


def send(data: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Host memory on a device by way of pinned memory, without waiting for what the device does."""
    from vllm.utils.torch_utils import async_tensor_h2d

    there: torch.Tensor = async_tensor_h2d(data, device=device)
    return there


def any_rank(flags: list[bool]) -> list[bool]:
    """Flag by flag, whether any tensor-parallel rank has set it; every rank must ask at once.

    Asked between processes, not between devices: nothing waits for a stream.
    """
    import torch
    from vllm.distributed import get_tp_group

    votes = torch.tensor(flags, dtype=torch.uint8)
    torch.distributed.all_reduce(
        votes, op=torch.distributed.ReduceOp.MAX, group=get_tp_group().cpu_group
    )
    return [bool(vote) for vote in votes]


def allow_amx() -> None:
    """Ask Linux for the tile registers that vLLM's CPU attention uses (``amx`` pages).

    A process that uses them unasked is killed (SIGILL). vLLM leaves the asking to the first large
    bf16 product; our check at start may come before it.
    """
    import torch

    ask = getattr(torch.cpu, "_init_amx", None)
    if ask is not None:
        ask()


def let_vllm_scan_llvmlite() -> None:
    """Keep an engine startable in a process where numba has been used.

    vLLM's CPU worker looks at ``vars()`` of everything in every module; llvmlite's library object
    answers any attribute name, ``__dict__`` included, with a function, on which that scan fails.
    Seen with vLLM 0.32 and llvmlite 0.47.
    """
    from llvmlite.binding import ffi

    answer_any = ffi._lib_wrapper.__getattr__
    if answer_any.__module__ != ffi.__name__:
        return  # done before

    def answer_functions(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return answer_any(self, name)

    ffi._lib_wrapper.__getattr__ = answer_functions
