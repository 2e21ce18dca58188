"""Which FP8 is refused at start, by the flag's name: what needs no GPU, and what the GPU or Transformer Engine lacks."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ogpsa.errors import UnsupportedError, UserError
from megatron_ogpsa.precision.fp8_support import (
    MODULE_METHODS,
    check_fp8_available,
    check_fp8_flags,
    check_fp8_modules,
)
from tests.precision import stand_in

OLD_GPU = "Device compute capability 8.9 or higher required for FP8 execution."
NO_MXFP8 = "Device compute capability 10.0 or higher required for MXFP8 execution."


def arguments(**changes: Any) -> argparse.Namespace:
    """Megatron's, as far as the checks read them."""
    plain: dict[str, Any] = {
        "fp8": "hybrid",
        "fp8_recipe": "delayed",
        "fp8_param_gather": False,
        "use_transformer_engine_op_fuser": False,
        "reuse_grad_buf_for_mxfp8_param_ag": False,
        "overlap_param_gather": True,
        "use_precision_aware_optimizer": False,
        "main_params_dtype": "fp32",
        "seq_length": 2048,
        "micro_batch_size": 1,
        "context_parallel_size": 1,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
    }
    return argparse.Namespace(**(plain | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fp8_recipe": "custom"}, "--fp8-recipe custom in FP8 with --ogpsa-reference is not supported"),
        ({"use_transformer_engine_op_fuser": True}, "--use-transformer-engine-op-fuser in FP8"),
        (
            {"fp8_recipe": "mxfp8", "reuse_grad_buf_for_mxfp8_param_ag": True},
            "--reuse-grad-buf-for-mxfp8-param-ag with --overlap-param-gather in FP8",
        ),
        (
            {
                "fp8_recipe": "tensorwise",
                "fp8_param_gather": True,
                "use_precision_aware_optimizer": True,
                "main_params_dtype": "fp16",
            },
            "--main-params-dtype and --fp8-param-gather with --fp8-recipe tensorwise",
        ),
        ({"seq_length": 100}, "--seq-length 100 with --micro-batch-size 1 gives a rank 50 tokens: .* multiples of 16"),
        ({"fp8_recipe": "mxfp8", "seq_length": 2080}, ".* multiples of 32"),
    ],
)
def test_flags_are_refused_by_name_in_fp8_only(changes: dict[str, Any], words: str) -> None:
    check_fp8_flags(arguments())
    check_fp8_flags(arguments(**changes, fp8=None) if "seq_length" not in changes else arguments(fp8=None))
    with pytest.raises(UserError, match=f"^{words}"):
        check_fp8_flags(arguments(**changes))


@pytest.fixture
def transformer_engine() -> Iterator[type[stand_in.FP8GlobalStateManager]]:
    """Of the stand-in, whose ``answers`` say what the GPU can."""
    with stand_in.installed():
        yield stand_in.FP8GlobalStateManager


@pytest.mark.parametrize(
    ("recipe", "answers", "words"),
    [
        ("delayed", {}, None),
        ("mxfp8", {}, None),
        (
            "mxfp8",
            {"mxfp8": (False, NO_MXFP8)},
            r"--fp8-recipe mxfp8: this GPU cannot \(Device compute capability 10.0 .* MXFP8 execution\); "
            "use --fp8-recipe delayed or tensorwise or blockwise",
        ),
        (
            "tensorwise",
            dict.fromkeys(("fp8", "blockwise", "mxfp8"), (False, OLD_GPU)),
            r"--fp8-recipe tensorwise: this GPU cannot \(.*8.9.*\); leave --fp8-format out and train in --bf16",
        ),
    ],
)
def test_the_gpu_is_asked_in_transformer_engines_words(
    transformer_engine: type[stand_in.FP8GlobalStateManager],
    recipe: str,
    answers: dict[str, tuple[bool, str]],
    words: str | None,
) -> None:
    transformer_engine.answers = answers
    if words is None:
        check_fp8_available(arguments(fp8_recipe=recipe))
        return
    with pytest.raises(UserError, match=f"^{words}$"):
        check_fp8_available(arguments(fp8_recipe=recipe))


def test_another_transformer_engine_is_refused_by_what_it_lacks(
    transformer_engine: type[stand_in.FP8GlobalStateManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_fp8_modules([SimpleNamespace(fp8_meta={}, _fp8_workspaces={})])
    with pytest.raises(UnsupportedError, match=r"no SimpleNamespace\._fp8_workspaces, so that reference passes would"):
        check_fp8_modules([SimpleNamespace(fp8_meta={})])
    monkeypatch.delattr(stand_in.TransformerEngineBaseModule, MODULE_METHODS[1])
    with pytest.raises(UnsupportedError, match=r"TransformerEngineBaseModule\.reset_fp8_meta_tensors"):
        check_fp8_available(arguments())


def test_a_missing_transformer_engine_is_told() -> None:
    check_fp8_available(arguments(fp8=None))
    with pytest.raises(
        UserError, match=r"^--fp8-format needs Transformer Engine, which cannot be imported .*: pip install"
    ):
        check_fp8_available(arguments())
