"""What wants a GPU as one command: what is run, what counts as done, and the page of it. Nothing is measured here."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ogpsa.benchmarks import gpu_report, on_gpu, profile, projection, step, training
from megatron_ogpsa.benchmarks.gpu_tests import failures, fp8_rows, in_words, is_cut, read_tests
from megatron_ogpsa.benchmarks.on_gpu import Measurement

ROOT = Path(__file__).parents[2]

PARSERS = {
    projection.__name__: projection._parser,
    step.__name__: step.parser,
    profile.__name__: profile._parser,
    training.__name__: training._parser,
}

TESTS = """
import pytest

@pytest.mark.parametrize("recipe", ["delayed", "blockwise", "mxfp8"])
@pytest.mark.parametrize("variant", ["", "recompute"])
def test_refreshes_leave_no_trace(recipe, variant):
    if recipe == "mxfp8":
        pytest.skip("not here")
    assert (recipe, variant) != ("blockwise", "recompute")

@pytest.mark.parametrize("recipe", ["delayed", "blockwise"])
def test_reference_subspaces_are_near(recipe, record_property):
    for name, lowest in (("general", 0.9), ("chat", 0.8)):
        record_property(f"{name}: lowest cosine", lowest)
        record_property(f"{name}: mean cosine", lowest + 0.1)

@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("recipe", ["delayed"])
def test_losses_are_near(recipe, stage, record_property):
    record_property("mean loss", 1.5 if stage == "sft" else 0.7)
    record_property("mean loss in bf16", 1.25 if stage == "sft" else 0.6)
"""

CUT = (
    '<testsuites><testsuite><testcase name="test_losses_are_near[delayed-sft]" time="1"/><testcase time="0.002"/>'
    "</testsuite></testsuites>"
)

LEAVING = """
import sys, time
from pathlib import Path
with Path("begun").open("a") as file:
    file.write(sys.argv[1] + " ")
if sys.argv[1] == "slow":
    Path(sys.argv[-1]).write_text("half of it")
    time.sleep(60)
if sys.argv[1] != "broken":
    Path(sys.argv[-1]).write_text("found")
sys.exit(0 if sys.argv[1] == "good" else 1)
"""


def arguments(*flags: str) -> argparse.Namespace:
    return on_gpu._parser().parse_args(list(flags))


def test_each_command_is_one(tmp_path: Path) -> None:
    sources = [f"--{name}={name}.jsonl" for name in ("sft", "dpo", "reference")]
    known = 0
    for one in on_gpu.measurements(arguments(str(tmp_path), "--model", "folder", *sources)):
        argv = one.command(tmp_path).argv
        module = next(part for part in argv[2:] if part == "pytest" or part in PARSERS)
        given = argv[argv.index(module) + 1 :]
        if module == "pytest":
            assert (ROOT / next(part for part in given if part.startswith("tests/"))).is_dir()
        else:
            args = PARSERS[module]().parse_args(given)
            assert args.json == one.unfinished(tmp_path)
            known += 1
    assert known == 9


def test_the_pages_commands_are_commands() -> None:
    pages = "".join((ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in ("gpu", "fp8"))
    commands = re.findall(r"benchmarks\.on_gpu ([^\n`#]+)", pages.replace("\\\n", ""))
    assert [arguments(*shlex.split(command)).folder.name for command in commands] == ["measured", "measured"]


@pytest.mark.parametrize(("flags", "number"), [((), 11), (("--model", "folder", "--reference", "r", "--sft", "s"), 12)])
def test_whole_runs_want_a_model(flags: tuple[str, ...], number: int, tmp_path: Path) -> None:
    assert len(on_gpu.measurements(arguments(str(tmp_path), *flags))) == number


def test_some_of_it_can_be_asked_for(tmp_path: Path) -> None:
    chosen = arguments(str(tmp_path), "--only", "fp8-resume", "narrow")
    assert [one.name for one in on_gpu.measurements(chosen)] == ["fp8-resume", "narrow"]


def test_what_is_left_is_for_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What failed without a result and what was cut off run again; failed tests are a result."""
    (tmp_path / "leaving.py").write_text(LEAVING, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = ("good", "failing", "broken", "slow", "late")
    made = [Measurement(name, f"{name}.json", "--json", ("leaving", name), 1.0) for name in names]
    monkeypatch.setattr(on_gpu, "measurements", lambda _: made)
    folder = tmp_path / "out"
    told = on_gpu.measure(arguments(str(folder), "--minutes", "0.2"))
    assert told == [
        f"failing: failed, see {folder}/failing.log",
        f"broken: failed, see {folder}/broken.log",
        *(f"{name}: not measured yet" for name in ("broken", "slow", "late")),
    ]
    assert {path.name for path in folder.glob("*.json")} == {"good.json", "failing.json", "unfinished-slow.json"}
    made.pop(3)
    assert len(on_gpu.measure(arguments(str(folder), "--minutes", "1"))) == 3
    assert (tmp_path / "begun").read_text(encoding="utf-8").split() == [*names[:4], "broken", "late"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "no GPU"),
        (("--minutes", "0"), "--minutes 0: use more than 0"),
        (("--model", "folder", "--sft", "s"), "--model MODEL wants --reference"),
        (("--only", "narrow", "sft"), "--only sft: not among what is measured"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    flags: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(flags))
    monkeypatch.setattr(on_gpu, "find_spec", lambda _: object())
    monkeypatch.chdir(ROOT)
    assert on_gpu.main(["nowhere", *flags]) == 2
    assert said in capsys.readouterr().err
    assert not Path("nowhere").exists()


@pytest.fixture(scope="module")
def junit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of pytest's own."""
    folder = tmp_path_factory.mktemp("junit")
    (folder / "test_some.py").write_text(TESTS, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junit-xml", "found.xml"]
    subprocess.run(command, cwd=folder, capture_output=True, timeout=120, check=False)
    return folder / "found.xml"


def test_outcomes_and_figures_come_out_of_pytests_file(junit: Path) -> None:
    tests = read_tests(junit)
    assert not is_cut(junit)
    assert in_words(tests) == "7 passed, 1 failed, 2 skipped"
    assert failures(tests) == ["refreshes leave no trace [recompute, blockwise]"]
    rows = fp8_rows(gpu_report.by_recipe(tests, ["delayed", "blockwise", "mxfp8"]))
    assert rows[1] == ["delayed", "2 passed", "–", "–", "0.800", "0.950", "1.500, 1.250", "0.700, 0.600"]
    assert rows[2] == ["blockwise", "1 passed, 1 failed", "–", "–", "0.800", "0.950", "–, –", "–, –"]
    assert len(rows) == 3


def test_what_was_cut_off_is_left_out(tmp_path: Path) -> None:
    """As pytest with workers leaves it on SIGINT: those that were under way have no name."""
    (tmp_path / "cut.xml").write_text(CUT, encoding="utf-8")
    assert in_words(read_tests(tmp_path / "cut.xml")) == "1 passed"
    assert is_cut(tmp_path / "cut.xml")


def test_the_page_tells_what_there_is(junit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "gpu"
    folder.mkdir()
    for file in (ROOT / "docs" / "gpu").glob("*.json*"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "fp8-figures.xml").write_bytes(junit.read_bytes())
    whole_runs = json.loads((ROOT / "docs/performance/training.json").read_text(encoding="utf-8"))
    (folder / "sft.json").write_text(json.dumps(whole_runs), encoding="utf-8")
    (folder / "default_step.jsonl").unlink()
    notes = json.loads((folder / "notes.json").read_text(encoding="utf-8"))
    page = gpu_report.as_markdown(gpu_report.Data.of(folder))
    assert notes["profile"] in page
    assert "A shard of 10M elements" in page
    assert "The GPU works" not in page
    small = json.loads((folder / "small.json").read_text(encoding="utf-8"))
    for result in small["results"]:
        for speed in result["passes"].values():
            speed["device_milliseconds"] = speed["milliseconds"] / 4
    (folder / "small.json").write_text(json.dumps(small), encoding="utf-8")
    assert "The GPU works 25% to 25% of these times." in gpu_report.as_markdown(gpu_report.Data.of(folder))
    (folder / "notes.json").unlink()  # of those data alone: a page of others says nothing of it
    page = gpu_report.as_markdown(gpu_report.Data.of(folder))
    assert notes["profile"] not in page
    assert "tests/core" not in page.partition("## Tests")[2]
    assert "| delayed | 2 passed |" in page
    assert "7 passed, 1 failed, 2 skipped; failed: refreshes leave no trace [recompute, blockwise]" in page
    assert whole_runs["command"] in page
    assert page.endswith("## Not measured\n\nSeveral GPUs, evaluation and its answers, a step of the default rule.\n")
    (folder / "dpo.json").unlink()
    del whole_runs["results"][-1]
    (folder / "sft.json").write_text(json.dumps(whole_runs), encoding="utf-8")
    (folder / "fp8-traces.xml").write_text(CUT, encoding="utf-8")
    page = gpu_report.as_markdown(gpu_report.Data.of(folder))
    assert "whole runs of DPO (TRL, authors), those of FP8's tests for which there was no time" in page
    (folder / "profile.json").unlink()
    assert gpu_report.main([str(folder)]) == 2
    assert "profile.json: not measured yet" in capsys.readouterr().err
