"""One rank of the collectives' check: builds Megatron's process groups and all-reduces one number in each.

``python -m megatron_ogpsa.doctor.probe PROBE`` with RANK, LOCAL_RANK and WORLD_SIZE in the environment, where PROBE is
:class:`~megatron_ogpsa.doctor.steps.Probe` as JSON. It tells of every step in the store when it begins and when it has
ended; whoever watches the store judges, and ends the process when it is stuck. The sum is of whole numbers, so that it is
known exactly.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from megatron_ogpsa.doctor.steps import ALL, GROUPS, PATIENCE, START, Layout, Probe
from megatron_ogpsa.system.processes import end_with_parent


def main(text: str) -> None:
    """Make every step of the probe; a failure is told in the store and ends the process with exit code 1."""
    probe = Probe.from_json(text)
    end_with_parent(probe.parent)
    rank = int(os.environ["RANK"])
    store = TCPStore(probe.host, probe.port, is_master=False, timeout=PATIENCE)
    reports = PrefixStore(f"{probe.prefix}/reports", store)
    try:
        for step, result in _steps(probe, PrefixStore(f"{probe.prefix}/group", store), rank, reports):
            reports.set(f"{step}/ended/{rank}", result)
    except Exception as error:  # every failure is to reach whoever watches
        reports.set(f"failed/{rank}", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        raise
    dist.destroy_process_group()


def _steps(probe: Probe, store: Any, rank: int, reports: Any) -> Iterator[tuple[str, str]]:
    """Each step with what is to be told of it: ``ok``, the host's name for the first, or what is wrong."""
    reports.set(f"{START}/begun/{rank}", "")
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if has_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=probe.layout.world, timeout=PATIENCE)
    yield START, socket.gethostname()
    for step in probe.layout.steps[1:]:
        reports.set(f"{step}/begun/{rank}", "")
        if step == GROUPS:
            _build_groups(probe.layout)
            yield step, "ok"
        else:
            yield step, _all_reduce(None if step == ALL else _group(step), probe.layout.axes.get(step))


def _build_groups(layout: Layout) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        order=layout.order,
        create_gloo_process_groups=layout.gloo and torch.cuda.is_available(),  # training has them for checkpoints
    )


def _group(axis: str) -> Any:
    from megatron.core import parallel_state

    return {
        "tensor": parallel_state.get_tensor_model_parallel_group,
        "pipeline": parallel_state.get_pipeline_model_parallel_group,
        "context": parallel_state.get_context_parallel_group,
        "data": parallel_state.get_data_parallel_group,
        "expert": parallel_state.get_expert_model_parallel_group,
    }[axis]()


def _all_reduce(group: Any, size: int | None) -> str:
    """Add up each rank's number, counted from 1, over ``group``; None is all ranks."""
    ranks = dist.get_process_group_ranks(group)
    if size is not None and len(ranks) != size:
        return f"the group has {len(ranks)} ranks in place of {size}"
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    number = torch.tensor([dist.get_rank() + 1], dtype=torch.int64, device=device)
    dist.all_reduce(number, group=group)
    wanted = sum(rank + 1 for rank in ranks)
    return "ok" if int(number) == wanted else f"the sum over ranks {ranks} is {int(number)} in place of {wanted}"


if __name__ == "__main__":
    main(sys.argv[1])
