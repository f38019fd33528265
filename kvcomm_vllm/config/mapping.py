# SPDX-License-Identifier: Apache-2.0
"""Between a mapping as read from YAML or JSON and dataclasses of keys: fields made by :func:`key`,
and blocks of them, which are such dataclasses themselves.

A key inside a block has a name with a point: ``estimator.ridge``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice
from typing import Any

from kvcomm_vllm.config.key import Key
from kvcomm_vllm.wording import one_line, shown

MAX_PROBLEMS = 20  # told at once
_ALL_KEYS = "all keys are in docs/config.md and in `vllm serve --help=KVCommConfig`"


class ConfigError(ValueError):
    """A configuration that is refused.

    The text has a line for each problem, with where it was found, key, value and what is allowed.
    """

    @classmethod
    def of(cls, problems: list[str], origin: str) -> ConfigError:
        return cls("\n".join(f"{one_line(origin)}: {told}" for told in problems))


def blocks_of(owner: type) -> dict[str, type]:
    """The blocks of a dataclass, by name."""
    factories: dict[str, Any] = {f.name: f.default_factory for f in fields(owner)}
    return {
        name: made
        for name, made in factories.items()
        if isinstance(made, type) and is_dataclass(made)
    }


def keys_of(owner: type) -> dict[str, Key]:
    """Every key of a dataclass by name, in the order of declaration; those of blocks come last."""
    found: dict[str, Key] = {f.name: f.metadata["key"] for f in fields(owner) if f.metadata}
    for block, inner in blocks_of(owner).items():
        found |= {f"{block}.{name}": key for name, key in keys_of(inner).items()}
    return found


@dataclass(frozen=True)
class Given:
    """One key of a mapping.

    Args:
        told: its name as it was given, with that of its block.
        name: the key that is meant; None if there is none.
    """

    told: object
    name: str | None
    value: object
    block: str = ""


class Reader:
    """Reads mappings for one dataclass.

    Args:
        owner: the dataclass.
        moved: old names of keys, and what they are now.
    """

    def __init__(self, owner: type, moved: Mapping[str, str]) -> None:
        self.owner = owner
        self.moved = moved
        self.keys = keys_of(owner)
        self.blocks = blocks_of(owner)
        self._top = {name: name for name in self.keys if "." not in name} | dict(moved)

    def read(self, mapping: Mapping[str, object], origin: str) -> tuple[Any, tuple[str, ...]]:
        """The dataclass's instance that ``mapping`` describes, and the old names in it.

        Args:
            origin: where it came from (a file name, a flag), for error messages.

        Raises:
            ConfigError: unknown keys, wrong types, values out of range; all of them at once.
        """
        problems = list(islice(self._problems(mapping), MAX_PROBLEMS + 1))
        if problems:
            if len(problems) > MAX_PROBLEMS:
                problems[-1] = "there are more problems"
            raise ConfigError.of(problems, origin)
        inner: dict[str, dict[str, Any]] = {name: {} for name in self.blocks}
        outer: dict[str, Any] = {}
        old = []
        for given in self._given(mapping):
            assert given.name is not None
            value = self.keys[given.name].normalise(given.value)
            first, _, rest = given.name.partition(".")
            if rest:
                inner[first][rest] = value
            else:
                outer[first] = value
            if given.told in self.moved:
                old.append(str(given.told))
        made = {name: self.blocks[name](**values) for name, values in inner.items()}
        return self.owner(**outer, **made), tuple(old)

    def _given(self, mapping: Mapping[str, object]) -> Iterator[Given]:
        for name, value in mapping.items():
            if name not in self.blocks:
                yield Given(name, self._top.get(name), value)
            elif isinstance(value, Mapping):
                for inner, inner_value in value.items():
                    told = f"{name}.{inner}" if isinstance(inner, str) else (name, inner)
                    meant = told if isinstance(told, str) and told in self.keys else None
                    yield Given(told, meant, inner_value, name)
            elif value is not None:  # all that is below it may be commented out
                yield Given(name, None, value)

    def _problems(self, mapping: Mapping[str, object]) -> Iterator[str]:
        """What is wrong, a line each, as far as they are asked for."""
        seen: dict[str, object] = {}
        for given in self._given(mapping):
            if given.name is None:
                yield self._unknown(given)
                continue
            if given.name in seen:
                old = given.told if given.told in self.moved else seen[given.name]
                yield f"{old}: is the old name of {given.name}, which is given, too; leave it out"
            seen[given.name] = given.told
            key = self.keys[given.name]
            problem = key.problem(key.normalise(given.value))
            if problem is not None:
                told = key.told(given.value)
                yield f"{given.told}: {told} {problem}; allowed: {key.allowed}"

    def _unknown(self, given: Given) -> str:
        if given.told in self.blocks:
            name = str(given.told)
            return f"{name}: {shown(given.value)} is no block of keys; {self._allowed(name)}"
        where = self._allowed(given.block) if given.block else _ALL_KEYS
        return f"unknown key {shown(given.told)}; {self._nearest(given)}{where}"

    def _allowed(self, block: str) -> str:
        return f"allowed in {block}: {', '.join(keys_of(self.blocks[block]))}"

    def _nearest(self, given: Given) -> str:
        name = given.told
        if isinstance(name, str) and given.block:
            name = name.removeprefix(f"{given.block}.")
        elif isinstance(name, str) and name in self.keys:
            first, _, rest = name.partition(".")
            return f"write it as `{rest}:` below `{first}:`; "
        spellings = {name: name for name in (*self.keys, *self.blocks)}
        spellings |= {name.rpartition(".")[2]: name for name in self.keys if "." in name}
        spellings |= self.moved
        if not isinstance(name, str) or len(name) > 2 * max(map(len, spellings)):
            return ""  # the search takes time that grows with the square of the name
        word = name.lower().replace("-", "_")
        near = (
            [word] if word in spellings else difflib.get_close_matches(word, spellings, cutoff=0.8)
        )
        meant = dict.fromkeys(spellings[spelling] for spelling in near)
        return f"did you mean {' or '.join(map(repr, meant))}? " if meant else ""
