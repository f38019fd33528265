# SPDX-License-Identifier: Apache-2.0
"""Mode paper: the estimator and the gate of KVCOMM's paper, as a yardstick."""
