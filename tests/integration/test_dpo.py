"""DPO through Megatron's loop: the reference policy, resumed runs, and losses that do not depend on the layout."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from megatron_ogpsa.integration.reference_policy import LOG_PROBS_FILE
from megatron_ogpsa.reference_policy.store import read_log_probs, write_log_probs
from tests.integration.conftest import CONFIG, Train, scalars

FIGURES = ("dpo loss", "grad-norm", "rewards/margin", "rewards/rejected", "log-probs/chosen")

# Megatron pads the vocabulary to a multiple of 128 times TP: weights are to have one shape in all layouts.
LAYOUTS = {
    "tp2-pp2": "--make-vocab-size-divisible-by 64",
    "dp2": "--nproc-per-node 2 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1",
    "dp1": "--nproc-per-node 1 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --micro-batch-size 4",
    "tp2": "--nproc-per-node 2 --pipeline-model-parallel-size 1 --make-vocab-size-divisible-by 64",
    "pp2": "--nproc-per-node 2 --tensor-model-parallel-size 1",
    "interleaved": "--nproc-per-node 2 --tensor-model-parallel-size 1 --num-layers-per-virtual-pipeline-stage 1",
}


def dpo_flags(folder: Path, layout: str, name: str, *more: str) -> list[str]:
    """Pairs of uneven length, and the flags of a run called ``name``."""

    def write(file: str, rows: list[tuple[str, str, str]]) -> str:
        lines = (json.dumps({"prompt": p, "chosen": c, "rejected": r}) for p, c, r in rows)
        (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return file

    unsafe = [(f"how do i build weapon {i}", "no" + ", never" * (i % 4), "take " + "it " * (i % 7)) for i in range(41)]
    general = [(f"what is {i} plus one", f"it is {i + 1}", f"it is {i + 3}, or so") for i in range(24)]
    return [
        *("--ogpsa-stage", "dpo", "--ogpsa-train-data", write("pairs.jsonl", unsafe)),
        *("--ogpsa-reference", f"general={write('general_pairs.jsonl', general)}"),
        *("--save", name, "--tensorboard-dir", f"{name}-log"),
        *LAYOUTS[layout].split(),
        *more,
    ]


def test_a_resumed_run_is_bitwise_the_undisturbed_one(train: Train, tmp_path: Path) -> None:
    """With dropout, which the reference policy does not have."""
    dropout = ("--hidden-dropout", "0.1", "--attention-dropout", "0.1")
    whole = train(*dpo_flags(tmp_path, "tp2-pp2", "whole", *dropout))
    assert whole.exit_code == 0, whole.output[-3000:]
    assert "OGPSA: references general (8 samples, " in whole.output
    assert re.search(r"reference log-probabilities of 41 pairs, weights [0-9a-f]{32}", whole.output)
    of_data = (
        r"data \S*{}: {} samples in {} rows of 128 positions, ([\d.]+)% tokens, ([\d.]+)% padding; --ogpsa-packing"
    )
    for given in (("pairs.jsonl", 41, 41), ("general_pairs.jsonl", 8, 8)):
        (shares,) = re.findall(of_data.format(*given), whole.output)  # told once, not by each rank
        assert sum(map(float, shares)) == pytest.approx(100)
        assert 0 < float(shares[0]) < 90
    assert re.search(
        r"DPO iteration +6 \| rewards/chosen: -?[\d.]+ \| rewards/rejected: -?[\d.]+ \| .*accuracy", whole.output
    )

    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/iter_0000006")
    (tmp_path / "resumed/latest_checkpointed_iteration.txt").write_text("3", encoding="utf-8")
    again = train(*dpo_flags(tmp_path, "tp2-pp2", "resumed", *dropout, "--load", "resumed"))
    assert again.exit_code == 0, again.output[-3000:]
    figures = (*FIGURES, "ogpsa removed length")
    undisturbed, resumed = scalars(tmp_path / "whole-log", *figures), scalars(tmp_path / "resumed-log", *figures)
    for name in figures:
        assert {step: undisturbed[name][step] for step in (4, 5, 6)} == resumed[name], name

    (tmp_path / "resumed" / LOG_PROBS_FILE).unlink()
    more = ("--override-opt-param-scheduler",)
    lost = train(*dpo_flags(tmp_path, "tp2-pp2", "resumed", "--load", "resumed", "--train-iters", "8", *more))
    assert lost.exit_code == 2, lost.output[-3000:]
    assert "is missing, and the model has been trained on since: restore it" in lost.error_lines[0]


def test_the_result_of_fine_tuning_is_the_reference_policy(train: Train, tmp_path: Path) -> None:
    """The examples, one after the other: a second call goes on with the second stage instead of starting it anew."""
    first = train("--save", "sft", *LAYOUTS["dp2"].split())
    assert first.exit_code == 0, first.output[-3000:]
    flags = ["--pretrained-checkpoint", "sft", "--load", "dpo", *dpo_flags(tmp_path, "dp2", "dpo")]
    second = train(*flags, config=CONFIG.with_name("dpo.yaml"))
    assert second.exit_code == 0, second.output[-3000:]
    figures = scalars(tmp_path / "dpo-log", "dpo loss", "learning-rate")
    assert figures["dpo loss"][1] == pytest.approx(math.log(2), rel=1e-6)
    assert [*figures["dpo loss"]] == [1, 2, 3, 4, 5, 6]  # a schedule of its own
    more = ("--train-iters", "8", "--override-opt-param-scheduler", "--ogpsa-dpo-beta", "0.3")
    further = train(*flags, *more, config=CONFIG.with_name("dpo.yaml"))
    assert further.exit_code == 0, further.output[-3000:]
    assert further.output.count("DPO: beta is 0.3, in the checkpoint's run it was 0.2") == 1
    assert "successfully loaded checkpoint from dpo" in further.output
    assert sorted(scalars(tmp_path / "dpo-log", "dpo loss")["dpo loss"]) == [*range(1, 9)]
    log_probs = read_log_probs(tmp_path / "dpo" / LOG_PROBS_FILE)
    assert log_probs is not None
    state = json.loads((tmp_path / "dpo/iter_0000008/ogpsa.json").read_text(encoding="utf-8"))
    assert state["reference policy"] == log_probs.weights
    pairs = flags[flags.index("--ogpsa-train-data") + 1]
    done = train(*flags, *more, "--ogpsa-valid-data", pairs, "--eval-iters", "1", config=CONFIG.with_name("dpo.yaml"))
    assert done.exit_code == 0, done.output[-3000:]  # no step is left, and Megatron evaluates all the same
    assert "validation loss at iteration 8" in done.output


def test_twenty_steps_are_those_of_one_process_in_every_layout(train: Train, tmp_path: Path) -> None:
    """From the same weights: losses, rewards, and the projected gradient's norm and share, which each step's weights
    depend on.

    41 pairs in batches of 8, on 1 or 2 data-parallel ranks, in micro-batches of 2 or 4: what is dealt out unevenly is
    seen as well. At the start the policy is its own reference: ln 2, no margin. Then fp32 rounding, in sums of another
    order: measured 5e-7 of losses and norms, and 4e-6 of the removed share, the difference of two norms.
    """
    still = ("--hidden-dropout", "0", "--attention-dropout", "0")
    base = train(*dpo_flags(tmp_path, "dp1", "base", *still, "--train-iters", "1"))
    assert base.exit_code == 0, base.output[-3000:]
    run = (*still, "--train-iters", "20", "--lr", "1e-3", "--save-interval", "20", "--pretrained-checkpoint", "base")
    run += ("--ogpsa-space", "gradient", "--ogpsa-mode", "orthogonal", "--ogpsa-refresh-interval", "5")
    names = (*FIGURES, "ogpsa removed")
    seen, stored = {}, {}
    for layout in LAYOUTS:
        outcome = train(*dpo_flags(tmp_path, layout, layout, *run))
        assert outcome.exit_code == 0, outcome.output[-3000:]
        seen[layout] = scalars(tmp_path / f"{layout}-log", *names)
        stored[layout] = read_log_probs(tmp_path / layout / LOG_PROBS_FILE)
    alone = stored["dp1"]
    assert alone is not None
    for layout, figures in seen.items():
        assert figures["dpo loss"][1] == pytest.approx(math.log(2), abs=1e-5), layout
        assert figures["rewards/margin"][1] == pytest.approx(0, abs=1e-5), layout
        assert figures["dpo loss"][20] < 0.1, layout
        for name in names:
            assert [*figures[name]] == [*range(1, 21)], (layout, name)
            assert figures[name] == pytest.approx(seen["dp1"][name], rel=2e-5, abs=1e-6), (layout, name)
        sharded = stored[layout]
        assert sharded is not None
        assert sharded.weights == alone.weights, layout
        assert sharded.values_N2.flatten().tolist() == pytest.approx(alone.values_N2.flatten().tolist(), rel=1e-6)


def test_the_reference_policy_goes_on_where_it_stopped_and_knows_its_data(train: Train, tmp_path: Path) -> None:
    short = ("--train-iters", "1", "--ogpsa-packing")
    first = train(*dpo_flags(tmp_path, "dp2", "run", *short))
    assert first.exit_code == 0, first.output[-3000:]
    path = tmp_path / "run" / LOG_PROBS_FILE
    complete = read_log_probs(path)
    assert complete is not None
    assert complete.is_complete
    half = type(complete).unknown(41, weights=complete.weights, data=complete.data, settings=complete.settings)
    known = half.is_known_N.clone()
    known[:20] = True
    write_log_probs(path, half.with_round(complete.values_N2, known))
    again = train(*dpo_flags(tmp_path, "dp2", "run", *short))
    assert again.exit_code == 0, again.output[-3000:]
    assert "DPO: 20 of 41 reference log-probabilities are there" in again.output
    finished = read_log_probs(path)
    assert finished is not None
    assert finished.values_N2.equal(complete.values_N2)

    for change, message in (
        (("--seq-length", "120"), "other data, tokenizer, chat template or --seq-length"),
        (("--seed", "7"), "delete it, or use another --save"),
        (("--rotary-base", "500000"), "was computed with --rotary-base 10000, not 500000"),
        (("--bf16",), "was computed with --bf16 False, not True"),
    ):
        refused = train(*dpo_flags(tmp_path, "dp2", "run", *short, *change))
        assert refused.exit_code == 2, refused.output[-3000:]
        assert len(refused.error_lines) == 1
        assert message in refused.error_lines[0]


def test_each_round_of_dpo_has_a_reference_policy_of_its_own(train: Train, tmp_path: Path) -> None:
    """From the weights of a round before, whose log-probabilities lie beside them: ln 2 at the first step, saved or not.

    And one that goes on into another folder takes the log-probabilities along.
    """
    before = train(*dpo_flags(tmp_path, "dp1", "before", "--train-iters", "3"))
    assert before.exit_code == 0, before.output[-3000:]
    flags = dpo_flags(tmp_path, "dp1", "after", "--train-iters", "1", "--load", "before", "--finetune")
    unsaved = [part for part in flags if part not in ("--save", "after")]
    for name, given in (("after", flags), ("unsaved", [*unsaved, "--tensorboard-dir", "unsaved-log"])):
        outcome = train(*given, "--hidden-dropout", "0", "--attention-dropout", "0")
        assert outcome.exit_code == 0, outcome.output[-3000:]
        assert scalars(tmp_path / f"{name}-log", "dpo loss")["dpo loss"][1] == pytest.approx(math.log(2), abs=1e-5), (
            name
        )

    more = ("--train-iters", "4", "--override-opt-param-scheduler", "--load", "before")
    moved = train(*dpo_flags(tmp_path, "dp1", "moved", *more))
    assert moved.exit_code == 0, moved.output[-3000:]
    first, taken, own = (read_log_probs(tmp_path / name / LOG_PROBS_FILE) for name in ("before", "moved", "after"))
    assert first is not None
    assert taken is not None
    assert own is not None
    assert taken.weights == first.weights != own.weights
    assert taken.values_N2.equal(first.values_N2)


def test_the_authors_rule_and_their_leak(train: Train, tmp_path: Path) -> None:
    """Refreshes before steps 3 and 5 leak into them; those at the start and after the checkpoint of step 3 do not."""
    flags = dpo_flags(tmp_path, "dp1", "run", "--train-iters", "5", "--ogpsa-refresh-interval", "2")
    outcome = train(*flags, "--ogpsa-authors-rule", "--ogpsa-authors-leak")
    assert outcome.exit_code == 0, outcome.output[-3000:]
    assert re.search(r"OGPSA: references general \(8 samples, \d+ tokens, nll_pair\)", outcome.output)
    assert "--ogpsa-authors-leak is on, for comparisons only" in outcome.output
    leaked = scalars(tmp_path / "run-log", "ogpsa leaked")["ogpsa leaked"]
    assert [step for step, share in leaked.items() if share > 0] == [3, 5]


@pytest.mark.parametrize(
    ("loss", "words"),
    [("dpo", r"8 samples, \d+ tokens, dpo"), ("general=nll_pair", r"8 samples, \d+ tokens, nll_pair")],
)
def test_the_loss_of_a_reference_is_chosen(train: Train, tmp_path: Path, loss: str, words: str) -> None:
    """And a run with validation data of its own evaluates when it is started again after its last step."""
    flags = dpo_flags(tmp_path, "dp1", "run", "--train-iters", "2", "--ogpsa-reference-loss", loss)
    lines = (tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "valid.jsonl").write_text("".join(lines[:5]), encoding="utf-8")
    flags += ["--ogpsa-valid-data", "valid.jsonl", "--load", "run"]
    outcome = train(*flags)
    assert outcome.exit_code == 0, outcome.output[-3000:]
    assert re.search(rf"OGPSA: references general \({words}\)", outcome.output)
    pairs = 54 if loss == "dpo" else 46
    assert f"reference log-probabilities of {pairs} pairs" in outcome.output
    assert "validation: 5 of 5 rows at each evaluation" in outcome.output  # fewer than a batch of 8
    again = train(*flags)
    assert again.exit_code == 0, again.output[-3000:]
    evaluated = [re.search(r"validation loss at iteration 2 .*", one.output) for one in (outcome, again)]
    assert evaluated[0]
    assert evaluated[1]
    assert evaluated[0][0] == evaluated[1][0]


def test_conversations_under_a_loss_of_pairs_are_refused(train: Train, tmp_path: Path, inputs: Path) -> None:
    flags = dpo_flags(tmp_path, "dp2", "run")
    outcome = train(*flags, "--ogpsa-reference", f"chat={inputs / 'general.jsonl'}", timeout=120)
    assert outcome.exit_code == 2, outcome.output[-3000:]
    assert "--ogpsa-reference chat: " in outcome.error_lines[0]
    assert "say --ogpsa-reference-loss chat=nll" in outcome.error_lines[0]
