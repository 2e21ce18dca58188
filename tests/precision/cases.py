"""What the ranks run to show that FP8 state is put back: a Megatron model whose linear layers round to FP8."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_ogpsa import attach
from megatron_ogpsa.references import refresh
from tests.core import oracle
from tests.core.cases import batch_of
from tests.core.gradients import reduced_gradient
from tests.core.layouts import LAYOUTS
from tests.core.megatron_model import Training, build
from tests.core.pass_cases import _reference
from tests.precision.stand_in import FP8GlobalStateManager, TransformerEngineBaseModule, installed

STEPS = 3


def build_fp8(layout: str, recipe: str) -> Training:
    """A model in ``layout`` with FP8 modules in its layers; scales are updated where Transformer Engine updates them."""
    sharding = LAYOUTS[layout]
    training = build(sharding, oracle.random_weights(oracle.ModelShape(**sharding.model), seed=1))
    for chunk in training.chunks:
        config = get_model_config(chunk)
        config.fp8, config.fp8_recipe = "hybrid", recipe
        layers = [m for m in chunk.module.decoder.modules() if isinstance(m, (ColumnParallelLinear, RowParallelLinear))]
        for layer in layers:
            layer.te = TransformerEngineBaseModule(layer, recipe)

        def at_the_end(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
            if torch.is_grad_enabled():
                FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=True)
                output.register_hook(lambda _: FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False))

        chunk.module.register_forward_hook(at_the_end)
    return training


def fp8_state(training: Training) -> dict[str, Tensor]:
    """Scales, histories, and the marks of the modules."""
    found: dict[str, Tensor] = {}
    for name, module in training.chunks[0].named_modules():
        if isinstance(module, TransformerEngineBaseModule):
            found[f"{name}.first"] = torch.tensor(module.is_first_microbatch)
            for key, state in module.fp8_meta.items():
                if hasattr(state, "scale"):
                    found |= {
                        f"{name}.{key}.{part}": getattr(state, part).clone() for part in ("scale", "amax_history")
                    }
    return found


def train(layout: str, recipe: str, refreshes: bool) -> dict[str, Any]:
    """Three steps, each after a refresh whose basis is not used: the weights and FP8 state at the end, and what the
    refreshes changed or left."""
    with installed():
        training = build_fp8(layout, recipe)
        changed, caches_left = [], 0
        ogpsa = attach(training.optimizer, training.chunks)
        ogpsa.enabled = False
        for step in range(STEPS):
            if refreshes:
                before = fp8_state(training)
                _refresh(training, ogpsa, layout, is_first_step=step == 0)
                after = fp8_state(training)
                changed += [name for name, value in before.items() if not torch.equal(value, after[name])]
                caches_left += sum(len(module._fp8_workspaces) for module in _modules(training))
            for module in _modules(training):
                module.is_first_microbatch = True  # as Megatron's schedules do for models that it built in FP8
            training.gradient(batch_of(training.shape, 100 + step))
            training.optimizer.step()
        weights = {name: param.detach().clone() for name, param in training.chunks[0].named_parameters()}
        return {"changed": changed, "caches left": caches_left, "end": weights | fp8_state(training)}


def _modules(training: Training) -> list[TransformerEngineBaseModule]:
    return [m for chunk in training.chunks for m in chunk.modules() if isinstance(m, TransformerEngineBaseModule)]


def _refresh(training: Training, ogpsa: Any, layout: str, *, is_first_step: bool) -> None:
    refresh(
        ogpsa,
        [_reference(name, batch_of(training.shape, seed), layout) for seed, name in enumerate(("math", "chat"))],
        optimizer=training.optimizer,
        chunks=training.chunks,
        forward_backward=get_forward_backward_func(),
        seq_length=training.shape.positions,
        micro_batch_size=training.layout.micro_batch,
        is_first_step=is_first_step,
    )


def first_gradients(layout: str) -> dict[str, float]:
    """Cosines of a reference's gradient in fp32 with the same in delayed FP8, of a refresh before the first step."""
    with installed():
        training = build_fp8(layout, "delayed")
        exact = oracle.gradient(
            training.shape, oracle.random_weights(training.shape, seed=1), batch_of(training.shape, 0)
        )
        return {
            name: _cosine(exact, _captured(training, layout, is_first_step=finds_scales))
            for name, finds_scales in (("with scales", True), ("without", False))
        }


def _captured(training: Training, layout: str, *, is_first_step: bool) -> oracle.Tensors:
    """The reduced gradient of the first reference of a refresh."""
    captured: list[oracle.Tensors] = []
    ogpsa = attach(training.optimizer, training.chunks)
    capture = ogpsa.capture

    def recording(name: str) -> None:
        captured.append(reduced_gradient(training))
        capture(name)

    ogpsa.capture = recording  # type: ignore[method-assign]
    _refresh(training, ogpsa, layout, is_first_step=is_first_step)
    ogpsa.detach()
    return captured[0]


def _cosine(left: oracle.Tensors, right: oracle.Tensors) -> float:
    flat = [torch.cat([tensors[name].double().flatten() for name in sorted(left)]) for tensors in (left, right)]
    return float(torch.nn.functional.cosine_similarity(*flat, dim=0))
