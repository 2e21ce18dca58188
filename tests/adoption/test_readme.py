"""What the README, and the pages that it leads to, print and claim is what happens."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from megatron_ogpsa.cli.main import VERBS
from megatron_ogpsa.configuration.config_file import ConfigFile
from tests.adoption import pages
from tests.data.conftest import build_hugging_face_folder
from tests.harness.preloaded import PreloadedCommand

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def printed_by_the_demo() -> list[str]:
    """The table of docs/demo.md."""
    page = (ROOT / "docs/demo.md").read_text(encoding="utf-8")
    return next(block for block in blocks("text", page) if "refusal on unsafe" in block).splitlines()


def run(command: list[str], folder: Path, timeout: float, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    told = [line for line in done.stderr.splitlines() if line.startswith(("[rank0]:", "megatron-ogpsa:"))]
    assert done.returncode == 0, "\n".join(told) or done.stderr[-2000:]
    return done.stdout + done.stderr


def test_the_diff_is_all_that_an_existing_script_needs(tmp_path: Path) -> None:
    tokenizer_folder = build_hugging_face_folder(tmp_path / "tokenizer")
    (diff,) = blocks("diff")
    assert pages.blocks("existing-script.md", "diff") == [diff]
    lines = diff.splitlines()
    assert len(lines) <= 6
    script = (ROOT / "tests/adoption/existing_script.py").read_text(encoding="utf-8")
    removed = [line[1:] for line in lines if line.startswith("-")]
    added = [line[1:] for line in lines if line.startswith("+")]
    for old, new in zip(removed, added, strict=True):
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    (tmp_path / "train.py").write_text(script, encoding="utf-8")
    (row,) = pages.blocks("existing-script.md", "json")
    (tmp_path / "general.jsonl").write_text(row * 8, encoding="utf-8")
    flags = (
        "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
        "--micro-batch-size 2 --global-batch-size 8 --train-iters 3 --lr 1e-3 --eval-interval 9 --eval-iters 0 "
        "--log-interval 1 "
        f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {tokenizer_folder} --tensor-model-parallel-size 2"
    )
    (command,) = pages.blocks("existing-script.md", "bash")
    with_programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    output = run(["bash", "-ec", command], tmp_path, timeout=180, FLAGS=flags, PATH=with_programs)
    steps = re.findall(r"iteration +(\d)/ +3 .*ogpsa removed length: (\S+).*ogpsa rank: 1\.", output)
    assert [step for step, _ in steps] == ["1", "2", "3"]
    assert all(float(length) >= 0 for _, length in steps)
    (line,) = pages.blocks("existing-script.md", "text")
    as_pattern = re.sub(r"\d+", r"\\d+", re.sub(r"\\[+-]", "[+-]", re.escape(line.strip())))
    assert re.search(as_pattern, output)  # the refresh that the checkpoint of step 2 calls for
    assert (tmp_path / "checkpoints/iter_0000002").is_dir()


def test_the_flags_are_those_of_the_parser() -> None:
    from megatron_ogpsa.integration.arguments.parser import build_parser

    text = next(block for block in blocks("text") if "--ogpsa-reference NAME" in block)
    actions = {option: action for action in build_parser()._actions for option in action.option_strings}
    for line in text.splitlines():
        flag, form, *_ = line.split()
        action = actions[flag]
        if action.choices:
            assert form.split("|") == list(action.choices)
        if default := re.search(r"\((\w+)\)$", line):
            assert str(action.default) == default[1]


def test_the_python_block_is_the_contract(distributed) -> None:  # type: ignore[no-untyped-def]
    (block,) = blocks("python")
    assert all(distributed(2).run("tests.adoption.cases:readme_block", code=block))


@pytest.mark.parametrize("page", [Path("README.md"), *(path.relative_to(ROOT) for path in ROOT.glob("docs/*.md"))])
def test_paths_and_links_exist(page: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", text):
        assert (ROOT / page.parent / path).exists(), path
    for path in re.findall(r"`(launch/\S+\.sh)", text):
        assert (ROOT / path).exists(), path


def test_every_room_of_the_code_is_on_the_map() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    package = ROOT / "megatron_ogpsa"
    floors = (package, package / "integration")
    rooms = [path.parent for floor in floors for path in floor.glob("*/__init__.py")]
    modules = [path for path in package.glob("*.py") if path.name not in ("__init__.py", "config.py")]
    for path in (*rooms, *modules):
        assert f"`{path.name}{'/' * path.is_dir()}`" in page, path.name
    for named in re.findall(r"`([a-z_]+(?:\.py|/))`", page):
        assert any((folder / named).exists() for folder in (*floors, package / "plugin", ROOT / "tests/core")), named


@pytest.mark.parametrize("line", re.findall(r"^\$ megatron-ogpsa (.*)", README, re.MULTILINE))
def test_commands_are_accepted(line: str) -> None:
    """Their verbs' parsers take them, and the configurations that they name can be read."""
    verb, *words = shlex.split(line)
    parser = argparse.ArgumentParser()
    module = import_module(VERBS[verb][0])
    module.add_arguments(parser)
    args = parser.parse_args(words)
    if config := getattr(args, "config", None):
        assert ConfigFile.read(ROOT / config).entries


def test_the_demo_prints_the_table_of_its_page(preloaded: PreloadedCommand, tmp_path: Path) -> None:
    """The reduced demo, of fewer steps: the same rows, some of the columns. The figures there are those of the whole one."""
    printed = printed_by_the_demo()
    arguments = ["demo", "--fast", "--out", str(tmp_path / "demo")]
    done = preloaded.run("tests.adoption.short_demo", arguments, folder=tmp_path, timeout=540, agent=True)
    assert done.exit_code == 0, done.output[-2000:]
    output = done.output.splitlines()
    first = next(number for number, line in enumerate(output) if line.split()[:1] == ["start"])
    assert set(re.split(r"  +", output[first].strip())) < set(re.split(r"  +", printed[0].strip()))
    table = output[first : first + len(printed)]
    for expected, line in zip(printed, table, strict=True):
        assert expected[:24] == line[:24]
    start, *tuned = [float(value) for value in re.findall(r"([\d.]+) %", table[2])]
    assert len(tuned) == 4
    assert start == 0.0
    for name in ("report.md", "results.csv", "tasks.png", "tradeoff.png", "training.png"):
        assert (tmp_path / "demo/report" / name).stat().st_size > 500


def test_what_the_page_says_of_the_demos_shares_follows_from_its_table() -> None:
    """Shares of the tax, computed again from the rows above them, to the digits that are printed."""
    printed = printed_by_the_demo()
    rows = {line[:24].strip(): [cell.strip() for cell in re.split(r"  +", line[24:].strip())] for line in printed}
    for measure, row, digits in (("accuracy", "general accuracy", 0.001), ("loss", "general loss", 0.001)):
        values = [float(cell.removesuffix(" %")) / (100 if "%" in cell else 1) for cell in rows[row]]
        for index, cell in enumerate(rows[f"tax recovered: {measure}"]):
            if cell in ("–", "n/a"):
                continue
            plain = max(other for other in range(index) if rows[f"tax recovered: {measure}"][other] == "–")
            tax = values[0] - values[plain]
            share = (values[index] - values[plain]) / tax
            assert float(cell.removesuffix(" %")) / 100 == pytest.approx(share, abs=0.006 + 2 * digits / abs(tax))
