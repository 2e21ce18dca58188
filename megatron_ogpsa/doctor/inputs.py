"""What a run reads: the tokenizer with its chat template, and data in which something is learnt."""

from __future__ import annotations

from typing import Literal

from megatron_ogpsa.data import (
    ChatTokenizer,
    TokenizedChatDataset,
    TokenizedPreferenceDataset,
    build_chat_dataset,
    build_preference_dataset,
    load_chat_tokenizer,
    source_kind,
)
from megatron_ogpsa.data.sources import open_source
from megatron_ogpsa.data.tokenizer import ENDLESS_TURN, ENDLESS_TURN_REMEDY
from megatron_ogpsa.doctor.findings import Finding, fail, ok, warn
from megatron_ogpsa.errors import UserError

MOST_ROWS = 2000
"""Rows of a source that are tokenized: seconds, however large it is."""

Kind = Literal["chat", "preference"]

_EXAMPLE = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."}]


def load_tokenizer(kind: str | None, model: str | None, chat_template: str | None) -> ChatTokenizer:
    """By Megatron's flags.

    Raises:
        UserError: a flag is missing, or nothing can be loaded.
    """
    if kind is None:
        raise UserError("--tokenizer-type is missing: HuggingFaceTokenizer or SentencePieceTokenizer")
    if model is None:
        raise UserError("--tokenizer-model is missing: give a tokenizer's folder, or a sentencepiece .model file")
    return load_chat_tokenizer(kind, model, chat_template)


def check_tokenizer(tokenizer: ChatTokenizer, *, rows: int | None) -> Finding:
    """Whether the chat template tells the assistant's turns apart, and the embedding has a row for each token.

    Args:
        rows: of the model's embedding, where a flag gives them.

    Raises:
        UserError: the template cannot write a conversation.
    """
    if rows is not None and tokenizer.vocab_size > rows:
        return fail(
            "tokenizer",
            f"{tokenizer.vocab_size} tokens, and the model's embedding has only {rows} rows",
            "leave --vocab-size and --padded-vocab-size out, or make them larger",
        )
    _, is_supervised = tokenizer.encode_chat(_EXAMPLE)
    if not any(is_supervised):
        return fail("tokenizer", "the chat template writes no turn of the assistant", "give another --chat-template")
    text = f"{tokenizer.vocab_size} tokens, with a chat template"
    if tokenizer.turn_end_id is None:
        return warn("tokenizer", f"{text}; {ENDLESS_TURN}", ENDLESS_TURN_REMEDY)
    return ok("tokenizer", f"{text}; an answer ends with token {' or '.join(map(str, tokenizer.eos_ids))}")


def check_data(
    name: str,
    source: str,
    tokenizer: ChatTokenizer,
    *,
    kind: Kind,
    seq_length: int,
    packing: bool,
    needed: int,
    most: int | None = None,
) -> Finding:
    """Whether a source can be read and holds supervised tokens.

    Args:
        name: of the finding.
        kind: what the loss needs.
        seq_length: of a row of the batch; a preference pair shares it.
        needed: rows of the batch that must be filled at least.
        most: samples that the run takes at most.

    Raises:
        UserError: it cannot be read, a row is wrong, or nothing in it is learnt.
    """
    if (found := source_kind(source)) != kind:
        text = f"{source} holds {found} data, and {kind} data is needed"
        return fail(name, text, "name another source, or change --ogpsa-stage or --ogpsa-reference-loss")
    limit = min(MOST_ROWS, most or MOST_ROWS)
    rows = open_source(source).num_rows
    build = build_chat_dataset if kind == "chat" else build_preference_dataset
    dataset: TokenizedChatDataset | TokenizedPreferenceDataset = build(
        source, tokenizer, seq_length=seq_length, packing=packing, cache_dir=None, max_samples=limit
    )
    samples = dataset.num_samples
    unit = "conversations" if kind == "chat" else "pairs"
    part = f"the first {limit:,} rows of {source}" if rows > limit else source
    text = f"{part}: {samples:,} {unit}, {dataset.summary.num_supervised_tokens:,} supervised tokens"
    if rows <= limit and len(dataset) < needed:
        in_rows = f" in {len(dataset)} packed rows" if packing else ""
        remedy = "add data, or lower --micro-batch-size or the number of ranks"
        return fail(name, f"{text}{in_rows}, and a micro-batch on each data-parallel rank needs {needed}", remedy)
    notes = list(dataset.summary.losses(samples, seq_length))
    if notes:
        remedy = "raise --seq-length, or shorten or mend the samples"
        return warn(name, f"{text}; {', '.join(notes)}", remedy)
    return ok(name, text)
