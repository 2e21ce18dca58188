"""How an exported model is talked to: by the chat template of its training, up to the token that it learnt to end on.

A base model has neither, so that whoever serves it would prompt it in another form, and wait for an end that never comes.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ogpsa.conversion.huggingface import CONFIG_FILE, NAMED_TEMPLATES
from megatron_ogpsa.data.messages import Message
from megatron_ogpsa.data.template import ChatTemplate, is_shipped
from megatron_ogpsa.errors import UserError, one_line
from megatron_ogpsa.system.files import read_json, write_json

_TEMPLATE_FILE = "chat_template.jinja"
_OLD_TEMPLATE_FILE = "chat_template.json"
_TOKENIZER_FILE = "tokenizer_config.json"
_GENERATION_FILE = "generation_config.json"
_REMEDY = "restore it from where the model came"
_DEFAULT = "default"
_QUESTION: list[Message] = [{"role": "user", "content": "What is the capital of France?"}]


def carry_chat(source: Path, folder: Path, trained: Namespace | None) -> list[str]:
    """Let a Hugging Face folder chat as its model was trained; what does already stays byte for byte.

    Args:
        source: with the tokenizer.
        folder: what is exported, into which the files of ``source`` have been carried.
        trained: arguments in the checkpoint; a run of ours has ``chat_template_text`` and ``chat_end_id`` among them
            (:func:`megatron_ogpsa.integration.inputs.datasets.chat_tokenizer`).

    Returns:
        What the user is told: what was written, or could not be.

    Raises:
        UserError: a file of the source cannot be read, or its tokenizer lacks the token that ends answers.
    """
    text, end_id = getattr(trained, "chat_template_text", None), getattr(trained, "chat_end_id", None)
    if text is None:
        return []
    try:
        tokenizer = _tokenizer_of(source)
    except UserError as error:
        return [f"chat template and stop tokens are as in the folder: {error}"]
    if end_id is not None:
        _require_token(source, tokenizer, end_id)
    notes = []
    own = _default(tokenizer)
    if own is None or not _stands_for(own, text, tokenizer):
        named = _write_template(source, folder, text, tokenizer)
        stay = f"; {', '.join(named)} as in the folder" if named else ""
        notes.append(f"{_TEMPLATE_FILE}: the chat template of the training{stay}")
    if end_id is not None and end_id not in (before := _ends_of_generation(source)):
        _write_ends(source, folder, [*before, end_id])
        end = tokenizer.convert_ids_to_tokens(end_id)
        notes.append(f"{_GENERATION_FILE}: generation ends at {end} too, which ends answers in the training")
    return notes


def _tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers lets through whatever its parsers raise
        raise UserError(f"its tokenizer cannot be loaded ({one_line(error)})") from error


def _require_token(source: Path, tokenizer: Any, token_id: int) -> None:
    if token_id not in tokenizer.get_vocab().values():
        raise UserError(
            f"{source}: its tokenizer has no token {token_id}, in which answers end in the training: name with --hf a folder "
            "with the tokenizer of the training"
        )


def _default(tokenizer: Any) -> str | None:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:  # there is none, or several of which none is the default
        return None


def _stands_for(own: str, text: str, tokenizer: Any) -> bool:
    """Whether the folder's own template prompts as that of the training does.

    One that comes with this project marks what is to be learnt, and is meant to make the prompts of a model's own.
    """
    if own == text or not is_shipped(text):
        return own == text
    variables = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    thinks = {"enable_thinking": True}  # as without a word on it, which is how models are served
    try:
        prompts = {
            ChatTemplate(template, variables, _TEMPLATE_FILE).render(
                _QUESTION, add_generation_prompt=True, extras=thinks
            )
            for template in (own, text)
        }
    except UserError:  # the folder's own cannot even ask
        return False
    return len(prompts) == 1


def _write_template(source: Path, folder: Path, text: str, tokenizer: Any) -> list[str]:
    """In the one place that is read first, beside which there are only named templates.

    Returns:
        The names of these.
    """
    known = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    named = {name: template for name, template in known.items() if name != _DEFAULT}
    for name, template in named.items():
        _write_named(source, folder / NAMED_TEMPLATES, name, template)
    (folder / _TEMPLATE_FILE).write_text(text, encoding="utf-8")
    (folder / _OLD_TEMPLATE_FILE).unlink(missing_ok=True)
    path = source / _TOKENIZER_FILE
    if path.is_file() and "chat_template" in (settings := read_json(path, remedy=_REMEDY)):
        write_json(folder / path.name, {name: value for name, value in settings.items() if name != "chat_template"})
    return sorted(named)


def _write_named(source: Path, folder: Path, name: str, template: str) -> None:
    """Unless it is there: until transformers 5 all of them were in ``tokenizer_config.json``."""
    path = folder / f"{name}.jinja"
    if path.parent != folder:
        raise UserError(f"{source / _TOKENIZER_FILE}: the chat template {name!r} cannot be a file's name: rename it")
    if not path.exists():
        folder.mkdir(exist_ok=True)
        path.write_text(template, encoding="utf-8")


def _ends_of_generation(source: Path) -> list[int]:
    """Tokens that end it: those of the generation settings, or else of the configuration."""
    for name in (_GENERATION_FILE, CONFIG_FILE):
        if (source / name).is_file():
            ends = read_json(source / name, remedy=_REMEDY).get("eos_token_id")
            if ends is not None:
                return list(ends) if isinstance(ends, list) else [ends]
    return []


def _write_ends(source: Path, folder: Path, ends: list[int]) -> None:
    path = source / _GENERATION_FILE
    settings: Mapping[str, Any] = read_json(path, remedy=_REMEDY) if path.is_file() else _settings_of(source)
    write_json(folder / path.name, {**settings, "eos_token_id": ends if len(ends) > 1 else ends[0]})


def _settings_of(source: Path) -> dict[str, Any]:
    """What generation goes by where it has no file of its own."""
    config = read_json(source / CONFIG_FILE, remedy=_REMEDY)
    return {name: config[name] for name in ("bos_token_id", "pad_token_id") if config.get(name) is not None}
