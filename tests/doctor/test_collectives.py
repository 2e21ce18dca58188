"""The ranks' connections: what is told of ranks that do not answer, fail or add up wrongly, and real processes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_ogpsa.cli.main import main
from megatron_ogpsa.doctor import machine, probe, ranks
from megatron_ogpsa.doctor.collectives import limit, watch
from megatron_ogpsa.doctor.findings import Finding
from megatron_ogpsa.doctor.layout import layout_of
from megatron_ogpsa.doctor.ranks import LocalRanks
from megatron_ogpsa.doctor.steps import Layout
from megatron_ogpsa.integration.arguments.parser import parse_flags
from megatron_ogpsa.planning.arguments import mesh_of
from tests.doctor.conftest import ROOT

TIMEOUT = 10.0
"""Seconds for an all-reduce of processes that have nothing else to do."""


class Store(dict[str, str]):
    """In place of torch's."""

    def check(self, keys: list[str], /) -> bool:
        return all(key in self for key in keys)

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        return [self[key].encode() for key in keys]


def answers(layout: Layout) -> Store:
    """What sound ranks on two hosts tell."""
    store = Store()
    for step in layout.steps:
        for rank in range(layout.world):
            store[f"{step}/begun/{rank}"] = ""
            store[f"{step}/ended/{rank}"] = f"host{rank % 2}" if step == "start" else "ok"
    return store


@dataclass(frozen=True)
class Case:
    """What differs from sound answers (None: it is never told), and the line about it."""

    told: dict[str, str | None]
    name: str
    words: str
    remedy: str


CASES = {
    "never came": Case(
        {"start/begun/1": None, "start/ended/1": None},
        "start",
        "rank 1 did not answer within 0 s",
        "MASTER_ADDR:MASTER_PORT",
    ),
    "never answers": Case(
        {"tensor/begun/3": None, "tensor/ended/3": None, "tensor/ended/2": None},
        "all-reduce tensor",
        "rank 3 on host1 did not answer within 0 s; rank 2 waits",
        "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME",
    ),
    "no connection": Case(
        {"pipeline/ended/0": None, "pipeline/ended/2": None},
        "all-reduce pipeline",
        "ranks 0 on host0, 2 on host0 began it and did not end",
        "NCCL_DEBUG=INFO",
    ),
    "failed": Case(
        {"groups/ended/2": None, "failed/2": "RuntimeError: no"},
        "groups",
        "rank 2 on host0 failed: RuntimeError: no",
        "see whether",
    ),
    "wrong sum": Case(
        {"all ranks/ended/1": "the sum is 3 in place of 10"},
        "all-reduce all ranks",
        "rank 1 on host1: the sum is 3 in place of 10",
        "other jobs use the same ports",
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_rank_at_fault_is_named_and_what_follows_is_not_tried(case: Case) -> None:
    layout = Layout(world=4, tensor=2, pipeline=2)
    store = answers(layout)
    for key, text in case.told.items():
        store.pop(key, None)
        store |= {} if text is None else {key: text}
    found = list(watch(store, layout, timeout=0, start_seconds=0))
    place = [finding.name for finding in found].index(case.name)
    assert [f.level for f in found] == ["OK"] * place + ["FAIL"] + ["WARN"] * (len(found) - place - 1)
    assert case.words in found[place].value
    assert case.remedy in found[place].remedy
    assert all(f.remedy == f"mend first: {case.name}" for f in found[place + 1 :])


def test_each_axis_that_is_split_is_tried() -> None:
    layout = Layout(world=16, tensor=2, pipeline=2, context=2, expert=4)
    found = list(watch(answers(layout), layout, timeout=0))
    assert [f.name.removeprefix("all-reduce ") for f in found] == [
        "start", "all ranks", "groups", "tensor", "pipeline", "context", "data", "expert",
    ]  # fmt: skip
    assert found[-1].value == "4 groups of 4, the sum is right"
    assert {f.level for f in found} == {"OK"}


def test_what_a_step_may_take_grows_with_its_ranks_and_the_timeout() -> None:
    """NCCL connects a group when it is first used, which is in the step's all-reduce."""
    small, large = Layout(world=8, tensor=8), Layout(world=1024, tensor=8)
    assert limit("all ranks", small, 30) == pytest.approx(30.8)
    assert limit("all ranks", large, 30) == pytest.approx(132.4)
    assert limit("tensor", large, 30) == pytest.approx(30.8)
    assert limit("start", large, 30) == limit("groups", large, 30) == pytest.approx(402.4)
    assert limit("start", large, 600) == pytest.approx(702.4)


@pytest.mark.parametrize(("flags", "has_gloo"), [([], True), (["--disable-gloo-process-groups"], False)])
def test_groups_of_gloo_are_built_where_training_builds_them(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], has_gloo: bool
) -> None:
    args = parse_flags(flags)
    built: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        "megatron.core.parallel_state.initialize_model_parallel",
        lambda *sizes, create_gloo_process_groups, **others: built.append(create_gloo_process_groups),
    )
    probe._build_groups(layout_of(args, mesh_of(args, 8)))
    assert built == [has_gloo]


def troubled(trouble: str, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    monkeypatch.setattr(ranks, "PROBE_MODULE", "tests.doctor.troubled_probe")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TROUBLE", trouble)
    return list(LocalRanks(timeout=TIMEOUT).findings(layout))


def test_a_stopped_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = troubled("1 tensor stops", Layout(world=2, tensor=2), monkeypatch)
    assert [(f.name, f.level) for f in found[:3]] == [("start", "OK"), ("all-reduce all ranks", "OK"), ("groups", "OK")]
    assert [(f.name, f.level) for f in found[3:]] == [("all-reduce tensor", "FAIL")]
    assert found[3].value.startswith("rank 1 did not answer within 10 s; rank 0 wait")
    assert "see whether that process is stopped" in found[3].remedy


def test_a_process_that_ends_is_told_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    start, after = troubled("0 start crashes", Layout(world=2), monkeypatch)[:2]
    assert (start.name, start.level) == ("start", "FAIL")
    assert start.value == "rank 0 failed: ended with exit code 3: its libraries are broken"
    assert after.value == "not tried after the failure of: start"


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for more ranks than there may be GPUs")
def test_the_command_ends_with_an_all_reduce_for_each_axis(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(machine, "available_memory", lambda: 10**12)
    code = main(["doctor", str(ROOT / "configs/example/sft.yaml"), "--json", "--timeout", "60"])
    report = json.loads(capsys.readouterr().out)
    assert report["exit_code"] == code == 1
    assert [(f["name"], f["level"]) for f in report["findings"]][-5:] == [
        ("start", "OK"),
        ("all-reduce all ranks", "OK"),
        ("groups", "OK"),
        ("all-reduce tensor", "OK"),
        ("all-reduce pipeline", "OK"),
    ]
    assert report["findings"][-1]["value"] == "2 groups of 2, the sum is right"
    assert {"name", "level", "value", "remedy", "section"} == set(report["findings"][0])


@pytest.mark.parametrize("seconds", ["-5", "0", "nan", "inf", "soon"])
def test_a_timeout_that_no_connection_can_keep_is_refused(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--timeout", seconds])
    assert ended.value.code == 2
    assert f"'{seconds}' is not a number of seconds above 0" in capsys.readouterr().err
