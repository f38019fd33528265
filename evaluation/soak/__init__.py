# SPDX-License-Identifier: Apache-2.0
"""Mixed requests of every kind against one real server that is short of memory; what must hold."""
