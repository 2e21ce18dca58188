"""What the ranks run to show the contract of attach, step and detach; jobs that return plain numbers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_ogpsa import OGPSA, OGPSAConfig, attach
from megatron_ogpsa.sharding.gradients import leaf_optimizers
from tests.core import oracle
from tests.core.cases import batch_of, planted, refresh, refresh_planted
from tests.core.gradients import plant, projected_gradient
from tests.core.layouts import ALL_LAYOUTS, LAYOUTS
from tests.core.megatron_model import Training, build


@contextmanager
def counted_collectives() -> Iterator[Counter[str]]:
    """Count calls of torch.distributed's collectives by name."""
    counts: Counter[str] = Counter()

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        return call

    names = ("all_reduce", "all_gather_into_tensor", "_all_gather_base", "broadcast", "all_gather_object", "barrier")
    names += ("reduce_scatter_tensor", "_reduce_scatter_base", "all_gather", "reduce", "all_to_all_single")
    with mock.patch.multiple(dist, **{name: counting(name, getattr(dist, name)) for name in names}):
        yield counts


def collectives(
    layout: str, granularity: str, num_references: int, space: str = "gradient"
) -> dict[str, dict[str, int]]:
    """Collectives of a plain step, of a projected one, and of the orthonormalisation."""
    shape = oracle.ModelShape(**LAYOUTS[layout].model)
    training = build(LAYOUTS[layout], oracle.random_weights(shape, seed=1))
    gradients = planted(shape, num_references + 1, integers=False)

    def step() -> dict[str, int]:
        plant(training, gradients[-1])
        with counted_collectives() as counts:
            training.optimizer.step()
        return dict(counts)

    step()  # Megatron caches answers about parameter groups in its first step
    plain = step()
    config = OGPSAConfig(granularity=granularity, space=space, mode="orthogonal")  # type: ignore[arg-type]
    ogpsa = attach(training.optimizer, training.chunks, config)
    ogpsa.begin_refresh()
    with counted_collectives() as refresh_counts:
        for index, gradient in enumerate(gradients[:-1]):
            plant(training, gradient)
            ogpsa.capture(f"reference {index}")
        ogpsa.finish_refresh()
    return {"plain": plain, "projected": step(), "refresh": dict(refresh_counts)}


def detached_is_plain(layout: str) -> dict[str, bool]:
    """Parameters and returns after attach, projected and unprojected steps, and detach, against a run without."""
    shape = oracle.ModelShape(**ALL_LAYOUTS[layout].model)
    weights = oracle.random_weights(shape, seed=1)
    batches = [batch_of(shape, seed) for seed in range(3)]

    def parameters(training: Training) -> list[Tensor]:
        return [param.detach().clone() for chunk in training.chunks for param in chunk.parameters()]

    def run(training: Training) -> list[Any]:
        returned = []
        for batch in batches:
            training.gradient(batch)
            returned.append(tuple(training.optimizer.step()))
        return returned

    training = build(ALL_LAYOUTS[layout], weights)
    optimizers = [training.optimizer, *leaf_optimizers(training.optimizer)]

    def replaced() -> set[str]:
        return {name for owner in optimizers for name in vars(owner) if callable(getattr(type(owner), name, None))}

    own = replaced()
    ogpsa = attach(training.optimizer, training.chunks)
    hooked = replaced() > own
    refresh(training, ogpsa, {"a": batches[1]})
    ogpsa.enabled = False
    disabled_returns = run(training)
    disabled_parameters = parameters(training)
    ogpsa.detach()
    restored = hooked and replaced() == own

    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    plain = build(ALL_LAYOUTS[layout], weights)
    plain_returns = run(plain)
    return {
        "restored": restored,
        "same_returns": disabled_returns == plain_returns,
        "same_parameters": all(map(torch.equal, disabled_parameters, parameters(plain))),
    }


def leaf_optimizer(layout: str) -> dict[str, float]:
    """The plugin on an optimizer outside a chain: the norm that ``step`` returns and the clipping that follows it."""
    shape = oracle.ModelShape(**ALL_LAYOUTS[layout].model)
    training = build(ALL_LAYOUTS[layout], oracle.random_weights(shape, seed=1), clip_grad=0.5)
    (training.optimizer,) = training.optimizer.chained_optimizers
    ogpsa = attach(
        training.optimizer, training.chunks, OGPSAConfig(space="gradient", mode="orthogonal", granularity="model")
    )
    *references, gradient = planted(shape, 3, integers=False)
    refresh_planted(training, ogpsa, references)
    plant(training, gradient)
    actual, (_, grad_norm, _) = projected_gradient(training)
    expected = oracle.project(gradient, references, "model")
    return {
        "optimizer": type(training.optimizer).__name__,
        "norm_error": abs(float(grad_norm) / oracle.norm(expected) - 1),
        "clipped_norm": oracle.norm(actual),
    }


def not_finite(layout: str, bad_rank: int, space: str = "gradient") -> dict[str, Any]:
    """NaN on one rank only: in a reference of a later refresh, in the training gradient, then in the basis."""
    shape = oracle.ModelShape(**ALL_LAYOUTS[layout].model)
    training = build(ALL_LAYOUTS[layout], oracle.random_weights(shape, seed=1))
    ogpsa = attach(
        training.optimizer, training.chunks, OGPSAConfig(granularity="tensor", space=space, mode="orthogonal")
    )  # type: ignore[arg-type]
    good, bad, gradient = planted(shape, 3, integers=False)

    def poison() -> None:
        # A copy's own trouble, since what the reduction over data parallelism carries reaches every copy.
        if dist.get_rank() == bad_rank:
            for chunk in training.chunks:
                for param in chunk.parameters():
                    param.main_grad.fill_(float("nan"))

    def refreshed(tensors: oracle.Tensors, poisoned: bool) -> bool:
        ogpsa.begin_refresh()
        plant(training, good)
        ogpsa.capture("steady")
        plant(training, tensors)
        if poisoned:
            poison()
        ogpsa.capture("shaky")
        return ogpsa.finish_refresh()

    def stepped(poisoned: bool = False) -> list[bool]:
        """Whether the step was made, and whether it changed a weight of this rank."""
        plant(training, gradient)
        if poisoned:
            poison()
        before = [param.detach().clone() for chunk in training.chunks for param in chunk.parameters()]
        success, norm, _ = training.optimizer.step()
        now = (param for chunk in training.chunks for param in chunk.parameters())
        return [bool(success) and float(norm) == float(norm), not all(map(torch.equal, before, now))]

    first = refreshed(gradient, poisoned=False)
    basis = ogpsa._space.basis.rows_KN.clone()
    warnings: list[str] = []
    told = lambda text, *arguments: warnings.append(text % arguments)  # noqa: E731
    with (
        mock.patch.object(logging.getLogger("megatron_ogpsa.plugin.ogpsa"), "warning", told),
        mock.patch.object(logging.getLogger("megatron_ogpsa.plugin.space"), "warning", told),
    ):
        second = refreshed(bad, poisoned=True)
        kept = torch.equal(basis, ogpsa._space.basis.rows_KN)
        steps = [stepped(poisoned=True), stepped()]
        if dist.get_rank() == bad_rank:
            ogpsa._space.basis.rows_KN[0, column_of_a_copy(ogpsa)] = float("inf")
        in_a_row = []
        for _ in range(2):
            steps.append(stepped())
            in_a_row.append(ogpsa.skipped_in_a_row)
        asked_for = ogpsa.needs_refresh
        refreshed(bad, poisoned=True)
        third = refreshed(gradient, poisoned=False)
        steps.append(stepped())
        skipped_steps, in_a_row = ogpsa.skipped_steps, [*in_a_row, ogpsa.skipped_in_a_row]
    for leaf in ogpsa._space._scaled:
        leaf.grad_scaler._scale.copy_(leaf.grad_scaler.min_scale)
    at_smallest_scale = []
    for _ in range(2):
        stepped(poisoned=True)
        at_smallest_scale.append(ogpsa.skipped_in_a_row)
    return {
        "refreshes": (first, second, third),
        "kept": kept,
        "warnings": warnings,
        "steps": steps,
        "skipped_steps": skipped_steps,
        "in_a_row": in_a_row,
        "at_smallest_scale": at_smallest_scale,
        "needs_refresh": [asked_for, ogpsa.needs_refresh],
        "rejected_refreshes": ogpsa.rejected_refreshes,
    }


def column_of_a_copy(ogpsa: OGPSA) -> int:
    """An element that does not enter sums over ranks, if this rank has one; another otherwise."""
    layout = ogpsa._shard.layout
    for tile in layout.tiles:
        if tile.lengths_S is None and not tile.counted:
            return tile.column
        if tile.lengths_S is not None and tile.weights_S is not None:
            is_copy_S = (tile.weights_S == 0).nonzero().flatten()
            if len(is_copy_S):
                return tile.column + int(tile.lengths_S[: is_copy_S[0]].sum())
    return 0


def misuse() -> list[str]:
    """The errors of calls out of order."""
    training = build(LAYOUTS["dp2"], oracle.random_weights(oracle.ModelShape(), seed=1))
    ogpsa = attach(training.optimizer, training.chunks, OGPSAConfig(space="gradient", mode="conflict"))
    messages: list[str] = []

    def expect_error(action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")

    expect_error(lambda: attach(training.optimizer, training.chunks))
    expect_error(lambda: ogpsa.capture("math"))
    expect_error(ogpsa.finish_refresh)
    ogpsa.begin_refresh()
    ogpsa.capture("math")
    expect_error(lambda: ogpsa.capture("math"))
    for index in range(8):
        ogpsa.capture(str(index))
    expect_error(ogpsa.finish_refresh)
    ogpsa.detach()
    get_model_config(training.chunks[0]).mtp_num_layers = 1
    expect_error(lambda: attach(training.optimizer, training.chunks))
    return messages
