"""Where rows come from: JSON Lines, JSON, parquet, a saved ``datasets`` folder, or a set of the Hub.

Every row comes with its place, such as ``train.jsonl:17``, so that whoever finds fault with it can name it. Rows are
streamed: no source but a JSON array is held in memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import packaged_modules

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.system.files import file_error, may_pass

LocatedRow = tuple[str, object]

_HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*(/[\w.-]+)?)(:(?P<split>[^/]+))?")
_CONFIGURATION = re.compile(r"^([\w.-]+):")
_CHUNK_BYTES = 1 << 20
_PARQUET_ROWS = 256
_MOST_LINE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class RowSource:
    """A source that exists and can be read; its rows are not checked yet."""

    name: str
    """As the user wrote it."""
    scan: Callable[[], tuple[str, int]]
    """Reads all of it, once it is asked for either, for :attr:`content_hash` and :attr:`num_rows`."""
    rows: Callable[[], Iterator[LocatedRow]]
    """Yields (place, raw row); raises UserError at a row that cannot be read."""

    @property
    def content_hash(self) -> str:
        """SHA-256 (hexadecimal) of the content, wherever it lies. Raises UserError."""
        return self._scanned[0]

    @property
    def num_rows(self) -> int:
        """For progress only: blank lines of a JSON Lines file are counted. Raises UserError."""
        return self._scanned[1]

    @cached_property
    def _scanned(self) -> tuple[str, int]:
        try:
            return self.scan()
        except OSError as error:
            raise _unreadable(self.name, error) from error


def open_source(source: str) -> RowSource:
    """Find out what ``source`` is and open it.

    Args:
        source: a ``.jsonl``, ``.json`` or ``.parquet`` file, a folder written by ``datasets.Dataset.save_to_disk``, or
            ``name[:configuration][:split]`` of a set of the Hugging Face Hub (split ``train`` unless given).

    Raises:
        UserError: it does not exist, is empty, or is of no known kind.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    try:
        if path.is_dir():
            return _open_folder(source, path)
        if path.is_file():
            if path.stat().st_size == 0:
                raise UserError(f"{source}: the file is empty; give a file with at least one row")
            if suffix in (".jsonl", ".json"):
                return _open_json(source, path, suffix)
            if suffix == ".parquet":
                return _open_parquet(source, path)
            raise UserError(f"{source}: unknown kind of file {suffix!r}; use .jsonl, .json or .parquet")
    except OSError as error:
        raise _unreadable(source, error) from error
    name, split = _name_on_hub(source)
    return _open_hub(source, name, split)


def _unreadable(source: str, error: OSError) -> UserError:
    return file_error(error, f"{source}: cannot be read ({error.strerror or error}); check the file")


def require_source(source: str) -> None:
    """Find out whether there is something to open, without reading it; names of the Hub are not looked up.

    Raises:
        UserError: no such file or folder.
    """
    try:
        is_there = Path(source).exists()
    except OSError as error:
        raise file_error(error, f"{source}: cannot be read ({error.strerror}); check the path") from error
    if not is_there:
        _name_on_hub(source)


def _name_on_hub(source: str) -> tuple[str, str]:
    """Name and split."""
    if Path(source).exists():  # a pipe would keep us waiting, /dev/zero would never end
        raise UserError(f"{source}: not a regular file; give a .jsonl, .json or .parquet file")
    match = _HUB_NAME.fullmatch(source)
    if match is None or Path(source).suffix.lower() in (".jsonl", ".json", ".parquet"):
        raise UserError(f"{source}: no such file; check the path (it is relative to {Path.cwd()})")
    name, split = match["name"], match["split"] or "train"
    if Path(name).exists():  # datasets would take the folder for a set, with whatever kinds of file it finds there
        raise UserError(f"{source}: {name} is here and not on the Hub; give a file in it or a folder of save_to_disk")
    if name in packaged_modules._PACKAGED_DATASETS_MODULES:  # such as "json": datasets would read the current folder
        raise UserError(f"{source}: {name} is a kind of file, not a set of the Hub; give the path of a file")
    return name, split


def _open_json(source: str, path: Path, suffix: str) -> RowSource:
    is_array = _first_character(path) == b"[" and suffix == ".json"
    rows = _json_array_rows if is_array else _json_lines_rows
    return RowSource(name=source, scan=lambda: _scan_json(path), rows=lambda: rows(source, path))


def _first_character(path: Path) -> bytes:
    """The first byte that is no white space; empty if there is none."""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            if start := chunk.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]:
                return start
    return b""


def _scan_json(path: Path) -> tuple[str, int]:
    digest, num_lines = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            num_lines += chunk.count(b"\n")
    return digest.hexdigest(), max(num_lines, 1)


def _json_lines_rows(source: str, path: Path) -> Iterator[LocatedRow]:
    for number, line in enumerate(_decoded_lines(source, path, most_bytes=_MOST_LINE_BYTES), start=1):
        if text := line.strip():
            where = f"{source}:{number}"
            yield where, _parse_line(text, where)


def _parse_line(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        fault = f"{error.msg} at column {error.colno}"
        raise UserError(f"{where}: not valid JSON ({fault}); write one JSON object per line") from error
    except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise UserError(f"{where}: JSON too deep or too long to read ({error}); remove the row") from error


def _json_array_rows(source: str, path: Path) -> Iterator[LocatedRow]:
    """The elements of a top-level array one by one, so that each is known by the line it starts on."""
    text = "".join(_decoded_lines(source, path, most_bytes=None))  # json.dump writes all of an array on one line
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    line, counted = 1, 0

    def advance(position: int) -> tuple[int, str]:
        nonlocal line, counted
        end = cast(re.Match[str], space.match(text, position)).end()
        line, counted = line + text.count("\n", counted, end), end
        return end, text[end : end + 1]

    position, _ = advance(0)
    position, character = advance(position + 1)
    while character != "]":
        try:
            row, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise UserError(f"{source}:{error.lineno}: not valid JSON ({error.msg}); mend the array") from error
        except (RecursionError, ValueError) as error:
            raise UserError(f"{source}:{line}: JSON too deep or too long to read ({error}); remove the row") from error
        yield f"{source}:{line}", row
        position, character = advance(end)
        if character == ",":
            position, _ = advance(position + 1)
        elif character != "]":
            raise UserError(f"{source}:{line}: not valid JSON (',' or ']' expected); mend the array")
    _, character = advance(position + 1)
    if character:
        raise UserError(f"{source}:{line}: not valid JSON (text after the array); mend the array")


def _decoded_lines(source: str, path: Path, *, most_bytes: int | None) -> Iterator[str]:
    offset = 0
    try:
        with path.open("rb") as file:
            for number in count(1):
                line = file.readline(-1 if most_bytes is None else most_bytes + 1)
                if not line:
                    return
                if most_bytes is not None and len(line) > most_bytes:
                    raise UserError(f"{source}:{number}: a line of more than {most_bytes >> 20} MiB; remove the row")
                yield _decode(line, f"{source}:{number}", offset)
                offset += len(line)
    except OSError as error:
        raise _unreadable(source, error) from error


def _decode(line: bytes, where: str, offset: int) -> str:
    """Text of one line that starts ``offset`` bytes into its file; a byte order mark at the file's start is dropped."""
    try:
        return line.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        fault = f"byte 0x{error.object[error.start]:02x} at offset {offset + error.start} of the file"
        raise UserError(f"{where}: not UTF-8 ({fault}); save the file as UTF-8") from error


def _open_parquet(source: str, path: Path) -> RowSource:
    try:
        num_rows = pq.ParquetFile(path).metadata.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise file_error(error, f"{source}: not a parquet file ({_first_line(error)}); write it again") from error
    return RowSource(
        name=source,
        scan=lambda: (_hash_files([path]), num_rows),
        rows=lambda: _located(source, _parquet_rows(path)),
    )


def _parquet_rows(path: Path) -> Iterator[object]:
    for batch in pq.ParquetFile(path).iter_batches(batch_size=_PARQUET_ROWS):
        for row in batch.to_pylist():
            yield _unfilled_row(row, batch.schema)


def _unfilled_row(row: dict[str, object], schema: pa.Schema) -> dict[str, object]:
    kinds = dict(zip(schema.names, schema.types, strict=True))
    return {name: _unfilled(value, kinds.get(name)) for name, value in row.items()}


def _unfilled(value: object, kind: pa.DataType | None) -> object:
    """A field without the nulls with which a column gives each object within it, a tool's call say, the fields of all others.

    What is no struct has nulls of its own: objects of unlike kinds, which ``datasets`` 5 keeps as JSON, in parquet as text of
    that type.
    """
    if isinstance(value, str) and isinstance(kind, pa.JsonType):
        return json.loads(value)
    if isinstance(value, list):
        inner = getattr(kind, "value_type", None)
        return [_unfilled(element, inner) for element in value]
    if isinstance(value, dict) and kind is not None and pa.types.is_struct(kind):
        kinds = {field.name: field.type for field in kind}
        return {name: _unfilled(field, kinds.get(name)) for name, field in value.items() if field is not None}
    return value


def _open_folder(source: str, path: Path) -> RowSource:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in path.iterdir() if child.is_dir())
        raise UserError(
            f"{source}: holds several splits ({', '.join(splits)}); name one, for example {path / splits[0]}"
        )
    if not (path / "state.json").is_file():
        raise UserError(f"{source}: is a directory; give a file in it or a folder written by datasets' save_to_disk")
    try:
        dataset = cast(datasets.Dataset, datasets.load_from_disk(str(path)))
        for table in (dataset.data, dataset._indices):
            if (
                table is not None
            ):  # Arrow trusts offsets and lengths that it has not looked at, even beyond the file's end
                table.validate(full=True)
        return _source_of_dataset(source, dataset)
    except Exception as error:  # the library lets through whatever the descriptions of features and files make it raise
        remedy = "mend the file system" if may_pass(error) else "save it again"
        raise file_error(error, f"{source}: broken datasets folder ({_first_line(error)}); {remedy}") from error


def _open_hub(source: str, name: str, split: str) -> RowSource:
    try:
        names = [name, *_CONFIGURATION.findall(split)]
        dataset = datasets.load_dataset(*names, split=_CONFIGURATION.sub("", split))
    except Exception as error:  # network, authorisation, format and builder failures share no base class
        raise UserError(
            f"{source}: no such file or folder, and the Hub gives no set {name!r} with split {split!r}"
            f" ({type(error).__name__}: {_first_line(error)}); check the name, the split and the network"
        ) from error
    return _source_of_dataset(source, cast(datasets.Dataset, dataset))


def _source_of_dataset(source: str, dataset: datasets.Dataset) -> RowSource:
    # The Arrow files alone do not tell which of their rows a split takes; the fingerprint does.
    content_hash = _hash_files([Path(file["filename"]) for file in dataset.cache_files], seed=dataset._fingerprint)
    return RowSource(
        name=source,
        scan=lambda: (content_hash, len(dataset)),
        rows=lambda: _located(source, (_unfilled_row(row, dataset.data.schema) for row in dataset)),
    )


def _located(source: str, rows: Iterable[object]) -> Iterator[LocatedRow]:
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            yield f"{source}: row {number}", row
    except Exception as error:  # Arrow's and Python's own, of any kind: text that is no UTF-8, dates that are none
        remedy = "mend the file system" if may_pass(error) else "write the file again"
        raise file_error(
            error, f"{source}: row {number + 1} cannot be read ({_first_line(error)}); {remedy}"
        ) from error


def _hash_files(paths: list[Path], seed: str = "") -> str:
    digest = hashlib.sha256(seed.encode())
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
