# SPDX-License-Identifier: Apache-2.0
"""Every access to vLLM that may differ between versions, or that vLLM offers no interface for."""
