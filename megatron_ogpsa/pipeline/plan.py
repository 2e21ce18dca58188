"""From a configuration with ``stages`` to one run of Megatron for each stage."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from megatron_ogpsa.configuration.config_file import BASE, LAUNCH, MODEL, STAGES, ConfigFile
from megatron_ogpsa.errors import UserError

FOLDERS = ("save", "tensorboard-dir", "non-persistent-global-ckpt-dir")
"""Keys of the whole pipeline below which each stage gets a folder of its own."""

BEGINNING = ("pretrained-checkpoint",)
"""Keys that say where the first stage begins."""

FORBIDDEN = ("load", "finetune")
"""Keys that would make a stage begin or go on elsewhere than the pipeline says."""

OF_THE_FILE = (LAUNCH, MODEL, BASE)
"""Keys that are no flags, and stand beside the stages."""


@dataclass(frozen=True)
class Stage:
    """One run of Megatron.

    Attributes:
        folder: its checkpoints; it also goes on from them.
        previous: the stage whose last checkpoint it begins with.
        config: its flags without those that the pipeline gives.
        overrides: flags of the command line, which win over the file's in every stage.
        given: flags that the pipeline gives.
    """

    name: str
    number: int
    folder: Path
    previous: Stage | None
    config: ConfigFile
    overrides: tuple[str, ...]
    given: tuple[str, ...]

    def flags(self, parser: argparse.ArgumentParser) -> list[str]:
        """The stage's command line for Megatron.

        Args:
            parser: of all flags that a configuration may name.

        Raises:
            UserError: as :meth:`ConfigFile.as_flags`.
        """
        return self.config.as_flags(parser, [*self.overrides, *self.given])

    @property
    def settings(self) -> dict[str, str]:
        """Flag → value as they were written, for comparison with an earlier run; of a flag that is repeated, all."""
        settings = {entry.key: str(entry.value) for entry in self.config.entries}
        key, given = "", set()
        for part in self.overrides:
            if part.startswith("--"):
                key, _, value = part.removeprefix("--").partition("=")
                settings[key] = f"{settings[key]} {value}".strip() if key in given else value
                given.add(key)
            else:
                settings[key] = f"{settings[key]} {part}".strip()
        return settings


def plan_stages(config: ConfigFile, overrides: list[str]) -> tuple[Stage, ...]:
    """The stages of a pipeline in the order in which they run.

    Each stage resumes from its own folder, ``save``/NAME, and begins with the stage before it through Megatron's
    ``--pretrained-checkpoint``, which takes the weights and nothing else: optimizer, schedule and counters are fresh.

    Raises:
        UserError: ``save`` is missing, or a key that the pipeline itself sets.
    """
    found, others = _split(overrides)
    if others and not others[0].startswith("--"):
        if others[0].startswith("-"):
            raise UserError(f"unknown flag {others[0]}: flags begin with two dashes, --{others[0][1:]}")
        stage = f", or --stage {others[0]}" if others[0] in config.stages else ""
        raise UserError(f"{others[0]} stands before any flag: write --FLAG {others[0]}{stage}")
    shared = {entry.key: str(entry.value) for entry in config.entries}
    for name, entries in config.stages.items():
        for entry in entries:
            if entry.key in (*FOLDERS, *BEGINNING, *FORBIDDEN, *OF_THE_FILE):
                raise UserError(
                    f"{entry.place}: {entry.key} in the stage {name}: the pipeline sets it for each stage; "
                    f"{_remedy(entry.key)}"
                )
    for key in FORBIDDEN:
        if key in shared or getattr(found, key):
            raise UserError(f"{config.path}: {key} with {STAGES}: {_remedy(key)}")
    top = {key: getattr(found, key.replace("-", "_")) or shared.get(key) for key in (*FOLDERS, *BEGINNING)}
    if not top["save"]:
        raise UserError(f"{config.path}: save is missing: name the folder below which each stage gets one of its own")
    stages: list[Stage] = []
    for number, name in enumerate(config.stages, start=1):
        folder = Path(top["save"], name)
        previous = stages[-1] if stages else None
        start = str(previous.folder) if previous else top["pretrained-checkpoint"]
        given = ["--save", str(folder), "--load", str(folder)]
        given += ["--pretrained-checkpoint", start] if start else []
        for key in FOLDERS[1:]:
            given += [f"--{key}", str(Path(own, name))] if (own := top[key]) else []
        stages.append(Stage(name, number, folder, previous, _without(config.stage(name)), tuple(others), tuple(given)))
    return tuple(stages)


def _without(config: ConfigFile) -> ConfigFile:
    entries = tuple(entry for entry in config.entries if entry.key not in (*FOLDERS, *BEGINNING))
    return ConfigFile(config.path, entries, config.launch)


def _split(overrides: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of the whole pipeline, and those that go to every stage."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for key in (*FOLDERS, *BEGINNING, "load"):
        parser.add_argument(f"--{key}")
    parser.add_argument("--finetune", action="store_true")
    return parser.parse_known_args(overrides)


def _remedy(key: str) -> str:
    return {
        "save": "give 'save' once, beside 'stages'; each stage gets a folder of its own below it",
        **dict.fromkeys(FOLDERS[1:], "give it once, beside 'stages'; each stage gets a folder of its own below it"),
        **dict.fromkeys(OF_THE_FILE, "give it once, beside 'stages'"),
    }.get(key, "name the weights to begin with as pretrained-checkpoint, beside 'stages'")
