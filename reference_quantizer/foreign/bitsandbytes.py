"""bitsandbytes NF4 and FP4 (arXiv:2305.14314): W = absmax of a block * level, blocks running over the weight row by row.

`weight` uint8 [elements / 2, 1] has the first of two codes in the upper half, `weight.absmax` a float32 for each block, or
a byte where these are quantized themselves (nested): absmax = nested_quant_map[byte] * nested_absmax + nested_offset, which
is carried over as float32. `weight.quant_map` has the levels; `weight.quant_state.bitsandbytes__nf4` is JSON, as bytes.
The product is rounded to the dtype that is recorded there.
"""

import json
import math
from typing import Any

import torch

from reference_quantizer.foreign.integers import DTYPES, need_parts
from reference_quantizer.foreign.parts import Stage, Weight
from tqformat.load_quantized import TQFormatError

STATES = (".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4")


def read_bitsandbytes(name: str, parts: dict[str, torch.Tensor], settings: dict[str, Any]) -> Weight:
    """A weight of the quant_method bitsandbytes."""
    need_parts(name, parts, ".weight", ".weight.absmax", ".weight.quant_map")
    state = json.loads(bytes(next(parts[ending] for ending in STATES if ending in parts).tolist()))
    shape, block = tuple(state["shape"]), int(state["blocksize"])
    data = parts[".weight"].view(torch.uint8).flatten()
    count, cols = math.prod(shape), shape[-1]
    if 2 * len(data) != count or count % cols:
        raise TQFormatError("CONTAINER.SHAPE", name, f"{len(data)} bytes are no weight {list(shape)} of 4 bits")
    absmax = parts[".weight.absmax"]
    if ".weight.nested_absmax" in parts:
        inner = parts[".weight.nested_quant_map"].float()[absmax.int()]
        outer = parts[".weight.nested_absmax"].float().repeat_interleave(int(state["nested_blocksize"]))
        absmax = inner * outer[: len(inner)] + torch.tensor(state["nested_offset"], dtype=torch.float32)
    codes = torch.stack([data >> 4, data & 15], -1).reshape(-1, cols)
    length = math.gcd(cols, block)
    scales = absmax.float()[torch.arange(0, count, length) // block].reshape(len(codes), -1)
    dtype = DTYPES[getattr(torch, state["dtype"])]
    return Weight(name, shape, dtype, (Stage(codes, parts[".weight.quant_map"].float()[:, None], scales),))
