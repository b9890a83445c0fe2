"""The reference quantizer's arithmetic: levels, rotations, scales, and the errors that theory promises."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from reference_quantizer.codes.codebook import lloyd_max_levels
from reference_quantizer.codes.encode import Encoder, decode, encode, fit_dtype, nearest, normalise
from reference_quantizer.codes.rotation import (
    MAX_PASS,
    Rotation,
    haar_matrix,
    hadamard_factors,
    hadamard_matrix,
    make_rotation,
    paley_kind,
    rotate,
    rotation_size,
    seed_signs,
    sylvester_passes,
    unrotate,
)

LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.0345, 4: 0.0095}  # mean squared error of a unit Gaussian (Max 1960)


def encoder(g: int, bits: int, kind: str = "hadamard", size: int | None = None, **dtypes: torch.dtype) -> Encoder:
    size = size or (rotation_size(kind, g) if kind != "identity" else 1)
    rotation = make_rotation(kind, size, 42, haar_matrix(42, size) if kind == "dense" else None)
    levels = torch.tensor(lloyd_max_levels(2**bits, g, 8193, 96))
    return Encoder(g, rotation, levels, dtypes.get("scale", torch.float16), dtypes.get("weight", torch.bfloat16))


def gaussian(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ codebooks


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("g", [1, 4, 64, 1024, 2**20])
def test_levels_ascend_and_are_symmetric(g: int, bits: int) -> None:
    levels = lloyd_max_levels(2**bits, g, 8193, 96)
    assert levels.dtype == np.float32 and np.isfinite(levels).all()
    assert (np.diff(levels) > 0).all()
    assert np.abs(levels + levels[::-1]).max() < 1e-5


def test_levels_of_the_uniform_and_the_gaussian_case() -> None:
    # G = 3: a coordinate of a point on the sphere is uniform on [-sqrt(3), sqrt(3)] (Archimedes)
    expected = math.sqrt(3) * (np.arange(4) * 2 - 3) / 4
    assert np.allclose(lloyd_max_levels(4, 3, 8193, 96), expected, atol=1e-4)
    assert np.allclose(lloyd_max_levels(4, 2**20, 8193, 96), [-1.5104, -0.4528, 0.4528, 1.5104], atol=5e-4)


# ------------------------------------------------------------------------------------------------ rotations


def reachable_sizes() -> Iterator[int]:
    yield from (n for n in range(4, 1100, 4) if hadamard_factors(n))


@pytest.mark.parametrize("order", [2, 4, 8, 12, 20, 24, 28, 36, 60, 64, 76, 124, 224])
def test_hadamard_matrices_are_orthogonal(order: int) -> None:
    h = hadamard_matrix(order).astype(np.int64)
    assert set(np.unique(h)) == {-1, 1}
    assert (h @ h.T == order * np.eye(order, dtype=np.int64)).all()


def test_factors_multiply_to_the_size_and_are_allowed() -> None:
    sizes = list(reachable_sizes())
    assert {12, 20, 64, 576, 640, 768, 1024} <= set(sizes)
    for size in [*sizes, 1536, 3072, 3584, 5120, 2**20]:
        factors = hadamard_factors(size)
        assert factors is not None and math.prod(factors) == size
        assert all(paley_kind(f) or f & (f - 1) == 0 for f in factors)
    for power in range(1, 21):
        passes = sylvester_passes(2**power)
        assert math.prod(passes) == 2**power and max(passes) <= MAX_PASS


@pytest.mark.parametrize(
    "g, size", [(1024, 1024), (576, 576), (3584, 3584), (11008, 256), (100, 20), (6, 1), (2, 1), (1, 1)]
)
def test_block_sizes(g: int, size: int) -> None:
    assert rotation_size("hadamard", g) == size


@pytest.mark.parametrize("g, size", [(4096, 4096), (8192, 4096), (5120, 2560), (7, 7), (4099, 1), (2, 1)])
def test_dense_block_sizes(g: int, size: int) -> None:
    assert rotation_size("dense", g) == size


def test_signs_are_the_specified_stream() -> None:
    assert seed_signs(0, 64).hex() == "afcd1d7b39a820e2"
    assert seed_signs(0, 4).hex() == "0f"
    assert seed_signs(42, 300)[:8] == seed_signs(42, 64)


@pytest.mark.parametrize("size", [4, 12, 28, 64, 576, 1024])
def test_rotation_is_the_specified_matrix(size: int) -> None:
    """T = (H_f1 (x) H_f2 (x) ...) diag(s) / sqrt(B), here as one dense matrix [TQ-TRAN-3]."""
    dense = np.ones((1, 1))
    for f in hadamard_factors(size) or ():
        dense = np.kron(dense, hadamard_matrix(f))
    signs = 1 - 2 * np.unpackbits(np.frombuffer(seed_signs(42, size), np.uint8), bitorder="little")[:size].astype(float)
    x = gaussian(3, 2 * size)
    expected = x.double().numpy().reshape(-1, size) @ (dense * signs / math.sqrt(size)).T
    found = rotate(x, make_rotation("hadamard", size, 42)).double().numpy().reshape(-1, size)
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("kind, size", [("hadamard", 576), ("hadamard", 2048), ("dense", 100), ("identity", 1)])
def test_unrotate_is_the_inverse_of_rotate(kind: str, size: int) -> None:
    matrix = haar_matrix(1, size) if kind == "dense" else None
    rotation = make_rotation(kind, size, 1, matrix)
    x = gaussian(5, 2 * size)
    y = rotate(x, rotation)
    assert torch.allclose(unrotate(y, rotation), x, atol=1e-5)
    assert torch.allclose(y.norm(dim=1), x.norm(dim=1), rtol=1e-5)


def test_haar_matrices_are_orthogonal_and_seeded() -> None:
    q = haar_matrix(42, 96).astype(np.float64)
    assert np.abs(q.T @ q - np.eye(96)).max() < 2**-12  # [TQ-TRAN-7]
    assert (haar_matrix(42, 96) == haar_matrix(42, 96)).all()
    assert (haar_matrix(43, 96) != haar_matrix(42, 96)).any()


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("bits", LLOYD_MAX)
@pytest.mark.parametrize("cols", [576, 768, 1024, 3072, 3584])
def test_error_on_gaussian_rows_is_that_of_lloyd_max(cols: int, bits: int) -> None:
    x = gaussian(2_500_000 // cols, cols)
    e = encoder(cols, bits)
    result = encode(x, e)
    error = (decode(result.symbols, result.scales, e) - x).double().square().mean().item()
    assert error == pytest.approx(result.squared_error / x.numel(), rel=1e-4)
    assert error == pytest.approx(LLOYD_MAX[bits], rel=0.01)


def test_hadamard_halves_the_error_of_rows_with_an_outlier() -> None:
    x = gaussian(256, 1024)
    x[:, 7] = 100 * x[:, 7].sign()
    errors = {}
    for kind in ("hadamard", "identity"):
        result = encode(x, encoder(1024, 2, kind))
        errors[kind] = result.squared_error / result.squared_norm
    assert errors["hadamard"] <= errors["identity"] / 2


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16, torch.float32])
def test_chosen_scale_is_never_worse_than_the_norm(bits: int, scale: torch.dtype) -> None:
    x = gaussian(64, 48) ** 3  # heavy tails: the best scale is far from the norm
    e = encoder(48, bits, "identity", scale=scale)
    result = encode(x, e)
    assert (result.scales >= 0).all()
    chosen = (decode(result.symbols, result.scales, e) - x).square().sum(1)
    norm = normalise(x, 48)[1].to(scale)[:, None]
    by_norm = (decode(result.symbols, norm, e) - x).square().sum(1)
    assert (chosen <= by_norm * (1 + 1e-5)).all() and (chosen < by_norm).any()


def test_symbols_are_the_nearest_levels() -> None:
    for bits in (1, 4, 5, 8):
        levels = torch.tensor(lloyd_max_levels(2**bits, 1024, 8193, 96))
        y = gaussian(10, 1000)
        expected = (y[..., None] - levels).abs().argmin(-1)
        assert torch.equal(nearest(y, (levels[1:] + levels[:-1]) / 2).long(), expected)


def test_symbols_at_borders_are_those_of_a_search() -> None:
    close = torch.tensor([-1.0, -0.5, 0.5, 0.5 + 2**-24, 1.0])  # two in one cell
    bordering = [close, *(torch.tensor(lloyd_max_levels(2**bits, 64, 8193, 96)[1:]) for bits in (2, 4, 8))]
    for borders in bordering:
        beside = [borders.nextafter(torch.tensor(end)) for end in (-9.0, 9.0)]
        y = torch.cat([borders, *beside, gaussian(10, 1000).flatten() * 3, torch.tensor([-1e30, -0.0, 0.0, 1e30])])
        assert torch.equal(nearest(y, borders).long(), torch.bucketize(y, borders))
        assert nearest(y[:0], borders).shape == (0,)


@pytest.mark.parametrize("peak", [1e-40, 1e-30, 1.0, 1e30, 3.3e38])
def test_norms_neither_overflow_nor_underflow(peak: float) -> None:
    x = gaussian(4, 64).clamp(-3, 3) / 3 * peak
    e = encoder(64, 4, scale=torch.float32, weight=torch.float32)
    result = encode(x, e)
    decoded = decode(result.symbols, result.scales, e)
    assert torch.isfinite(decoded).all()
    assert result.squared_error / result.squared_norm < 0.02


def test_rows_of_zeros_get_the_scale_zero() -> None:
    x = torch.zeros(3, 64)
    x[1] = gaussian(1, 64)
    result = encode(x, encoder(64, 2))
    assert result.scales[0] == 0 and result.scales[2] == 0 and result.scales[1] > 0
    assert result.squared_error > 0 and torch.isfinite(torch.tensor(result.squared_error))


def test_decoded_weights_stay_within_their_dtype() -> None:
    """Large float16 weights would overshoot 65504 in decoding; their scales are lowered [TQ-NUM-6]."""
    x = torch.full((4, 64), 65504.0) * gaussian(4, 64).sign()
    x[3] /= 4
    for kind in ("hadamard", "identity"):
        e = encoder(64, 3, kind, scale=torch.float32, weight=torch.float16)
        result = encode(x, e)
        assert torch.isfinite(decode(result.symbols, result.scales, e).half()).all()
    small = torch.ones(2)
    fit_dtype(small, torch.ones(2, 64), e)
    assert torch.equal(small, torch.ones(2))


def test_vectors_shorter_than_rows_have_their_own_scales() -> None:
    x = gaussian(8, 256) * torch.tensor([1.0, 0.01]).repeat_interleave(128)
    e = encoder(128, 4)
    result = encode(x, e)
    assert result.scales.shape == (8, 2)
    per_half = (decode(result.symbols, result.scales, e) - x).square().reshape(8, 2, 128).sum((0, 2))
    norms = x.square().reshape(8, 2, 128).sum((0, 2))
    assert (per_half / norms < 0.02).all()


def test_identity_has_no_passes() -> None:
    assert rotate(torch.ones(2, 3), Rotation(1)).equal(torch.ones(2, 3))
