"""The inner loops of `reference_quantizer.codes.trellis`, compiled by numba; imported only when they are needed.

Two neighbouring windows share window - bits stream bits, their state. States are counted S = 2^(window - bits), branches
into a state J = 2^bits: the window of branch j into state s is s * J + j, and it comes from state (s * J + j) mod S. So
the states s = a * P + i of one block a, P = max(1, S / J), come from the rows j of `cost` [J, P], whatever a is: the loop
over i reads and writes contiguous memory, which LLVM turns into vector instructions. Where P is small, several tiles
("lanes") lie side by side in each of these entries. `branches` is the tuple 0 ... J - 1; its length is part of its type,
so that loops over branches are unrolled.
"""

import numpy as np
from numba import njit

FAR = np.float32(1e37)  # the cost of a state where no path may start


@njit(nogil=True, fastmath=True, cache=True)
def _best_branches(x, root, levels, cost, branches, total, back):
    """The best branch into each state of one block: its number in `back`, the cost up to there in `total`."""
    for i in range(total.shape[0]):
        distance = x[i] - root[i] * levels[0, i]
        best, branch = cost[0, i] + distance * distance, np.uint8(0)
        for j in range(1, len(branches)):
            distance = x[i] - root[i] * levels[j, i]
            other = cost[j, i] + distance * distance
            branch = np.uint8(j) if other < best else branch
            best = other if other < best else best
        total[i], back[i] = best, branch


@njit(nogil=True, fastmath=True, cache=True)
def _deinterleave(rows, branches, cost):
    for j in range(len(branches)):
        for i in range(cost.shape[1]):
            cost[j, i] = rows[i, j]


@njit(nogil=True, fastmath=True, cache=True)
def _copy(source, target):
    for i in range(source.shape[0]):
        target[i] = source[i]


@njit(nogil=True, fastmath=True, cache=True)
def _spread(values, row):
    """Repeats the values of the lanes along a row."""
    if values.shape[0] == 1:
        value = values[0]
        for i in range(row.shape[0]):
            row[i] = value
        return
    for i in range(row.shape[0] // values.shape[0]):
        _copy(values, row[i * values.shape[0] : (i + 1) * values.shape[0]])


@njit(nogil=True, fastmath=True, cache=True)
def _by_branch(total, branches, lanes, cost):
    """Rearranges costs from state order [S, lanes] to the order in which the next step reads them [J, P * lanes]."""
    if lanes == 1 and total.size >= len(branches):
        _deinterleave(total.reshape(-1, len(branches)), branches, cost)
        return
    states, mask = total.reshape(-1, lanes), total.size // lanes - 1
    for i in range(cost.shape[1] // lanes):
        for j in range(len(branches)):
            _copy(states[i * len(branches) + j & mask], cost[j, i * lanes : (i + 1) * lanes])


@njit(nogil=True, fastmath=True, cache=True)
def _viterbi(x, root, first, steps, start, levels, branches, x_row, root_row, cost, total, back):
    """Costs `total` and branches `back` of the best paths over symbols first ... first + steps - 1 (mod n).

    They start in state start[lane], or anywhere if that is negative.
    """
    n, lanes = x.shape
    states = total.reshape(-1, lanes)
    for lane in range(lanes):
        states[:, lane] = 0 if start[lane] < 0 else FAR
        if start[lane] >= 0:
            states[start[lane], lane] = 0
    for t in range(steps):
        _by_branch(total, branches, lanes, cost)
        _spread(x[(first + t) % n], x_row)
        _spread(root[(first + t) % n], root_row)
        for a in range(total.shape[0]):
            _best_branches(x_row, root_row, levels[a], cost, branches, total[a], back[t, a])


@njit(nogil=True, cache=True)
def _trace(back, lane, lanes, steps, stop, state, branches, symbols, first):
    """Follows the branches from `state` after `steps` back to step `stop`; returns the state there."""
    n, states = symbols.shape[0], back.shape[1] * back.shape[2] // lanes
    for t in range(steps - 1, stop - 1, -1):
        symbol = state * len(branches) + back[t].reshape(-1)[state * lanes + lane]
        symbols[(first + t) % n] = symbol
        state = symbol & states - 1
    return state


@njit(nogil=True, cache=True)
def encode(x, root, levels, branches, lanes, overlap, passes, exact, symbols):
    """Fills symbols [tiles, n] for targets x and root weights [tiles, n]; levels [A, J, P * lanes]."""
    tiles, n = x.shape
    blocks, _, width = levels.shape
    count = blocks * width // lanes
    total, cost = np.empty((blocks, width), np.float32), np.empty((len(branches), width), np.float32)
    back = np.empty((max(n, 2 * overlap), blocks, width), np.uint8)
    x_row, root_row = np.empty(width, np.float32), np.empty(width, np.float32)
    xs, roots = np.empty((n, lanes), np.float32), np.empty((n, lanes), np.float32)
    start, trial = np.empty(lanes, np.int64), np.empty(n, np.uint16)
    for tile in range(0, tiles, lanes):
        group = min(lanes, tiles - tile)
        for lane in range(lanes):  # a group that is not full repeats its last tile
            xs[:, lane] = x[tile + min(lane, group - 1)]
            roots[:, lane] = root[tile + min(lane, group - 1)]
        scratch = (levels, branches, x_row, root_row, cost, total, back)
        if exact:
            least = np.full(lanes, np.inf, np.float32)
            for state in range(count):
                start[:] = state
                _viterbi(xs, roots, 0, n, start, *scratch)
                for lane in range(group):
                    if total.reshape(-1, lanes)[state, lane] < least[lane]:
                        least[lane] = total.reshape(-1, lanes)[state, lane]
                        _trace(back, lane, lanes, n, 0, state, branches, symbols[tile + lane], 0)
            continue
        start[:] = -1
        _viterbi(xs, roots, n * overlap - overlap, 2 * overlap, start, *scratch)
        for lane in range(lanes):
            end = total.reshape(-1, lanes)[:, lane].argmin()
            start[lane] = _trace(back, lane, lanes, 2 * overlap, overlap, end, branches, trial, 0)
        first = 0
        for _ in range(passes):
            _viterbi(xs, roots, first, n, start, *scratch)
            for lane in range(group):
                _trace(back, lane, lanes, n, 0, start[lane], branches, symbols[tile + lane], first)
            first = (first + n // 2) % n
            for lane in range(lanes):
                start[lane] = symbols[tile + min(lane, group - 1), first] & count - 1
