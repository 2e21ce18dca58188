"""A YAML file whose keys are flags: what it may hold, and how it becomes a command line.

A file with ``stages`` is a pipeline: a mapping of flags for each stage, beside the flags that all of them share.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_ogpsa.cluster.settings import FILE_KEYS, OF_ONE_NODE
from megatron_ogpsa.errors import UserError

LAUNCH = "launch"
STAGES = "stages"

_STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Entry:
    """One key of the file."""

    key: str
    value: Any
    line: int


@dataclass(frozen=True)
class ConfigFile:
    """A configuration as it was written.

    Attributes:
        entries: flags in the order of the file.
        launch: how to start the ranks, when the command starts them itself: key → what was written.
        stages: of a pipeline, each stage's own flags, in the order in which they run; empty for a single run.
    """

    path: Path
    entries: tuple[Entry, ...]
    launch: dict[str, str] = field(default_factory=dict)
    stages: dict[str, tuple[Entry, ...]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> ConfigFile:
        """Read a mapping of flags, with the stages of a pipeline if it has any.

        Raises:
            UserError: no such file, not YAML, not a mapping, or a key twice; with the line.
        """
        try:
            node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except FileNotFoundError:
            raise UserError(
                f"{path}: no such file: give the path of a configuration, such as configs/example/sft.yaml"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as UTF-8 text ({error}): save it as UTF-8") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            raise UserError(f"{path}{line}: not YAML ({getattr(error, 'problem', error)}): mend the line") from None
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}: not a mapping: write one flag a line, such as 'num-layers: 4'")
        nodes = {key.value: value for key, value in node.value if isinstance(key, yaml.ScalarNode)}
        entries = _entries(path, node)
        return cls(
            path,
            tuple(entry for entry in entries if entry.key not in (LAUNCH, STAGES)),
            _launch_settings(path, nodes[LAUNCH]) if LAUNCH in nodes else {},
            _stages(path, nodes[STAGES]) if STAGES in nodes else {},
        )

    def stage(self, name: str) -> ConfigFile:
        """One stage of a pipeline as a configuration of its own; its flags win over the shared ones."""
        own = {entry.key for entry in self.stages[name]}
        shared = tuple(entry for entry in self.entries if entry.key not in own)
        return ConfigFile(self.path, shared + self.stages[name], self.launch)

    def as_flags(self, parser: argparse.ArgumentParser, overrides: list[str]) -> list[str]:
        """The command line that the file and ``overrides`` stand for, the latter last so that they win.

        A repeatable flag that is given in ``overrides`` replaces all of the file's.

        Raises:
            UserError: an unknown key, with the nearest known one, or a value that its flag cannot take.
        """
        options = {
            option.removeprefix("--").replace("_", "-"): action
            for action in parser._actions
            for option in action.option_strings
        }
        flags: list[str] = []
        for entry in self.entries:
            action = options.get(entry.key)
            if action is None:
                from megatron_ogpsa.integration.arguments import nearest

                raise UserError(f"{self.path}:{entry.line}: unknown key '{entry.key}'{nearest(entry.key, options)}")
            if isinstance(action, argparse._AppendAction) and set(action.option_strings) & set(overrides):
                continue
            try:
                flags += _as_flags(entry, action, parser)
            except ValueError as error:
                raise UserError(f"{self.path}:{entry.line}: {entry.key}: {error}") from None
        return flags + overrides


def _entries(path: Path, node: yaml.MappingNode) -> list[Entry]:
    entries = [_entry(path, key, value) for key, value in node.value]
    lines: dict[str, int] = {}
    for entry in entries:
        if entry.key in lines:
            raise UserError(
                f"{path}:{entry.line}: {entry.key} stands on line {lines[entry.key]} already: keep one of them"
            )
        lines[entry.key] = entry.line
    return entries


def _stages(path: Path, node: yaml.Node) -> dict[str, tuple[Entry, ...]]:
    example = "write a name for each stage with its flags below it, such as 'sft:' and 'dpo:'"
    if not isinstance(node, yaml.MappingNode) or not node.value:
        raise UserError(f"{path}:{node.start_mark.line + 1}: stages: {example}")
    stages: dict[str, tuple[Entry, ...]] = {}
    for key, value in node.value:
        place = f"{path}:{key.start_mark.line + 1}: stages"
        name = key.value if isinstance(key, yaml.ScalarNode) else ""
        if not _STAGE_NAME.fullmatch(name):
            raise UserError(f"{place}: {name!r} names a folder too: use letters, digits, '-' and '_'")
        if name in stages:
            raise UserError(f"{place}: {name} stands there twice: give each stage a name of its own")
        if not isinstance(value, yaml.MappingNode):
            raise UserError(f"{place}: {name}: {example}")
        stages[name] = tuple(_entries(path, value))
    return stages


def _entry(path: Path, key: yaml.Node, value: yaml.Node) -> Entry:
    if not isinstance(key, yaml.ScalarNode):
        raise UserError(f"{path}:{key.start_mark.line + 1}: not a flag's name: write 'flag: value'")
    constructor = yaml.SafeLoader("")
    return Entry(
        key=key.value.removeprefix("--").replace("_", "-"),
        # Numbers stay as they were written: 1e-6 is a string to YAML 1.1, and a float to every flag.
        value=_as_written(value) if _is_number(value) else constructor.construct_object(value, deep=True),
        line=key.start_mark.line + 1,
    )


def _is_number(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float"))


def _as_written(node: yaml.Node) -> str:
    return str(node.value)


def _launch_settings(path: Path, node: yaml.Node) -> dict[str, str]:
    """Key → value as it was written: to YAML 1.1 the range 2:4 is a number, in base 60."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    if not pairs or not all(isinstance(part, yaml.ScalarNode) for pair in pairs for part in pair):
        raise UserError(f"{path}:{node.start_mark.line + 1}: launch: write a mapping, such as 'nproc-per-node: 8'")
    settings: dict[str, str] = {}
    for key, value in pairs:
        name = key.value.replace("_", "-")
        if name not in FILE_KEYS:
            from megatron_ogpsa.integration.arguments import nearest

            place = f"{path}:{key.start_mark.line + 1}: launch: "
            if name in OF_ONE_NODE:
                raise UserError(f"{place}{name} is each node's own: give --{name} there")
            raise UserError(f"{place}unknown key '{key.value}'{nearest(name, FILE_KEYS) or _known(FILE_KEYS)}")
        settings[name] = value.value
    return settings


def _known(keys: Iterable[str]) -> str:
    return f": known are {', '.join(keys)}"


def _as_flags(entry: Entry, action: argparse.Action, parser: argparse.ArgumentParser) -> list[str]:
    """The flag and its values; raises ValueError with the reason if they do not go together."""
    option = next(o for o in action.option_strings if o.removeprefix("--").replace("_", "-") == entry.key)
    value = entry.value
    if value is None:
        raise ValueError("has no value: give one, or leave the key out")
    if isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"is a switch: write true or false, not {value!r}")
        return [option] if value else _switched_off(option, action, parser)
    if isinstance(value, bool):
        raise ValueError(f"takes a value, not {str(value).lower()}")
    if isinstance(action, argparse._AppendAction):
        items = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else _as_list(value)
        return [part for item in items for part in (option, str(item))]
    if isinstance(value, dict):
        raise ValueError("takes a value, not a mapping")
    if isinstance(value, list) and action.nargs is None:
        raise ValueError("takes one value, not a list")
    return [option, *(str(item) for item in _as_list(value))]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _switched_off(option: str, action: argparse.Action, parser: argparse.ArgumentParser) -> list[str]:
    """False: the flag of the opposite meaning, or nothing where the switch is off anyway."""
    opposite = "--no-" + option.removeprefix("--")
    if any(opposite in other.option_strings for other in parser._actions):
        return [opposite]
    if parser.get_default(action.dest) != getattr(action, "const", None):
        return []
    raise ValueError(f"cannot be switched off: Megatron has no {opposite}")
