"""The search of `reference_quantizer.codes.feedback` in torch, for weights that lie on a GPU; the twin of `ldlq` and `viterbi`.

All row tiles of a weight are encoded at once, one column after the other. The only loops are over columns and over the steps
of the trellis; a step is four kernels that write to buffers which are made once for a column, and nothing waits for the
device. Where there is Triton, `search_triton` does many columns in one kernel. Everywhere costs are float32: where two paths
are as near as that can tell, the symbols may differ.
"""

from types import ModuleType

import torch
from torch import Tensor

from reference_quantizer.codes.trellis import overlap_length

BLOCK = 64  # columns whose errors reach the columns after them in one product
MEMORY = 2 << 30  # bytes that `viterbi` may take for its buffers
FAR = 1e37  # the cost of a state where no path may start


def search(
    y: Tensor,
    scales: Tensor,
    importance: Tensor,
    upper: Tensor,
    levels: Tensor,
    bits: int,
    window: int,
    tile_rows: int,
    memory: int = MEMORY,
) -> Tensor:
    """The symbols int32 [rows, cols] of `y` [rows, cols] with `scales` [rows, cols / G] and `importance` [rows], all on one device.

    `upper` [cols, cols] is that of feedback.inverse_factor, `levels` are [2^window]. With window > bits, `tile_rows`
    divides rows; with window = bits it is of no account, and `levels` ascend.
    """
    rows, cols = y.shape
    targets = y.T.clone(memory_format=torch.contiguous_format)  # [cols, rows], changed below
    scales = scales.T.contiguous()  # [groups, rows]
    symbols = torch.empty(cols, rows, dtype=torch.int32, device=y.device)
    errors = torch.empty(min(BLOCK, cols), rows, dtype=y.dtype, device=y.device)
    if window > bits:
        roots, overlap = root_weights(scales * importance, tile_rows), overlap_length(bits, window)
    if window > bits and y.is_cuda and (triton := load_triton()):
        encode_columns = triton.Trellis(scales, roots, upper, levels, bits, overlap).encode
    else:
        group = cols // len(scales)
        divisors = scales.masked_fill(scales == 0, torch.inf)  # so that targets without a scale become 0
        reciprocals = 1 / upper.diagonal()
        borders = (levels[1:] + levels[:-1]) / 2

        def encode_columns(targets: Tensor, begin: int, end: int, symbols: Tensor, errors: Tensor) -> None:
            for i in range(begin, end):
                x, error = targets[i] / divisors[i // group], errors[i - begin]
                if window > bits:
                    root = roots[i // group]  # [tiles, tile rows]
                    paths = viterbi(x.view_as(root) * root, root, levels, bits, window, overlap, memory)
                    symbols[i] = paths.reshape(-1)
                else:
                    symbols[i] = torch.bucketize(x, borders)
                torch.addcmul(targets[i], levels[symbols[i]], scales[i // group], value=-1, out=error)
                error *= reciprocals[i]
                targets[i + 1 : end].addr_(upper[i, i + 1 : end], error, alpha=-1)

    for begin in range(0, cols, BLOCK):
        end = min(begin + BLOCK, cols)
        encode_columns(targets, begin, end, symbols, errors)
        targets[end:].addmm_(upper[begin:end, end:].T, errors[: end - begin], alpha=-1)
    return symbols.T.contiguous()


def load_triton() -> ModuleType | None:
    """`search_triton`, or None where there is no Triton, as on Windows, or torch is for GPUs of another make."""
    if torch.version.cuda is None:
        return None
    try:
        from reference_quantizer.codes import search_triton
    except ImportError:
        return None
    return search_triton


def root_weights(scales: Tensor, tile_rows: int) -> Tensor:
    """What a row's error in units of its scale counts in its tile: [groups, tiles, tile_rows], from its scales times its importance.

    The most in a tile is 1. A row without a scale hardly counts, but a path needs a cost for it.
    """
    roots = scales.reshape(len(scales), -1, tile_rows)
    return (roots / roots.amax(-1, keepdim=True).clamp_min(1e-30)).clamp_min(1e-6)


def viterbi(
    x: Tensor, root: Tensor, levels: Tensor, bits: int, window: int, overlap: int, memory: int = MEMORY
) -> Tensor:
    """The symbols int64 [tiles, n] of tail-biting paths for which the sum of (x - root * level)^2 is small.

    `x` and `root` are [tiles, n], `levels` [2^window]; a first run over `overlap` symbols on either side of the tile's
    begin finds the state there, as in `trellis`. So many tiles are taken at once as `memory` bytes allow, at least one.
    """
    states = 1 << window - bits
    each = max(x.shape[1], 2 * overlap) * states + 4 * (1 << window) + (4 + 8) * states
    size = max(1, memory // each)
    parts = zip(x.split(size), root.split(size), strict=True)
    return torch.cat([_viterbi(*part, levels, bits, window, overlap) for part in parts])


def _viterbi(x: Tensor, root: Tensor, levels: Tensor, bits: int, window: int, overlap: int) -> Tensor:
    """`viterbi` of tiles that fit into memory together.

    The window of branch j into state s is s * J + j, and it comes from state (s * J + j) mod S (see `reference_quantizer.
    viterbi`). So for the states s = a * P + i, P = max(1, S / J), these do not depend on a: state i * J + j for S >= J,
    and j mod S for S < J. Costs are laid out [tiles, a, j, i], so that neighbours in memory are neighbouring states.
    """
    tiles, n = x.shape
    branches, states = 1 << bits, 1 << window - bits
    width, sources = max(1, states // branches), min(branches, states)  # sources: different states before a state
    blocks = states // width
    shape = (blocks, branches // sources, sources, width)
    table = levels.view(blocks, width, branches).transpose(1, 2).reshape(shape)
    xs, roots = (values.T.reshape(n, tiles, 1, 1, 1, 1) for values in (x, root))

    total = x.new_empty(tiles, states)
    before = total.view(tiles, 1, 1, width, sources).transpose(3, 4)  # the same costs, as the next step reads them
    least = total.view(tiles, blocks, width)
    branch = torch.empty_like(least, dtype=torch.int64)
    paths = x.new_empty(tiles, *shape)
    by_branch = paths.view(tiles, blocks, branches, width)
    back = x.new_empty(max(n, 2 * overlap), tiles, states, dtype=torch.uint8)
    symbols = x.new_empty(n, tiles, 1, dtype=torch.int64)

    def run(first: int, steps: int) -> None:
        """Costs and branches of the best paths over symbols first ... first + steps - 1 (mod n)."""
        for t in range(steps):
            k = (first + t) % n
            torch.addcmul(xs[k], roots[k], table, value=-1, out=paths)
            torch.addcmul(before, paths, paths, out=paths)
            torch.min(by_branch, 2, out=(least, branch))
            back[t] = branch.view(tiles, states)

    def trace(first: int, steps: int, stop: int, state: Tensor) -> Tensor:
        """Follows the branches from `state` [tiles, 1] after `steps` back to step `stop`; returns the state there."""
        for t in range(steps - 1, stop - 1, -1):
            symbol = symbols[(first + t) % n]
            torch.add(back[t].gather(1, state), state, alpha=branches, out=symbol)
            state = symbol & states - 1
        return state

    total.zero_()
    run(-overlap, 2 * overlap)
    state = trace(-overlap, 2 * overlap, overlap, total.argmin(1, keepdim=True))
    total.fill_(FAR).scatter_(1, state, 0)
    run(0, n)
    trace(0, n, 0, state)
    return symbols.view(n, tiles).T
