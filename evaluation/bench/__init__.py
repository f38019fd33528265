# SPDX-License-Identifier: Apache-2.0
"""`kvcomm bench`: workloads on real servers, with and without reuse, side by side."""
