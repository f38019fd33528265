# SPDX-License-Identifier: Apache-2.0
"""Device functions shared by the kernels: addresses, key halves, fp8, rotation.

Naming: ``p_`` pointer, ``b_`` block in registers, ``o_`` offsets, ``m_`` mask, ``i_`` index. A key
of D channels is handled as three blocks ``[tokens, .]``: ``a`` and ``b`` hold the two members of
each rotated pair, ``c`` the channels behind ``rotary_dim``. Widths are padded to powers of two and
masked.
"""

# Triton's device functions are traced, not called: annotations would be wrong here.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def layer_pointer(p_layers, i_layer, ELEMENT: tl.constexpr):
    """Pointer to a layer's cache out of the table of addresses; caches are 16-byte aligned."""
    address = tl.load(p_layers + i_layer)
    return tl.multiple_of(address.to(tl.pointer_type(ELEMENT)), 16)


@triton.jit
def slot_offsets(b_slot, PAGE: tl.constexpr, stride_page, stride_token):
    """Element offset of each slot inside a layer, 64 bits wide (a cache outgrows 2^31 elements)."""
    return (b_slot // PAGE) * stride_page + (b_slot % PAGE) * stride_token


@triton.jit
def decode(b_stored, FP8: tl.constexpr):
    """Stored elements to fp32. FP8: 0 = a float dtype, 4 = e4m3 bits, 5 = e5m2 bits in a byte.

    By bits, because sm_80 has no e4m3 conversion; both are exact.
    """
    if FP8 == 0:
        b_value = b_stored.to(tl.float32)
    else:
        b_code = b_stored.to(tl.uint32) & 0x7F
        b_sign = (b_stored.to(tl.uint32) & 0x80) << 24
        if FP8 == 4:
            b_abs = ((b_code + (120 << 3)) << 20).to(tl.float32, bitcast=True)
            b_abs = tl.where(b_code < 8, b_code.to(tl.float32) * 0.001953125, b_abs)
            b_abs = tl.where(b_code == 0x7F, float("nan"), b_abs)
        else:
            b_abs = ((b_code + (112 << 2)) << 21).to(tl.float32, bitcast=True)
            b_abs = tl.where(b_code < 4, b_code.to(tl.float32) * 1.52587890625e-05, b_abs)
            b_abs = tl.where(b_code == 0x7C, float("inf"), b_abs)
            b_abs = tl.where(b_code > 0x7C, float("nan"), b_abs)
        b_value = (b_abs.to(tl.uint32, bitcast=True) | b_sign).to(tl.float32, bitcast=True)
    return b_value


@triton.jit
def encode(b_value, ELEMENT: tl.constexpr, FP8: tl.constexpr):
    """fp32 to stored elements, to nearest even, saturating in fp8 (as vLLM's cache write does).

    fp8 rounds at the last kept bit by adding half of its place. Below the smallest normal number
    the step is fixed: it is the unit in the last place of 2^14 (e4m3) or 2^7 (e5m2), so adding that
    number rounds and leaves the code in the low bits.
    """
    if FP8 == 0:
        b_stored = b_value.to(ELEMENT)
    else:
        b_bits = b_value.to(tl.uint32, bitcast=True)
        b_sign = (b_bits >> 24) & 0x80
        if FP8 == 4:
            b_abs = tl.minimum(tl.abs(b_value), 448.0)
            b_int = b_abs.to(tl.uint32, bitcast=True)
            b_code = ((b_int + 0x7FFFF + ((b_int >> 20) & 1)) >> 20) - (120 << 3)
            b_small = (b_abs + 16384.0).to(tl.uint32, bitcast=True) & 0xF
            b_code = tl.where(b_abs < 0.015625, b_small, b_code)
        else:
            b_abs = tl.minimum(tl.abs(b_value), 57344.0)
            b_int = b_abs.to(tl.uint32, bitcast=True)
            b_code = ((b_int + 0xFFFFF + ((b_int >> 21) & 1)) >> 21) - (112 << 2)
            b_small = (b_abs + 128.0).to(tl.uint32, bitcast=True) & 0x7
            b_code = tl.where(b_abs < 6.103515625e-05, b_small, b_code)
        b_code = tl.where((b_bits & 0x7FFFFFFF) > 0x7F800000, 0x7F, b_code)
        b_stored = (b_code | b_sign).to(tl.uint8)
    return b_stored


@triton.jit
def load_row(p_row, m_row, FIRST: tl.constexpr, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr):
    """``[rows, WIDTH_P]`` elements from channel FIRST on; what is masked reads 0."""
    o_c = tl.arange(0, WIDTH_P)
    m = m_row[:, None] & (o_c < WIDTH)[None, :]
    return tl.load(p_row[:, None] + (FIRST + o_c)[None, :], mask=m, other=0)


@triton.jit
def store_row(p_row, b_row, m_row, FIRST: tl.constexpr, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr):
    """The inverse of :func:`load_row`."""
    o_c = tl.arange(0, WIDTH_P)
    m = m_row[:, None] & (o_c < WIDTH)[None, :]
    tl.store(p_row[:, None] + (FIRST + o_c)[None, :], b_row, mask=m)


@triton.jit
def load_key(
    p_row,
    m_row,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    REST: tl.constexpr,
    REST_P: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """The three blocks (a, b, c) of keys, or of anything with a key's channel order."""
    BT: tl.constexpr = p_row.shape[0]
    if HALF == 0:
        b_a = tl.zeros((BT, HALF_P), p_row.dtype.element_ty)
        b_b = b_a
    elif INTERLEAVED:
        b_ab = load_row(p_row, m_row, 0, 2 * HALF, 2 * HALF_P)
        b_a, b_b = tl.split(tl.reshape(b_ab, (BT, HALF_P, 2)))
    else:
        b_a = load_row(p_row, m_row, 0, HALF, HALF_P)
        b_b = load_row(p_row, m_row, HALF, HALF, HALF_P)
    if REST == 0:
        b_c = tl.zeros((BT, REST_P), p_row.dtype.element_ty)
    else:
        b_c = load_row(p_row, m_row, 2 * HALF, REST, REST_P)
    return b_a, b_b, b_c


@triton.jit
def store_key(
    p_row,
    b_a,
    b_b,
    b_c,
    m_row,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    REST: tl.constexpr,
    REST_P: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """The inverse of :func:`load_key`; the blocks are already encoded."""
    if HALF > 0:
        if INTERLEAVED:
            store_row(p_row, tl.interleave(b_a, b_b), m_row, 0, 2 * HALF, 2 * HALF_P)
        else:
            store_row(p_row, b_a, m_row, 0, HALF, HALF_P)
            store_row(p_row, b_b, m_row, HALF, HALF, HALF_P)
    if REST > 0:
        store_row(p_row, b_c, m_row, 2 * HALF, REST, REST_P)


@triton.jit
def load_factors(p_cos, p_sin, o_t, m_t, HALF: tl.constexpr, HALF_P: tl.constexpr):
    """cos and sin of the tokens ``o_t``: two fp32 blocks ``[tokens, HALF_P]``."""
    o_row = o_t.to(tl.int64) * HALF
    b_cos = load_row(p_cos + o_row, m_t, 0, HALF, HALF_P)
    b_sin = load_row(p_sin + o_row, m_t, 0, HALF, HALF_P)
    return b_cos, b_sin


@triton.jit
def turn(b_a, b_b, b_cos, b_sin):
    """``(a + ib)(cos + i sin)``."""
    return b_a * b_cos - b_b * b_sin, b_b * b_cos + b_a * b_sin
