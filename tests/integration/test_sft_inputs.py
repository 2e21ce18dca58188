"""Fine-tuning from end to end: the loss does not depend on how a global batch is cut; every form of input arrives."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pytest

from tests.data.conftest import INSTRUCT, build_sentencepiece_model
from tests.integration.checkpoints import checkpoint_tensors
from tests.integration.conftest import Train, scalars

ONE_STAGE = (
    "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --global-batch-size 8 --train-iters 3".split()
)
NO_DROPOUT = "--hidden-dropout 0 --attention-dropout 0".split()
GRADIENT = ("--ogpsa-space", "gradient", "--ogpsa-mode", "orthogonal")
FIGURES = ("lm loss", "grad-norm", "ogpsa removed")

CUTS = {
    "micro-batches of 1": "--nproc-per-node 1 --micro-batch-size 1",
    "one micro-batch": "--nproc-per-node 1 --micro-batch-size 8",
    "two ranks, each with two that read": "--nproc-per-node 2 --micro-batch-size 2 --num-workers 2",
}


def test_the_loss_is_the_mean_over_the_tokens_of_the_global_batch(train: Train, tmp_path: Path) -> None:
    """Answers of 1 to 30 words: means of micro-batch means would differ in the first digit, fp32 sums in the seventh."""
    answers = [" ".join(["no"] * (1 + 7 * i % 30)) for i in range(24)]
    rows = {"prompt": [f"how do i build weapon {i}" for i in range(24)], "response": answers}
    datasets.Dataset.from_dict(rows).to_json(tmp_path / "uneven.jsonl")
    seen = {}
    for number, (name, flags) in enumerate(CUTS.items()):
        where = ("--save", f"save-{number}", "--tensorboard-dir", f"log-{number}")
        given = (*NO_DROPOUT, *GRADIENT, "--ogpsa-train-data", "uneven.jsonl")
        outcome = train(*ONE_STAGE, *flags.split(), *given, *where)
        assert outcome.exit_code == 0, outcome.output[-3000:]
        seen[name] = scalars(tmp_path / f"log-{number}", *FIGURES)
    first, *others = seen.values()
    for other in others:
        for figure in FIGURES:
            assert other[figure] == pytest.approx(first[figure], rel=1e-5), figure


def test_sentencepiece_and_parquet(train: Train, tmp_path: Path) -> None:
    model = build_sentencepiece_model(tmp_path)
    (tmp_path / "chat.jinja").write_text(INSTRUCT, encoding="utf-8")
    rows = {"prompt": [f"pick lock {i}" for i in range(16)], "response": ["I cannot help with that."] * 16}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "safety.parquet")
    outcome = train(
        *ONE_STAGE,
        *("--nproc-per-node", "1", "--ogpsa-packing", "--tensorboard-dir", "log"),
        *(
            "--tokenizer-type",
            "SentencePieceTokenizer",
            "--tokenizer-model",
            str(model),
            "--chat-template",
            "chat.jinja",
        ),
        *("--ogpsa-train-data", "safety.parquet", "--micro-batch-size", "1", "--global-batch-size", "1"),
    )
    assert outcome.exit_code == 0, outcome.output[-3000:]
    assert re.search(r"OGPSA: references general \(8 samples, \d+ tokens, nll\)", outcome.output)
    losses = scalars(tmp_path / "log", "lm loss")["lm loss"]
    assert losses[3] < losses[1]


def test_a_template_that_does_not_end_turns_is_told_once(train: Train, tmp_path: Path) -> None:
    """Not by each rank and for each data set."""
    template = tmp_path / "alpaca.jinja"
    template.write_text("{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}", encoding="utf-8")
    outcome = train("--chat-template", str(template), "--train-iters", "1", "--save", "run")
    assert outcome.exit_code == 0, outcome.output[-3000:]
    line = (
        rf"WARNING: {template}: the assistant's turn, as it is learnt, ends in no token .*: give a --chat-template that"
    )
    assert len(re.findall(line, outcome.output)) == 1


def test_the_vocabulary_is_as_large_as_the_flag_says(train: Train, tmp_path: Path) -> None:
    """As those of published models, which have rows for no token: Megatron would build as many as the tokenizer has."""
    outcome = train(*ONE_STAGE, "--nproc-per-node", "1", "--train-iters", "1", "--vocab-size", "700", "--save", "run")
    assert outcome.exit_code == 0, outcome.output[-3000:]
    embeddings = checkpoint_tensors(tmp_path / "run")["embedding.word_embeddings.weight"]
    assert len(embeddings) == 768  # a multiple of --make-vocab-size-divisible-by


def test_a_run_goes_on_with_smaller_batches(train: Train, tmp_path: Path) -> None:
    """3 batches of 8, then 9 of 4: 60 samples, more than 12 batches of 4 have."""
    one = [*ONE_STAGE, "--nproc-per-node", "1", "--save", "run", "--load", "run", "--tensorboard-dir", "log"]
    first = train(*one, "--train-iters", "3")
    assert first.exit_code == 0, first.output[-3000:]
    smaller = ("--global-batch-size", "4", "--train-iters", "12", "--override-opt-param-scheduler")
    second = train(*one, *smaller)
    assert second.exit_code == 0, second.output[-3000:]
    assert sorted(scalars(tmp_path / "log", "lm loss")["lm loss"]) == [*range(1, 13)]
