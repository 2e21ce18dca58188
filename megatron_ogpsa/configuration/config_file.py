"""A YAML file whose keys are flags: what it may hold, and how it becomes a command line.

A file with ``stages`` is a pipeline: a mapping of flags for each stage, beside the flags that all of them share. With
``model: FOLDER``, a converted model (:mod:`megatron_ogpsa.conversion`), the flags that the file leaves out are the model's.
With ``base: OTHER.yaml`` (found from the file's own folder) what is still left out is that file's; bases have no bases.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_ogpsa.cluster.settings import FILE_KEYS, OF_ONE_NODE
from megatron_ogpsa.configuration.yaml_nodes import MERGE_TAG, compose, line_of, value_of
from megatron_ogpsa.conversion.model_file import CARRIED_FOLDER, MODEL_FILE
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.system.files import is_there

BASE = "base"
LAUNCH = "launch"
STAGES = "stages"
MODEL = "model"

_OWN = (LAUNCH, STAGES, MODEL, BASE)
"""Keys that are no flags."""

COMMAND_LINE_ONLY = {"spec": "names a Python module, which is imported", "yaml-cfg": "takes the place of this file"}
"""Flags that a configuration may not hold, which need not be trusted: it executes nothing."""

_OF_A_SHELL = re.compile(r"(?:^|=)(~[^/=]*)(?:/|$)|(\$\{\w+\}|\$[A-Z_]\w*)")
"""What only a shell would replace: a home folder, in front; a variable, anywhere."""

_NEGATIVE = re.compile(r"-[0-9.][0-9.eE+-]*|-")
_STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Entry:
    """One key of the file, or of its base."""

    key: str
    value: Any
    path: Path
    line: int

    @property
    def place(self) -> str:
        """``file:line``, for error messages."""
        return f"{self.path}:{self.line}"


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
        """Read a mapping of flags, with its base and the stages of a pipeline if it has any.

        Raises:
            UserError: no such file, not YAML, not a mapping, a key twice, or a base that is none; with the line.
        """
        node = compose(path)
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}: not a mapping: write one flag a line, such as 'num-layers: 4'")
        own = {name: [(key, value) for key, value in node.value if _is_key(key, name)] for name in _OWN}
        for name, pairs in own.items():
            if len(pairs) > 1:
                raise UserError(f"{path}:{line_of(pairs[1][0])}: {name} stands there twice: keep one of them")
        entries = _entries(path, [pair for pair in node.value if not any(pair in pairs for pairs in own.values())])
        if own[MODEL]:
            given = {entry.key for entry in entries}
            entries += [entry for entry in _model_entries(path, *own[MODEL][0]) if entry.key not in given]
        written = cls(
            path,
            tuple(entries),
            _launch_settings(path, own[LAUNCH][0][1]) if own[LAUNCH] else {},
            _stages(path, own[STAGES][0][1]) if own[STAGES] else {},
        )
        return written._above(_base_of(path, own[BASE][0][1])) if own[BASE] else written

    @property
    def run_id(self) -> str:
        """For the nodes of a run to find each other by, and not those of another run at the same place."""
        written = [(entry.key, str(entry.value)) for entry in self.entries]
        stages = {name: [(entry.key, str(entry.value)) for entry in entries] for name, entries in self.stages.items()}
        return "megatron-ogpsa-" + hashlib.sha256(repr((written, stages)).encode()).hexdigest()[:12]

    def _above(self, base: ConfigFile) -> ConfigFile:
        """With the flags of ``base`` that this file does not give itself."""
        own = {entry.key for entry in self.entries}
        inherited = tuple(entry for entry in base.entries if entry.key not in own)
        return ConfigFile(self.path, inherited + self.entries, base.launch | self.launch, self.stages)

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
            if not isinstance(action, argparse._HelpAction)  # it would end the run, with exit code 0
            for option in action.option_strings
        }
        flags: list[str] = []
        overridden = {part.partition("=")[0] for part in overrides}
        for entry in self.entries:
            action = options.get(entry.key)
            if action is None:
                from megatron_ogpsa.integration.arguments.parser import nearest

                raise UserError(f"{entry.place}: unknown key '{entry.key}'{nearest(entry.key, options)}")
            if why := COMMAND_LINE_ONLY.get(entry.key):
                raise UserError(f"{entry.place}: {entry.key} {why}: give --{entry.key} on the command line")
            if isinstance(action, argparse._AppendAction) and set(action.option_strings) & overridden:
                continue
            try:
                flags += _as_flags(entry, action, parser)
            except ValueError as error:
                raise UserError(f"{entry.place}: {entry.key}: {error}") from None
            except argparse.ArgumentError as error:
                raise UserError(f"{entry.place}: {entry.key}: {error.message}") from None
        return flags + overrides


def _base_of(path: Path, node: yaml.Node) -> ConfigFile:
    place = f"{path}:{line_of(node)}: {BASE}"
    if not isinstance(node, yaml.ScalarNode) or not node.value:
        raise UserError(f"{place}: write one path, as seen from {path.parent}")
    file = path.parent / str(node.value)
    if not is_there(file):
        raise UserError(f"{place}: no such file {file}: write its path as seen from {path.parent}")
    content = compose(file)
    for key, _ in content.value if isinstance(content, yaml.MappingNode) else ():
        if any(_is_key(key, name) for name in (BASE, STAGES)):
            raise UserError(f"{file}:{line_of(key)}: {key.value} in a base ({place}): give it in {path.name} itself")
    return ConfigFile.read(file)


def _entries(path: Path, pairs: list[tuple[yaml.Node, yaml.Node]]) -> list[Entry]:
    entries = [_entry(path, key, value) for key, value in pairs]
    lines: dict[str, int] = {}
    for entry in entries:
        if entry.key in lines:
            raise UserError(f"{entry.place}: {entry.key} stands on line {lines[entry.key]} already: keep one of them")
        lines[entry.key] = entry.line
    return entries


def _model_entries(path: Path, key: yaml.Node, value: yaml.Node) -> list[Entry]:
    """The flags that ``model: FOLDER`` stands for: the model's own, its weights and its tokenizer."""
    folder = value_of(f"{path}:{line_of(key)}: {MODEL}", value)
    remedy = "name a folder that megatron-ogpsa convert has written"
    if not isinstance(folder, str) or not is_there(Path(folder) / MODEL_FILE):
        raise UserError(f"{path}:{line_of(key)}: {MODEL}: {folder}: has no {MODEL_FILE}: {remedy}")
    node = compose(Path(folder) / MODEL_FILE)
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{Path(folder) / MODEL_FILE}: not a mapping of flags: {remedy}")
    besides = {
        "pretrained-checkpoint": folder,
        "tokenizer-type": "HuggingFaceTokenizer",
        "tokenizer-model": str(Path(folder) / CARRIED_FOLDER),
    }
    return [
        *_entries(Path(folder) / MODEL_FILE, node.value),
        *(Entry(name, text, path, line_of(key)) for name, text in besides.items()),
    ]


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
        stages[name] = tuple(_entries(path, value.value))
    return stages


def _entry(path: Path, key: yaml.Node, value: yaml.Node) -> Entry:
    place = f"{path}:{line_of(key)}"
    if not isinstance(key, yaml.ScalarNode):
        raise UserError(f"{place}: not a flag's name: write 'flag: value'")
    if key.tag == MERGE_TAG:
        raise UserError(f"{place}: merging ('<<') is not supported: write the flags themselves")
    name = _normal(key)
    return Entry(name, value_of(f"{place}: {name}", value), path, line_of(key))


def _is_key(node: yaml.Node, name: str) -> bool:
    return isinstance(node, yaml.ScalarNode) and _normal(node) == name


def _normal(key: yaml.ScalarNode) -> str:
    return str(key.value).removeprefix("--").replace("_", "-")


def _launch_settings(path: Path, node: yaml.Node) -> dict[str, str]:
    """Key → value as it was written: to YAML 1.1 the range 2:4 is a number, in base 60."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    if not pairs or not all(isinstance(part, yaml.ScalarNode) for pair in pairs for part in pair):
        raise UserError(f"{path}:{line_of(node)}: launch: write a mapping, such as 'nproc-per-node: 8'")
    settings: dict[str, str] = {}
    lines: dict[str, int] = {}
    for key, value in pairs:
        name = _normal(key)
        if name not in FILE_KEYS:
            from megatron_ogpsa.integration.arguments.parser import nearest

            place = f"{path}:{line_of(key)}: launch: "
            if name in OF_ONE_NODE:
                raise UserError(f"{place}{name} is each node's own: give --{name} there")
            raise UserError(f"{place}unknown key '{key.value}'{nearest(name, FILE_KEYS) or _known(FILE_KEYS)}")
        if name in lines:
            place = f"{path}:{line_of(key)}: launch: "
            raise UserError(f"{place}{name} stands on line {lines[name]} already: keep one of them")
        settings[name], lines[name] = value.value, line_of(key)
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
        return [part for item in items for part in (option, _checked(_no_flag(item), action, parser))]
    if isinstance(value, dict):
        raise ValueError("takes a value, not a mapping")
    if isinstance(value, list) and action.nargs is None:
        raise ValueError("takes one value, not a list")
    return [option, *(_checked(_no_flag(item), action, parser) for item in _as_list(value))]


def _checked(text: str, action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    """The text of a value that its flag takes; argparse would say so too, but not where it stands."""
    parser._check_value(action, parser._get_value(action, text))
    return text


def _no_flag(value: Any) -> str:
    """As text; what stands for a value must not act as one more flag."""
    if value is None:
        raise ValueError("holds an empty value: give one, or leave it out")
    text = str(value)
    if text.startswith("-") and not _NEGATIVE.fullmatch(text):
        raise ValueError(f"{text!r} is a flag, not a value: give flags lines of their own")
    if found := _OF_A_SHELL.search(text):
        raise ValueError(f"{found[1] or found[2]} in {text!r} stands for nothing in a file: write the path itself")
    return text


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
