"""The module ``transformer_engine_torch``: kernels of this package under the names of the compiled extension."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from tests.transformer_engine import attention, casting, enums, layers, master_weights, optimizers, products

NAME = "transformer_engine_torch"

CUDNN = 91200
"""The oldest cuDNN that Transformer Engine 2.20 takes."""
CUBLAS = 130000

_KERNELS = (
    *(casting.quantize, casting.bgrad_quantize, casting.dequantize, casting.create_empty_quantized_tensor),
    *(casting.split_quantize, layers.fused_multi_row_padding, layers.fused_multi_row_unpadding),
    *(casting.fp8_transpose, products.generic_gemm, products.te_general_grouped_gemm),
    *(layers.layernorm_fwd, layers.layernorm_bwd, layers.rmsnorm_fwd, layers.rmsnorm_bwd),
    *(layers.scaled_softmax_forward, layers.scaled_masked_softmax_forward),
    *(layers.scaled_upper_triang_masked_softmax_forward, layers.scaled_aligned_causal_masked_softmax_forward),
    *(
        optimizers.multi_tensor_adam,
        optimizers.multi_tensor_scale,
        optimizers.multi_tensor_scale_tensor,
        optimizers.multi_tensor_l2norm,
    ),
    *(attention.fused_attn_fwd, attention.fused_attn_bwd),
    *(layers.convert_thd_to_bshd, layers.convert_bshd_to_thd, optimizers.fused_amax_and_scale_update_after_reduction),
    *(master_weights.compute_amax, master_weights.multi_tensor_compute_scale_and_scale_inv),
    *(master_weights.fp8_block_scaling_compute_partial_amax, master_weights.fp8_block_scaling_partial_cast),
    *(master_weights.mxfp8_scaling_compute_partial_amax, master_weights.mxfp8_scaling_partial_cast),
    master_weights.multi_tensor_compute_scale_inv_e8m0,
)


class _Extension(ModuleType):
    """Names that no kernel here stands for can be imported, and say so when they are used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: object, **kwargs: object) -> None:
            raise NotImplementedError(f"{NAME}.{name} is not emulated on the CPU (tests/transformer_engine)")

        return missing


def build() -> ModuleType:
    """The module, for ``sys.modules``."""
    module = _Extension(NAME)
    for kernel in _KERNELS:
        setattr(module, kernel.__name__, kernel)
    for name, value in vars(enums).items():
        if name[0].isupper() and isinstance(value, type):
            setattr(module, name, value)
    for variant in ("scaled", "scaled_masked", "scaled_upper_triang_masked", "scaled_aligned_causal_masked"):
        setattr(module, f"{variant}_softmax_backward", layers.softmax_backward)
    for name in ("CommOverlapHelper", "CommOverlap", "CommOverlapP2P", "FP8TensorMeta"):
        setattr(module, name, type(name, (), {}))
    answers = {
        "get_cudnn_version": CUDNN,
        "get_cublasLt_version": CUBLAS,
        "get_num_cublas_streams": 1,
        "get_stream_priority_range": (0, 0),
        "get_fused_attn_backend": (enums.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen, ""),  # type: ignore[attr-defined]
    }
    for name, answer in answers.items():
        setattr(module, name, lambda *args, answer=answer, **kwargs: answer)
    return module
