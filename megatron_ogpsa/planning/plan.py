"""A plan: what the projection adds to one run on one cluster, read off simulated ranks."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ogpsa.data.micro_batches import micro_batches_at_once
from megatron_ogpsa.integration.projection.schedule import schedule_from_arguments
from megatron_ogpsa.planning import costs
from megatron_ogpsa.planning.simulation import LocalParameter, SimulatedRank, simulate
from megatron_ogpsa.references.steps import early_refreshes


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Parameters that differ in their layer or expert only.

    Attributes:
        name: with ``*`` for layers and experts.
        elements: of all of them, each element of the model once.
        split: how tensor parallelism splits one.
        spread: where the different ones of a kind lie.
        counted: which copies enter sums over ranks.
    """

    name: str
    elements: int
    split: str
    spread: str
    counted: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the projection adds to a run.

    Attributes:
        stages: sizes of the first data-parallel rank of each pipeline stage; the others hold no more.
        micro_batches: of a step, on each data-parallel rank.
        reference_micro_batches: of each reference, likewise.
        refresh_share: of the time of forward and backward passes, see :func:`megatron_ogpsa.planning.costs.refresh_share`.
        reduction_size: ranks in the all-reduce of a step and of a refresh.
    """

    args: argparse.Namespace
    projection: costs.Projection
    elements: int
    stages: tuple[costs.ShardSize, ...]
    kinds: tuple[Kind, ...]
    micro_batches: int
    reference_micro_batches: tuple[int, ...]
    refresh_share: float
    reduction_size: int

    @property
    def largest(self) -> costs.ShardSize:
        """Of the stage whose rank holds most."""
        return max(self.stages, key=lambda size: (size.elements, size.megatron_bytes))

    def memory(self, basis_bytes: int, *, on_host: bool) -> costs.Memory:
        """Of the largest rank, with another storage of the basis."""
        projection = costs.Projection(**(vars(self.projection) | {"basis_bytes": basis_bytes, "on_host": on_host}))
        return costs.memory(projection, self.largest)

    @property
    def checkpoint_host_bytes(self) -> int:
        """See :func:`megatron_ogpsa.planning.costs.checkpoint_host_bytes`; of the stage that takes most, which another may be
        than the one with the largest shard."""
        args = self.args
        gathers = args.save and args.use_distributed_optimizer and args.dist_ckpt_optim_fully_reshardable
        return max(costs.checkpoint_host_bytes(size, gathers=bool(gathers)) for size in self.stages)

    def as_json(self) -> dict[str, Any]:
        """All figures; bytes and elements are whole numbers."""
        memory = costs.memory(self.projection, self.largest)
        return {
            "ranks": self.args.world_size,
            "parallel": {axis: getattr(self.args, f"{axis}_model_parallel_size") for axis in ("tensor", "pipeline")}
            | {
                "virtual": self.args.virtual_pipeline_model_parallel_size or 1,
                "context": self.args.context_parallel_size,
                "data": self.args.data_parallel_size,
                "expert": self.args.expert_model_parallel_size,
            },
            "elements": self.elements,
            "blocks": self.projection.blocks,
            "references": self.projection.references,
            "megatron_bytes_per_rank": [size.megatron_bytes for size in self.stages],
            "shard_elements_per_rank": [size.elements for size in self.stages],
            "basis_bytes_per_rank": memory.host or memory.accelerator - self.largest.packed * costs.FP32,
            "accelerator_bytes_per_rank": memory.accelerator,
            "host_bytes_per_rank": memory.host,
            "refresh_bytes_per_rank": memory.refresh,
            "checkpoint_host_bytes_per_rank": self.checkpoint_host_bytes,
            "step": {
                "collectives": int(self.projection.of_update),
                "message_bytes": costs.step_message(self.projection),
                "memory_traffic_bytes": costs.step_traffic(self.projection, self.largest),
            },
            "refresh": {
                "collectives": 1,
                "message_bytes": costs.refresh_message(self.projection),
                "micro_batches": list(self.reference_micro_batches),
                "micro_batches_are_at_most": bool(self.args.ogpsa_packing),
                "share_of_passes": self.refresh_share,
            },
            "reduction_ranks": self.reduction_size,
            "kinds": [vars(kind) for kind in self.kinds],
        }


def make_plan(args: argparse.Namespace, progress: Callable[[Sequence[int]], Any] = iter) -> Plan:
    """Simulate one rank of each pipeline stage and add up.

    Args:
        args: of :func:`megatron_ogpsa.planning.arguments.cluster_arguments`.
        progress: wraps the ranks, to show how far it has got.
    """
    ranks = [simulate(args, rank) for rank in progress(first_ranks(args))]
    reduction_size = len(ranks[0].reduction_ranks)
    kinds = _kinds(args, [parameter for rank in ranks for parameter in rank.parameters], reduction_size)
    projection = costs.Projection(
        references=len(args.ogpsa_reference) * args.ogpsa_rank_per_reference,
        basis_bytes=2 if args.ogpsa_basis_dtype == "bf16" else costs.FP32,
        on_host=args.ogpsa_basis_device == "cpu",
        of_update=args.ogpsa_space == "update",
        blocks=_num_blocks(args, ranks),
    )
    micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    virtual = args.virtual_pipeline_model_parallel_size
    reference = costs.reference_micro_batches(
        args.ogpsa_reference_samples,
        args.micro_batch_size,
        args.data_parallel_size,
        multiple=micro_batches_at_once(args) * args.ogpsa_rank_per_reference,
    )
    # Each part of a reference is a pass of its own, with a bubble of its own.
    references = (reference // args.ogpsa_rank_per_reference,) * projection.references
    return Plan(
        args=args,
        projection=projection,
        elements=sum(kind.elements for kind in kinds),
        stages=tuple(rank.size for rank in ranks),
        kinds=kinds,
        micro_batches=micro_batches,
        reference_micro_batches=references,
        refresh_share=costs.refresh_share(
            micro_batches,
            references,
            costs.refresh_interval(shortest_round(args), _save_interval(args), _steps(args), early_steps(args)),
            args.pipeline_model_parallel_size,
            virtual or 1,
            cost=costs.FP8_SPEED if args.fp8 and args.ogpsa_references_in_bf16 else 1.0,
        ),
        reduction_size=reduction_size,
    )


def shortest_round(args: argparse.Namespace) -> int:
    """Steps in which all references are refreshed once, where the interval is as short as it may become."""
    return schedule_from_arguments(args).round  # a run begins with the shortest


def early_steps(args: argparse.Namespace) -> list[int]:
    """Steps of a run's start after which all references are refreshed besides."""
    early, warmup = args.ogpsa_early_refreshes, args.ogpsa_refresh_warmup_iters
    return early_refreshes(args.ogpsa_refresh_interval, early=early, warmup=warmup)


def _steps(args: argparse.Namespace) -> int:
    return int(args.train_iters or args.train_samples // args.global_batch_size)


def _save_interval(args: argparse.Namespace) -> int | None:
    given = [args.save_interval, args.non_persistent_save_interval] if args.save else []
    return min((steps for steps in given if steps), default=None)


def first_ranks(args: argparse.Namespace) -> list[int]:
    """The first rank of each pipeline stage, in Megatron's order of ranks."""
    stages = args.pipeline_model_parallel_size
    if args.use_tp_pp_dp_mapping:
        stride = args.tensor_model_parallel_size * args.context_parallel_size
    else:
        stride = args.world_size // stages
    return [stage * stride for stage in range(stages)]


def _num_blocks(args: argparse.Namespace, ranks: Sequence[SimulatedRank]) -> int:
    """Blocks of the whole model: those of one rank of each stage, with the experts of all expert-parallel ranks."""
    if args.ogpsa_granularity == "model":
        return 1
    parameters = [parameter for rank in ranks for parameter in rank.parameters]
    dense = {block for p in parameters if not p.is_expert for block in p.blocks}
    expert = {block for p in parameters if p.is_expert for block in p.blocks}
    return len(dense) + len(expert) * int(args.expert_model_parallel_size)


def _kinds(args: argparse.Namespace, parameters: Sequence[LocalParameter], reduction_size: int) -> tuple[Kind, ...]:
    found: dict[str, list[LocalParameter]] = {}
    for parameter in parameters:
        found.setdefault(_kind_name(parameter.name), []).append(parameter)
    return tuple(_kind(args, name, members, reduction_size) for name, members in found.items())


def _kind_name(name: str) -> str:
    name = re.sub(r"(layers|local_experts)\.\d+", r"\1.*", name)
    return re.sub(r"(\.experts\.linear_fc[12]\.(?:weight|bias))\d+$", r"\1*", name)


def _kind(args: argparse.Namespace, name: str, members: Sequence[LocalParameter], reduction_size: int) -> Kind:
    first = members[0]
    copies_of_tie = any(member.is_tied_copy for member in members)
    experts = args.expert_model_parallel_size if first.is_expert else 1
    elements = sum(member.numel * member.num_shares for member in members if not member.is_tied_copy) * experts
    where = []
    if ".layers." in name and args.pipeline_model_parallel_size > 1:
        where.append(f"layers over {args.pipeline_model_parallel_size} stages")
    elif args.pipeline_model_parallel_size > 1:
        where.append("first stage, copy on the last" if copies_of_tie else _ends(name))
    if first.is_expert and experts > 1:
        where.append(f"experts over {experts}")
    return Kind(
        name=name,
        elements=elements,
        split=_split(args, first),
        spread="; ".join(where) or "every rank",
        counted=_counted(args, first, copies_of_tie, reduction_size),
    )


def _ends(name: str) -> str:
    return "first stage" if name.startswith("embedding") else "last stage"


def _split(args: argparse.Namespace, parameter: LocalParameter) -> str:
    if parameter.split_dim is not None:
        return f"{('rows', 'columns')[parameter.split_dim]} over {parameter.num_shares}"
    tensor = args.expert_tensor_parallel_size if parameter.is_expert else args.tensor_model_parallel_size
    return f"copies on {tensor}" if tensor > 1 else "whole"


def _counted(args: argparse.Namespace, parameter: LocalParameter, copies_of_tie: bool, reduction_size: int) -> str:
    """Which copies enter the sums; see :mod:`megatron_ogpsa.sharding.ownership`."""
    tensor = args.expert_tensor_parallel_size if parameter.is_expert else args.tensor_model_parallel_size
    stages = args.pipeline_model_parallel_size
    experts = args.expert_model_parallel_size if parameter.is_expert else 1
    copies = args.world_size // (tensor * stages * experts)  # over data and context parallelism
    once = []
    if parameter.num_shares == 1 and tensor > 1:
        once.append("tensor-parallel rank 0")
    if copies_of_tie and stages > 1:
        once.append("the first stage")
    place = " of ".join(once) or "every rank that holds it"
    if args.use_distributed_optimizer:
        shards = copies // args.num_distributed_optimizer_instances
        return f"{place}, {shards} data-parallel shards" if shards > 1 else place
    if copies == 1:
        return place
    one_sum = reduction_size == args.world_size
    return f"{place}, data-parallel rank 0" if one_sum else f"{place}, in each data-parallel copy"
