"""What the ranks run to show the projection of updates: the weights after some steps, against one fp64 process."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_ogpsa import OGPSAConfig, attach
from megatron_ogpsa.errors import UnsupportedError
from megatron_ogpsa.sharding.gradients import _model_and_main_params, leaf_optimizers
from tests.core import oracle
from tests.core.cases import planted, refresh_planted
from tests.core.gradients import canonical_gradient, plant
from tests.core.layouts import ALL_LAYOUTS
from tests.core.megatron_model import Training, build
from tests.core.rule_cases import opposed

LEARNING_RATE = 0.03  # a step of some 10 % of the weights: what fp32 weights round is small beside it
STEPS = 3


def main_weights(training: Training) -> oracle.Tensors:
    """The fp32 main parameters of all ranks as full tensors; copies on several ranks must be equal."""
    return canonical_gradient(training, lambda param, main, held: main.detach())


def copies_agree(training: Training) -> bool:
    """Whether this rank's parts of the model's own parameters are its main parameters, rounded."""
    for leaf in leaf_optimizers(training.optimizer):
        for param, main in () if getattr(leaf, "is_stub_optimizer", False) else _model_and_main_params(leaf):
            held = slice(0, param.numel())
            if isinstance(leaf, DistributedOptimizer):
                shard = leaf._get_model_param_range_map(param)["param"]
                held = slice(shard.start, shard.end)
            own = main.detach().view(-1)
            if hasattr(param, "_quantizer"):
                agree = _is_rounded_to_fp8(param.dequantize().detach().view(-1)[held].float(), own)
            else:
                agree = torch.equal(param.detach().view(-1)[held], own.to(param.dtype))
            if not agree:
                return False
    return True


def _is_rounded_to_fp8(values: Tensor, main: Tensor) -> bool:
    """E4M3 has 3 bits of mantissa and smallest steps of 2^-9, here of 448th parts of the largest magnitude at most.

    Delayed scales are one before there is a history: steps of 2^-9 then.
    """
    allowed = main.abs() * 2.0**-4 + max(float(main.abs().max()) / 448, 1.0) * 2.0**-9
    return bool(((values - main).abs() <= allowed).all())


def reference_optimizer(weights: oracle.Tensors, kind: str) -> torch.optim.Optimizer:
    """In fp64, with the defaults of Megatron's configuration."""
    if kind == "adam":
        return torch.optim.AdamW(weights.values(), lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    return torch.optim.SGD(weights.values(), lr=LEARNING_RATE, momentum=0.9, weight_decay=0.01)


def update_parity(layout: str, settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each setting: steps with new references and a new gradient each time.

    Args:
        settings: fields of the config, ``optimizer``, and ``outside_chain`` with what to clip to: the plugin holds the
            only optimizer of a chain.
    """
    from megatron.core import parallel_state

    results = []
    for number, setting in enumerate(settings):
        config = {key: value for key, value in setting.items() if key not in ("optimizer", "outside_chain")}
        if number:
            parallel_state.destroy_model_parallel()
        results.append(_update_parity(layout, setting["optimizer"], config, setting.get("outside_chain")))
    return results


def _update_parity(layout: str, kind: str, config: dict[str, Any], outside_chain: float | None) -> dict[str, Any]:
    sharding = ALL_LAYOUTS[layout]
    shape = oracle.ModelShape(**sharding.model)
    weights_at_start = oracle.random_weights(shape, seed=1)
    clip_grad = outside_chain or 0.0
    training = build(sharding, weights_at_start, optimizer=kind, clip_grad=clip_grad, lr=LEARNING_RATE)
    if outside_chain is not None:
        (training.optimizer,) = training.optimizer.chained_optimizers
    names = [name for name in oracle.shapes_of(shape) if not sharding.is_frozen(name)]
    ogpsa = attach(
        training.optimizer,
        training.chunks,
        OGPSAConfig(**{"mode": "orthogonal", "space": "update", "check_leak": True} | config),
    )
    start = main_weights(training)
    weights = {name: tensor.clone() for name, tensor in start.items()}
    optimizer = reference_optimizer(weights, kind)
    scale = training.optimizer.get_loss_scale().item()
    remove = oracle.conflict if config.get("mode") == "conflict" else None
    leaks, lengths = [], []
    for step in range(STEPS):
        tensors = [{name: tensor.bfloat16().double() for name, tensor in t.items()} for t in _draw(shape, names, step)]
        *references, gradient = tensors
        refresh_planted(training, ogpsa, references, scale)
        plant(training, gradient, scale)
        success, _, _ = training.optimizer.step()
        assert success
        norm = ogpsa.metrics["grad_norm_before"]  # Megatron's own, before any projection
        assert abs(norm / oracle.norm(gradient) - 1) < 1e-5, norm
        before = {name: tensor.clone() for name, tensor in weights.items()}
        for name, tensor in weights.items():
            tensor.grad = gradient[name].clone()
        optimizer.step()
        # An update goes against the gradient; which way the cone lies is told of gradients.
        descent = {name: before[name] - weights[name] for name in names}
        projected = oracle.project(descent, references, config["granularity"], remove)
        for name, tensor in weights.items():
            tensor.copy_(before[name] - projected[name])
        leaks.append(ogpsa.metrics["leak"])
        removed = {name: descent[name] - projected[name] for name in names}
        lengths.append(abs(ogpsa.metrics["removed_length"] / oracle.norm(removed) - 1))
    actual = main_weights(training)
    moved = {name: weights[name] - start[name] for name in names}
    return {
        "error": oracle.relative_error({name: actual[name] - start[name] for name in names}, moved),
        "leak": max(leaks),
        "length_error": max(lengths),
        "removed": ogpsa.metrics["removed"],
        "copies_agree": sharding.overlap_param_gather or copies_agree(training),
    }


def _draw(shape: oracle.ModelShape, names: list[str], step: int) -> list[oracle.Tensors]:
    tensors = opposed(shape, names, 3, None)
    turn = torch.Generator().manual_seed(77 + step)
    return [
        {name: tensor + 0.5 * torch.randn(tensor.shape, generator=turn).double() for name, tensor in t.items()}
        for t in tensors
    ]


def refused(layout: str) -> str:
    """Why updates are not projected here."""
    training = build(ALL_LAYOUTS[layout], oracle.random_weights(oracle.ModelShape(), seed=1))
    try:
        attach(training.optimizer, training.chunks, OGPSAConfig(space="update"))
    except UnsupportedError as error:
        return str(error)
    return ""


def figures_on_the_device(layout: str) -> dict[str, bool]:
    """Of one projected step: that nobody has waited for what only a log wants, and that both forms tell the same."""
    shape = oracle.ModelShape(**ALL_LAYOUTS[layout].model)
    training = build(ALL_LAYOUTS[layout], oracle.random_weights(shape, seed=1))
    ogpsa = attach(training.optimizer, training.chunks, OGPSAConfig())
    *references, gradient = planted(shape, 3, integers=False)
    refresh_planted(training, ogpsa, references, 1.0)
    plant(training, gradient, 1.0)
    training.optimizer.step()
    waits = isinstance(ogpsa._space.figures["removed_length"], Tensor)
    tensors = ogpsa.metrics_on(torch.device("cpu"))
    same = {name: float(torch.tensor(value)) for name, value in ogpsa.metrics.items()}
    return {"on the device": waits, "the same": {name: float(tensor) for name, tensor in tensors.items()} == same}
