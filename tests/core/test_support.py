"""What is refused, by which name, and with which remedy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ogpsa.config import OGPSAConfig
from megatron_ogpsa.errors import UnsupportedError, UserError
from tests.harness import WorkerGroup


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("granularity", "layer"),
        ("mode", "threshold"),
        ("basis_dtype", "fp8"),
        ("basis_device", "disk"),
        ("space", "weights"),
        ("refresh_interval", 0),
        ("rank_tolerance", 1.0),
    ],
)
def test_config_names_the_field_that_is_wrong(field: str, value: object) -> None:
    with pytest.raises(UserError, match=f"^{field}="):
        OGPSAConfig(**{field: value})  # type: ignore[arg-type]


@pytest.fixture
def arguments() -> Callable[..., argparse.Namespace]:
    """Megatron's arguments as they are parsed, with one reference: nothing unusual."""
    from megatron_ogpsa.integration.arguments.parser import parse_flags

    plain = parse_flags(["--ogpsa-reference", "math=math.jsonl", "--micro-batch-size", "4"])
    # As they are without a GPU, on any machine.
    plain.transformer_impl, plain.masked_softmax_fusion = "local", False

    def changed(**changes: Any) -> argparse.Namespace:
        assert changes.keys() <= vars(plain).keys()
        return argparse.Namespace(**vars(plain) | changes)

    return changed


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"fp4": "e2m1"}, "--fp4-format"),
        ({"te_precision_config_file": "layers.yaml"}, "--te-precision-config-file"),
        ({"context_parallel_size": 2, "ogpsa_reference_loss": [(None, "nll_pair")]}, "--context-parallel-size"),
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp"),
        ({"use_torch_fsdp2": True}, "--use-torch-fsdp2"),
        ({"optimizer": "muon"}, "--optimizer muon"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl"),
        ({"optimizer_cuda_graph": True}, "--optimizer-cuda-graph"),
        (
            {"optimizer": "sgd", "use_distributed_optimizer": True},
            "--optimizer sgd with --use-distributed-optimizer",
        ),
        ({"perform_rl_step": True}, "--perform-rl-step"),
        ({"optimizer_cpu_offload": True}, "--optimizer-cpu-offload"),
        ({"use_precision_aware_optimizer": True}, "--use-precision-aware-optimizer"),
        ({"qk_clip": True}, "--qk-clip"),
        ({"moe_single_grouped_weight": True}, "--moe-single-grouped-weight"),
        ({"moe_paged_stash": True}, "--moe-paged-stash"),
        ({"hybrid_context_parallel": True}, "--hybrid-context-parallel"),
        ({"fine_grained_activation_offloading": True}, "--fine-grained-activation-offloading"),
        ({"overlap_moe_expert_parallel_comm": True}, "--overlap-moe-expert-parallel-comm"),
        ({"multi_latent_attention": True, "tensor_model_parallel_size": 2}, "--multi-latent-attention"),
        (
            {"experimental_attention_variant": "gated_delta_net", "tensor_model_parallel_size": 2},
            "--experimental-attention-variant gated_delta_net",
        ),
        ({"moe_single_grouped_bias": True}, "--moe-single-grouped-bias"),
        ({"tensor_parallel_num_weight_shards": 2}, "--tensor-parallel-num-weight-shards or .+"),
        ({"expert_tensor_parallel_num_weight_shards": 2}, ".+ or --expert-tensor-parallel-num-weight-shards"),
        ({"context_parallel_size": 2, "ogpsa_packing": True}, "--context-parallel-size with --ogpsa-packing"),
    ],
)
def test_unsupported_flags_are_refused_by_name_with_references_only(
    arguments: Callable[..., argparse.Namespace], change: dict[str, Any], flag: str
) -> None:
    from megatron_ogpsa.integration.arguments.projection import check_projection_arguments

    check_projection_arguments(arguments())
    check_projection_arguments(arguments(**change, ogpsa_reference=[]))
    with pytest.raises(UnsupportedError, match=f"^{flag} with --ogpsa-reference is not supported: .+; .+"):
        check_projection_arguments(arguments(**change))


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("optimizer_cpu_offload", True, "--optimizer-cpu-offload"),
        ("grad_norm_skip_threshold", 10.0, "grad_norm_skip_threshold"),
    ],
)
def test_what_updates_cannot_do_with_is_refused_by_a_loop_of_ones_own(name: str, value: Any, told: str) -> None:
    from megatron.core.optimizer import OptimizerConfig

    from megatron_ogpsa.plugin.limits import OPTIMIZERS_OF_UPDATES, SKIPPED_STEPS
    from megatron_ogpsa.refusal import refuse

    config = OptimizerConfig()
    refuse((*OPTIMIZERS_OF_UPDATES, SKIPPED_STEPS), config, " with --ogpsa-space update")
    setattr(config, name, value)
    with pytest.raises(UnsupportedError, match=f"^{told} with --ogpsa-space update: .+, or use --ogpsa-space gradient"):
        refuse((*OPTIMIZERS_OF_UPDATES, SKIPPED_STEPS), config, " with --ogpsa-space update")


def test_buffers_for_fp8_alone_are_refused_with_references_in_bf16(
    arguments: Callable[..., argparse.Namespace],
) -> None:
    from megatron_ogpsa.integration.arguments.projection import check_projection_arguments

    given = {"ogpsa_references_in_bf16": True, "bf16": True, "tp_comm_overlap": True}
    check_projection_arguments(arguments(**given))
    with pytest.raises(
        UnsupportedError, match=r"^--tp-comm-overlap with --ogpsa-references-in-bf16 and --fp8-format: "
    ):
        check_projection_arguments(arguments(**given, fp8="hybrid"))


PAIRS = {"ogpsa_reference_loss": [(None, "nll_pair")]}
ONE_AT_A_TIME = {"transformer_impl": "transformer_engine", "micro_batch_size": 1, "eval_micro_batch_size": 1}


@pytest.mark.parametrize("rows", [PAIRS, {"ogpsa_packing": True}])
@pytest.mark.parametrize(
    ("change", "flag"),
    [
        (ONE_AT_A_TIME | {"micro_batch_size": 4}, "--micro-batch-size 4 with {}"),
        ({"masked_softmax_fusion": True}, "{} with --transformer-impl local needs --no-masked-softmax-fusion"),
        ({"window_size": (8, 0)}, "{} with --window-size"),
    ],
)
def test_rows_of_references_are_looked_at_as_those_of_training(
    arguments: Callable[..., argparse.Namespace], change: dict[str, Any], flag: str, rows: dict[str, Any]
) -> None:
    """Pairs as references of SFT, and ``--ogpsa-packing`` in a script of one's own, which builds no stage of ours."""
    from megatron_ogpsa.integration.arguments.projection import check_projection_arguments

    check_projection_arguments(arguments(**change))
    check_projection_arguments(arguments(**rows, **ONE_AT_A_TIME))
    check_projection_arguments(arguments(**rows))
    named = "--ogpsa-packing" if "ogpsa_packing" in rows else "--ogpsa-reference-loss nll_pair"
    with pytest.raises((UserError, UnsupportedError), match="^" + flag.format(named)):
        check_projection_arguments(arguments(**rows, **change))


def test_rows_of_validation_are_looked_at_where_they_are_packed(arguments: Callable[..., argparse.Namespace]) -> None:
    """Pairs are references alone, in a stage that validates on conversations."""
    from megatron_ogpsa.integration.arguments.projection import check_projection_arguments

    change = ONE_AT_A_TIME | {"eval_micro_batch_size": 2}
    check_projection_arguments(arguments(**change, **PAIRS))
    with pytest.raises(UserError, match=r"^--eval-micro-batch-size 2 with --ogpsa-packing"):
        check_projection_arguments(arguments(**change, ogpsa_packing=True))


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"ogpsa_stage": "dpo"}, "--ogpsa-stage dpo"),
        ({"ogpsa_packing": True}, "--ogpsa-packing"),
        ({"transformer_impl": "local"}, "--transformer-impl local"),
    ],
)
def test_what_context_parallelism_cannot_split_is_refused_by_name(
    arguments: Callable[..., argparse.Namespace], change: dict[str, Any], flag: str
) -> None:
    from megatron_ogpsa.integration.inputs.context_parallel import check_context_parallel

    plain = {"transformer_impl": "transformer_engine", "context_parallel_size": 2}
    check_context_parallel(arguments(**plain))
    check_context_parallel(arguments(**plain | change | {"context_parallel_size": 1}))
    with pytest.raises(UnsupportedError, match=f"^--context-parallel-size 2 with {flag} is not supported: .+; .+"):
        check_context_parallel(arguments(**plain | change))


TWO = {"ogpsa_reference": [("math", "math.jsonl"), ("code", "code.jsonl")]}


def test_the_papers_refresh_interval_is_the_stages(arguments: Callable[..., argparse.Namespace]) -> None:
    from megatron_ogpsa.integration.arguments.projection import check_projection_arguments

    for stage, given, expected in (("sft", None, 30), ("dpo", None, 5), ("dpo", 7, 7)):
        args = arguments(ogpsa_stage=stage, ogpsa_refresh_interval=given)
        check_projection_arguments(args)
        assert args.ogpsa_refresh_interval == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"ogpsa_early_refreshes": False}, False),
        ({"ogpsa_adaptive_interval": 0.5}, False),
        ({"ogpsa_authors_rule": True}, False),
        ({"ogpsa_authors_leak": True}, False),
        ({"ogpsa_stagger_references": True} | TWO, True),
    ],
)
def test_refreshes_are_early_where_there_is_one_interval_of_ours(
    arguments: Callable[..., argparse.Namespace], change: dict[str, Any], expected: bool
) -> None:
    from megatron_ogpsa.integration.arguments.projection import check_projection_arguments, config_from_arguments

    args = arguments(**change)
    check_projection_arguments(args)
    assert config_from_arguments(args).early_refreshes is expected


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({}, ("update", "conflict")),
        ({"ogpsa_authors_rule": True}, ("gradient", "orthogonal")),
        ({"ogpsa_authors_leak": True}, ("gradient", "orthogonal")),
        ({"ogpsa_space": "gradient", "optimizer_cpu_offload": True}, ("gradient", "conflict")),
        ({"ogpsa_mode": "orthogonal", "ogpsa_rank_per_reference": 9}, ("update", "orthogonal")),
    ],
)
def test_conflicts_are_taken_out_of_updates_unless_the_authors_rule_is_asked_for(
    arguments: Callable[..., argparse.Namespace], change: dict[str, Any], rule: tuple[str, str]
) -> None:
    from megatron_ogpsa.integration.arguments.projection import check_projection_arguments

    args = arguments(**change)
    check_projection_arguments(args)
    assert (args.ogpsa_space, args.ogpsa_mode) == rule


def test_references_in_bf16_of_parameters_in_another_type(arguments: Callable[..., argparse.Namespace]) -> None:
    from megatron_ogpsa.integration.arguments.projection import check_projection_arguments

    check_projection_arguments(arguments(ogpsa_references_in_bf16=True, bf16=True))
    with pytest.raises(UserError, match=r"^--ogpsa-references-in-bf16: .+ with --bf16 only; add it, or leave"):
        check_projection_arguments(arguments(ogpsa_references_in_bf16=True))


def test_the_loss_of_a_reference_that_is_not_there(arguments: Callable[..., argparse.Namespace]) -> None:
    from megatron_ogpsa.integration.arguments.projection import check_projection_arguments

    with pytest.raises(UserError, match=r"^--ogpsa-reference-loss chat=…: no --ogpsa-reference has this name"):
        check_projection_arguments(arguments(ogpsa_reference_loss=[("chat", "nll")]))


def test_more_gradients_than_conflict_mode_solves_for(arguments: Callable[..., argparse.Namespace]) -> None:
    from megatron_ogpsa.integration.arguments.projection import check_projection_arguments

    named = [(name, "x.jsonl") for name in "abc"]
    check_projection_arguments(arguments(ogpsa_reference=named, ogpsa_rank_per_reference=2))
    with pytest.raises(UnsupportedError, match=r"^--ogpsa-mode conflict with 9 reference gradients: .+ up to 8; join"):
        check_projection_arguments(arguments(ogpsa_reference=named, ogpsa_rank_per_reference=3))


def test_two_references_of_one_name_and_a_script_without_our_flags(
    arguments: Callable[..., argparse.Namespace],
) -> None:
    from megatron_ogpsa.integration.arguments.projection import check_projection_arguments

    with pytest.raises(UserError, match="--ogpsa-reference math=… is given twice"):
        check_projection_arguments(arguments(ogpsa_reference=[("math", "a"), ("math", "b")]))
    with pytest.raises(UserError, match=r"extra_args_provider=megatron_ogpsa.add_ogpsa_arguments"):
        check_projection_arguments(argparse.Namespace())


def test_another_megatron_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_ogpsa.plugin import support

    monkeypatch.setattr(support.megatron.core, "__version__", "0.21.0")
    with pytest.raises(UnsupportedError, match=r"megatron-core 0\.21\.0, in .+megatron/core, is not what.*pip install"):
        support.check_supported(SimpleNamespace(), [], OGPSAConfig())  # type: ignore[arg-type]


def test_attach_refuses_what_is_not_a_megatron_model() -> None:
    import torch

    from megatron_ogpsa.plugin.ogpsa import attach

    with pytest.raises(UserError, match=r"attach\(\) got a Linear"):
        attach(SimpleNamespace(), [torch.nn.Linear(2, 2)])  # type: ignore[arg-type]


def test_misuse_of_a_refresh_is_told(distributed: Callable[[int], WorkerGroup]) -> None:
    for messages in distributed(2).run("tests.core.contract_cases:misuse"):
        assert messages == [
            "UnsupportedError: attach(): this optimizer is hooked already; detach() the plugin that holds it first",
            "RuntimeError: capture() outside a refresh: call begin_refresh() first",
            "RuntimeError: finish_refresh() without references: begin_refresh() and capture() come first",
            "RuntimeError: reference 'math' is captured twice in one refresh: give each reference a name of its own",
            "UnsupportedError: --ogpsa-mode conflict with 9 references: it solves for up to 8; join some references "
            "into one, or use mode orthogonal",
            "UnsupportedError: --mtp-num-layers: losses of references would enter those that the log shows; fine-tune "
            "without multi-token prediction",
        ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ogpsa_granularity": "model"}, "--ogpsa-granularity model with --ogpsa-authors-rule: the authors' is tensor"),
        ({"ogpsa_space": "update"}, "--ogpsa-space update with --ogpsa-authors-rule: the authors' is gradient"),
        (
            {"ogpsa_rank_per_reference": 2},
            "--ogpsa-rank-per-reference 2 with --ogpsa-authors-rule: the authors' is one",
        ),
        ({"ogpsa_mode": "conflict"}, "--ogpsa-mode conflict with --ogpsa-authors-rule: the authors' is orthogonal"),
        ({"ogpsa_energy": 0.9}, "--ogpsa-energy 0.9 with --ogpsa-authors-rule: the authors' is 1"),
        ({"ogpsa_adaptive_interval": 0.9}, "--ogpsa-adaptive-interval 0.9 with --ogpsa-authors-rule"),
        ({"ogpsa_early_refreshes": True}, "--ogpsa-early-refreshes with --ogpsa-authors-rule: the authors' is one"),
        ({"ogpsa_refresh_warmup_iters": 8}, "--ogpsa-refresh-warmup-iters with --ogpsa-authors-rule"),
        (
            {"ogpsa_authors_rule": False, "ogpsa_authors_leak": True, "ogpsa_refresh_warmup_iters": 8},
            "--ogpsa-authors-leak with --ogpsa-refresh-warmup-iters: it leaks at multiples of one interval",
        ),
        (
            {"ogpsa_authors_rule": False, "ogpsa_authors_leak": True, "ogpsa_early_refreshes": True},
            "--ogpsa-authors-leak with --ogpsa-early-refreshes: it leaks at multiples of one interval",
        ),
        (
            {"ogpsa_stage": "dpo", "ogpsa_reference_loss": [("math", "nll_chosen")]},
            "--ogpsa-reference-loss nll_chosen with --ogpsa-authors-rule: the authors' is nll_pair",
        ),
        (
            {"ogpsa_reference": [(name, "x.jsonl") for name in "abc"]},
            "3 times --ogpsa-reference with --ogpsa-authors-rule: the authors' is 2 at most",
        ),
        (
            {"ogpsa_authors_leak": True, "calculate_per_token_loss": False},
            "--ogpsa-authors-leak without --calculate-per-token-loss",
        ),
    ],
)
def test_what_is_not_the_authors_is_refused_with_their_rule(
    arguments: Callable[..., argparse.Namespace], change: dict[str, Any], words: str
) -> None:
    from megatron_ogpsa.integration.arguments.projection import check_projection_arguments

    check_projection_arguments(arguments(ogpsa_authors_rule=True, ogpsa_authors_leak=True))
    with pytest.raises(UserError, match=f"^{words}"):
        check_projection_arguments(arguments(**({"ogpsa_authors_rule": True} | change)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ogpsa_stagger_references": True}, "--ogpsa-stagger-references with one --ogpsa-reference"),
        (
            TWO | {"ogpsa_stagger_references": True, "ogpsa_basis_dtype": "bf16"},
            "--ogpsa-stagger-references with --ogpsa-basis-dtype bf16",
        ),
        (
            TWO | {"ogpsa_stagger_references": True, "ogpsa_energy": 0.9, "ogpsa_mode": "orthogonal"},
            "--ogpsa-stagger-references with --ogpsa-energy 0.9",
        ),
        ({"ogpsa_energy": 0.9}, "--ogpsa-energy 0.9 with --ogpsa-mode conflict"),
        (
            {"ogpsa_energy": 0.9, "ogpsa_adaptive_interval": 0.9, "ogpsa_mode": "orthogonal"},
            "--ogpsa-adaptive-interval 0.9 with --ogpsa-energy 0.9",
        ),
        (
            {"ogpsa_refresh_warmup_iters": 8, "ogpsa_adaptive_interval": 0.9},
            "--ogpsa-adaptive-interval 0.9 with --ogpsa-refresh-warmup-iters",
        ),
        (
            {"ogpsa_early_refreshes": True, "ogpsa_adaptive_interval": 0.9},
            "--ogpsa-adaptive-interval 0.9 with --ogpsa-early-refreshes",
        ),
        (
            {"ogpsa_refresh_interval": 1, "ogpsa_adaptive_interval": 0.9},
            "--ogpsa-adaptive-interval 0.9 with --ogpsa-refresh-interval 1",
        ),
        (
            TWO
            | {"ogpsa_stagger_references": True, "ogpsa_refresh_interval": 9, "ogpsa_adaptive_interval": 0.9}
            | {"save": "out", "save_interval": 10},
            "--ogpsa-adaptive-interval 0.9 with --ogpsa-refresh-interval 9 and a checkpoint every 10 steps",
        ),
        (
            {"ogpsa_adaptive_interval": 0.9, "save": "out", "save_interval": 30},
            "--ogpsa-adaptive-interval 0.9 with --ogpsa-refresh-interval 30 and a checkpoint every 30 steps",
        ),
    ],
)
def test_schedules_that_cannot_be_are_refused_with_a_remedy(
    arguments: Callable[..., argparse.Namespace], change: dict[str, Any], words: str
) -> None:
    from megatron_ogpsa.integration.arguments.projection import check_projection_arguments

    check_projection_arguments(arguments(**TWO, ogpsa_stagger_references=True, ogpsa_adaptive_interval=0.9))
    check_projection_arguments(arguments(ogpsa_energy=0.9, ogpsa_adaptive_interval=0.8, ogpsa_mode="orthogonal"))
    with pytest.raises(UserError, match=f"^{words}: .+; "):
        check_projection_arguments(arguments(**change))
