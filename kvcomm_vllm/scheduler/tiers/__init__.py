# SPDX-License-Identifier: Apache-2.0
"""Tiers: pages that have left the KV cache, kept by vLLM under their own names, and brought back
when a prompt needs them.
"""
