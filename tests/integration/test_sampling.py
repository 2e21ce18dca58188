"""The endless stream of samples, and where packed documents begin."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from megatron_ogpsa.integration.inputs.batch import document_boundaries, document_numbers
from megatron_ogpsa.integration.inputs.sampling import EpochStream, EvaluationStream


class Numbers(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"tokens": torch.tensor(index), "loss_mask": torch.ones(1)}


def drawn(stream: EpochStream, start: int = 0) -> list[int]:
    return [int(stream[index]["tokens"]) for index in range(start, len(stream))]


def test_each_epoch_has_every_sample_once_in_an_order_of_its_own() -> None:
    order = drawn(EpochStream(Numbers(), length=21, seed=5, split=None))
    epochs = [order[0:7], order[7:14], order[14:21]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_resumed_stream_goes_on_where_the_first_stopped_also_within_an_epoch() -> None:
    whole = drawn(EpochStream(Numbers(), length=21, seed=5, split=None))
    for consumed in (3, 7, 10, 20):
        assert drawn(EpochStream(Numbers(), length=21, seed=5, split=None), start=consumed) == whole[consumed:]


def test_the_seed_decides_the_order() -> None:
    assert drawn(EpochStream(Numbers(), length=7, seed=5, split=None)) != drawn(
        EpochStream(Numbers(), length=7, seed=6, split=None)
    )


def test_seeds_side_by_side_share_no_epoch() -> None:
    def epochs(seed: int) -> set[tuple[int, ...]]:
        order = drawn(EpochStream(Numbers(), length=7 * 20, seed=seed, split=None))
        return {tuple(order[start : start + 7]) for start in range(0, len(order), 7)}

    assert not epochs(5) & epochs(6)


def test_every_evaluation_takes_the_same_samples() -> None:
    stream = EvaluationStream(Numbers(), window=4, length=12, split=None)
    assert drawn(stream) == [0, 1, 2, 3] * 3
    assert sorted(drawn(stream, start=6)[:4]) == [0, 1, 2, 3]  # of a run that goes on after half of one


def test_an_evaluation_of_the_whole_set_counts_each_sample_once() -> None:
    stream = EvaluationStream(Numbers(), window=8, length=16, split=None)
    counted = [int(stream[index]["tokens"]) for index in range(16) if stream[index]["loss_mask"].any()]
    assert counted == [*range(7)] * 2


def test_documents_end_with_their_row_and_padding_is_one_of_them() -> None:
    # The second row goes on with number 1, where the first ended: still another document.
    document_ids = torch.tensor([[0, 0, 1, 1, 1], [1, 2, 2, -1, -1]])
    boundaries = document_boundaries(document_ids)
    assert boundaries.tolist() == [0, 2, 5, 6, 8, 10]
    assert boundaries.dtype == torch.int32
    numbers = document_numbers(document_ids)
    assert numbers.tolist() == [[0, 0, 1, 1, 1, 2, 3, 3, 4, 4]]
    assert numbers.dtype == torch.int32
