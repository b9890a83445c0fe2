"""The inner loops of `reference_quantizer.codes.vector`, compiled by numba; imported only when they are needed.

The entries of a codebook [p, entries] are searched in blocks of SIZE neighbours, each inside a box from `low` to `high`
[p, blocks]. A block is passed over when its box is farther from the target than the best entry so far, so that the search is
exact, whatever the order of the entries; it is fast where neighbours in the codebook are neighbours in space.
"""

import numpy as np
from numba import njit

from reference_quantizer.codes.ldlq import _subtract

SIZE = 64  # entries of a block


@njit(nogil=True, fastmath=True, cache=True)
def _best_of_block(target, book, begin, distances):
    """The least squared distance of `target` [p] to the entries of a block, and that entry; fills `distances` [SIZE]."""
    end = min(begin + SIZE, book.shape[1])
    for j in range(end - begin):
        distances[j] = np.float32(0)
    for k in range(book.shape[0]):
        x, row = target[k], book[k, begin:end]
        for j in range(row.shape[0]):
            difference = x - row[j]
            distances[j] += difference * difference
    best = distances[0]
    for j in range(1, end - begin):
        best = min(best, distances[j])
    entry = 0
    while entry < end - begin - 1 and distances[entry] > best:
        entry += 1
    return best, begin + entry


@njit(nogil=True, fastmath=True, cache=True)
def nearest_entry(target, book, low, high, bounds, distances):
    """The entry of `book` [p, entries] nearest to `target` [p]; `bounds` [blocks] and `distances` [SIZE] are for the search."""
    blocks = bounds.shape[0]
    for b in range(blocks):
        bounds[b] = np.float32(0)
    for k in range(book.shape[0]):
        x, below, above = target[k], low[k], high[k]
        for b in range(blocks):
            outside = max(np.float32(0), max(below[b] - x, x - above[b]))
            bounds[b] += outside * outside
    first = 0
    for b in range(1, blocks):
        if bounds[b] < bounds[first]:
            first = b
    best, entry = _best_of_block(target, book, first * SIZE, distances)
    for b in range(blocks):
        if bounds[b] < best and b != first:
            distance, other = _best_of_block(target, book, b * SIZE, distances)
            if distance < best:
                best, entry = distance, other
    return entry


@njit(nogil=True, fastmath=True, cache=True)
def nearest_entries(targets, book, low, high, symbols):
    """Fills symbols [n] with the entries nearest to `targets` [n, p]."""
    bounds, distances = np.empty(low.shape[1], np.float32), np.empty(SIZE, np.float32)
    for i in range(targets.shape[0]):
        symbols[i] = nearest_entry(targets[i], book, low, high, bounds, distances)


@njit(nogil=True, fastmath=True, cache=True)
def encode_vector(targets, scales, factors, book, low, high, symbols):
    """Fills symbols [cols / p, rows] with the nearest entries of `book` [p, entries]; `low` and `high` are as above.

    `factors` [cols, cols] spread what a block of p columns misses over the columns that follow; `targets` [cols, rows] is changed.
    """
    (cols, rows), p = targets.shape, book.shape[0]
    group = cols // scales.shape[0]
    x, error = np.empty(p, np.float32), np.empty((p, rows), np.float32)
    bounds, distances = np.empty(low.shape[1], np.float32), np.empty(SIZE, np.float32)
    for i in range(0, cols, p):
        scale = scales[i // group]
        for k in range(rows):
            for j in range(p):
                x[j] = targets[i + j, k] / scale[k] if scale[k] > 0 else np.float32(0)
            entry = nearest_entry(x, book, low, high, bounds, distances)
            symbols[i // p, k] = entry
            for j in range(p):
                error[j, k] = targets[i + j, k] - book[j, entry] * scale[k]
        for j in range(p):
            _subtract(targets[i + p :], factors[i + j, i + p :], error[j])
