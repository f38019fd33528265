# SPDX-License-Identifier: Apache-2.0
"""Reading the configuration from a YAML file, with errors a user can act on.

The file is parsed, but PyYAML makes no objects of it: a configuration is keys and plain values, so
its tags, merge keys and dates, and what goes wrong in making them, are not needed.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from kvcomm_vllm.config.config import KVCommConfig, blocks, keys
from kvcomm_vllm.config.mapping import ConfigError
from kvcomm_vllm.config.secondary import SecondaryTiers
from kvcomm_vllm.wording import one_line, shown

MAX_KB = 64  # ten times a file with every key and its comment; PyYAML reads some 40 KB a second
MAX_DIGITS = 4000  # Python reads no number of more than 4300


def load_file(path: str | Path) -> KVCommConfig:
    """The configuration in a YAML file; an empty file means all defaults.

    Raises:
        ConfigError: the file is missing, unreadable, too large, not YAML, not a mapping, or a key
            or value in it is refused.
    """
    source = one_line(str(path))
    try:
        text = _read(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{source}: no such file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{source}: not a text file in UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{source}: cannot be read: {one_line(reason)}") from None
    try:
        content = _content(yaml.compose(text, Loader=_Loader))
    # besides its own errors PyYAML lets those of int() and chr() pass
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        raise ConfigError(f"{source}: not valid YAML: {_told(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"{source}: must be a mapping of keys to values (lines like `mode: seam`), "
            f"but is {shown(content)}"
        )
    return KVCommConfig.from_mapping(content, source)


def _read(path: str | Path) -> bytes:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(0, "not a regular file")  # a pipe might never end
    with open(path, "rb") as file:
        data = file.read(MAX_KB * 1024 + 1)
    if len(data) > MAX_KB * 1024:
        raise OSError(0, f"larger than {MAX_KB} KB")
    return data


class _Loader(yaml.SafeLoader):
    """YAML's syntax without tags, and `off` is a word, as in YAML 1.2."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(None, None, "tags are not used here", event.start_mark)
        return super().compose_node(parent, index)


def _whole(text: str) -> int:
    digits = text.replace("_", "")
    # too large for any key, as the number itself is, and no matter of quadratic time
    return int(digits) if len(digits) <= MAX_DIGITS else 10 ** (len(digits) - 1)


# What a word without quotes stands for, if it is not text.
_PLAIN: dict[str, tuple[str, Callable[[str], object]]] = {
    "null": ("~|null|Null|NULL|", lambda text: None),
    "bool": ("true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": ("[-+]?[0-9][0-9_]*", _whole),
    "float": (
        r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        lambda text: float(re.sub(r"_|\.(?=[inIN])", "", text)),
    ),
}
_Loader.yaml_implicit_resolvers = {}
for _tag, (_pattern, _) in _PLAIN.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), None)


def _content(root: yaml.Node | None) -> object:
    """Keys with their values; of a file that is no mapping, what it is instead.

    Raises:
        yaml.MarkedYAMLError: a key that is no word, or is given twice.
    """
    if not isinstance(root, yaml.MappingNode):
        value = None if root is None else _value(root)
        return {} if value is None else value
    content: dict[str, object] = {}
    for name, node in _pairs(root):
        if name in blocks() and isinstance(node, yaml.MappingNode):
            content[name] = {
                inner: _all(value, set()) if _nested(f"{name}.{inner}") else _value(value)
                for inner, value in _pairs(node, f"{name}.")
            }
        else:
            content[name] = _value(node)
    return content


def _pairs(mapping: yaml.MappingNode, prefix: str = "") -> Iterator[tuple[str, yaml.Node]]:
    seen = set()
    for key, value in mapping.value:
        name = key.value
        if not isinstance(name, str):
            raise yaml.MarkedYAMLError(None, None, "a key must be a word", key.start_mark)
        if name in seen:
            problem = f"key {shown(prefix + name)} is given twice"
            raise yaml.MarkedYAMLError(None, None, problem, key.start_mark)
        seen.add(name)
        yield name, value


def _nested(name: str) -> bool:
    return name in keys() and isinstance(keys()[name].default, SecondaryTiers)


def _all(node: yaml.Node, seen: set[int]) -> object:
    """All that is in a list or a mapping.

    Raises:
        yaml.MarkedYAMLError: one stands in several places, and so may multiply without end.
    """
    if isinstance(node, yaml.ScalarNode):
        return _value(node)
    if id(node) in seen:
        problem = "an alias of a list or a mapping is not used here"
        raise yaml.MarkedYAMLError(None, None, problem, node.start_mark)
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        return [_all(one, seen) for one in node.value]
    assert isinstance(node, yaml.MappingNode)
    return {name: _all(value, seen) for name, value in _pairs(node)}


def _value(node: yaml.Node) -> object:
    """A list or a mapping is no other key's value, whatever is in it; blocks were read before."""
    if isinstance(node, yaml.SequenceNode):
        return [...]
    if isinstance(node, yaml.MappingNode):
        return {...: ...}
    _, value_of = _PLAIN.get(node.tag, ("", str))
    return value_of(node.value)


def _told(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        problem, mark = error.problem, error.problem_mark
        if problem.startswith("but "):
            problem = f"{error.context}, {problem}"
        return f"{one_line(problem, 120)} (line {mark.line + 1}, column {mark.column + 1})"
    if isinstance(error, yaml.reader.ReaderError):
        return f"the character {error.character:#04x} (number {error.position + 1} of the file)"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "a number or a character in it is out of range"
