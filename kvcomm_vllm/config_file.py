# SPDX-License-Identifier: Apache-2.0
"""Reading the configuration from a YAML file, with errors a user can act on."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from kvcomm_vllm.config import ConfigError, KVCommConfig

_BOOL = "tag:yaml.org,2002:bool"


def load_file(path: str | Path) -> KVCommConfig:
    """The configuration in a YAML file; an empty file means all defaults.

    Raises:
        ConfigError: the file is missing, unreadable, not YAML, not a mapping, or a key or value
            in it is refused.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    try:
        content = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: must be a mapping of keys to values (lines like `mode: seam`), "
            f"but is of type {type(content).__name__}"
        )
    return KVCommConfig.from_mapping(content, str(path))


class _Loader(yaml.SafeLoader):
    """YAML's safe subset, where `off` is a word (as in YAML 1.2) and no key may come twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            name = str(key_node.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {name!r} is given twice", key_node.start_mark
                )
            seen.add(name)
        mapping: dict[object, object] = super().construct_mapping(node, deep)
        return mapping


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"]
)


def _one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})"
    return " ".join(str(error).split())
