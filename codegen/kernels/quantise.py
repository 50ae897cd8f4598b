"""Pack expert matrices into the formats that emitted kernels decode, and back, exactly."""

import torch
from torch import Tensor

from dovetail.ir.kernel_parts import DTYPE_BYTES, Weights

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
assert set(TORCH_DTYPES) == set(DTYPE_BYTES)
_LARGEST = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}


def pack(matrix: Tensor, weights: Weights) -> tuple[Tensor, Tensor | None]:
    """``matrix`` [experts, outputs, inputs] as stored elements and float32 scales.

    Scales are the largest magnitude of their block over the format's largest value (symmetric
    absmax rounding). Plain weights come back as they are, in their order.
    """
    if weights.format == "plain":
        return _ordered(matrix, weights), None
    experts, outputs, inputs = matrix.shape
    tall = weights.scale_n if weights.scale_k else 1
    across = weights.scale_k or inputs
    blocks = matrix.float().reshape(experts, outputs // tall, tall, inputs // across, across)
    scales = blocks.abs().amax((2, 4)).clamp_min(1e-12) / _LARGEST[weights.format]
    scaled = (blocks / scales[:, :, None, :, None]).reshape(matrix.shape)
    scales = scales if weights.scale_k else scales[..., 0]
    return _ordered(_encode(scaled, weights), weights), scales.contiguous()


def unpack(stored: Tensor, scales: Tensor | None, weights: Weights) -> Tensor:
    """The float64 matrix [experts, outputs, inputs] that stored elements and scales stand for."""
    matrix = stored.transpose(1, 2) if weights.order == "kn" else stored
    if weights.format == "int4":
        matrix = torch.cat([(matrix & 15).int() - 8, (matrix >> 4).int() - 8], dim=2)
    if weights.format == "fp8":
        matrix = matrix.contiguous().view(torch.float8_e4m3fn).float()
    values = matrix.double()
    if scales is None:
        return values
    if not weights.scale_k:
        return values * scales.double()[..., None]
    wide = scales.double().repeat_interleave(weights.scale_k, dim=2)
    return values * wide.repeat_interleave(weights.scale_n, dim=1)


def _encode(scaled: Tensor, weights: Weights) -> Tensor:
    match weights.format:
        case "fp8":
            return scaled.to(torch.float8_e4m3fn).view(torch.uint8)
        case "int8":
            return scaled.round().to(torch.int8)
    digits = (scaled.round() + 8).to(torch.uint8)
    low, high = digits.chunk(2, dim=2)
    return low | (high << 4)


def _ordered(stored: Tensor, weights: Weights) -> Tensor:
    """[experts, outputs, inputs] in the order that is stored."""
    return stored.transpose(1, 2).contiguous() if weights.order == "kn" else stored.contiguous()
