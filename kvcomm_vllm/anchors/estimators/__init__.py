# SPDX-License-Identifier: Apache-2.0
"""From anchors to the deviation of a new span, as the kernels consume it."""
