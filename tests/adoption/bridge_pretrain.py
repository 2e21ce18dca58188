"""Megatron-Bridge's own ``pretrain`` with the callback: ``python -m tests.adoption.bridge_pretrain MODE [RECIPE]``.

MODE is ``plain`` (without the callback), ``disabled`` (refreshes, no projection), ``projected``, or ``in_bf16`` (projected,
references without FP8); RECIPE is one of Bridge's of mixed precision, such as ``bf16_with_fp8_current_scaling_mixed``. Prints
a JSON line with the losses of the steps and what the plugin logged. Transformer Engine, which Bridge imports, is emulated
(tests/transformer_engine); packages for features that are not used here are empty. Bridge and what it needs lie in the
folder of ``MEGATRON_BRIDGE_SITE``, ahead of the installed packages, some of which are newer than it takes::

    pip install --no-deps --target FOLDER megatron-bridge==0.6.2 transformers==5.12.1 tokenizers==0.22.2 \\
        'huggingface-hub<2' omegaconf hydra-core antlr4-python3-runtime==4.9.3 six regex ipython traitlets \\
        httpx httpcore h11 anyio certifi idna
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch

SITE = "MEGATRON_BRIDGE_SITE"
NOT_USED = ("nvidia_resiliency_ext", "modelopt", "megatron.energon", "webdataset")
SEQ_LENGTH = 32
STEPS = 4


class _Empty(ModuleType):
    """Any name in it is a function that returns None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(return_value=None)


class _EmptyPackages(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if any(fullname == name or fullname.startswith(f"{name}.") for name in NOT_USED):
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


def main(mode: str, precision: str | None = None) -> None:
    sys.path.insert(0, os.environ[SITE])
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    from tests.transformer_engine.importing import install

    install()
    sys.meta_path.insert(0, _EmptyPackages())
    import megatron.bridge.training.initialize
    import megatron.bridge.training.setup as bridge_setup
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    from megatron_ogpsa import OGPSAConfig
    from megatron_ogpsa.integration.bridge import OGPSACallback

    bridge_setup.initialize_megatron = functools.partial(bridge_setup.initialize_megatron, allow_no_cuda=True)
    # The wheel has them compiled, and nothing to compile them with.
    megatron.bridge.training.initialize.compile_helpers = lambda: None
    protect = OGPSACallback(
        OGPSAConfig(space="update", refresh_interval=2),
        references={"math": rows(1), "chat": rows(2)},
        forward_step=forward_step,
        references_in_bf16=mode == "in_bf16",
    )
    told: dict[str, list[float]] = {}

    class Recording(Callback):
        def on_train_step_start(self, context: Any) -> None:
            if mode == "disabled":
                protect.ogpsa.enabled = False

        def on_train_step_end(self, context: Any) -> None:
            for name, value in context.loss_dict.items():
                told.setdefault(name, []).append(float(value))

    callbacks = [Recording()] if mode == "plain" else [protect, Recording()]
    pretrain(configuration(precision), forward_step, callbacks=callbacks)
    print(json.dumps(told))


def configuration(precision: str | None) -> Any:
    """A small model on Bridge's mock data."""
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.training import config

    return config.ConfigContainer(
        mixed_precision=precision,
        model=GPTModelProvider(
            num_layers=3,
            hidden_size=64,
            num_attention_heads=4,
            ffn_hidden_size=128,
            seq_length=SEQ_LENGTH,
            vocab_size=128,
            make_vocab_size_divisible_by=128,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            gradient_accumulation_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        ),
        train=config.TrainingConfig(train_iters=STEPS, micro_batch_size=2, global_batch_size=4),
        validation=config.ValidationConfig(eval_iters=0, eval_interval=1000),
        optimizer=config.OptimizerConfig(optimizer="adam", lr=1e-3, min_lr=0.0, use_distributed_optimizer=True),
        scheduler=config.SchedulerConfig(
            lr_decay_style="constant",
            lr_warmup_iters=0,
            start_weight_decay=0.01,
            end_weight_decay=0.01,
            weight_decay_incr_style="constant",
        ),
        ddp=config.DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        dataset=config.MockGPTDatasetConfig(
            seq_length=SEQ_LENGTH,
            random_seed=1,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            num_workers=0,
            dataloader_type="single",
        ),
        logger=config.LoggerConfig(log_interval=1),
        tokenizer=config.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=127),
        checkpoint=config.CheckpointConfig(),
        rng=config.RNGConfig(seed=1),
        dist=config.DistributedInitConfig(distributed_backend="gloo"),
    )


def rows(seed: int) -> list[dict[str, torch.Tensor]]:
    """Random samples, as the callback takes them."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(0, 120, (SEQ_LENGTH + 1,), generator=generator) for _ in range(4)]
    rest = {"loss_mask": torch.ones(SEQ_LENGTH), "position_ids": torch.arange(SEQ_LENGTH)}
    return [{"tokens": tokens[:-1], "labels": tokens[1:], **rest} for tokens in drawn]


if __name__ == "__main__":
    main(*sys.argv[1:])
