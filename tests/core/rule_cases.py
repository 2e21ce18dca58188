"""What the ranks run to show the rules of removal: many references, conflicts, nearly parallel ones, a bf16 basis, and
references that are added once."""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron_ogpsa import OGPSAConfig, attach
from tests.core import oracle
from tests.core.cases import refresh_planted
from tests.core.comparison import on_first_rank
from tests.core.gradients import plant, projected_gradient
from tests.core.layouts import ALL_LAYOUTS
from tests.core.megatron_model import build


def opposed(shape: oracle.ModelShape, names: list[str], count: int, separation: float | None) -> list[oracle.Tensors]:
    """``count`` references and, last, a gradient; fp32 numbers, returned in fp64.

    They share a direction with alternating signs, so that the gradient hurts some references and not others, and
    references hurt each other. In the second half of the tensors the odd references change sides, with half the
    strength: a shard does not tell which of them are hurt by the whole gradient. With ``separation`` the references are
    the first one and neighbours of it, that far away.
    """
    shapes = oracle.shapes_of(shape)

    def random(seed: int) -> oracle.Tensors:
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(shapes[name], generator=generator) for name in names}

    common, result = random(1000), []
    for index in range(count + 1):
        own = random(index)
        sign = -1.0 if index % 2 else 1.0
        if separation is not None and 0 < index < count:
            result.append({name: result[0][name] + separation * own[name] for name in names})
        elif separation is not None and index == count:
            # Heavy in the protected span, as in notes on hazards: what leaks shows.
            span = {name: sum(reference[name] for reference in result) for name in names}
            result.append({name: own[name] - 2.0 * span[name] for name in names})
        else:
            turned = dict.fromkeys(names[len(names) // 2 :] if index % 2 and index < count else (), -0.5)
            result.append({name: own[name] + sign * turned.get(name, 1.0) * common[name] for name in names})
    return [{name: tensor.double() for name, tensor in tensors.items()} for tensors in result]


def rules(layout: str, settings: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Each setting (``count``, ``separation`` and fields of the config) on planted gradients, against the oracle."""
    shape = oracle.ModelShape(**ALL_LAYOUTS[layout].model)
    training = build(ALL_LAYOUTS[layout], oracle.random_weights(shape, seed=1), clip_grad=0.0)
    names = [name for name in oracle.shapes_of(shape) if not ALL_LAYOUTS[layout].is_frozen(name)]
    results = []
    for setting in settings:
        config = {key: value for key, value in setting.items() if key not in ("count", "separation")}
        ogpsa = attach(
            training.optimizer,
            training.chunks,
            OGPSAConfig(**{"space": "gradient", "mode": "orthogonal"} | config),
        )
        *references, gradient = opposed(shape, names, setting["count"], setting.get("separation"))
        refresh_planted(training, ogpsa, references)
        plant(training, gradient)
        actual, (_, grad_norm, _) = projected_gradient(training)
        compared = functools.partial(_compared, config, actual, float(grad_norm), references, gradient)
        told = {name: ogpsa.metrics[name] for name in ("rank", "rank_total")} | {"kept": ogpsa.kept_energy}
        told["left"] = ogpsa.metrics.get("leak", 0.0)
        results.append(on_first_rank(compared) | told)
        ogpsa.detach()
    return results


def _compared(
    config: dict[str, Any],
    actual: oracle.Tensors,
    grad_norm: float,
    references: list[oracle.Tensors],
    gradient: oracle.Tensors,
) -> dict[str, float]:
    """A projected gradient against the oracle's."""
    granularity, remove = config["granularity"], oracle.conflict if config.get("mode") == "conflict" else None
    if "energy" in config:
        remove = functools.partial(_in_leading, config["energy"])
    expected = oracle.project(gradient, references, granularity, remove)
    return {
        "error": oracle.relative_error(actual, expected),
        "norm_error": abs(grad_norm / oracle.norm(expected) - 1),
        "leak": oracle.leak(actual, references, granularity),
        "worst_slack": oracle.worst_slack(actual, references, granularity),
        "size": oracle.norm(gradient) / oracle.norm(expected),
        "removed": 1 - (oracle.norm(expected) / oracle.norm(gradient)) ** 2,
    }


def _in_leading(energy: float, unit_NK: torch.Tensor, vector_N: torch.Tensor) -> torch.Tensor:
    basis_NK = oracle.leading(unit_NK, energy)
    return basis_NK @ (basis_NK.T @ vector_N)


def in_turns(layout: str, config: dict[str, Any], rounds: int) -> list[dict[str, float]]:
    """After each refresh of one reference out of three the projection against the oracle's, with the newest of each."""
    shape = oracle.ModelShape(**ALL_LAYOUTS[layout].model)
    training = build(ALL_LAYOUTS[layout], oracle.random_weights(shape, seed=1), clip_grad=0.0)
    names = [name for name in oracle.shapes_of(shape) if not ALL_LAYOUTS[layout].is_frozen(name)]
    ogpsa = attach(
        training.optimizer, training.chunks, OGPSAConfig(**{"space": "gradient", "mode": "orthogonal"} | config)
    )
    *fresh, gradient = opposed(shape, names, 3 * (rounds + 1), None)
    newest = {f"reference {index}": fresh[index] for index in range(3)}
    refresh_planted(training, ogpsa, [*newest.values()])
    results = []
    for turn, reference in enumerate(fresh[3:]):
        name = f"reference {turn % 3}"
        ogpsa.begin_refresh(keep=[other for other in newest if other != name])
        plant(training, reference)
        ogpsa.capture(name)
        ogpsa.finish_refresh()
        newest[name] = reference
        plant(training, gradient)
        actual, _ = projected_gradient(training)
        mode, granularity = config.get("mode", "orthogonal"), config["granularity"]
        remove = oracle.conflict if mode == "conflict" else None
        expected = oracle.project(gradient, [*newest.values()], granularity, remove)
        results.append(
            {
                "error": oracle.relative_error(actual, expected),
                "told of": sorted(ogpsa.interval) == [name],
            }
        )
    return results


def added_once(layout: str, granularity: str, weight: float) -> list[dict[str, float]]:
    """Two steps on the same gradient after ``add_references_once``: the references are in the first one alone."""
    shape = oracle.ModelShape(**ALL_LAYOUTS[layout].model)
    training = build(ALL_LAYOUTS[layout], oracle.random_weights(shape, seed=1), clip_grad=0.0)
    names = [name for name in oracle.shapes_of(shape) if not ALL_LAYOUTS[layout].is_frozen(name)]
    ogpsa = attach(
        training.optimizer, training.chunks, OGPSAConfig(space="gradient", mode="orthogonal", granularity=granularity)
    )  # type: ignore[arg-type]
    *references, gradient = opposed(shape, names, 2, None)
    refresh_planted(training, ogpsa, references)
    ogpsa.add_references_once(weight)
    expected = oracle.project(gradient, references, granularity)
    added = {name: weight * sum(reference[name] for reference in references) for name in names}
    results = []
    for total in ({name: expected[name] + added[name] for name in names}, expected):
        plant(training, gradient)
        actual, (_, grad_norm, _) = projected_gradient(training)
        results.append(
            {
                "error": oracle.relative_error(actual, total),
                "norm_error": abs(float(grad_norm) / oracle.norm(total) - 1),
                "removed_error": ogpsa.metrics["removed"] + (oracle.norm(expected) / oracle.norm(gradient)) ** 2 - 1,
                "added": ogpsa.metrics.get("added", 0.0),
                "expected_added": (oracle.norm(added) / oracle.norm(gradient)) ** 2,
            }
        )
    return results
