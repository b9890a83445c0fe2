"""The constructions of SPEC.md that a validator repeats: levels, signs, and which Hadamard factors exist."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def lloyd_max_sphere(entries: int, vector_length: int, grid_size: int, iterations: int) -> NDArray[np.float64]:
    """The levels of the Lloyd-Max quantizer of one coordinate on the sphere, ascending, in binary32 [TQ-BOOK-7]."""
    d = max(3, vector_length)
    radius = min(math.sqrt(d), 8.0)
    # 1. the grid and the density on it
    t = radius * (2 * np.arange(grid_size) / (grid_size - 1) - 1)
    density = np.maximum(1 - t * t / d, 0) ** ((d - 3) / 2)
    # 2. the running trapezoid integrals
    half_step = radius / (grid_size - 1)

    def integral(y: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate([[0.0], np.cumsum((y[1:] + y[:-1]) * half_step)])

    mass, moment, cube_root = integral(density), integral(t * density), integral(np.cbrt(density))
    # 3. the starting levels
    levels = np.interp((np.arange(entries) + 0.5) / entries * cube_root[-1], cube_root, t)
    # 4. each level moves to the centroid of its cell
    for _ in range(iterations):
        borders = np.concatenate([[-radius], (levels[1:] + levels[:-1]) / 2, [radius]])
        m = np.diff(np.interp(borders, t, mass))
        centroids = np.diff(np.interp(borders, t, moment)) / np.where(m > 0, m, 1)
        levels = np.where(m > 0, centroids, levels)
    # 5. rounded to binary32
    rounded: NDArray[np.float64] = levels.astype(np.float32).astype(np.float64)
    return rounded


def byte_sum(entries: int) -> NDArray[np.float64]:
    """The levels of the origin "byte-sum", exactly [TQ-BOOK-8]."""
    product = np.arange(entries, dtype=np.uint64) * np.uint64(0x83DCD12D)
    total = sum((product >> np.uint64(8 * k) & np.uint64(255)).astype(np.float64) for k in range(4))
    levels: NDArray[np.float64] = (total - 510) / 128
    return levels


def seed_signs(seed: int, size: int) -> str:
    """The hex digits of `signs` for a seed: the first `size` bits of its SplitMix64 stream [TQ-TRAN-5, TQ-TRAN-6]."""
    mask = 2**64 - 1
    stream = bytearray()
    for k in range(1, -(-size // 64) + 1):
        z = (seed + k * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        stream += (z ^ (z >> 31)).to_bytes(8, "little")
    del stream[-(-size // 8) :]
    if size % 8:
        stream[-1] &= 2 ** (size % 8) - 1
    return stream.hex()


def has_hadamard(order: int) -> bool:
    """Whether a Hadamard factor of this order is defined: Sylvester, Paley I or Paley II [TQ-TRAN-4]."""
    if order & (order - 1) == 0:
        return True
    if order > 2048:
        return False
    if _is_prime(order - 1) and (order - 1) % 4 == 3:
        return True
    q = order // 2 - 1
    return order % 2 == 0 and _is_prime(q) and q % 4 == 1


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % k for k in range(2, math.isqrt(q) + 1))
