# SPDX-License-Identifier: Apache-2.0
"""The block-hash index: which stored sequences hold which runs of a prompt's tokens.

This is its one door; what lies behind it is nobody else's business.
"""

from kvcomm_vllm.scheduler.index.borders import WHOLE, Borders, Reach
from kvcomm_vllm.scheduler.index.rolling_hash import I32, U64, RollingHash
from kvcomm_vllm.scheduler.index.sequence import Births, Origin, Sequence
from kvcomm_vllm.scheduler.index.sequence_index import Match, SequenceIndex

__all__ = [
    "I32",
    "U64",
    "WHOLE",
    "Births",
    "Borders",
    "Match",
    "Origin",
    "Reach",
    "RollingHash",
    "Sequence",
    "SequenceIndex",
]
