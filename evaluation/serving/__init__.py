# SPDX-License-Identifier: Apache-2.0
"""Real servers, clients that ask them, and what their counters say."""
