"""Chats through sentencepiece models."""

from __future__ import annotations

import hashlib
import re
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, override

import sentencepiece

from megatron_ogpsa.data.template import ChatTemplate, Span, read_template_file
from megatron_ogpsa.data.tokenizer import ChatTokenizer, sha256_of
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.system.files import file_error


class SentencePieceChatTokenizer(ChatTokenizer):
    """A sentencepiece model.

    Its control pieces (``<s>``, ``</s>``) never match text inside sentencepiece, but a chat template writes them as
    text. So the text is split at them: they become their ids, and what stands between is encoded piece by piece.
    """

    def __init__(
        self, model: sentencepiece.SentencePieceProcessor, model_bytes: bytes, template: ChatTemplate, pad_id: int
    ) -> None:
        """See :func:`load_sentencepiece`."""
        self._model = model
        self._model_hash = hashlib.sha256(model_bytes).digest()
        self.template = template
        self.pad_id = pad_id
        self.vocab_size = model.get_piece_size()
        self._control_ids = {
            model.id_to_piece(token_id): token_id for token_id in range(self.vocab_size) if model.is_control(token_id)
        }
        longest_first = sorted(self._control_ids, key=len, reverse=True)
        self._control_pieces = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")  # (?!) never matches

    @override
    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        token_ids: list[int] = []
        offsets: list[Span] = []
        controls = [match.span() for match in self._control_pieces.finditer(text)]
        for (_, begin), (end, next_begin) in pairwise([(0, 0), *controls, (len(text), len(text))]):
            for token_id, first, last in self._pieces(text[begin:end]):
                token_ids.append(token_id)
                offsets.append((begin + first, begin + last))
            if next_begin > end:
                token_ids.append(self._control_ids[text[end:next_begin]])
                offsets.append((end, next_begin))
        return token_ids, offsets

    def _pieces(self, text: str) -> list[tuple[int, int, int]]:
        """(id, begin, end) of each piece, in characters of the text before normalisation."""
        if hasattr(self._model, "EncodeAsOffsetMapping"):  # sentencepiece >= 0.2.2
            mapping = self._model.encode(text, return_type="offset_mapping")
            return [(token_id, *span) for token_id, span in zip(mapping["ids"], mapping["offsets"], strict=True)]
        older: Any = self._model  # its stubs know nothing of what later versions removed
        pieces = older.encode(text, out_type="immutable_proto").pieces
        return [(piece.id, piece.begin, piece.end) for piece in pieces]

    @override
    def decode(self, token_ids: list[int]) -> str:
        return str(self._model.decode(token_ids))

    @property
    @override
    def bos_id(self) -> int | None:
        return _known_id(self._model.bos_id())

    @property
    @override
    def eos_id(self) -> int | None:
        return _known_id(self._model.eos_id())

    @cached_property
    @override
    def fingerprint(self) -> str:
        return sha256_of(self._model_hash, self.template, self.pad_id)


def load_sentencepiece(file: str, chat_template: str | None) -> SentencePieceChatTokenizer:
    """Load a ``.model`` file; the parameters and errors are those of ``load_chat_tokenizer``."""
    flag = f"--tokenizer-model {file}"
    if chat_template is None:
        raise UserError(f"{flag}: a sentencepiece model has no chat template; give one with --chat-template FILE.jinja")
    try:
        model_bytes = Path(file).read_bytes()
        model = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(model_bytes)
    except OSError as error:
        raise file_error(error, f"{flag}: {error.strerror}; give the path of a sentencepiece .model file") from error
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{flag}: not a sentencepiece model; give the .model file that training wrote") from error
    special_ids = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id(), "unk": model.unk_id()}
    variables = {f"{name}_token": model.id_to_piece(i) for name, i in special_ids.items() if _known_id(i) is not None}
    pad_id = _known_id(model.pad_id())
    if pad_id is None:
        pad_id = _known_id(model.eos_id())
    if pad_id is None:
        raise UserError(
            f"{flag}: has neither a padding nor an end-of-sequence piece; train it with --eos_id or --pad_id"
        )
    template = ChatTemplate(read_template_file(chat_template), variables, chat_template)
    return SentencePieceChatTokenizer(model, model_bytes, template, pad_id)


def _known_id(token_id: int) -> int | None:
    """Sentencepiece says -1 for a special piece that a model does not have."""
    return token_id if token_id >= 0 else None
