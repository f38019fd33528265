# SPDX-License-Identifier: Apache-2.0
"""`kvcomm demo`: a preset of the bench, with a picture."""
