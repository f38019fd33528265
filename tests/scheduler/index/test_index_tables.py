# SPDX-License-Identifier: Apache-2.0
"""The index's parts: batch changes equal one change after another, hashes depend on text alone."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm_vllm.scheduler.index.hash_chains import FIBONACCI, HashChains
from kvcomm_vllm.scheduler.index.linked_lists import LinkedLists
from kvcomm_vllm.scheduler.index.rolling_hash import RollingHash, namespace_seed

NODES, LISTS = 24, 4
BATCHES = st.lists(
    st.one_of(
        st.lists(st.integers(0, LISTS - 1), min_size=1, max_size=10),  # push to these
        st.sets(st.integers(1, NODES)),  # remove those of these that are in
    ),
    max_size=12,
)


@given(BATCHES)
@settings(max_examples=300, deadline=None)
def test_linked_lists_equal_python_lists(batches):
    linked = LinkedLists(NODES, LISTS)
    model: list[list[int]] = [[] for _ in range(LISTS)]
    unused = list(range(1, NODES + 1))
    for batch in batches:
        if isinstance(batch, list):
            nodes, unused = unused[: len(batch)], unused[len(batch) :]
            targets = batch[: len(nodes)]
            linked.push(np.array(nodes, np.int32), np.array(targets, np.int32))
            for which in range(LISTS):
                model[which][:0] = [n for n, t in zip(nodes, targets, strict=True) if t == which]
        else:
            nodes = [n for n in sorted(batch) if n not in unused]
            linked.remove(np.array(nodes, np.int32))
            unused += nodes
            model = [[n for n in each if n not in batch] for each in model]
        for which in range(LISTS):
            seen, node = [], int(linked.head[which])
            while node:
                seen.append(node)
                node = int(linked.next[node])
            assert seen == model[which]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=40))
@settings(max_examples=200, deadline=None)
def test_hash_chains_equal_a_dictionary_of_lists(changes):
    """Keys made to share one bucket; ids are used again and again."""
    chains = HashChains(8)
    keys = np.arange(6, dtype=np.uint64) * np.uint64(pow(int(FIBONACCI), -1, 1 << 64))
    model: dict[int, list[int]] = {}
    unused = list(range(1, 9))
    for adds, key in changes:
        if adds and unused:
            node = unused.pop()
            chains.insert(np.array([node], np.int32), keys[key : key + 1])
            model.setdefault(key, []).insert(0, node)
        elif not adds and key in model:
            node = model[key].pop()
            unused.append(node)
            if not model[key]:
                del model[key]
            chains.remove(np.array([node], np.int32))
        positions, heads = chains.find(keys)
        assert dict(zip(positions.tolist(), heads.tolist(), strict=True)) == {
            k: nodes[0] for k, nodes in sorted(model.items())
        }
        for nodes in model.values():
            walked = [nodes[0]]
            while chains.older[walked[-1]]:
                walked.append(int(chains.older[walked[-1]]))
            assert walked == nodes


@given(
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=60), st.integers(1, 20), st.integers(0, 60)
)
def test_window_keys_depend_on_the_window_alone(tokens, window, shift):
    hashing = RollingHash(window)
    seed = namespace_seed(b"model")
    text = np.array(tokens, np.int32)
    keys = hashing.windows(hashing.sums(text), seed)
    assert len(keys) == max(0, len(text) - window + 1)
    shifted = np.concatenate([np.arange(shift, dtype=np.int32), text])
    moved = RollingHash(window)
    assert np.array_equal(moved.windows(moved.sums(shifted), seed)[shift:], keys)


def test_keys_of_different_windows_prefixes_and_namespaces_differ():
    hashing = RollingHash(4)
    tokens = np.random.default_rng(0).integers(0, 50_000, 20_000).astype(np.int32)
    sums = hashing.sums(tokens)
    assert sums.dtype == np.uint64
    keys = [
        method(sums, namespace_seed(name))
        for method in (hashing.windows, hashing.prefixes)
        for name in (b"a", b"b")
    ]
    for part in keys:
        assert len(np.unique(part)) == len(part)
    assert not np.intersect1d(keys[0], keys[1]).size
    assert not np.intersect1d(keys[2], keys[3]).size
    assert len(keys[2]) == 5_000
