# SPDX-License-Identifier: Apache-2.0
"""What measures the plugin, and is no part of it."""
