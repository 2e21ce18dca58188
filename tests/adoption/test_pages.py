"""What the pages print runs, and what they name is there. (``test_bridge`` has Bridge's code, ``test_readme`` the diff.)"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from megatron_ogpsa.cli.main import VERBS
from megatron_ogpsa.cluster.settings import FLAGS
from megatron_ogpsa.configuration.config_file import ConfigFile
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.pipeline.plan import plan_stages
from megatron_ogpsa.watchdog import HANG_EXIT_CODE
from tests.adoption import flags_page, refused_page
from tests.adoption.pages import ROOT, blocks
from tests.harness import WorkerGroup


def test_the_loop_of_the_page_resumes_as_if_undisturbed(distributed: Callable[[int], WorkerGroup]) -> None:
    attaching, loop, leaving = blocks("own-loop.md", "python")
    job = "tests.adoption.cases:page_of_own_loop"
    for result in distributed(2).run(job, attaching=attaching, loop=loop, leaving=leaving):
        assert all(result.values()), result


MARKDOWN = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"])

OF_OTHERS = {
    "torchrun": ("--standalone", "--rdzv-backend"),
    "pip": ("--no-deps", "--no-build-isolation"),
    "pytest": ("--junit-xml",),
    "sbatch": ("--requeue", "--signal"),
    "lm_eval": (
        "--apply_chat_template",
        "--batch_size",
        "--device",
        "--include_path",
        "--model",
        "--model_args",
        "--tasks",
    ),
    "benchmarks.training": ("--rows", "--reference-samples"),  # the fields of its Sizes
    "tests.mutations": ("--jobs", "--list", "--markdown", "--only"),
}
"""Programs that are no verbs of the command."""

OF_KITCHEN = {"--kitchen-config-file", "--kitchen-recipe-number"}
"""Megatron has them where its package is installed."""

GONE = {"CHANGELOG.md": {"--no-dist-ckpt-optim-fully-reshardable"}}


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+[a-z0-9]", text))


@pytest.fixture(scope="module")
def known() -> set[str]:
    from megatron_ogpsa.integration.arguments.parser import build_parser

    parsers = [build_parser()]
    for module, *_ in VERBS.values():
        parsers.append(argparse.ArgumentParser())
        import_module(module).add_arguments(parsers[-1])
    flags = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    # Benchmarks and the tests' own programs make their parsers in many ways: what their sources name is taken.
    programs = [*(ROOT / "megatron_ogpsa/benchmarks").glob("*.py"), *(ROOT / "tests").glob("*/__main__.py")]
    flags |= set().union(*(flags_in(program.read_text(encoding="utf-8")) for program in programs))
    return flags | {f"--{key}" for key in (*FLAGS, "version")} | {flag for own in OF_OTHERS.values() for flag in own}


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_exist_and_flags_are_known(page: Path, known: set[str]) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (page.parent / path).exists(), path
    if page.name == "mutations.md":  # quotes what failing tests have printed
        return
    assert flags_in(text) - GONE.get(page.name, set()) - OF_KITCHEN <= known


def test_troubles_are_quoted_as_they_are_told() -> None:
    """Of warnings the words, of a command that ended its code."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "megatron_ogpsa").rglob("*.py"))
    told = re.sub(r'"\s*\n\s*f?"', "", sources)  # a string over several lines
    warnings = re.findall(
        r"^\| `([^`]+)` \|", page.partition("## Warnings")[2].partition("\n## ")[0], flags=re.MULTILINE
    )
    assert len(warnings) == 7
    assert [words for words in warnings if words not in told] == []
    assert UserError.exit_code == 2
    assert HANG_EXIT_CODE == 3
    assert [row.split(" |")[0] for row in re.findall(r"^\| (\d.*)", page, flags=re.MULTILINE)] == [
        "0",
        "1",
        "2",
        "3",
        "143, 130",
    ]


def test_every_flag_is_on_its_page_as_help_has_it() -> None:
    assert flags_page.PAGE.read_text(encoding="utf-8") == flags_page.page()


def test_every_refusal_is_on_its_page() -> None:
    assert refused_page.PAGE.read_text(encoding="utf-8") == refused_page.page()


@pytest.mark.parametrize("where", refused_page.tables())
def test_refusals_name_flags_that_are_there_and_end_with_the_remedy(known: set[str], where: str) -> None:
    """``doctor`` shows what stands behind the last semicolon as what to do."""
    for refusal in refused_page.tables()[where]:
        assert flags_in(f"{refusal.flag} {refusal.reason} {refusal.remedy}") - OF_KITCHEN <= known
        assert ";" not in refusal.remedy
        assert ";" not in refusal.reason


def test_the_configuration_of_the_page_is_one(tmp_path: Path) -> None:
    from megatron_ogpsa.integration.arguments.parser import build_parser

    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    (written,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "models/llama-megatron").mkdir(parents=True)
    (tmp_path / "models/llama-megatron/model.yaml").write_text("num-layers: 2\n", encoding="utf-8")
    (tmp_path / "base.yaml").write_text("lr: 1.0e-5\nseq-length: 64\n", encoding="utf-8")
    (tmp_path / "run.yaml").write_text(written.replace("models/", f"{tmp_path}/models/"), encoding="utf-8")
    config = ConfigFile.read(tmp_path / "run.yaml")
    parser = build_parser()
    sft, dpo = (parser.parse_args(stage.flags(parser)) for stage in plan_stages(config, ["--ogpsa-dpo-beta", "0.1"]))
    assert config.launch == {"nproc-per-node": "8"}
    assert (sft.num_layers, sft.lr, sft.seq_length, sft.bf16) == (2, 1e-6, 64, True)  # of model, file, base and file
    assert sft.ogpsa_reference == [("math", "data/math.jsonl"), ("chat", "data/chat.jsonl")]
    assert (sft.train_iters, dpo.train_iters, dpo.ogpsa_stage, dpo.ogpsa_dpo_beta) == (200, 100, "dpo", 0.1)
    assert dpo.pretrained_checkpoint == sft.save == "runs/safer/sft"
