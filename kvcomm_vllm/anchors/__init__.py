# SPDX-License-Identifier: Apache-2.0
"""What is known of slots from requests that were served densely, and how it corrects others."""
