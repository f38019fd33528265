# SPDX-License-Identifier: Apache-2.0
"""`kvcomm bench`: real workloads on real servers, with and without reuse, side by side."""
