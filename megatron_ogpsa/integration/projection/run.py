"""Projection in Megatron's training loop: when references are refreshed, and what the log says about it.

A refresh is due at the start, every interval, and after each checkpoint: then a resumed run and an undisturbed one have
the same basis, without any in the checkpoint. Which references it is of, and how the interval changes, is told by
:mod:`megatron_ogpsa.integration.projection.schedule`.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, override

import torch

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.arguments.projection import check_projection_arguments, config_from_arguments
from megatron_ogpsa.integration.checkpoints.loading import read_state
from megatron_ogpsa.integration.loop.hooks import LoopHook
from megatron_ogpsa.integration.projection.authors import LEAK_NOTICE, leak_weight
from megatron_ogpsa.integration.projection.protection import tell_interval
from megatron_ogpsa.integration.projection.schedule import RefreshSchedule, least_captured, schedule_from_arguments
from megatron_ogpsa.integration.ranks.agreement import agreed, from_rank_0
from megatron_ogpsa.watchdog import progress

if TYPE_CHECKING:
    from megatron_ogpsa.plugin.ogpsa import OGPSA
    from megatron_ogpsa.references.gradients import MeanLoss, Reference, Refreshed

logger = logging.getLogger(__name__)

NOT_SETTINGS = ("ogpsa_reference", "ogpsa_train_data", "ogpsa_valid_data", "ogpsa_hang_timeout", "ogpsa_check_leak")
"""Flags that a resumed run may change without departing from the one that it goes on with."""


class ProjectionRun(LoopHook):
    """The plugin in one run of Megatron's loop: a hook that is attached at the start and refreshed when due."""

    def __init__(self, args: argparse.Namespace, load_reference: Callable[[str, str], Reference]) -> None:
        """``load_reference(name, source)`` is collective and raises UserError on all ranks alike."""
        check_projection_arguments(args)
        self._args = args
        self._load_reference = load_reference
        self._ogpsa: OGPSA | None = None
        self._references: list[Reference] = []
        self._schedule = RefreshSchedule(1)  # the flags' once a run with references starts
        self._skipped_before = 0
        self._refresh_is_due = True
        self._refresh_seconds = 0.0
        self._bad_refreshes = 0
        self._losses: dict[str, Mapping[str, MeanLoss]] = {}

    @override
    def start(self, model: list[Any], optimizer: Any, forward_backward: Callable[..., Any], iteration: int) -> None:
        """Load the references and attach the plugin."""
        from megatron.training import print_rank_0

        from megatron_ogpsa.plugin.ogpsa import attach
        from megatron_ogpsa.plugin.support import check_supported

        config = config_from_arguments(self._args)
        agreed(lambda: check_supported(optimizer, model, config))  # stages may hold layers of different kinds
        self._references = [self._load_reference(name, source) for name, source in self._args.ogpsa_reference]
        self._ogpsa = attach(optimizer, model, config)
        self._schedule = schedule_from_arguments(self._args)
        if self._args.load and not self._args.finetune:
            before = self._saved_state(iteration)
            self._compare_with(before)
            self._schedule.restore(before.get("schedule", {}))
            self._skipped_before = before.get("skipped steps", 0)
            if isinstance(scale := before.get("reference loss scale"), float):
                self._ogpsa.reference_loss_scale = scale
        described = ", ".join(
            f"{r.name} ({r.num_samples} samples, {r.num_supervised_tokens} tokens, {r.loss})" for r in self._references
        )
        print_rank_0(
            f"OGPSA: references {described}; {len(self._ogpsa.block_names)} blocks by {self._args.ogpsa_granularity}, "
            f"mode {self._args.ogpsa_mode}, space {self._args.ogpsa_space}, {self._schedule}"
        )
        if self._args.ogpsa_authors_leak:
            print_rank_0(LEAK_NOTICE)

    @override
    def before_step(self, model: list[Any], optimizer: Any, forward_backward: Callable[..., Any], step: int) -> None:
        """Refresh the basis if one is due."""
        assert self._ogpsa is not None
        self._stop_if_steps_are_lost(step)
        taken, is_of_all = step - self._skipped, self._refresh_is_due or self._ogpsa.needs_refresh
        if not (is_of_all or self._schedule.is_due(taken)):
            return
        is_of_all = is_of_all or self._schedule.is_of_all(taken)
        in_turns = self._args.ogpsa_stagger_references and not is_of_all
        due = [self._references[self._schedule.turn]] if in_turns else self._references
        refreshed = self._refresh(due, model, optimizer, forward_backward, step)
        self._refresh_is_due = False
        if not refreshed.is_new:
            self._bad_refreshes += 1
            self._stop_if_references_are_lost(step)
        weight = leak_weight(self._args, step, self._ogpsa.config.refresh_interval)
        if refreshed.is_new and weight:
            self._ogpsa.add_references_once(weight)
        tell_interval(step, refreshed.losses, self._losses, self._ogpsa.interval)
        if refreshed.is_new:  # what steps do to first order is counted from the last good refresh too
            self._losses |= refreshed.losses
        if not refreshed.is_new:
            self._schedule.postpone(taken)
        elif is_of_all:
            self._schedule.restart(taken)
        else:
            self._advance(due, taken)

    def _refresh(
        self,
        due: Sequence[Reference],
        model: list[Any],
        optimizer: Any,
        forward_backward: Callable[..., Any],
        step: int,
    ) -> Refreshed:
        """Of the references that are due; the others are kept."""
        from megatron_ogpsa.references.gradients import refresh

        assert self._ogpsa is not None
        names = [reference.name for reference in due]
        started = time.monotonic()
        with progress.during("refresh"):
            refreshed = refresh(
                self._ogpsa,
                due,
                optimizer=optimizer,
                chunks=model,
                forward_backward=forward_backward,
                seq_length=self._args.seq_length,
                micro_batch_size=self._args.micro_batch_size,
                decoder_seq_length=self._args.decoder_seq_length,
                is_first_step=step == 0,
                in_bf16=self._args.ogpsa_references_in_bf16,
                keep=[
                    part for reference in self._references if reference.name not in names for part in reference.parts
                ],
            )
        self._refresh_seconds = time.monotonic() - started
        return refreshed

    @property
    def _skipped(self) -> int:
        """Steps of the whole run that were skipped: they have moved no weight, so that nothing has gone stale by them."""
        assert self._ogpsa is not None
        return self._skipped_before + self._ogpsa.skipped_steps

    def _advance(self, due: Sequence[Reference], taken: int) -> None:
        """Let what a regular refresh has found decide when the next one is."""
        from megatron.training import print_rank_0

        assert self._ogpsa is not None
        adapts, before = self._args.ogpsa_adaptive_interval is not None, self._schedule.interval
        captured = least_captured([[*r.parts] for r in due], self._ogpsa.interval) if adapts else None
        self._schedule.advance(taken, captured)
        if self._schedule.interval != before:
            print_rank_0(f"OGPSA: references are refreshed every {self._schedule.interval} steps from now on")

    @override
    def figures(self) -> dict[str, torch.Tensor]:
        """What was removed (a share of the gradient, or a length of the update), the rank, a refresh's time, and counters;
        where they are asked for, what was left, the interval in force and the least energy that is kept of a reference.

        Counters are of this process: steps that were skipped, and refreshes that were rejected, for what is not finite.
        """
        device = torch.cuda.current_device()
        if self._ogpsa is None or not (metrics := self._ogpsa.metrics_on(device)):
            return {}
        measured = {"removed": "ogpsa removed", "removed_length": "ogpsa removed length", "leak": "ogpsa leak"}
        figures = {title: metrics[name].clamp(min=0.0) for name, title in measured.items() if name in metrics}
        values = {
            "ogpsa refresh (ms)": self._refresh_seconds * 1000,
            "ogpsa skipped steps": float(self._ogpsa.skipped_steps),
            "ogpsa bad refreshes": float(self._bad_refreshes),
        }
        if self._args.ogpsa_adaptive_interval is not None:
            values["ogpsa interval"] = float(self._schedule.interval)
        if self._args.ogpsa_energy < 1.0:
            values["ogpsa energy"] = self._ogpsa.kept_energy
        figures["ogpsa rank"] = metrics["rank"]
        figures |= {name: torch.full((1,), float(value), device=device) for name, value in values.items()}
        if self._args.ogpsa_authors_leak:
            figures["ogpsa leaked"] = metrics.get("added", torch.zeros(1, device=device))
        return figures

    @override
    def after_save(self) -> None:
        """Note that a resumed run would refresh now."""
        self._refresh_is_due = True

    @override
    def state(self) -> dict[str, Any]:
        """What a resumed run would refresh with."""
        return {
            "references": {
                r.name: {"samples": r.num_samples, "loss": r.loss, "fingerprint": r.fingerprint}
                for r in self._references
            },
            "settings": {
                name.removeprefix("ogpsa_"): getattr(self._args, name)
                for name in sorted(vars(self._args))
                if name.startswith("ogpsa_") and name not in NOT_SETTINGS
            },
            "schedule": self._schedule.state(),
            "skipped steps": self._skipped if self._ogpsa is not None else 0,
            "reference loss scale": self._ogpsa.reference_loss_scale if self._ogpsa is not None else None,
        }

    def _stop_if_steps_are_lost(self, step: int) -> None:
        """Every rank has the same count, since every step is skipped on all of them or on none."""
        assert self._ogpsa is not None
        if self._ogpsa.skipped_in_a_row >= self._args.ogpsa_max_bad_steps:
            raise UserError(
                f"the gradient was not finite in {self._ogpsa.skipped_in_a_row} steps in a row, up to step {step}: lower "
                "--lr, look at the data, or allow more with --ogpsa-max-bad-steps"
            )

    def _stop_if_references_are_lost(self, step: int) -> None:
        """Likewise: a refresh is rejected on all ranks or on none."""
        assert self._ogpsa is not None
        told = f"the gradient of reference {self._ogpsa.rejected_references}"
        if not self._ogpsa.has_basis:
            raise UserError(
                f"{told} at the first refresh, before step {step + 1}, so that nothing could be protected: look at its data "
                "and at the weights that were loaded"
            )
        if self._ogpsa.rejected_refreshes >= self._args.ogpsa_max_bad_refreshes:
            raise UserError(
                f"{told}, in {self._ogpsa.rejected_refreshes} refreshes in a row, up to step {step + 1}: look at its data, "
                "lower --lr, or allow more with --ogpsa-max-bad-refreshes"
            )

    def _saved_state(self, iteration: int) -> dict[str, Any]:
        """Of the checkpoint that was loaded, as rank 0 reads it: what follows from it must be the same on all ranks."""
        return from_rank_0(lambda: read_state(self._args, iteration))

    def _compare_with(self, before: dict[str, Any]) -> None:
        """Say where a resumed run departs from the one that wrote the checkpoint; going on is the user's choice."""
        now = json.loads(json.dumps(self.state()))  # as it was written: tuples are lists there
        for kind in ("references", "settings") if before else ():
            for name in sorted(before.get(kind, {}).keys() | now[kind].keys()):
                if before.get(kind, {}).get(name) != now[kind].get(name) and torch.distributed.get_rank() == 0:
                    logger.warning("OGPSA: %s %s is not what the checkpoint was trained with", kind[:-1], name)
