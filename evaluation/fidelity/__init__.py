# SPDX-License-Identifier: Apache-2.0
"""`kvcomm fidelity`: how far answers with reused KV are from dense ones."""
