"""What the ranks of a distributed test run; each function is a job of the harness and returns plain numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ogpsa import OGPSAConfig, attach
from tests.core import oracle
from tests.core.layouts import LAYOUTS
from tests.core.megatron_model import Batch, Training, build, canonical_gradient

REFERENCES = ("math", "chat", "code")
ROWS = 8


def batch_of(shape: oracle.ModelShape, seed: int) -> Batch:
    """Random rows, half of them common to all seeds so that gradients overlap and the projection removes much.

    Rows have random numbers of supervised tokens, so that micro-batches weigh differently.
    """

    def rows(row_seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(row_seed)
        tokens = torch.randint(0, shape.vocabulary, (ROWS // 2, shape.positions + 1), generator=generator)
        mask = (torch.rand(ROWS // 2, shape.positions, generator=generator) < 0.6).float()
        mask[:, 0] = 1.0
        return tokens, mask

    (common, common_mask), (own, own_mask) = rows(0), rows(seed + 1)
    tokens, mask = torch.cat((common, own)), torch.cat((common_mask, own_mask))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask


def projected_gradient(training: Training) -> tuple[oracle.Tensors, Any]:
    """Step once and return the gradient that the inner optimizer saw, and what the step returned."""
    seen: dict[int, Tensor] = {}

    def record() -> bool:
        for group in training.optimizer.param_groups:
            for param in group["params"]:
                seen[id(param)] = param.grad.clone()
        return True

    training.optimizer.step_with_ready_grads = record
    result = training.optimizer.step()
    del training.optimizer.step_with_ready_grads
    return canonical_gradient(training, lambda main: seen[id(main)]), result


def refresh(training: Training, ogpsa: Any, batches: dict[str, Batch]) -> bool:
    ogpsa.begin_refresh()
    for name, batch in batches.items():
        training.gradient(batch)
        ogpsa.capture(name)
    return bool(ogpsa.finish_refresh())


def parity(layout: str, granularity: str, basis_dtype: str = "fp32") -> dict[str, float]:
    """The projected gradient of one step in ``layout`` against one unsharded fp64 process."""
    shape = oracle.ModelShape(**LAYOUTS[layout].model)
    weights = oracle.random_weights(shape, seed=1)
    training = build(LAYOUTS[layout], weights, clip_grad=0.0)
    ogpsa = attach(
        training.optimizer,
        training.chunks,
        OGPSAConfig(granularity=granularity, basis_dtype=basis_dtype, check_leak=True),  # type: ignore[arg-type]
    )
    references = {name: batch_of(shape, seed) for seed, name in enumerate(REFERENCES)}
    safety = batch_of(shape, seed=100)
    refresh(training, ogpsa, references)
    training.gradient(safety)
    actual, (_, grad_norm, _) = projected_gradient(training)

    plain = oracle.gradient(shape, weights, safety)
    reference_gradients = [oracle.gradient(shape, weights, batch) for batch in references.values()]
    expected = oracle.project(plain, reference_gradients, granularity)
    return {
        "error": oracle.relative_error(actual, expected),
        "norm_error": abs(float(grad_norm) / oracle.norm(expected) - 1),
        "removed": ogpsa.metrics["removed"],
        "expected_removed": 1 - (oracle.norm(expected) / oracle.norm(plain)) ** 2,
        "rank": ogpsa.metrics["rank"],
        "leak": ogpsa.metrics["leak"],
        "num_blocks": len(ogpsa.block_names),
        "expected_num_blocks": len(weights) if granularity == "tensor" else 1,
        "world_size": dist.get_world_size(),
    }
