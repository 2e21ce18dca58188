"""DPO's reference policy in Megatron's loop: the model as loaded, remembered by its log-probabilities."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, override

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import ConcatDataset, Dataset

from megatron_ogpsa.console.progress import progress_bar
from megatron_ogpsa.data.micro_batches import micro_batches_at_once
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.arguments.model import MODEL_ARGUMENTS, PRECISION_ARGUMENTS, described, difference
from megatron_ogpsa.integration.checkpoints.loading import read_state
from megatron_ogpsa.integration.inputs.batch import Batch
from megatron_ogpsa.integration.inputs.forward import make_forward_step
from megatron_ogpsa.integration.loop.hooks import LoopHook
from megatron_ogpsa.integration.ranks.agreement import agreed, from_rank_0
from megatron_ogpsa.losses.output import LossFunction
from megatron_ogpsa.losses.preference import PreferenceLossConfig, answer_log_probs, summed_pair_loss
from megatron_ogpsa.watchdog import progress

if TYPE_CHECKING:
    from megatron_ogpsa.data import TokenizedPreferenceDataset
    from megatron_ogpsa.reference_policy.store import LogProbs

LOG_PROBS_FILE = "reference_log_probs.safetensors"
"""Beside the checkpoints."""

_SIGNED = ("rewards/", "log-probs/")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """Log-probabilities that an earlier run has left, and the file that they are in."""

    log_probs: LogProbs
    path: Path


class NumberedPairs(Dataset[dict[str, Tensor]]):
    """The rows of a data set, its pairs numbered on from those of the data sets before it."""

    def __init__(self, dataset: TokenizedPreferenceDataset, first_pair: int, width: int | None = None) -> None:
        """``first_pair``: number of the data set's first pair. ``width``: of pair ids, where rows of others come along."""
        self._dataset = dataset
        self._first_pair = first_pair
        self._width = width

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._dataset)

    @property
    def row_of_pair(self) -> Tensor:
        """The data set's."""
        return self._dataset.row_of_pair

    @property
    def max_pairs_per_row(self) -> int:
        """The data set's."""
        return self._dataset.max_pairs_per_row

    def widened(self, width: int) -> NumberedPairs:
        """The same rows with room for ``width`` pairs each, so that micro-batches may mix them with those of others."""
        return NumberedPairs(self._dataset, self._first_pair, width)

    @override
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One row; absent pairs stay -1."""
        row = self._dataset[index]
        pair_ids = torch.where(row["pair_ids"] >= 0, row["pair_ids"] + self._first_pair, -1)
        missing = 0 if self._width is None else self._width - len(pair_ids)
        return row | {"pair_ids": pad(pair_ids, (0, missing), value=-1)}


class ReferencePolicy(LoopHook):
    """A hook that has every pair's reference log-probabilities before the first step.

    A new run computes them with forward-only passes and keeps them beside its checkpoints; one that was interrupted goes
    on where it stopped, and one that resumes training reads them, since the weights are no longer the reference policy's.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        """Raises UserError for a loss that is not possible."""
        self._args = args
        self._config = PreferenceLossConfig(
            kind=args.ogpsa_dpo_loss,
            beta=args.ogpsa_dpo_beta,
            label_smoothing=args.ogpsa_dpo_label_smoothing,
            length_normalised=args.ogpsa_dpo_length_normalised,
            nll_weight=args.ogpsa_dpo_nll_weight,
        )
        self._datasets: dict[str, NumberedPairs] = {}  # by fingerprint, in the order in which their pairs are numbered
        self._num_pairs = 0
        self._log_probs: LogProbs | None = None
        self._table_N2: Tensor | None = None

    def numbered(self, dataset: TokenizedPreferenceDataset) -> NumberedPairs:
        """Take a data set in; before :meth:`start`, in the same order on all ranks."""
        if dataset.fingerprint not in self._datasets:  # Megatron asks for data once for each model chunk
            assert self._log_probs is None
            self._datasets[dataset.fingerprint] = NumberedPairs(dataset, self._num_pairs)
            self._num_pairs += dataset.num_pairs
        return self._datasets[dataset.fingerprint]

    def loss_of(self, batch: Batch) -> LossFunction:
        """The preference loss of a micro-batch."""
        assert batch.pair_ids is not None
        if self._table_N2 is None:
            raise RuntimeError("a preference loss was asked for before the reference policy's log-probabilities")
        if self._table_N2.device != batch.tokens.device:
            self._table_N2 = self._table_N2.to(batch.tokens.device)
        return partial(
            summed_pair_loss,
            loss_mask=batch.loss_mask,
            document_ids=batch.document_ids,
            pair_ids=batch.pair_ids,
            reference_log_probs=self._table_N2[batch.pair_ids.clamp_min(0)],
            config=self._config,
        )

    @override
    def start(self, model: list[Any], optimizer: Any, forward_backward: Callable[..., Any], iteration: int) -> None:
        """Read or compute the log-probabilities.

        Raises:
            UserError: on all ranks alike: what is stored belongs to other weights or data, is damaged, or is missing where
                training goes on.
        """
        found = self._found()
        if iteration > 0:
            self._take(agreed(lambda: self._resumed(found, iteration)).log_probs)
        else:
            with progress.during("reference log-probabilities"):
                self._take(self._computed(found, model, forward_backward))

    def _take(self, log_probs: LogProbs) -> None:
        from megatron.training import print_rank_0

        self._log_probs = log_probs
        self._table_N2 = log_probs.values_N2
        print_rank_0(f"DPO: reference log-probabilities of {self._num_pairs} pairs, weights {log_probs.weights}")

    @override
    def before_evaluation(self, step: int) -> None:
        """Read the log-probabilities, if no step has wanted them yet.

        Raises:
            UserError: as :meth:`start` where training goes on.
        """
        if self._log_probs is None:
            found = self._found()
            self._take(agreed(lambda: self._resumed(found, step, of_all_data=False)).log_probs)

    @override
    def after_step(self, losses: dict[str, Tensor], step: int) -> None:
        """A line with the step's rewards, which may be negative: Megatron's log line leaves out what is not positive."""
        if step % self._args.log_interval == 0 and dist.get_rank() == dist.get_world_size() - 1:
            named = (f"{name}: {losses[name].item():.4f}" for name in losses if name.startswith(_SIGNED))
            print(f" DPO iteration {step:8d} | {' | '.join(named)} |", flush=True)

    @override
    def state(self) -> dict[str, Any]:
        """Which weights the reference policy has, and the loss."""
        weights = self._log_probs.weights if self._log_probs is not None else None
        return {"reference policy": weights, "preference loss": asdict(self._config)}

    @property
    def _own_path(self) -> Path | None:
        """Where this run keeps them, if it saves anything."""
        return Path(self._args.save) / LOG_PROBS_FILE if self._args.save else None

    def _found(self) -> Found | None:
        """What rank 0 finds beside the checkpoints, on all ranks; those of a run that only gives its weights do not count."""
        from megatron_ogpsa.reference_policy.store import read_log_probs

        folders = [self._args.save, None if self._args.finetune else self._args.load]
        paths = [Path(folder) / LOG_PROBS_FILE for folder in folders if folder]

        def read() -> Found | None:
            found = ((read_log_probs(path), path) for path in paths)
            return next((Found(log_probs, path) for log_probs, path in found if log_probs is not None), None)

        return from_rank_0(read)

    def _resumed(self, found: Found | None, iteration: int, *, of_all_data: bool = True) -> Found:
        """What training goes on with.

        Args:
            of_all_data: whether all data sets have been taken in; references of the loss ``dpo`` bring theirs with the first
                step, numbered after the others.
        """
        if found is None:
            place = self._own_path or Path(self._args.load or ".") / LOG_PROBS_FILE
            raise UserError(
                f"{place} is missing, and the model has been trained on since: restore it, or start DPO from this "
                "checkpoint with --pretrained-checkpoint (or --finetune) and a new --save"
            )
        self._check_data(found, of_all_data=of_all_data)
        self._check_settings(found, MODEL_ARGUMENTS)
        before = read_state(self._args, iteration)
        self._compare_loss(before.get("preference loss"))
        expected = before.get("reference policy")
        if expected is not None and expected != found.log_probs.weights:
            raise UserError(
                f"{found.path} is of weights {found.log_probs.weights}, the checkpoint's run began with {expected}: "
                "restore it"
            )
        if not found.log_probs.is_complete:
            raise UserError(f"{found.path} is not complete: restore it, or start anew with another --save")
        self._keep(found)
        return found

    def _compare_loss(self, before: object) -> None:
        """Say what of the loss is another now; going on is the user's choice."""
        if dist.get_rank() != 0 or not isinstance(before, dict):
            return
        for name, value in asdict(self._config).items():
            if name in before and before[name] != value:
                logger.warning("DPO: %s is %s, in the checkpoint's run it was %s", name, value, before[name])

    def _keep(self, found: Found) -> None:
        """Beside the checkpoints to come, from which a run may go on that knows no other folder."""
        from megatron_ogpsa.reference_policy.store import write_log_probs

        if dist.get_rank() == 0 and self._own_path is not None and found.path != self._own_path:
            write_log_probs(self._own_path, found.log_probs)

    @property
    def _settings(self) -> dict[str, str]:
        """What log-probabilities depend on beside weights and data."""
        return described(self._args, (*MODEL_ARGUMENTS, *PRECISION_ARGUMENTS))

    def _check_settings(self, found: Found, names: Sequence[str]) -> None:
        if different := difference(found.log_probs.settings, {name: self._settings[name] for name in names}):
            raise UserError(
                f"{found.path} was computed with {different}: use that again, delete the file and start DPO anew"
            )

    def _check_data(self, found: Found, *, of_all_data: bool = True) -> None:
        known = found.log_probs.data if of_all_data else found.log_probs.data[: len(self._datasets)]
        if known != tuple(self._datasets):
            raise UserError(
                f"{found.path} is of other data, tokenizer, chat template or --seq-length: use those again, or start anew "
                "with another --save"
            )

    def _computed(self, found: Found | None, model: list[Any], forward_backward: Callable[..., Any]) -> LogProbs:
        from megatron.training import print_rank_0

        from megatron_ogpsa.reference_policy.passes import NotFiniteError, complete
        from megatron_ogpsa.reference_policy.store import LogProbs, write_log_probs
        from megatron_ogpsa.reference_policy.weights import weights_fingerprint

        weights = weights_fingerprint(model)
        path = self._own_path
        if found is not None:
            known = found
            agreed(lambda: self._check_data(known))
            agreed(lambda: self._check_settings(known, (*MODEL_ARGUMENTS, *PRECISION_ARGUMENTS)))
            if found.log_probs.weights != weights:
                raise UserError(
                    f"{found.path} is of weights {found.log_probs.weights}, the model has {weights}: delete it, or use "
                    "another --save"
                )
            agreed(lambda: self._keep(known))
            print_rank_0(
                f"DPO: {int(found.log_probs.is_known_N.sum())} of {self._num_pairs} reference log-probabilities are there"
            )
        log_probs = (
            found.log_probs
            if found is not None
            else LogProbs.unknown(self._num_pairs, weights=weights, data=tuple(self._datasets), settings=self._settings)
        )
        is_first = dist.get_rank() == 0
        numbered = list(self._datasets.values())
        width = max(pairs.max_pairs_per_row for pairs in numbered)
        rows: ConcatDataset[dict[str, Tensor]] = ConcatDataset([pairs.widened(width) for pairs in numbered])
        firsts = [0, *rows.cumulative_sizes[:-1]]
        row_of_pair_N = torch.cat([pairs.row_of_pair + first for pairs, first in zip(numbered, firsts, strict=True)])
        done = int(log_probs.is_known_N.sum())
        with progress_bar(
            "DPO reference policy", self._num_pairs, " pairs", done=done, is_shown=is_first, stays=True
        ) as bar:

            def after_round(so_far: LogProbs, num_new: int) -> None:
                if path is not None:
                    agreed(lambda: write_log_probs(path, so_far) if is_first else None)
                bar.update(num_new)

            try:
                passes = self._passes(model, forward_backward)
                return complete(log_probs, rows, row_of_pair_N, passes, after_round=after_round)
            except NotFiniteError as error:
                raise UserError(
                    f"the reference policy's log-probabilities are not finite ({error}): check the weights that were loaded"
                ) from None

    def _passes(self, model: list[Any], forward_backward: Callable[..., Any]) -> Any:
        from megatron_ogpsa.reference_policy.passes import Passes

        args = self._args
        return Passes(
            chunks=model,
            forward_step=make_forward_step(_log_probs_of, packed=True, validate=False),
            forward_backward=forward_backward,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            multiple=micro_batches_at_once(args),
            decoder_seq_length=args.decoder_seq_length,
        )


def _log_probs_of(batch: Batch) -> Any:
    """In place of a loss: gives the schedule (pair ids, log-probabilities), which it collects."""

    def collect(token_loss: Tensor, non_loss_data: bool = True) -> tuple[Tensor, Tensor]:
        pair_ids = batch.pair_ids
        assert pair_ids is not None
        return pair_ids, answer_log_probs(token_loss, batch.loss_mask, batch.document_ids, pair_ids.shape[1])

    return collect
