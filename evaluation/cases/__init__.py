# SPDX-License-Identifier: Apache-2.0
"""Prompts that once went wrong, sent to a real server: what is reused, and how far from dense."""
