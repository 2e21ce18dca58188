"""What the projection does, in one frozen object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.references.steps import next_refresh

Granularity = Literal["tensor", "model"]
Mode = Literal["orthogonal", "conflict"]
Space = Literal["gradient", "update"]
BasisDtype = Literal["fp32", "bf16"]
BasisDevice = Literal["accelerator", "cpu"]

TORCH_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

MAX_CONFLICT_REFERENCES = 8
"""``mode="conflict"`` enumerates the 2^k active sets of a k-variable quadratic program."""


@dataclass(frozen=True, kw_only=True)
class OGPSAConfig:
    """Settings of orthogonal gradient projection (arXiv:2602.07892).

    Raises:
        UserError: a value is not one of those listed here; the message names the field and the values that are.
    """

    granularity: Granularity = "tensor"
    """What is projected together. ``tensor``: each logical (Hugging Face) tensor on its own, which is what the authors'
    released code does. ``model``: the whole model as one vector, which is what the paper's optimality is stated for."""

    mode: Mode = "conflict"
    """``conflict`` gives the nearest gradient whose inner product with every reference gradient is not negative (the cone of
    GEM, arXiv:1706.08840, eq. 11): what would help a reference stays. ``orthogonal`` removes the whole component in the
    protected subspace, which is the paper's rule. In docs/study and docs/laptop.md the former gave back more."""

    space: Space = "update"
    """What is projected. ``update``: the change of the parameters that the optimizer makes, momentum and weight decay
    included. ``gradient``: the gradient, before the optimizer's own rescaling and momentum, which is the paper's rule;
    Adam's rescaling carries it back into the protected subspace, so that it is not the default (docs/study)."""

    refresh_interval: int = 30
    """Optimizer steps from one computation of the reference gradients to the next (paper: 30 for SFT, 5 for DPO). Read by
    training loops; :func:`megatron_ogpsa.attach` itself refreshes nothing."""

    early_refreshes: bool = True
    """Whether loops refresh after 1, 2, 4, 6, 9, … steps as well, until the interval is reached (the paper: no): the weights
    move furthest at first (docs/study, docs/laptop.md)."""

    refresh_warmup: int = 0
    """Steps before each of which loops refresh, at the start of a run."""

    rank_tolerance: float = 1e-12
    """Eigenvalues of a block's unit-diagonal Gram matrix below this share of the largest are dropped. Two references at
    an angle θ have the small eigenvalue θ²/2, so the default still tells apart θ = 1e-5 (5e-11) and takes copies that
    differ by fp32 rounding (about 1e-15) for one."""

    energy: float = 1.0
    """Share of each reference gradient's square that the basis must hold in each block; the leading directions that do are
    kept and the others dropped. 1 keeps all. Every block is stored with as many rows as the largest needs."""

    basis_dtype: BasisDtype = "fp32"
    """How the basis is stored: 4 or 2 bytes for each reference and each element of the local gradient shard."""

    basis_device: BasisDevice = "accelerator"
    """Where the basis is stored: beside the gradient, or in host memory, from where every step streams it tile by
    tile."""

    check_leak: bool = False
    """Measure what the rule has left of what it is to remove after each projection, as ``metrics["leak"]``. It
    costs a second pass and one more all-reduce in every step; meant for tests and for finding faults."""

    def __post_init__(self) -> None:
        choices = {
            "granularity": Granularity,
            "mode": Mode,
            "space": Space,
            "basis_dtype": BasisDtype,
            "basis_device": BasisDevice,
        }
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise UserError(f"{name}={getattr(self, name)!r}: use one of {', '.join(get_args(kind))}")
        if self.refresh_interval < 1:
            raise UserError(
                f"refresh_interval={self.refresh_interval}: use 1 or more optimizer steps, or leave the references out "
                "to train without projection"
            )
        if self.refresh_warmup < 0:
            raise UserError(f"refresh_warmup={self.refresh_warmup}: use 0 or more optimizer steps")
        if not 0.0 < self.rank_tolerance < 1.0:
            raise UserError(f"rank_tolerance={self.rank_tolerance}: use a share between 0 and 1, such as 1e-12")
        if not 0.0 < self.energy <= 1.0:
            raise UserError(f"energy={self.energy}: use a share over 0 and up to 1, such as 0.95; 1 keeps all")
        if self.energy < 1.0 and self.mode == "conflict":
            raise UserError(
                f"energy={self.energy} with mode='conflict': its cone has a side for every whole reference; use mode "
                "'orthogonal', or energy 1"
            )

    def refreshes_at(self, step: int) -> bool:
        """Whether the step after ``step`` steps begins with a refresh, whatever else may ask for one: the first does, those
        of the warm-up, early ones, and multiples of the interval."""
        early, warmup = self.early_refreshes, self.refresh_warmup
        return step == 0 or next_refresh(step - 1, self.refresh_interval, early=early, warmup=warmup) == step

    @property
    def torch_basis_dtype(self) -> torch.dtype:
        """The dtype of the stored basis."""
        return TORCH_DTYPES[self.basis_dtype]
