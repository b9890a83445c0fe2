"""compressed-tensors: W = scale * (code - zero), or scale * a small float; what a weight is, its tensors tell.

`weight_packed` int32 holds integers of 1 to 8 bits plus 2^(bits-1), along a row and across words, `weight_zero_point` int32
those of zeros along the rows; `weight` int8 or F8_E4M3 holds them plainly. `weight_packed` uint8 holds E2M1, the first in
the low half: MXFP4 with a `weight_scale` of exponents, NVFP4 with one of F8_E4M3, divided by `weight_global_scale`.
Scales are [rows, groups], [rows, 1], [1], or one for each block of rows and columns. Only weights are carried over: what
was to round activations is left out.
"""

import math
from typing import Any

import torch

from reference_quantizer.foreign.gguf_blocks import E2M1, ONE
from reference_quantizer.foreign.integers import dtype_of, grouped, need_parts, words_to_fields
from reference_quantizer.foreign.parts import Stage, Weight
from tqformat.load_quantized import TQFormatError

Parts = dict[str, torch.Tensor]


def read_compressed(name: str, parts: Parts, settings: dict[str, Any]) -> Weight:
    """A weight of the quant_method compressed-tensors."""
    need_parts(name, parts, ".weight_scale")
    formats = {settings.get("format")} | {
        g.get("format") for g in settings.get("config_groups", {}).values() if isinstance(g, dict)
    }
    if wrong := [str(f) for f in formats if f and ("sparse" in str(f) or "marlin" in str(f))]:
        message = f"the format {wrong[0]} leaves weights out, which codes and scales cannot say; start from the original model"
        raise TQFormatError("UNSUPPORTED.LIBRARY", name, message)
    packed, plain = parts.get(".weight_packed"), parts.get(".weight")
    if packed is not None and packed.dtype == torch.int32:
        return _integers(name, parts, settings)
    if packed is not None and packed.dtype == torch.uint8:
        return _floats4(name, parts)
    if plain is not None and plain.dtype == torch.int8:
        zeros = parts.get(".weight_zero_point")
        codes = (plain.int() + 128).to(torch.uint8)
        return _scaled(name, codes, 8, parts, None if zeros is None else zeros.int() + 128, settings)
    if plain is not None and plain.dtype == torch.float8_e4m3fn:
        return _floats8(name, parts, settings)
    found = packed if packed is not None else plain
    kind = "no codes" if found is None else f"codes of {found.dtype}"
    raise TQFormatError("UNSUPPORTED.LIBRARY", name, f"expected integers, F8_E4M3, MXFP4 or NVFP4, found {kind}")


def _integers(name: str, parts: Parts, settings: dict[str, Any]) -> Weight:
    need_parts(name, parts, ".weight_shape")
    rows, cols = parts[".weight_shape"].tolist()
    packed = parts[".weight_packed"]
    bits = packed.shape[1] * 32 // cols
    if packed.shape != (rows, -(-cols * bits // 32)) or not 1 <= bits <= 8:
        message = f"weight_packed {list(packed.shape)} does not hold [{rows}, {cols}]"
        raise TQFormatError("CONTAINER.SHAPE", name, message)
    weights = [g.get("weights") or {} for g in settings.get("config_groups", {}).values() if isinstance(g, dict)]
    stated = {w["num_bits"] for w in weights if "num_bits" in w}
    if stated and bits not in stated:  # as where no number goes across words
        message = f"its words hold {bits} bits for each weight, config.json says {', '.join(map(str, sorted(stated)))}"
        raise TQFormatError("CONTAINER.SHAPE", name, f"{message}: packed in another way; start from the original model")
    zeros = parts.get(".weight_zero_point")
    if zeros is not None and zeros.dtype == torch.int32 and zeros.dim() == 2:
        zeros = words_to_fields(zeros.t(), bits, rows).t()
    elif zeros is not None:
        zeros = zeros.int() + (1 << (bits - 1))
    return _scaled(name, words_to_fields(packed, bits, cols), bits, parts, zeros, settings)


def _scaled(name: str, codes: torch.Tensor, bits: int, parts: Parts, zeros: Any, settings: dict[str, Any]) -> Weight:
    rows, cols = codes.shape
    scales = per_row(name, parts[".weight_scale"], rows, cols, settings)
    if zeros is not None:
        zeros = per_row(name, zeros, rows, cols, settings)
    group = parts.get(".weight_g_idx")
    if group is None or bool((group == -1).any()):
        group = torch.arange(cols) // (cols // scales.shape[1])
    stage = grouped(codes, bits, scales, zeros, group)
    return Weight(name, (rows, cols), dtype_of(scales, name), (stage,))


def per_row(name: str, values: torch.Tensor, rows: int, cols: int, settings: dict[str, Any]) -> torch.Tensor:
    """[rows, groups], of a value for the tensor, for each row, for each group of a row, or for each block of rows and columns."""
    if values.numel() == 1:
        return values.reshape(1, 1).expand(rows, 1)
    values = values.reshape(len(values), -1)
    high, wide = values.shape
    if high == rows and cols % wide == 0:
        return values
    shapes = [(g.get("weights") or {}).get("block_structure") for g in settings.get("config_groups", {}).values()]
    for block in (shape for shape in shapes if isinstance(shape, list)):
        if (high, wide) == (-(-rows // block[0]), -(-cols // block[1])):
            length = math.gcd(cols, block[1])
            across = torch.arange(0, cols, length) // block[1]
            return values.repeat_interleave(block[0], 0)[:rows][:, across]
    message = f"scales [{high}, {wide}] do not divide a weight [{rows}, {cols}]"
    raise TQFormatError("CONTAINER.SHAPE", name, message)


def halves(data: torch.Tensor) -> torch.Tensor:
    """uint8 [..., n] -> [..., 2 n]: the lower four bits of each byte, then the upper ones."""
    return torch.stack([data & 15, data >> 4], -1).flatten(-2)


def _floats4(name: str, parts: Parts) -> Weight:
    codes, scales = halves(parts[".weight_packed"]), parts[".weight_scale"]
    shape = tuple(codes.shape)
    if ".weight_global_scale" not in parts:  # in bfloat16, which holds E2M1 times a power of two
        exponents = scales.view(torch.uint8)
        return Weight(name, shape, "BF16", (Stage(codes, E2M1, exponents, "F8_E8M0", ONE),))
    divisor = parts[".weight_global_scale"].float().reshape(1, 1)
    used = scales.view(torch.uint8).unique(return_inverse=True)[0].view(torch.float8_e4m3fn).float()[:, None]
    elements = torch.from_numpy(E2M1).t()
    want, product = (elements * (used / divisor)).bfloat16(), elements.double() * used.double() * (1 / divisor).double()
    if all(torch.equal((product * margin).float().bfloat16(), want) for margin in (1 - 2**-19, 1 + 2**-19)):
        stage = Stage(codes, E2M1, scales.view(torch.uint8), "F8_E4M3", 1 / divisor)
    else:  # near a tie of the rounding to bfloat16, multiplying by the inverse is not dividing
        stage = Stage(codes, E2M1, scales.float() / divisor)
    return Weight(name, shape, "BF16", (stage,))


def _floats8(name: str, parts: Parts, settings: dict[str, Any]) -> Weight:
    codes = parts[".weight"].view(torch.uint8)
    levels = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn).float()
    if not bool(levels[codes.int()].isfinite().all()):
        raise TQFormatError("DATA.NON_FINITE", name, "a weight is NaN")
    levels[~levels.isfinite()] = 0  # two entries that no code names
    scales = per_row(name, parts[".weight_scale"], len(codes), codes.shape[1], settings)
    return Weight(name, tuple(codes.shape), dtype_of(scales, name), (Stage(codes, levels[:, None], scales),))
