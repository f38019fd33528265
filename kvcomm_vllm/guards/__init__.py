# SPDX-License-Identifier: Apache-2.0
"""What rules reuse out at start: the engine, the model, the version of vLLM."""
