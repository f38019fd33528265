# SPDX-License-Identifier: Apache-2.0
"""What is added to KV while it is loaded, and how that is learned."""
