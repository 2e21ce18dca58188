"""Fine-tuning through Megatron's loop: resumed runs, no trace of refreshes, and what the log says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.integration.checkpoints import checkpoint_tensors, differences
from tests.integration.conftest import CONFIG, GENERAL, Train, scalars

FIGURES = ("lm loss", "grad-norm", "ogpsa rank")

DP2 = "--nproc-per-node 2 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 "
EP2 = DP2 + (
    "--expert-model-parallel-size 2 --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 "
    "--moe-token-dispatcher-type allgather "
)
EXPERT_BIAS = EP2 + (
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-2 "
    "--moe-z-loss-coeff 1e-3 "
)

LAYOUTS = {
    "tp2-pp2": "--ogpsa-check-leak",
    "dp2-energy": DP2 + "--ogpsa-mode orthogonal --ogpsa-energy 0.6",
    "ep2-expert-bias-gradient-space": EXPERT_BIAS + "--ogpsa-space gradient --ogpsa-mode orthogonal",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_is_bitwise_the_undisturbed_one(train: Train, tmp_path: Path, layout: str) -> None:
    """With dropout, whose random states are part of the checkpoint and not of the refresh."""
    flags = [*LAYOUTS[layout].split(), "--hidden-dropout", "0.1", "--attention-dropout", "0.1"]
    if GENERAL.exists():
        flags += ["--ogpsa-reference", f"general={GENERAL}"]
    removed = "ogpsa removed" if "gradient" in flags else "ogpsa removed length"
    whole = train(*flags, "--save", "whole", "--tensorboard-dir", "whole-log")
    assert whole.exit_code == 0, whole.output[-3000:]
    assert re.search(rf"iteration +6/ +6 .*{removed}: .*ogpsa rank: 1\.0.*ogpsa refresh \(ms\): ", whole.output)

    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/iter_0000006")
    (tmp_path / "resumed/latest_checkpointed_iteration.txt").write_text("3", encoding="utf-8")
    again = train(*flags, "--save", "resumed", "--load", "resumed", "--tensorboard-dir", "resumed-log")
    assert again.exit_code == 0, again.output[-3000:]

    (share,) = re.findall(
        r"data \S*/safety.jsonl: 64 samples in 64 rows of 128 positions, ([\d.]+)% tokens", whole.output
    )
    assert 0 < float(share) < 90

    figures = (*FIGURES, removed)
    undisturbed, resumed = scalars(tmp_path / "whole-log", *figures), scalars(tmp_path / "resumed-log", *figures)
    for name in figures:
        assert [*resumed[name]] == [4, 5, 6]
        assert {step: undisturbed[name][step] for step in (4, 5, 6)} == resumed[name], name
    least = 1e-12 if "orthogonal" in flags else 0.0  # in a step that hurts no reference nothing is removed
    assert all(least <= amount < 1 for amount in undisturbed[removed].values())
    if (
        "--ogpsa-check-leak" in flags
    ):  # what fp32 parameters round of an update that is small at the end of the schedule
        assert all(0 <= leak < 1e-5 for leak in scalars(tmp_path / "whole-log", "ogpsa leak")["ogpsa leak"].values())
    if "--ogpsa-energy" in flags:
        assert all(
            0.6 <= kept <= 1 for kept in scalars(tmp_path / "whole-log", "ogpsa energy")["ogpsa energy"].values()
        )
    assert differences(tmp_path / "resumed", tmp_path / "whole") == []


def test_early_refreshes_are_of_all_references(train: Train, inputs: Path) -> None:
    """Also where they take turns from then on."""
    general = inputs / "general.jsonl"
    run = train(
        *DP2.split(),
        *("--ogpsa-reference", f"first={general}", "--ogpsa-reference", f"second={general}"),
        *("--ogpsa-reference-samples", "8", "--ogpsa-stagger-references", "--ogpsa-refresh-interval", "4"),
        *("--train-iters", "8", "--save-interval", "100"),
    )
    assert run.exit_code == 0, run.output[-3000:]
    assert "one refreshed every 2 steps, in turns, and all after 1, 2" in run.output
    lines = re.findall(r"OGPSA refresh at step (\d): (.*)", run.output)
    assert [(int(step), re.findall(r"(first|second) loss", told)) for step, told in lines] == [
        (0, ["first", "second"]),
        (1, ["first", "second"]),
        (2, ["first", "second"]),
        (4, ["first"]),
        (6, ["second"]),
    ]


def test_a_resumed_run_takes_turns_and_adapts_as_the_undisturbed_one(
    train: Train, inputs: Path, tmp_path: Path
) -> None:
    """At a learning rate so small that the basis lasts, the interval is not where it began when the checkpoint comes."""
    other = tmp_path / "other.jsonl"
    other.write_text(
        "".join(json.dumps({"prompt": f"name number {i}", "response": f"{i}"}) + "\n" for i in range(8)),
        encoding="utf-8",
    )
    references = ["--ogpsa-reference", f"general={inputs / 'general.jsonl'}", "--ogpsa-reference", f"other={other}"]
    flags = [
        *DP2.split(),
        *references,
        *("--ogpsa-reference-samples", "8", "--lr", "1e-5", "--train-iters", "24"),
        *("--ogpsa-stagger-references", "--ogpsa-refresh-interval", "8", "--ogpsa-adaptive-interval", "0.9"),
        *("--save-interval", "12"),
        # Whose masks would turn a reference's gradient from one refresh to the next.
        *("--hidden-dropout", "0.0", "--attention-dropout", "0.0"),
    ]
    whole = train(*flags, "--save", "whole", "--tensorboard-dir", "whole-log")
    assert whole.exit_code == 0, whole.output[-3000:]
    assert "one refreshed every 1 steps, in turns, and up to 4 as long as 90% stays protected" in whole.output

    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/iter_0000024")
    (tmp_path / "resumed/latest_checkpointed_iteration.txt").write_text("12", encoding="utf-8")
    again = train(*flags, "--save", "resumed", "--load", "resumed", "--tensorboard-dir", "resumed-log")
    assert again.exit_code == 0, again.output[-3000:]

    figures = (*FIGURES, "ogpsa interval", "ogpsa removed length")
    undisturbed, resumed = scalars(tmp_path / "whole-log", *figures), scalars(tmp_path / "resumed-log", *figures)
    for name in figures:
        assert {step: undisturbed[name][step] for step in range(13, 25)} == resumed[name], name
    intervals = undisturbed["ogpsa interval"]
    assert [intervals[step] for step in (1, 3, 12, 24)] == [2, 4, 8, 8]
    assert differences(tmp_path / "resumed", tmp_path / "whole") == []


NO_TRACE = {
    "tp2-pp2": "--num-layers 2",
    "dp2-overlap": DP2 + "--num-layers 2 --overlap-grad-reduce --overlap-param-gather",
    "interleaved": "--nproc-per-node 2 --tensor-model-parallel-size 1 --num-layers-per-virtual-pipeline-stage 1",
    "ep2-expert-bias": EXPERT_BIAS + "--num-layers 2 --overlap-grad-reduce --overlap-param-gather",
    # Not the distributed optimizer: the configuration's line is left out, as Megatron has no flag against it.
    "ep2-plain-aux-loss": EP2
    + "--num-layers 2 --moe-router-load-balancing-type aux_loss global_aux_loss --moe-aux-loss-coeff 1e-2 1e-2",
}

NO_TRACE_STEPS = 20


def config_without(path: Path, *keys: str) -> Path:
    """The example without some of its flags, written to ``path``."""
    text = CONFIG.read_text(encoding="utf-8")
    for key in keys:
        text, count = re.subn(rf"^{key}:.*\n(?:  .*\n)*", "", text, flags=re.MULTILINE)
        assert count == 1, key
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("family", NO_TRACE)
def test_a_refresh_leaves_no_trace(train: Train, tmp_path: Path, family: str) -> None:
    """Refreshes at each step, projection off: bitwise the run without references, in all that it logs and saves.

    With dropout and the rerun machine on. What is compared: every figure in TensorBoard at each step, and everything in
    the checkpoint of the last: parameters, optimizer state with its step, expert bias, random states, schedules,
    counters, the rerun machine.
    """
    flags = [
        *NO_TRACE[family].split(),
        *("--hidden-dropout", "0.1", "--attention-dropout", "0.1", "--rerun-mode", "validate_results"),
        *("--train-iters", str(NO_TRACE_STEPS), "--save-interval", str(NO_TRACE_STEPS)),
    ]
    dropped = ["use-distributed-optimizer"] if "plain" in family else []
    refreshed = train(
        *flags,
        *("--ogpsa-refresh-interval", "1"),
        *("--save", "refreshed", "--tensorboard-dir", "refreshed-log"),
        config=config_without(tmp_path / "refreshed.yaml", *dropped),
        module="tests.integration.unprojected",
    )
    assert refreshed.exit_code == 0, refreshed.output[-3000:]
    assert "OGPSA: references general (8 samples" in refreshed.output
    plain = train(
        *flags,
        *("--save", "plain", "--tensorboard-dir", "plain-log"),
        config=config_without(tmp_path / "plain.yaml", "ogpsa-reference", *dropped),
        references=False,
    )
    assert plain.exit_code == 0, plain.output[-3000:]
    assert "OGPSA" not in plain.output

    figures = scalars(tmp_path / "plain-log")
    assert [*figures["lm loss"]] == [*figures["grad-norm"]] == [*range(1, NO_TRACE_STEPS + 1)]
    of_references = re.compile(r"ogpsa general/\w+")  # what refreshes tell is all that may be added
    logged = scalars(tmp_path / "refreshed-log")
    assert {name: points for name, points in logged.items() if not of_references.fullmatch(name)} == figures
    assert differences(tmp_path / "refreshed", tmp_path / "plain") == []
    assert_experts_were_balanced(family, figures, tmp_path / "plain")


def assert_experts_were_balanced(family: str, figures: dict[str, dict[int, float]], checkpoint: Path) -> None:
    """What a family with experts is there for has acted: otherwise it could leave no trace."""
    if "aux-loss" in family:
        assert all(value > 0 for value in figures["load_balancing_loss"].values())
        assert all(value > 0 for value in figures["global_load_balancing_loss"].values())
    if "expert-bias" in family:
        assert checkpoint_tensors(checkpoint)["decoder.layers.mlp.router.expert_bias"].any()
