# SPDX-License-Identifier: Apache-2.0
"""The configuration: its keys, its file, and the documents that are made of them."""

from kvcomm_vllm.config.config import MODES, KVCommConfig, keys
from kvcomm_vllm.config.mapping import MAX_PROBLEMS, ConfigError

__all__ = ["MAX_PROBLEMS", "MODES", "ConfigError", "KVCommConfig", "keys"]
