"""Layouts as data: a new one is one line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model is sharded, and what of the model matters for it.

    Attributes:
        tp, pp, vpp, dp: sizes of the mesh axes; vpp is the number of model chunks per rank.
        distributed_optimizer: shard optimizer state over data parallelism.
        overlap: reduce gradients bucket by bucket during the backward pass.
        precision: of parameters and gradients: fp32; bf16 with fp32 gradients; bf16 with bf16 gradients.
        model: what differs from the default ``ModelShape``.
    """

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    dp: int = 1
    distributed_optimizer: bool = True
    overlap: bool = False
    precision: str = "fp32"
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp


LAYOUTS: dict[str, Layout] = {
    "tp2": Layout(tp=2),
    "pp2": Layout(pp=2),
    "dp2": Layout(dp=2),
    "dp2-overlap": Layout(dp=2, overlap=True),
    "dp2-plain": Layout(dp=2, distributed_optimizer=False),
    "tp2-plain": Layout(tp=2, distributed_optimizer=False),
    "tp2-mqa": Layout(tp=2, model={"query_groups": 1}),
    "tp2-qkv-bias": Layout(tp=2, model={"qkv_bias": True, "qk_norm": True}),
    "tp2-tied": Layout(tp=2, model={"tied": True}),
    "pp2-tied": Layout(pp=2, model={"tied": True}),
    "tp2-pp2": Layout(tp=2, pp=2),
    "tp2-dp2": Layout(tp=2, dp=2),
    "tp2-dp2-plain": Layout(tp=2, dp=2, distributed_optimizer=False),
    "pp2-vpp2-dp2": Layout(pp=2, vpp=2, dp=2),
    "pp2-dp2-tied": Layout(pp=2, dp=2, model={"tied": True}),
}

PRECISIONS: dict[str, Layout] = {
    "dp2-bf16": Layout(dp=2, precision="bf16"),
    "dp2-bf16-grads": Layout(dp=2, precision="bf16-grads"),
    "dp2-bf16-plain": Layout(dp=2, precision="bf16", distributed_optimizer=False),
    "dp2-bf16-grads-plain": Layout(dp=2, precision="bf16-grads", distributed_optimizer=False),
    "tp2-bf16-grads": Layout(tp=2, precision="bf16-grads"),
    "tp2-fp16": Layout(tp=2, precision="fp16"),
    "dp2-fp16-plain": Layout(dp=2, precision="fp16", distributed_optimizer=False),
}
