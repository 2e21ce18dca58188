"""How the ranks are laid out: world size, heads, layers, widths and batch, one finding for each that must come out even."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

from megatron_ogpsa.doctor.findings import Finding, fail, ok, warn
from megatron_ogpsa.doctor.steps import Layout
from megatron_ogpsa.planning.arguments import mesh_of, nearest_in_words
from megatron_ogpsa.planning.layout import Dimensions, Mesh, Subject, problems


def least_world(args: argparse.Namespace) -> int:
    """Ranks that the layout of parsed arguments needs at least."""
    mesh = mesh_of(args, 1)
    return math.lcm(mesh.tensor * mesh.pipeline * mesh.context, mesh.expert_tensor * mesh.expert * mesh.pipeline)


def layout_of(args: argparse.Namespace, mesh: Mesh) -> Layout:
    """What the ranks need to build their groups."""
    return Layout(
        world=mesh.world,
        tensor=mesh.tensor,
        pipeline=mesh.pipeline,
        context=mesh.context,
        expert=mesh.expert,
        expert_tensor=mesh.expert_tensor,
        order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
        gloo=args.use_gloo_process_groups,
    )


def check_layout(model: Dimensions, mesh: Mesh, *, is_known: bool) -> Iterator[Finding]:
    """Whether everything comes out even; what does not has the nearest layout that does as its remedy.

    Args:
        is_known: whether the number of ranks was given, or is the least that the layout needs.
    """
    reasons: dict[Subject, list[str]] = {}
    for found in problems(model, mesh):
        reasons.setdefault(found.subject, []).append(found.reason)
    remedy = nearest_in_words(model, mesh) if reasons else ""
    for subject, description in _described(model, mesh).items():
        if subject in reasons:
            yield fail(subject, "; ".join(reasons[subject]), remedy)
        elif subject == "world size" and not is_known:
            yield warn(
                subject,
                f"nobody says how many ranks there will be; examined for {description}, the fewest of this layout",
                "say --nproc-per-node N, or examine it where it will run, under torchrun on all nodes",
            )
        elif subject != "batch" or "world size" not in reasons:
            yield ok(subject, description)


def _described(model: Dimensions, mesh: Mesh) -> dict[Subject, str]:
    """What is to be said of each subject where it comes out even, of those only that the model has."""
    found: dict[Subject, str] = {
        "world size": f"{mesh.world} = {_axes(mesh)}",
        "attention heads": f"{model.heads} in {model.query_groups} query groups, over tensor {mesh.tensor}",
        "layers": _layers(model, mesh),
        "widths": f"{model.ffn} of the MLP, over tensor {mesh.tensor}",
    }
    if mesh.context > 1:
        found["sequence length"] = f"{model.seq_length} over context {mesh.context}"
    if model.experts or mesh.expert > 1:
        found["experts"] = (
            f"{model.experts} over expert {mesh.expert}, {model.expert_ffn} wide over expert tensor {mesh.expert_tensor}"
        )
    if rows := model.micro_batch * mesh.data:  # none where the ranks are fewer than one copy of the model needs
        total = model.global_batch or rows  # Megatron's default is one micro-batch on each data-parallel rank
        found["batch"] = (
            f"global {total} = micro {model.micro_batch} x data {mesh.data} x {total // rows} micro-batches"
        )
    return found


def _axes(mesh: Mesh) -> str:
    axes = {"tensor": mesh.tensor, "pipeline": mesh.pipeline, "context": mesh.context, "data": mesh.data}
    return " x ".join(f"{name} {size}" for name, size in axes.items() if size > 1 or name == "data")


def _layers(model: Dimensions, mesh: Mesh) -> str:
    over = f"over pipeline {mesh.pipeline}"
    if mesh.virtual > 1:
        over += f" with {mesh.virtual} chunks each"
    return f"{model.layers} {over}" + ("" if model.even_stages else ", split as the flags say")
