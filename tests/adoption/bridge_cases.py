"""Jobs of the harness for Megatron-Bridge's callbacks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ogpsa import OGPSAConfig, attach
from megatron_ogpsa.errors import UserError
from tests.adoption.bridge_loop import SAFETY_SEED, Run, finetune, forward_step, rows_of
from tests.adoption.bridge_modules import bridge_modules
from tests.core.cases import batch_of
from tests.core.layouts import LAYOUTS
from tests.core.megatron_model import Training, build
from tests.core.oracle import ModelShape, random_weights

SEEDS = {"math": 0, "chat": 1}
INTERVAL = 3
EARLY = 1
STEPS = 4
SAVED = 2


def _built(layout: str) -> Training:
    parallel_state.destroy_model_parallel()
    return build(LAYOUTS[layout], random_weights(ModelShape(**LAYOUTS[layout].model), seed=1), lr=0.01)


def _config(**settings: Any) -> OGPSAConfig:
    # Both signs: a step that hurts no reference would be the same with any basis.
    return OGPSAConfig(**({"refresh_interval": INTERVAL, "mode": "orthogonal"} | settings))


def _callback(training: Training) -> Any:
    from megatron_ogpsa.integration.bridge import OGPSACallback

    return OGPSACallback(
        _config(),
        {"math": rows_of(training, SEEDS["math"]), "chat": lambda context: rows_of(training, SEEDS["chat"])},
        forward_step,
    )


def _run(training: Training, *, steps: int = STEPS, **more: Any) -> Run:
    run = Run(training, train_iters=steps, **more)
    finetune(run, forward_step, callbacks=[_callback(training)])
    return run


def _weights(training: Training) -> list[Tensor]:
    return [param.detach().clone() for chunk in training.chunks for param in chunk.parameters()]


def _by_hand(training: Training, refreshed_before: set[int]) -> list[Tensor]:
    """The loop of docs/adoption/own-loop.md."""
    ogpsa = attach(training.optimizer, training.chunks, _config())
    for step in range(STEPS):
        if step in refreshed_before:
            ogpsa.begin_refresh()
            for name, seed in SEEDS.items():
                training.gradient(batch_of(training.shape, seed))
                ogpsa.capture(name)
            ogpsa.finish_refresh()
        training.gradient(batch_of(training.shape, SAFETY_SEED + step))
        training.optimizer.step()
    return _weights(training)


def by_hand_and_by_callback(layout: str, real: bool) -> dict[str, bool]:
    """Whether weights are bitwise the same after some steps, and what the log has."""
    with bridge_modules(real=real):
        run = _run(training := _built(layout), saved_before=frozenset({SAVED}))
    by_callback = _weights(training)
    is_last_copy = parallel_state.get_data_parallel_rank() == parallel_state.get_data_parallel_world_size() - 1
    log = {"lm loss", "ogpsa removed length", "ogpsa rank"}
    tells = {"ogpsa math/loss", "ogpsa chat/captured"} <= run.written.keys()
    return {
        "is detached": "prepare_grads" not in training.optimizer.__dict__,
        "logs": all(not losses or log == losses.keys() for losses in run.log),
        "tells of references": tells == (is_last_copy and bool(run.log[0])),
        "as by hand": _same(by_callback, _by_hand(_built(layout), {0, EARLY, SAVED, INTERVAL})),
    }


def resumed_and_saved_asynchronously(layout: str, real: bool) -> dict[str, bool]:
    """Whether both runs end with the weights of a run that refreshes right after the checkpoint; and that this matters."""
    with bridge_modules(real=real):
        _run(training := _built(layout), save_interval=SAVED, async_delay=1)
        by_async = _weights(training)
        training = _built(layout)
        _run(training, steps=SAVED)
        _run(training, first_step=SAVED)
        resumed = _weights(training)
    expected = _by_hand(_built(layout), {0, EARLY, SAVED, INTERVAL})
    return {
        "saved asynchronously": _same(by_async, expected),
        "resumed": _same(resumed, expected),
        "it matters": not _same(_by_hand(_built(layout), {0, EARLY, INTERVAL}), expected),
    }


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(map(torch.equal, left, right))


def page(code: str, real: bool) -> dict[str, Any]:
    """Run the page's blocks in Bridge's order of events."""
    training = _built("dp2")
    length = training.shape.positions
    sample = (list(range(length)), [0] * (length // 2) + [1] * (length // 2))
    names: dict[str, Any] = {
        "config": (run := Run(training, train_iters=2)),
        "seq_length": length,
        "math_samples": [sample] * 4,
        "chat_samples": [(tokens[::-1], mask) for tokens, mask in [sample] * 3],
    }
    with bridge_modules(real=real, finetune=finetune, gpt_step=forward_step):
        exec(code, names)
    return {"log": run.log}


@contextmanager
def _told(messages: list[str]) -> Iterator[None]:
    try:
        yield
    except (UserError, ImportError) as error:
        messages.append(f"{type(error).__name__}: {error}")


def refusals(real: bool) -> list[str]:
    """What is said of settings, references and versions that are refused."""
    training = _built("dp2")
    messages: list[str] = []
    for settings in (
        {"model.fp8": "hybrid"},
        {"model.fp8": "hybrid", "model.fp8_recipe": "custom"},
        {"model.quant_recipe": "layers.yaml"},
        {"dist.use_decentralized_pg": True},
        {"train.rampup_batch_size": [8, 8, 100], "checkpoint.async_save": True},
    ):
        model = {name.removeprefix("model."): value for name, value in settings.items() if name.startswith("model.")}
        with bridge_modules(real=real), _told(messages), mock.patch.dict(vars(training.chunks[0].config), model):
            _run(training, settings=settings)
    with bridge_modules(real=real):
        import megatron.bridge.training.callbacks as interface

        from megatron_ogpsa.integration.bridge import OGPSACallback

        good = rows_of(training, 0)
        no_tokens = [row | {"loss_mask": torch.zeros_like(row["loss_mask"])} for row in good]
        too_short = [{name: tensor[:-1] for name, tensor in row.items()} for row in good]
        many = {str(number): good for number in range(9)}
        for references in ({"math": no_tokens}, {"math": too_short}, {}, many):
            with _told(messages):
                callback = OGPSACallback(_config(mode="conflict"), references, forward_step)
                finetune(Run(training, train_iters=1), forward_step, callbacks=[callback])
        with _told(messages):
            callback = OGPSACallback(_config(), {"math": good}, forward_step, references_in_bf16=True)
            finetune(Run(training, train_iters=1), forward_step, callbacks=[callback])
        events, interface.VALID_EVENTS = interface.VALID_EVENTS, interface.VALID_EVENTS - {"on_checkpoint_save"}
        with _told(messages):
            _callback(training)
        interface.VALID_EVENTS = events
    with mock.patch.dict(sys.modules, {"megatron.bridge": None}), _told(messages):
        import_module("megatron_ogpsa.integration.bridge")
    return messages
