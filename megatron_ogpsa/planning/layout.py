"""Which ways of splitting a model over ranks are possible, and the nearest possible one to a given way.

Pure arithmetic on what Megatron's argument parser and modules assert one by one (``training/arguments.py``,
``core/transformer``), told with a remedy. What is not covered here, uneven pipelines for one, is left to Megatron.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """What of a model and its batch must come out even; ``experts`` is 0 for a dense model."""

    layers: int
    heads: int
    query_groups: int
    ffn: int
    experts: int
    expert_ffn: int
    seq_length: int
    micro_batch: int
    global_batch: int | None
    even_stages: bool = True
    """Whether each pipeline stage has the same number of layers."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Sizes of the axes over which ``world`` ranks are laid out; data parallelism is what they leave."""

    world: int
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    """Model chunks of each pipeline rank."""
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1

    @property
    def data(self) -> int:
        """Data-parallel size; meaningful where the axes divide ``world``."""
        return self.world // (self.tensor * self.pipeline * self.context)


Subject = Literal["world size", "attention heads", "widths", "layers", "sequence length", "experts", "batch"]


@dataclass(frozen=True)
class Problem:
    """Something that does not come out even, and why, by the flag's name."""

    subject: Subject
    reason: str


def problem(model: Dimensions, mesh: Mesh) -> str | None:
    """The first thing that does not come out even, by the flag's name; None if all does."""
    return next((found.reason for found in problems(model, mesh)), None)


def problems(model: Dimensions, mesh: Mesh) -> Iterator[Problem]:
    """Everything that does not come out even. The batch is judged only where the ranks can be laid out at all."""
    ranks = mesh.tensor * mesh.pipeline * mesh.context
    if mesh.world % ranks:
        yield Problem(
            "world size",
            f"--tensor-model-parallel-size {mesh.tensor}, --pipeline-model-parallel-size {mesh.pipeline} and "
            f"--context-parallel-size {mesh.context} need a multiple of {ranks} GPUs, and there are {mesh.world}",
        )
    yield from _uneven_model(model, mesh)
    rows = model.micro_batch * mesh.data
    if not mesh.world % ranks and model.global_batch is not None and model.global_batch % rows:
        yield Problem(
            "batch",
            f"--global-batch-size {model.global_batch} is not a multiple of {rows}, which is --micro-batch-size "
            f"{model.micro_batch} times {mesh.data} data-parallel ranks",
        )


def _uneven_model(model: Dimensions, mesh: Mesh) -> Iterator[Problem]:
    tensor, expert = f"--tensor-model-parallel-size {mesh.tensor}", f"--expert-model-parallel-size {mesh.expert}"
    sliced = mesh.pipeline * mesh.virtual
    cases: tuple[tuple[int | bool, Subject, str], ...] = (
        (model.heads % mesh.tensor, "attention heads", f"{tensor} does not divide {model.heads} attention heads"),
        (
            model.query_groups % mesh.tensor and mesh.tensor % model.query_groups,
            "attention heads",
            f"{tensor} and {model.query_groups} query groups do not divide each other",
        ),
        (model.ffn % mesh.tensor, "widths", f"{tensor} does not divide the MLP's width {model.ffn}"),
        (
            model.even_stages and model.layers % sliced,
            "layers",
            f"--pipeline-model-parallel-size {mesh.pipeline}"
            + (f" with {mesh.virtual} chunks each" if mesh.virtual > 1 else "")
            + f" does not divide {model.layers} layers",
        ),
        (
            mesh.context > 1 and model.seq_length % (2 * mesh.context),
            "sequence length",
            f"--context-parallel-size {mesh.context} does not cut {model.seq_length} tokens in {2 * mesh.context} parts",
        ),
        (mesh.expert > 1 and not model.experts, "experts", f"{expert} without experts: leave it out"),
        (model.experts % mesh.expert, "experts", f"{expert} does not divide {model.experts} experts"),
        (
            model.experts and mesh.world % (mesh.expert * mesh.expert_tensor * mesh.pipeline),
            "experts",
            f"{expert}, --expert-tensor-parallel-size {mesh.expert_tensor} and --pipeline-model-parallel-size "
            f"{mesh.pipeline} need a multiple of {mesh.expert * mesh.expert_tensor * mesh.pipeline} GPUs, and there are "
            f"{mesh.world}",
        ),
        (
            model.experts and model.expert_ffn % mesh.expert_tensor,
            "experts",
            f"--expert-tensor-parallel-size {mesh.expert_tensor} does not divide an expert's width {model.expert_ffn}",
        ),
    )
    yield from (Problem(subject, reason) for is_uneven, subject, reason in cases if is_uneven)


def nearest(model: Dimensions, mesh: Mesh) -> tuple[Dimensions, Mesh] | None:
    """What works and is most like ``mesh``: first in GPUs for each copy of the model, then in the single axes.

    The world stays as it is; the global batch is rounded up to what the layout can deal out. None if nothing works.
    """
    found = [(distance(mesh, other), candidate, other) for candidate, other in _candidates(model, mesh)]
    if not found:
        return None
    _, candidate, other = min(found, key=lambda item: item[0])
    return candidate, other


def distance(mesh: Mesh, other: Mesh) -> tuple[float, float, int]:
    """How unlike two layouts are: in the number of ranks that share a model, in single axes, and, last, their size."""

    def octaves(a: int, b: int) -> float:
        return abs(math.log2(a / b))

    shared = octaves(mesh.tensor * mesh.pipeline, other.tensor * other.pipeline)
    axes = sum(
        octaves(getattr(mesh, name), getattr(other, name))
        for name in ("tensor", "pipeline", "virtual", "context", "expert", "expert_tensor")
    )
    return shared, axes, other.pipeline


def _candidates(model: Dimensions, mesh: Mesh) -> Iterator[tuple[Dimensions, Mesh]]:
    divisors = [n for n in range(1, mesh.world + 1) if mesh.world % n == 0]
    tensors = [n for n in divisors if model.heads % n == 0]
    pipelines = [n for n in divisors if n <= model.layers]
    virtuals = {1, mesh.virtual}
    contexts = {1, mesh.context}
    experts = [n for n in divisors if model.experts and model.experts % n == 0] or [1]
    for tensor, pipeline, virtual, context, expert in product(tensors, pipelines, virtuals, contexts, experts):
        if virtual > 1 and pipeline == 1:
            continue
        other = replace(mesh, tensor=tensor, pipeline=pipeline, virtual=virtual, context=context, expert=expert)
        other = replace(other, expert_tensor=min(mesh.expert_tensor, tensor))
        if mesh.world % (tensor * pipeline * context):
            continue
        rows = model.micro_batch * other.data
        batch = None if model.global_batch is None else -(-model.global_batch // rows) * rows
        candidate = replace(model, global_batch=batch)
        if problem(candidate, other) is None:
            yield candidate, other
