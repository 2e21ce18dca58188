"""The page of what was measured on a GPU, from its data: ``python -m megatron_ogpsa.benchmarks.gpu_report docs/gpu``.

The folder holds ``projection.json`` and ``large.json`` (:mod:`megatron_ogpsa.benchmarks.projection`), ``steps.jsonl``
(:mod:`megatron_ogpsa.benchmarks.step`, the paper's rule) and ``profile.json`` (:mod:`megatron_ogpsa.benchmarks.profile`); and
where they were made, ``small.json`` and ``narrow.json`` as the first two, ``default_step.jsonl`` as the third, ``sft.json``
and ``dpo.json`` (:mod:`megatron_ogpsa.benchmarks.training`) and what pytest wrote of the tests, ``kernels.xml``,
``fp8-figures.xml``, ``fp8-resume.xml`` and ``fp8-traces.xml``. ``notes.json`` has what is to be said of these data and no
others, by section.
:mod:`megatron_ogpsa.benchmarks.on_gpu` makes them all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from matplotlib.figure import Figure

from megatron_ogpsa.benchmarks import gpu_page, profile
from megatron_ogpsa.benchmarks.gpu_tests import TestRun, by_recipe, failures, fp8_rows, in_words, is_cut, read_tests
from megatron_ogpsa.benchmarks.report import Json, commands, in_markdown, training_rows
from megatron_ogpsa.benchmarks.training import TRL_SETTINGS
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.precision.fp8_support import AVAILABILITY

_DPI = 130
_COLOURS = {
    profile.PRODUCTS: "#999999",
    profile.OTHER: "#CCCCCC",
    profile.OPTIMIZER: "#009E73",
    profile.PROJECTION: "#D55E00",
    profile.COPIES: "#0072B2",
}
_PASSES = ("dots", "subtract")
_BAR = 0.8
"""Of a copy's bandwidth."""


@dataclass(frozen=True)
class Data:
    """What the page is made of: the files of its folder, by their names."""

    projection: Json
    large: Json
    steps: Sequence[Json]
    profile: Json
    small: Json | None = None
    narrow: Json | None = None
    training: Sequence[Json] = ()
    kernels: Sequence[TestRun] = ()
    fp8: Sequence[TestRun] = ()
    fp8_is_cut: bool = False
    notes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Data:
        """All files of ``folder``.

        Raises:
            UserError: one that the page needs is not there.
        """

        def text(name: str) -> str:
            if not (folder / name).exists():
                raise UserError(
                    f"{folder / name}: not measured yet: python -m megatron_ogpsa.benchmarks.on_gpu {folder}"
                )
            return (folder / name).read_text(encoding="utf-8")

        def optional(name: str) -> Json | None:
            return json.loads(text(name)) if (folder / name).exists() else None

        def tests(name: str) -> Sequence[TestRun]:
            """Those of a run that was cut off too: pytest writes what it has when it is interrupted."""
            found = [path for path in (folder / name, folder / f"unfinished-{name}") if path.exists()]
            return read_tests(found[0]) if found else ()

        return cls(
            projection=json.loads(text("projection.json")),
            large=json.loads(text("large.json")),
            steps=[
                json.loads(line)
                for name in ("steps.jsonl", "default_step.jsonl")
                for line in (text(name).splitlines() if name == "steps.jsonl" or (folder / name).exists() else ())
            ],
            profile=json.loads(text("profile.json")),
            small=optional("small.json"),
            narrow=optional("narrow.json"),
            training=[account for stage in ("sft", "dpo") if (account := optional(f"{stage}.json"))],
            kernels=tests("kernels.xml"),
            notes=optional("notes.json") or {},
            fp8_is_cut=any(is_cut(path) for path in folder.glob("*fp8-*.xml")),
            fp8=[test for part in ("figures", "resume", "traces") for test in tests(f"fp8-{part}.xml")],
        )


def as_markdown(data: Data) -> str:
    """The page."""
    further = "\n".join(_further_sections(data))
    notes = {f"{section}_note": data.notes.get(section, "") for section in ("profile", "copies")}
    return gpu_page.PAGE.format(
        **_of_the_passes(data), **_of_steps(data), **_of_the_profile(data), **notes, further=further
    )


def _further_sections(data: Data) -> Iterator[str]:
    """What may not be measured yet, and at the end that it is not."""
    missing = ["Several GPUs", "evaluation and its answers"]
    missing += [] if len(data.steps) > 1 else ["a step of the default rule"]
    if data.training:
        measured = {(result["stage"], result["setting"]) for account in data.training for result in account["results"]}
        missing += [
            f"whole runs of {stage.upper()} ({setting})"
            for stage, setting in product(("sft", "dpo"), TRL_SETTINGS)
            if (stage, setting) not in measured
        ]
        yield gpu_page.TRAINING.format(
            commands="\n".join(account["command"] for account in data.training),
            counted=_counted(data.training),
            note=data.notes.get("whole runs", ""),
            training=in_markdown(training_rows(result for account in data.training for result in account["results"])),
        )
    else:
        missing.append("whole runs")
    if data.fp8_is_cut:
        missing.append("those of FP8's tests for which there was no time ([fp8.md](fp8.md#on-a-gpu))")
    if data.fp8:
        yield gpu_page.FP8.format(fp8=in_markdown(fp8_rows(by_recipe(data.fp8, [*AVAILABILITY]))))
    else:
        missing.append("FP8")
    outcomes = [*_outcomes({"tests/core": data.kernels, "tests/gpu": data.fp8})]
    outcomes += [f"* {data.notes['tests']}"] if "tests" in data.notes else []
    if outcomes:
        yield gpu_page.TESTS.format(outcomes="\n".join(outcomes))
    yield f"## Not measured\n\n{', '.join(missing)}."


def _counted(training: Iterable[Json]) -> str:
    """``5 in SFT, 13 in DPO``."""
    numbers = {
        result["stage"]: sum(map(len, result.get("seconds of each step", [])))
        for account in training
        for result in account["results"]
        if result["setting"] not in TRL_SETTINGS
    }
    return ", ".join(f"{number} in {stage.upper()}" for stage, number in numbers.items())


def _outcomes(folders: Mapping[str, Sequence[TestRun]]) -> Iterator[str]:
    for folder, tests in folders.items():
        if tests:
            told = [in_words(tests), *(f"failed: {name}" for name in failures(tests))]
            yield f"* `python -m pytest {folder} -m gpu`: {'; '.join(told)}."


def _of_the_passes(data: Data) -> Json:
    accounts = [data.projection, data.large, *([data.narrow] if data.narrow else [])]
    shown = [*accounts, *([data.small] if data.small else [])]
    results = [result for account in accounts for result in account["results"]]
    slowest = min(
        (result["passes"][name] for result in results for name in _PASSES), key=lambda speed: float(speed["of_copy"])
    )
    return {
        "device": data.profile["device"],
        "date": data.profile["date"],
        "versions": ", ".join(f"{name} {version}" for name, version in data.profile["versions"].items()),
        "projection_commands": "\n".join(account["command"] for account in shown),
        "small": _of_small_shards(data.small) if data.small else "",
        "projection": in_markdown(_projection_rows(results)),
        "slowest": slowest["of_copy"],
        "bar": _BAR,
        "smallest": slowest["milliseconds"],
    }


def _of_small_shards(account: Json) -> str:
    """A shard whose passes may be over sooner than the host has launched them."""
    results = account["results"]

    def from_to(values: Sequence[float], form: str) -> str:
        return f"{min(values):{form}} to {max(values):{form}}"

    def milliseconds(name: str, number: Callable[[Sequence[int]], int]) -> str:
        rank = number([result["rank"] for result in results])
        found = [result["passes"][name]["milliseconds"] for result in results if result["rank"] == rank]
        return f"{from_to(found, '.2f')} ms with k {rank}"

    speeds = [result["passes"][name] for result in results for name in _PASSES]
    shares = [speed["of_copy"] for speed in speeds]
    below = sum(share < _BAR for share in shares)
    on_device = [
        speed["device_milliseconds"] / speed["milliseconds"] for speed in speeds if speed.get("device_milliseconds")
    ]
    times = ", ".join(f"{name} {milliseconds(name, min)} and {milliseconds(name, max)}" for name in _PASSES)
    copy = statistics.median(result["passes"]["copy"]["milliseconds"] for result in results)
    return (
        f"\nA shard of {results[0]['elements'] / 1e6:.0f}M elements: {from_to(shares, '.0%')} of a copy, "
        f"{below} of {len(shares)} below the bar. By the host's clock {times}, a copy {copy:.3f} ms: with few rows times "
        "hardly depend on the bytes, which points at what the host takes to launch a pass."
        + (f" The GPU works {from_to(on_device, '.0%')} of these times." if on_device else "")
        + "\n"
    )


def _projection_rows(results: Iterable[Json]) -> list[list[str]]:
    rows = [["elements", "basis", "k", "blocks", "copy", "dots", "", "subtract", "", "both, ms"]]
    for result in results:
        speeds = result["passes"]
        cells = [f"{result['elements']:.0e}".replace("e+0", "e"), result["basis_dtype"], str(result["rank"])]
        cells += [str(result["blocks"]), f"{speeds['copy']['gigabytes_per_second']:.0f} GB/s"]
        for name in _PASSES:
            cells += [f"{speeds[name]['gigabytes_per_second']:.0f} GB/s", f"{speeds[name]['of_copy']:.0%}"]
        rows.append([*cells, f"{sum(speeds[name]['milliseconds'] for name in _PASSES):.2f}"])
    return rows


def _of_steps(data: Data) -> Json:
    first = data.steps[0]
    elements, rank = first["elements of this rank's shard"], first["basis vectors"]
    copy = data.large["results"][0]["passes"]["copy"]["gigabytes_per_second"]
    pass_bytes = (4 + 4 * rank + 8 + 4 * rank) * elements / 1e9
    added = first["milliseconds added to optimizer.step(), quartiles"][1]
    plain = first["peak bytes, plain"]
    return {
        "step_commands": commands(data.steps),
        "parameters": first["parameters"] / 1e9,
        "tensors": first["tensors"],
        **{name: first["arguments"][name] for name in ("micro_batch_size", "seq_length", "accumulate", "rank")},
        "steps": in_markdown(_step_rows(data.steps)),
        "default_rule": gpu_page.DEFAULT_RULE
        + ("" if len(data.steps) > 1 else " It was not measured yet: all here is the paper's."),
        "pass_bytes": pass_bytes,
        "pass_floor": 1e3 * pass_bytes / copy,
        "added": added,
        "grown": first["ogpsa / plain"] - 1,
        "memory": in_markdown(
            [
                ["", "highest", "above a plain step"],
                ["plain", f"{plain / 1e9:.1f} GB", ""],
                *(
                    [name, f"{first[key] / 1e9:.1f} GB", f"{(first[key] - plain) / elements:.1f} B"]
                    for name, key in (("projected", "peak bytes, ogpsa"), ("a refresh", "peak bytes, refresh"))
                ),
            ]
        ),
        "copies": first["bytes of the authors' copies"] / elements,
        "basis": first["bytes of the basis"] / 1e9,
    }


def _step_rows(steps: Iterable[Json]) -> list[list[str]]:
    rows = [
        [
            "space",
            "mode",
            "plain step",
            "OGPSA / plain",
            "authors / plain",
            "optimizer.step()",
            "collectives",
            "beside passes",
        ]
    ]
    for one in steps:
        names = ("plain", "ogpsa")
        milliseconds = " → ".join(f"{one[f'milliseconds of optimizer.step(), {name}']:.1f}" for name in names)
        rows.append(
            [
                one["arguments"]["space"],
                one["arguments"]["mode"],
                f"{one['seconds of a plain step']:.3f} s",
                f"{one['ogpsa / plain']:.3f}",
                f"{one['authors / plain']:.2f}" if "authors / plain" in one else "–",
                f"{milliseconds} ms",
                " → ".join(str(one[f"collectives of a step, {name}"]) for name in names),
                f"{one['refresh: share beside its passes']:.1%} of a refresh, "
                f"{one['refresh: milliseconds beside its passes']:.0f} ms",
            ]
        )
    return rows


def _of_the_profile(data: Data) -> Json:
    account = data.profile
    settings = account["settings"]
    beside, host = settings[profile.BESIDE], settings[profile.FP32_ON_HOST]
    copies, projection = (host[f"milliseconds of {kind}"] for kind in (profile.COPIES, profile.PROJECTION))
    return {
        "profile_command": account["command"],
        "recorded": account["steps"],
        "profile": in_markdown(_profile_rows(settings)),
        "kernels": settings[profile.PLAIN]["kernels"],
        "beside_kernels": beside["kernels of the projection"],
        "beside_ms": beside[f"milliseconds of {profile.PROJECTION}"],
        "profile_grown": beside["milliseconds"] - settings[profile.PLAIN]["milliseconds"],
        "host_gbs": len(_PASSES) * data.steps[0]["bytes of the basis"] / copies / 1e6,
        "copied": copies,
        "hidden": host["milliseconds of copies beside kernels"],
        "bus_ratio": copies / projection,
    }


def _profile_rows(settings: Mapping[str, Json]) -> list[list[str]]:
    kinds = (profile.PRODUCTS, profile.OTHER, profile.OPTIMIZER, profile.PROJECTION, profile.COPIES)
    rows = [["", "step", *kinds, "copies beside kernels", "idle", "waits of the host"]]
    for name, own in settings.items():
        figures = [own["milliseconds"], *(own[f"milliseconds of {kind}"] for kind in kinds)]
        figures += [own["milliseconds of copies beside kernels"], own["milliseconds idle"], own["waits of the host"]]
        rows.append([name, *(f"{figure:.1f}" for figure in figures)])
    return rows


def plot(account: Json, path: Path) -> None:
    """The last step of each setting: when the GPU did what."""
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    settings = account["settings"]
    for axes, (name, own) in zip(figure.subplots(len(settings), 1, sharex=True), settings.items(), strict=True):
        for kind, colour in _COLOURS.items():
            row = 0 if kind == profile.COPIES else 1
            bars = [(start, stop - start) for start, stop in own["timeline"][kind]]
            axes.broken_barh(bars, (row - 0.4, 0.8), color=colour, label=kind)
        axes.set_yticks([0, 1], ["copies", "kernels"])
        axes.set_title(name, loc="left", fontsize="medium")
    axes.set_xlabel(f"milliseconds ({account['device']})")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(_COLOURS))
    figure.savefig(path, dpi=_DPI)


def main(argv: list[str] | None = None) -> int:
    """Write ``FOLDER.md`` and the plot in ``FOLDER``."""
    parser = argparse.ArgumentParser(prog="python -m megatron_ogpsa.benchmarks.gpu_report")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args(argv).folder
    try:
        data = Data.of(folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    plot(data.profile, folder / "profile.png")
    folder.with_suffix(".md").write_text(as_markdown(data), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
