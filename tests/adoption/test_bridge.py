"""Megatron-Bridge: its events drive the plugin to the same bits as by hand, and the page's code runs."""

from __future__ import annotations

import ast
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from tests.adoption import bridge_interface
from tests.adoption.bridge_modules import callbacks_module, real_source
from tests.adoption.bridge_pretrain import SITE, STEPS
from tests.adoption.pages import blocks
from tests.harness import WorkerGroup

Distributed = Callable[[int], WorkerGroup]
REAL = real_source("callbacks.py") is not None
needs_bridge = pytest.mark.skipif(
    not REAL,
    reason="needs Megatron-Bridge's sources: pip download --no-deps megatron-bridge==0.6.2, and "
    "MEGATRON_BRIDGE_WHEEL=the wheel",
)


@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_the_callback_is_the_plugin_by_hand(distributed: Distributed, layout: str) -> None:
    for result in distributed(2).run("tests.adoption.bridge_cases:by_hand_and_by_callback", layout=layout, real=REAL):
        assert all(result.values()), result


def test_resumed_and_saved_asynchronously_it_is_the_undisturbed_run(distributed: Distributed) -> None:
    job = "tests.adoption.bridge_cases:resumed_and_saved_asynchronously"
    for result in distributed(2).run(job, layout="dp2", real=REAL):
        assert all(result.values()), result


def test_the_pages_code_runs_in_bridges_order_of_events(distributed: Distributed) -> None:
    code = "\n".join(blocks("megatron-bridge.md", "python"))
    for result in distributed(2).run("tests.adoption.bridge_cases:page", code=code, real=REAL):
        assert len(result["log"]) == 2
        for step in result["log"]:
            assert step["ogpsa rank"] == 2
            assert step["ogpsa removed length"] >= 0


def test_what_is_refused_is_told_in_a_line(distributed: Distributed) -> None:
    told = distributed(2).run("tests.adoption.bridge_cases:refusals", real=REAL)
    assert told[0] == told[1]
    expected = [
        r"UserError: model.fp8 needs Transformer Engine, .+ or train in bf16",
        r"model.fp8_recipe custom in FP8 with OGPSACallback is not supported: .+; use delayed",
        r"model.quant_recipe with OGPSACallback is not supported",
        r"dist.use_decentralized_pg with OGPSACallback",
        r"train.rampup_batch_size with checkpoint.async_save",
        r"reference math has no supervised token in 8 rows",
        r"reference math, row 0: .*1-D tensors of model.seq_length",
        r"OGPSACallback without references",
        r'OGPSAConfig\(mode="conflict"\) with 9 references: it solves for up to 8; .+ mode="orthogonal"',
        r"OGPSACallback\(references_in_bf16=True\): .+ bf16 with model.bf16 only; train in bf16",
        r"megatron-bridge .* has no on_checkpoint_save in its callbacks.*pip install",
        r"ImportError: megatron_ogpsa.integration.bridge needs Megatron-Bridge, which cannot be imported",
    ]
    assert len(told[0]) == len(expected)
    for message, pattern in zip(told[0], expected, strict=True):
        assert re.search(pattern, message), message
        assert "\n" not in message


@needs_bridge
def test_the_stand_in_has_bridges_interface() -> None:
    real: Any = callbacks_module(real=True)
    assert bridge_interface.VALID_EVENTS == real.VALID_EVENTS
    stand_in = [(field.name, field.default) for field in fields(bridge_interface.CallbackContext)]
    assert stand_in == [(field.name, field.default) for field in fields(real.CallbackContext)]
    assert all(callable(getattr(real.Callback, event)) for event in real.VALID_EVENTS)


@needs_bridge
def test_bridges_loop_fires_events_in_the_order_of_ours() -> None:
    train = function_of("train.py", "train")
    landmarks = [
        'fire(\n            "on_train_start"',
        "while global_state.train_state.step < train_config.train_iters",
        "finalize_async_saves(state=global_state, blocking=False)",
        'fire(\n                "on_train_step_start"',
        "= wrapped_train_step(",
        'fire(\n                "on_train_step_end"',
        "global_state.train_state.step += 1",
        "training_log(\n",
        "should_exit = checkpoint_and_decide_exit(",
        'fire(\n            "on_train_end"',
    ]
    places = [train.index(landmark) for landmark in landmarks]
    assert places == sorted(places)
    step = function_of("train.py", "train_step")
    assert (
        step.index("should_run_forward_backward")
        < step.index("forward_backward_func(")
        < step.index("optimizer.step()")
    )
    save = function_of("checkpointing.py", "save_checkpoint")
    assert "async_save_request.add_finalize_fn(fire_callback)" in save
    finetune = ast.parse(function_of("finetune.py", "finetune")).body[0]
    assert isinstance(finetune, ast.FunctionDef)
    assert [argument.arg for argument in finetune.args.args] == ["config", "forward_step_func", "callbacks"]


@pytest.mark.skipif(
    SITE not in os.environ,
    reason=f"needs Megatron-Bridge with what it imports: {SITE}=FOLDER, as tests/adoption/bridge_pretrain.py says",
)
@pytest.mark.parametrize("recipe", ["", "bf16_with_fp8_current_scaling_mixed", "bf16_with_fp8_delayed_scaling_mixed"])
def test_bridges_own_loop_runs_with_the_callback(recipe: str) -> None:
    """Refreshes without projection are bitwise the run without the callback; with it, both references are protected."""
    told = {}
    for mode in ("plain", "disabled", "projected", *(("in_bf16",) if recipe else ())):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        command = [sys.executable, "-m", "tests.adoption.bridge_pretrain", mode, *recipe.split()]
        finished = subprocess.run(
            command, capture_output=True, text=True, timeout=200, check=False, env=os.environ | {"MASTER_PORT": port}
        )
        assert finished.returncode == 0, finished.stderr[-3000:]
        told[mode] = json.loads(finished.stdout.splitlines()[-1])
    assert len(told["plain"]["lm loss"]) == STEPS
    assert told["disabled"]["lm loss"] == told["plain"]["lm loss"]
    assert told["projected"]["lm loss"][0] == told["plain"]["lm loss"][0]
    assert told["projected"]["lm loss"][1:] != told["plain"]["lm loss"][1:]
    assert told["projected"]["ogpsa rank"] == [2.0] * STEPS
    assert all(removed > 0 for removed in told["projected"]["ogpsa removed length"])
    if recipe:
        assert told["in_bf16"]["ogpsa rank"] == [2.0] * STEPS
        assert told["in_bf16"]["lm loss"][1:] != told["projected"]["lm loss"][1:]


def function_of(file: str, name: str) -> str:
    """Its source, from Bridge's ``training`` folder."""
    source = real_source(file)
    assert source is not None
    (function,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name)
    text = ast.get_source_segment(source, function)
    assert text is not None
    return text
