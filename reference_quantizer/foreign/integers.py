"""What the formats of integers with groups share: fields of bits in words, groups of columns, zero points."""

import math
from typing import Any

import torch

from reference_quantizer.foreign.parts import IDENTITY, Stage, Transform, integers
from tqformat.load_quantized import TQFormatError

DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def words_to_fields(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """uint8 [n, count]: fields of `bits` (1 to 8) from the least significant bit of int32 or uint8 [n, words] on, across words."""
    data = words.contiguous().reshape(-1).view(torch.uint8).reshape(len(words), -1)
    n, length = data.shape
    if length * 8 < count * bits:
        raise TQFormatError("CONTAINER.SHAPE", "codes", f"{length} bytes do not hold {count} numbers of {bits} bits")
    found = torch.empty(n, count, dtype=torch.uint8)
    for j in range(8):  # field j of every eight begins at the same bit of a byte
        first, shift = divmod(j * bits, 8)
        place = found[:, j::8]
        low = data[:, first::bits][:, : place.shape[1]]
        value = low >> shift
        if shift + bits > 8:
            value |= data[:, first + 1 :: bits][:, : place.shape[1]] << (8 - shift)
        place.copy_(value & (1 << bits) - 1)
    return found


def group_columns(group: torch.Tensor) -> tuple[torch.Tensor, int, Transform, torch.Tensor]:
    """Of the group of each column, [cols]: an order in which those of a group stand together, and what follows from it.

    The order [cols], the vector length G, the transform that undoes the order, and the group of each vector, [cols / G]. G
    divides the number of columns of every group, so that groups may have different numbers of them.
    """
    order = torch.argsort(group.long(), stable=True)
    counts = torch.bincount(group.long())
    length = math.gcd(*counts.tolist())
    transform = IDENTITY
    if not torch.equal(order, torch.arange(len(group))):
        transform = Transform("permutation", len(group), {"index": order.int()})
    return order, length, transform, group.long()[order][::length]


def grouped(
    codes: torch.Tensor, bits: int, scales: torch.Tensor, zeros: torch.Tensor | None, group: torch.Tensor
) -> Stage:
    """The stage of scale * (code - zero), exactly: codes uint8 [rows, cols], scales and zeros [rows, groups], group [cols].

    The zero is 2^(bits - 1) where it is None. One that is the same everywhere goes into the levels.
    """
    order, length, transform, groups = group_columns(group)
    if transform is not IDENTITY:
        codes = codes[:, order]
    scales, top = scales[:, groups].contiguous(), 1 << bits
    zeros = torch.tensor([[top // 2]], dtype=torch.int32) if zeros is None else zeros.int()
    first = int(zeros.flatten()[0]) if zeros.numel() else 0
    if bool((zeros == first).all()):
        return Stage(codes, integers(-first, top - 1 - first), scales, transform=transform)
    zeros = zeros[:, groups]
    if (
        scales.dtype == torch.float32
    ):  # whose products with a code and with a zero are not exact: code - zero is one level
        differences = codes.int() - zeros.repeat_interleave(length, 1)
        low, high = int(differences.min()), int(differences.max())
        if high - low > 255:
            message = "8-bit codes with zero points and scales in float32: their differences take more than 8 bits"
            raise TQFormatError("UNSUPPORTED.LIBRARY", "zeros", message)
        return Stage(differences - low, integers(low, high), scales, transform=transform)
    if int(zeros.min()) < 0 or int(zeros.max()) > 255:
        raise TQFormatError("UNSUPPORTED.LIBRARY", "zeros", "expected zero points from 0 to 255")
    offsets, outer = zeros.to(torch.uint8).contiguous(), -scales
    return Stage(codes, integers(0, top - 1), scales, offsets=offsets, outer_offsets=outer, transform=transform)


def dtype_of(scales: torch.Tensor, name: str) -> str:
    """The safetensors name of the dtype of scales, in which their format computes."""
    if scales.dtype not in DTYPES:
        raise TQFormatError(
            "CONTAINER.DTYPE", name, f"expected scales in float16, bfloat16 or float32, got {scales.dtype}"
        )
    return DTYPES[scales.dtype]


def need_parts(name: str, parts: dict[str, Any], *endings: str) -> None:
    """BIND.MISSING_TENSOR unless the weight has all these parts."""
    for ending in endings:
        if ending not in parts:
            raise TQFormatError("BIND.MISSING_TENSOR", name, f"expected a tensor whose name ends in {ending}")
