# SPDX-License-Identifier: Apache-2.0
"""Promises of the configuration file: what YAML is read as, and that anything else is refused with
its reason, at once, and in one line.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import configs

from kvcomm_vllm.config import ConfigError, KVCommConfig
from kvcomm_vllm.config.file import MAX_KB, load_file

LAUGHS = "\n".join(f"a{n + 1}: &a{n + 1} [{f'*a{n}, ' * 9}]" for n in range(20))


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "my.yaml"


def refusal(file: Path, content: bytes) -> str:
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_file(file)
    assert str(caught.value).startswith(f"{file}: ")
    return str(caught.value).removeprefix(f"{file}: ")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: [1", "not valid YAML: expected ',' or ']'"),
        (b"- mode", "must be a mapping of keys to values (lines like `mode: seam`), but is [...]"),
        (b"seam", "but is 'seam'"),
        (b"\xff\xfe\x00", "not a text file in UTF-8"),
        (b"mode: \x00", "not valid YAML: the character 0x00 (number 7 of the file)"),
        (b"mode: seam\nmode: off\n", "key 'mode' is given twice (line 2, column 1)"),
        (b"mode: seam\n---\nmode: off\n", "expected a single document in the stream, but found"),
        (b"[" * 5000, "not valid YAML: nested too deeply"),
        (b"mode: " + b"- " * 5000, "not valid YAML: "),
        (b"a: 1\n" * 10**6, f"cannot be read: larger than {MAX_KB} KB"),
        (b"1: 2", "unknown key '1'"),
        (b"~: 2", "unknown key '~'"),
        (b"? ", "unknown key ''"),
        (b"[a]: b", "not valid YAML: a key must be a word (line 1, column 1)"),
        (b"{a: b}: c", "not valid YAML: a key must be a word (line 1, column 1)"),
        (b"mode: !!python/object:os.system {}", "tags are not used here (line 1, column 7)"),
        (b"seam_tokens: !!int 4", "tags are not used here"),
        (b"!!set {mode}", "tags are not used here"),
        (b"private_price: !!timestamp 2024-13-45", "tags are not used here"),
        (b"private_price: 2024-13-45", "private_price: '2024-13-45' is text; allowed: a number"),
        (b"<<: {mode: off}", "unknown key '<<'"),
        (b"mode: *x", "found undefined alias 'x' (line 1, column 7)"),
        (b"mode: *" + b"x" * 5000, "not valid YAML: found undefined alias 'xxx"),
        (b"mode: &x [*x]", "mode: [...] is not known"),
        (b"a0: &a0 [1]\n" + LAUGHS.encode() + b"\nmode: *a20", "unknown key 'a0'"),
        (b"%YAML 1." + b"9" * 5000, "a number or a character in it is out of range"),
        (b'mode: "\\U00110000"', "a number or a character in it is out of range"),
        (b'mode: "\\UFFFFFFFF"', "a number or a character in it is out of range"),
        (b'mode: "\\ud800\\n"', r"mode: '\ud800\n' is not known"),
        (b"mode: " + b"x" * 60_000, "x'... is not known"),
        (b"seam_tokens: " + b"9" * 60_000, "<number of about 60000 digits> is out of range"),
        (b"private_price: -" + b"9" * 5000, "<number of about 5001 digits> is out of range"),
        (b"private_price: " + b"9" * 5000 + b".", "private_price: inf is not a finite number"),
        (b"private_price: 1e400", "private_price: inf is not a finite number"),
        (b"private_price: .nan", "private_price: nan is not a finite number"),
        (b"max_sequences: 1e12", "1000000000000.0 is not written as a whole number"),
        (b"seam_tokens: 5.0", "seam_tokens: 5.0 is not written as a whole number"),
        (b"seam_tokens: 1:30", "seam_tokens: '1:30' is text"),
        (b"seam_tokens:", "seam_tokens: None is empty"),
        (b"self_check: yes", "self_check: 'yes' is text"),
    ],
    ids=lambda value: repr(value[:30]),
)
def test_a_file_that_is_no_configuration_is_refused_in_one_clear_line(
    file: Path, content: bytes, said: str
) -> None:
    told = refusal(file, content).splitlines()[0]
    assert said in told
    assert told.isprintable()
    assert len(told) < 250


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file$"):
        load_file(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r"^'nul\\x00name': cannot be read"):
        load_file("nul\0name")
    with pytest.raises(ConfigError, match=r"^'half\\ud800': cannot be read"):
        load_file("half\ud800")
    with pytest.raises(ConfigError, match=r"^'two\\nlines': no such file$"):
        load_file("two\nlines")
    with pytest.raises(
        ConfigError, match=r"^a{66}\.\.\.a{66}: cannot be read: File name too long$"
    ):
        load_file("a" * 10**6)


def test_what_is_not_a_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ConfigError, match=f"^{path}: cannot be read: not a regular file$"):
            load_file(path)


@pytest.mark.parametrize("content", ["", "# only a comment\n", "{}", "~", "\ufeff", "---\n...\n"])
def test_an_empty_file_means_all_defaults(file: Path, content: str) -> None:
    file.write_text(content)
    assert load_file(file) == KVCommConfig()


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("mode: off", {"mode": "off"}),
        ("\ufeffmode: 'off'\r\n", {"mode": "off"}),
        (
            "{mode: seam, audits: FALSE, report: FALSE}",
            {"mode": "seam", "audits": False, "report": "off"},
        ),
        ("seam_tokens: 010", {"seam_tokens": 10}),
        ("max_sequences: 20_000", {"max_sequences": 20_000}),
        ("private_price: 1e2", {"private_price": 100.0}),
        ("private_price: 7", {"private_price": 7.0}),
        ("private_price: .25", {"private_price": 0.25}),
        ("private_price: 1_0.2_5E-1", {"private_price": 1.025}),
        (
            "'seam_tokens': &few 4\nanchor_seam_tokens: *few",
            {"seam_tokens": 4, "anchor_seam_tokens": 4},
        ),
    ],
)
def test_values_are_read_as_they_look(file: Path, content: str, wanted: dict[str, object]) -> None:
    file.write_text(content)
    config = load_file(file)
    assert config == KVCommConfig(**wanted)  # type: ignore[arg-type]
    assert [type(value) for value in config.values().values()] == [
        type(value) for value in KVCommConfig().values().values()
    ]


def test_mode_off_as_other_readers_of_yaml_misread_it_is_meant_all_the_same() -> None:
    assert KVCommConfig.from_mapping(yaml.safe_load("mode: off"), "test").mode == "off"


@settings(deadline=None)
@given(configs)
def test_allowed_values_survive_a_round_trip_through_a_file(
    file: Path, values: dict[str, object]
) -> None:
    config = KVCommConfig.from_mapping(values, "test")
    file.write_text(yaml.safe_dump(config.to_mapping()))
    assert load_file(file) == config


PIECES = ["mode", "seam_tokens", ": ", ":", "\n", "\n  ", "- ", "[", "]", "{", "}", ",", "? "]
PIECES += ["!!", "!!python/object:os.system ", "!", "<<: ", "&a ", "*a", "'", '"', "\\", "\\ud800"]
PIECES += ["%YAML 1.", "%TAG ! tag:", "9" * 5000, "\\U00110000", "---\n", "...", "|", "|+9", ">"]
PIECES += ["\t", "\0", "\x85", "\ufeff", "\u2028", "1e400", ".nan", "2024-13-45", "-", "~", "off"]
texts = st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text()


@settings(deadline=None)
@given(texts.map(str.encode) | st.binary())
def test_any_file_is_a_configuration_or_refused_in_short_lines(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    try:
        load_file(file)
    except ConfigError as error:
        for line in str(error).splitlines():
            assert line.startswith(f"{file}: ")
            assert line.isprintable()
            assert len(line) < 250 + len(str(file))
