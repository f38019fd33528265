# SPDX-License-Identifier: Apache-2.0
"""kvcomm_vllm: agents served by vLLM reuse each other's KV cache, wherever the shared text stands in the prompt."""

__version__ = "0.1.0"
