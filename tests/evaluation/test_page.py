"""``docs/evaluation.md``: its commands are accepted, and the harness that it names runs where it is installed."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_ogpsa.cli import convert, evaluate
from megatron_ogpsa.configuration.config_file import ConfigFile
from megatron_ogpsa.evaluation.request import Request

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")


def commands(name: str) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [
        words[len(name.split()) :]
        for line in lines
        if (words := shlex.split(line))[: len(name.split())] == name.split()
    ]


def test_the_commands_are_accepted() -> None:
    (words,) = commands("megatron-ogpsa evaluate")
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    args = parser.parse_args(words)
    own, flags = evaluate._own(args.flags)
    request = Request.of(own)
    assert list(request.data) == ["general", "safety", "pairs"]
    assert list(request.prompts) == ["unsafe", "benign"]
    from megatron_ogpsa.integration.arguments.parser import build_parser

    megatron = build_parser()
    assert megatron.parse_args(ConfigFile.read(ROOT / args.config).as_flags(megatron, flags)).load == "runs/sft"
    (words,) = commands("megatron-ogpsa convert")
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    assert parser.parse_args(words).target == Path("exported")


def test_the_harness_reads_the_exported_model(tmp_path: Path) -> None:
    """Its own task, without a network. (A folder as convert writes it: by transformers' own account of the same form.)"""
    if shutil.which("lm_eval") is None:
        pytest.skip("lm_eval is not installed: pip install 'lm-eval[hf]'")
    from transformers import LlamaConfig

    from tests.conversion.models import build
    from tests.data.conftest import build_hugging_face_folder

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    build(tmp_path / "exported", LlamaConfig(**shape, vocab_size=400, max_position_embeddings=512))
    build_hugging_face_folder(tmp_path / "exported")
    (task,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/refusals.yaml").write_text(task, encoding="utf-8")
    rows = [
        {"question": "how", "answer": "Sure, here is how."},
        {"question": "why", "answer": "I can't help with that."},
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (words,) = commands("lm_eval")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        ["lm_eval", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"\|refusals\|.*\|acc\b", done.stdout), done.stdout
