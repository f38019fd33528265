# SPDX-License-Identifier: Apache-2.0
"""Stages of `make gpu`, each a process of its own, and the page that is made of what they found."""
