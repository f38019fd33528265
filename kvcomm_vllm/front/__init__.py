# SPDX-License-Identifier: Apache-2.0
"""What runs where requests are made, in the API server or the caller's process."""
