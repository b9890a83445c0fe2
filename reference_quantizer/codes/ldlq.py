"""The inner loops of `reference_quantizer.codes.feedback`, compiled by numba; imported only when they are needed.

A tile of rows is encoded column by column. What a column's codes miss is subtracted from the columns that follow, times
row i of U over U[i, i], where U is upper triangular and UᵗU is the inverse of the Hessian (GPTQ, arXiv:2210.17323, algorithm 1;
the same as LDLQ, arXiv:2307.13304, theorem 6). Rows lie along the last axis, so that all loops over them are contiguous.
"""

import numpy as np
from numba import njit

from reference_quantizer.codes import viterbi


@njit(nogil=True, fastmath=True, cache=True)
def _scaled(targets, scales, out):
    """Targets in units of their scales; 0 where the scale is 0."""
    for k in range(targets.shape[0]):
        out[k] = targets[k] / scales[k] if scales[k] > 0 else np.float32(0)


@njit(nogil=True, fastmath=True, cache=True)
def _subtract(rows, factors, error):
    """rows[j] -= factors[j] * error for every j."""
    for j in range(rows.shape[0]):
        factor, row = factors[j], rows[j]
        for k in range(row.shape[0]):
            row[k] -= factor * error[k]


@njit(nogil=True, fastmath=True, cache=True)
def _feed_back(i, targets, chosen, upper, error):
    """Spreads what column i misses over the columns that follow; `targets` [cols, rows] is changed."""
    scale = np.float32(1) / upper[i, i]
    for k in range(error.shape[0]):
        error[k] = (targets[i, k] - chosen[k]) * scale
    _subtract(targets[i + 1 :], upper[i, i + 1 :], error)


@njit(nogil=True, fastmath=True, cache=True)
def encode_scalar(targets, scales, upper, levels, borders, symbols):
    """Fills symbols [cols, rows] with the nearest of `levels`; `targets` [cols, rows], scales [groups, rows]."""
    cols, rows = targets.shape
    group = cols // scales.shape[0]
    x, chosen, error = np.empty(rows, np.float32), np.empty(rows, np.float32), np.empty(rows, np.float32)
    for i in range(cols):
        scale = scales[i // group]
        _scaled(targets[i], scale, x)
        for k in range(rows):
            symbol = 0
            for border in borders:
                symbol += x[k] > border
            symbols[i, k] = symbol
            chosen[k] = levels[symbol] * scale[k]
        _feed_back(i, targets, chosen, upper, error)


@njit(nogil=True, fastmath=True, cache=True)
def encode_trellis(targets, scales, roots, upper, levels, table, branches, overlap, symbols):
    """Fills symbols [cols, rows], each column a tail-biting trellis; `table` holds `levels` as trellis.arrange does.

    Errors in units of the scales count by the squares of `roots` [groups, rows].
    """
    cols, rows = targets.shape
    group = cols // scales.shape[0]
    x, root = np.empty((1, rows), np.float32), np.empty((1, rows), np.float32)
    chosen, error = np.empty(rows, np.float32), np.empty(rows, np.float32)
    for i in range(cols):
        scale = scales[i // group]
        root[0] = roots[i // group]
        _scaled(targets[i], scale, x[0])
        x[0] *= root[0]
        viterbi.encode(x, root, table, branches, 1, overlap, 1, False, symbols[i : i + 1])
        for k in range(rows):
            chosen[k] = levels[symbols[i, k]] * scale[k]
        _feed_back(i, targets, chosen, upper, error)
