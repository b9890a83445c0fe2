"""Products with packed weights on a GPU, for few rows of activations; imported only for weights that lie on one.

The counterpart of tqformat_kernels for CPUs: `stage` takes the parts of a stage and gives what multiplies with them, or None
for settings that have no kernel here. Triton comes with torch for CUDA.

Both kernels read a stream E symbols at a time, from two neighbouring words of 32 bits; sums stay in registers over a loop,
and what is left to add (a few parts of the columns) is added by torch. Levels are read from a table, or computed where the
table is that of [TQ-BOOK-8], as QTIP computes them (arXiv:2406.11235, section 3.1.1). Sums are binary32 throughout
[TQ-FUSE-2].
"""

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048  # of the weight that a program of _down has in its registers at a time; _along has twice as many
PROGRAMS = 1024  # from which on columns are not divided among more of them
BATCH = 4  # activations that share one unpacking
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _levels(symbol, levels, COMPUTED: tl.constexpr, DP4A: tl.constexpr):
    """The levels of symbols uint32, float32."""
    if COMPUTED:
        product = symbol * 0x83DCD12D
        if DP4A:  # the sum of the bytes in the fraction of 2^23, one instruction
            code: tl.constexpr = "dp4a.u32.u32 $0, $1, 0x01010101, 0x4B000000;"
            total = tl.inline_asm_elementwise(code, "=r,r", [product], dtype=tl.uint32, is_pure=True, pack=1)
        else:
            pairs = (product & 0x00FF00FF) + ((product >> 8) & 0x00FF00FF)
            total = ((pairs * 0x00010001) >> 16) | 0x4B000000
        return total.to(tl.float32, bitcast=True) * 0.0078125 - 65539.984375  # (2^23 + 510) / 128; both steps are exact
    return tl.load(levels + symbol.to(tl.int32)).to(tl.float32)


@triton.jit
def _bits(stream, low, high, shift, inside, BITS: tl.constexpr, WINDOW: tl.constexpr, E: tl.constexpr):
    """The bits of E symbols, from words `low` and `high` of a stream, beginning at bit `shift` of the first; uint32 or uint64."""
    first = tl.load(stream + low, inside, 0).to(tl.uint32, bitcast=True)
    if WINDOW == BITS and 32 % (E * BITS) == 0:  # all in one word
        return first >> shift
    both = first.to(tl.uint64) | (tl.load(stream + high, inside, 0).to(tl.uint32, bitcast=True).to(tl.uint64) << 32)
    both = both >> shift.to(tl.uint64)
    return both.to(tl.uint32) if (E - 1) * BITS + WINDOW <= 32 else both


@triton.jit
def _down(
    codes,
    levels,
    scales,
    z,
    parts,
    rows,
    cols,
    batch,
    tile_rows,
    span,
    G,
    BITS: tl.constexpr,
    WINDOW: tl.constexpr,
    COMPUTED: tl.constexpr,
    DP4A: tl.constexpr,
    FINE: tl.constexpr,
    E: tl.constexpr,
    Q: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
):
    """Tiles [tile_rows, 1]: rows of a part of a tile, times `span` columns, C at a time.

    Axes of what is in registers: [M activations, Q groups of E rows, C columns, E]; joined halves stay in one thread.
    """
    first, begin, part = tl.program_id(0) * Q * E, tl.program_id(1) * span, tl.program_id(1)
    m, q, e = tl.program_id(2) * M + tl.arange(0, M), tl.arange(0, Q), tl.arange(0, E)
    words, bit = tile_rows * BITS // 32, (first % tile_rows + q * E) * BITS
    low, shift = bit // 32, bit % 32
    high = (low + 1) % words
    row = first + q[:, None] * E + e[None, :]  # [Q, E]
    total = tl.zeros([M, Q, C, E], tl.float32)
    for a in range(begin, tl.minimum(begin + span, cols), C):
        c = a + tl.arange(0, C)
        inside = c < cols
        stream = codes + ((first // tile_rows).to(tl.int64) * cols + c) * words
        bits = _bits(stream[None, :], low[:, None], high[:, None], shift[:, None], inside[None, :], BITS, WINDOW, E)
        if E == 8:
            bits = tl.join(bits, bits >> 4 * BITS)
        bits = tl.join(bits, bits >> 2 * BITS)
        bits = tl.reshape(tl.join(bits, bits >> BITS), [Q, C, E])
        value = _levels(bits.to(tl.uint32) & ((1 << WINDOW) - 1), levels, COMPUTED, DP4A)
        if FINE:  # a vector is shorter than a row
            at = row.to(tl.int64)[:, None, :] * (cols // G) + (c // G)[None, :, None]
            value *= tl.load(scales + at, inside[None, :, None], 0).to(tl.float32)
        x = tl.load(z + m[:, None] * cols + c[None, :], (m < batch)[:, None] & inside[None, :], 0)
        total += value[None, :, :, :] * x[:, None, :, None]
    y = tl.sum(total, 2)
    if not FINE:
        y *= tl.load(scales + row).to(tl.float32)[None, :, :]
    at = (part.to(tl.int64) * batch + m)[:, None, None] * rows + row[None, :, :]
    tl.store(parts + at, y, (m < batch)[:, None, None])


@triton.jit
def _along(
    codes,
    levels,
    scales,
    z,
    parts,
    rows,
    cols,
    batch,
    span,
    G,
    BITS: tl.constexpr,
    WINDOW: tl.constexpr,
    COMPUTED: tl.constexpr,
    DP4A: tl.constexpr,
    FINE: tl.constexpr,
    E: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
):
    """Tiles [1, cols]: R rows, times `span` columns, Q groups of E at a time. Axes: [M activations, R rows, Q groups]."""
    row, begin, part = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * span, tl.program_id(1)
    m, q = tl.program_id(2) * M + tl.arange(0, M), tl.arange(0, Q)
    words, real = cols * BITS // 32, row < rows
    stream = codes + row.to(tl.int64) * words
    total = tl.zeros([M, R, Q], tl.float32)
    for a in range(begin, tl.minimum(begin + span, cols), Q * E):
        bit, inside = (a + q * E) * BITS, real[:, None] & (a + q * E < cols)[None, :]
        low = bit // 32
        high = tl.where(low + 1 < words, low + 1, 0)
        shift = (bit % 32)[None, :]
        bits = _bits(stream[:, None], low[None, :], high[None, :], shift, inside, BITS, WINDOW, E)  # [R, Q]
        for e in tl.static_range(E):
            c = a + q * E + e
            value = _levels((bits >> e * BITS).to(tl.uint32) & ((1 << WINDOW) - 1), levels, COMPUTED, DP4A)
            if FINE:
                at = row.to(tl.int64)[:, None] * (cols // G) + (c // G)[None, :]
                value *= tl.load(scales + at, real[:, None] & (c < cols)[None, :], 0).to(tl.float32)
            x = tl.load(z + m[:, None] * cols + c[None, :], (m < batch)[:, None] & (c < cols)[None, :], 0)
            total += value[None, :, :] * x[:, None, :]
    y = tl.sum(total, 2)
    if not FINE:
        y *= tl.load(scales + row, real, 0).to(tl.float32)[None, :]
    at = (part.to(tl.int64) * batch + m)[:, None] * rows + row[None, :]
    tl.store(parts + at, y, (m < batch)[:, None] & real[None, :])


@dataclass(frozen=True)
class Stage:
    """One stage of a quantized weight [rows, cols], all of whose arrays lie on one device."""

    codes: Tensor  # int32 [tiles, words]
    levels: Tensor  # [2^window]; float16 where that holds them
    scales: Tensor  # [rows, cols / G]
    offsets: Tensor | None  # [rows, cols / G]
    shape: tuple[int, int]
    bits: int
    window: int
    tile_rows: int  # 1: a tile is a row
    computed: bool  # whether the levels are those of [TQ-BOOK-8]

    def product(self, z: Tensor) -> Tensor:
        """y[b, r] = sum over c of (scale * level + offset)[r, c] * z[b, c]: float32 [batch, cols] -> [batch, rows]."""
        (rows, cols), batch, groups = self.shape, len(z), self.scales.shape[1]
        if not rows or not batch:
            return z.new_zeros(batch, rows)
        down, z = self.tile_rows > 1, z.contiguous()
        e, m = _group(self.bits, self.window), min(BATCH, triton.next_power_of_2(batch))
        width = math.gcd(self.tile_rows, 256) if down else min(256, triton.next_power_of_2(max(cols, e)))
        lanes = ELEMENTS * (1 if down else 2) // width  # columns, or rows, that a program has at a time
        height, step = (width, lanes) if down else (lanes, width)  # rows of a program, columns at a time
        grid = -(-rows // height), -(-batch // m)
        steps = -(-cols // step)
        span = step * -(-steps // min(steps, max(1, PROGRAMS // math.prod(grid))))
        parts = z.new_empty(-(-cols // span), batch, rows)
        sizes = rows, cols, batch, *([self.tile_rows] if down else []), span, cols // groups
        dp4a = z.is_cuda and torch.version.cuda is not None
        settings = self.bits, self.window, self.computed, dp4a, groups > 1, e, width // e, lanes, m
        with torch.cuda.device_of(z):  # type: ignore[no-untyped-call]
            kernel = (_down if down else _along)[(grid[0], len(parts), grid[1])]
            kernel(self.codes, self.levels, self.scales, z, parts, *sizes, *settings)
        y = parts.sum(0) if len(parts) > 1 else parts[0]
        if self.offsets is not None:
            y += z.reshape(batch, groups, -1).sum(2) @ self.offsets.float().t()
        return y


def stage(
    codes: Tensor,
    levels: Tensor,
    scales: Tensor,
    *,
    shape: tuple[int, int],
    bits: int,
    window: int | None = None,
    vector_length: int | None = None,
    tile: tuple[int, int] | None = None,
    outer_scales: Tensor | None = None,
    offsets: Tensor | None = None,
    outer_offsets: Tensor | None = None,
) -> Stage | None:
    """A stage from its parts, as tqformat_kernels.Stage takes them; None where no kernel suits.

    Those are scalar codebooks, not per row, tiles [1, cols] or [tr, 1] with tr a multiple of 32, whole words of codes in a
    tile, and scales and offsets of 16 or 32 bits.
    """
    (rows, cols), window, (tile_rows, tile_cols) = shape, window or bits, tile or (1, shape[1])
    book = levels.detach().float().cpu()
    factors = [scales, *([] if offsets is None else [offsets])]
    suits = (
        (book.dim() == 1 or (book.dim() == 2 and book.shape[1] == 1))
        and (tile_cols == cols if tile_rows == 1 else tile_cols == 1 and tile_rows % 32 == 0)
        and codes.dim() == 2
        and codes.shape[1] % 4 == 0
        and _group(bits, window) > 0
        and outer_scales is None
        and outer_offsets is None
        and all(part.dtype in FLOATS for part in factors)
    )
    if not suits:
        return None
    full = torch.zeros(1 << window)  # so that no symbol points outside
    full[: len(book)] = book.flatten()
    words = codes.contiguous() if codes.storage_offset() % 4 == 0 else codes.clone()
    groups = cols // (vector_length or cols)
    scales = scales.reshape(rows, groups).contiguous()
    offsets = offsets.reshape(rows, groups).contiguous() if offsets is not None else None
    arrays = words.view(torch.int32), _table(full, codes.device), scales, offsets
    return Stage(*arrays, (rows, cols), bits, window, tile_rows, torch.equal(full, byte_sum(1 << window)))


_tables: weakref.WeakValueDictionary[Any, Tensor] = weakref.WeakValueDictionary()


def _table(levels: Tensor, device: torch.device) -> Tensor:
    """Levels float32 on `device`, as float16 where that holds them; one tensor for all stages that have the same."""
    key = levels.numpy().tobytes(), device
    found = _tables.get(key)
    if found is None:
        half = levels.half()
        found = _tables[key] = (half if torch.equal(half.float(), levels) else levels).to(device)
    return found


def byte_sum(entries: int) -> Tensor:
    """The levels of [TQ-BOOK-8], float32 [entries]."""
    product = torch.arange(entries) * 0x83DCD12D
    return (torch.stack([product >> 8 * k & 255 for k in range(4)]).sum(0) - 510) / 128


def _group(bits: int, window: int) -> int:
    """How many symbols are read from two words at once, wherever in a word they begin: 8, 4, or 0 if not even 4."""
    fits = [n for n in (8, 4) if 32 - math.gcd(32, n * bits) + (n - 1) * bits + window <= 64]
    return fits[0] if fits else 0
