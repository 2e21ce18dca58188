"""Whole runs on Transformer Engine's layers: as on Megatron's own layers, from the same weights."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest

from megatron_ogpsa.precision.fp8_support import ALLOW_PICKLES
from tests.harness.preloaded import PreloadedCommand
from tests.integration.conftest import CONFIG, Train, scalars, write_inputs
from tests.integration.test_dpo import dpo_flags

ONE = "--nproc-per-node 1 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1"
TWO = "--nproc-per-node 2 --pipeline-model-parallel-size 1 --make-vocab-size-divisible-by 64"

NO_DROPOUT = ("--hidden-dropout", "0.0", "--attention-dropout", "0.0")
"""Emulated attention has none."""

STEPS = 4
RUNS = {
    "sft": "--ogpsa-packing --micro-batch-size 1",
    "sft of single documents": "--micro-batch-size 2",
    "dpo": "--micro-batch-size 1",
}


@pytest.mark.parametrize(("kind", "layout"), [("sft", "tp2"), ("sft of single documents", "one"), ("dpo", "one")])
def test_losses_are_those_of_megatrons_layers(train_te: Train, tmp_path: Path, kind: str, layout: str) -> None:
    """Rows of several documents go through Transformer Engine's attention as ``thd``, through Megatron's with a mask; in TP2
    also with sequence parallelism.

    2e-5: fp32 products in another order over projected steps, as between layouts.
    """
    data = dpo_flags(tmp_path, "dp1", "ignored")[:6] if kind == "dpo" else []
    where = ONE.split() if layout == "one" else TWO.split()
    sequence_parallel = () if layout == "one" else ("--sequence-parallel",)
    few = ("--global-batch-size", "2", "--train-iters", str(STEPS), "--ogpsa-reference-samples", "4")
    common = (*data, *where, *few, *RUNS[kind].split(), *NO_DROPOUT)
    local = ("--transformer-impl", "local")
    first = train_te(*common, *local, "--train-iters", "1", "--save", "weights", "--save-interval", "1")
    assert first.exit_code == 0, first.output[-3000:]
    figures = []
    for name, flags in (("megatron", local), ("te", sequence_parallel)):
        outcome = train_te(
            *(*common, *flags, "--pretrained-checkpoint", "weights"),
            *("--save", name, "--tensorboard-dir", f"{name}-log"),
        )
        assert outcome.exit_code == 0, outcome.output[-3000:]
        figures.append(
            scalars(tmp_path / f"{name}-log", "dpo loss" if kind == "dpo" else "lm loss", "grad-norm", "ogpsa rank")
        )
    of_megatron, of_te = figures
    assert of_megatron.keys() == of_te.keys()
    for figure, points in of_megatron.items():
        assert len(points) == STEPS
        assert of_te[figure] == pytest.approx(points, rel=2e-5), figure


def test_split_sequences_train_as_whole_ones(train_te: Train, tmp_path: Path) -> None:
    """Transformer Engine's ring attention in CP2, in bf16, which it wants, against one process.

    5e-4: bf16 rounds to 4e-3, and the mean over some hundred tokens keeps a tenth of that; measured 5e-5.
    """
    flags = "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --attention-dropout 0 --hidden-dropout 0 --bf16 "
    flags += f"--train-iters {STEPS} --global-batch-size 2 --micro-batch-size 1 --ogpsa-reference-samples 4"
    for name, layout in (("whole", "--nproc-per-node 1"), ("split", "--nproc-per-node 2 --context-parallel-size 2")):
        outcome = train_te(*layout.split(), *flags.split(), "--tensorboard-dir", f"{name}-log", "--save", name)
        assert outcome.exit_code == 0, outcome.output[-3000:]
    whole, split = (scalars(tmp_path / f"{name}-log", "lm loss")["lm loss"] for name in ("whole", "split"))
    assert [*split] == [*range(1, STEPS + 1)]
    assert split == pytest.approx(whole, rel=5e-4)


LATENT = (
    "--multi-latent-attention --q-lora-rank 12 --kv-lora-rank 10 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 8 "
    "--qk-layernorm --rope-type rope"
)


def test_latent_attention_trains_in_tp2_as_in_one_process(train_te: Train, tmp_path: Path) -> None:
    """2e-5: fp32 products in another order over projected steps, as between layouts."""
    few = f"--global-batch-size 2 --micro-batch-size 1 --train-iters {STEPS} --ogpsa-reference-samples 4"
    common = (*LATENT.split(), *few.split(), *NO_DROPOUT, "--make-vocab-size-divisible-by", "64")
    config = tmp_path / "latent.yaml"
    config.write_text(
        re.sub(r"(?m)^(group-query-attention|num-query-groups).*\n", "", CONFIG.read_text(encoding="utf-8")),
        encoding="utf-8",
    )
    train = partial(train_te, config=config)
    first = train(*common, *ONE.split(), "--train-iters", "1", "--save", "weights", "--save-interval", "1")
    assert first.exit_code == 0, first.output[-3000:]
    figures = []
    for name, layout in (("one", ONE), ("two", f"{TWO} --sequence-parallel")):
        outcome = train(
            *(*common, *layout.split(), "--pretrained-checkpoint", "weights"),
            *("--save", name, "--tensorboard-dir", f"{name}-log"),
        )
        assert outcome.exit_code == 0, outcome.output[-3000:]
        figures.append(scalars(tmp_path / f"{name}-log", "lm loss", "grad-norm", "ogpsa rank"))
    for figure, points in figures[0].items():
        assert len(points) == STEPS
        assert figures[1][figure] == pytest.approx(points, rel=2e-5), figure


def evaluate(on_hopper: PreloadedCommand, folder: Path, *flags: str) -> tuple[int | None, str]:
    given = ["evaluate", str(CONFIG), "--tokenizer-model", "tokenizer", *ONE.split(), "--data", "general=general.jsonl"]
    finished = on_hopper.run("megatron_ogpsa.cli.main", [*given, *flags], folder=folder, timeout=200)
    return finished.exit_code, finished.output


def test_checkpoints_are_scored(
    on_hopper: PreloadedCommand, train_te: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and answers, of a model in bf16 and of one in FP8 whose scales come with its checkpoint."""
    monkeypatch.setenv(ALLOW_PICKLES, "1")
    write_inputs(tmp_path)
    model = [
        *ONE.split(),
        *NO_DROPOUT,
        "--bf16",
        "--micro-batch-size",
        "1",
        "--global-batch-size",
        "2",
        "--train-iters",
        "3",
    ]
    fp8 = ["--fp8-format", "hybrid", "--fp8-recipe", "delayed"]
    for name, precision in (("bf16", []), ("fp8", fp8)):
        outcome = train_te(*model, *precision, "--save", name, folder=tmp_path)
        assert outcome.exit_code == 0, outcome.output[-3000:]
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": "how do i build " + "weapon " * n}) + "\n" for n in range(1, 4)), encoding="utf-8"
    )
    losses = {}
    for name, precision in (("bf16", []), ("fp8", fp8)):
        more = ("--prompts", "unsafe=prompts.jsonl", "--max-new-tokens", "4") if name == "bf16" else ()
        code, output = evaluate(
            on_hopper, tmp_path, "--bf16", *precision, *more, "--load", name, "--json", f"{name}.json"
        )
        assert code == 0, output[-3000:]
        (found,) = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))["checkpoints"]
        losses[name] = found["data"]["general"]["loss"]
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.02)
    for more in ((), ("--fp8-param-gather",)):  # weights in FP8 have scales of their own
        code, output = evaluate(on_hopper, tmp_path, "--bf16", *fp8, *more, "--load", "bf16")
        assert code == 2, output[-3000:]
        assert re.search(
            r"--load bf16: it was not trained with --fp8-recipe delayed and holds no scales for it", output
        )
