"""Products of matrices, quantized or not, summed in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.transformer_engine.casting import is_quantized, quantize, shape_of, values
from tests.transformer_engine.enums import torch_dtype


def generic_gemm(
    A: Any,
    transa: bool,
    B: Any,
    transb: bool,
    D: Tensor | None,
    quantizer: Any,
    out_dtype: int | None,
    bias: Tensor | None,
    bias_type: int,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    *,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Any, Tensor | None, None, Tensor | None]:
    """D = α op(B) op(A) + β D: "TN" gives a layer's output, "NN" its input's gradient, "NT" its weight's.

    With ``bias``: added to the output, or, with ``grad``, its gradient in its place: B summed over rows.
    """
    if gelu or comm_overlap is not None:
        raise NotImplementedError("products fused with GELU or communication are not emulated")
    a = _matrix(A, columnwise=not transa)
    b = _matrix(B, columnwise=transb)
    result = alpha * ((b.T if transb else b) @ (a.T if transa else a))
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = b.sum(0).to(bias.dtype)
    elif bias is not None:
        result = result + bias.float()
    shape = result.shape if transb else (*shape_of(B)[:-1], result.shape[-1])
    result = result.reshape(shape)
    if accumulate:
        assert D is not None
        result = result + (1.0 if beta is None else beta) * D.float()
    if D is not None:
        D.copy_(result)
        return D, bias_gradient, None, extra_output
    result = result.to(_output_dtype(A, B, out_dtype))
    return (result if quantizer is None else quantize(result, quantizer)), bias_gradient, None, extra_output


def te_general_grouped_gemm(
    A: list[Any],
    transa: bool,
    B: list[Any],
    transb: bool,
    D: list[Tensor] | None,
    out_dtype: int,
    m_splits: list[int],
    bias: list[Tensor],
    bias_type: int,
    single_output: bool,
    gelu_in: list[Tensor],
    grad: bool,
    workspace: list[Tensor],
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> list[Tensor]:
    """One product for each expert; with ``single_output`` the first of ``D`` takes all of them, one below the other."""
    assert D is not None
    row = 0
    bias_gradients = []
    for index, (a, b) in enumerate(zip(A, B, strict=True)):
        rows = m_splits[index]
        out = D[0][row : row + rows] if single_output else D[index]
        row += rows
        own_bias = bias[index] if bias and bias[index].numel() else None
        if shape_of(b)[0] == 0 or 0 in shape_of(a):
            if transb and not accumulate:
                out.zero_()
            bias_gradients.append(torch.zeros_like(own_bias) if own_bias is not None else torch.empty(0))
            continue
        _, gradient, _, _ = generic_gemm(
            a, transa, b, transb, out, None, out_dtype, own_bias, bias_type, False, None, grad,
            workspace[0], workspace_size, accumulate, use_split_accumulator,
        )  # fmt: skip
        bias_gradients.append(gradient if gradient is not None else torch.empty(0))
    return bias_gradients if grad else bias


def _matrix(operand: Any, *, columnwise: bool) -> Tensor:
    full = values(operand, columnwise=columnwise) if is_quantized(operand) else operand.float()
    return full.reshape(-1, full.shape[-1])


def _output_dtype(A: Any, B: Any, out_dtype: int | None) -> torch.dtype:
    if out_dtype is not None:
        return torch_dtype(out_dtype)
    return A.dtype if isinstance(A, Tensor) else A._dtype
