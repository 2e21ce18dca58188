"""Chats through the fast tokenizers of the transformers library."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import override

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_ogpsa.data.template import ChatTemplate, Span, read_template_file
from megatron_ogpsa.data.tokenizer import ChatTokenizer, sha256_of
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.system.files import file_error


class HuggingFaceChatTokenizer(ChatTokenizer):
    """A fast tokenizer of the transformers library."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, pad_id: int) -> None:
        """See :func:`load_huggingface`."""
        self._tokenizer = tokenizer
        self.template = template
        self.pad_id = pad_id
        self.vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)

    @override
    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoding["input_ids"], encoding["offset_mapping"]

    @override
    def decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    @property
    @override
    def bos_id(self) -> int | None:
        return self._tokenizer.bos_token_id

    @property
    @override
    def eos_id(self) -> int | None:
        return self._tokenizer.eos_token_id

    @cached_property
    @override
    def fingerprint(self) -> str:
        vocabulary = self._tokenizer.backend_tokenizer.to_str()
        return sha256_of(vocabulary.encode(), self.template, self.pad_id)


@contextmanager
def _hub_retries_unseen() -> Iterator[None]:
    """A misspelt folder is taken for a name on the Hub, which each rank would ask many times, with a line each time."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def load_huggingface(folder: str, chat_template: str | None) -> HuggingFaceChatTokenizer:
    """Load the tokenizer of a folder or of the Hub; the parameters and errors are those of ``load_chat_tokenizer``."""
    flag = f"--tokenizer-model {folder}"
    try:
        is_local, is_there = Path(folder).is_dir(), Path(folder).exists()
    except OSError as error:  # as where a folder above may not be searched
        raise file_error(error, f"{flag}: cannot be read ({error.strerror}); check the folder") from error
    if not is_local and (is_there or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", folder)):
        raise UserError(f"{flag}: not a folder; give a folder with tokenizer.json, or a name on the Hub")
    try:
        with _hub_retries_unseen():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=is_local, trust_remote_code=False)
    except Exception as error:  # transformers lets through whatever its parsers and the network raise
        fault = (str(error).strip() or type(error).__name__).splitlines()[0]
        found = "" if is_local else "there is no such folder here, and from the Hub "
        raise file_error(error, f"{flag}: {found}no tokenizer could be loaded ({fault}); check the folder") from error
    if not tokenizer.is_fast:
        raise UserError(f"{flag}: a slow tokenizer, which knows no character offsets; save a fast one (tokenizer.json)")
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad_id is None:
        raise UserError(f"{flag}: has neither a padding nor an end-of-sequence token; set one in tokenizer_config.json")
    variables = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    if chat_template is not None:
        template = ChatTemplate(read_template_file(chat_template), variables, chat_template)
    else:
        try:
            source = tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError(
                f"{flag}: has no (default) chat template; give one with --chat-template FILE.jinja"
            ) from error
        template = ChatTemplate(source, variables, f"{folder} (chat template)")
    return HuggingFaceChatTokenizer(tokenizer, template, pad_id)
