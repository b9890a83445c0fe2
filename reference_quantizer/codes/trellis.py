"""Trellis codes [TQ-CODE-6]: the tail-biting path nearest to the targets, and codebooks for it.

A tile's n symbols are windows of `window` bits that move on by `bits` along a stream of n * bits bits, which ends where it
begins. The path of least squared error is found with the Viterbi algorithm (Forney 1973) in two runs, as QTIP does
(arXiv:2406.11235, section 3.2 and algorithm 4): the first one, over the neighbourhood of the stream's begin, finds the bits
that are shared there; the second one starts and ends with these. Needs numba; for tensors on a GPU `search_torch` has the
same two runs without it.
"""

import functools
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from reference_quantizer.codes.codebook import kept_levels
from reference_quantizer.libraries import missing_library
from tqformat.load_quantized import require

METHOD = "trellis-gaussian-1"  # names the training; another one needs another name
COMPUTED = "byte-sum"  # the origin of computed levels [TQ-BOOK-8]
MULTIPLIER = 0x83DCD12D
SHIPPED = Path(__file__).with_name("codebooks.npz")  # name -> the first half of its levels, float16


def encode_tiles(
    x: np.ndarray,
    levels: np.ndarray,
    bits: int,
    window: int,
    weights: np.ndarray | None = None,
    *,
    exact: bool = False,
    passes: int = 1,
    threads: int | None = None,
) -> np.ndarray:
    """The symbols whose levels are nearest to x [tiles, n] float32: uint16 [tiles, n], as tqformat.pack takes them.

    `levels` is float32 [2^window], in the units of x. The sum over each tile of weights * (x - level)^2 is made small;
    `weights` [tiles, n] are positive. By default the path through each tile's begin is the likeliest one, and the best
    path through that is found: at 2 bits a mean error within 0.1 % of the least for 256 symbols or more. Each of
    `passes` after the first does that again in the middle of the tile, the next one at its begin; none makes it worse.
    `exact` finds the best path of all, in 2^(window - bits) times the time.

    TQFormatError: SCHEMA.VALUE for settings and shapes that do not fit, DATA.NON_FINITE, UNSUPPORTED.LIBRARY.
    """
    x, levels = np.ascontiguousarray(x, np.float32), np.ascontiguousarray(levels, np.float32)
    (tiles, n), at = x.shape, f"bits {bits}, window {window}"
    require(
        1 <= bits <= min(window, 8) and window <= 16, "SCHEMA.VALUE", at, "bits from 1 to 8, window from bits to 16"
    )
    require(levels.shape == (1 << window,), "SCHEMA.VALUE", at, f"{1 << window} levels", levels.shape)
    require(n * bits >= window, "SCHEMA.VALUE", at, f"tiles of at least {-(-window // bits)} symbols", n)
    require(np.isfinite(x).all() and np.isfinite(levels).all(), "DATA.NON_FINITE", at, "finite targets and levels")
    root = np.ones_like(x)
    if weights is not None:
        fine = weights.shape == x.shape and np.isfinite(weights).all() and (weights > 0).all()
        require(fine, "SCHEMA.VALUE", at, "a finite weight above 0 for each target")
        root = np.sqrt(weights / weights.max(1, keepdims=True), dtype=np.float32)  # only their ratios matter
    if window == bits:
        return _nearest(x, levels)

    symbols = np.empty(x.shape, np.uint16)
    overlap, compiled = overlap_length(bits, window), None if exact or passes > 1 else compiled_search(bits, window)
    if compiled:
        lanes = 1

        def encode_part(part: slice) -> None:
            ones = np.ones_like(x[part])
            symbols[part] = compiled(x[part], ones, root[part], levels, bits, window, overlap)
    else:
        kernel, lanes = _kernel(), _lanes(tiles, window)
        table, branches = arrange(levels, bits, lanes), tuple(range(1 << bits))

        def encode_part(part: slice) -> None:
            given = (x[part] * root[part], root[part], table, branches, lanes, overlap, passes, exact)
            kernel.encode(*given, symbols[part])

    groups = -(-tiles // lanes)
    workers = max(1, min(threads or os.cpu_count() or 1, groups))
    edges = [groups * i // workers * lanes for i in range(workers + 1)]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(encode_part, map(slice, edges[:-1], edges[1:])))
    return symbols


def overlap_length(bits: int, window: int) -> int:
    """How many symbols on either side of a tile's begin the first run takes: several times what a window spans."""
    return 10 * -(-window // bits)


def compiled_search(bits: int, window: int) -> Callable[..., np.ndarray] | None:
    """`encode` of tqformat_kernels, which gives the same symbols in a tenth to a half of numba's time.

    None where the package is not installed or older, and where it has no vector instructions for the processor or the setting.
    """
    try:
        import tqformat_kernels
    except ImportError:
        return None
    usable = window >= bits + 4 and tqformat_kernels.form() != "portable"
    return getattr(tqformat_kernels, "encode", None) if usable else None


def _kernel():
    try:
        from reference_quantizer.codes import viterbi
    except ImportError:
        raise missing_library("trellis", "numba") from None
    return viterbi


def _nearest(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The index of the nearest level; uint16 of x's shape."""
    order = np.argsort(levels, kind="stable")
    borders = (levels[order][1:] + levels[order][:-1]) / 2
    return order[np.searchsorted(borders, x)].astype(np.uint16)


def _lanes(tiles: int, window: int) -> int:
    """How many tiles are encoded side by side; beyond window 12 the working set of one is enough for the caches."""
    return 1 if window > 12 else 8 if tiles < 128 else 16


def arrange(levels: np.ndarray, bits: int, lanes: int) -> np.ndarray:
    """The levels in the order of viterbi._best_branches: [A, J, P * lanes]."""
    branches = 1 << bits
    width = max(1, len(levels) // branches**2)
    blocks = levels.reshape(-1, width, branches).transpose(0, 2, 1)  # [A, J, P]
    return np.ascontiguousarray(np.repeat(blocks, lanes, axis=2))


# ---------------------------------------------------------------------------------------------------- codebooks


@functools.cache
def trellis_levels(bits: int, window: int) -> np.ndarray:
    """The trained codebook for normally distributed values of variance 1: float32 [2^window], read-only, float16 numbers.

    Those of window 12 and 1 to 6 bits come with the package (benchmarks/codebooks.py makes them). Others are trained at the first use
    (seconds up to window 10, a minute or more at 12, several at 14 and 16) and kept in the user's cache.
    """
    name = f"{METHOD}-b{bits}-w{window}"
    with np.load(SHIPPED) as shipped:
        if name not in shipped:
            return kept_levels(f"trellis/{name}", (1 << window,), lambda: _train(bits, window))
        half = shipped[name].astype(np.float32)  # the mirrored stream has the mirrored levels
    levels = np.concatenate([half, -half[::-1]])
    levels.flags.writeable = False
    return levels


def computed_levels(window: int) -> np.ndarray:
    """The levels of [TQ-BOOK-8], which a kernel can compute: float32 [2^window], float16 numbers, of variance 1.33.

    As in QTIP's "1MAD" (arXiv:2406.11235, section 3.1.1), sums of four bytes are nearly normally distributed; the multiplier
    is this project's, and nothing is added.
    """
    product = np.arange(1 << window, dtype=np.uint64) * np.uint64(MULTIPLIER) % 2**32
    total = sum((product >> np.uint64(8 * k) & np.uint64(255)).astype(np.float32) for k in range(4))
    levels: np.ndarray = (total - np.float32(510)) / np.float32(128)
    return levels


def computed_scale(bits: int) -> float:
    """The scale of computed levels that makes the error least for normally distributed values of variance 1.

    Found with window 12 for 1 to 4 bits; 0.03 beside it the error is hardly larger. Trained levels have a scale of 1.
    """
    return 1 - 0.44 * 0.5**bits


def _train(bits: int, window: int) -> np.ndarray:
    if window > 10:
        print(
            f"note: training the codebook of {bits} bits and window {window}, once; this takes minutes", file=sys.stderr
        )
    return train_codebook(bits, window)


def train_codebook(
    bits: int,
    window: int,
    n: int = 256,
    *,
    iterations: int | None = None,
    samples: int = 50,
    seed: int = 0,
    threads: int | None = None,
) -> np.ndarray:
    """A codebook for tiles of n normally distributed values of variance 1: float32 [2^window], all float16 numbers.

    Generalised Lloyd: `iterations` times, new tiles (`samples` values per level) are encoded and each level moves to
    the mean of its values. The mirrored stream has the mirrored levels, level[~w] = -level[w], so each value serves two.
    """
    rng = np.random.default_rng(seed)
    levels = initial_levels(bits, window, rng)
    iterations = min(200, 10 << 16 >> window) if iterations is None else iterations
    tiles = max(1 << 16, samples << window) // n
    for _ in range(iterations):
        x = gaussian_samples(tiles * n, rng).reshape(tiles, n)
        symbols = encode_tiles(x, levels, bits, window, threads=threads).ravel()
        count = np.bincount(symbols, minlength=1 << window)
        total = np.bincount(symbols, x.ravel(), minlength=1 << window)
        count, total = count + count[::-1], total - total[::-1]
        levels = np.divide(total, count, out=levels.astype(np.float64), where=count > 0).astype(np.float32)
    return levels.astype(np.float16).astype(np.float32)


def initial_levels(bits: int, window: int, rng: np.random.Generator) -> np.ndarray:
    """Levels to train from: random, but wherever paths part or meet, one of each of 2^bits classes by size.

    The class of a window is the sum of its first and its last `bits` bits and of a random number for those between,
    mod 2^bits, such that the inverted window has the mirrored class (with none between that cannot be). Float32
    [2^window].
    """
    branches, half = 1 << bits, 1 << window - 1
    w = np.arange(1 << window)
    kind = w % branches
    if window >= 2 * bits:
        kind += w >> window - bits
    if window > 2 * bits:
        hashed = rng.integers(0, branches, 1 << window - 2 * bits - 1)
        kind += np.concatenate([hashed, 1 - hashed[::-1]])[(w >> bits) % (2 * len(hashed))]
    kind %= branches
    values = np.sort(gaussian_samples(1 << window, rng)).reshape(branches, -1) * np.sqrt(1 - 0.25**bits)
    levels = np.empty(1 << window, np.float32)
    for c in range(branches):
        levels[kind == c] = rng.permutation(values[c])
    levels[half:] = -levels[:half][::-1]
    return levels


def gaussian_samples(count: int, rng: np.random.Generator) -> np.ndarray:
    """The middles of `count` equally probable cells of the normal distribution, shuffled; float32 [count]."""
    middles = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return rng.permutation(middles.numpy()).astype(np.float32)
