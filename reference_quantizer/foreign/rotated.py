"""Formats whose weights are rotated, or whose levels are learned: ParoQuant, TurboQuant+ for vLLM, LeanQuant.

ParoQuant (arXiv:2511.10645): the integers and layout of AWQ, `theta` [rounds, cols / 2] and `pairs` int16 [rounds, cols],
which count within each group, and `channel_scales` [1, cols]; y = W R (channel_scales x), where a round of R turns each pair
to (cos x_i + sin x_j, cos x_j - sin x_i). Here T = R, with the angles' signs turned, and the channel scales are column scales.

TurboQuant+ (turboquant-plus-vllm): `X.weight.tq_packed` uint8 [rows * groups, bytes of a group], low bits first, and
`X.weight.tq_norms` float32 [rows, groups]; w = norm * D1 H D2 c / sqrt(group). The signs D1 and D2 come from torch's
generator with the seed of tq_config.json, and are stored here; the levels c of a Gaussian of variance 1 / group are symmetric,
so that D2 goes into the codes. A layer with a learned rotation R (as SpinQuant's, arXiv:2405.16406) has `packed_weight`,
`norms`, `tq_centroids` and `rotation` [group, group] instead, and w = norm * R^t c.

LeanQuant (arXiv:2407.10032): `quant_grid` [rows, 2^bits] has the levels of each row, `weight_codes` uint8 [rows, cols / 2]
two codes a byte, the first in the upper half.

LeanQuant's weights have the dtype of the grid, and are the same. Those of the others are F32, and are the same to within the
rounding of a rotation in float32, which no two programs do alike.
"""

import itertools
import math
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from reference_quantizer.foreign.gptq import read_awq
from reference_quantizer.foreign.integers import dtype_of, need_parts, words_to_fields
from reference_quantizer.foreign.parts import Stage, Transform, Weight
from tqformat.load_quantized import TQFormatError

Parts = dict[str, torch.Tensor]


def read_paroquant(name: str, parts: Parts, settings: dict[str, Any]) -> Weight:
    """A weight of the quant_method paroquant."""
    need_parts(name, parts, ".theta", ".pairs", ".channel_scales")
    plain = read_awq(name, parts, settings)
    (stage,), cols, group = plain.stages, plain.shape[-1], int(settings.get("group_size", 128))
    theta, pairs = parts[".theta"].float(), parts[".pairs"].int()
    if theta.shape != (len(theta), cols // 2) or pairs.shape != (len(theta), cols) or cols % group:
        message = (
            f"theta {list(theta.shape)} and pairs {list(pairs.shape)} do not fit {cols} columns in groups of {group}"
        )
        raise TQFormatError("CONTAINER.SHAPE", name, message)
    first = torch.arange(cols, dtype=torch.int32) // group * group  # of each group
    pairs = (pairs + first).reshape(len(theta), cols // 2, 2)
    rotation = Transform("givens", cols, {"pairs": pairs, "angles": -theta})
    stage = replace(stage, transform=rotation)
    return Weight(name, plain.shape, "F32", (stage,), column_scale=parts[".channel_scales"].reshape(-1).contiguous())


def read_turboquant(name: str, parts: Parts, settings: dict[str, Any]) -> Weight:
    """A weight of a tq_config.json, or one with a learned rotation."""
    group = int(settings["group_size"])
    learned = ".packed_weight" in parts
    need_parts(name, parts, *((".norms", ".tq_centroids", ".rotation") if learned else (".weight.tq_norms",)))
    packed = parts[".packed_weight" if learned else ".weight.tq_packed"]
    norms = parts[".norms" if learned else ".weight.tq_norms"].float()
    rows, cols = norms.shape[0], norms.shape[1] * group
    if short := (settings.get("orig_in_dims") or {}).get(name):
        message = (
            f"its {short} columns were filled up to {cols}, and the rotation mixes both; requantize with a group size "
        )
        raise TQFormatError("UNSUPPORTED.LIBRARY", name, f"{message}that divides {short}")
    bits = packed.shape[1] * 8 // group
    if packed.shape != (rows * norms.shape[1], group * bits // 8) or not 1 <= bits <= 8:
        raise TQFormatError(
            "CONTAINER.SHAPE", name, f"packed {list(packed.shape)} and norms {list(norms.shape)} do not fit"
        )
    codes = words_to_fields(packed.reshape(rows, -1), bits, cols)
    if learned:
        transform = Transform("dense", group, {"matrix": parts[".rotation"]})
        levels = parts[".tq_centroids"].float()[:, None]
    else:
        inner, outer = generator_signs(group, int(settings.get("quantizer_seed", 42)))
        levels = gaussian_levels(bits, group)[:, None]
        codes[:, (outer < 0).repeat(norms.shape[1])] ^= (1 << bits) - 1  # -levels[k] = levels[2^bits - 1 - k]
        digits = np.packbits((inner < 0).numpy(), bitorder="little").tobytes().hex()
        transform = Transform("hadamard", group, settings={"factors": factors(name, group), "signs": digits})
    return Weight(name, (rows, cols), "F32", (Stage(codes, levels, norms, transform=transform),))


def generator_signs(group: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """D1 and D2, each [group] of +1 and -1, as torch's generator on the CPU gives them."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randint(0, 2, (group,), generator=generator) * 2 - 1 for _ in range(2))
    return first, second


def factors(name: str, group: int) -> list[int]:
    """Two factors of a power of two, or one."""
    if group & group - 1:
        message = f"groups of {group}, whose rotation is cut out of a larger one; requantize with a power of two"
        raise TQFormatError("UNSUPPORTED.LIBRARY", name, message)
    power = group.bit_length() - 1
    return [1 << (power + 1) // 2, 1 << power // 2] if power > 1 else [group]


def gaussian_levels(bits: int, group: int, rounds: int = 100) -> torch.Tensor:
    """The levels of TurboQuant+ for a Gaussian of variance 1 / group, ascending and symmetric, float32 [2^bits].

    One bit: the mean of a half; two: +-0.453 and +-1.51 deviations; more: Lloyd's algorithm from the quantiles on.
    """
    normal, count = NormalDist(), 1 << bits
    if bits <= 2:
        found = [-1.51, -0.453, 0.453, 1.51] if bits == 2 else [-math.sqrt(2 / math.pi), math.sqrt(2 / math.pi)]
    else:
        bounds = [normal.inv_cdf(i / count) for i in range(1, count)]
        for _ in range(rounds):
            ends = [-math.inf, *bounds, math.inf]
            found = []
            for low, high in itertools.pairwise(ends):
                low, high, sign = (low, high, 1) if low + high < 0 else (-high, -low, -1)  # where cdf is exact
                found.append(sign * (normal.pdf(low) - normal.pdf(high)) / (normal.cdf(high) - normal.cdf(low)))
            bounds = [(low + high) / 2 for low, high in itertools.pairwise(found)]
    return torch.tensor([level / math.sqrt(group) for level in found])


def read_leanquant(name: str, parts: Parts, settings: dict[str, Any]) -> Weight:
    """A weight of LeanQuant's non-uniform grids."""
    need_parts(name, parts, ".quant_grid", ".weight_codes")
    grid, data = parts[".quant_grid"], parts[".weight_codes"]
    grid, data = grid.reshape(-1, grid.shape[-1]), data.reshape(-1, data.shape[-1])
    if len(grid) != len(data) or grid.shape[1] > 16:
        message = f"quant_grid {list(grid.shape)} and weight_codes {list(data.shape)} do not fit"
        raise TQFormatError("CONTAINER.SHAPE", name, message)
    codes = torch.stack([data >> 4, data & 15], -1).flatten(-2)
    ones = torch.ones(len(grid), 1, dtype=torch.float16)
    return Weight(name, tuple(codes.shape), dtype_of(grid, name), (Stage(codes, grid[..., None].contiguous(), ones),))
