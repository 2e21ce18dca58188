"""The tokenized set a training loop reads: built from a source once, cached, memory-mapped."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import ClassVar, Self, override

import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_ogpsa.console.progress import with_progress
from megatron_ogpsa.data.extras import extras_from_row
from megatron_ogpsa.data.messages import messages_from_row
from megatron_ogpsa.data.packing import best_fit_decreasing
from megatron_ogpsa.data.sources import RowSource, open_source
from megatron_ogpsa.data.store import (
    DataSummary,
    TokenizedDocuments,
    read_folder,
    whole_folder,
    writable,
    write_documents,
    write_rows,
    write_summary,
)
from megatron_ogpsa.data.tokenizer import ChatTokenizer
from megatron_ogpsa.data.truncation import Cut, Document, truncate
from megatron_ogpsa.errors import UserError

# Part of every fingerprint: raise it when the same input is to give other tokens, masks or files.
_FORMAT_VERSION = 4


class TokenizedRows(Dataset[dict[str, Tensor]]):
    """Rows of ``seq_length`` positions with one document, or several packed ones, and padding after them.

    An item holds CPU tensors of shape ``[seq_length]``:

    - ``tokens`` int64, and ``labels`` int64: the same shifted by one;
    - ``loss_mask`` float32: 1 where the label is a token of the assistant in the same document, so 0 at a document's
      last token and on padding;
    - ``position_ids`` int64: from 0 in each document, 0 on padding;
    - ``document_ids`` int64: 0, 1, 2, ... in the row, -1 on padding.
    """

    kind: ClassVar[str]
    """Of what is tokenized: part of the name of a folder that keeps it."""

    def __init__(self, content: TokenizedDocuments, *, seq_length: int, pad_id: int, fingerprint: str) -> None:
        """See the functions that build data sets."""
        self._documents = content.documents.with_format("numpy")
        self._rows = content.rows
        self.summary = content.summary
        self.seq_length = seq_length
        self.pad_id = pad_id
        self.fingerprint = fingerprint
        """SHA-256 (hexadecimal) of everything the items depend on: content, tokenizer, template, length, packing."""

    @classmethod
    def folder(cls, cache_dir: Path, fingerprint: str) -> Path:
        """Where ``cache_dir`` keeps the set of that fingerprint."""
        return Path(cache_dir) / f"{cls.kind}-{fingerprint[:32]}"

    @classmethod
    def read(cls, cache_dir: Path, fingerprint: str, *, seq_length: int, pad_id: int) -> Self:
        """What another process has built and told the fingerprint of: without a look at the source.

        Raises:
            UserError: it is not there, or broken.
        """
        content = read_folder(cls.folder(cache_dir, fingerprint), in_memory=False)
        return cls(content, seq_length=seq_length, pad_id=pad_id, fingerprint=fingerprint)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    @property
    def num_supervised_tokens(self) -> int:
        """Sum of the loss masks."""
        return self.summary.num_supervised_tokens

    @property
    def useful_token_share(self) -> float:
        """Share of the positions that hold a token rather than padding, 0 to 1."""
        return self.summary.num_tokens / (len(self) * self.seq_length)

    @override
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One row; see the class."""
        # One position more than the row has: the label of the last one.
        tokens = torch.full((self.seq_length + 1,), self.pad_id, dtype=torch.int64)
        loss_mask = torch.zeros(self.seq_length, dtype=torch.float32)
        position_ids = torch.zeros(self.seq_length, dtype=torch.int64)
        document_ids = torch.full((self.seq_length,), -1, dtype=torch.int64)
        begin = 0
        for number, document_index in enumerate(self._rows[index]["documents"]):
            document = self._documents[document_index]
            length = len(document["token_ids"])
            tokens[begin : begin + length] = torch.from_numpy(document["token_ids"])
            loss_mask[begin : begin + length - 1] = torch.from_numpy(document["is_supervised"][1:])
            end = begin + _positions(length, self.seq_length)
            position_ids[begin:end] = torch.arange(end - begin)
            document_ids[begin:end] = number
            begin = end
        return {
            "tokens": tokens[:-1].clone(),
            "labels": tokens[1:].clone(),
            "loss_mask": loss_mask,
            "position_ids": position_ids,
            "document_ids": document_ids,
        }


class TokenizedChatDataset(TokenizedRows):
    """Conversations; see :class:`TokenizedRows`."""

    kind = "chat"

    @property
    def num_samples(self) -> int:
        """Conversations in all rows."""
        return self.summary.num_documents


def build_chat_dataset(
    source: str,
    tokenizer: ChatTokenizer,
    *,
    seq_length: int,
    packing: bool,
    cache_dir: Path | None,
    max_samples: int | None = None,
    show_progress: bool = False,
) -> TokenizedChatDataset:
    """Read, check, tokenize and pack a source, or take the result from the cache.

    The cache knows a set by its content and not by its path. Several processes may build the same set at once; where
    they share ``cache_dir``, letting one go first saves the others the work.

    Args:
        source: see :func:`megatron_ogpsa.data.sources.open_source`.
        tokenizer: see :func:`megatron_ogpsa.data.loading.load_chat_tokenizer`.
        seq_length: positions of a row, at least 2. Longer documents are cut, see
            :func:`megatron_ogpsa.data.truncation.truncate`.
        packing: put several documents into a row; otherwise each has a row of its own.
        cache_dir: where tokenized sets are kept; ``None`` keeps this one in memory.
        max_samples: take the first so many conversations only.
        show_progress: print progress with the time left, if it takes more than a moment. For one rank only.

    Raises:
        UserError: the source or a row of it is unfit, with its line; or nothing in it is learnt.
    """
    if seq_length < 2:
        raise UserError(f"--seq-length {seq_length}: chat data needs at least 2")
    if max_samples is not None and max_samples < 1:
        raise UserError(f"{source}: {max_samples} samples asked for; take at least 1")
    opened = open_source(source)
    settings = [_FORMAT_VERSION, opened.content_hash, tokenizer.fingerprint, seq_length, packing, max_samples]
    fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def build(folder: Path) -> None:
        documents = _tokenize(opened, tokenizer, seq_length, max_samples, show_progress)
        _write(folder, source, documents, seq_length, packing)

    content = build_or_read(build, cache_dir and TokenizedChatDataset.folder(cache_dir, fingerprint))
    return TokenizedChatDataset(content, seq_length=seq_length, pad_id=tokenizer.pad_id, fingerprint=fingerprint)


def build_or_read(build: Callable[[Path], None], folder: Path | None) -> TokenizedDocuments:
    """What ``build`` writes: in memory, or in ``folder``, where it stays and is built only if it is not there."""
    if folder is None:
        with writable(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory() as temporary:
            build(Path(temporary))
            return read_folder(Path(temporary), in_memory=True)
    with writable(folder.parent):  # raises where a folder above may not be searched
        is_built = folder.is_dir()
    if not is_built:
        with whole_folder(folder) as building:
            build(building)
    return read_folder(folder, in_memory=False)


def progress_over(source: RowSource, max_samples: int | None, show_progress: bool) -> Iterator[tuple[str, object]]:
    """The rows that are asked for, with their places; a progress line if reading takes more than a moment."""
    total = min(source.num_rows, max_samples or source.num_rows)
    rows = islice(source.rows(), max_samples)
    return iter(with_progress(rows, f"tokenizing {source.name}", total, " rows", is_shown=show_progress, stays=True))


def _tokenize(
    source: RowSource, tokenizer: ChatTokenizer, seq_length: int, max_samples: int | None, show_progress: bool
) -> Iterator[tuple[Document, Cut]]:
    """Every row as a document of at most ``seq_length + 1`` tokens."""
    for where, row in progress_over(source, max_samples, show_progress):
        messages, extras = messages_from_row(row, where), extras_from_row(row, where)
        try:
            token_ids, is_supervised = tokenizer.encode_chat(messages, extras=extras)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        yield truncate(Document(token_ids, is_supervised), limit=seq_length + 1, bos_id=tokenizer.bos_id)


def _write(
    folder: Path, source: str, documents: Iterator[tuple[Document, Cut]], seq_length: int, packing: bool
) -> None:
    """Write documents, rows and summary.

    Raises:
        UserError: there is no row, or none with a supervised token.
    """
    cuts: Counter[Cut] = Counter()
    lengths: list[int] = []
    num_supervised = num_unsupervised = 0

    def supervised() -> Iterator[Document]:
        nonlocal num_supervised, num_unsupervised
        for document, cut in documents:
            if document.num_supervised == 0:
                num_unsupervised += 1
                continue
            num_supervised += document.num_supervised
            cuts[cut] += 1
            lengths.append(_positions(len(document.token_ids), seq_length))
            yield document

    write_documents(folder, supervised())
    if not lengths and not num_unsupervised:
        raise UserError(f"{source}: holds no rows; give a source with at least one")
    if not lengths:
        raise UserError(
            f"{source}: none of the {num_unsupervised} samples holds a supervised token;"
            " check that the answers are not empty and that the chat template writes assistant turns"
        )
    rows = best_fit_decreasing(lengths, seq_length) if packing else [[index] for index in range(len(lengths))]
    write_rows(folder, rows)
    summary = DataSummary(
        num_documents=len(lengths),
        num_unsupervised=num_unsupervised,
        num_end_cut=cuts[Cut.END],
        num_prompt_cut=cuts[Cut.PROMPT],
        num_tokens=sum(lengths),
        num_supervised_tokens=num_supervised,
    )
    write_summary(folder, summary)


def _positions(num_tokens: int, seq_length: int) -> int:
    """Positions a document takes in a row. A document cut to ``seq_length + 1`` has its last token as a label only."""
    return min(num_tokens, seq_length)
