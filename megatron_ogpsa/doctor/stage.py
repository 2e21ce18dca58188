"""The checks of one run of Megatron: its flags, its layout, what it reads and where it goes on."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ogpsa.doctor.findings import Check, Finding, Report, fail, ok
from megatron_ogpsa.doctor.world import World
from megatron_ogpsa.errors import UserError

if TYPE_CHECKING:
    from megatron_ogpsa.data import ChatTokenizer
    from megatron_ogpsa.doctor.disk import Saving
    from megatron_ogpsa.doctor.steps import Layout

LAYOUT, MEGATRON = "layout", "Megatron"

FlagsOf = Callable[[argparse.ArgumentParser], list[str]]
"""From the parser of all flags that a configuration may name to the flags of one run."""


class Stage:
    """Checks that build on each other: each keeps what the later ones need.

    Attributes:
        saving: what the run will write; None if that is not known, or nothing.
        is_measured: whether it is known.
        layout: of its ranks; None if it is not possible.
    """

    saving: Saving | None = None
    layout: Layout | None = None
    is_measured = False

    def __init__(
        self, flags_of: FlagsOf, world: World, *, generation: int | None, previous: Path | None = None
    ) -> None:
        """See the class.

        Args:
            generation: major compute capability of the GPUs; None without one.
            previous: of a pipeline's later stage, where the one before it saves.
        """
        self._flags_of = flags_of
        self._world = world
        self._generation = generation
        self._previous = previous
        self._flags: list[str]
        self._early: argparse.Namespace
        self._args: argparse.Namespace
        self._tokenizer: ChatTokenizer
        self._ranks = self._data = 1

    def examine(self, report: Report) -> None:
        """Make all checks; a finding for each."""
        report.examine("flags", self._parse, needs=("torch", "megatron-core"))
        report.examine(LAYOUT, self._lay_out, needs=("flags",))
        report.examine("variables", self._look_at_variables, needs=("flags",))
        report.examine(MEGATRON, self._validate, needs=("flags", LAYOUT))
        if self._generation is not None and report.is_sound(MEGATRON) and self._args.fp8:
            report.examine("FP8", self._look_at_fp8)
        report.examine("projection", self._project, needs=(MEGATRON,))
        report.examine("tokenizer", self._tokenize, needs=("flags", "libraries"))
        for name, check in self._sources() if report.is_sound("flags") else ():
            report.examine(name, check, needs=("tokenizer",))
        report.examine("checkpoints", self._look_at_checkpoints, needs=("flags",))
        report.examine("model", self._measure, needs=(MEGATRON, "tokenizer"))

    def _parse(self) -> Finding:
        from megatron_ogpsa.integration.arguments.parser import build_parser, parse_flags

        self._flags = self._flags_of(build_parser())
        self._early = parse_flags(self._flags)
        named = sum(flag.startswith("--") for flag in self._flags)
        return ok("flags", f"{named} flags, all known")

    def _lay_out(self) -> Iterator[Finding]:
        from megatron_ogpsa.doctor.layout import check_layout, layout_of, least_world
        from megatron_ogpsa.planning.arguments import dimensions, mesh_of

        least = least_world(self._early)
        self._ranks = self._world.of_layout(least)
        mesh = mesh_of(self._early, self._ranks)
        self._data = max(mesh.data, 1)
        found = list(check_layout(dimensions(self._early), mesh, is_known=self._world.size is not None or least == 1))
        if all(finding.level != "FAIL" for finding in found):
            self.layout = layout_of(self._early, mesh)
        yield from found

    def _look_at_variables(self) -> Iterator[Finding]:
        from megatron_ogpsa.doctor.machine import check_connections, check_determinism

        tensor, context = self._early.tensor_model_parallel_size, self._early.context_parallel_size
        yield from check_connections(self._generation, tensor=tensor, context=context)
        if self._early.deterministic_mode:
            yield check_determinism()

    def _validate(self) -> Iterator[Finding]:
        from megatron_ogpsa.doctor.environment import installed_version
        from megatron_ogpsa.integration.arguments.cpu import check_supported_on_cpu
        from megatron_ogpsa.integration.arguments.loop import check_before_validation, require_flags
        from megatron_ogpsa.planning.arguments import megatron_arguments

        if self._generation is None:
            check_supported_on_cpu(self._early)
        check_before_validation(self._early)
        require_flags(self._early, for_training=True)
        try:
            self._args = megatron_arguments(self._flags, self._ranks)
        except UserError as error:
            yield fail(MEGATRON, str(error), "change the flag, or set the variable, that Megatron names")
            return
        yield ok(MEGATRON, f"accepts the flags on {_ranks(self._ranks)}")
        if self._args.transformer_impl == "transformer_engine" and installed_version("transformer-engine") is None:
            text = "--transformer-impl transformer_engine, and Transformer Engine is not installed"
            yield fail("layers of", text, "pip install 'transformer-engine[pytorch]', or use --transformer-impl local")

    def _look_at_fp8(self) -> Finding:
        from megatron_ogpsa.precision.fp8_support import check_fp8_available

        check_fp8_available(self._args)
        return ok("FP8", f"--fp8-recipe {self._args.fp8_recipe}: Transformer Engine and this GPU have it")

    def _project(self) -> Finding:
        from megatron_ogpsa.integration.arguments.projection import check_projection_arguments
        from megatron_ogpsa.integration.arguments.stage import check_arguments
        from megatron_ogpsa.integration.projection.schedule import schedule_from_arguments

        args = self._args
        check_arguments(args)
        check_projection_arguments(args)
        if not args.ogpsa_reference:
            return ok("projection", f"{args.ogpsa_stage} without --ogpsa-reference: nothing is protected")
        names = ", ".join(name for name, _ in args.ogpsa_reference)
        return ok(
            "projection",
            f"{args.ogpsa_stage} with {names} protected, by {args.ogpsa_granularity}, in {args.ogpsa_space} space, "
            f"{schedule_from_arguments(args)}",
        )

    def _tokenize(self) -> Finding:
        from megatron_ogpsa.doctor.inputs import check_tokenizer, load_tokenizer

        args = self._early
        self._tokenizer = load_tokenizer(args.tokenizer_type, args.tokenizer_model, args.chat_template)
        return check_tokenizer(self._tokenizer, rows=args.padded_vocab_size or args.vocab_size)

    def _sources(self) -> Iterator[tuple[str, Check]]:
        """Name of each source that the run reads, and its check."""
        from megatron_ogpsa.doctor.inputs import Kind, check_data
        from megatron_ogpsa.integration.projection.reference_data import loss_of_reference

        args = self._early

        def check(name: str, source: str, kind: Kind, needed: int, most: int | None = None) -> tuple[str, Check]:
            return name, lambda: check_data(
                name,
                source,
                self._tokenizer,
                kind=kind,
                seq_length=args.seq_length,
                packing=args.ogpsa_packing,
                needed=needed,
                most=most,
            )

        kind: Kind = "preference" if args.ogpsa_stage == "dpo" else "chat"
        if args.ogpsa_train_data:
            yield check("training data", args.ogpsa_train_data, kind, args.micro_batch_size * self._data)
        if args.ogpsa_valid_data:
            rows = args.eval_micro_batch_size or args.micro_batch_size
            yield check("validation data", args.ogpsa_valid_data, kind, rows * self._data)
        for name, source in args.ogpsa_reference:
            kind = "chat" if loss_of_reference(args, name) == "nll" else "preference"
            parts = args.ogpsa_rank_per_reference
            yield check(f"reference {name}", source, kind, parts, args.ogpsa_reference_samples)

    def _look_at_checkpoints(self) -> Iterator[Finding]:
        from megatron_ogpsa.doctor.checkpoints import check_checkpoints

        args = self._early
        return check_checkpoints(
            load=args.load,
            save=args.save,
            pretrained=args.pretrained_checkpoint,
            step=args.ckpt_step,
            previous=self._previous,
            may_be_older=not args.finetune,
        )

    def _measure(self) -> Iterator[Finding]:
        from megatron_ogpsa.doctor import disk, machine
        from megatron_ogpsa.doctor.gpu import visible_gpus

        vocabulary = self._tokenizer.vocab_size
        elements = disk.elements_of(self._args, vocabulary)
        self.saving, self.is_measured = disk.saving_of(self._args, elements), True
        yield ok("model", f"about {_shown(elements)} parameters")
        of_experts, on_gpu = disk.expert_elements_of(self._args, vocabulary), self._generation is not None
        needed = disk.training_bytes(self._args, elements, of_experts, on_gpu=on_gpu)
        if self._generation is None:
            yield machine.check_model_memory(machine.available_memory(), needed)
        elif gpus := visible_gpus():
            yield machine.check_gpu_memory(min(gpu.total for gpu in gpus), needed // self._ranks)


def _ranks(number: int) -> str:
    return f"{number} rank{'s' * (number > 1)}"


def _shown(number: int) -> str:
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:,}"
