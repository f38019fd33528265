# SPDX-License-Identifier: Apache-2.0
"""Lines of logs as no program should write them: known names with values of every type."""

from __future__ import annotations

from any_values import json_values
from hypothesis import strategies as st

KEYS = st.sampled_from(
    [
        *("messages", "prompt", "body", "request", "response", "choices", "message", "content"),
        *("role", "type", "text", "attributes", "metadata", "kv_transfer_params", "kvcomm"),
        *("gen_ai.input.messages", "gen_ai.prompt.0.content", "parts", "tool_calls", "tools"),
    ]
)
ANY = st.recursive(
    json_values,
    lambda inner: st.dictionaries(KEYS, inner, max_size=5) | st.lists(inner, max_size=3),
    max_leaves=20,
)
TEXTS = st.text() | st.none() | st.lists(st.text() | ANY, max_size=3)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.text() | st.just("user"), "content": TEXTS | ANY}),
    max_size=3,
)
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "messages": MESSAGES | ANY,
        "prompt": st.text() | st.lists(st.integers(0, 2**31)) | ANY,
        "tools": ANY,
        "model": ANY,
        "cache_salt": st.text() | ANY,
        "chat_template_kwargs": st.dictionaries(KEYS, ANY, max_size=2),
        "kv_transfer_params": ANY | st.fixed_dictionaries({"kvcomm": ANY}),
        "response": ANY,
        "echo": st.booleans(),
        "logprobs": ANY,
    },
)
LINES = st.dictionaries(KEYS, ANY, max_size=5) | ANY | BODIES | st.lists(BODIES, max_size=3)
