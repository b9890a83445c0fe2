"""HQQ (Half-Quadratic Quantization): W = (code - zero) * scale, zeros being no integers, in groups of a row (axis 1).

A layer's `W_q` holds its [groups, group_size] codes in `packing`: 8, 4, 2 or 1 bits in bytes, 3 bits in 32-bit words, the
first part of the groups in the highest bits. `scale` and `zero` are [groups, 1]; the rest are settings, text as bytes.

Weights are F32: HQQ rounds code - zero to its compute dtype, then the product, and a format with one rounding cannot follow
that in 16 bits. They are what HQQ computes in float32.
"""

from typing import Any

import torch

from reference_quantizer.foreign.integers import need_parts
from reference_quantizer.foreign.parts import Stage, Weight, integers
from tqformat.load_quantized import TQFormatError

PARTS = tuple(
    f".{part}"
    for part in (
        *(
            "W_q",
            "scale",
            "zero",
            "nbits",
            "group_size",
            "shape",
            "axis",
            "packing",
            "unpack_view_dtype",
            "view_as_float",
        ),
        *("compute_dtype", "quant_scale", "quant_zero", "offload_meta", "encoded_state_dict", "stores_quant_config"),
        *("channel_wise", "optimize", "round_zero"),
    )
)
PACKINGS = {
    "8bit_u8": (8, 1),
    "4bit_u8": (4, 2),
    "2bit_u8": (2, 4),
    "1bit_u8": (1, 8),
    "3bit_32": (3, 10),
}  # bits, parts


def read_hqq(name: str, parts: dict[str, torch.Tensor], settings: dict[str, Any]) -> Weight:
    """A weight of the quant_method hqq."""
    need_parts(name, parts, ".W_q", ".scale", ".zero", ".shape", ".packing")
    packing, shape = bytes(parts[".packing"].tolist()).decode(), tuple(parts[".shape"].tolist())
    if int(parts.get(".axis", torch.tensor(1))) != 1:
        message = (
            "axis 0: its groups run down the columns, and a scale belongs to a part of a row; quantize with axis=1"
        )
        raise TQFormatError("UNSUPPORTED.LIBRARY", name, message)
    if packing not in PACKINGS:
        raise TQFormatError("UNSUPPORTED.LIBRARY", name, f"packing {packing!r}, expected one of {', '.join(PACKINGS)}")
    bits, count = PACKINGS[packing]
    packed, (rows, cols) = parts[".W_q"], shape
    packed = packed if packed.dtype == torch.int32 else packed.view(torch.uint8)  # view_as_float
    groups, zeros = parts[".scale"].numel(), parts[".zero"].float().reshape(-1)
    length = rows * cols // groups
    if cols % length:
        message = f"groups of {length} weights, of which rows of {cols} hold no whole number"
        raise TQFormatError("UNSUPPORTED.LIBRARY", name, message)
    codes = torch.cat([packed >> bits * (count - 1 - k) & (1 << bits) - 1 for k in range(count)])[:groups]
    scales = parts[".scale"].float().reshape(-1)
    zeros = zeros.expand(groups) if zeros.numel() == 1 else zeros
    offsets = -(scales * zeros)  # exact for 16-bit ones
    narrow = parts[".scale"].reshape(rows, -1)
    stage = Stage(
        codes.to(torch.uint8).reshape(rows, cols),
        integers(0, (1 << bits) - 1),
        narrow,
        offsets=offsets.reshape(rows, -1),
    )
    return Weight(name, (rows, cols), "F32", (stage,))
