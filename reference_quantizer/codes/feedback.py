"""Error feedback in the transformed basis: the codes of one weight, given the Hessian of its inputs.

The output error of W x is tr(D H Dᵗ), D = decoded - W and H = sum of x xᵗ. Rows are rotated, and H with them: H' = T H Tᵗ
leaves the error as it is. Columns are then encoded in order, and each one's error is compensated in those that follow,
as GPTQ (arXiv:2210.17323) and LDLQ (arXiv:2307.13304) do. A tile of [rows, 1] lets a trellis run down a column, so that the
feedback has the grain of single columns for trellis codes, too (QTIP, arXiv:2406.11235, feeds back blocks of 16).
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from reference_quantizer.codes import search_torch, trellis, vector
from reference_quantizer.codes.encode import Encoded as Nearest
from reference_quantizer.codes.encode import Encoder, fit_dtype, leave_out
from reference_quantizer.codes.encode import decode as decode_nearest
from reference_quantizer.codes.encode import encode_stages as encode_nearest
from reference_quantizer.codes.rotation import Rotation, rotate, unrotate
from reference_quantizer.libraries import missing_library
from tqformat.load_quantized import TQFormatError

# Of the Hessian's mean diagonal, added to it; less would fit the calibration tokens, and other text less.
DAMPING = 0.05
# Of what inputs that differ from the base model's do to a weight: what fits these tokens best is too much.
STRENGTH = 0.5
RIDGE = 0.1  # the damping of that
OUTPUT_DAMPING = 0.03  # the damping of the outputs' Hessian
# What is taken off its elements beside the diagonal: a few tokens have most of the gradients' power.
SHRINKAGE = 0.5
FIT_BYTES = 1 << 26  # for the equations of the scales at a time
SCALAR_ROWS = 64  # rows that are encoded together where no tile says how many


class Moments(NamedTuple):
    """Means over the tokens, float32 on the device: x is a layer's input [cols], x0 what it was in the base model.

    d is what the stream of hidden states lacks where the layer's output is added to it, so that an output of W x0 + d would
    put the stream right. All three are divided by the mean square of x.
    """

    hessian: Tensor  # x xᵗ [cols, cols]
    shift: Tensor | None = None  # (x0 - x) xᵗ [cols, cols]; None: unknown
    drift: Tensor | None = None  # d xᵗ [rows, cols]; None: unknown, or the layer's output goes elsewhere


class Encoded(NamedTuple):
    """The codes of a weight, and how far it is from them."""

    symbols: Tensor  # [rows, cols / p] int32
    scales: Tensor  # [rows, cols / G] of the encoder's scale dtype, finite, >= 0
    decoded: Tensor  # [rows, cols] float32, before rounding to the weight's dtype
    relative_error: float  # ||D||^2 / ||W||^2
    output_error: float  # tr(D H D^t) / tr(W H W^t)


def wanted(weight: Tensor, moments: Moments, strength: float = STRENGTH, damping: float = RIDGE) -> Tensor:
    """What `weight` [rows, cols] should rather be for the inputs that the layer now gets, float32.

    W + strength * (V - W), where V are the least squares of V x against W x0 + d (see blocks.Moments), V - W damped. GPTAQ
    (arXiv:2504.02692) aims at W x0; with d, the output also makes up for what the stream lost in front of the layer.
    """
    lack = torch.zeros_like(weight) if moments.drift is None else moments.drift.clone()
    if moments.shift is not None:
        lack += weight @ moments.shift
    if not lack.any():
        return weight
    if not torch.isfinite(lack).all():
        raise TQFormatError("DATA.NON_FINITE", "drift", "what a layer should make up for is NaN or infinite")
    h = damped(moments.hessian.double(), damping)
    return weight + strength * torch.linalg.solve(h, lack.double().T).T.float()


def encode(
    weight: Tensor,
    hessian: Tensor,
    encoder: Encoder,
    bits: int,
    window: int,
    tile_rows: int,
    ordered: bool = True,
    output_hessian: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Encoded:
    """Encode `weight` [rows, cols] float32 for inputs with `hessian` [cols, cols] float32.

    With `output_hessian` [rows, rows] float32, G of `curvature`, there is feedback between blocks of rows as well: what the
    rows encoded so far miss is made up for in those that follow, so that tr(G D H D^t) gets small (YAQA, arXiv:2505.22988).
    Without it, `row_weights` [rows] float32 > 0 say how much each row's errors count; they guide the trellis of a tile.

    With window > bits, tiles are [tile_rows, 1] and `tile_rows` divides rows; with window = bits it is of no account.
    The scale of a vector is its root mean square, times the encoder's, while the codes are chosen, and is then fitted by
    least squares in the norm of the Hessian. A vector of zeros gets the scale 0. `ordered`: columns of more power are encoded first.
    """
    g, rotation = encoder.vector_length, encoder.rotation
    rows, cols = weight.shape
    y = rotate(weight, rotation)
    h = rotate_hessian(hessian, rotation)
    power = y.reshape(rows, -1, g).square().mean(-1, dtype=torch.float64)
    scales = power.sqrt().float() * encoder.scale  # [rows, cols / G]
    p = encoder.dimension
    order = torch.arange(cols // p, device=y.device)  # of symbols
    if ordered:
        order = h.diagonal().reshape(-1, p).sum(1).argsort(descending=True, stable=True)
    columns = torch.arange(cols, device=y.device).reshape(-1, p)[order].flatten()
    upper, back, smooth = inverse_factor(h[columns][:, columns]), order.argsort(), damped(h)

    def encode_rows(y: Tensor, scales: Tensor, importance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Symbols, scales and decoded values of rows that share tiles alone, each with the `importance` [rows] of its errors."""
        each = scales.repeat_interleave(g // p, 1)[:, order] if g < cols else scales
        search = each, importance, upper, encoder.levels, bits, window, tile_rows
        symbols = _search(y[:, columns], *search)[:, back]
        chosen = encoder.levels[symbols].reshape(y.shape)
        fitted = fit_scales(y, chosen, smooth, scales)
        fitted = fitted.clamp_max(torch.finfo(encoder.scale_dtype).max).to(encoder.scale_dtype)
        flat = fitted.reshape(-1)
        fit_dtype(flat, chosen.reshape(-1, g), encoder)
        fitted = flat.reshape(scales.shape)
        return symbols, fitted, chosen * fitted.float().repeat_interleave(g, 1)

    if output_hessian is None:
        importance = torch.ones_like(y[:, 0]) if row_weights is None else row_weights.sqrt()
        symbols, fitted, rotated = encode_rows(y, scales, importance)
    else:
        outer, targets, parts = inverse_factor(shrunk(output_hessian), OUTPUT_DAMPING), y.clone(), []
        step = block_rows(rows, bits, window, tile_rows)
        for a in range(0, rows, step):
            b = min(a + step, rows)
            parts.append(encode_rows(targets[a:b], scales[a:b], 1 / outer.diagonal()[a:b]))
            missed = torch.linalg.solve_triangular(outer[a:b, a:b].T, targets[a:b] - parts[-1][2], upper=False)
            targets[b:] -= outer[a:b, b:].T @ missed
        symbols, fitted, rotated = (torch.cat(found) for found in zip(*parts, strict=True))
    d = rotated - y
    ratio = [_share(d.square().sum(), y.square().sum()), _share(((d @ h) * d).sum(), ((y @ h) * y).sum())]
    return Encoded(symbols, fitted, unrotate(rotated, rotation), *ratio)


def encode_stages(
    weight: Tensor, hessian: Tensor, encoders: list[Encoder], *options: Any, **named: Any
) -> tuple[list[Nearest], Encoded]:
    """Encode `weight` in stages: those before the last, and the last, whose `decoded` and errors are those of the sum.

    The last stage has feedback, with the `options` of `encode`: it alone decides what error is left. The others take the nearest
    entries, so that little is left for it.
    """
    if len(encoders) == 1:
        return [], encode(weight, hessian, encoders[0], *options, **named)
    earlier = encode_nearest(weight, encoders[:-1])
    total = torch.zeros_like(weight)
    for stage, encoder in zip(earlier, encoders, strict=False):
        total += decode_nearest(stage.symbols, stage.scales, encoder)
    last = encode(weight - total, hessian, encoders[-1], *options, **named)
    leave_out(total, last.decoded, last.scales, encoders[-1])
    decoded = total + last.decoded
    d = decoded - weight
    ratio = [_share(d.square().sum(), weight.square().sum()), _share(*(((e @ hessian) * e).sum() for e in (d, weight)))]
    return earlier, Encoded(last.symbols, last.scales, decoded, *ratio)


def rotate_hessian(hessian: Tensor, rotation: Rotation) -> Tensor:
    """H' = T H Tᵗ, the Hessian [cols, cols] of rotated rows."""
    return rotate(rotate(hessian, rotation).T.contiguous(), rotation)


def block_rows(rows: int, bits: int, window: int, tile_rows: int) -> int:
    """How many rows are encoded together: those of a tile, or with scalar and vector codes SCALAR_ROWS."""
    return tile_rows if window > bits else min(rows, SCALAR_ROWS)


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if whole > 0 else 0.0


def damped(h: Tensor, damping: float = DAMPING) -> Tensor:
    """H + damping * mean(diag H) I; the identity if no input ever reached the layer, since all columns are then alike."""
    mean = h.diagonal().mean()
    if not torch.isfinite(mean):
        raise TQFormatError("DATA.NON_FINITE", "hessian", "the inputs of a layer are NaN or infinite")
    unit = torch.eye(len(h), dtype=h.dtype, device=h.device)
    return h + damping * mean * unit if mean > 0 else unit


def gain(hessian: Tensor) -> float:
    """What error feedback leaves of the output error that rounding alone would make, at the same bits.

    With errors of equal power in all columns, rounding makes an error proportional to tr H, feedback one to tr D, where H = U^t D U,
    U unit triangular (QuIP, arXiv:2307.13304, section 3). `hessian` is in the basis in which columns are encoded.
    """
    pivots = inverse_factor(hessian).diagonal().double() ** -2
    return float(pivots.mean() / damped(hessian.double()).diagonal().mean())


def output_gain(output_hessian: Tensor, power: Tensor, step: int) -> float:
    """The same for feedback between blocks of `step` rows, whose scales have the squares `power` [rows].

    Within a block a trellis serves the rows in proportion to what they count, so that the product of their weighted errors is what it
    would be with equal weights: the geometric mean of the weights takes the place of the mean.
    """
    outer, total = inverse_factor(shrunk(output_hessian), OUTPUT_DAMPING).double(), 0.0
    for part in torch.arange(len(outer)).split(step):
        a, b = int(part[0]), int(part[-1]) + 1
        unit = torch.eye(b - a, dtype=outer.dtype, device=outer.device)
        inverse = torch.linalg.solve_triangular(outer[a:b, a:b], unit, upper=True)
        total += (b - a) * float((inverse.square().sum(1) * power[a:b]).clamp_min(1e-30).log().mean().exp())
    before = float((damped(output_hessian, OUTPUT_DAMPING).diagonal() * power).sum())
    return min(1.0, total / before) if before > 0 else 1.0


def shrunk(output_hessian: Tensor) -> Tensor:
    """The matrix with its other elements nearer to 0 by SHRINKAGE, which is better for tokens that it was not measured on."""
    return (1 - SHRINKAGE) * output_hessian + SHRINKAGE * output_hessian.diagonal().diag()


def inverse_factor(h: Tensor, damping: float = DAMPING) -> Tensor:
    """The upper triangular U with UᵗU = (H + damping * mean(diag H) I)⁻¹, float32 [cols, cols].

    The damping grows tenfold until the matrix is positive definite in float64.
    """
    while True:
        lower, failed = torch.linalg.cholesky_ex(damped(h.double(), damping))
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper.float()
        damping *= 10


def fit_scales(y: Tensor, chosen: Tensor, h: Tensor, scales: Tensor) -> Tensor:
    """The scales [rows, cols / G] >= 0 that make (chosen * scales - y) small in the norm of h, float32.

    Each row is a least-squares problem with one unknown for each of its vectors; y and chosen are [rows, cols]. A row
    keeps its `scales` where what is found, negative values taken as 0, is no better.
    """
    step = max(1, FIT_BYTES // (8 * scales.shape[1] ** 2))
    parts = zip(y.split(step), chosen.split(step), scales.split(step), strict=True)
    return torch.cat([_fit_rows(*part, h) for part in parts])


def _fit_rows(y: Tensor, chosen: Tensor, scales: Tensor, h: Tensor) -> Tensor:
    rows, groups = scales.shape
    g = y.shape[1] // groups
    parts = chosen.reshape(rows, groups, g)
    rhs = ((y @ h) * chosen).reshape(rows, groups, g).sum(-1, dtype=torch.float64)  # [rows, groups]
    matrix = torch.empty(rows, groups, groups, dtype=torch.float64, device=y.device)
    for k in range(groups):
        span = slice(k * g, (k + 1) * g)
        product = (chosen[:, span] @ h[span]).reshape(rows, groups, g)
        matrix[:, k] = (product * parts).sum(-1, dtype=torch.float64)
    mean = matrix.diagonal(dim1=1, dim2=2).mean(1)
    unit = torch.eye(groups, dtype=torch.float64, device=y.device)
    ridge = torch.where(mean > 0, mean * 1e-9, 1.0)[:, None, None] * unit  # a row of zeros is given zeros
    found = torch.linalg.solve(matrix + ridge, rhs).clamp_min(0)

    def error(s: Tensor) -> Tensor:  # of each row, up to what does not depend on s
        return ((matrix @ s[:, :, None]).squeeze(-1) * s).sum(1) - 2 * (rhs * s).sum(1)

    better = error(found) <= error(scales.double())
    return torch.where(better[:, None], found, scales.double()).float()


# ------------------------------------------------------------------------------------------------ search


def _search(
    y: Tensor,
    scales: Tensor,
    importance: Tensor,
    upper: Tensor,
    levels: Tensor,
    bits: int,
    window: int,
    tile_rows: int,
) -> Tensor:
    """The symbols int32 [rows, cols / p]: on a GPU by `search_torch`, else by the loops of `ldlq` or their twins in C, one thread for each row tile."""
    if levels.dim() == 2:
        return vector.search(y, scales, upper, levels)
    if y.device.type != "cpu":
        return search_torch.search(y, scales, importance, upper, levels, bits, window, tile_rows)
    try:
        from reference_quantizer.codes import ldlq
    except ImportError:
        raise missing_library("feedback", "numba") from None
    rows, cols = y.shape
    step = block_rows(rows, bits, window, tile_rows)
    u, book = upper.contiguous().numpy(), levels.contiguous().numpy()
    borders = (book[1:] + book[:-1]) / 2
    compiled = trellis.compiled_search(bits, window) if window > bits else None
    if window > bits:
        overlap, branches = trellis.overlap_length(bits, window), tuple(range(1 << bits))
        table = None if compiled else trellis.arrange(book, bits, 1)
        roots = search_torch.root_weights(scales.T * importance, tile_rows).numpy()  # [groups, tiles, tile_rows]
    symbols = np.empty((rows, cols), np.uint16)

    def encode_tile(first: int) -> None:
        span = slice(first, min(first + step, rows))
        targets = np.ascontiguousarray(y[span].T.numpy())  # [cols, tile rows], changed by the loops
        scale = np.ascontiguousarray(scales[span].T.numpy())  # [groups, tile rows]
        found = np.empty(targets.shape, np.uint16)
        root = np.ascontiguousarray(roots[:, first // step]) if window > bits else None
        if compiled:
            found = compiled(targets, scale, root, book, bits, window, overlap, u)
        elif window > bits:
            ldlq.encode_trellis(targets, scale, root, u, book, table, branches, overlap, found)
        else:
            ldlq.encode_scalar(targets, scale, u, book, borders, found)
        symbols[span] = found.T

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(encode_tile, range(0, rows, step)))
    return torch.from_numpy(symbols.astype(np.int32))
