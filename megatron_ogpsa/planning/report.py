"""A plan as text."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from megatron_ogpsa.planning import costs
from megatron_ogpsa.planning.plan import Plan, early_steps, shortest_round

STORAGES = (("fp32", 4, False), ("bf16", 2, False), ("fp32", 4, True), ("bf16", 2, True))


def as_text(plan: Plan, *, title: str, bandwidth: float) -> str:
    """The plan for people.

    Args:
        title: what it is a plan of.
        bandwidth: of a rank's memory in GB/s, for the time of the projection at full bandwidth.
    """
    sections = (_run(plan, title), _memory(plan), _step(plan, bandwidth), _refresh(plan), _kinds(plan))
    return "\n\n".join("\n".join(lines) for lines in sections)


def _run(plan: Plan, title: str) -> list[str]:
    args = plan.args
    axes = {
        "tensor": args.tensor_model_parallel_size,
        "pipeline": args.pipeline_model_parallel_size,
        "virtual": args.virtual_pipeline_model_parallel_size or 1,
        "context": args.context_parallel_size,
        "data": args.data_parallel_size,
        "expert": args.expert_model_parallel_size,
    }
    shown = ", ".join(f"{name} {size}" for name, size in axes.items() if size > 1) or "none"
    names = ", ".join(name for name, _ in args.ogpsa_reference)
    blocks = plan.projection.blocks
    return [
        title,
        f"  parallel: {shown}",
        f"  model: {plan.elements:,} trained elements",
        f"  projection: space {args.ogpsa_space}, mode {args.ogpsa_mode}, {_references(plan)} ({names}), "
        f"{blocks:,} block{'s' * (blocks > 1)} by {args.ogpsa_granularity}",
    ]


def _references(plan: Plan) -> str:
    number, rank = len(plan.args.ogpsa_reference), plan.args.ogpsa_rank_per_reference
    return f"{number} reference{'s' * (number > 1)}" + (f" of rank {rank}" if rank > 1 else "")


def _memory(plan: Plan) -> list[str]:
    size = plan.largest
    lines = [
        "memory of the largest rank, without activations",
        f"  Megatron       weights {_gb(size.weight_bytes)}, gradients {_gb(size.gradient_bytes)}, "
        f"optimizer state {_gb(size.state_bytes)}: {_gb(size.megatron_bytes)}",
        f"  OGPSA          {_references(plan)} of {size.elements:,} elements",
    ]
    if host := plan.checkpoint_host_bytes:
        lines.insert(
            2, f"  a checkpoint   {_gb(host)} of host memory on each rank (--dist-ckpt-optim-fully-reshardable)"
        )
    table = [("basis", "where", "GPU", "host", "a refresh adds there")]
    for dtype, bytes_, on_host in STORAGES:
        memory = plan.memory(bytes_, on_host=on_host)
        chosen = (bytes_, on_host) == (plan.projection.basis_bytes, plan.projection.on_host)
        mark = "  <- this file" if chosen else ""
        where = "host" if on_host else "GPU"
        table.append((dtype, where, _gb(memory.accelerator), _gb(memory.host), _gb(memory.refresh) + mark))
    return lines + _table(table)


def _step(plan: Plan, bandwidth: float) -> list[str]:
    traffic = costs.step_traffic(plan.projection, plan.largest)
    message = _kb(costs.step_message(plan.projection))
    collective = (
        f"1 all-reduce more, of {message}"
        if plan.projection.of_update
        else f"none more: {message} in place of Megatron's gradient norm"
    )
    return [
        "each step",
        f"  collectives    {collective}, over {plan.reduction_size} ranks",
        f"  memory         {_gb(traffic)} read and written, {traffic / bandwidth / 1e6:.1f} ms at {bandwidth:,.0f} GB/s",
    ]


def _refresh(plan: Plan) -> list[str]:
    args = plan.args
    total = sum(plan.reference_micro_batches)
    slower = args.fp8 and args.ogpsa_references_in_bf16
    at_most = "at most " if args.ogpsa_packing else ""  # how many samples share a row, their lengths tell
    in_bf16 = f", in bf16, each up to {costs.FP8_SPEED} times the time of one in FP8" if slower else ""
    return [
        f"each refresh, {_interval(args)} and after each checkpoint",
        f"  collectives    1 all-reduce of {_kb(costs.refresh_message(plan.projection))}, beside those of the passes",
        f"  passes         {at_most}{total} micro-batches for {_references(plan)} of "
        f"{args.ogpsa_reference_samples} samples, against {plan.micro_batches} in a step{in_bf16}",
        f"  time           {plan.refresh_share:.1%} of all forward and backward passes at most",
    ]


def _interval(args: argparse.Namespace) -> str:
    longest, shortest = args.ogpsa_refresh_interval, shortest_round(args)
    turns = ", one reference at a time" if args.ogpsa_stagger_references else ""
    warmup, early = args.ogpsa_refresh_warmup_iters, ""
    if warmup > 1:
        early += f", before each of the first {warmup}"
    if later := [step for step in early_steps(args) if step >= warmup]:
        early += f", after step {', '.join(map(str, later))}"
    return (f"every {longest} steps" if shortest >= longest else f"every {shortest} to {longest} steps") + turns + early


def _kinds(plan: Plan) -> list[str]:
    rows: list[tuple[str, ...]] = [("parameter", "elements", "tensor parallelism", "lies on", "counted on")]
    rows += [(kind.name, f"{kind.elements:,}", kind.split, kind.spread, kind.counted) for kind in plan.kinds]
    return ["where each element counts once", *_table(rows, right=(1,))]


def _table(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _gb(number: int) -> str:
    """Decimal gigabytes, with as many digits as tell small models apart."""
    return f"{number / 1e9:.2f} GB" if number >= 1e7 else f"{number / 1e6:.2f} MB"


def _kb(number: int) -> str:
    return f"{number / 1e3:.1f} kB"
