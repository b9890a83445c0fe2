"""Vector codes: each symbol selects p weights at once from a codebook made for normally distributed ones (p = 2, 4 or 8).

HIGGS (arXiv:2411.17525) rounds rotated weights to such codebooks, found by Lloyd's algorithm in p dimensions. At p = 8 and 2
bits there are 2^16 entries, and QuIP# (arXiv:2402.04396, section 4.2) takes them from the lattice E8, the densest packing there; here
the points of a shifted E8 that are nearest to 0 are what Lloyd's algorithm starts from.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reference_quantizer.codes.codebook import kept_levels
from reference_quantizer.codes.trellis import gaussian_samples
from reference_quantizer.libraries import missing_library

METHOD = "vector-gaussian-1"  # names the training; another one needs another name
E8_RADIUS = 3.3  # of the farthest of 2^16 points of E8: the least error for values of variance 1
LARGE = 4096  # entries beyond which few iterations are made
ROWS = 64  # of a weight that are encoded together
MEMORY = 1 << 28  # bytes of scores at a time, where the search is a product of matrices


# ------------------------------------------------------------------------------------------------ codebooks


@functools.cache
def vector_levels(bits: int, dimension: int) -> np.ndarray:
    """The codebook of `bits` a weight for normally distributed values of variance 1: float32 [2^(bits p), p], read-only.

    Its values are float16 numbers. It is trained at the first use (seconds up to 4096 entries, minutes beyond) and kept in the user's cache.
    """
    name, shape = f"vector/{METHOD}-p{dimension}-b{bits}", (1 << bits * dimension, dimension)
    return kept_levels(name, shape, lambda: train_codebook(bits, dimension))


def train_codebook(
    bits: int, dimension: int, *, iterations: int | None = None, samples: int = 24, seed: int = 1
) -> np.ndarray:
    """What `vector_levels` keeps: float32 [2^(bits p), p], neighbours in space lying near each other in the list.

    `iterations` times, new values (`samples` vectors for each entry, 2^17 at least) are encoded, and each entry moves to the mean of
    its vectors. The start is E8's for 2^16 entries in 8 dimensions, else random with the density that is best for many entries,
    proportional to f^(p/(p+2)), f being that of the values (Zador 1982): normal, too, of variance (p+2)/p.
    """
    entries, p = 1 << bits * dimension, dimension
    rng = np.random.default_rng(seed)
    if (entries, p) == (1 << 16, 8):
        levels, default = e8_points(), 4
    else:
        levels = gaussian_samples(entries * p, rng).reshape(entries, p) * np.float32(np.sqrt((p + 2) / p))
        default = 100 if entries <= LARGE else 20
    count = max(1 << 17, samples * entries)
    for _ in range(default if iterations is None else iterations):
        levels = arrange(levels)
        x = gaussian_samples(count * p, rng).reshape(count, p)
        symbols = nearest(torch.from_numpy(x), torch.from_numpy(levels)).numpy()
        used = np.bincount(symbols, minlength=entries)[:, None]
        total = np.stack([np.bincount(symbols, column, minlength=entries) for column in x.T], 1)
        levels = np.divide(total, used, out=levels.astype(np.float64), where=used > 0).astype(np.float32)
    return arrange(levels).astype(np.float16).astype(np.float32)


def e8_points() -> np.ndarray:
    """The 2^16 points of E8 + (1/4, ..., 1/4) nearest to 0, scaled to the least error: float32 [65536, 8].

    E8 is D8 (integers with an even sum) and D8 + 1/2. So E8 + 1/4 is D8 + 1/4 and its negative; of points that are
    equally near, the first in order of their coordinates are taken.
    """
    axis, limit = np.arange(-4, 4) + 0.25, 12.0  # enough for more than 2^15 points of D8 + 1/4
    points = np.zeros((1, 0))
    for k in range(8):
        points = np.concatenate([np.repeat(points, len(axis), 0), np.tile(axis, len(points))[:, None]], 1)
        points = points[np.square(points).sum(1) <= limit - (7 - k) / 16]  # what is left adds 1/16 at least
    points = points[(points - 0.25).sum(1) % 2 == 0]
    norms = np.square(points).sum(1)
    points = points[np.lexsort([*points.T[::-1], norms])[: 1 << 15]]
    points *= E8_RADIUS / np.linalg.norm(points[-1])
    return np.concatenate([points, -points]).astype(np.float32)


def arrange(levels: np.ndarray) -> np.ndarray:
    """The entries [entries, p] in an order that keeps neighbours together: halved again and again across the widest axis."""
    if len(levels) <= 2:
        return levels
    axis = np.argmax(np.ptp(levels, 0))
    levels = levels[np.argsort(levels[:, axis], kind="stable")]
    half = len(levels) // 2
    return np.concatenate([arrange(levels[:half]), arrange(levels[half:])])


# ------------------------------------------------------------------------------------------------ search


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """The entry of `levels` [entries, p] with the least Euclidean distance to each x [n, p] float32: int32 [n]. Exact up to rounding.

    UNSUPPORTED.LIBRARY on a CPU without numba.
    """
    if x.device.type != "cpu":
        return nearest_torch(x, levels)
    symbols = np.empty(len(x), np.int32)
    _loops().nearest_entries(np.ascontiguousarray(x.numpy()), *_boxes(levels), symbols)
    return torch.from_numpy(symbols)


def nearest_torch(x: Tensor, levels: Tensor) -> Tensor:
    """`nearest` by products of matrices alone, for a GPU."""
    offsets = levels.square().sum(1) / -2
    chunks = x.split(max(1, MEMORY // (4 * len(levels))))
    return torch.cat([torch.addmm(offsets, chunk, levels.T).argmax(1).int() for chunk in chunks])


def search(y: Tensor, scales: Tensor, upper: Tensor, levels: Tensor) -> Tensor:
    """The symbols int32 [rows, cols / p] of `y` [rows, cols] with `scales` [rows, cols / G], chosen with error feedback.

    `upper` [cols, cols] is that of feedback.inverse_factor. A block b of p columns is rounded to the nearest entry, and what it misses
    is subtracted from the columns that follow, times U_bb⁻¹ U_b: what is then left of their errors is least (block LDLQ, QuIP#, arXiv:2402.04396,
    section 4.1).
    """
    p, cols = levels.shape[1], y.shape[1]
    blocks = upper.reshape(cols // p, p, cols // p, p).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # U_bb
    factors = torch.linalg.solve_triangular(blocks, upper.reshape(-1, p, cols), upper=True).reshape(cols, cols)
    return (_search_loops if y.device.type == "cpu" else search_torch)(y, scales, factors, levels)


def search_torch(y: Tensor, scales: Tensor, factors: Tensor, levels: Tensor) -> Tensor:
    """`search` by torch alone, for a GPU; `factors` [cols, cols] hold U_bb⁻¹ U_b of all blocks."""
    (rows, cols), p = y.shape, levels.shape[1]
    group = cols // scales.shape[1]
    targets, symbols = y.clone(), torch.empty(rows, cols // p, dtype=torch.int32, device=y.device)
    divisors = scales.masked_fill(scales == 0, torch.inf)  # so that targets without a scale become 0
    for i in range(0, cols, p):
        block, k = targets[:, i : i + p], i // group
        found = nearest_torch(block / divisors[:, k, None], levels)
        symbols[:, i // p] = found
        error = block - levels[found] * scales[:, k, None]
        targets[:, i + p :].addmm_(error, factors[i : i + p, i + p :], alpha=-1)
    return symbols


def _search_loops(y: Tensor, scales: Tensor, factors: Tensor, levels: Tensor) -> Tensor:
    loops, (rows, cols) = _loops(), y.shape
    symbols = np.empty((rows, cols // levels.shape[1]), np.int32)
    boxes, weights = _boxes(levels), factors.numpy()

    def encode_rows(first: int) -> None:
        span = slice(first, first + ROWS)
        targets = np.ascontiguousarray(y[span].T.numpy())  # [cols, rows], changed by the loops
        found = np.empty((symbols.shape[1], targets.shape[1]), np.int32)
        loops.encode_vector(targets, np.ascontiguousarray(scales[span].T.numpy()), weights, *boxes, found)
        symbols[span] = found.T

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(encode_rows, range(0, rows, ROWS)))
    return torch.from_numpy(symbols)


def _boxes(levels: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The levels [p, entries], and the least and largest coordinates [p, blocks] in each block of entries."""
    table, first = levels.numpy(), np.arange(0, len(levels), _loops().SIZE)
    parts = table, np.minimum.reduceat(table, first), np.maximum.reduceat(table, first)
    book, low, high = (np.ascontiguousarray(part.T) for part in parts)
    return book, low, high


def _loops() -> Any:
    try:
        from reference_quantizer.codes import vector_search  # and so numba
    except ImportError:
        raise missing_library("vector codes", "numba") from None
    return vector_search
