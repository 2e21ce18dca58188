"""Tokenized preference pairs: both answers of a pair lie in one row and go through the model together."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import override

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from megatron_ogpsa.data.dataset import TokenizedRows, build_or_read, progress_over
from megatron_ogpsa.data.extras import Extras, extras_from_row
from megatron_ogpsa.data.packing import best_fit_decreasing
from megatron_ogpsa.data.preferences import PreferencePair, pair_from_row
from megatron_ogpsa.data.sources import RowSource, open_source
from megatron_ogpsa.data.store import DataSummary, write_documents, write_rows, write_summary
from megatron_ogpsa.data.tokenizer import ChatTokenizer
from megatron_ogpsa.data.truncation import Cut, Document, truncate_pair
from megatron_ogpsa.errors import UserError

# Part of every fingerprint: raise it when the same input is to give other tokens, masks or files.
_FORMAT_VERSION = 5

MIN_SEQ_LENGTH = 8
"""Two documents with a prompt and an answer each."""


class TokenizedPreferenceDataset(TokenizedRows):
    """Rows of one pair, or of several whole pairs; see :class:`TokenizedRows`.

    In a row document 2j is the chosen and 2j + 1 the rejected answer of its pair j, each after the prompt; only answers
    are supervised. An item has one tensor more: ``pair_ids`` int64 ``[max_pairs_per_row]``, the numbers of the row's
    pairs in the order of the source, -1 where the row has fewer.
    """

    kind = "pairs"

    @property
    def num_pairs(self) -> int:
        """Pairs in all rows."""
        return self.summary.num_documents // 2

    @property
    def num_samples(self) -> int:
        """Pairs in all rows."""
        return self.num_pairs

    @cached_property
    def max_pairs_per_row(self) -> int:
        """Most pairs that a row holds."""
        return int(pc.max(pc.list_value_length(self._documents_of_rows)).as_py()) // 2

    @property
    def row_of_pair(self) -> Tensor:
        """int64 ``[num_pairs]``: the row that each pair is in, found without reading a token."""
        pairs_of_rows = torch.tensor(pc.list_value_length(self._documents_of_rows).to_numpy()) // 2
        documents = torch.tensor(pc.list_flatten(self._documents_of_rows).to_numpy())
        row_of_pair = torch.empty(self.num_pairs, dtype=torch.int64)
        row_of_pair[documents[::2] // 2] = torch.arange(len(self)).repeat_interleave(pairs_of_rows)
        return row_of_pair

    @property
    def _documents_of_rows(self) -> pa.ChunkedArray:
        return self._rows.data.column("documents")

    @override
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One row; see the class."""
        pair_ids = torch.full((self.max_pairs_per_row,), -1, dtype=torch.int64)
        pairs = [document // 2 for document in self._rows[index]["documents"][::2]]
        pair_ids[: len(pairs)] = torch.tensor(pairs)
        return super().__getitem__(index) | {"pair_ids": pair_ids}


def build_preference_dataset(
    source: str,
    tokenizer: ChatTokenizer,
    *,
    seq_length: int,
    packing: bool,
    cache_dir: Path | None,
    max_samples: int | None = None,
    show_progress: bool = False,
) -> TokenizedPreferenceDataset:
    """As :func:`~megatron_ogpsa.data.dataset.build_chat_dataset`, for rows that :func:`pair_from_row` takes.

    Each document has at most ``seq_length // 2`` tokens, so that a pair fits into a row; longer ones are cut as
    :func:`truncate_pair` says. ``packing`` puts several pairs into a row, each of them whole.

    Raises:
        UserError: the source or a row of it is unfit, with its line.
    """
    if seq_length < MIN_SEQ_LENGTH:
        raise UserError(f"--seq-length {seq_length}: preference pairs need at least {MIN_SEQ_LENGTH}")
    if max_samples is not None and max_samples < 1:
        raise UserError(f"{source}: {max_samples} samples asked for; take at least 1")
    opened = open_source(source)
    settings = [
        "preference",
        _FORMAT_VERSION,
        opened.content_hash,
        tokenizer.fingerprint,
        seq_length,
        packing,
        max_samples,
    ]
    fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def build(folder: Path) -> None:
        _write(folder, opened, tokenizer, seq_length, packing, max_samples, show_progress)

    content = build_or_read(build, cache_dir and TokenizedPreferenceDataset.folder(cache_dir, fingerprint))
    return TokenizedPreferenceDataset(content, seq_length=seq_length, pad_id=tokenizer.pad_id, fingerprint=fingerprint)


def _encode(pair: PreferencePair, extras: Extras, tokenizer: ChatTokenizer, where: str) -> tuple[Document, Document]:
    """Both answers, each after the prompt: the tokens that supervised fine-tuning on prompt and answer would have.

    Prompt and answer are tokenized as one text. Where a token straddles their border, the two documents' prompts may
    differ in their last token; the border is found in each by characters, not by counting tokens.
    """
    documents = []
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        try:
            token_ids, is_supervised = tokenizer.encode_chat(
                pair.prompt + answer, answer_from=len(pair.prompt), extras=extras
            )
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if not any(is_supervised[1:]) or is_supervised[0]:
            raise UserError(
                f"{where}: {name!r} has no token to learn after the prompt; check that the chat template writes "
                "assistant turns"
            )
        documents.append(Document(token_ids, is_supervised))
    if documents[0].token_ids == documents[1].token_ids:
        raise UserError(
            f"{where}: 'chosen' and 'rejected' are the same once the chat template has written them, so nothing is "
            "preferred; remove the row"
        )
    return documents[0], documents[1]


def _write(
    folder: Path,
    source: RowSource,
    tokenizer: ChatTokenizer,
    seq_length: int,
    packing: bool,
    max_samples: int | None,
    show_progress: bool,
) -> None:
    cuts: Counter[Cut] = Counter()
    lengths: list[int] = []
    num_supervised = 0

    def documents() -> Iterator[Document]:
        nonlocal num_supervised
        for where, row in progress_over(source, max_samples, show_progress):
            chosen, rejected = _encode(pair_from_row(row, where), extras_from_row(row, where), tokenizer, where)
            chosen, rejected, cut = truncate_pair(chosen, rejected, limit=seq_length // 2, bos_id=tokenizer.bos_id)
            cuts[cut] += 1
            lengths.append(len(chosen.token_ids) + len(rejected.token_ids))
            num_supervised += chosen.num_supervised + rejected.num_supervised
            yield chosen
            yield rejected

    write_documents(folder, documents())
    if not lengths:
        raise UserError(f"{source.name}: holds no rows; give a source with at least one")
    pairs = best_fit_decreasing(lengths, seq_length) if packing else [[index] for index in range(len(lengths))]
    write_rows(folder, ([document for pair in row for document in (2 * pair, 2 * pair + 1)] for row in pairs))
    summary = DataSummary(
        num_documents=2 * len(lengths),
        num_unsupervised=0,
        num_end_cut=cuts[Cut.END],
        num_prompt_cut=cuts[Cut.PROMPT],
        num_tokens=sum(lengths),
        num_supervised_tokens=num_supervised,
    )
    write_summary(folder, summary)
