"""Projection in Megatron-Bridge's training loop, which has callbacks, so that nothing of it is patched.

    from megatron_ogpsa.integration.bridge import OGPSACallback
    finetune(config, forward_step, callbacks=[OGPSACallback(OGPSAConfig(), {"math": rows}, forward_step)])

Read on megatron-bridge 0.6.2 (``training/callbacks.py``, ``training/train.py``). What of its loop matters here::

    on_train_start         the model is as loaded
    on_train_step_start    before the rerun machine's loop over forward and backward passes
    …                      zero gradients, forward and backward, optimizer.step()
    on_train_step_end      its loss_dict goes to the log next
    on_checkpoint_save     once the checkpoint is whole: at once, or steps later if it is saved asynchronously
    on_train_end
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from megatron_ogpsa.attributes import attributes_set
from megatron_ogpsa.config import MAX_CONFLICT_REFERENCES, OGPSAConfig
from megatron_ogpsa.data.micro_batches import Row, deal_out, micro_batches_at_once
from megatron_ogpsa.errors import UnsupportedError, UserError
from megatron_ogpsa.integration.bridge.settings import check_run
from megatron_ogpsa.integration.projection.protection import Losses, as_line, interval_figures, log_figures
from megatron_ogpsa.integration.ranks.agreement import agreed
from megatron_ogpsa.plugin.ogpsa import OGPSA, attach
from megatron_ogpsa.plugin.support import check_supported
from megatron_ogpsa.references.gradients import Reference, pinned, refresh

try:
    from megatron.bridge.training import callbacks as bridge
except ImportError as error:
    raise ImportError(
        f"megatron_ogpsa.integration.bridge needs Megatron-Bridge, which cannot be imported ({error}): install "
        "megatron-bridge 0.6 with its requirements, or use megatron_ogpsa.pretrain with Megatron's own loop"
    ) from None

Rows = Sequence[Row] | Callable[["bridge.CallbackContext"], Sequence[Row]]
"""All samples of a reference, the same on every rank, or what makes them when training starts. Each is a dict of 1-D tensors
of the sequence's length, by the names that the forward step reads; ``loss_mask`` is one of them."""

_EVENTS = frozenset(
    {"on_train_start", "on_train_step_start", "on_train_step_end", "on_checkpoint_save", "on_train_end"}
)
_FIELDS = frozenset({"state", "model", "optimizer", "loss_dict"})


class OGPSACallback(bridge.Callback):
    """Projects each optimizer step of a Bridge run; refreshes at its start, every interval, and after each checkpoint.

    Args:
        config: of the projection.
        references: rows by name; they are dealt out to data-parallel ranks and micro-batches here.
        forward_step: as given to Bridge's ``pretrain`` or ``finetune``; its loss is the references' too, a sum and the
            number of tokens.
        max_bad_refreshes: the run ends after so many refreshes in a row whose gradients are not finite.
        max_bad_steps: likewise steps.
        references_in_bf16: in a run in FP8, take reference gradients without it (``--ogpsa-references-in-bf16``).

    Raises:
        UnsupportedError: a Megatron-Bridge with other callbacks than those that this was written for; or more references than
            ``mode="conflict"`` solves for.
        UserError: no references.
    """

    def __init__(
        self,
        config: OGPSAConfig,
        references: Mapping[str, Rows],
        forward_step: Callable[..., Any],
        *,
        max_bad_refreshes: int = 3,
        max_bad_steps: int = 10,
        references_in_bf16: bool = False,
    ) -> None:
        _check_interface()
        if not references:
            raise UserError("OGPSACallback without references: name at least one, or leave the callback out")
        if config.mode == "conflict" and len(references) > MAX_CONFLICT_REFERENCES:
            raise UnsupportedError(
                f'OGPSAConfig(mode="conflict") with {len(references)} references: it solves for up to '
                f'{MAX_CONFLICT_REFERENCES}; join some into one, or use mode="orthogonal"'
            )
        self.ogpsa: OGPSA | None = None
        self._config = config
        self._rows = dict(references)
        self._forward_step = forward_step
        self._max_bad_refreshes = max_bad_refreshes
        self._max_bad_steps = max_bad_steps
        self._references_in_bf16 = references_in_bf16
        self._references: list[Reference] = []
        self._refresh_is_due = True
        self._losses: Losses = {}

    def on_train_start(self, context: bridge.CallbackContext) -> None:
        """Attach the plugin; deal out the references."""
        from megatron.bridge.training.utils.train_utils import prepare_forward_step_func

        agreed(lambda: check_run(context.state.cfg, context.model, references_in_bf16=self._references_in_bf16))
        agreed(lambda: check_supported(context.optimizer, context.model, self._config))
        forward_step = prepare_forward_step_func(self._forward_step, context.state)
        self._references = [
            agreed(partial(_reference, name, rows, forward_step, context)) for name, rows in self._rows.items()
        ]
        self.ogpsa = attach(context.optimizer, context.model, self._config)
        self._refresh_is_due, self._losses = True, {}

    def on_train_step_start(self, context: bridge.CallbackContext) -> None:
        """Refresh the basis if that is due."""
        assert self.ogpsa is not None
        step = context.state.train_state.step
        if self.ogpsa.skipped_in_a_row >= self._max_bad_steps:
            raise UserError(
                f"the gradient was not finite in {self.ogpsa.skipped_in_a_row} steps in a row, up to step {step}: lower the "
                "learning rate, look at the data, or allow more with OGPSACallback(max_bad_steps=...)"
            )
        is_regular = self._config.refreshes_at(step)
        if is_regular or self._refresh_is_due or self.ogpsa.needs_refresh or _was_saved(context, step):
            self._refresh(self.ogpsa, context, step)
            self._refresh_is_due = False

    def on_train_step_end(self, context: bridge.CallbackContext) -> None:
        """Add figures to the losses, on ranks that have some: Bridge logs them all alike."""
        if context.loss_dict and self.ogpsa is not None:
            metrics = self.ogpsa.metrics_on(next(iter(context.loss_dict.values())).device)
            for name in ("removed", "removed_length", "rank"):
                if name in metrics:
                    context.loss_dict[f"ogpsa {name.replace('_', ' ')}"] = metrics[name].clamp(min=0.0)

    def on_checkpoint_save(self, context: bridge.CallbackContext) -> None:
        """A resumed run refreshes when it starts, so this one does too; see :func:`_was_saved` for asynchronous saves."""
        if not context.state.cfg.checkpoint.async_save:
            self._refresh_is_due = True

    def on_train_end(self, context: bridge.CallbackContext) -> None:
        """Give the optimizer back as it was."""
        if self.ogpsa is not None:
            self.ogpsa.detach()

    def _refresh(self, ogpsa: OGPSA, context: bridge.CallbackContext, step: int) -> None:
        config = context.state.cfg
        with _no_validation(config.rerun_state_machine):
            refreshed = refresh(
                ogpsa,
                self._references,
                optimizer=context.optimizer,
                chunks=context.model,
                forward_backward=get_forward_backward_func(),
                seq_length=config.model.seq_length,
                micro_batch_size=config.train.micro_batch_size,
                decoder_seq_length=config.model.seq_length,
                is_first_step=step == 0,
                in_bf16=self._references_in_bf16,
            )
        if not refreshed.is_new and (not ogpsa.has_basis or ogpsa.rejected_refreshes >= self._max_bad_refreshes):
            raise UserError(
                f"the gradient of reference {ogpsa.rejected_references}, in {ogpsa.rejected_refreshes} refreshes in a row, "
                f"before step {step + 1}: look at its data and at the weights that were loaded, or allow more with "
                "OGPSACallback(max_bad_refreshes=...); the first refresh must succeed"
            )
        figures = interval_figures(refreshed.losses, self._losses, ogpsa.interval)
        if refreshed.is_new:  # what steps do to first order is counted from the last good refresh too
            self._losses = refreshed.losses
        if figures and dist.get_rank() == dist.get_world_size() - 1:
            print(as_line(step, figures), flush=True)
            log_figures(step, figures, context.state.tensorboard_logger, context.state.wandb_logger)


def _check_interface() -> None:
    missing = sorted(_EVENTS - bridge.VALID_EVENTS) + sorted(
        _FIELDS - {field.name for field in fields(bridge.CallbackContext)}
    )
    if missing:
        try:
            installed = version("megatron-bridge")
        except PackageNotFoundError:
            installed = "of a source tree"
        raise UnsupportedError(
            f"megatron-bridge {installed} has no {', '.join(missing)} in its callbacks, which were read on 0.6: "
            "pip install 'megatron-bridge==0.6.*'"
        )


def _was_saved(context: bridge.CallbackContext, step: int) -> bool:
    """Whether Bridge saved a checkpoint after the last step by its intervals (``checkpoint_and_decide_exit``).

    The event of a checkpoint that is saved asynchronously comes when it is whole, steps later; a run that resumes from it
    refreshes at the step that it is of.
    """
    settings = context.state.cfg.checkpoint
    intervals = (settings.save_interval, settings.non_persistent_save_interval)
    return bool(settings.save and step and any(interval and step % interval == 0 for interval in intervals))


def _no_validation(settings: Any) -> AbstractContextManager[None]:
    """Bridge's forward steps validate losses by the rerun machine, which takes results within a training step only."""
    return attributes_set([(settings, name, False) for name in ("check_for_nan_in_loss", "check_for_spiky_loss")])


def _reference(name: str, given: Rows, forward_step: Callable[..., Any], context: bridge.CallbackContext) -> Reference:
    """Local, no communication."""
    config, model = context.state.cfg, get_model_config(context.model[0])
    rows = list(given(context)) if callable(given) else list(given)
    length = config.model.seq_length
    for number, row in enumerate(rows):
        if "loss_mask" not in row or any(tensor.shape != (length,) for tensor in row.values()):
            shapes = {key: tuple(tensor.shape) for key, tensor in row.items()}
            raise UserError(
                f"reference {name}, row {number}: {shapes}; give 1-D tensors of model.seq_length = {length}, one of them "
                "loss_mask"
            )
    num_tokens = int(sum(row["loss_mask"].sum() for row in rows))
    if not num_tokens:
        raise UserError(f"reference {name} has no supervised token in {len(rows)} rows: look at its loss_mask")
    micro_batches = deal_out(
        rows,
        micro_batch_size=config.train.micro_batch_size,
        rank=parallel_state.get_data_parallel_rank(),
        size=parallel_state.get_data_parallel_world_size(),
        multiple=micro_batches_at_once(model),
    )
    return Reference(
        name=name,
        micro_batches=tuple(pinned(micro_batch) for micro_batch in micro_batches),
        forward_step=forward_step,
        loss="nll",
        num_samples=len(rows),
        num_supervised_tokens=num_tokens,
        fingerprint="",
    )
