# SPDX-License-Identifier: Apache-2.0
"""How spans of each mode are corrected, and what a mode learns."""
