# SPDX-License-Identifier: Apache-2.0
"""The kernel variants that are compiled for inspection, and the bytes each cannot avoid moving."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kernel_inspection.compiled import Launch
from kvcomm_vllm.kernels import coded, codes, collect, correct, distance, load, turns
from kvcomm_vllm.kernels.launch import (
    layers_per_program,
    next_power,
    shape_constants,
    tokens_per_block,
)

TRITON_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
RANK = 32  # numbers of a code
ANCHORS = 5


@dataclass(frozen=True)
class Shape:
    """Cache shape of a variant; ``heads`` are this rank's KV heads, ``page`` tokens per page,
    ``latent`` the channels of V in latent pages.
    """

    dtype: torch.dtype = BF16
    head_dim: int = 128
    rotary_dim: int = 128
    interleaved: bool = False
    heads: int = 8
    page: int = 16
    layers: int = 32
    latent: int = 0

    @property
    def value_dim(self) -> int:
        return self.latent or self.head_dim

    @property
    def row_dim(self) -> int:
        return self.head_dim + self.value_dim

    @property
    def widest(self) -> int:
        return max(self.head_dim, self.value_dim)

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.").replace("float8_", "").removesuffix("fn")
        pairs = "gptj" if self.interleaved else "neox"
        dims = f"D{self.head_dim}" + (f"+{self.latent}" if self.latent else "")
        return f"{kind} {dims} R{self.rotary_dim} {pairs} H{self.heads}"


@dataclass(frozen=True)
class Variant:
    """One kernel at one shape.

    Args:
        minimum: bytes per (token, layer, head) that any implementation reads and writes once.
        rows: (token, layer, head) rows one program handles.
        trips: iterations of loops whose bounds are known only at run time, outermost first.
        shared: bytes per row read on top of that through L2, by all programs of a layer (a code's
            factor).
        repeated: bytes per row that a program reads again, from L1, or that all layers share
            (rotation factors), where this is not hidden in a few per cent.
        products: multiply-adds per row in matrix products.
    """

    name: str
    shape: Shape
    launch: Launch
    minimum: float
    rows: int
    trips: tuple[int, ...] = ()
    shared: float = 0.0
    repeated: float = 0.0
    products: int = 0

    @property
    def power_of_two(self) -> bool:
        """Whether no block is padded, so that blocks tell exactly how many bytes move."""
        s = self.shape
        blocks = (s.rotary_dim, s.head_dim - s.rotary_dim, s.value_dim)
        return all(n == 0 or n == next_power(n) for n in blocks)


# Of DeepSeek V3, and of Kimi K2.
LATENT = tuple(
    Shape(dtype, 64, 64, interleaved=True, heads=1, page=64, layers=61, latent=512)
    for dtype in (BF16, FP32, E4M3)
)


def _variant(
    name: str,
    shape: Shape,
    kernel: Any,
    *,
    arena: torch.dtype = BF16,
    constants: dict[str, Any],
    minimum: float,
    rows: int,
    trips: tuple[int, ...] = (),
    shared: float = 0.0,
    repeated: float = 0.0,
    num_warps: int = 4,
    rank: int = 0,
    products: int = 0,
) -> Variant:
    base = shape_constants(
        head_dim=shape.head_dim,
        value_dim=shape.value_dim,
        rotary_dim=shape.rotary_dim,
        interleaved=shape.interleaved,
        heads=shape.heads,
        page=shape.page,
        dtype=shape.dtype,
        latent=shape.latent > 0,
    )
    base = coded.code_constants(base, rank) if rank else base
    of_arena: tuple[str, ...] = ("p_dk", "p_dv", "p_anchor_k", "p_anchor_v")
    of_arena += ("p_mean_k", "p_mean_v", "p_up")
    of_arena += ("p_out_k", "p_out_v") if name.startswith("collect") else ()
    types = {}
    for argument in kernel.arg_names:
        if argument in ("p_layers", "p_src", "p_dst", "p_slots", "p_rows", "p_row"):
            types[argument] = "*i64"
        elif argument in ("p_index", "p_entry"):
            types[argument] = "*i32"
        elif argument in of_arena:
            types[argument] = "*" + TRITON_TYPES[arena]
        elif argument.startswith("p_"):
            types[argument] = "*fp32"
        elif argument.startswith("stride_") or argument in ("T", "L", "A", "SKIP"):
            types[argument] = "i32"
    # Strides are products with channels; tables come from torch's allocator.
    aligned = frozenset(a for a in kernel.arg_names if a.startswith(("p_", "stride_")))
    launch = Launch(kernel, types, {**base, **constants}, aligned, num_warps)
    name = f"{name}, {shape}"
    return Variant(name, shape, launch, minimum, rows, trips, shared, repeated, products)


def load_variant(shape: Shape) -> Variant:
    """``load``."""
    tokens = tokens_per_block(shape.widest, shape.dtype.itemsize)
    layers = layers_per_program(shape.heads, shape.layers)
    return _variant(
        "load",
        shape,
        load.load_kernel,
        constants={"BT": tokens, "BL": layers},
        minimum=2 * shape.row_dim * shape.dtype.itemsize,
        rows=tokens * layers * shape.heads,
    )


def sum_variant(shape: Shape, anchors: int) -> Variant:
    """``load_corrected`` with the weighted sum of so many anchors; 0: with a mean, one row."""
    tokens = tokens_per_block(shape.widest, shape.dtype.itemsize)
    layers, rows = layers_per_program(shape.heads, shape.layers), max(1, anchors)
    return _variant(
        f"load + {anchors} anchors" if anchors else "load + mean",
        shape,
        correct.load_sum_kernel,
        constants={"WEIGHTED": anchors > 0, "BT": tokens, "BL": layers},
        minimum=shape.row_dim * (2 * shape.dtype.itemsize + rows * BF16.itemsize),
        rows=tokens * layers * shape.heads,
        trips=(rows,),
    )


def code_variant(shape: Shape, rank: int = RANK, *, arena: torch.dtype = BF16) -> Variant:
    """``load_corrected`` with mean and codes (fp32)."""
    tokens, dim = coded.block_tokens(shape.widest), shape.row_dim
    numbers, code = dim * rank, 4 * rank / shape.heads
    again = 2 * 4 * rank - code if rank > coded.BLOCK_RANK else 0
    exact = " in fp32" if arena is FP32 else ""
    return _variant(
        f"load + mean + code of rank {rank}{exact}",
        shape,
        coded.load_coded_kernel,
        arena=arena,
        constants={"BT": tokens},
        minimum=dim * (2 * shape.dtype.itemsize + arena.itemsize) + code,
        rows=tokens * shape.heads,
        shared=numbers * arena.itemsize / tokens,
        # Undo and redo: cos and sin in fp32 for each pair. A long code is read for K and V anew.
        repeated=2 * 4 * shape.rotary_dim / shape.heads + again,
        num_warps=8,
        rank=rank,
        products=numbers,
    )


def collect_variant(shape: Shape) -> Variant:
    """``collect`` into bf16."""
    tokens = tokens_per_block(shape.widest, shape.dtype.itemsize)
    layers = layers_per_program(shape.heads, shape.layers)
    return _variant(
        "collect",
        shape,
        collect.collect_kernel,
        constants={"BT": tokens, "BL": layers},
        minimum=shape.row_dim * (shape.dtype.itemsize + BF16.itemsize),
        rows=tokens * layers * shape.heads,
    )


def distance_variant(shape: Shape, anchors: int = 20) -> Variant:
    """``distance``."""
    tokens = tokens_per_block(shape.widest, shape.dtype.itemsize)
    heads = min(shape.heads, distance.BLOCK_HEADS)
    return _variant(
        f"distance, {anchors} anchors",
        shape,
        distance.distance_kernel,
        constants={"BT": tokens, "BH": heads},
        minimum=shape.row_dim * (shape.dtype.itemsize + anchors * BF16.itemsize),
        rows=tokens * heads,
        trips=(anchors,),
    )


def all_variants() -> Iterator[Variant]:
    """Every kernel and option, over the dtypes, head sizes, pairings and partial rotations."""
    shapes = (
        Shape(),
        Shape(FP16),
        Shape(FP32),
        Shape(E4M3),
        Shape(E5M2),
        Shape(BF16, 64, 64, heads=3),
        Shape(BF16, 80, 80, heads=4),
        Shape(BF16, 96, 96, heads=4),
        Shape(BF16, 256, 256, heads=4),
        Shape(BF16, 128, 64, interleaved=True, heads=2),
        Shape(BF16, 128, 0),
        Shape(BF16, heads=1),
    )
    for shape in shapes:
        yield load_variant(shape)
    for shape in LATENT:
        yield load_variant(shape)
        yield sum_variant(shape, ANCHORS)
        yield sum_variant(shape, 0)
        yield collect_variant(shape)
        yield code_variant(shape)
        yield distance_variant(shape)
    for shape in (shapes[0], shapes[3], shapes[5], shapes[9]):
        yield sum_variant(shape, ANCHORS)
        yield sum_variant(shape, 0)
        yield collect_variant(shape)
    for shape in (shapes[0], shapes[3], shapes[5], shapes[6], shapes[8], shapes[9]):
        yield code_variant(shape)
    for rank in (RANK // 2, 2 * RANK):
        yield code_variant(shapes[0], rank)
    yield code_variant(shapes[0], arena=FP32)
    for shape in (shapes[0], shapes[3], shapes[5], shapes[9]):
        yield distance_variant(shape)


def helper_launches() -> dict[str, Launch]:
    """What makes turns and codes for the others, at the shape of an 8B model."""
    half, layers, rank, inputs, raw = 64, 31, RANK, 615, 6 * 8 * 256
    width = inputs + 4
    row = 16 * -(-width // 16)
    sizes = {"RAW": raw, "INPUTS": inputs, "WIDTH": width, "ROW": row}
    fold = {**sizes, "BT": codes.FOLD_TOKENS, "BC": codes.FOLD_INPUTS}
    code = {"WIDTH": width, "ROW": row, "N": layers * rank}
    code |= {"BT": codes.CODE_TOKENS, "BN": codes.CODE_NUMBERS, "BK": codes.CODE_INPUTS}
    turn = {"HALF": half, "HALF_P": next_power(half), "BT": turns.BLOCK // next_power(half)}
    return {
        "turns, joined": _helper(turns.turns_kernel, {**turn, "JOINED": True}),
        "turns, apart": _helper(turns.turns_kernel, {**turn, "JOINED": False}),
        "fold": _helper(codes.fold_kernel, fold, p_x="*bf16"),
        "code": _helper(codes.code_kernel, code, p_x="*bf16", p_down="*bf16", p_code="*bf16"),
        "code in fp32": _helper(codes.code_kernel, code),
    }


def _helper(kernel: Any, constants: dict[str, Any], **types: str) -> Launch:
    known = {"p_old": "*i64", "p_new": "*i64", "p_index": "*i32", "p_entry": "*i32", "T": "i32"}
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: (known | types).get(name, "*fp32") for name in names}
    aligned = frozenset(name for name in names if name.startswith("p_"))
    return Launch(kernel, signature, constants, aligned, num_warps=4)
