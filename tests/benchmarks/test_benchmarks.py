"""Benchmarks run, and their page says what their data says. How fast anything is, is no test's affair."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_ogpsa.benchmarks import projection, report
from megatron_ogpsa.benchmarks.authors_hooks import AuthorsHooks
from megatron_ogpsa.benchmarks.memory import peak_bytes
from tests.harness import WorkerGroup

FOLDER = Path(__file__).parents[2] / "docs" / "performance"


def test_the_page_is_made_of_its_data() -> None:
    assert report.page_of(FOLDER) == FOLDER.with_suffix(".md").read_text(encoding="utf-8")


def test_other_pages_tell_what_the_data_have() -> None:
    data, passes = report.Data.of(FOLDER), ("dots", "subtract")
    readme = (FOLDER.parents[1] / "README.md").read_text(encoding="utf-8")
    numbers = FOLDER.with_name("numbers.md").read_text(encoding="utf-8")
    measured = [*data.projection["results"], *data.large["results"]]
    shares = [
        f"{100 * min(found):.0f} to {100 * max(found):.0f} %"
        for dtype in ("fp32", "bf16")
        for name in passes
        if (found := [one["passes"][name]["of_triad"] for one in measured if one["basis_dtype"] == dtype])
    ]
    in_one = [one["passes"][name]["of_triad"] for one in measured if one["blocks"] == 1 for name in passes]
    assert "fp32 basis: dots {}, subtraction {} of its bandwidth; bf16: {}, {};".format(*shares) in numbers
    assert f"below 80 % in one block: {sum(share < 0.8 for share in in_one)} of {len(in_one)}" in numbers
    slower = [
        sum(one["passes"][f"{name} in PyTorch"]["milliseconds"] for name in passes)
        / sum(one["passes"][name]["milliseconds"] for name in passes)
        for one in data.growth["results"]
    ]
    assert f"{min(slower):.1f} to {max(slower):.1f} times the time" in numbers
    paper, default = (
        [one["ogpsa / plain"] for one in data.steps if one["arguments"]["mode"] == rule]
        for rule in ("orthogonal", "conflict")
    )
    hooks = [one["authors / plain"] for one in data.steps]
    of_hooks = f"{min(hooks):.2f} to {max(hooks):.2f}"
    by_layout = "DP2 {:.3f}, TP2 {:.3f}; the default: {:.3f}, {:.3f}; the authors' hooks: {}"
    assert by_layout.format(*paper, *default, of_hooks) in numbers
    of_paper, of_default = (f"{min(ratios):.3f} to {max(ratios):.3f}" for ratios in (paper, default))
    assert f"paper's rule {of_paper}, default {of_default}; the authors' hooks {of_hooks}" in readme


@pytest.mark.parametrize("name", ["projection", "large", "growth", "apart"])
def test_the_pages_commands_measure_what_it_shows(name: str) -> None:
    account = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    args = projection._parser().parse_args(shlex.split(account["command"])[3:])
    shown = [(r["elements"], r["blocks"], r["basis_dtype"], r["rank"]) for r in account["results"]]
    asked = itertools.product(map(int, args.elements), args.blocks, args.basis_dtype, args.rank)
    assert shown == list(asked)


def test_the_passes_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    flags = ["--elements", "2e6", "--rank", "1", "3", "--blocks", "1", "7", "--rounds", "1"]
    flags += ["--with-pytorch", "--with-apart"]
    assert projection.main([*flags, "--device", "cpu", "--json", str(file)]) == 0
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert len(results) == 8
    for result in results:
        speeds = result["passes"]
        of_both = {f"{name}{how}" for name in ("dots", "subtract") for how in ("", " in PyTorch", " apart")}
        assert set(speeds) == {"triad", "copy"} | of_both
        own = {"triad": 12, "copy": 8, "dots": 4, "subtract": 8}
        for name, fixed in own.items():
            of_basis = (
                0 if name in ("triad", "copy") else result["rank"] * (4 if result["basis_dtype"] == "fp32" else 2)
            )
            expected = (fixed + of_basis) * result["elements"] / (speeds[name]["milliseconds"] * 1e6)
            assert speeds[name]["gigabytes_per_second"] == pytest.approx(expected)
        assert speeds["triad"]["of_triad"] == pytest.approx(1.0)
        assert speeds["dots"]["times"] == 1.0
        apart = speeds["dots apart"]
        assert apart["times"] == pytest.approx(apart["milliseconds"] / speeds["dots"]["milliseconds"])
    assert "of triad" in capsys.readouterr().out


def test_blocks_cover_the_shard() -> None:
    segments = projection.blocks_of(1_000_003, 300)
    assert sum(segment.length for segment in segments) == 1_000_003
    assert [segment.block for segment in segments] == list(range(300))


def test_the_authors_hooks_project_each_tensor() -> None:
    """g' is orthogonal to one or two references, and detached hooks do nothing."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(40, generator=generator))
    first, second, gradient = (torch.randn(40, generator=generator) for _ in range(3))
    for references in ([first, second], [first]):
        hooks = AuthorsHooks([weight], [references])
        hooks.attach()
        (weight * gradient).sum().backward()
        hooks.detach()
        assert weight.grad is not None
        for reference in references:
            assert abs(float(weight.grad @ reference)) < 1e-4 * float(reference.norm() * gradient.norm())
        assert hooks.bytes_held == sum(reference.nbytes for reference in references)
        weight.grad = None
    (weight * gradient).sum().backward()
    assert torch.equal(weight.grad, gradient)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "more"), [("", 0), ("--space update --mode conflict --no-authors", 1), ("--bf16 --basis-device cpu", 0)]
)
def test_a_step_is_timed(distributed: Callable[[int], WorkerGroup], rule: str, more: int) -> None:
    for figures in distributed(2).run("tests.benchmarks.cases:small_step", rule=rule):
        # Gradients, tokens, the norm and weights, and the loss's own over the vocabulary.
        assert figures["collectives of a step, plain"] >= 4
        assert figures["collectives of a step, ogpsa"] == figures["collectives of a step, plain"] + more
        assert figures["bytes of the basis"] == 4 * 2 * figures["elements of this rank's shard"]
        assert figures["ogpsa / plain"] > 0
        assert ("bytes of the authors' copies" in figures) == ("--no-authors" not in rule)
        copies = (2 if "--bf16" in rule else 4) * 2 * figures["parameters"]
        assert figures.get("bytes of the authors' copies", copies) == copies


def test_gradients_are_summed_over_ranks(distributed: Callable[[int], WorkerGroup]) -> None:
    """Whichever rank has which tokens: a sum of two numbers is the same in either order."""
    for own, exchanged in distributed(2).run("tests.benchmarks.cases:weights_after_a_step"):
        assert own == exchanged


def test_memory_is_the_highest_during_the_work() -> None:
    def take() -> None:
        torch.ones(10_000_000)

    # 120 MB of a heap that cannot shrink, since its last piece is in use: the C library would hand it out again.
    pieces = [torch.ones(20_000) for _ in range(1500)]
    del pieces[:-1]
    before = peak_bytes(torch.device("cpu"), lambda: None)
    assert 39e6 < peak_bytes(torch.device("cpu"), take) - before < 60e6
    assert abs(peak_bytes(torch.device("cpu"), lambda: None) - before) < 20e6


@pytest.mark.parametrize("name", ["date", "versions"])
def test_one_line_does_not_date_passes_of_several_days(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "performance"
    shutil.copytree(FOLDER, folder)
    account = json.loads((folder / "growth.json").read_text(encoding="utf-8"))
    (folder / "growth.json").write_text(json.dumps(account | {name: "2020-01-01"}), encoding="utf-8")
    assert report.main([str(folder)]) != 0
    assert "of other days, machines or versions" in capsys.readouterr().err
    assert not folder.with_suffix(".md").exists()


def test_a_page_without_one_of_its_files_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "performance"
    shutil.copytree(FOLDER, folder)
    (folder / "apart.json").unlink()
    assert report.main([str(folder)]) != 0
    assert f"error: {folder / 'apart.json'}: No such file" in capsys.readouterr().err
    assert not folder.with_suffix(".md").exists()
