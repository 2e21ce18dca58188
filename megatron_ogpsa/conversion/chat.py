"""How an exported model is talked to: by the chat template of its training, up to the token that it learnt to end on.

A base model has neither, so that whoever serves it would prompt it in another form, and wait for an end that never comes.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ogpsa.conversion.huggingface import CONFIG_FILE
from megatron_ogpsa.data.template import is_shipped
from megatron_ogpsa.errors import UserError, one_line
from megatron_ogpsa.system.files import read_json, write_json

_TEMPLATE_FILE = "chat_template.jinja"
_OLD_TEMPLATE_FILE = "chat_template.json"
_TOKENIZER_FILE = "tokenizer_config.json"
_GENERATION_FILE = "generation_config.json"
_REMEDY = "restore it from where the model came"


def carry_chat(folder: Path, trained: Namespace | None) -> list[str]:
    """Let a Hugging Face folder chat as its model was trained; what does already stays byte for byte.

    Args:
        folder: what is exported, with its tokenizer.
        trained: arguments in the checkpoint; a run of ours has ``chat_template_text`` and ``chat_end_id`` among them
            (:func:`megatron_ogpsa.integration.inputs.datasets.chat_tokenizer`).

    Returns:
        What the user is told: what was written, or could not be.

    Raises:
        UserError: a file of the folder cannot be read.
    """
    text, end_id = getattr(trained, "chat_template_text", None), getattr(trained, "chat_end_id", None)
    if text is None:
        return []
    try:
        tokenizer = _tokenizer_of(folder)
    except UserError as error:
        return [f"chat template and stop tokens are as in the folder: {error}"]
    notes = []
    # A template that comes with this project marks what is to be learnt, and makes the prompts of the model's own.
    if tokenizer.chat_template is None or (_default(tokenizer) != text and not is_shipped(text)):
        _write_template(folder, text)
        notes.append(f"{_TEMPLATE_FILE}: the chat template of the training")
    if end_id is not None and end_id not in (before := _ends_of_generation(folder)):
        _write_ends(folder, [*before, end_id])
        end = tokenizer.convert_ids_to_tokens(end_id)
        notes.append(f"{_GENERATION_FILE}: generation ends at {end} too, which ends answers in the training")
    return notes


def _tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers lets through whatever its parsers raise
        raise UserError(f"its tokenizer cannot be loaded ({one_line(error)})") from error


def _default(tokenizer: Any) -> str | None:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:  # several, and none is the default
        return None


def _write_template(folder: Path, text: str) -> None:
    """In the one place that is read first, and nowhere else."""
    (folder / _TEMPLATE_FILE).write_text(text, encoding="utf-8")
    (folder / _OLD_TEMPLATE_FILE).unlink(missing_ok=True)
    path = folder / _TOKENIZER_FILE
    if path.is_file() and "chat_template" in (settings := read_json(path, remedy=_REMEDY)):
        write_json(path, {name: value for name, value in settings.items() if name != "chat_template"})


def _ends_of_generation(folder: Path) -> list[int]:
    """Tokens that end it: those of the generation settings, or else of the configuration."""
    for name in (_GENERATION_FILE, CONFIG_FILE):
        if (folder / name).is_file():
            ends = read_json(folder / name, remedy=_REMEDY).get("eos_token_id")
            if ends is not None:
                return list(ends) if isinstance(ends, list) else [ends]
    return []


def _write_ends(folder: Path, ends: list[int]) -> None:
    path = folder / _GENERATION_FILE
    settings: Mapping[str, Any] = read_json(path, remedy=_REMEDY) if path.is_file() else _settings_of(folder)
    write_json(path, {**settings, "eos_token_id": ends if len(ends) > 1 else ends[0]})


def _settings_of(folder: Path) -> dict[str, Any]:
    """What generation goes by where it has no file of its own."""
    config = read_json(folder / CONFIG_FILE, remedy=_REMEDY)
    return {name: config[name] for name in ("bos_token_id", "pad_token_id") if config.get(name) is not None}
