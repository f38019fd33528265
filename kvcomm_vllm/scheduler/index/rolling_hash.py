# SPDX-License-Identifier: Apache-2.0
"""Rolling hashes of token ids: one key per window, one key per prefix, all computed by numpy."""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
I32 = NDArray[np.int32]

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_INVERSE = pow(_BASE, -1, 1 << 64)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MIX_SHIFT = np.uint64(29)


def namespace_seed(namespace: bytes) -> np.uint64:
    """xxh64 of a namespace, mixed into every key: equal text of two tenants has unrelated keys."""
    return np.uint64(xxhash.xxh64_intdigest(namespace))


class RollingHash:
    """Polynomial hash modulo 2**64 over mixed token ids (Karp and Rabin 1987), with prefix sums.

    With ``m_j`` the mixed id of token j, ``sums[i] = sum_{j<i} m_j B^j``. A window's hash is
    ``(sums[i+w] - sums[i]) B^-i``, which is free of its position; ``sums[i]`` itself names a
    prefix. Keys are not proof of equality: callers compare the tokens.
    """

    def __init__(self, window_tokens: int) -> None:
        if window_tokens < 1:
            raise ValueError(f"window_tokens must be at least 1, got {window_tokens}")
        self.window_tokens = window_tokens
        self._powers = np.ones(1, np.uint64)
        self._inverse_powers = np.ones(1, np.uint64)

    def sums(self, tokens: I32) -> U64:
        """Prefix sums of n tokens: uint64 [n + 1]."""
        n = len(tokens)
        if n > len(self._powers):
            self._grow(n)
        # An affine mix first: without it small ids would fill the low bits only.
        terms = tokens.astype(np.uint64)
        terms += _MIX_2
        terms *= _MIX_1
        terms ^= terms >> _MIX_SHIFT
        terms *= _MIX_2
        terms *= self._powers[:n]
        sums = np.zeros(n + 1, np.uint64)
        np.cumsum(terms, out=sums[1:])
        return sums

    def windows(self, sums: U64, seed: np.uint64) -> U64:
        """Keys of the windows that start at every token: uint64 [max(0, n - w + 1)]."""
        count = max(0, len(sums) - self.window_tokens)
        keys = sums[self.window_tokens :] - sums[:count]
        keys *= self._inverse_powers[:count]
        keys ^= seed
        return keys

    def grams(self, tokens: I32) -> U64:
        """Keys of the windows that start at every token, where all text is one tenant's: no seed.
        uint64 [max(0, n - w + 1)].
        """
        return self.windows(self.sums(np.ascontiguousarray(tokens, np.int32)), np.uint64(0))

    def prefixes(self, sums: U64, seed: np.uint64) -> U64:
        """Keys of the prefixes of w, 2w, 3w ... tokens: uint64 [n // w]."""
        return sums[self.window_tokens :: self.window_tokens] ^ seed

    def _grow(self, n: int) -> None:
        size = 1 << (n - 1).bit_length()
        self._powers = _powers(_BASE, size)
        self._inverse_powers = _powers(_INVERSE, size)


def _powers(base: int, size: int) -> U64:
    factors = np.full(size, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)
