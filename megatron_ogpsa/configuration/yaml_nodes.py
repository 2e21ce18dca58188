"""YAML that nobody has checked, as nodes and plain values: nothing in a file is called, and none is read without end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.system.files import file_error

_MOST_BYTES = 1 << 20
_STANDARD = "tag:yaml.org,2002:"
MERGE_TAG = _STANDARD + "merge"
"""Of a key '<<'."""
_WRITTEN_OUT = ("str", "int", "float", "bool", "timestamp", "value")
"""Scalars that are taken as they were written; "bool" where an explicit tag stands before something else."""


def compose(path: Path) -> yaml.Node | None:
    """The nodes of a file, or None if it is empty.

    Raises:
        UserError: no such file, no regular file, or not YAML; with the line.
    """
    text = _text(path)
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{path}:{line}: not YAML (a character that is not allowed): mend the line") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise UserError(f"{place}: not YAML ({getattr(error, 'problem', error)}): mend the line") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply: write one flag a line, such as 'num-layers: 4'") from None


def _text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # a pipe would keep us waiting, /dev/zero would never end
            raise UserError(f"{path}: not a regular file: give the path of a configuration")
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise UserError(f"{path}: larger than {_MOST_BYTES >> 20} MiB, so no configuration: check the path")
        return content.decode("utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file: give the path of a configuration, such as configs/example/sft.yaml"
        ) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text (byte offset {error.start}): save it as UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise file_error(error, f"{path}: cannot be read ({error}): check the path") from None


def value_of(place: str, node: yaml.Node) -> Any:
    """Text, a truth value, None, a list of these, or a mapping of text to these: all that a flag can take.

    Nothing is made by YAML's own rules. They turn 1e-6 into text and 2024-01-01 into a date, call whatever a tag such as
    ``!!python/object/apply:os.system`` names if they are let, and unfold aliases of aliases without end.

    Args:
        place: ``file:line: key``, for error messages.

    Raises:
        UserError: it is anything else, or has a tag.
    """
    if isinstance(node, yaml.ScalarNode):
        return _scalar(place, node)
    if node.tag not in (_STANDARD + "seq", _STANDARD + "map"):
        raise _unsupported_tag(place, node)
    if isinstance(node, yaml.SequenceNode):
        return [_scalar(place, item) for item in node.value]
    values: dict[str, Any] = {}
    for key, value in node.value:
        name = str(_scalar(place, key))
        if name in values:
            raise UserError(f"{place}: {name} stands there twice (line {line_of(key)}): keep one of them")
        values[name] = _scalar(place, value)
    return values


def _scalar(place: str, node: yaml.Node) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{place}: a list or mapping within another (line {line_of(node)}): write plain values")
    kind = node.tag.removeprefix(_STANDARD)
    if kind == "null":
        return None
    if kind == "bool" and node.value.lower() in yaml.SafeLoader.bool_values:
        return yaml.SafeLoader.bool_values[node.value.lower()]
    if kind not in _WRITTEN_OUT:
        raise _unsupported_tag(place, node)
    return str(node.value)


def _unsupported_tag(place: str, node: yaml.Node) -> UserError:
    tag = node.tag.replace(_STANDARD, "!!")
    return UserError(f"{place}: the tag {tag} (line {line_of(node)}) is not supported: write the plain value")


def line_of(node: yaml.Node) -> int:
    """The line that a node starts on, from 1."""
    return int(node.start_mark.line) + 1
