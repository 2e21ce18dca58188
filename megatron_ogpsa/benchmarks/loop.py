"""The megatron-core loop that benchmarks of a step run: one GPT, its optimizer, and the plugin."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu

if TYPE_CHECKING:
    from megatron_ogpsa import OGPSA


class Loop:
    """A megatron-core loop over one model, with everything that is compared at hand.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        from megatron.core import parallel_state, tensor_parallel

        parallel_state.initialize_model_parallel(args.tensor_model_parallel_size)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        self._args = args
        self.device = torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")
        self.chunk, self.optimizer = _model_and_optimizer(args)
        self.parameters = [parameter for parameter in self.chunk.parameters() if parameter.requires_grad]
        generator = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
        shape = (args.accumulate, args.micro_batch_size, args.seq_length + 1)
        self._tokens = torch.randint(0, args.vocabulary, shape, generator=generator).to(self.device)
        self.ogpsa = self._attached()

    def _attached(self) -> OGPSA:
        from megatron_ogpsa import OGPSAConfig, attach

        args = self._args
        config = OGPSAConfig(
            granularity=args.granularity,
            space=args.space,
            mode=args.mode,
            basis_dtype=args.basis_dtype,
            basis_device=args.basis_device,
        )
        ogpsa = attach(self.optimizer, self.chunk, config)
        ogpsa.enabled = False
        return ogpsa

    def attach_anew(self) -> None:
        """Leave no basis."""
        self.ogpsa.detach()
        self.ogpsa = self._attached()

    def close(self) -> None:
        """Let another loop be made in this process."""
        from megatron.core import parallel_state

        self.ogpsa.detach()
        parallel_state.destroy_model_parallel()

    def gradient(self, shift: int = 0) -> None:
        """The gradient of the step's micro-batches; ``shift`` gives those of a reference."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter([(tokens + shift) % self._args.vocabulary for tokens in self._tokens]),
            model=[self.chunk],
            num_microbatches=self._args.accumulate,
            seq_length=self._args.seq_length,
            micro_batch_size=self._args.micro_batch_size,
            forward_only=False,
        )

    def references(self) -> Iterator[str]:
        """Computes the gradient of each reference in turn, and gives its name."""
        for index in range(self._args.rank):
            self.gradient(shift=1 + index)
            yield f"reference {index}"

    def step(self) -> None:
        """One training step."""
        self.gradient()
        self.optimizer.step()

    def refresh(self) -> None:
        """Computes the basis anew."""
        self.ogpsa.begin_refresh()
        for name in self.references():
            self.ogpsa.capture(name)
        self.ogpsa.finish_refresh()

    def projected_step(self) -> None:
        """One training step with the projection."""
        self.ogpsa.enabled = True
        self.step()
        self.ogpsa.enabled = False


def has_gpu() -> bool:
    """Whether there is one; where there is none, Megatron runs on the CPU from now on."""
    return not install_if_no_gpu()


def _model_and_optimizer(args: argparse.Namespace) -> tuple[Any, Any]:
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    dtype = torch.bfloat16 if args.bf16 else torch.float32
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.hidden_size // 64,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=args.bf16,
        calculate_per_token_loss=True,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
    )
    spec = (
        get_gpt_layer_with_transformer_engine_spec()
        if args.transformer_impl == "transformer_engine"
        else get_gpt_layer_local_spec(normalization="RMSNorm")
    )
    module: torch.nn.Module = GPTModel(
        config,
        spec,
        vocab_size=args.vocabulary,
        max_sequence_length=args.seq_length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    )
    if has_gpu():
        module.cuda()
    if args.bf16:
        module = Float16Module(config, module)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    chunk = DistributedDataParallel(config, ddp_config, module)
    config.finalize_model_grads_func = finalize_model_grads  # without it schedules leave gradients to each rank
    optimizer_config = OptimizerConfig(
        optimizer="adam", lr=1e-5, use_distributed_optimizer=True, clip_grad=1.0, bf16=args.bf16, params_dtype=dtype
    )
    return chunk, get_megatron_optimizer(optimizer_config, [chunk], use_gloo_process_groups=False)


def _forward_step(iterator: Iterator[Tensor], model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], object]]:
    tokens = next(iterator)
    positions = torch.arange(tokens.shape[1] - 1, device=tokens.device).expand(tokens.shape[0], -1)
    length = tokens.shape[1] - 1
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=tokens.device).triu(1)

    def loss(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = output.float().sum()
        # Filled there: a number that is copied from the host would make it wait in each micro-batch.
        return total, torch.full((), output.numel(), dtype=torch.int, device=output.device), {}

    return model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]), loss
