"""TurboQuant (arXiv:2504.19874, algorithms 1 and 2) for a chunk of rows: normalise, rotate, nearest level, scale.

Nothing here knows of files: tensors go in, symbols and scales come out. `decode` is the inverse of `encode`, and
`encode_stages` encodes what each stage leaves by the next one.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from reference_quantizer.codes import vector
from reference_quantizer.codes.rotation import Rotation, rotate, unrotate

CELLS = 2**12  # of `nearest`
SIGN_LEVELS = (-math.sqrt(math.pi / 2), math.sqrt(math.pi / 2))


@dataclass(frozen=True)
class Encoder:
    """Everything that one weight's vectors are encoded with."""

    vector_length: int  # G
    rotation: Rotation
    levels: Tensor  # float32, [entries] ascending, or [entries, p]
    scale_dtype: torch.dtype
    dtype: torch.dtype  # of the decoded weight
    unbiased: bool = False  # see _unbiased_scales
    scale: float = 1.0  # of the levels in units of a vector's root mean square, while a trellis is searched

    @property
    def dimension(self) -> int:
        """p, weights per symbol."""
        return self.levels.shape[1] if self.levels.dim() == 2 else 1

    @property
    def borders(self) -> Tensor:
        """Where one level stops being the nearest; [entries - 1] float32."""
        return (self.levels[1:] + self.levels[:-1]) / 2


class Encoded(NamedTuple):
    """The symbols and scales of a chunk of rows, and how far their product is from the rows."""

    symbols: Tensor  # [rows, cols / p], uint8 or int32
    scales: Tensor  # [rows, cols / G] of the encoder's scale dtype, finite, >= 0
    squared_error: float  # before rounding to the weight's dtype
    squared_norm: float


def normalise(x: Tensor, vector_length: int) -> tuple[Tensor, Tensor]:
    """The vectors of the rows `x` [rows, cols] float32, divided by their root mean squares, and these.

    Returns [vectors, G] float32 and [vectors] float64. Any finite x will do: squares are taken of x / peak, so that
    nothing overflows. A vector of zeros stays as it is; one with a NaN or an infinity has a root mean square that is
    not finite.
    """
    vectors = x.reshape(-1, vector_length)
    peak = vectors.abs().amax(-1, keepdim=True)
    unit = vectors / torch.where(peak == 0, 1.0, peak)
    root = ((unit * unit).sum(-1, dtype=torch.float64) / vector_length).sqrt()  # 1 / sqrt(G) to 1, or 0
    unit *= (1 / torch.where(root == 0, 1.0, root)).float()[:, None]
    return unit, peak.squeeze(-1).double() * root


def encode(x: Tensor, encoder: Encoder) -> Encoded:
    """Encode the rows `x` [rows, cols] float32, all finite.

    The scale is ||v|| / sqrt(G) or the least-squares <y, c> / <c, c>, whichever leaves the smaller error after it is
    rounded to the scale dtype (y: the rotated vector, c: its levels), unless it shall be unbiased. A vector of zeros gets the scale 0.
    """
    unit, rms = normalise(x, encoder.vector_length)
    y = rotate(unit, encoder.rotation)  # [vectors, G], root mean square 1
    if encoder.dimension > 1:
        symbols = vector.nearest(y.reshape(-1, encoder.dimension), encoder.levels)
    else:
        symbols = nearest(y, encoder.borders)
    c = _levels(symbols, encoder).reshape(y.shape)
    divisor = torch.where(rms > 0, rms, 1.0)
    scales = _unbiased_scales(y, c, rms, encoder) if encoder.unbiased else _best_scales(y, c, rms, encoder)
    fit_dtype(scales, c, encoder)

    residual = y - c * (scales.double() / divisor).float()[:, None]
    error = (residual * residual).sum(-1, dtype=torch.float64) * rms * rms
    norm = (rms * rms).sum().item() * encoder.vector_length
    (rows, cols), g, p = x.shape, encoder.vector_length, encoder.dimension
    return Encoded(symbols.reshape(rows, cols // p), scales.reshape(rows, cols // g), error.sum().item(), norm)


def encode_stages(x: Tensor, encoders: list[Encoder]) -> list[Encoded]:
    """Encode the rows `x` as `encode` does, and what each stage leaves by the next one of `encoders` (residual quantization).

    The `squared_error` of a stage is that of the sum up to there; every `squared_norm` is that of x.
    """
    found = [encode(x, encoders[0])]
    total = torch.zeros_like(x)
    for before, encoder in pairwise(encoders):
        total += decode(found[-1].symbols, found[-1].scales, before)
        result = encode(x - total, encoder)
        added = decode(result.symbols, result.scales, encoder)
        if leave_out(total, added, result.scales, encoder):
            result = result._replace(squared_error=(x - total - added).double().square().sum().item())
        found.append(result._replace(squared_norm=found[0].squared_norm))
    return found


def leave_out(total: Tensor, added: Tensor, scales: Tensor, encoder: Encoder) -> bool:
    """Whether vectors of `total` + `added` [rows, cols] leave the weight's dtype [TQ-NUM-6]: there, `added` and `scales` become 0."""
    limit = torch.finfo(encoder.dtype).max * (1 - 2.0**-16)
    far = ((total + added).abs() > limit).reshape(*scales.shape, encoder.vector_length).any(-1)
    scales[far] = 0
    added.view(*scales.shape, encoder.vector_length)[far] = 0
    return bool(far.any())


def _best_scales(y: Tensor, c: Tensor, rms: Tensor, encoder: Encoder) -> Tensor:
    """The scales [vectors] of `encode` for the levels c [vectors, G] of the vectors y, which were divided by rms [vectors]."""
    power = (c * c).sum(-1, dtype=torch.float64)
    optimum = (y * c).sum(-1, dtype=torch.float64) / torch.where(power > 0, power, 1.0)  # in units of rms
    divisor = torch.where(rms > 0, rms, 1.0)
    limit = torch.finfo(encoder.scale_dtype).max
    candidates = torch.stack([optimum.clamp_min(0) * rms, rms]).clamp_max(limit).to(encoder.scale_dtype)
    # The error is <c, c> (s - optimum)^2 plus a constant: the candidate nearer to the optimum is the better one.
    distance = (candidates.double() / divisor - optimum).abs()
    return torch.where(distance[0] <= distance[1], candidates[0], candidates[1])


def _unbiased_scales(y: Tensor, c: Tensor, rms: Tensor, encoder: Encoder) -> Tensor:
    """The scales [vectors] with <y, s c> = <y, y>: inner products with what is decoded are then right on average.

    The last stage of TurboQuant-prod (arXiv:2504.19874, algorithm 2) keeps the signs of S r and decodes sqrt(pi / 2) / G ||r|| Sᵗ sign(S r),
    S being Gaussian. With an orthogonal T and levels c = ±sqrt(pi / 2) that is scale * Tᵗ c with a scale of ||r|| / sqrt(G), for
    then T is S / sqrt(G) up to the lengths of its rows. Here the scale is ||r||^2 / <T r, c> (as in RaBitQ, arXiv:2405.12497), which
    is near that and makes the component along r exact for every T. For a uniformly random T what lies across r averages to 0, since T and
    T after a reflection that keeps r are equally likely. So the average is r. For a Hadamard T with random signs it is nearly that.
    """
    product = (y * c).sum(-1, dtype=torch.float64)
    power = (y * y).sum(-1, dtype=torch.float64)
    ratio = torch.where(product > 0, power / torch.where(product > 0, product, 1.0), 0.0)
    return (ratio * rms).clamp_max(torch.finfo(encoder.scale_dtype).max).to(encoder.scale_dtype)


def nearest(y: Tensor, borders: Tensor) -> Tensor:
    """The index of the level nearest to each element of y, the lower one on a border; uint8 of y's shape.

    `borders` is [entries - 1], ascending. A line of equal cells, of which none holds two borders, tells with one comparison
    what a search would take many for: an element is above all borders of the cells before its own.
    """
    if len(borders) < 4:  # a few comparisons are faster
        symbols = torch.zeros(y.shape, dtype=torch.uint8, device=y.device)
        for border in borders.tolist():
            symbols += (y > border).view(torch.uint8)
        return symbols
    cells = CELLS / (borders[-1] - borders[0])

    def cell(values: Tensor) -> Tensor:  # never falls where `values` rise, whatever is rounded
        return ((values - borders[0]) * cells).clamp_(-1, CELLS).add_(1).int()

    places = cell(borders)
    if len(places.unique()) < len(borders):
        return torch.bucketize(y, borders, out_int32=True).to(torch.uint8)
    before = torch.searchsorted(places, torch.arange(CELLS + 2, device=y.device, dtype=torch.int32)).to(torch.uint8)
    own = torch.full((CELLS + 2,), math.inf, device=y.device).index_put_((places.long(),), borders)
    at = cell(y.reshape(-1))
    above = y.reshape(-1) > own.index_select(0, at)
    return (before.index_select(0, at) + above.view(torch.uint8)).reshape(y.shape)


def fit_dtype(scales: Tensor, levels: Tensor, encoder: Encoder) -> None:
    """Lower those of `scales` [vectors] that would decode to a number beyond the weight's dtype [TQ-NUM-6].

    `levels` is [vectors, G]. An element is at most scale * ||levels||, so hardly any vector is decoded to find out.
    """
    limit = torch.finfo(encoder.dtype).max
    bound = scales.double() * torch.linalg.vector_norm(levels, dim=-1, dtype=torch.float64)
    for k in torch.nonzero(bound > limit).flatten().tolist():
        peak = unrotate(levels[k : k + 1], encoder.rotation).abs().max().item()
        largest = limit / (peak * (1 + 2.0**-18))  # with the tolerance of [TQ-NUM-4]
        if scales[k].item() > largest:
            lowered = torch.tensor(largest, dtype=torch.float64).to(scales.dtype)
            scales[k] = lowered if lowered.item() <= largest else lowered * (1 - torch.finfo(scales.dtype).eps)


def decode(symbols: Tensor, scales: Tensor, encoder: Encoder) -> Tensor:
    """Inverse of encode, float32 [rows, cols], before rounding to the weight's dtype."""
    y = _levels(symbols, encoder).reshape(-1, encoder.vector_length) * scales.reshape(-1, 1).float()
    return unrotate(y, encoder.rotation).reshape(len(symbols), symbols.shape[1] * encoder.dimension)


def _levels(symbols: Tensor, encoder: Encoder) -> Tensor:
    """The levels that `symbols` select one after another, float32 [symbols] or [symbols, p]."""
    return torch.index_select(encoder.levels, 0, symbols.reshape(-1).int())
