"""The trellis search of `search_torch` as one kernel for a block of columns; imported only for weights that lie on an NVIDIA GPU.

Each program encodes a tile of rows, column after column, as `ldlq.encode_trellis` does, so that tiles run side by side and nothing
is launched between two steps of a trellis. What its threads tell each other (costs, branches, symbols) goes through memory that
the processor's own cache holds, with a barrier after each step. Triton comes with torch for CUDA.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024  # states whose branches are compared at a time, each by one thread


@triton.jit
def _forward(xs, roots, levels, cost, back, first, steps, n, S: tl.constexpr, J: tl.constexpr, CHUNK: tl.constexpr):
    """The best paths over symbols first ... first + steps - 1 (mod n): branches in `back` [steps, S], costs in `cost` [2, S].

    The window of branch j into state s is s * J + j, at [j, s] of `levels`, and it comes from state (s * J + j) mod S.
    The costs before step t are in row t % 2; see _place for their order.
    """
    P: tl.constexpr = max(1, S // J)
    for t in range(steps):
        k = (first + t) % n
        x, root = tl.load(xs + k), tl.load(roots + k)
        before, after = cost + (t % 2) * S, cost + ((t + 1) % 2) * S
        for c in range(0, S, CHUNK):
            state = c + tl.arange(0, CHUNK)
            missed = x - root * tl.load(levels + state).to(tl.float32)
            least, branch = tl.load(before + state % P) + missed * missed, tl.zeros([CHUNK], tl.uint8)
            for j in range(1, J):
                missed = x - root * tl.load(levels + j * S + state).to(tl.float32)
                other = tl.load(before + (j * P + state % P) % S) + missed * missed
                branch = tl.where(other < least, j.to(tl.uint8), branch)
                least = tl.minimum(least, other)
            tl.store(after + _place(state, S, J), least)
            tl.store(back + t * S + state, branch)
        tl.debug_barrier()


@triton.jit
def _place(state, S: tl.constexpr, J: tl.constexpr):
    """Where the cost of a state is kept: such that states next to each other find those they come from next to each other."""
    return state % J * max(1, S // J) + state // J


@triton.jit
def _trace(back, state, steps, stop, found, n, S: tl.constexpr, J: tl.constexpr):
    """Follows the branches from `state` after `steps` back to step `stop`; returns the state there. Step t finds symbol t % n."""
    for u in range(steps - stop):
        t = steps - 1 - u
        symbol = state * J + tl.load(back + t * S + state).to(tl.int32)
        tl.store(found + t % n, symbol)
        state = symbol % S
    return state


@triton.jit
def _encode(
    targets,
    scales,
    roots,
    upper,
    levels,
    symbols,
    errors,
    xs,
    cost,
    back,
    begin,
    end,
    cols,
    rows,
    group,
    n,
    overlap,
    steps,
    N: tl.constexpr,
    S: tl.constexpr,
    J: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Columns begin ... end - 1 of the tile of `n` rows that the program's number says; N is n, rounded up to a power of two."""
    tile, k, state = tl.program_id(0), tl.arange(0, N), tl.arange(0, S)
    inside, row = k < n, tile * n + k
    xs, cost, back = xs + tile * n, cost + tile * 2 * S, back + tile.to(tl.int64) * steps * S
    for i in range(begin, end):
        target = tl.load(targets + i * rows + row, inside, 0)
        scale = tl.load(scales + i // group * rows + row, inside, 0)
        root, found = roots + i // group * rows + tile * n, symbols + i * rows + tile * n
        x = tl.where(scale > 0, target / tl.where(scale > 0, scale, 1), 0)
        tl.store(xs + k, x * tl.load(root + k, inside, 0), inside)
        tl.store(cost + state, tl.zeros([S], tl.float32))
        tl.debug_barrier()
        _forward(xs, root, levels, cost, back, n * overlap - overlap, 2 * overlap, n, S, J, CHUNK)
        last = tl.argmin(tl.load(cost + _place(state, S, J)), 0)  # row 0, as the number of steps was even
        start = _trace(back, last, 2 * overlap, overlap, found, n, S, J)
        tl.debug_barrier()
        tl.store(cost + _place(state, S, J), tl.where(state == start, 0.0, 1e37))
        tl.debug_barrier()
        _forward(xs, root, levels, cost, back, 0, n, n, S, J, CHUNK)
        _trace(back, start, n, 0, found, n, S, J)
        tl.debug_barrier()
        symbol = tl.load(found + k, inside, 0)
        chosen = tl.load(levels + symbol % J * S + symbol // J).to(tl.float32) * scale
        error = (target - chosen) / tl.load(upper + i * cols + i)
        tl.store(errors + (i - begin) * rows + row, error, inside)
        for j in range(i + 1, end):
            later = targets + j * rows + row
            tl.store(later, tl.load(later, inside, 0) - tl.load(upper + i * cols + j) * error, inside)
        tl.debug_barrier()


class Trellis:
    """Encodes columns of a weight, with the buffers for that."""

    def __init__(self, scales: Tensor, roots: Tensor, upper: Tensor, levels: Tensor, bits: int, overlap: int) -> None:
        """`scales` [groups, rows], `roots` [groups, tiles, tile rows], `upper` [cols, cols], `levels` [2^window]."""
        half = levels.half()  # those of trained codebooks are such numbers; half of what each step reads
        half = half if torch.equal(half.float(), levels) else levels
        self.levels = half.view(-1, 1 << bits).T.contiguous()  # [branches, states]
        self.scales, self.roots, self.upper, self.overlap = scales, roots.contiguous(), upper.contiguous(), overlap
        self.branches, self.states = 1 << bits, len(levels) >> bits
        _, tiles, n = roots.shape
        self.steps = max(n, 2 * overlap)
        self.xs = levels.new_empty(tiles, n)
        self.cost = levels.new_empty(tiles, 2, self.states)
        self.back = levels.new_empty(tiles, self.steps, self.states, dtype=torch.uint8)

    def encode(self, targets: Tensor, begin: int, end: int, symbols: Tensor, errors: Tensor) -> None:
        """Fills columns begin ... end - 1 of `symbols` [cols, rows] int32 and the first rows of `errors`; changes `targets` [cols, rows]."""
        _, tiles, n = self.roots.shape
        chunk = min(self.states, CHUNK)
        given = targets, self.scales, self.roots, self.upper, self.levels
        kept = symbols, errors, self.xs, self.cost, self.back
        sizes = *targets.shape, len(targets) // len(self.scales), n, self.overlap, self.steps
        constants = {"N": triton.next_power_of_2(n), "S": self.states, "J": self.branches, "CHUNK": chunk}
        _encode[(tiles,)](*given, *kept, begin, end, *sizes, **constants, num_warps=max(1, chunk // 32))
