"""What the reference policy reads of its data sets, and how it puts them together."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ogpsa.data import ChatTokenizer, TokenizedPreferenceDataset, build_preference_dataset, load_chat_tokenizer
from megatron_ogpsa.data.micro_batches import deal_out
from megatron_ogpsa.integration import reference_policy
from megatron_ogpsa.integration.arguments.model import MODEL_ARGUMENTS, PRECISION_ARGUMENTS
from megatron_ogpsa.integration.reference_policy import ReferencePolicy
from megatron_ogpsa.reference_policy import weights
from megatron_ogpsa.reference_policy.store import LogProbs
from tests.data.conftest import build_hugging_face_folder

Pairs = Callable[..., TokenizedPreferenceDataset]

RANKS = 2


class OneRank:
    """In place of passes through a model: the first of :data:`RANKS` ranks, whose micro-batches it keeps."""

    rows_per_round = 8

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def run(self, rows: Any, num_pairs: int) -> tuple[Tensor, Tensor]:
        for rank in range(RANKS) if isinstance(rows, list) else (0,):  # a list is read already
            self.batches += deal_out(rows, micro_batch_size=4, rank=rank, size=RANKS)
        return torch.zeros(num_pairs, 2, dtype=torch.float64), torch.ones(num_pairs, dtype=torch.bool)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return load_chat_tokenizer("HuggingFaceTokenizer", str(build_hugging_face_folder(tmp_path_factory.mktemp("hf"))))


@pytest.fixture
def pairs(tokenizer: ChatTokenizer, tmp_path: Path) -> Pairs:
    def build(number: int, words: int, name: str) -> TokenizedPreferenceDataset:
        rows = [
            {"prompt": f"{name} {i}?", "chosen": "yes " * (words + i % 3), "rejected": "no " * words}
            for i in range(number)
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return build_preference_dataset(str(path), tokenizer, seq_length=256, packing=True, cache_dir=None)

    return build


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., OneRank]:
    """The log-probabilities that these data sets lack, computed by a rank that is given back."""

    def compute(*datasets: TokenizedPreferenceDataset, known: tuple[int, ...] = ()) -> OneRank:
        args = Namespace(**dict.fromkeys((*MODEL_ARGUMENTS, *PRECISION_ARGUMENTS)))
        vars(args).update(save=None, load=None, finetune=False, ogpsa_dpo_loss="sigmoid", ogpsa_dpo_beta=0.1)
        args.ogpsa_dpo_label_smoothing = args.ogpsa_dpo_nll_weight = 0.0
        args.ogpsa_dpo_length_normalised = False
        policy, passes = ReferencePolicy(args), OneRank()
        for dataset in datasets:
            policy.numbered(dataset)
        total = sum(dataset.num_pairs for dataset in datasets)
        data = tuple(dataset.fingerprint for dataset in datasets)
        before = LogProbs.unknown(total, weights="w", data=data, settings=policy._settings)
        before.is_known_N[list(known)] = True
        monkeypatch.setattr(reference_policy.dist, "get_rank", lambda: 1)
        monkeypatch.setattr(weights, "weights_fingerprint", lambda model: "w")
        monkeypatch.setattr("megatron.training.print_rank_0", lambda line: None)
        monkeypatch.setattr(policy, "_passes", lambda model, schedule: passes)
        policy._computed(reference_policy.Found(before, Path("there")), [], lambda: None)
        return passes

    return compute


def test_a_rank_reads_its_own_rows_alone(
    pairs: Pairs, computed: Callable[..., OneRank], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round by round every other one; and one whose pairs are known is read by nobody."""
    first, second = pairs(20, 12, "first"), pairs(21, 12, "other")
    rows = [(dataset.fingerprint, index) for dataset in (first, second) for index in range(len(dataset))]
    known = first[3]["pair_ids"][first[3]["pair_ids"] >= 0].tolist()
    read: set[tuple[str, int]] = set()
    original = TokenizedPreferenceDataset.__getitem__

    def recorded(self: TokenizedPreferenceDataset, index: int) -> dict[str, Tensor]:
        read.add((self.fingerprint, index))
        return original(self, index)

    monkeypatch.setattr(TokenizedPreferenceDataset, "__getitem__", recorded)
    passes = computed(first, second, known=tuple(known))
    assert len(rows) > OneRank.rows_per_round
    assert read == {*[*rows[:3], *rows[4:]][::RANKS]}
    assert all(batch["pair_ids"].shape[1] == 2 for batch in passes.batches)


def test_rows_of_data_sets_with_other_numbers_of_pairs_share_micro_batches(
    pairs: Pairs, computed: Callable[..., OneRank]
) -> None:
    """Packed validation pairs that are longer than those of training, so that fewer are in a row."""
    short, long = pairs(20, 5, "short"), pairs(21, 30, "long")
    assert short.max_pairs_per_row > long.max_pairs_per_row
    batches = computed(short, long).batches
    assert {batch["pair_ids"].shape for batch in batches} == {(4, short.max_pairs_per_row)}
    every = [
        *(short[row]["pair_ids"] for row in range(len(short))),
        *(long[row]["pair_ids"] for row in range(len(long))),
    ]
    firsts = [0] * len(short) + [short.num_pairs] * len(long)
    mine = [
        pair + first for ids, first in [*zip(every, firsts, strict=True)][::RANKS] for pair in ids.tolist() if pair >= 0
    ]
    assert [pair for batch in batches for pair in batch["pair_ids"].flatten().tolist() if pair >= 0] == mine
