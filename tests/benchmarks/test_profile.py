"""What a profile says is what the device did; its page says what the data say."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ogpsa.benchmarks import gpu_report, profile, projection, step, training, trl_training
from megatron_ogpsa.benchmarks.gpu_tests import PASSED
from megatron_ogpsa.errors import UserError

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "gpu"


def event(name: str, start: float, stop: float, category: str = "kernel", stream: int = 7) -> dict[str, Any]:
    """As the profiler exports it: microseconds."""
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": 5e6 + start,
        "dur": stop - start,
        "args": {"stream": stream},
    }


TRACE = {
    "traceEvents": [
        event("sm90_xmma_gemm_bf16", 0, 1000),
        event("void at::native::elementwise_kernel", 1000, 1500),
        event("Memcpy HtoD (Pinned -> Device)", 500, 2500, "gpu_memcpy", 20),
        event("ogpsa_dots", 1600, 2000),
        event("ogpsa_subtract", 2600, 3000),
        event("void multi_tensor_apply_kernel<AdamFunctor>", 3000, 3400),
        event("Memcpy DtoH (Device -> Pinned)", 3400, 3500, "gpu_memcpy"),
        event("nvjet_hsh", 4000, 4000 + 1000),
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize", "ts": 1.0, "dur": 5.0},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 2.0, "dur": 5.0},
        {"cat": "cpu_op", "name": "aten::add", "ts": 3.0, "dur": 5.0},
    ]
}


def test_an_account_adds_up_what_the_device_did() -> None:
    figures = profile.account(TRACE, steps=1)
    assert figures == pytest.approx(
        {
            "milliseconds": 5.0,
            "milliseconds of matrix products": 2.0,
            "milliseconds of other kernels": 0.6,
            "milliseconds of projection": 0.8,
            "milliseconds of optimizer": 0.4,
            "milliseconds of copies from the host": 2.0,
            # 500 to 1500 beside the products and the addition, 1600 to 2000 beside the dots
            "milliseconds of copies beside kernels": 1.4,
            "milliseconds idle": 0.1 + 0.5,
            "kernels": 7.0,
            "kernels of the projection": 2.0,
            "waits of the host": 1.0,
        }
    )
    assert profile.account(TRACE, steps=2)["milliseconds of projection"] == pytest.approx(0.4)


def test_a_timeline_is_of_the_last_step() -> None:
    timeline = profile.timeline(TRACE, steps=2)
    assert timeline[profile.PRODUCTS] == [[1.5, 2.5]]
    assert timeline[profile.PROJECTION] == [[0.1, 0.5]]
    assert timeline[profile.OTHER] == [[0.9, 1.0]]
    assert profile.timeline(TRACE, steps=1)[profile.COPIES] == [[0.5, 2.5]]


def test_what_a_device_works_for_a_pass_is_not_what_launching_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the trace's 5 ms, 0.6 are idle."""
    case = projection.Case(elements=1000, rank=1, blocks=1, basis_dtype="fp32")
    monkeypatch.setattr(profile, "recorded", lambda work, times: TRACE)
    speeds = projection.measure(case, torch.device("cpu"), rounds=1, with_pytorch=False, by_device=True)
    expected = 4.4 / projection.REPEAT_ON_GPU
    assert [speed.device_milliseconds for speed in speeds.values()] == [pytest.approx(expected)] * 4
    speeds = projection.measure(case, torch.device("cpu"), rounds=1, with_pytorch=False)
    assert {speed.device_milliseconds for speed in speeds.values()} == {None}
    assert projection.main(["--device-times", "--device", "cpu"]) == UserError.exit_code
    assert "error: --device-times: cpu has no clock of its own" in capsys.readouterr().err


def test_a_profile_without_a_device_is_told() -> None:
    with pytest.raises(UserError, match="nothing on a GPU"):
        profile.account({"traceEvents": [{"cat": "cpu_op", "name": "aten::add", "ts": 3.0, "dur": 5.0}]}, steps=1)


@pytest.mark.parametrize(
    ("environment", "said"), [({}, "start it with torchrun"), ({"RANK": "0", "WORLD_SIZE": "1"}, "error: no GPU")]
)
def test_a_profile_is_refused_where_there_is_nothing_to_see(
    environment: dict[str, str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert profile.main([]) != 0
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--steps 0", "--transformer-impl transformer_engine"])
def test_a_wrong_flag_is_told_by_its_name(
    flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(step, "find_spec", lambda _: None)
    assert profile.main(flags.split()) != 0
    assert f"error: {flags}: " in capsys.readouterr().err


def test_the_page_is_made_of_its_data() -> None:
    page = gpu_report.as_markdown(gpu_report.Data.of(FOLDER))
    assert page == FOLDER.with_suffix(".md").read_text(encoding="utf-8")


def test_the_pages_commands_are_commands() -> None:
    data = gpu_report.Data.of(FOLDER)
    assert data.small is not None
    for account in (data.projection, data.large, data.small):
        args = projection._parser().parse_args(shlex.split(account["command"])[3:])
        shown = {(result["elements"], result["rank"]) for result in account["results"]}
        assert shown == {(int(elements), rank) for elements in args.elements for rank in args.rank}
    parsers = {
        module.__name__: parser
        for module, parser in ((training, training._parser), (trl_training, trl_training.parser))
    }
    for account in data.training:
        for line in account["command"].splitlines():
            _, _, module, *flags = shlex.split(line)
            assert parsers[module]().parse_args(flags).json is not None
    args = profile._parser().parse_args(shlex.split(data.profile["command"])[5:])
    assert args.steps == data.profile["steps"]
    for line, one in zip(gpu_report.commands(data.steps).splitlines(), data.steps, strict=True):
        made = {name: str(value) for name, value in vars(step.parser().parse_args(shlex.split(line)[5:])).items()}
        assert made | {"json": one["arguments"]["json"]} == one["arguments"]


def test_other_pages_tell_what_the_data_have() -> None:
    data = gpu_report.Data.of(FOLDER)
    readme, numbers = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/numbers.md"))
    paper, default = (f"{one['ogpsa / plain']:.3f}" for one in data.steps)
    authors = f"{data.steps[0]['authors / plain']:.1f}"
    assert f"default rule {default}, the paper's {paper}; the authors' hooks {authors}" in readme
    assert f"| {default}; {paper}; {authors} |" in numbers
    settings = ("plain", "update", "TRL, plain", "TRL, authors")
    for account in data.training:
        stage = account["results"][0]["stage"].upper()
        speeds = {result["setting"]: f"{round(result['tokens per second'], -2):,.0f}" for result in account["results"]}
        rounded = [speeds[name] for name in settings]
        plain, update, trl, authors = rounded
        assert (
            f"{stage}: plain {plain}, default rule {update}, TRL {trl}, TRL with the authors' rule {authors}" in readme
        )
        assert f"{stage} {'; '.join(rounded)}" in numbers
    large, small = (
        [result["passes"][name]["of_copy"] for result in results for name in ("dots", "subtract")]
        for results in ([*data.projection["results"], *data.large["results"]], data.small["results"])  # type: ignore[index]
    )
    shares, of_small = (f"{100 * min(found):.0f} to {100 * max(found):.0f} %" for found in (large, small))
    below = sum(share < 0.8 for share in small)
    assert f"{shares} of a copy's bandwidth" in readme
    assert f"{shares} of its bandwidth; 10M elements {of_small}, {below} of {len(small)} below 80 %" in numbers
    passed = sum(test.outcome == PASSED for test in data.fp8)
    for name, words in (("fp8", f"ran passed, {passed} tests"), ("support", f"{passed} of its tests passed")):
        assert words in (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")
