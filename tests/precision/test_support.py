"""Which FP8 is refused at start, by the flag's name: what needs no GPU, and what the GPU or Transformer Engine lacks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_ogpsa.errors import UnsupportedError, UserError
from megatron_ogpsa.precision.fp8_support import (
    ALLOW_PICKLES,
    MODULE_METHODS,
    check_fp8_available,
    check_fp8_flags,
    check_fp8_modules,
    rounding_told,
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
        "load": None,
        "save": None,
        "pretrained_checkpoint": None,
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
        ({"fp8_recipe": "mxfp8", "fp8_param_gather": True}, "--fp8-param-gather with --fp8-recipe mxfp8 in FP8"),
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
    with pytest.raises(
        UnsupportedError, match=r"no SimpleNamespace\._fp8_workspaces, which the recipe or putting back"
    ):
        check_fp8_modules([SimpleNamespace(fp8_meta={})])
    monkeypatch.delattr(stand_in.TransformerEngineBaseModule, MODULE_METHODS[1])
    with pytest.raises(UnsupportedError, match=r"TransformerEngineBaseModule\.reset_fp8_meta_tensors"):
        check_fp8_available(arguments())


def test_only_what_the_recipe_needs_is_asked_for(
    transformer_engine: type[stand_in.FP8GlobalStateManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformer Engine 2.0 to 2.2 have no blockwise recipe."""
    monkeypatch.delattr(stand_in.FP8GlobalStateManager, "is_fp8_block_scaling_available")
    check_fp8_available(arguments())
    with pytest.raises(UnsupportedError, match=r"no FP8GlobalStateManager\.is_fp8_block_scaling_available, .*2\.3"):
        check_fp8_available(arguments(fp8_recipe="blockwise"))


@pytest.mark.usefixtures("transformer_engine")
def test_scales_that_could_not_be_loaded_again_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a Transformer Engine that asks for leave to unpickle; see its ``pytorch/_extra_state.py``."""
    monkeypatch.delenv(ALLOW_PICKLES, raising=False)
    check_fp8_available(arguments(load="run"))  # an older one
    extra_state = ModuleType("transformer_engine.pytorch._extra_state")
    monkeypatch.setitem(sys.modules, extra_state.__name__, extra_state)
    check_fp8_available(arguments())
    check_fp8_available(arguments(load="run", fp8_recipe="tensorwise"))
    words = (
        f"^--fp8-recipe delayed with --save run: .* unless {ALLOW_PICKLES}=1 is set.* --fp8-recipe tensorwise, which"
    )
    with pytest.raises(UserError, match=words):
        check_fp8_available(arguments(save="run"))
    for given, flag in (("load", "--load run"), ("pretrained_checkpoint", "--pretrained-checkpoint run")):
        with pytest.raises(UserError, match=f"{flag}: .* trust those who write there$"):  # another recipe is no way out
            check_fp8_available(arguments(save="run", **{given: "run"}))
    monkeypatch.setenv(ALLOW_PICKLES, "1")
    check_fp8_available(arguments(save="run"))


def test_a_missing_transformer_engine_is_told() -> None:
    check_fp8_available(arguments(fp8=None))
    with pytest.raises(
        UserError, match=r"^--fp8-format needs Transformer Engine, which cannot be imported .*: pip install"
    ):
        check_fp8_available(arguments())


def test_what_is_rounded_beside_the_computation_is_told() -> None:
    assert rounding_told(argparse.Namespace(fp8_param_gather=False)) == ""
    assert rounding_told(argparse.Namespace(fp8_param_gather=True)).startswith(
        "--fp8-param-gather: what the next stage"
    )
