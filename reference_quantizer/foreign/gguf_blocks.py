"""The blocks of GGUF's tensor types as parts of a tqformat stage, without a loss: symbols, levels, scales, offsets.

A block is decoded to nothing here: its fields are only put in another order, so that

    value = (scale * outer_scale) * levels[symbol] + offset * outer_offset

gives what GGUF's own arithmetic gives, bit for bit in float32. IQ2_S is missing: its symbols would have 18 bits. The grids of
the IQ types come from the gguf package, which is imported for them.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from reference_quantizer.foreign.parts import Stage, integers
from tqformat.load_quantized import TQFormatError

Array = np.ndarray[Any, Any]


# ------------------------------------------------------------------------------------------------ fields of bits


def planes(data: Array, width: int) -> Array:
    """[..., k] unsigned -> [..., planes, k]: plane j holds the j-th field of `width` bits, from the lowest, of all k items."""
    shifts = np.arange(0, 8 * data.itemsize, width, dtype=data.dtype)
    return data[..., None, :] >> shifts[:, None] & data.dtype.type((1 << width) - 1)


def fields(data: Array, width: int) -> Array:
    """[..., k] unsigned -> [..., k * fields]: all fields of `width` bits of the first item, then those of the second."""
    return planes(data, width).swapaxes(-1, -2).reshape(*data.shape[:-1], -1)


def flat(data: Array) -> Array:
    return data.reshape(len(data), -1)


def halves(data: Array) -> Array:
    return data.copy().view("<f2")


def words(data: Array, dtype: str) -> Array:
    return data.copy().view(dtype)


# ------------------------------------------------------------------------------------------------ 32 weights, one scale


def q4_0(d: Array, q: Array) -> Stage:
    return Stage(flat(planes(q, 4)), integers(-8, 7), halves(d))


def q4_1(d: Array, m: Array, q: Array) -> Stage:
    return Stage(flat(planes(q, 4)), integers(0, 15), halves(d), offsets=halves(m))


def q5_0(d: Array, high: Array, q: Array) -> Stage:
    return Stage(flat(planes(q, 4)) | fields(high, 1) << 4, integers(-16, 15), halves(d))


def q5_1(d: Array, m: Array, high: Array, q: Array) -> Stage:
    return Stage(flat(planes(q, 4)) | fields(high, 1) << 4, integers(0, 31), halves(d), offsets=halves(m))


def q8_0(d: Array, q: Array) -> Stage:
    return Stage(q ^ np.uint8(128), integers(-128, 127), halves(d))  # two's complement


def iq4_nl(d: Array, q: Array) -> Stage:
    return Stage(flat(planes(q, 4)), _nonlinear(), halves(d))


# ------------------------------------------------------------------------------------------------ 4-bit floats

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)[:, None]
ONE = np.ones((1, 1), dtype=np.float32)


def mxfp4(e: Array, q: Array) -> Stage:
    return Stage(flat(planes(q, 4)), E2M1, e, "F8_E8M0", ONE)


def nvfp4(d: Array, q: Array) -> Stage:
    d = np.where(d == 0x7F, 0, d & 0x7F).astype(np.uint8)  # scales without a sign; GGUF reads the NaN as 0
    return Stage(flat(planes(q.reshape(-1, 4, 8), 4)), E2M1, d, "F8_E4M3", ONE)


# ------------------------------------------------------------------------------------------------ 256 weights, two levels of scales


def q2_k(scales: Array, q: Array, d: Array, m: Array) -> Stage:
    symbols = flat(planes(q.reshape(-1, 2, 32), 2))
    return Stage(symbols, integers(0, 3), scales & 15, "U8", halves(d), scales >> 4, -halves(m))


def q3_k(high: Array, q: Array, low_scales: Array, high_scales: Array, d: Array) -> Stage:
    symbols = flat(planes(q.reshape(-1, 2, 32), 2)) | flat(planes(high, 1)) << 2
    scales = flat(planes(low_scales, 4)) | flat(planes(high_scales, 2)) << 4
    return Stage(symbols, integers(-4, 3), _less_32(scales), "I8", halves(d))


def q4_k(d: Array, m: Array, scales: Array, q: Array) -> Stage:
    scales, offsets = _six_bits(scales)
    symbols = flat(planes(q.reshape(-1, 4, 32), 4))
    return Stage(symbols, integers(0, 15), scales, "U8", halves(d), offsets, -halves(m))


def q5_k(d: Array, m: Array, scales: Array, high: Array, q: Array) -> Stage:
    low = q4_k(d, m, scales, q)
    return replace(low, symbols=low.symbols | flat(planes(high, 1)) << 4, levels=integers(0, 31))


def q6_k(q: Array, high: Array, scales: Array, d: Array) -> Stage:
    symbols = flat(planes(q.reshape(-1, 2, 64), 4)) | flat(planes(high.reshape(-1, 2, 32), 2)) << 4
    return Stage(symbols, integers(-32, 31), scales.view(np.int8), "I8", halves(d))


def iq4_xs(d: Array, high_scales: Array, low_scales: Array, q: Array) -> Stage:
    scales = fields(low_scales, 4) | fields(high_scales, 2) << 4
    return Stage(flat(planes(q.reshape(-1, 8, 16), 4)), _nonlinear(), _less_32(scales), "I8", halves(d))


def _six_bits(data: Array) -> tuple[Array, Array]:
    """Eight scales and eight offsets of 6 bits in 12 bytes: the last four of each have their upper two bits with the first."""
    first, second, rest = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = np.concatenate([first & 63, rest & 15 | first >> 6 << 4], axis=1)
    return scales, np.concatenate([second & 63, rest >> 4 | second >> 6 << 4], axis=1)


def _less_32(scales: Array) -> Array:
    return (scales.astype(np.int16) - 32).astype(np.int8)


# ------------------------------------------------------------------------------------------------ three levels


def tq1_0(q: Array, rest: Array, d: Array) -> Stage:
    def trits(data: Array, count: int) -> Array:
        """Digits to the base 3, plane by plane; a byte is its number times 256 / 243, rounded up."""
        shifted = data[:, None, :] * (3 ** np.arange(count)).astype(np.uint8)[:, None]
        return flat(shifted.astype(np.uint16) * 3 >> 8)

    symbols = np.concatenate([trits(q[:, :32], 5), trits(q[:, 32:], 5), trits(rest, 4)], axis=1)
    return Stage(symbols, integers(-1, 1), halves(d))


def tq2_0(q: Array, d: Array) -> Stage:
    symbols = flat(planes(q.reshape(-1, 2, 32), 2))
    return Stage(symbols, integers(-1, 2), halves(d))  # quantizers use three of the four levels


# ------------------------------------------------------------------------------------------------ grids: vectors of 4 or 8


def iq2_xxs(d: Array, q: Array) -> Stage:
    data = q.reshape(-1, 8, 8)  # per 32 weights: 4 grid indices, then 4 times 7 bits of signs and 4 bits of scale
    last = words(data[:, :, 4:], "<u4")
    signs = last >> np.arange(0, 28, 7, dtype=np.uint32) & 127
    symbols = data[:, :, :4] | signs.astype(np.uint16) << 8
    return Stage(flat(symbols), _signed("IQ2_XXS", _even_signs(), 8), _odd(last >> 28), "U8", halves(d))


def iq2_xs(d: Array, q: Array, scales: Array) -> Stage:
    levels = _signed("IQ2_XS", _even_signs(), 8)
    return Stage(words(q, "<u2"), levels, _odd(fields(scales, 4)), "U8", halves(d))


def iq3_xxs(d: Array, q: Array, rest: Array) -> Stage:
    last = words(rest, "<u4")[..., None]
    index = last >> np.arange(0, 28, 7, dtype=np.uint32) & 127
    signs = fields(flat(_even_signs()[index]), 4)
    return Stage(
        q | signs.astype(np.uint16) << 8, _signed("IQ3_XXS", np.arange(16), 4), _odd(last >> 28), "U8", halves(d)
    )


def iq3_s(d: Array, q: Array, high: Array, signs: Array, scales: Array) -> Stage:
    symbols = q | fields(high, 1).astype(np.uint16) << 8 | fields(signs, 4).astype(np.uint16) << 9
    return Stage(symbols, _signed("IQ3_S", np.arange(16), 1), _odd(fields(scales, 4)), "U8", halves(d))


def iq1_s(d: Array, q: Array, rest: Array) -> Stage:
    last = words(rest, "<u2")[..., None]  # per 32 weights: 4 times 3 bits of index, 3 bits of scale, the shift's sign
    index = last >> np.arange(0, 12, 3, dtype=np.uint16) & 7
    symbols = q | flat(index | last >> 15 << 3) << 8
    return Stage(symbols, _shifted(), _odd(last >> 12 & 7), "U8", halves(d))


def iq1_m(q: Array, high: Array, rest: Array) -> Stage:
    last = words(rest, "<u2")  # each: 4 times 3 bits of scale, 4 bits of d
    d = (last >> 12 << np.arange(0, 16, 4, dtype=np.uint16)).sum(axis=1, keepdims=True, dtype=np.uint16)
    scales = last[..., None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7
    return Stage(q | fields(high, 4).astype(np.uint16) << 8, _shifted(), _odd(scales), "U8", d.view("<f2"))


def _odd(scales: Array) -> Array:
    """The scales 1, 3, 5, ... that s = 0, 1, 2, ... means: 2 s + 1."""
    return flat(2 * scales + 1).astype(np.uint8)


def _grid(kind: str) -> Array:
    """float32 [entries, p], from the gguf package."""
    from gguf import quants

    table: Any = getattr(quants, kind)
    table.init_grid()
    grid: Array = table.grid
    return grid.reshape(table.grid_shape)


def _even_signs() -> Array:
    """uint8 [128]: seven signs as they are, and the eighth so that an even number of them is negative."""
    index = np.arange(128, dtype=np.uint8)
    return index | (fields(index[:, None], 1).sum(axis=1).astype(np.uint8) & 1) << 7


def _signed(kind: str, signs: Array, unit: int) -> Array:
    """float32 [signs * grid, p]: each pattern of signs, a bit for an element, with the whole grid in units of 1 / unit."""
    grid = _grid(kind) / np.float32(unit)
    bits = signs[:, None] >> np.arange(grid.shape[1]) & 1
    return (grid * (1 - 2 * bits[:, None, :])).reshape(-1, grid.shape[1]).astype(np.float32)


def _shifted() -> Array:
    """float32 [4096, 8]: the grid of IQ1_S and IQ1_M up by 1/8, then down by 1/8."""
    return np.concatenate([_grid("IQ1_S") + np.float32(0.125), _grid("IQ1_S") - np.float32(0.125)])


def _nonlinear() -> Array:
    from gguf import quants

    return np.array(quants.IQ4_NL.kvalues, dtype=np.float32)[:, None]


# ------------------------------------------------------------------------------------------------ all of them

TYPES: dict[str, tuple[int, tuple[int, ...], Callable[..., Stage]]] = {  # weights in a block, bytes of its fields
    "Q4_0": (32, (2, 16), q4_0),
    "Q4_1": (32, (2, 2, 16), q4_1),
    "Q5_0": (32, (2, 4, 16), q5_0),
    "Q5_1": (32, (2, 2, 4, 16), q5_1),
    "Q8_0": (32, (2, 32), q8_0),
    "IQ4_NL": (32, (2, 16), iq4_nl),
    "MXFP4": (32, (1, 16), mxfp4),
    "NVFP4": (64, (4, 32), nvfp4),
    "Q2_K": (256, (16, 64, 2, 2), q2_k),
    "Q3_K": (256, (32, 64, 8, 4, 2), q3_k),
    "Q4_K": (256, (2, 2, 12, 128), q4_k),
    "Q5_K": (256, (2, 2, 12, 32, 128), q5_k),
    "Q6_K": (256, (128, 64, 16, 2), q6_k),
    "IQ4_XS": (256, (2, 2, 4, 128), iq4_xs),
    "TQ1_0": (256, (48, 4, 2), tq1_0),
    "TQ2_0": (256, (64, 2), tq2_0),
    "IQ2_XXS": (256, (2, 64), iq2_xxs),
    "IQ2_XS": (256, (2, 64, 8), iq2_xs),
    "IQ3_XXS": (256, (2, 64, 32), iq3_xxs),
    "IQ3_S": (256, (2, 64, 8, 32, 4), iq3_s),
    "IQ1_S": (256, (2, 32, 16), iq1_s),
    "IQ1_M": (256, (32, 16, 8), iq1_m),
}


def read_blocks(kind: str, data: Array) -> Stage:
    """The parts of a tensor of GGUF type `kind`, whose bytes are uint8 [rows, bytes of a row].

    UNSUPPORTED.LIBRARY for a type that the format cannot express, CONTAINER.SHAPE for rows that are no whole blocks.
    """
    if kind not in TYPES:
        raise TQFormatError("UNSUPPORTED.LIBRARY", kind, f"expected one of the GGUF types {', '.join(TYPES)}")
    _, sizes, read = TYPES[kind]
    rows, length = data.shape
    if length % sum(sizes):
        raise TQFormatError("CONTAINER.SHAPE", kind, f"expected rows of {sum(sizes)}-byte blocks, got {length} bytes")
    pieces = np.split(data.reshape(-1, sum(sizes)), np.cumsum(sizes)[:-1], axis=1)
    found = read(*pieces)

    def by_row(part: Array | None) -> Array | None:
        return part if part is None or part is ONE else part.reshape(rows, -1)

    return replace(
        found,
        symbols=found.symbols.reshape(rows, -1),
        scales=found.scales.reshape(rows, -1),
        outer_scales=by_row(found.outer_scales),
        offsets=by_row(found.offsets),
        outer_offsets=by_row(found.outer_offsets),
    )
