"""Benchmarks run, and their page says what their data says. How fast anything is, is no test's affair."""

from __future__ import annotations

import itertools
import json
import shlex
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


@pytest.mark.parametrize("name", ["projection", "large", "growth", "apart"])
def test_the_pages_commands_measure_what_it_shows(name: str) -> None:
    account = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    args = projection._parser().parse_args(shlex.split(account["command"])[3:])
    shown = [(r["elements"], r["blocks"], r["basis_dtype"], r["rank"], r["apart"]) for r in account["results"]]
    apart = [choice == "yes" for choice in args.apart]
    asked = itertools.product(map(int, args.elements), args.blocks, args.basis_dtype, args.rank, apart)
    assert shown == list(asked)


def test_the_passes_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    flags = ["--elements", "2e6", "--rank", "1", "3", "--blocks", "1", "7", "--rounds", "1"]
    flags += ["--apart", "no", "yes", "--with-pytorch"]
    assert projection.main([*flags, "--device", "cpu", "--json", str(file)]) == 0
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert len(results) == 16
    assert [result["apart"] for result in results] == [False, True] * 8
    for result in results:
        speeds = result["passes"]
        assert set(speeds) == {"triad", "copy", "dots", "subtract", "dots in PyTorch", "subtract in PyTorch"}
        own = {"triad": 12, "copy": 8, "dots": 4, "subtract": 8}
        for name, fixed in own.items():
            of_basis = (
                0 if name in ("triad", "copy") else result["rank"] * (4 if result["basis_dtype"] == "fp32" else 2)
            )
            expected = (fixed + of_basis) * result["elements"] / (speeds[name]["milliseconds"] * 1e6)
            assert speeds[name]["gigabytes_per_second"] == pytest.approx(expected)
        assert speeds["triad"]["of_triad"] == pytest.approx(1.0)
    told = capsys.readouterr().out
    assert "of triad" in told
    assert told.count("7 blocks apart") == 4


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
