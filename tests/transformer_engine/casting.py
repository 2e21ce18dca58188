"""Quantization: real FP8 values and scales, laid out as Transformer Engine's tensors have them.

A tensor of more than two dimensions is one of two: rows are all dimensions but the last. "Columnwise" data serve products
over rows. Formats, all of which round to nearest, ties to even, and saturate:

    delayed, current   one scale for the tensor; columnwise data are the transpose of the rowwise data
    blockwise          one fp32 scale for 1 x 128 or 128 x 128 elements; columnwise data are transposed
    mxfp8              one power of two (E8M0) for 32 elements along the row, and for 32 along the column

Source: the Python of ``transformer_engine/pytorch/tensor``, which says how data and scales are laid out; OCP Microscaling
Formats 1.0, section 6.3, for the powers of two.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.transformer_engine.enums import torch_dtype

BLOCK = 128
MX_BLOCK = 32
MX_BIAS = 127


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """``tensor`` in the format of ``quantizer``, into ``output`` if given; left as it is where ``noop`` is set."""
    if noop is not None and bool(noop):
        return output
    if output is None:
        output = create_empty_quantized_tensor(quantizer, tensor.shape, tensor.dtype, tensor.device, False)
    with torch.no_grad():
        _FILL[type(quantizer).__name__](tensor.detach().float(), quantizer, output)
    return output


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """The bias's gradient, a sum over rows, and the quantized gradient."""
    return gradient.reshape(-1, gradient.shape[-1]).float().sum(0).to(gradient.dtype), quantize(gradient, quantizer)


def split_quantize(tensor: Tensor, lengths: list[int], quantizers: list[Any], **how: Any) -> list[Any]:
    """Groups of rows, each by its own quantizer."""
    return [quantize(part, quantizer) for part, quantizer in zip(tensor.split(lengths), quantizers, strict=True)]


def create_empty_quantized_tensor(quantizer: Any, shape: Any, dtype: Any, device: Any, pin_memory: bool) -> Any:
    """A quantized tensor whose values are not there yet, with the parts that ``quantizer``'s usages ask for."""
    shape = tuple(shape)
    metadata = _storage(quantizer, dtype)
    parts = {name: torch.zeros(size, dtype=of) for name, (size, of) in _parts(quantizer, shape).items()}
    cls = metadata["cls"]
    arguments = {
        argument: parts.get(name) for argument, name in _ARGUMENTS[cls.__name__.removesuffix("Storage")].items()
    }
    for_tensor = {} if cls.__name__.endswith("Storage") else {"shape": shape, "dtype": dtype}
    return cls(**arguments, **for_tensor, **metadata["nontensor_kwargs"])


def dequantize(tensor: Any, dtype: int) -> Tensor:
    """Of rowwise data if there are any."""
    return values(tensor, columnwise=not _has(tensor, columnwise=False)).to(torch_dtype(dtype))


def values(tensor: Any, *, columnwise: bool) -> Tensor:
    """What the rowwise or the columnwise data stand for: fp32, in the logical shape ``[*rows, columns]``.

    Raises:
        RuntimeError: the tensor has no such data: the GPU would not find them either.
    """
    if not _has(tensor, columnwise=columnwise):
        raise RuntimeError(f"{type(tensor).__name__} has no {'columnwise' if columnwise else 'rowwise'} data")
    return _VALUES[_format(tensor)](tensor, columnwise)


def fp8_transpose(data: Tensor, dtype: int, *, out: Tensor | None = None) -> Tensor:
    """``[*rows, columns]`` → ``[columns, *rows]``."""
    moved = data.movedim(-1, 0).contiguous()
    return moved if out is None else out.copy_(moved)


def largest(dtype: int) -> float:
    """The largest number of an FP8 format."""
    return float(torch.finfo(torch_dtype(dtype)).max)


def rounded(scaled: Tensor, dtype: int) -> Tensor:
    """FP8 bits, uint8."""
    limit = largest(dtype)
    return scaled.clamp(-limit, limit).to(torch_dtype(dtype)).view(torch.uint8)


def _read(data: Tensor, dtype: int) -> Tensor:
    return data.view(torch_dtype(dtype)).float()


def scales_for(amax: Tensor, largest_value: float, powers_of_two: bool, epsilon: float) -> Tensor:
    """The scale that lets ``amax`` just fit; one where there is nothing, or nothing finite, to fit."""
    amax = amax.clamp(min=epsilon)
    scale = largest_value / amax
    scale = torch.where((amax == 0) | ~amax.isfinite(), torch.ones_like(scale), scale)
    scale = scale.clamp(max=torch.finfo(torch.float32).max)
    return torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1) if powers_of_two else scale


def _scale_for(amax: Tensor, quantizer: Any) -> Tensor:
    return scales_for(amax, largest(quantizer.dtype), quantizer.force_pow_2_scales, quantizer.amax_epsilon)


def mx_powers(amax: Tensor, largest_value: float) -> Tensor:
    """The exponent of the smallest power of two by which ``amax`` divided fits; int32."""
    fraction, exponent = torch.frexp(amax / largest_value)
    power = torch.where(fraction == 0.5, exponent - 1, exponent)
    return torch.where(fraction == 0, -MX_BIAS, power.clamp(-MX_BIAS, MX_BIAS))


# One scale for a tensor


def _fill_delayed(source: Tensor, quantizer: Any, output: Any) -> None:
    if quantizer.amax.numel():  # none where the scale is known to fit
        quantizer.amax.copy_(torch.maximum(quantizer.amax, source.abs().max()))
    _fill_whole(source, quantizer.scale, quantizer.dtype, output)


def _fill_current(source: Tensor, quantizer: Any, output: Any) -> None:
    amax = source.abs().max() if source.numel() else source.new_zeros(())  # an expert without tokens
    if quantizer.with_amax_reduction:
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
    _fill_whole(source, _scale_for(amax, quantizer), quantizer.dtype, output)


def _fill_whole(source: Tensor, scale: Tensor, dtype: int, output: Any) -> None:
    data = rounded(source * scale, dtype)
    if output._data is not None:
        output._data.copy_(data)
    if output._transpose is not None:
        output._transpose.copy_(fp8_transpose(data, dtype))
        output._transpose_invalid = False
    output._scale_inv.copy_(1 / scale)


def _values_whole(tensor: Any, columnwise: bool) -> Tensor:
    scaled = tensor._transpose.movedim(0, -1) if columnwise and tensor._transpose is not None else tensor._data
    return _read(scaled.contiguous(), tensor._fp8_dtype) * tensor._scale_inv


# One scale for a block


def _fill_blockwise(source: Tensor, quantizer: Any, output: Any) -> None:
    matrix = source.reshape(-1, source.shape[-1])
    for part, of in (("rowwise", matrix), ("columnwise", matrix.T)):
        data = getattr(output, f"_{part}_data")
        if data is None:
            continue
        tall = BLOCK if quantizer.block_scaling_dim == 2 else 1
        blocks = tiles(of, tall)  # [row tiles, tall, column tiles, 128]
        scale = _scale_for(blocks.abs().amax(dim=(1, 3), keepdim=True), quantizer)
        bits = rounded(blocks * scale, quantizer.dtype).flatten(0, 1).flatten(1, 2)
        data.copy_(bits[: of.shape[0], : of.shape[1]].reshape(data.shape))
        inverse = (1 / scale)[:, 0, :, 0]  # [row tiles, column tiles]
        inverse = inverse if tall == BLOCK else inverse.T
        getattr(output, f"_{part}_scale_inv").zero_()[: inverse.shape[0], : inverse.shape[1]] = inverse


def tiles(matrix: Tensor, tall: int) -> Tensor:
    """``[row tiles, tall, column tiles, 128]``, the last ones filled up with zeros."""
    rows, columns = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -columns % BLOCK, 0, -rows % tall))
    return padded.reshape(padded.shape[0] // tall, tall, padded.shape[1] // BLOCK, BLOCK)


def _values_blockwise(tensor: Any, columnwise: bool) -> Tensor:
    data = tensor._columnwise_data if columnwise else tensor._rowwise_data
    scale = tensor._columnwise_scale_inv if columnwise else tensor._rowwise_scale_inv
    matrix = data.reshape(data.shape[0], -1) if columnwise else data.reshape(-1, data.shape[-1])
    tall = BLOCK if tensor._is_2D_scaled else 1
    blocks = tiles(_read(matrix.contiguous(), tensor._fp8_dtype), tall)
    scale = scale if tensor._is_2D_scaled else scale.T
    scaled = blocks * scale[: blocks.shape[0], None, : blocks.shape[2], None]
    flat = scaled.flatten(0, 1).flatten(1, 2)[: matrix.shape[0], : matrix.shape[1]].reshape(data.shape)
    return flat.movedim(0, -1) if columnwise else flat


# One power of two for 32 elements


def _fill_mx(source: Tensor, quantizer: Any, output: Any) -> None:
    matrix = source.reshape(-1, source.shape[-1])
    for part, of in (("rowwise", matrix), ("columnwise", matrix.T)):
        data = getattr(output, f"_{part}_data")
        if data is None:
            continue
        blocks = of.unflatten(1, (-1, MX_BLOCK))
        power = mx_powers(blocks.abs().amax(-1), largest(quantizer.dtype))
        bits = rounded(torch.ldexp(blocks, -power[..., None]), quantizer.dtype).flatten(1)
        scale = (power + MX_BIAS).to(torch.uint8)
        if part == "columnwise":
            bits, scale = bits.T, scale.T
        data.copy_(bits.reshape(data.shape))
        getattr(output, f"_{part}_scale_inv").zero_()[: scale.shape[0], : scale.shape[1]] = scale


def _values_mx(tensor: Any, columnwise: bool) -> Tensor:
    data = tensor._columnwise_data if columnwise else tensor._rowwise_data
    scale = tensor._columnwise_scale_inv if columnwise else tensor._rowwise_scale_inv
    matrix = _read(data, tensor._fp8_dtype).reshape(-1, data.shape[-1])
    rows, columns = matrix.shape
    if columnwise:
        power = scale[: rows // MX_BLOCK, :columns].repeat_interleave(MX_BLOCK, 0)
    else:
        power = scale[:rows, : columns // MX_BLOCK].repeat_interleave(MX_BLOCK, 1)
    return torch.ldexp(matrix, power.int() - MX_BIAS).reshape(data.shape)


_FILL = {
    "Float8Quantizer": _fill_delayed,
    "Float8CurrentScalingQuantizer": _fill_current,
    "Float8BlockQuantizer": _fill_blockwise,
    "MXFP8Quantizer": _fill_mx,
}
_VALUES = {"Float8Tensor": _values_whole, "Float8BlockwiseQTensor": _values_blockwise, "MXFP8Tensor": _values_mx}
_PARTS = {part: f"_{part}" for part in ("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv")}
_ARGUMENTS = {
    "Float8Tensor": {"data": "_data", "data_transpose": "_transpose", "fp8_scale_inv": "_scale_inv"},
    "Float8BlockwiseQTensor": _PARTS,
    "MXFP8Tensor": _PARTS,
}


def _format(tensor: Any) -> str:
    return type(tensor).__name__.removesuffix("Storage")


def _has(tensor: Any, *, columnwise: bool) -> bool:
    if _format(tensor) != "Float8Tensor":
        return (tensor._columnwise_data if columnwise else tensor._rowwise_data) is not None
    from transformer_engine.pytorch.utils import is_non_tn_fp8_gemm_supported

    if not columnwise or is_non_tn_fp8_gemm_supported():
        return tensor._data is not None
    return tensor._transpose is not None and not tensor._transpose_invalid


def _storage(quantizer: Any, dtype: Any) -> dict[str, Any]:
    """The class and what else its instances are made with; the quantizer of delayed scaling does not say it itself."""
    if type(quantizer).__name__ != "Float8Quantizer":
        return dict(quantizer.storage_metadata(dtype))
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor, Float8TensorStorage

    cls = Float8TensorStorage if quantizer.internal else Float8Tensor
    return {"cls": cls, "nontensor_kwargs": {"fp8_dtype": quantizer.dtype, "quantizer": quantizer, "fake_dtype": dtype}}


def _parts(quantizer: Any, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    if type(quantizer).__name__ != "Float8Quantizer":
        return dict(quantizer.inner_tensor_specs(shape))
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    return dict(Float8CurrentScalingQuantizer.inner_tensor_specs(quantizer, shape))


def shape_of(tensor: Any) -> torch.Size:
    return tensor.shape if isinstance(tensor, Tensor) else tensor.size()


def is_quantized(tensor: Any) -> bool:
    return type(tensor).__name__.removesuffix("Storage") in _VALUES
