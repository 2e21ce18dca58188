"""The tokenizer that Megatron's flags name."""

from __future__ import annotations

from megatron_ogpsa.data.huggingface import load_huggingface
from megatron_ogpsa.data.sentencepieces import load_sentencepiece
from megatron_ogpsa.data.tokenizer import ChatTokenizer
from megatron_ogpsa.errors import UserError


def load_chat_tokenizer(tokenizer_type: str, tokenizer_model: str, chat_template: str | None = None) -> ChatTokenizer:
    """Load a tokenizer by Megatron's flags ``--tokenizer-type``, ``--tokenizer-model`` and ``--chat-template``.

    Args:
        tokenizer_type: ``HuggingFaceTokenizer`` or ``SentencePieceTokenizer``.
        tokenizer_model: a Hugging Face tokenizer folder (or Hub name), or a sentencepiece ``.model`` file.
        chat_template: path of a Jinja file, or the name of one in ``templates`` here; needed for sentencepiece, takes the
            place of the folder's own otherwise.

    Raises:
        UserError: something is missing, broken or unfit, with the flag to mend.
    """
    if tokenizer_type == "HuggingFaceTokenizer":
        return load_huggingface(tokenizer_model, chat_template)
    if tokenizer_type == "SentencePieceTokenizer":
        return load_sentencepiece(tokenizer_model, chat_template)
    raise UserError(
        f"--tokenizer-type {tokenizer_type}: not supported for chat data;"
        " use HuggingFaceTokenizer or SentencePieceTokenizer"
    )
