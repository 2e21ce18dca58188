"""Tokenized documents on disk: Arrow files that are memory-mapped, and a folder that appears whole or not at all."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import pyarrow as pa

from megatron_ogpsa.data.truncation import Document
from megatron_ogpsa.system.files import file_error

_DOCUMENT_SCHEMA = pa.schema({"token_ids": pa.list_(pa.int32()), "is_supervised": pa.list_(pa.bool_())})
_ROW_SCHEMA = pa.schema({"documents": pa.list_(pa.int64())})
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
"""Of Arrow's stream format; without it a reader takes what is cut off between two batches for whole."""

_BATCH_ROWS = 512
_FEW = 0.1
"""Share of samples that may be cut, or left out, without a word."""
_ABANDONED_SECONDS = 24 * 3600
"""A folder that nothing was written to for so long has no process any more that builds in it."""


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """What became of a source's rows."""

    num_documents: int
    """Conversations kept."""
    num_unsupervised: int
    """Conversations left out because nothing in them is learnt."""
    num_end_cut: int
    """Kept conversations whose end was cut off."""
    num_prompt_cut: int
    """Kept conversations whose prompt lost its start, because it alone filled the sequence length."""
    num_tokens: int
    """Positions of all rows that hold a token, not padding."""
    num_supervised_tokens: int
    """Positions of all rows whose label is learnt."""

    def losses(self, samples: int, seq_length: int) -> Iterator[str]:
        """What of the samples is not trained on, where it is more than a few; ``samples`` are those that are kept."""
        cut = self.num_end_cut + self.num_prompt_cut
        if cut > _FEW * samples:
            yield f"{cut / samples:.0%} are cut at --seq-length {seq_length}"
        if self.num_unsupervised > _FEW * (samples + self.num_unsupervised):
            yield f"{self.num_unsupervised} hold no supervised token and are left out"


@dataclass(frozen=True)
class TokenizedDocuments:
    """Documents, the rows they are packed into (as document indices), and the summary."""

    documents: datasets.Dataset
    rows: datasets.Dataset
    summary: DataSummary


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to write into, which becomes ``target`` on success and vanishes on failure.

    Several processes may build the same target at once: renaming is atomic, the first one wins, the others drop their
    copy. What a process has left that was killed while it built this target is removed.

    Raises:
        UserError: the place cannot be written.
    """
    building = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    with writable(target.parent):
        _remove_abandoned(target)
        building.mkdir(parents=True)
        try:
            yield building
            try:
                building.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
        finally:
            shutil.rmtree(building, ignore_errors=True)


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """What the file system says of writing within, in one line; sources tell themselves that they cannot be read.

    Raises:
        UserError: with the folder and the remedy.
    """
    try:
        yield
    except OSError as error:
        raise file_error(
            error,
            f"{folder}: tokenized data cannot be written ({error.strerror or error}); free space there, or name another "
            "folder with --data-cache-path",
        ) from error


def _remove_abandoned(target: Path) -> None:
    for folder in target.parent.glob(f".{target.name}.*"):
        try:
            written = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
        except OSError:
            continue  # its process has removed it meanwhile
        if time.time() - written > _ABANDONED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def write_documents(folder: Path, documents: Iterable[Document]) -> None:
    """Write documents as they come; only a small batch is held in memory."""
    records = ({"token_ids": d.token_ids, "is_supervised": d.is_supervised} for d in documents)
    _write_arrow(folder / "documents.arrow", _DOCUMENT_SCHEMA, records)


def write_rows(folder: Path, rows: Iterable[list[int]]) -> None:
    """Write which documents each row holds."""
    _write_arrow(folder / "rows.arrow", _ROW_SCHEMA, ({"documents": row} for row in rows))


def write_summary(folder: Path, summary: DataSummary) -> None:
    """Write the summary, for :func:`read_folder`."""
    (folder / "summary.json").write_text(json.dumps(asdict(summary), indent=1) + "\n", encoding="utf-8")


def read_folder(folder: Path, *, in_memory: bool) -> TokenizedDocuments:
    """Read what the ``write_`` functions wrote.

    Args:
        folder: where they wrote it.
        in_memory: copy the data, so that the folder can be removed; otherwise it is memory-mapped.

    Raises:
        UserError: a file is missing or broken.
    """
    try:
        return TokenizedDocuments(
            documents=_read_arrow(folder / "documents.arrow", in_memory=in_memory),
            rows=_read_arrow(folder / "rows.arrow", in_memory=in_memory),
            summary=DataSummary(**json.loads((folder / "summary.json").read_text(encoding="utf-8"))),
        )
    except (OSError, ValueError, TypeError, pa.ArrowInvalid) as error:
        told = f"{folder}: broken cache ({' '.join(str(error).split())}); delete this folder"
        raise file_error(error, told) from error


def _read_arrow(path: Path, *, in_memory: bool) -> datasets.Dataset:
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - len(_END_OF_STREAM), 0))
        if file.read() != _END_OF_STREAM:
            raise ValueError(f"{path.name} is cut off")
    return datasets.Dataset.from_file(str(path), in_memory=in_memory)


def _write_arrow(path: Path, schema: pa.Schema, records: Iterable[dict[str, object]]) -> None:
    batch: list[dict[str, object]] = []
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for record in records:
            batch.append(record)
            if len(batch) == _BATCH_ROWS:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
                batch.clear()
        if batch:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
