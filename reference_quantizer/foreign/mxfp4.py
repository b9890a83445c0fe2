"""MXFP4 as gpt-oss stores its experts: `X_blocks` uint8 [..., rows, groups, 16] and `X_scales` uint8 [..., rows, groups].

W = E2M1 * 2^(scale - 127), the first code of a byte in its lower half. transformers has these weights transposed, [experts,
cols, rows], so that the groups run down the columns, where a format with scales along the rows has no place for them. But
there are few different values, 0 and plus or minus 1 and 1.5 times a power of two: they become levels, and a weight a code
for one of them, of 6 bits or so. The values are the same; the size is not.
"""

from typing import Any

import torch

from reference_quantizer.foreign.gguf_blocks import E2M1
from reference_quantizer.foreign.integers import need_parts
from reference_quantizer.foreign.parts import Stage, Weight
from tqformat.load_quantized import TQFormatError


def read_mxfp4(name: str, parts: dict[str, torch.Tensor], settings: dict[str, Any]) -> Weight:
    """A weight of the quant_method mxfp4."""
    need_parts(name, parts, "_blocks", "_scales")
    blocks, exponents = parts["_blocks"], parts["_scales"]
    if blocks.shape[:-1] != exponents.shape or blocks.shape[-1] != 16:
        message = f"blocks {list(blocks.shape)} and scales {list(exponents.shape)} do not fit"
        raise TQFormatError("CONTAINER.SHAPE", name, message)
    used = exponents.unique()
    elements = torch.from_numpy(E2M1[:, 0])
    products = elements.double() * 2.0 ** (used.double()[:, None] - 127)  # [exponents, 16]
    levels, places = products.unique(return_inverse=True)
    if len(levels) > 256 or not bool(levels.bfloat16().isfinite().all()):
        message = (
            f"its exponents reach from {int(used.min())} to {int(used.max())}: too far for 8-bit codes; read the model "
        )
        message += "with transformers, which dequantizes it, and quantize that"
        raise TQFormatError("UNSUPPORTED.LIBRARY", name, message)
    rank = torch.zeros(256, dtype=torch.int64)
    rank[used.int()] = torch.arange(len(used))
    symbols = []
    for block, exponent in zip(blocks.flatten(0, -4), exponents.flatten(0, -3), strict=True):  # an expert at a time
        codes = torch.stack([block & 15, block >> 4], -1).flatten(-2)  # [rows, groups, 32]
        symbols.append(
            places[rank[exponent.int()][..., None], codes.int()].to(torch.uint8).flatten(-2).t().contiguous()
        )
    shape = (*blocks.shape[:-3], *symbols[0].shape)
    matrix = torch.cat(symbols)
    ones = torch.ones(len(matrix), 1, dtype=torch.float16)
    return Weight(name, shape, "BF16", (Stage(matrix, levels.float()[:, None], ones),))
