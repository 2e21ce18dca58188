"""Projection in Megatron's training loop: when references are refreshed, and what the log says about it.

``megatron.training`` has no callbacks, so two functions of its loop are wrapped: ``train_step`` (refresh before it
when one is due, figures after it) and ``save_checkpoint_and_time`` (a refresh is due after it). A refresh is due at
the start, every interval, and after each checkpoint: then a resumed run and an undisturbed one have the same basis,
without any in the checkpoint.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import os
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from megatron_ogpsa.config import OGPSAConfig
from megatron_ogpsa.errors import UnsupportedError, UserError
from megatron_ogpsa.integration.patching import Patch, apply_patches

logger = logging.getLogger(__name__)

STATE_FILE = "ogpsa.json"
"""Beside the checkpoints: which references and settings the run has."""

_active: ProjectionRun | None = None


def config_from_arguments(args: argparse.Namespace) -> OGPSAConfig:
    """The projection's settings from ``--ogpsa-*`` flags.

    Raises:
        UserError: a value that the projection refuses.
    """
    return OGPSAConfig(
        granularity=args.ogpsa_granularity,
        mode=args.ogpsa_mode,
        refresh_interval=args.ogpsa_refresh_interval,
        basis_dtype=args.ogpsa_basis_dtype,
    )


def check_projection_arguments(args: argparse.Namespace) -> None:
    """Refuse at start, by the flag's name, what projection in Megatron's loop does not support yet.

    Raises:
        UserError: references with the same name, or the script did not add our flags to Megatron's parser.
        UnsupportedError: a Megatron feature, with the nearest thing that works.
    """
    if not hasattr(args, "ogpsa_reference"):
        raise UserError(
            "the --ogpsa-* flags are unknown to this script: give Megatron's parser "
            "extra_args_provider=megatron_ogpsa.add_ogpsa_arguments"
        )
    if not args.ogpsa_reference:
        return
    names = [name for name, _ in args.ogpsa_reference]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--ogpsa-reference {repeated[0]}=… is given twice: give each reference a name of its own")
    config_from_arguments(args)
    scaling = "reference passes would leave their mark on the scaling factors"
    dtensors = "its gradients lie outside Megatron's gradient buffers"
    for is_given, flag, reason, remedy in (
        (args.fp8, "--fp8-format", scaling, "train in --bf16"),
        (args.fp4, "--fp4-format", scaling, "train in --bf16"),
        (args.context_parallel_size > 1, "--context-parallel-size", "references are not split over its ranks", "use 1"),
        (args.use_megatron_fsdp, "--use-megatron-fsdp", dtensors, "use --use-distributed-optimizer"),
        (args.use_torch_fsdp2, "--use-torch-fsdp2", dtensors, "use --use-distributed-optimizer"),
        (args.optimizer not in ("adam", "sgd"), f"--optimizer {args.optimizer}", "its shards differ", "use adam"),
        (args.mtp_num_layers, "--mtp-num-layers", "its layers are clipped by a norm of their own", "leave it out"),
        (args.cuda_graph_impl != "none", "--cuda-graph-impl", "graphs replay training passes only", "leave it out"),
        (args.optimizer_cuda_graph, "--optimizer-cuda-graph", "the projection decides on the host", "leave it out"),
        (args.perform_rl_step, "--perform-rl-step", "references have no rollouts", "leave it out"),
    ):
        if is_given:
            raise UnsupportedError(f"{flag} with --ogpsa-reference is not supported: {reason}; {remedy}")


class ProjectionRun:
    """The plugin in one run of Megatron's loop: attached at the first training step, refreshed when due."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._ogpsa: Any = None
        self._references: list[Any] = []
        self._refresh_is_due = True
        self._refresh_seconds = 0.0

    def before_step(
        self, model: list[Any], optimizer: Any, forward_backward: Callable[..., Any], iteration: int
    ) -> None:
        """Refresh the basis if one is due at ``iteration`` (steps already taken)."""
        if self._ogpsa is None:
            self._attach(model, optimizer)
        if not (self._refresh_is_due or iteration % self._ogpsa.config.refresh_interval == 0):
            return
        from megatron_ogpsa.integration.sft import make_forward_step
        from megatron_ogpsa.references import refresh

        started = time.monotonic()
        refresh(
            self._ogpsa,
            self._references,
            optimizer=optimizer,
            chunks=model,
            forward_step=make_forward_step(validate=False),
            forward_backward=forward_backward,
            seq_length=self._args.seq_length,
            micro_batch_size=self._args.micro_batch_size,
            decoder_seq_length=self._args.decoder_seq_length,
        )
        self._refresh_seconds = time.monotonic() - started
        self._refresh_is_due = False

    def figures(self) -> dict[str, torch.Tensor]:
        """What the log line and TensorBoard gain, in the form of Megatron's reduced losses."""
        metrics = self._ogpsa.metrics
        if not metrics:
            return {}
        values = {
            "ogpsa removed": max(metrics["removed"], 0.0),
            "ogpsa rank": metrics["rank"],
            "ogpsa refresh (ms)": self._refresh_seconds * 1000,
        }
        return {name: torch.tensor([value], device=torch.cuda.current_device()) for name, value in values.items()}

    def after_save(self) -> None:
        """Note that a resumed run would refresh now, and what it would refresh with."""
        self._refresh_is_due = True
        if torch.distributed.get_rank() == 0:
            _write_atomically(Path(self._args.save) / STATE_FILE, self._state())

    def _attach(self, model: list[Any], optimizer: Any) -> None:
        from megatron.training import print_rank_0

        from megatron_ogpsa.integration.reference_data import load_references
        from megatron_ogpsa.plugin import attach

        self._references = load_references(self._args)
        self._ogpsa = attach(optimizer, model, config_from_arguments(self._args))
        described = ", ".join(
            f"{r.name} ({r.num_samples} samples, {r.num_supervised_tokens} tokens)" for r in self._references
        )
        print_rank_0(
            f"OGPSA: references {described}; {len(self._ogpsa.block_names)} blocks by {self._args.ogpsa_granularity}, "
            f"mode {self._args.ogpsa_mode}, refreshed every {self._args.ogpsa_refresh_interval} steps"
        )
        if self._args.load:
            self._compare_with(Path(self._args.load) / STATE_FILE)

    def _state(self) -> dict[str, Any]:
        return {
            "references": {r.name: {"samples": r.num_samples, "fingerprint": r.fingerprint} for r in self._references},
            "settings": {
                name.removeprefix("ogpsa_"): getattr(self._args, name)
                for name in sorted(vars(self._args))
                if name.startswith("ogpsa_") and name not in ("ogpsa_reference", "ogpsa_train_data", "ogpsa_valid_data")
            },
        }

    def _compare_with(self, path: Path) -> None:
        """Say where a resumed run departs from the one that wrote the checkpoint; going on is the user's choice."""
        if not path.exists() or self._args.finetune:
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read ({error}): delete it to resume without comparing references"
            ) from None
        now = self._state()
        for kind in ("references", "settings"):
            for name in sorted(before.get(kind, {}).keys() | now[kind].keys()):
                if before.get(kind, {}).get(name) != now[kind].get(name) and torch.distributed.get_rank() == 0:
                    logger.warning("OGPSA: %s %s is not what the checkpoint was trained with", kind[:-1], name)


def install(args: argparse.Namespace) -> None:
    """Let Megatron's loop project in this run, if it has references; otherwise the loop is Megatron's own.

    Raises:
        UserError, UnsupportedError: see :func:`check_projection_arguments`.
        RuntimeError: the functions to be wrapped are not those that this was written for.
    """
    global _active
    check_projection_arguments(args)
    _active = ProjectionRun(args) if args.ogpsa_reference else None
    if _active is not None:
        apply_patches(_LOOP_PATCHES)


def _projecting_train_step(original: Callable[..., Any]) -> Callable[..., Any]:
    _require_parameters(
        original,
        "forward_step_func data_iterator model optimizer opt_param_scheduler config forward_backward_func iteration",
    )

    @wraps(original)
    def train_step(
        forward_step_func: Any,
        data_iterator: Any,
        model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        config: Any,
        forward_backward_func: Any,
        iteration: int | None = None,
        **kwargs: Any,
    ) -> Any:
        run = _active
        if run is not None:
            step = run._args.curr_iteration if iteration is None else iteration
            run.before_step(model, optimizer, forward_backward_func, step)
        losses, *others = original(
            forward_step_func,
            data_iterator,
            model,
            optimizer,
            opt_param_scheduler,
            config,
            forward_backward_func,
            iteration=iteration,
            **kwargs,
        )
        if run is not None and losses:  # only the last pipeline stage has losses, and logs
            losses = losses | run.figures()
        return (losses, *others)

    return train_step


def _refreshing_save(original: Callable[..., Any]) -> Callable[..., Any]:
    _require_parameters(original, "iteration model optimizer opt_param_scheduler")

    @wraps(original)
    def save_checkpoint_and_time(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if _active is not None:
            _active.after_save()
        return result

    return save_checkpoint_and_time


def _require_parameters(function: Callable[..., Any], names: str) -> None:
    expected = names.split()
    found = list(inspect.signature(function).parameters)[: len(expected)]
    if found != expected:
        raise RuntimeError(f"{function.__name__} takes {found}, not {expected} as in Megatron 0.19")


def _write_atomically(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)


_LOOP_PATCHES = (
    Patch(
        target="megatron.training.training:train_step",
        reason="Megatron 0.19's loop has no callback before a step; the basis is refreshed there",
        replace=_projecting_train_step,
    ),
    Patch(
        target="megatron.training.training:save_checkpoint_and_time",
        reason="Megatron 0.19's loop has no callback after a checkpoint; a resumed run refreshes there, so we must too",
        replace=_refreshing_save,
    ),
)
