"""``model.yaml`` beside a converted checkpoint: the model as Megatron's flags, which a configuration takes over."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ogpsa.conversion.families import Flags

MODEL_FILE = "model.yaml"
CARRIED_FOLDER = "huggingface"
"""Folder within a converted one: ``config.json``, tokenizer, generation settings."""


def as_yaml(flags: Flags) -> str:
    """One flag a line, as a configuration has them."""
    return "".join(f"{key}: {_scalar(value)}\n" for key, value in flags.items())


def write_model_file(folder: Path, flags: Flags, source: Path) -> None:
    """Write ``model.yaml``.

    Raises:
        OSError: the file system refuses.
    """
    head = f"# The model of {source.name} as Megatron's flags. In a configuration: 'model: FOLDER'.\n"
    (folder / MODEL_FILE).write_text(head + as_yaml(flags), encoding="utf-8")


def _scalar(value: bool | int | float | str) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
