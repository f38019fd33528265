# SPDX-License-Identifier: Apache-2.0
"""Work for quiet moments: lessons, their queue, and what wakes the engine for them."""
