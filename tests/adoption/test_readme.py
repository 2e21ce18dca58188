"""What the README prints and claims is what happens."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.conftest import build_hugging_face_folder

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run(command: list[str], folder: Path, timeout: float) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False)
    told = [line for line in done.stderr.splitlines() if line.startswith(("[rank0]:", "megatron-ogpsa:"))]
    assert done.returncode == 0, "\n".join(told) or done.stderr[-2000:]
    return done.stdout + done.stderr


def test_the_diff_is_all_that_an_existing_script_needs(tmp_path: Path) -> None:
    tokenizer_folder = build_hugging_face_folder(tmp_path / "tokenizer")
    (diff,) = blocks("diff")
    lines = diff.splitlines()
    assert len(lines) <= 6
    script = (ROOT / "tests/adoption/existing_script.py").read_text(encoding="utf-8")
    removed = [line[1:] for line in lines if line.startswith("-")]
    added = [line[1:] for line in lines if line.startswith("+")]
    for old, new in zip(removed, added, strict=True):
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    (tmp_path / "train.py").write_text(script, encoding="utf-8")
    turns = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "good morning"}]
    (tmp_path / "general.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 8, encoding="utf-8")
    flags = (
        "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
        "--micro-batch-size 2 --global-batch-size 8 --train-iters 3 --lr 1e-3 --eval-interval 9 --eval-iters 0 "
        "--log-interval 1 "
        f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {tokenizer_folder} --tensor-model-parallel-size 2 "
        "--ogpsa-reference general=general.jsonl"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    output = run([*launch, *flags.split()], tmp_path, timeout=180)
    steps = re.findall(r"iteration +(\d)/ +3 .*ogpsa removed: (\S+).*ogpsa rank: 1\.", output)
    assert [step for step, _ in steps] == ["1", "2", "3"]
    assert all(0 < float(share) <= 1 for _, share in steps)


def test_the_flags_are_those_of_the_parser() -> None:
    from megatron_ogpsa.integration.arguments import build_parser

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


def test_paths_and_links_exist() -> None:
    for path in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`(launch/\S+\.sh)", README):
        assert (ROOT / path).exists(), path


@pytest.mark.timeout(900)
def test_the_demo_prints_the_table_of_the_readme(tmp_path: Path) -> None:
    """Rows and columns alike; figures are those of one machine and differ in their last digits on another one."""
    printed = next(block for block in blocks("text") if "refusal on unsafe" in block)
    command = [sys.executable, "-m", "megatron_ogpsa.cli.main", "demo", "--out", str(tmp_path / "demo")]
    output = run(command, tmp_path, timeout=840)
    table = output[output.index(printed.splitlines()[0].split("start")[0] + "start") :].splitlines()
    for expected, line in zip(printed.splitlines(), table, strict=False):
        assert expected[:24] == line[:24]
    unsafe = [float(value) for value in re.findall(r"([\d.]+) %", table[2])]
    assert unsafe[0] == 0.0
    assert min(unsafe[1:]) > 75  # fine-tuning for safety works, or there is no tax to speak of
    for name in ("report.md", "results.csv", "tasks.png", "tradeoff.png", "training.png"):
        assert (tmp_path / "demo/report" / name).stat().st_size > 500
