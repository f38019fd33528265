# SPDX-License-Identifier: Apache-2.0
"""Checks at start: what a worker's model and pages allow."""
