# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels as a compiler sees them: which variants there are, and what becomes of them."""
