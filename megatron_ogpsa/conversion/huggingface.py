"""A Hugging Face folder: what its files say, and its tensors one at a time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ogpsa.conversion.model import Piece
from megatron_ogpsa.errors import UserError, one_line
from megatron_ogpsa.system.files import file_error, is_there, read_json, write_json

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_config.json"
NAMED_TEMPLATES = "additional_chat_templates"
"""Folder of the chat templates beside the default one, ``NAME.jinja`` each."""

_CARRIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_CARRIED_NAMES = ("LICENSE", "NOTICE")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_IGNORED = ("rotary_emb.inv_freq",)
"""Buffers that old releases saved among the weights."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and what it is; a dtype that weights do not have is None."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    stored_as: str


def read_config(folder: Path) -> dict[str, Any]:
    """What ``config.json`` says.

    Raises:
        UserError: it is missing or cannot be read.
    """
    path = folder / CONFIG_FILE
    if not is_there(path):
        raise UserError(f"{folder}: not a Hugging Face folder ({CONFIG_FILE} is missing): name the folder of a model")
    return read_json(path, remedy="restore the file from where the model came")


def require_no_adapter(folder: Path) -> None:
    """That its weights are all there is of the model: transformers would load an adapter beside them as well.

    Raises:
        UserError: there is one.
    """
    if (folder / ADAPTER_FILE).exists():
        raise UserError(
            f"{folder}: holds an adapter ({ADAPTER_FILE}), which would be left out: load the model with it in PEFT, "
            "merge_and_unload() and save_pretrained() it into a new folder, and convert that one"
        )


class Weights:
    """The tensors of a folder's safetensors files. One file is open at a time, and nothing is kept of it."""

    def __init__(self, folder: Path) -> None:
        """Read the headers.

        Raises:
            UserError: no safetensors, a file of the index is missing, or one is not what it seems.
        """
        self._file: Path | None = None
        self._handle: Any = None
        self.stored: dict[str, StoredTensor] = {}
        for file in _files(folder):
            _require_readable(file)  # safetensors calls missing what may not be read
            try:
                with safe_open(file, framework="pt") as handle:
                    for name in handle.offset_keys():
                        view = handle.get_slice(name)
                        stored_as = view.get_dtype()
                        self.stored[name] = StoredTensor(
                            file, tuple(view.get_shape()), _DTYPES.get(stored_as), stored_as
                        )
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: cannot be read ({error}): restore it from where the model came") from None

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, read now."""
        stored = self.stored[name]
        if stored.file != self._file:
            self._handle = None  # unmaps the other file
            self._handle, self._file = safe_open(stored.file, framework="pt"), stored.file
        return self._handle.get_tensor(name)


def require_tensors(folder: Path, weights: Weights, pieces: list[Piece], dtype: torch.dtype | None) -> None:
    """That the folder has the tensors of the model and no others, in their shapes.

    Args:
        dtype: that they will be converted to; None to keep theirs, which then must be the same within what Megatron keeps
            as one tensor.

    Raises:
        UserError: naming the first tensor that is missing, misshaped, of another dtype, or too many.
    """
    stored = weights.stored
    dtypes: dict[str, tuple[str, torch.dtype]] = {}
    for piece in pieces:
        for name, shape in zip(piece.names, piece.shapes, strict=True):
            if name not in stored:
                raise UserError(f"{folder}: the tensor {name} is missing: restore the files, or mend {CONFIG_FILE}")
            found = stored[name]
            if found.shape != shape:
                raise UserError(
                    f"{found.file}: {name} is {list(found.shape)}, and {CONFIG_FILE} makes it {list(shape)}: mend one of them"
                )
            if found.dtype is None:
                raise UserError(f"{found.file}: {name} is {found.stored_as}: take weights in 16 or 32 bits")
            first, first_dtype = dtypes.setdefault(piece.key, (name, found.dtype))
            if dtype is None and found.dtype != first_dtype:
                raise UserError(
                    f"{found.file}: {name} is {found.dtype}, {first} is {first_dtype}, and Megatron keeps both as one: "
                    "give --dtype fp32, bf16 or fp16 for all"
                )
    expected = {name for piece in pieces for name in piece.names}
    is_tied = _HEAD not in expected
    if is_tied and _HEAD in stored and not torch.equal(weights[_HEAD], weights[_EMBEDDING]):
        raise UserError(
            f"{stored[_HEAD].file}: {_HEAD} is not {_EMBEDDING}, to which {CONFIG_FILE} ties it, so that transformers takes "
            f"both: set tie_word_embeddings to false in {CONFIG_FILE}, or remove {_HEAD}"
        )
    for name in stored:
        if name in expected or name.endswith(_IGNORED) or (is_tied and name == _HEAD):
            continue
        raise UserError(f"{stored[name].file}: the tensor {name} is not part of the model: mend {CONFIG_FILE}")


def carry_files(source: Path, target: Path) -> None:
    """Copy what is neither weights nor code: configuration, tokenizer, generation settings, chat templates, licence.

    Raises:
        UserError: one of them cannot be read.
        OSError: the file system of ``target`` refuses.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        is_carried = path.suffix in _CARRIED_SUFFIXES or path.name in _CARRIED_NAMES
        is_of_weights = path.name.endswith(".index.json") or path.name == ADAPTER_FILE
        if is_carried and path.is_file() and not is_of_weights:
            _copy(path, target / path.name)
    for path in sorted((source / NAMED_TEMPLATES).glob("*.jinja")):
        (target / NAMED_TEMPLATES).mkdir(exist_ok=True)
        _copy(path, target / NAMED_TEMPLATES / path.name)


def _copy(path: Path, target: Path) -> None:
    _require_readable(path)  # an error of both files would be told of the target
    shutil.copyfile(path, target)


def _require_readable(file: Path) -> None:
    try:
        file.open("rb").close()
    except OSError as error:
        message = f"{file}: cannot be read ({error.strerror}): make it readable, or name another folder"
        raise file_error(error, message) from None


def number_of_tokens(folder: Path) -> int | None:
    """Rows of an embedding that the folder's tokenizer can ask for, added tokens included; None if there is no tokenizer.

    Raises:
        UserError: it cannot be read or loaded.
    """
    if not any(is_there(folder / name) for name in _TOKENIZERS):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers lets through whatever its parsers raise
        raise UserError(f"{folder}: its tokenizer cannot be loaded ({one_line(error)})") from error
    return max(tokenizer.get_vocab().values(), default=-1) + 1  # there may be gaps


def write_dtype(folder: Path, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Let ``config.json`` name the weights' dtype, if it names another one; otherwise it stays byte for byte."""
    key = "dtype" if "dtype" in config else "torch_dtype"
    name = str(dtype).removeprefix("torch.")
    if config.get(key) not in (None, name):
        write_json(folder / CONFIG_FILE, {**config, key: name})


def _files(folder: Path) -> list[Path]:
    """Those that transformers reads: a single file stands before an index, which may be left of an earlier save."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        remedy = "restore it from where the model came"
        weight_map = read_json(folder / INDEX_FILE, remedy=remedy).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{folder / INDEX_FILE}: has no weight_map: {remedy}")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise UserError(f"{folder / INDEX_FILE}: names {name}, which is not a file of the folder: {remedy}")
        return [folder / name for name in names]
    if pickled := [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]:
        raise UserError(
            f"{pickled[0]}: pickled weights are not read, because they can run code: load the model once in transformers "
            "and save_pretrained() it, which writes safetensors"
        )
    raise UserError(f"{folder}: has no weights ({SINGLE_FILE} or {INDEX_FILE}): name the folder of a whole model")
