"""``model: FOLDER``: a converted model's flags, weights and tokenizer, below the file's own flags and above its base's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_ogpsa.configuration.config_file import ConfigFile
from megatron_ogpsa.conversion.model_file import write_model_file
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.arguments.parser import build_parser, parse_flags
from megatron_ogpsa.pipeline.plan import plan_stages

FLAGS = {"num-layers": 2, "swiglu": True, "norm-epsilon": 1e-6, "window-size": "(4,0)", "max-position-embeddings": 64}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    write_model_file(folder, FLAGS, tmp_path / "original")
    return folder


def read(folder: Path, text: str) -> ConfigFile:
    path = folder.parent / "run.yaml"
    path.write_text(text.format(folder), encoding="utf-8")
    return ConfigFile.read(path)


def values(config: ConfigFile) -> Mapping[str, Any]:
    found = {entry.key: entry.value for entry in config.entries}
    assert len(found) == len(config.entries)  # each flag once
    return found


def test_a_model_stands_for_its_flags_weights_and_tokenizer(folder: Path) -> None:
    args = parse_flags(read(folder, "lr: 1.0e-6\nmodel: {}\n").as_flags(build_parser(), []))
    assert (args.num_layers, args.swiglu, args.layernorm_epsilon, args.window_size) == (2, True, 1e-6, (4, 0))
    assert (args.pretrained_checkpoint, args.tokenizer_type) == (str(folder), "HuggingFaceTokenizer")
    assert (args.tokenizer_model, args.lr) == (f"{folder}/huggingface", 1e-6)


def test_own_flags_win_over_the_model_and_the_model_over_the_base(folder: Path) -> None:
    base = "num-layers: 8\nmax-position-embeddings: 8\npretrained-checkpoint: other\nseed: 8\nlr: 8.0\n"
    (folder.parent / "base.yaml").write_text(base, encoding="utf-8")
    config = read(folder, "model: {}\nbase: base.yaml\nmax-position-embeddings: 128\nlr: 1.0\n")
    found = values(config)
    assert (found["max-position-embeddings"], found["lr"]) == ("128", "1.0")  # own
    assert (found["num-layers"], found["pretrained-checkpoint"]) == ("2", str(folder))  # the model's
    assert found["seed"] == "8"  # the base's
    args = parse_flags(config.as_flags(build_parser(), ["--num-layers", "3"]))
    assert args.num_layers == 3


def test_a_base_can_name_the_model(folder: Path) -> None:
    (folder.parent / "base.yaml").write_text(f"model: {folder}\nseed: 8\n", encoding="utf-8")
    found = values(read(folder, "base: base.yaml\nnum-layers: 1\n"))
    assert (found["num-layers"], found["swiglu"], found["seed"]) == ("1", True, "8")
    assert found["pretrained-checkpoint"] == str(folder)


def test_stages_begin_with_the_model_and_win_over_it(folder: Path) -> None:
    text = "model: {}\nsave: out\nstages:\n  sft:\n    max-position-embeddings: 128\n  dpo:\n    ogpsa-stage: dpo\n"
    parser = build_parser()
    sft, dpo = (parse_flags(stage.flags(parser)) for stage in plan_stages(read(folder, text), []))
    assert (sft.max_position_embeddings, dpo.max_position_embeddings) == (128, 64)
    assert (sft.pretrained_checkpoint, dpo.pretrained_checkpoint) == (str(folder), "out/sft")
    assert (sft.num_layers, dpo.num_layers) == (2, 2)
    assert sft.tokenizer_model == dpo.tokenizer_model == f"{folder}/huggingface"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nmodel: nowhere\n", "{0}/run.yaml:2: model: nowhere: has no model.yaml: name a folder that "),
        ("model: {0}\nmodel: {0}\n", "{0}/run.yaml:2: model stands there twice"),
        ("model: [a, b]\n", "{0}/run.yaml:1: model: "),
        ("model:\n", "{0}/run.yaml:1: model: "),
        ("stages:\n  sft:\n    model: nowhere\n", "{0}/run.yaml:3: model in the stage sft: "),
    ],
)
def test_mistakes_are_named(folder: Path, text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        plan_stages(read(folder, text), [])
    assert str(caught.value).startswith(words.format(folder.parent))
    assert "\n" not in str(caught.value)


def test_what_is_no_model_file_is_refused(folder: Path) -> None:
    (folder / "model.yaml").write_text("- 1\n", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"model/model\.yaml: not a mapping of flags: name a folder that megatron-ogpsa"
    ):
        read(folder, "model: {}\n")
