"""A finite data set as the endless stream that Megatron's sequential sampler reads: reshuffled, or the same at each turn."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron_ogpsa.data.micro_batches import filler_like


class EpochStream(Dataset[dict[str, torch.Tensor]]):
    """``length`` samples: the data set over and over, in a new order in each epoch.

    Sample i is a function of (i, seed) alone: with Megatron's ``--dataloader-type single``, which reads indices in
    ascending order from the number of consumed samples, a resumed run continues exactly where the saved one stopped.

    Args:
        dataset: a non-empty map-style data set.
        length: samples to offer; Megatron's ``train_iters`` × ``global_batch_size``.
        seed: of the order.
        split: Megatron's ``Split`` of this data set, by which its loader chooses the batch size.
    """

    def __init__(self, dataset: Dataset[dict[str, torch.Tensor]], *, length: int, seed: int, split: object) -> None:
        self.dataset = dataset
        self.split = split
        self._length = length
        self._epoch_length = len(dataset)  # type: ignore[arg-type]  # Dataset does not declare __len__
        self._seed = seed
        self._order_epoch = -1
        self._order = torch.arange(self._epoch_length)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        epoch, position = divmod(index, self._epoch_length)
        if epoch != self._order_epoch:
            self._order = _permutation(self._epoch_length, self._seed, epoch)
            self._order_epoch = epoch
        return self.dataset[int(self._order[position])]


def _permutation(length: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of an epoch, int64 [length].

    Not of ``seed + epoch``: the second epoch of one seed would be the first of the next, and runs that shall tell how much
    seeds matter would share them.
    """
    mixed = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    return torch.randperm(length, generator=torch.Generator().manual_seed(int(mixed[0])))


class EvaluationStream(Dataset[dict[str, torch.Tensor]]):
    """The first ``window`` samples over and over: one evaluation after the other takes the same ones.

    Megatron goes on in the validation data where the last evaluation stopped, so that its loss moves with the data; here a
    run that goes on, with another window too, has whole turns of the same samples. Beyond the end of the data set come rows
    that count nothing.

    Args:
        dataset: a non-empty map-style data set.
        window: samples of an evaluation, a multiple of the batch.
        length: samples to offer.
        split: Megatron's ``Split`` of this data set, by which its loader chooses the batch size.
    """

    def __init__(self, dataset: Dataset[dict[str, torch.Tensor]], *, window: int, length: int, split: object) -> None:
        self.dataset = dataset
        self.split = split
        self._window = window
        self._length = length
        self._num_samples = len(dataset)  # type: ignore[arg-type]  # Dataset does not declare __len__

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        position = index % self._window
        return self.dataset[position] if position < self._num_samples else filler_like(self.dataset[0])
