"""The file that the reference policy's log-probabilities are kept in, written again after each round of passes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.system.files import file_error, is_there, write_atomically

_FORMAT = "2"


@dataclass(frozen=True)
class LogProbs:
    """log π_ref of (chosen, rejected) for the pairs of some data sets, laid end to end; sums over an answer's tokens.

    Attributes:
        values_N2: fp64, N pairs.
        is_known_N: bool; the others are still to be computed.
        weights: fingerprint of the reference policy's weights.
        data: fingerprint of each data set (content, tokenizer, template, sequence length).
        settings: what else they depend on, by name: what the model computes with its weights, and in which precision.
    """

    values_N2: Tensor
    is_known_N: Tensor
    weights: str
    data: tuple[str, ...]
    settings: Mapping[str, str]

    @classmethod
    def unknown(cls, num_pairs: int, *, weights: str, data: tuple[str, ...], settings: Mapping[str, str]) -> LogProbs:
        """Nothing computed yet."""
        values = torch.zeros(num_pairs, 2, dtype=torch.float64)
        return cls(values, torch.zeros(num_pairs, dtype=torch.bool), weights, data, settings)

    def with_round(self, values_N2: Tensor, is_new_N: Tensor) -> LogProbs:
        """These and the log-probabilities of one more round."""
        values = torch.where(is_new_N[:, None], values_N2, self.values_N2)
        return replace(self, values_N2=values, is_known_N=self.is_known_N | is_new_N)

    @property
    def is_complete(self) -> bool:
        """Whether every pair's are known."""
        return bool(self.is_known_N.all())


def write_log_probs(path: Path, log_probs: LogProbs) -> None:
    """Replace the file at once: a reader, or a run that starts after a crash, sees the old content or the new.

    Raises:
        UserError: the place cannot be written.
    """
    tensors = {"log_probs": log_probs.values_N2, "is_known": log_probs.is_known_N.to(torch.uint8)}
    metadata = {"format": _FORMAT, "weights": log_probs.weights, "data": json.dumps(log_probs.data)}
    metadata["settings"] = json.dumps(dict(log_probs.settings))
    metadata["sha256"] = _digest(metadata, tensors)
    try:
        write_atomically(path, save(tensors, metadata))
    except OSError as error:
        raise file_error(
            error, f"--save: {path} cannot be written ({error.strerror}): free space or choose another folder"
        ) from None


def read_log_probs(path: Path) -> LogProbs | None:
    """What the file holds; ``None`` if there is no file.

    Raises:
        UserError: the file is torn, changed, or of another format; or it cannot be told whether there is one.
    """
    if not is_there(path):
        return None
    damaged = f"{path} is damaged: delete it (a new run computes it again) or restore it"
    if not path.is_file():  # a pipe would keep us waiting
        raise UserError(damaged)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
        weights, data = metadata["weights"], tuple(json.loads(metadata["data"]))
        settings = dict(json.loads(metadata.get("settings", "{}")))  # absent from format 1
    except (SafetensorError, OSError, MemoryError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise file_error(error, f"{damaged} ({error})") from None
    digest = metadata.pop("sha256", "")
    if not _are_log_probs(tensors) or digest != _digest(metadata, tensors):
        raise UserError(damaged)
    if metadata.get("format") != _FORMAT:
        raise UserError(f"{path} was written by another version of megatron-ogpsa: delete it, and start DPO anew")
    return LogProbs(tensors["log_probs"], tensors["is_known"].bool(), weights, data, settings)


def _are_log_probs(tensors: dict[str, Tensor]) -> bool:
    found = {name: (tensor.dtype, list(tensor.shape[1:])) for name, tensor in tensors.items()}
    return found == {"log_probs": (torch.float64, [2]), "is_known": (torch.uint8, [])} and (
        len(tensors["log_probs"]) == len(tensors["is_known"])
    )


def _digest(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """SHA-256 (hexadecimal) of all that the file says."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
