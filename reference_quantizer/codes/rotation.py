"""Rotations of a vector's blocks: the forward transforms T of SPEC section 8, in torch.

`rotate` and its inverse `unrotate` work on the last dimension, block by block. A Hadamard rotation of size
B = f1 * f2 * ... is applied factor by factor, and a large Sylvester factor as two or three small ones
(H_1024 = H_32 (x) H_32), so that it costs B times the sum of the small orders and not B squared.
"""

import functools
import math
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # `plan` needs factorisations alone, and torch is slow to import
    from collections.abc import Iterator

    from torch import Tensor

MAX_PALEY = 2048  # [TQ-TRAN-4]
MAX_DENSE = 4096  # [TQ-TRAN-7]
MAX_PASS = 64  # the largest Sylvester order that is applied as one matrix product
PASS_COST = 24  # what one pass over the data costs, in multiply-adds per element


# ------------------------------------------------------------------------------------------------ factorisation


def is_prime(q: int) -> bool:
    """Whether q is a prime number, by trial division."""
    return q > 1 and all(q % k for k in range(2, math.isqrt(q) + 1))


@functools.cache
def paley_kind(order: int) -> int:
    """1 or 2 for a factor that [TQ-TRAN-4] builds by Paley I or II, 0 for any other and for powers of two."""
    if order & (order - 1) == 0 or order % 4 or order > MAX_PALEY:
        return 0
    if (order - 1) % 4 == 3 and is_prime(order - 1):
        return 1
    return 2 if (order // 2 - 1) % 4 == 1 and is_prime(order // 2 - 1) else 0


@functools.cache
def sylvester_passes(order: int) -> tuple[int, ...]:
    """Powers of two of at most MAX_PASS with product `order`, as few and as equal as possible."""
    exponent, largest = order.bit_length() - 1, MAX_PASS.bit_length() - 1
    count = max(1, -(-exponent // largest))
    return tuple(2 ** (exponent // count + (k < exponent % count)) for k in range(count))


@functools.cache
def hadamard_factors(size: int) -> tuple[int, ...] | None:
    """The cheapest Paley orders and one power of two with product `size`, or None where there are none.

    The cost of a choice is the sum of the orders applied plus PASS_COST for each pass over the data.
    """
    best: tuple[float, tuple[int, ...]] | None = None
    for factors in _factorisations(size, MAX_PALEY):
        passes = [p for f in factors for p in ((f,) if paley_kind(f) else sylvester_passes(f))]
        cost = sum(passes) + PASS_COST * len(passes)
        if best is None or (cost, factors) < best:
            best = (cost, factors)
    return best[1] if best else None


def _factorisations(size: int, largest: int) -> "Iterator[tuple[int, ...]]":
    """Every way to write `size` as Paley orders of at most `largest`, descending, then at most one power of two."""
    if size & (size - 1) == 0:
        yield (size,) if size > 1 else ()
    for order in range(min(size, largest), 11, -1):
        if size % order == 0 and paley_kind(order):
            for rest in _factorisations(size // order, order):
                yield (order, *rest)


def divisors(n: int) -> list[int]:
    """The divisors of n >= 1, descending."""
    small = [k for k in range(1, math.isqrt(n) + 1) if n % k == 0]
    return sorted({d for k in small for d in (k, n // k)}, reverse=True)


@functools.cache
def rotation_size(kind: str, vector_length: int) -> int:
    """The block size B of a `hadamard` or `dense` rotation: the largest that divides `vector_length`.

    1 where nothing better than a reflection of two coordinates is possible; the transform is then the identity.
    """
    for size in divisors(vector_length):
        if size > 2 and (hadamard_factors(size) if kind == "hadamard" else size <= MAX_DENSE):
            return size
    return 1


# ------------------------------------------------------------------------------------------------ matrices


def hadamard_matrix(order: int) -> np.ndarray:
    """H_order of [TQ-TRAN-4]: Sylvester, Paley I or Paley II; int8 [order, order]."""
    index = np.arange(order)
    if order & (order - 1) == 0:
        pairs, matrix = index[:, None] & index[None, :], np.ones((order, order), np.int8)
        for bit in range(order.bit_length() - 1):
            matrix *= (1 - 2 * (pairs >> bit & 1)).astype(np.int8)
        return matrix
    kind = paley_kind(order)
    if kind == 1:
        q = order - 1
        matrix = _jacobsthal(order, q)
        matrix[0, :], matrix[1:, 0] = 1, -1
        matrix[index, index] = 1
        return matrix
    if kind == 2:
        q = order // 2 - 1
        core = _jacobsthal(q + 1, q)
        core[0, :], core[:, 0] = 1, 1
        np.fill_diagonal(core, 0)
        off, on = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
        paley: np.ndarray = np.kron(core, off) + np.kron(np.eye(q + 1, dtype=np.int8), on)
        return paley
    raise ValueError(f"no Hadamard factor of order {order}")


def _jacobsthal(order: int, q: int) -> np.ndarray:
    """chi(i - j) modulo the prime q, 0 <= i, j < order; int8 [order, order]."""
    chi = np.full(q, -1, np.int8)
    chi[np.arange(1, q, dtype=np.int64) ** 2 % q] = 1
    chi[0] = 0
    index = np.arange(order)
    result: np.ndarray = chi[(index[:, None] - index[None, :]) % q]
    return result


def haar_matrix(seed: int, size: int) -> np.ndarray:
    """A Haar-distributed orthogonal matrix: QR of a seeded Gaussian, R's diagonal made positive; float32 [size, size].

    LAPACK differs between machines, so the matrix is stored and the seed is provenance only [TQ-TRAN-7].
    """
    gaussian = np.random.default_rng(seed).standard_normal((size, size))
    q, r = np.linalg.qr(gaussian)
    result: np.ndarray = (q * np.where(np.diag(r) < 0, -1.0, 1.0)).astype(np.float32)
    return result


# ------------------------------------------------------------------------------------------------ signs


def _splitmix64(seed: int) -> "Iterator[int]":
    """The 64-bit outputs z_0, z_1, ... of [TQ-TRAN-6]."""
    mask, state = 2**64 - 1, seed
    while True:
        state = state + 0x9E3779B97F4A7C15 & mask
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        yield z ^ z >> 31


def seed_signs(seed: int, size: int) -> bytes:
    """The first `size` sign bits of a seed's stream, least significant first, unused bits zero; ceil(size / 8) bytes."""
    data = bytearray(b"".join(z.to_bytes(8, "little") for z in islice(_splitmix64(seed), -(-size // 64))))
    del data[-(-size // 8) :]
    if size % 8:
        data[-1] &= 2 ** (size % 8) - 1
    return bytes(data)


# ------------------------------------------------------------------------------------------------ application


@dataclass(frozen=True)
class Rotation:
    """A transform of SPEC section 8 ready to be applied on one device."""

    size: int  # B; 1 for the identity
    signs: "Tensor | None" = None  # [B] float32: +-1
    passes: "tuple[Tensor, ...]" = ()  # orthogonal [f, f] float32 each; T = (P1 (x) P2 (x) ...) diag(signs)


def make_rotation(kind: str, size: int, seed: int, matrix: np.ndarray | None = None, device: str = "cpu") -> Rotation:
    """The rotation of `kind` (hadamard, dense, identity) and `size`; `matrix` [size, size] float32 for dense."""
    import torch

    if kind == "identity":
        return Rotation(1)
    if kind == "dense":
        return Rotation(size, None, (torch.tensor(matrix, dtype=torch.float32, device=device),))
    factors = hadamard_factors(size)
    if factors is None:
        raise ValueError(f"no Hadamard rotation of size {size}")
    orders = [p for f in factors for p in ((f,) if paley_kind(f) else sylvester_passes(f))]
    bits = np.unpackbits(np.frombuffer(seed_signs(seed, size), np.uint8), bitorder="little")[:size]
    signs = 1 - 2 * torch.tensor(bits, dtype=torch.float32, device=device)
    scaled = (hadamard_matrix(order) / math.sqrt(order) for order in orders)
    return Rotation(size, signs, tuple(torch.tensor(m, dtype=torch.float32, device=device) for m in scaled))


def rotate(x: "Tensor", rotation: Rotation) -> "Tensor":
    """T of every block of `rotation.size` in the last dimension of x, float32 [..., k * B] (equation y = Pi x)."""
    if not rotation.passes:
        return x
    blocks = x.reshape(-1, rotation.size)
    if rotation.signs is not None:
        blocks = blocks * rotation.signs
    return _kronecker(blocks, rotation.passes).reshape(x.shape)


def unrotate(y: "Tensor", rotation: Rotation) -> "Tensor":
    """Inverse of rotate, float32 [..., k * B]."""
    if not rotation.passes:
        return y
    blocks = _kronecker(y.reshape(-1, rotation.size), tuple(p.T for p in rotation.passes))
    if rotation.signs is not None:
        blocks = blocks * rotation.signs
    return blocks.reshape(y.shape)


def _kronecker(blocks: "Tensor", factors: "tuple[Tensor, ...]") -> "Tensor":
    """(P1 (x) P2 (x) ...) b for every row b of `blocks` [n, B]; one batched product for each factor."""
    import torch

    inner = 1
    for factor in reversed(factors):
        order = len(factor)
        if inner == 1:
            blocks = blocks.reshape(-1, order) @ factor.T
        else:
            blocks = torch.matmul(factor, blocks.reshape(-1, order, inner))
        inner *= order
    return blocks.reshape(-1, inner)
