# SPDX-License-Identifier: Apache-2.0
"""What a log of prompts would save: the scheduler half at a desk, without engine or server."""
