"""Binary32 within [TQ-NUM-4]: blocks that try to leave the tolerance, by every split of factors that the loader makes."""

import functools
import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings, target

from conformance import oracle
from tqformat.load_quantized import hadamard_matrices, inverse_hadamard

FACTORS = [(4,), (20,), (24,), (32,), (36,), (64,), (140,), (16, 16), (12, 48), (24, 24), (28, 28), (12, 12, 4)]
FACTORS += [(12, 2), (44, 32), (256,), (12, 64), (1024,)]
CPU = torch.device("cpu")


@functools.cache
def hadamard(factors: tuple[int, ...]) -> np.ndarray:
    h = np.ones((1, 1))
    for f in factors:
        h = np.kron(h, oracle.hadamard_factor(f))
    return h


def worst(factors: tuple[int, ...], y: np.ndarray) -> float:
    """The largest |error| / tolerance over the blocks `y` [m, B] in binary32; signs are all positive."""
    size = y.shape[1]
    x = y.astype(float) @ hadamard(factors) / math.sqrt(size)
    got = inverse_hadamard(factors, "00" * -(-size // 8), CPU)(torch.from_numpy(y)).double().numpy()
    most = np.maximum(np.maximum(abs(y).max(1), abs(x).max(1)), np.linalg.norm(y.astype(float), axis=1) / 4)
    return float((abs(got - x).max(1) / (2.0**-20 * most + 2.0**-139)).max())


def blocks(factors: tuple[int, ...], kind: str, seed: int, strength: float, unit: float) -> np.ndarray:
    """64 or fewer blocks whose partial sums grow: rows of the matrix (one peak comes out), sums of rows, and the like."""
    rng, h = np.random.default_rng(seed), hadamard(factors)
    size, m = len(h), min(64, 2**14 // len(h) + 1)
    rows, noise = h.T[rng.integers(0, size, m)], rng.normal(size=(m, size))
    y = {
        "noise": noise,
        "levels": np.sign(noise) * np.where(abs(noise) > 0.98, 1.51, 0.4528),
        "row": rows,
        "row and noise": strength * rows + noise,
        "row and noise in two bits": np.sign(strength * rows + noise) * np.where(abs(noise) > 0.98, 1.51, 0.4528),
        "rows": sum(h.T[rng.integers(0, size, m)] for _ in range(1 + int(strength * 4))),
        "row that turns": rows * np.where(np.arange(size) < size * min(strength, 1), 1, -1),
        "part of a row": rows * (rng.random((m, size)) < strength),
        "peak": np.eye(size)[rng.integers(0, size, m)] + 1e-3 * strength * noise,
        "equal": np.ones((m, size)),
        "alternating": np.ones((m, size)) * np.where(np.arange(size) % 2, 1, -1),
    }[kind]
    return (y * unit * (1 + rng.random((m, 1)))).astype(np.float32)


KINDS = ["noise", "levels", "row", "row and noise", "row and noise in two bits", "rows", "row that turns"]
KINDS += ["part of a row", "peak", "equal", "alternating"]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_try_to_leave_the_tolerance(kind: str) -> None:
    """Also tiny and huge ones, whose sums are subnormal or leave binary32 before they are scaled."""
    for factors in FACTORS:
        for unit in (1.0, 2.0**-126, 2.0**-100, 2.0**110):
            assert worst(factors, blocks(factors, kind, 3, 0.4, unit)) < 1, (factors, unit)


@given(st.sampled_from(FACTORS), st.sampled_from(KINDS), st.integers(0, 2**32), st.floats(0, 2), st.floats(1, 2))
@settings(max_examples=80, deadline=None)
def test_no_block_leaves_the_tolerance(
    factors: tuple[int, ...], kind: str, seed: int, strength: float, unit: float
) -> None:
    share = worst(factors, blocks(factors, kind, seed, strength, unit))
    target(share)
    assert share < 1


def test_only_small_matrices_are_multiplied_in_binary32() -> None:
    """A sum of more than 32 terms of one sign leaves the tolerance: seen with 48 (1.08 of it) and 60."""
    for factors in FACTORS:
        matrices = hadamard_matrices(factors)
        assert math.prod(len(h) for h in matrices) == math.prod(factors)
        assert all(len(h) <= 32 or len(h) in factors for h in matrices)
        product = np.ones((1, 1))
        for h in matrices:
            product = np.kron(product, h.numpy())
        assert np.array_equal(product, hadamard(factors))


def test_results_of_seventeen_bits_leave_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail."""
    exact = inverse_hadamard

    def coarse(*arguments: Any) -> Any:
        return lambda y: (exact(*arguments)(y).view(torch.int32) & -128).view(torch.float32)

    y = blocks((32,), "noise", 3, 0.5, 1.0)
    assert worst((32,), y) < 0.5
    monkeypatch.setitem(globals(), "inverse_hadamard", coarse)
    assert worst((32,), y) > 4
