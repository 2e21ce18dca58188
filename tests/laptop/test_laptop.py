"""``megatron-ogpsa laptop`` on a tiny random model: the same steps, files and figures as with a real one."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet
import pytest
from safetensors.torch import load_file

from megatron_ogpsa.cli.main import main
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.laptop.gguf import _require_plain_positions, to_hugging_face
from megatron_ogpsa.laptop.recipe import Sizes, _short_conversations
from megatron_ogpsa.laptop.report import markdown_tables
from megatron_ogpsa.laptop.run import add_arguments
from megatron_ogpsa.laptop.safety_data import held_out_prompts
from megatron_ogpsa.study.report import read_json
from megatron_ogpsa.study.settings import SETTINGS
from tests.conversion.models import build_chat_model
from tests.harness.preloaded import Finished, PreloadedCommand

ROOT = Path(__file__).parents[2]
WEIGHTS = "model.safetensors"
STEPS = "--sft-steps 2 --dpo-steps 2 --save-interval 1 --refresh-interval 1 --references 8 --parts 2 --bf16 --nproc 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("laptop")
    build_chat_model(folder / "tiny")
    shutil.copytree(folder / "tiny", folder / "other")
    with (folder / "other" / WEIGHTS).open("r+b") as file:  # the same shapes
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    rows = [{"prompt": f"what is {number} plus one", "response": f"it is {number + 1}"} for number in range(12)]
    (folder / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    others = {"pairs": {"prompt": "why", "chosen": "so", "rejected": "no"}, "shares": {"conversations": []}}
    for name, row in others.items():
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 12, encoding="utf-8")
    return folder


def laptop(preloaded: PreloadedCommand, folder: Path, *flags: str) -> Finished:
    """Run the command, which starts a process for each of its steps."""
    return preloaded.run("megatron_ogpsa.cli.main", ["laptop", *flags], folder=folder, timeout=300, agent=True)


FLAGS = ["tiny", "--general", "general.jsonl", "--out", "out", *STEPS.split()]


@pytest.fixture(scope="module")
def done(folder: Path, preloaded: PreloadedCommand) -> Finished:
    """A whole run, which leaves ``out``."""
    return laptop(preloaded, folder, *FLAGS)


def test_a_model_goes_through_sft_and_dpo_and_comes_back(
    folder: Path, preloaded: PreloadedCommand, done: Finished
) -> None:
    assert done.exit_code == 0, done.output[-4000:]
    lines = done.output.splitlines()
    assert sum(line.startswith("? ") for line in lines) == 4  # each question, then an answer of each model
    assert any(line.startswith("update, conflict, after DPO") for line in lines)
    (run,) = json.loads((folder / "out/report/results.json").read_text(encoding="utf-8"))["runs"]
    assert [point["step"] for point in run["points"]] == [0, 1, 2, 3, 4]
    scores = json.loads((folder / "out/seed-1/update-conflict.scores.json").read_text(encoding="utf-8"))["checkpoints"]
    assert [checkpoint["iteration"] for checkpoint in scores] == [1, 2, 1, 2]
    losses = [round(checkpoint["data"]["general"]["loss"], 5) for checkpoint in scores]
    assert [point["general_loss"] for point in run["points"][1:]] == losses
    assert scores[0]["data"]["general"]["samples"] == 4  # those that are not protected
    assert scores[0]["data"]["protected"]["samples"] == 8
    assert scores[0]["prompts"]["unsafe"]["refused"]["number"] == len(held_out_prompts()[0])
    assert "OGPSA refresh at step 1" in (folder / "out/seed-1/update-conflict.log").read_text(encoding="utf-8")
    kept = [path.name for path in (folder / "out/seed-1/update-conflict").glob("*/iter_*")]
    assert kept == ["iter_0000002"]

    before, after = (load_file(folder / name / WEIGHTS) for name in ("tiny", "out/seed-1/models/update-conflict"))
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}
    assert any(not before[name].equal(after[name]) for name in before)

    again = laptop(preloaded, folder, *FLAGS)
    assert again.exit_code == 0, again.output[-2000:]
    assert not any(line.startswith("[") for line in again.output.splitlines())  # no step is left to run


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ("nowhere --general general.jsonl", "nowhere: has no config.json"),
        ("tiny --general nowhere.jsonl", "--general: nowhere.jsonl: no such file"),
        (
            "tiny --general general.jsonl --references 12 --out few",
            "12 conversations of at most 700 characters are too few",
        ),
        ("tiny --general pairs.jsonl --out pairs", "pairs.jsonl:1: a preference pair, where conversations are wanted"),
        (
            "tiny --general shares.jsonl --out shares",
            "shares.jsonl:1: no field 'messages', nor 'prompt' and 'response'",
        ),
        ("tiny --general general.jsonl --parts 9", "--parts 9: is more than --references 8"),
        ("tiny --general general.jsonl --nproc 4", "--nproc 4: a step of SFT has 2 rows for them to share: use 1 or 2"),
        ("tiny --general general.jsonl --sft-lr 2", "--sft-lr 2.0: use a rate such as 1e-5"),
        ("tiny --general general.jsonl --settings plain,replay", "--settings replay: use some of plain, "),
        (
            "tiny --general general.jsonl --settings plain,update-in-turns",
            "--settings update-in-turns: use some of plain, ",
        ),
        ("tiny --general general.jsonl --adaptive-interval 1", "--adaptive-interval 1: use a share such as 0.5"),
    ],
)
def test_mistakes_are_told_before_any_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: str, fault: str
) -> None:
    monkeypatch.chdir(folder)
    exit_code, told = main(["laptop", *flags.split()]), capsys.readouterr().err
    assert_refused(exit_code, told, fault)


def assert_refused(exit_code: int, told: str, fault: str) -> None:
    """In one line of exit code 2."""
    assert exit_code == 2
    assert fault in told
    assert told.count("megatron-ogpsa: error:") == 1


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ("tiny --general general.jsonl --references 2 --out out", "is of a run with other data"),
        (f"other --general general.jsonl --out out {STEPS}", "is of a run from another model"),
    ],
)
@pytest.mark.usefixtures("done")
def test_another_run_does_not_go_into_its_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: str, fault: str
) -> None:
    monkeypatch.chdir(folder)
    exit_code, told = main(["laptop", *flags.split()]), capsys.readouterr().err
    assert_refused(exit_code, told, fault)


def test_the_pages_commands_are_accepted() -> None:
    text = (ROOT / "docs/laptop.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    starts = [shlex.split(line)[1:] for line in lines if line.startswith("launch/laptop.sh ")]
    assert len(starts) == 4
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert [parser.parse_args(words).out for words in starts] == [Path("runs/laptop")] * 4
    assert (ROOT / "launch/laptop.sh").stat().st_mode & 0o111
    assert any("megatron_ogpsa.laptop.gguf" in line for line in lines)


def test_the_pages_tables_are_made_of_its_data() -> None:
    account = json.loads((ROOT / "docs/laptop/results.json").read_text(encoding="utf-8"))
    tables = markdown_tables(read_json(ROOT / "docs/laptop/results.json"), Sizes(**account["sizes"]))
    assert tables == (ROOT / "docs/laptop/table.md").read_text(encoding="utf-8")
    page = (ROOT / "docs/laptop.md").read_text(encoding="utf-8")
    assert all(table in page for table in tables.split("\n\n"))
    protected = json.loads((ROOT / "docs/laptop/protected.json").read_text(encoding="utf-8"))["loss"]
    for name, by_seed in read_json(ROOT / "docs/laptop/results.json").items():
        start, *_, after_sft, after_dpo = by_seed[1]
        cells = [after_sft.general_loss - start.general_loss, after_dpo.general_loss - start.general_loss]
        cells.append(protected[name] - protected["as it came"])
        (row,) = re.findall(rf"^\| {SETTINGS[name].title} \|(?: \S+ \|(?: -?\d+ % \||  ?\|)){{3}}$", page, re.MULTILINE)
        assert [float(cell) for cell in re.findall(r"[+-]\d\.\d+", row)] == [round(cell, 4) for cell in cells]


def test_the_table_of_more_conversations_is_made_of_its_data() -> None:
    account = json.loads((ROOT / "docs/laptop/references.json").read_text(encoding="utf-8"))
    growths = [
        {name: run["after DPO"]["loss"][name] - account["start"][name] for name in ("held_out", "first32", "first128")}
        for run in account["runs"]
    ]
    avoided = [{name: f"{1 - own / growths[0][name]:.0%}" for name, own in growth.items()} for growth in growths]
    rows = []
    for run, growth, share in zip(account["runs"], growths, avoided, strict=True):
        cells = [run["setting"].replace("-", ", "), str(run["references"] or "–")]
        for name, own in growth.items():
            in_brackets = f" ({share[name]})" if run["references"] and own > 0 else ""
            cells.append(f"{own:+.4f}{in_brackets}".replace("-", "−"))
        cells.append(", ".join(f"{run['after DPO'][name]:.0%}" for name in ("unsafe_refused", "benign_refused")))
        rows.append(f"| {' | '.join(cells)} |".replace("%", " %"))
    page = (ROOT / "docs/laptop.md").read_text(encoding="utf-8")
    assert "\n".join(rows) in page
    small, large = avoided[1], avoided[2]
    told = f"{small['first32']} was avoided on themselves and {small['held_out']} on others; with 128, {large['first128']} on"
    assert told.replace("%", " %") in " ".join(page.split())
    told = f"{large['held_out']} in place of {small['held_out']}".replace("%", " %")
    assert told in (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")


def test_the_table_of_first_refreshes_is_made_of_its_data() -> None:
    account = json.loads((ROOT / "docs/laptop/refreshes.json").read_text(encoding="utf-8"))
    earlier = json.loads((ROOT / "docs/laptop/references.json").read_text(encoding="utf-8"))
    losses = {(2, "plain"): earlier["runs"][0]["after DPO"]["loss"]}
    losses |= {(run["seed"], run["refreshes"] or "plain"): run["after DPO"] for run in account["runs"]}
    page = (ROOT / "docs/laptop.md").read_text(encoding="utf-8")
    made = {(run["seed"], run["refreshes"]): str(len(run["lines"])) for run in account["runs"]}
    avoided = {}
    for (seed, name), loss in losses.items():
        cells = [str(seed), name, made.get((seed, name), "")]
        for data in ("held_out", "first32"):
            growth, of_plain = (loss_[data] - account["start"][data] for loss_ in (loss, losses[seed, "plain"]))
            avoided[seed, name, data] = "" if name == "plain" else f"{1 - growth / of_plain:.0%}".replace("%", " %")
            cells += [f"{growth:+.4f}".replace("-", "−"), avoided[seed, name, data]]
        row = f"| {' | '.join(cells)} |".replace("|  |", "| |")
        assert row in page, row
    default, warmup = "every 25, and after 1, 2, 4, 6, 9, 12, 16", "every 25, and before each of the first 19"
    for name, told in {
        default: "{} and {} on conversations that it did not protect, and {} and {} on those that it did",
        warmup: "{} and {}, and {} and {}",
    }.items():
        shares = [avoided[seed, name, data] for data in ("held_out", "first32") for seed in (2, 3)]
        assert told.format(*shares).replace(" % and", " and") in (ROOT / "README.md").read_text(encoding="utf-8")
    for lines in account["first steps, seed 3, by steps between refreshes"]["lines"].values():
        (last,) = re.findall(r"^16: general loss ([\d.]+)", lines[-1])
        assert f"{float(last) - 1.6437:+.4f}".replace("-", "−") in page


@pytest.mark.parametrize(
    ("tensors", "fields", "is_refused"),
    [
        (["output.weight"], {}, False),
        (["output.weight"], {"llama.rope.scaling.type": "none"}, False),
        (["output.weight", "rope_freqs.weight"], {}, True),  # Llama 3.1 and 3.2
        (["output.weight"], {"qwen2.rope.scaling.type": "yarn"}, True),
    ],
)
def test_gguf_files_whose_positions_are_scaled_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tensors: list[str], fields: dict[str, str], is_refused: bool
) -> None:
    """By what the package gguf tells of a file; the package itself is not among those that tests need."""
    told = SimpleNamespace(
        tensors=[SimpleNamespace(name=name) for name in tensors],
        fields={name: SimpleNamespace(contents=lambda value=value: value) for name, value in fields.items()},
    )
    monkeypatch.setitem(sys.modules, "gguf", SimpleNamespace(GGUFReader=lambda file: told))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="take the model's safetensors release") if is_refused else nullcontext():
        _require_plain_positions(tmp_path / "some.gguf")


def test_what_is_wrong_with_a_gguf_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        to_hugging_face(tmp_path / "none.gguf", tmp_path / "out")
    (tmp_path / "some.gguf").touch()
    with pytest.raises(UserError, match="is there already"):
        to_hugging_face(tmp_path / "some.gguf", tmp_path)


def test_a_gguf_file_that_is_read_in_part_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of other architectures transformers leaves weights as they are drawn, and says so among its progress bars."""
    import transformers

    reader = SimpleNamespace(tensors=[], fields={})
    package = SimpleNamespace(GGUFReader=lambda file: reader, __spec__=object())
    monkeypatch.setitem(sys.modules, "gguf", package)  # type: ignore[arg-type]
    told: dict[str, set[str]] = {"missing_keys": {"model.layers.3.mlp.up_proj.weight"}, "unexpected_keys": set()}
    read = staticmethod(lambda *args, **kwargs: (None, told))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", read)
    (tmp_path / "some.gguf").touch()
    with pytest.raises(
        UserError, match=r"reads it with missing keys \(model.layers.3.mlp.up_proj.weight, …\): take the"
    ):
        to_hugging_face(tmp_path / "some.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_general_conversations_are_taken_once_and_without_other_columns(tmp_path: Path) -> None:
    """What stands twice would be protected and scored; a date is nothing that JSON can hold."""
    rows = [{"prompt": f"{i % 3}", "response": "yes", "created": datetime.date(2026, 1, 1)} for i in range(6)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "general.parquet")
    found = [*_short_conversations(str(tmp_path / "general.parquet"))]
    assert found == [{"prompt": f"{i}", "response": "yes"} for i in range(3)]
