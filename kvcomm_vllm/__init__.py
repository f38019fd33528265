# SPDX-License-Identifier: Apache-2.0
"""Agents served by vLLM reuse each other's KV cache, wherever shared text stands in a prompt."""

__version__ = "0.1.0"
