"""The harness itself: groups are shared, errors are shown, nothing hangs, nothing leaks from job to job."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.harness import JobFailed, WorkerGroup, cases
from tests.harness.preloaded import PROJECT_ROOT, PreloadedCommand

Groups = Callable[[int], WorkerGroup]


@pytest.fixture(scope="module")
def pair(preloaded: PreloadedCommand) -> Iterator[WorkerGroup]:
    """A group of two that is ours to break."""
    group = WorkerGroup(2, preloaded, grace=1.0)
    yield group
    group.close()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(pid: int, seconds: float = 5.0) -> bool:
    limit = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < limit:
        time.sleep(0.05)
    return not is_running(pid)


def test_ranks_communicate_and_return_tensors(pair: WorkerGroup) -> None:
    results = pair.run("tests.harness.cases:rank_and_sum", values=[1.5, 2.0])
    assert [result["rank"] for result in results] == [0, 1]
    for result in results:
        torch.testing.assert_close(result["total"], torch.tensor(3.5, dtype=torch.float64), rtol=0, atol=0)
        assert result["bf16"].dtype == torch.bfloat16


def test_jobs_share_the_processes(distributed: Groups) -> None:
    first = distributed(2).run(cases.rank_and_sum, values=[0.0, 0.0])
    second = distributed(2).run(cases.rank_and_sum, values=[0.0, 0.0])
    assert [result["pid"] for result in first] == [result["pid"] for result in second]
    assert len({result["pid"] for result in first}) == 2


def test_error_shows_the_failing_rank_and_where_the_others_waited(pair: WorkerGroup) -> None:
    started = time.monotonic()
    with pytest.raises(JobFailed) as failure:
        pair.run(cases.fail_on, rank=1, message="the weights are upside down", timeout=100)
    message = str(failure.value)
    assert "rank 1 failed" in message
    assert "ValueError: the weights are upside down" in message
    assert "in fail_on" in message  # its traceback
    assert "rank 0 still ran" in message
    assert "all_reduce" in message  # where rank 0 was
    assert time.monotonic() - started < 60


def test_error_on_all_ranks_is_shown_once(pair: WorkerGroup) -> None:
    with pytest.raises(JobFailed) as failure:
        pair.run(cases.fail_everywhere)
    assert "ranks 0, 1 failed" in str(failure.value)
    assert str(failure.value).count("ValueError: alike everywhere") == 1


def test_hanging_rank_is_killed_at_the_limit_and_the_next_job_works(pair: WorkerGroup) -> None:
    pair.run(cases.rank_and_sum, values=[0.0, 0.0])  # the group is up, so the limit is all that is measured
    old = pair.process_ids
    started = time.monotonic()
    with pytest.raises(JobFailed, match="no answer from ranks 0, 1 in 2 s") as failure:
        pair.run(cases.hang_on, rank=0, timeout=2)
    assert time.monotonic() - started < 12
    assert "in hang_on" in str(failure.value)
    assert all(wait_until_gone(pid) for pid in old)

    results = pair.run(cases.rank_and_sum, values=[1.0, 1.0])
    assert not {result["pid"] for result in results} & set(old)


def test_killed_rank_is_told_with_its_last_words(pair: WorkerGroup) -> None:
    with pytest.raises(JobFailed, match="rank 1 failed") as failure:
        pair.run(cases.crash_on, rank=1)
    assert "SIGKILL" in str(failure.value)
    assert "about to be killed" in str(failure.value)


def test_result_that_needs_pickle_is_refused(pair: WorkerGroup) -> None:
    with pytest.raises(JobFailed, match="failed"):
        pair.run(cases.return_object)


def test_job_must_not_destroy_the_default_group(pair: WorkerGroup) -> None:
    with pytest.raises(JobFailed, match="destroyed the default process group"):
        pair.run(cases.destroy_default_group)


def test_close_ends_the_ranks_and_their_children(preloaded: PreloadedCommand) -> None:
    group = WorkerGroup(1, preloaded)
    children = group.run(cases.leave_child_running)
    ranks = group.process_ids
    assert all(is_running(pid) for pid in [*children, *ranks])
    group.close()
    assert all(wait_until_gone(pid) for pid in [*children, *ranks])
    group.close()  # a second time is fine


def test_ranks_end_when_pytest_is_killed_while_they_are_busy() -> None:
    program = (
        "from tests.harness import WorkerGroup, cases\n"
        "from tests.harness.preloaded import PreloadedCommand\n"
        "group = WorkerGroup(1, PreloadedCommand())\n"
        "group.run(cases.rank_and_sum, values=[0.0])\n"
        "print(*group.process_ids, flush=True)\n"
        "group.run(cases.hang_on, rank=0)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    owner.kill()
    owner.communicate(timeout=10)
    assert len(pids) == 1
    assert wait_until_gone(pids[0])


def test_nothing_leaks_into_the_next_job(pair: WorkerGroup) -> None:
    rounds = [pair.run(cases.initialize_megatron_and_litter, tensor_axis=2 - turn % 2) for turn in range(4)]
    for turn, results in enumerate(rounds):
        for found, before in zip(results, rounds[0], strict=True):
            assert found["tensor_axis"] == 2 - turn % 2
            assert not found["initialized"]
            assert not found["calculator"]
            assert found["generators"] == []
            assert found["environment"] is None
            assert found["dtype"] == "torch.float32"
            assert "--litter" not in found["argv"]
            assert found["draws"] == before["draws"]
    # The first job opens what stays open (libraries, caches); from then on nothing may pile up.
    for index in range(2):
        assert rounds[3][index]["files"] <= rounds[1][index]["files"] + 2
        assert rounds[3][index]["threads"] <= rounds[1][index]["threads"] + 2
