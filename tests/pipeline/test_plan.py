"""From a file with stages to the command line of each stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ogpsa.configuration.config_file import ConfigFile
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.arguments.parser import build_parser, parse_flags
from megatron_ogpsa.pipeline.plan import Stage, plan_stages

EXAMPLE = Path(__file__).parents[2] / "configs/example/sft-dpo.yaml"

TEXT = """\
num-layers: 2
lr: 1.0e-5
save: out
ogpsa-reference: {a: a.jsonl, b: b.jsonl}
stages:
  sft:
    lr: 2.0e-5
  dpo:
    ogpsa-stage: dpo
"""


def stages_of(folder: Path, text: str = TEXT, *overrides: str) -> tuple[Stage, ...]:
    path = folder / "pipeline.yaml"
    path.write_text(text, encoding="utf-8")
    return plan_stages(ConfigFile.read(path), list(overrides))


def test_a_stages_own_flags_win_over_shared_ones_and_the_command_line_over_both(tmp_path: Path) -> None:
    parser = build_parser()
    flags = [parse_flags(stage.flags(parser)) for stage in stages_of(tmp_path)]
    assert [(args.lr, args.ogpsa_stage, args.num_layers) for args in flags] == [(2e-5, "sft", 2), (1e-5, "dpo", 2)]
    overrides = ("--lr", "3e-5", "--ogpsa-reference", "c=c.jsonl")
    flags = [parse_flags(stage.flags(parser)) for stage in stages_of(tmp_path, TEXT, *overrides)]
    assert [args.lr for args in flags] == [3e-5, 3e-5]
    assert [args.ogpsa_reference for args in flags] == [[("c", "c.jsonl")]] * 2


def test_each_stage_goes_on_from_its_folder_and_begins_with_the_one_before(tmp_path: Path) -> None:
    parser = build_parser()
    top = TEXT + "pretrained-checkpoint: base\ntensorboard-dir: log\n"
    sft, dpo = (parse_flags(stage.flags(parser)) for stage in stages_of(tmp_path, top))
    assert (sft.save, sft.load, sft.pretrained_checkpoint, sft.tensorboard_dir) == (
        "out/sft",
        "out/sft",
        "base",
        "log/sft",
    )
    assert (dpo.save, dpo.load, dpo.pretrained_checkpoint, dpo.tensorboard_dir) == (
        "out/dpo",
        "out/dpo",
        "out/sft",
        "log/dpo",
    )
    sft, dpo = (parse_flags(stage.flags(parser)) for stage in stages_of(tmp_path, top, "--save", "elsewhere"))
    assert (sft.save, dpo.pretrained_checkpoint) == ("elsewhere/sft", "elsewhere/sft")
    assert (sft.non_persistent_global_ckpt_dir, dpo.non_persistent_global_ckpt_dir) == (None, None)
    key = "non-persistent-global-ckpt-dir"
    for text, more in ((f"{top}{key}: fast\n", ()), (top, (f"--{key}", "fast"))):
        sft, dpo = (parse_flags(stage.flags(parser)) for stage in stages_of(tmp_path, text, *more))
        assert (sft.non_persistent_global_ckpt_dir, dpo.non_persistent_global_ckpt_dir) == ("fast/sft", "fast/dpo")


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (TEXT.replace("save: out\n", ""), (), "save is missing"),
        (TEXT + "load: x\n", (), "load with stages: name the weights to begin with as pretrained-checkpoint"),
        (TEXT, ("--load", "x"), "load with stages"),
        (TEXT, ("--finetune",), "finetune with stages"),
        (TEXT.replace("lr: 2.0e-5", "save: x"), (), ":7: save in the stage sft"),
        (TEXT.replace("lr: 2.0e-5", "launch: {nproc-per-node: 2}"), (), ":7: launch in the stage sft"),
        (TEXT.replace("  dpo:", "  sft:"), (), ":8: stages: sft stands there twice"),
        (TEXT.replace("  dpo:", "  a/b:"), (), ":8: stages: 'a/b' names a folder too"),
        (TEXT.replace("    lr: 2.0e-5\n", ""), (), ":6: stages: sft: write a name for each stage"),
        ("stages: []\n", (), ":1: stages: write a name for each stage"),
        (TEXT.replace("    lr: 2.0e-5\n", "    lr: 1\n    lr: 2\n"), (), ":8: lr stands on line 7 already"),
    ],
)
def test_mistakes_have_a_line_and_a_remedy(
    tmp_path: Path, text: str, overrides: tuple[str, ...], expected: str
) -> None:
    with pytest.raises(UserError) as raised:
        stages_of(tmp_path, text, *overrides)
    assert str(raised.value).startswith(f"{tmp_path}/pipeline.yaml:")
    assert expected in str(raised.value)


def test_the_example_is_valid() -> None:
    parser = build_parser()
    config = ConfigFile.read(EXAMPLE)
    sft, dpo = (parse_flags(stage.flags(parser)) for stage in plan_stages(config, []))
    assert (sft.ogpsa_stage, dpo.ogpsa_stage) == ("sft", "dpo")
    assert dpo.pretrained_checkpoint == sft.save
    assert config.launch == {"nproc-per-node": "4"}


def test_a_word_before_any_flag_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^dpo stands before any flag: write --FLAG dpo, or --stage dpo$"):
        stages_of(tmp_path, TEXT, "dpo")
    with pytest.raises(UserError, match=r"^unknown flag -lr: flags begin with two dashes, --lr$"):
        stages_of(tmp_path, TEXT, "-lr", "1e-5")


def test_each_value_of_a_flag_that_is_repeated_is_compared(tmp_path: Path) -> None:
    (first, *_) = stages_of(
        tmp_path, TEXT, "--ogpsa-reference", "a=a.jsonl", "--ogpsa-reference=b=b.jsonl", "--lr", "-1"
    )
    assert (first.settings["ogpsa-reference"], first.settings["lr"]) == ("a=a.jsonl b=b.jsonl", "-1")
