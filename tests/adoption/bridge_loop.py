"""A loop that fires Megatron-Bridge's events where Bridge's own ``train`` does, around Megatron's schedules."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import (
    RerunMode,
    destroy_rerun_state_machine,
    get_rerun_state_machine,
    initialize_rerun_state_machine,
)
from megatron.training.config import CheckpointConfig, RerunStateMachineConfig, TrainingConfig
from torch import Tensor

from tests.core.cases import batch_of
from tests.core.megatron_model import Training, local_micro_batches
from tests.core.megatron_model import forward_step as megatrons_forward_step

Row = dict[str, Tensor]
SAFETY_SEED = 100


@dataclass
class Run:
    """What Bridge's ``config`` stands for here: a model in its layout, and the settings that the callback reads."""

    training: Training
    train_iters: int
    first_step: int = 0
    saved_before: frozenset[int] = frozenset()  # steps; Bridge does so when the global batch grows
    save_interval: int | None = None
    async_delay: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, float]] = field(default_factory=list)
    written: dict[str, float] = field(default_factory=dict)

    def state(self) -> Any:
        """Of Bridge's settings those that derive from Megatron's are Megatron's."""
        config = SimpleNamespace(
            model=SimpleNamespace(seq_length=self.training.shape.positions),
            ddp=self.training.chunks[0].ddp_config,
            optimizer=self.training.optimizer.config,
            train=TrainingConfig(micro_batch_size=self.training.layout.micro_batch),
            dist=SimpleNamespace(use_decentralized_pg=False),
            rerun_state_machine=RerunStateMachineConfig(check_for_nan_in_loss=True),
            checkpoint=CheckpointConfig(
                save="checkpoints" if self.save_interval else None,
                save_interval=self.save_interval,
                async_save=self.async_delay is not None,
            ),
        )
        for name, value in self.settings.items():
            section, _, key = name.partition(".")
            setattr(getattr(config, section), key, value)
        writer = SimpleNamespace(add_scalar=lambda name, value, step: self.written.update({name: value}))
        return SimpleNamespace(
            cfg=config,
            train_state=SimpleNamespace(step=self.first_step),
            tensorboard_logger=writer,
            wandb_logger=None,
        )


def forward_step(state: Any, data_iterator: Iterator[Row], model: torch.nn.Module) -> Any:
    """As Bridge's: the loss goes through the rerun machine if the settings say so."""
    row = next(data_iterator)
    output, loss_of = megatrons_forward_step(iter([(row["tokens"], row["labels"], row["loss_mask"])]), model)
    validates = state.cfg.rerun_state_machine.check_for_nan_in_loss

    def loss(output: Tensor) -> Any:
        result: Any = loss_of(output)
        if validates:
            get_rerun_state_machine().validate_result(
                result=result[0], rejection_func=torch.isnan, message="NaN", tolerance=0.0, fatal=True
            )
        return result

    return output, loss


def rows_of(training: Training, seed: int) -> list[Row]:
    """All rows of a reference."""
    batch = batch_of(training.shape, seed)
    return [dict(zip(("tokens", "labels", "loss_mask"), row, strict=True)) for row in zip(*batch, strict=True)]


def finetune(config: Run, forward_step_func: Any, callbacks: Any = None) -> None:
    """Bridge's order of events (``train`` in its training/train.py, ``save_checkpoint`` in its checkpointing.py)."""
    bridge = sys.modules["megatron.bridge.training.callbacks"]
    prepared = sys.modules["megatron.bridge.training.utils.train_utils"].prepare_forward_step_func
    manager: Any = bridge.CallbackManager()
    manager.add(callbacks)
    training, state = config.training, config.state()
    destroy_rerun_state_machine()
    initialize_rerun_state_machine(mode=RerunMode.VALIDATE_RESULTS)
    finalized: list[int] = []  # steps at which checkpoints that are saved asynchronously will be whole

    def fire(event: str, **more: Any) -> None:
        manager.fire(
            event,
            bridge.CallbackContext(
                state=state,
                model=training.chunks,
                user_state=manager.user_state,
                optimizer=training.optimizer,
                **more,
            ),
        )

    fire("on_train_start")
    while state.train_state.step < config.train_iters:
        if state.train_state.step in finalized:
            fire("on_checkpoint_save")
        if state.train_state.step in config.saved_before:
            fire("on_checkpoint_save")
        fire("on_train_step_start")
        losses, norm = _train_step(training, prepared(forward_step_func, state), state.train_state.step)
        fire("on_train_step_end", loss_dict=losses, grad_norm=norm, skipped_iter=False)
        config.log.append({name: float(value) for name, value in losses.items()})
        state.train_state.step += 1
        if config.save_interval and state.train_state.step % config.save_interval == 0:
            if config.async_delay is None:
                fire("on_checkpoint_save")
            else:
                finalized.append(state.train_state.step + config.async_delay)
    fire("on_train_end")


def _train_step(training: Training, forward_step_func: Any, step: int) -> tuple[dict[str, Tensor], float]:
    batch = local_micro_batches(training.layout, batch_of(training.shape, SAFETY_SEED + step))
    rows = [dict(zip(("tokens", "labels", "loss_mask"), micro_batch, strict=True)) for micro_batch in batch]
    iterator = iter(rows)
    machine: Any = get_rerun_state_machine()
    losses: list[dict[str, Tensor]] = []
    while machine.should_run_forward_backward(None):
        for chunk in training.chunks:
            chunk.zero_grad_buffer()
        training.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=forward_step_func,
            data_iterator=iterator,
            model=training.chunks,
            num_microbatches=len(rows),
            seq_length=training.shape.positions,
            micro_batch_size=training.layout.micro_batch,
            forward_only=False,
        )
    machine.should_checkpoint_and_exit()
    _, norm, _ = training.optimizer.step()
    if not losses:
        return {}, norm
    total = torch.stack([loss["lm loss"] for loss in losses]).sum(dim=0)
    return {"lm loss": total[0] / total[1]}, norm
