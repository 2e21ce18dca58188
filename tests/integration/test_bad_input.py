"""A user's mistake on two ranks: exit code 2, one line with the place and the remedy, no traceback, no hang."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tests.integration.conftest import CONFIG, Train

TWO_RANKS = "--nproc-per-node 2 --pipeline-model-parallel-size 1".split()
GOOD = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}\n'
SILENT = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": null}]}\n'

CASES = {
    "missing file": (None, ["--ogpsa-train-data", "bad.jsonl"], "bad.jsonl"),
    "broken line": (GOOD + '{"messages": [\n', ["--ogpsa-train-data", "bad.jsonl"], "bad.jsonl:2"),
    "null in a reference": (GOOD + SILENT, ["--ogpsa-reference", "bad=bad.jsonl"], "bad.jsonl:2"),
    "too few samples": (
        GOOD,
        ["--ogpsa-train-data", "bad.jsonl", "--tensor-model-parallel-size", "1"],
        "2 data-parallel ranks",
    ),
    "needs a GPU": ("", ["--fp8-format", "hybrid"], "--fp8-format"),
    "a pair without a choice": (
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b"}\n',
        ["--ogpsa-stage", "dpo", "--ogpsa-train-data", "bad.jsonl"],
        "bad.jsonl:2: field 'rejected' is missing",
    ),
    "unknown flag": ("", ["--ogpsa-refresh-intervall", "3"], "did you mean --ogpsa-refresh-interval?"),
}


AS_USERS_RUN_IT = "null in a reference"
UNDER_TORCHRUNS_AGENT = "missing file"  # found before training begins; the other one within it


@pytest.mark.parametrize("case", CASES)
def test_mistakes_are_told_in_one_line(train: Train, tmp_path: Path, case: str) -> None:
    content, flags, expected = CASES[case]
    if content is not None:
        (tmp_path / "bad.jsonl").write_text(content, encoding="utf-8")
    how = {"fresh": case == AS_USERS_RUN_IT, "agent": case == UNDER_TORCHRUNS_AGENT}
    outcome = train(*TWO_RANKS, *flags, timeout=120, **how)
    assert outcome.exit_code == 2, outcome.output[-3000:]
    assert len(outcome.error_lines) == 1, outcome.error_lines
    assert expected in outcome.error_lines[0]
    assert "Traceback" not in outcome.output


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ogpsa-granularty: tensor", "unknown key 'ogpsa-granularty', did you mean ogpsa-granularity?"),
        ("seq-length: true", "seq-length: takes a value, not true"),
        ("bf16: 3", "bf16: is a switch: write true or false"),
        ("lr:", "lr: has no value"),
        ("lr: [1, 2]", "lr: takes one value, not a list"),
        ("lr: abc", "lr: invalid float value: 'abc'"),
        ("tokenizer-type: Mine", "tokenizer-type: invalid choice: 'Mine'"),
        ("ogpsa-reference: general.jsonl", "ogpsa-reference: "),
        ("use-distributed-optimizer: [", "not YAML"),
        ("save: ~/runs", "save: ~ in '~/runs' stands for nothing in a file: write the path itself"),
        ("save: $SCRATCH/runs", "save: $SCRATCH in '$SCRATCH/runs' stands for nothing"),
        ("ogpsa-reference: {math: ~ann/math.jsonl}", "ogpsa-reference: ~ann in 'math=~ann/math.jsonl'"),
        ("ogpsa-train-data: data/${NAME}.jsonl", "ogpsa-train-data: ${NAME} in "),
    ],
)
def test_the_configurations_mistakes_have_a_line_number(tmp_path: Path, line: str, expected: str) -> None:
    from megatron_ogpsa.configuration.config_file import ConfigFile
    from megatron_ogpsa.errors import UserError
    from megatron_ogpsa.integration.arguments.parser import build_parser

    path = tmp_path / "config.yaml"
    path.write_text(f"num-layers: 2\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError) as raised:
        ConfigFile.read(path).as_flags(build_parser(), [])
    assert str(raised.value).startswith(f"{path}:")
    assert expected in str(raised.value)


def test_the_example_is_valid_and_overrides_win() -> None:
    from megatron_ogpsa.configuration.config_file import ConfigFile
    from megatron_ogpsa.integration.arguments.parser import build_parser, parse_flags

    config = ConfigFile.read(CONFIG)
    assert config.launch == {"nproc-per-node": "4"}
    args = parse_flags(config.as_flags(build_parser(), ["--lr", "3e-4", "--ogpsa-reference", "other=x.jsonl"]))
    assert args.lr == 3e-4
    assert args.ogpsa_reference == [("other", "x.jsonl")]
    assert args.swiglu
    assert not args.ogpsa_packing
    args = parse_flags(config.as_flags(build_parser(), ["--ogpsa-reference=other=x.jsonl"]))
    assert args.ogpsa_reference == [("other", "x.jsonl")]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--attention-backend", "flsh"], "argument --attention-backend: invalid value: 'flsh' (one of flash, fused"),
        (["--exit-signal", "SIGFOO"], "argument --exit-signal: invalid value: 'SIGFOO'"),
        (["--moe-layer-freq", "[1]*"], "argument --moe-layer-freq: invalid value: '[1]*'"),
        (["--num-layers", "two"], "argument --num-layers: invalid int value: 'two'"),
    ],
)
def test_values_that_megatrons_flags_look_up_or_evaluate(flags: list[str], expected: str) -> None:
    from megatron_ogpsa.errors import UserError
    from megatron_ogpsa.integration.arguments.parser import parse_flags

    with pytest.raises(UserError) as raised:
        parse_flags(flags)
    assert str(raised.value).startswith(expected)


def test_fewer_samples_than_a_batch_are_no_run() -> None:
    from megatron_ogpsa.errors import UserError
    from megatron_ogpsa.integration.arguments.stage import check_arguments

    args = argparse.Namespace(
        ogpsa_train_data="x.jsonl", ogpsa_stage="sft", calculate_per_token_loss=True, eval_iters=1
    )
    args.train_samples, args.global_batch_size = 7, 8
    with pytest.raises(
        UserError, match=r"^--train-samples 7 is less than --global-batch-size 8, so that there would be no"
    ):
        check_arguments(args)


ASYNC = "--async-save --use-persistent-ckpt-worker"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--save msc://bucket/run --enable-msc", "--save msc://bucket/run: object stores (--enable-msc) are not"),
        ("--load gs://bucket/run", "--load gs://bucket/run: object stores"),
        ("--async-save --async-strategy mcore", "--async-save without --use-persistent-ckpt-worker is dropped"),
        (
            ASYNC,
            "--async-save with --async-strategy nvrx, and nvidia-resiliency-ext is not there: use --async-strategy",
        ),
        (
            "--non-persistent-ckpt-type local --dist-ckpt-optim-fully-reshardable",
            "--non-persistent-ckpt-type local saves the optimizer's state as it lies: leave",
        ),
        ("--iterations-to-skip 3", "--iterations-to-skip is not supported: "),
        ("--result-rejected-tracker-filename r.txt", "--result-rejected-tracker-filename is not supported: "),
        ("--phase-transition-iterations 3,6", "--phase-transition-iterations is not supported: "),
        ("--full-validation", "--full-validation is not supported: "),
        ("--dataloader-type external", "--dataloader-type external is not supported: "),
        ("--sft", "--sft is not supported: "),
        ("--multiple-validation-sets", "--multiple-validation-sets is not supported: "),
        ("--rampup-batch-size 8 8 100", "--rampup-batch-size is not supported: "),
        ("--step-batch-size-schedule 0:8", "--step-batch-size-schedule is not supported: "),
        ("--log-straggler", "--log-straggler is not supported: "),
        ("--inprocess-restart", "--inprocess-restart is not supported: "),
        ("--freeze-all-layers", "--freeze-all-layers is not supported: "),
        ("--check-for-spiky-loss", "--check-for-spiky-loss is not supported: "),
        ("--ddp-average-in-collective", "--ddp-average-in-collective is not supported: "),
        (
            "--non-persistent-ckpt-type local --ogpsa-stage dpo",
            "--non-persistent-ckpt-type local is not supported: DPO's reference policy, adaptive intervals and fp16",
        ),
        ("--non-persistent-ckpt-type local --fp16", "--non-persistent-ckpt-type local is not supported: "),
        ("--hybrid-context-parallel", "--hybrid-context-parallel is not supported: "),
        (
            "--dataloader-type cyclic --ogpsa-valid-data valid.jsonl",
            "--dataloader-type cyclic with --ogpsa-valid-data is not supported: ",
        ),
        ("--overlap-moe-expert-parallel-comm", "--overlap-moe-expert-parallel-comm is not supported: "),
        (
            "--cuda-graph-impl local --ogpsa-packing",
            "--cuda-graph-impl with rows of several documents is not supported: ",
        ),
        (
            "--cuda-graph-impl local --ogpsa-stage dpo",
            "--cuda-graph-impl with rows of several documents is not supported",
        ),
    ],
)
def test_flags_that_the_loop_would_drop_or_fail_with_late(flags: str, expected: str) -> None:
    from megatron_ogpsa.errors import UserError
    from megatron_ogpsa.integration.arguments.loop import check_before_validation, check_loop_arguments
    from megatron_ogpsa.integration.arguments.parser import parse_flags

    def check(flags: str) -> None:
        args = parse_flags(flags.split())
        check_before_validation(args)
        check_loop_arguments(args)

    check(f"--save runs/a {ASYNC} --async-strategy mcore")
    check("--cuda-graph-impl local")
    check("--non-persistent-ckpt-type local")
    with pytest.raises(UserError) as raised:
        check(flags)
    assert str(raised.value).startswith(expected)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("lr 1 train-iters 5 micro-batch-size 1 seq-length 8", "--num-layers is missing: give it, or 'model: FOLDER'"),
        ("model lr 1 train-iters 5 micro-batch-size 1", "--seq-length is missing: positions of a row"),
        ("model lr 1 train-iters 5 seq-length 8", "--micro-batch-size is missing: rows that"),
        ("model train-iters 5 micro-batch-size 1 seq-length 8", "--lr is missing: the highest learning rate"),
        ("model lr 1 micro-batch-size 1 seq-length 8", "--train-iters is missing: give the number of optimizer steps"),
        ("model lr 1 train-iters -5 micro-batch-size 1 seq-length 8", "--train-iters -5: give the number of optimizer"),
        (
            "model lr 1 train-iters 5 micro-batch-size 1 seq-length 8 save-interval 0",
            "--save-interval 0: use 1 or more",
        ),
        (
            "model lr 1 train-iters 5 micro-batch-size 1 seq-length 8 eval-interval 0",
            "--eval-interval 0: use 1 or more",
        ),
        ("model lr 1 train-iters 5 micro-batch-size 1 seq-length 8 seed 0", "--seed 0: use 1 or more"),
    ],
)
def test_what_megatron_misses_in_an_assertion_is_asked_for(flags: str, expected: str) -> None:
    from megatron_ogpsa.errors import UserError
    from megatron_ogpsa.integration.arguments.loop import require_flags
    from megatron_ogpsa.integration.arguments.parser import parse_flags

    model = "num-layers 2 hidden-size 8 num-attention-heads 2 max-position-embeddings 8"
    words = flags.replace("model", model).split()
    given = [f"--{word}" if number % 2 == 0 else word for number, word in enumerate(words)]
    with pytest.raises(UserError) as raised:
        require_flags(parse_flags(given), for_training=True)
    assert str(raised.value).startswith(expected)


def test_what_a_checkpoint_says_need_not_be_given() -> None:
    from megatron_ogpsa.integration.arguments.loop import require_flags
    from megatron_ogpsa.integration.arguments.parser import parse_flags

    flags = "--use-checkpoint-args --load run --lr 1 --train-iters 5 --micro-batch-size 1"
    require_flags(parse_flags(flags.split()), for_training=True)


def test_a_run_that_goes_on_with_another_schedule_is_told_how(train: Train, tmp_path: Path) -> None:
    """Longer, with another learning rate, longer as Megatron wants to be told, and with nothing left to train."""
    flags = "--nproc-per-node 1 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --save run --load run"
    assert train(*flags.split(), "--train-iters", "3").exit_code == 0
    longer = train(*flags.split(), "--train-iters", "4")
    assert longer.exit_code == 2, longer.output[-3000:]
    assert (
        "--load run: class input value 32 and checkpoint value 24 for total number of iterations do not match"
        in (longer.error_lines[0])
    )
    assert "add --override-opt-param-scheduler" in longer.error_lines[0]
    faster = train(*flags.split(), "--train-iters", "3", "--lr", "2e-3")
    assert faster.exit_code == 2, faster.output[-3000:]
    assert (
        "--load run: --lr, --min-lr or --weight-decay are not what the checkpoint's optimizer had"
        in (faster.error_lines[0])
    )
    overridden = train(*flags.split(), "--train-iters", "4", "--override-opt-param-scheduler")
    assert overridden.exit_code == 0, overridden.output[-3000:]
    again = train(*flags.split(), "--train-iters", "4", "--override-opt-param-scheduler")
    assert again.exit_code == 0, again.output[-3000:]
    assert "nothing was left to train: --load run is at step 4 of 4" in again.output
