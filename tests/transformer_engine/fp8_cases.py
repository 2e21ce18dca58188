"""What the ranks run to show that FP8 state is put back: real Transformer Engine modules, over the emulated kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ogpsa import attach
from megatron_ogpsa.precision.fp8_state import FIRST_MICRO_BATCH, ModuleState, has_forward_scales, quantizing_modules
from megatron_ogpsa.precision.passes_without_fp8 import without_fp8
from megatron_ogpsa.references.gradients import refresh
from tests.core import oracle
from tests.core.cases import batch_of
from tests.core.gradients import reduced_gradient
from tests.core.layouts import ALL_LAYOUTS
from tests.core.megatron_model import Training, build
from tests.core.pass_cases import _reference

STEPS = 3


def build_fp8(layout: str) -> Training:
    """A model in ``layout``, with random weights."""
    sharding = ALL_LAYOUTS[layout]
    return build(sharding, oracle.random_weights(oracle.ModelShape(**sharding.model), seed=1))


def fp8_state(training: Training) -> dict[str, Tensor]:
    """Scales, histories, and Megatron's marks of the modules."""
    found: dict[str, Tensor] = {}
    for number, module in enumerate(quantizing_modules(training.chunks)):
        found[f"{number}.first"] = torch.tensor(getattr(module, FIRST_MICRO_BATCH, False) or False)
        for key, state in module.fp8_meta.items():
            if hasattr(state, "amax_history"):
                found |= {f"{number}.{key}.{part}": getattr(state, part).clone() for part in ("scale", "amax_history")}
    return found


def train(layout: str, refreshes: bool, in_bf16: bool = False) -> dict[str, Any]:
    """Three steps, each after a refresh whose basis is not used: the weights and FP8 state at the end, and what the
    refreshes changed or left."""
    training = build_fp8(layout)
    changed, caches_left = [], 0
    ogpsa = attach(training.optimizer, training.chunks)
    ogpsa.enabled = False
    for step in range(STEPS):
        if refreshes:
            before = fp8_state(training)
            _refresh(training, ogpsa, layout, is_first_step=step == 0, in_bf16=in_bf16)
            after = fp8_state(training)
            changed += [name for name, value in before.items() if not torch.equal(value, after[name])]
            caches_left += sum(len(module._fp8_workspaces) for module in quantizing_modules(training.chunks))
        training.gradient(batch_of(training.shape, 100 + step))
        training.optimizer.step()
    weights = {name: _plain(param) for name, param in training.chunks[0].named_parameters()}
    return {"changed": changed, "caches left": caches_left, "end": weights | fp8_state(training)}


def _plain(param: torch.nn.Parameter) -> Tensor:
    """Of weights in FP8, the values that they stand for."""
    with torch.no_grad():
        return (param.dequantize() if hasattr(param, "_quantizer") else param.detach()).clone()


def _refresh(
    training: Training, ogpsa: Any, layout: str, *, is_first_step: bool, in_bf16: bool = False, factor: float = 1.0
) -> None:
    references = [
        _reference(name, batch_of(training.shape, seed), layout) for seed, name in enumerate(("math", "chat"))
    ]
    refresh(
        ogpsa,
        [replace(reference, forward_step=_times(factor, reference.forward_step)) for reference in references],
        optimizer=training.optimizer,
        chunks=training.chunks,
        forward_backward=get_forward_backward_func(),
        seq_length=training.shape.positions,
        micro_batch_size=training.layout.micro_batch,
        is_first_step=is_first_step,
        in_bf16=in_bf16,
    )


def _times(factor: float, forward_step: Callable[..., Any]) -> Callable[..., Any]:
    def scaled(*args: Any, **kwargs: Any) -> Any:
        output, loss = forward_step(*args, **kwargs)

        def of_output(*outputs: Any) -> Any:
            total, *others = loss(*outputs)
            return (factor * total, *others)

        return output, of_output

    return scaled


def first_gradients(layout: str) -> dict[str, float]:
    """Cosines of a reference's gradient in fp32 with the same in delayed FP8, of a refresh before the first step.

    Of a loss that is a thousandth, as losses on pairs of answers may be.
    """
    training = build_fp8(layout)
    exact = oracle.gradient(training.shape, oracle.random_weights(training.shape, seed=1), batch_of(training.shape, 0))
    return {
        name: _cosine(exact, _captured(training, layout, is_first_step=finds_scales, factor=1e-3))
        for name, finds_scales in (("with scales", True), ("without", False))
    }


def gradients_without_fp8(layout: str) -> dict[str, Any]:
    """A reference's gradient without FP8, beside that of a model in bf16 with the same weights, and whether it is the same
    after a step's passes in FP8. FP8 weights are what their rounded values are in bf16.
    """
    training = build_fp8(layout)
    _sum_weights_gradients_up_in_fp32(training)
    found = _captured(training, layout, in_bf16=True)
    training.gradient(batch_of(training.shape, 100))
    last_pass = _of_the_last_pass(training)
    again = _captured(training, layout, in_bf16=True)
    last_pass_after = _of_the_last_pass(training)
    in_fp8 = _captured(training, layout)
    config = training.chunks[0].module.config
    config.moe_router_padding_for_quantization = True  # the dispatcher that gloo has does not look at it
    with without_fp8(training.chunks):
        settings = [(config.fp8, config.moe_router_padding_for_quantization)]
    settings.append((config.fp8, config.moe_router_padding_for_quantization))
    weights = [_plain(param) for param in training.chunks[0].parameters()]
    parallel_state.destroy_model_parallel()
    in_bf16 = build(
        replace(ALL_LAYOUTS[layout], fp8=None, fp8_params=False), oracle.random_weights(training.shape, seed=1)
    )
    with torch.no_grad():
        for param, value in zip(in_bf16.chunks[0].parameters(), weights, strict=True):
            param.copy_(value)
    if not ALL_LAYOUTS[layout].fp8_params:
        _sum_weights_gradients_up_in_fp32(in_bf16)
    expected = _captured(in_bf16, layout)
    return {
        "differ": [name for name in expected if not torch.equal(found[name], expected[name])],
        "differ after a step": [name for name in expected if not torch.equal(again[name], expected[name])],
        "cosine in FP8": _cosine(in_fp8, expected),
        "settings": settings,
        "last passes": (last_pass, last_pass_after),
    }


def _of_the_last_pass(training: Training) -> list[tuple[bool, ...]]:
    """What each module notes: whether it was in FP8, and so, whether its scales belong into a checkpoint."""
    modules = quantizing_modules(training.chunks)
    return [(module.fp8, module.fp8_initialized, module.fp8_meta["fp8_checkpoint"]) for module in modules]


def _sum_weights_gradients_up_in_fp32(training: Training) -> None:
    """In the products, as on a GPU (``gradient_accumulation_fusion``)."""
    for module in training.chunks[0].modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _captured(
    training: Training, layout: str, *, is_first_step: bool = False, in_bf16: bool = False, factor: float = 1.0
) -> oracle.Tensors:
    """The reduced gradient of the first reference of a refresh."""
    captured: list[oracle.Tensors] = []
    ogpsa = attach(training.optimizer, training.chunks)
    capture = ogpsa.capture

    def recording(name: str, *, loss_scale: float | None = None) -> None:
        captured.append(reduced_gradient(training))
        capture(name)

    ogpsa.capture = recording  # type: ignore[method-assign]
    _refresh(training, ogpsa, layout, is_first_step=is_first_step, in_bf16=in_bf16, factor=factor)
    ogpsa.detach()
    return captured[0]


def _cosine(left: oracle.Tensors, right: oracle.Tensors) -> float:
    flat = [torch.cat([tensors[name].double().flatten() for name in sorted(left)]) for tensors in (left, right)]
    return float(torch.nn.functional.cosine_similarity(*flat, dim=0))


def history_of_another_length(length: int) -> list[Any]:
    """One module's histories and scales, put back after a pass that made the histories as long as its flag says."""
    training = build_fp8("te-dp2-fp8-delayed")
    batch = batch_of(training.shape, 0)
    found = [has_forward_scales(training.chunks)]
    training.gradient(batch)
    found.append(has_forward_scales(training.chunks))
    module = quantizing_modules(training.chunks)[0]
    states = [module.fp8_meta[key] for key in ("scaling_fwd", "scaling_bwd")]
    in_use = len(states[0].amax_history)
    for state in states:
        numbers = torch.arange(1.0, length * state.amax_history.shape[1] + 1).view(length, -1)
        state.amax_history = numbers
        state.scale.fill_(3.0)
    saved = ModuleState.of(module)
    for state in states:
        state.amax_history = torch.full((in_use, state.amax_history.shape[1]), 9.0)
        state.scale.fill_(7.0)
    saved.restore()
    return [found, in_use, *((state.amax_history, state.scale) for state in states)]
