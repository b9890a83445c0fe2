"""The oracle: a slow, obvious decoder of tqformat repositories, written from SPEC.md alone.

It needs NumPy and the standard library and shares no code with `tqformat`. It computes every weight in float64 together
with the tolerance of [TQ-NUM-4], so that the output of any reader can be judged by [TQ-NUM-5]. It trusts its input:
whether a repository is conformant is the validator's question. Its sections follow the sections of SPEC.md.

The tables of transforms and codebooks are small; weights are decoded one stage and one group of tile rows at a time, so
the memory needed beyond the result (two float64 per element) is bounded.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]
Payload: TypeAlias = dict[str, tuple[str, tuple[int, ...], bytes]]  # storage name -> (dtype, shape, raw bytes)

GROUP = 2**17  # elements of a weight that are decoded at a time: few enough for the processor's cache


@dataclass(frozen=True)
class Decoded:
    """A decoded tensor: for a quantized weight `exact` and `tolerance`, both [*shape]; for a passthrough tensor `data`."""

    dtype: str
    shape: tuple[int, ...]
    exact: Floats  # x of [TQ-NUM-3]; empty for a passthrough tensor
    tolerance: Floats  # E of [TQ-NUM-4]; empty for a passthrough tensor
    data: bytes | None = None  # the raw bytes of a passthrough tensor [TQ-PASS-1]


# 2 Repository, 4 Manifest


def read_repo(path: str | Path) -> tuple[dict[str, Any], Payload]:
    """The manifest and the payload tensors of all shards of the repository at `path`."""
    manifest: dict[str, Any] = json.loads((Path(path) / "quant_manifest.json").read_text(encoding="utf-8"))
    payload: Payload = {}
    # [TQ-REPO-3, TQ-SHARD-2] a storage name may lie in any payload file
    for name, file in manifest["files"].items():
        if file["role"] == "payload":
            payload.update(read_payload(Path(path) / name))
    return manifest, payload


def decode_repo(path: str | Path) -> dict[str, Decoded]:
    """Decodes every entry of `tensors` of the repository at `path`: weight name -> Decoded."""
    return decode(*read_repo(path))


# 5 Payload container


def read_payload(path: str | Path) -> Payload:
    """Reads one safetensors file: storage name -> (dtype, shape, raw bytes)."""
    raw = Path(path).read_bytes()
    # [TQ-PAY-1, TQ-PAY-2] 8 bytes of header length, then the header; [TQ-PAY-3] offsets count from the header's end
    base = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:base].decode("utf-8"))
    header.pop("__metadata__", None)
    return {
        name: (t["dtype"], tuple(t["shape"]), raw[base + t["data_offsets"][0] : base + t["data_offsets"][1]])
        for name, t in header.items()
    }


def float8_table(dtype: str) -> Floats:
    """The values [256] of the bytes of F8_E4M3 or F8_E8M0, in their order [TQ-NUM-8]."""
    table = np.empty(256)
    for byte in range(256):
        sign, exponent, mantissa = 1 - 2 * (byte >> 7), byte >> 3 & 15, byte & 7
        if dtype == "F8_E8M0":
            table[byte] = 2.0 ** (byte - 127) if byte < 255 else math.nan
        elif byte & 0x7F == 0x7F:
            table[byte] = math.nan
        else:  # the exponent 0 is that of the subnormal numbers
            table[byte] = sign * (mantissa + 8 * (exponent > 0)) * 2.0 ** (max(exponent, 1) - 10)
    return table


FLOAT8 = {dtype: float8_table(dtype) for dtype in ("F8_E4M3", "F8_E8M0")}


def to_float64(tensor: tuple[str, tuple[int, ...], bytes]) -> Floats:
    """The exact values of a payload tensor that can hold levels, scales or offsets."""
    dtype, shape, raw = tensor
    # [TQ-PAY-7] row-major, little-endian; BF16 is the upper half of a binary32
    if dtype in FLOAT8:
        return FLOAT8[dtype][np.frombuffer(raw, np.uint8)].reshape(shape)
    if dtype == "BF16":
        values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(raw, {"U8": "u1", "I8": "i1", "F16": "<f2", "F32": "<f4"}[dtype])
    return values.astype(np.float64).reshape(shape)


# 6 Codes


def unpack(codes: NDArray[np.uint8], n: int, bits: int, window: int) -> Integers:
    """The symbols [tiles, n] of packed `codes` [tiles, tile_bytes]."""
    # [TQ-CODE-5] stream bit i is bit (i mod 8), from the least significant, of byte floor(i / 8)
    stream = np.unpackbits(codes, axis=1, count=n * bits, bitorder="little")
    # [TQ-CODE-6] symbol t = sum over j < window of streambit[(t * bits + j) mod (n * bits)] * 2^j: the `window` bits from bit
    # t * bits on, if the stream begins again behind its end
    ring = np.concatenate([stream, stream[:, np.arange(32) % (n * bits)]], axis=1)
    octets = np.ascontiguousarray(np.packbits(ring, axis=1, bitorder="little"))
    words = np.lib.stride_tricks.sliding_window_view(octets, 4, axis=1)
    symbols: Integers = np.empty((len(codes), n), np.int64)
    for t in range(min(8, n)):  # the symbols t, t + 8, t + 16 ... begin in the same bit of a byte, `bits` bytes apart
        first, shift = divmod(t * bits, 8)
        begin = words[:, first::bits][:, : len(range(t, n, 8))].view("<u4")[:, :, 0]
        symbols[:, t::8] = begin >> np.uint32(shift) & np.uint32(2**window - 1)
    return symbols


def untile(symbols: Integers, tile_grid: tuple[int, int], tile: tuple[int, int]) -> Integers:
    """The symbols [tiles, n] of a grid of tiles in weight order [rows, cols / p]; `tile` is [tr, tc / p]."""
    # [TQ-CODE-3] tiles are row-major over the grid, symbols row-major inside a tile
    grid: Integers = symbols.reshape(tile_grid[0], tile_grid[1], tile[0], tile[1])
    rows: Integers = grid.transpose(0, 2, 1, 3).reshape(tile_grid[0] * tile[0], tile_grid[1] * tile[1])
    return rows


# 7 Codebooks


def codebook_levels(codebook: dict[str, Any], payload: Payload) -> Floats:
    """The levels [entries, p], or [rows, entries, p] for a codebook per row."""
    # [TQ-BOOK-1, TQ-BOOK-3] stored, with their own shape
    if codebook.get("tensor") is not None:
        return to_float64(payload[codebook["tensor"]])
    # [TQ-BOOK-2] inline values are read as binary64 and rounded to binary32
    values = np.array(codebook["values"], np.float64).astype(np.float32).astype(np.float64)
    return values.reshape(codebook["entries"], codebook["dimension"])


def look_up(symbols: Integers, levels: Floats, first_row: int) -> Floats:
    """The levels [rows, cols] of `symbols` [rows, cols / p], which start at row `first_row` of the weight."""
    # [TQ-BOOK-3] row r uses levels[r]; [TQ-BOOK-6] a symbol stands for the p elements of its entry, in order
    per_row = levels.ndim == 3
    values = levels[first_row + np.arange(len(symbols))[:, None], symbols] if per_row else levels[symbols]
    return values.reshape(len(symbols), symbols.shape[1] * levels.shape[-1])


# 8 Transforms


def legendre(x: int, q: int) -> int:
    """χ(x) modulo the odd prime q, by looking for a square root."""
    if x % q == 0:
        return 0
    return 1 if any(k * k % q == x % q for k in range(1, q)) else -1


def is_prime(q: int) -> bool:
    return q > 1 and all(q % k for k in range(2, math.isqrt(q) + 1))


def jacobsthal(q: int) -> Floats:
    """The matrix [q + 1, q + 1] with χ(i - j) at row i and column j; row 0 and column 0 are for the caller to fill."""
    chi = [legendre(x, q) for x in range(q)]
    return np.array([[chi[(i - j) % q] for j in range(q + 1)] for i in range(q + 1)], np.float64)


@functools.cache
def hadamard_factor(f: int) -> Floats:
    """H_f [f, f] with elements -1 and 1."""
    # [TQ-TRAN-4] 1. Sylvester
    if f & (f - 1) == 0:
        return np.array([[(-1) ** (i & j).bit_count() for j in range(f)] for i in range(f)], np.float64)
    # [TQ-TRAN-4] 2. Paley I
    if f <= 2048 and is_prime(f - 1) and (f - 1) % 4 == 3:
        h = jacobsthal(f - 1)
        h[:, 0] = -1
        h[0, :] = 1
        np.fill_diagonal(h, 1)
        return h
    # [TQ-TRAN-4] 3. Paley II
    q = f // 2 - 1
    if f <= 2048 and f == 2 * (q + 1) and is_prime(q) and q % 4 == 1:
        c = jacobsthal(q)
        c[:, 0] = c[0, :] = 1
        np.fill_diagonal(c, 0)
        off_diagonal, diagonal = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
        return np.kron(c, off_diagonal) + np.kron(np.eye(q + 1), diagonal)
    raise ValueError(f"no Hadamard factor of order {f}")


def read_signs(digits: str, size: int) -> Floats:
    """The signs s [size], -1 or 1, of their hex digits."""
    # [TQ-TRAN-5] bit j, from the least significant, of byte k belongs to s[8k + j]; 1 means -1
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8), bitorder="little")[:size]
    return 1 - 2 * bits.astype(np.float64)


def inverse_hadamard(transform: dict[str, Any]) -> Callable[[Floats], Floats]:
    """T^-1(y) = s * ((H_f1 ⊗ H_f2 ⊗ ...)ᵗ y) / sqrt(B) for each row of y [blocks, B] [TQ-TRAN-3]."""
    size = transform["size"]
    signs = read_signs(transform["signs"], size)
    factors: list[int] = []
    for f in transform["factors"]:
        # popcount(i AND j) adds over groups of bits, so a large Sylvester matrix is the product of smaller ones
        while f & (f - 1) == 0 and f > 64:
            factors.append(64)
            f //= 64
        factors.append(f)
    matrices = [hadamard_factor(f) for f in factors if f > 1]

    def inverse(y: Floats) -> Floats:
        right = size
        for h in matrices:
            # the index of a block is [left, f, right], row-major: contract f with the first index of H, giving Hᵗ y
            right //= len(h)
            y = h.T @ y.reshape(-1, len(h), right) if right > 1 else y.reshape(-1, size // len(h), len(h)) @ h
        v: Floats = signs * y.reshape(-1, size) / math.sqrt(size)
        return v

    return inverse


def inverse_givens(transform: dict[str, Any], payload: Payload) -> Callable[[Floats], Floats]:
    """The inverse plane rotations in the reverse order of rounds, for each row of y [blocks, B] [TQ-TRAN-8]."""
    _, shape, raw = payload[transform["pairs"]]
    pairs = np.frombuffer(raw, "<i4").reshape(shape)  # [rounds, B / 2, 2]
    angles = to_float64(payload[transform["angles"]])  # [rounds, B / 2]

    def inverse(y: Floats) -> Floats:
        v: Floats = y.copy()
        for (i, j), a in zip(pairs.transpose(0, 2, 1)[::-1], angles[::-1], strict=True):
            cos, sin = np.array([math.cos(x) for x in a]), np.array([math.sin(x) for x in a])
            v_i, v_j = v[:, i], v[:, j]
            v[:, i], v[:, j] = cos * v_i + sin * v_j, cos * v_j - sin * v_i
        return v

    return inverse


def inverse_permutation(transform: dict[str, Any], payload: Payload) -> Callable[[Floats], Floats]:
    """T^-1(y)[index[i]] = y[i] for each row of y [blocks, B] [TQ-TRAN-9]."""
    index = np.frombuffer(payload[transform["index"]][2], "<i4")  # [B]

    def inverse(y: Floats) -> Floats:
        v: Floats = np.empty_like(y)
        v[:, index] = y
        return v

    return inverse


def inverse_transform(transform: dict[str, Any], payload: Payload) -> Callable[[Floats], Floats]:
    """T^-1 as a function of y [blocks, B], one block in each row."""
    if transform["kind"] == "identity":  # [TQ-TRAN-2]
        return lambda y: y
    if transform["kind"] == "hadamard":
        return inverse_hadamard(transform)
    if transform["kind"] == "givens":
        return inverse_givens(transform, payload)
    if transform["kind"] == "permutation":
        return inverse_permutation(transform, payload)
    # [TQ-TRAN-7] dense: T^-1(y) = Qᵗ y
    q = to_float64(payload[transform["matrix"]])
    return lambda y: np.matmul(y, q)


# 9 Scales and arithmetic


def vector_values(stage: dict[str, Any], key: str, payload: Payload) -> Floats:
    """The scales or offsets [rows, cols / G] of a stage, as `key` says, multiplied by the outer ones if there are any."""
    values = to_float64(payload[stage[key]])
    # [TQ-NUM-8] vector v of row r has the outer one [r or 0, floor(v / (cols / G / b))]
    if stage.get(f"outer_{key}") is not None:
        outer = to_float64(payload[stage[f"outer_{key}"]])  # [rows or 1, b]
        values = values * np.repeat(outer, values.shape[1] // outer.shape[1], axis=1)
    return values


FORMATS = {
    "F32": (24, -149, 128),
    "F16": (11, -24, 16),
    "BF16": (8, -133, 128),
}  # precision, subnormal ulp, overflow: log2


def round_to(values: Floats, dtype: str) -> Floats:
    """Rounds float64 to the nearest number of F32, F16 or BF16, ties to even, with subnormals; overflow is infinite."""
    precision, smallest, overflow = FORMATS[dtype]
    values = np.asarray(values, np.float64)
    _, exponent = np.frexp(values)  # |value| in [2^(exponent - 1), 2^exponent)
    ulp = np.maximum(exponent - precision, smallest)
    # scaling by a power of two is exact here, and rint rounds ties to even
    rounded: Floats = np.atleast_1d(np.ldexp(np.rint(np.ldexp(values, -ulp)), ulp))
    rounded[np.abs(rounded) >= 2.0**overflow] *= np.inf
    return rounded.reshape(values.shape)


def is_correct(values: Floats, decoded: Decoded) -> NDArray[np.bool_]:
    """Which of a reader's elements, given in float64 with the shape of the weight, are correct."""
    # [TQ-NUM-5] round(x - E) <= r <= round(x + E) for an element r of the dtype, which [TQ-NUM-6] is finite
    low = round_to(decoded.exact - decoded.tolerance, decoded.dtype)
    high = round_to(decoded.exact + decoded.tolerance, decoded.dtype)
    correct: NDArray[np.bool_] = np.isfinite(values) & (round_to(values, decoded.dtype) == values)
    return correct & (low <= values) & (values <= high)


# 10 Stages


@dataclass(frozen=True)
class Part:
    """Some rows of a stage's matrix, on its way from symbols to values; all [rows, cols]."""

    rows: slice  # of the weight
    product: Floats  # scale * level
    offset: Floats
    exact: Floats  # after T^-1

    def largest(self, size: int) -> Floats:
        """M of [TQ-NUM-4] of each element, in blocks of `size` elements."""
        before = (np.abs(self.product) + np.abs(self.offset)).reshape(-1, size)
        largest = np.maximum(before, np.abs(self.exact).reshape(-1, size)).max(axis=1)
        largest = np.maximum(largest, np.sqrt((before * before).sum(axis=1)) / 4)
        return np.repeat(largest, size).reshape(self.exact.shape)


def decode_stage(
    stage: dict[str, Any], manifest: dict[str, Any], payload: Payload, shape: tuple[int, int]
) -> Iterator[Part]:
    """A stage's matrix [rows, cols] = `shape`, some tile rows at a time."""
    rows, cols = shape
    codebook, transform = manifest["codebooks"][stage["codebook"]], manifest["transforms"][stage["transform"]]
    bits, p, size = stage["bits"], codebook["dimension"], transform["size"]
    # [TQ-MAN-2] defaults
    window = bits if stage.get("window") is None else stage["window"]
    vector_length = cols if stage.get("vector_length") is None else stage["vector_length"]
    tr, tc = (1, cols) if stage.get("tile") is None else stage["tile"]

    levels, inverse = codebook_levels(codebook, payload), inverse_transform(transform, payload)
    scales = vector_values(stage, "scales", payload)  # [rows, cols / G] [TQ-NUM-1]
    # [TQ-NUM-9]
    offsets = np.zeros_like(scales) if stage.get("offsets") is None else vector_values(stage, "offsets", payload)
    _, codes_shape, raw = payload[stage["codes"]]
    codes = np.frombuffer(raw, np.uint8).reshape(codes_shape)  # [tiles, tile_bytes] [TQ-CODE-4]

    across = cols // tc  # tiles in a tile row
    tile_rows = max(1, GROUP // (tr * cols))  # tile rows in a group
    for row in range(0, rows, tile_rows * tr):
        first = row // tr * across
        symbols = unpack(codes[first : first + tile_rows * across], tr * tc // p, bits, window)
        symbols = untile(symbols, (len(symbols) // across, across), (tr, tc // p))
        # [TQ-STAGE-1] levels, times the scale of their vector, plus its offset, then T^-1 on each block of a row
        group = slice(row, row + len(symbols))
        product = look_up(symbols, levels, row) * np.repeat(scales[group], vector_length, axis=1)
        offset = np.repeat(offsets[group], vector_length, axis=1)
        exact = inverse((product + offset).reshape(-1, size)).reshape(-1, cols)  # [TQ-TRAN-1] B divides cols
        yield Part(group, product, offset, exact)


def decode_weight(manifest: dict[str, Any], payload: Payload, name: str) -> Decoded:
    """Decodes the one entry `name` of `tensors`."""
    entry = manifest["tensors"][name]
    shape = tuple(entry["shape"])
    # [TQ-PASS-1] the stored bytes are the weight
    if entry["kind"] == "passthrough":
        return Decoded(entry["dtype"], shape, np.empty(0), np.empty(0), payload[entry["data"]][2])
    rows, cols = math.prod(shape[:-1]), shape[-1]
    exact, tolerance = np.zeros((rows, cols)), np.full((rows, cols), 2.0**-140)
    # [TQ-STAGE-2, TQ-NUM-4] stages add, and so do their tolerances
    for stage in entry["stages"]:
        size = manifest["transforms"][stage["transform"]]["size"]
        for part in decode_stage(stage, manifest, payload, (rows, cols)):
            exact[part.rows] += part.exact
            tolerance[part.rows] += 2.0**-20 * part.largest(size)
    # [TQ-NUM-2, TQ-NUM-4] the column scale comes last, and multiplies the tolerance by its magnitude
    if entry.get("column_scale") is not None:
        column_scale = to_float64(payload[entry["column_scale"]])
        exact *= column_scale
        tolerance *= np.abs(column_scale)
    tolerance += 2.0**-140
    return Decoded(entry["dtype"], shape, exact.reshape(shape), tolerance.reshape(shape))


def decode(manifest: dict[str, Any], payload: Payload) -> dict[str, Decoded]:
    """Decodes every entry of `tensors` of a conformant repository: weight name -> Decoded; aliases are not repeated."""
    return {name: decode_weight(manifest, payload, name) for name in manifest["tensors"]}


# 22 Fused products


def fused_product(manifest: dict[str, Any], payload: Payload, name: str, x: Floats) -> tuple[list[float], list[float]]:
    """The exact product y_r of the weight `name` with x [cols], and the magnitude A_r, both for each row.

    The sums are those of `math.fsum`, so that the order of addition does not show.
    """
    entry = manifest["tensors"][name]
    rows, cols = math.prod(entry["shape"][:-1]), entry["shape"][-1]
    column_scale = entry.get("column_scale")
    scaled = x if column_scale is None else to_float64(payload[column_scale]) * x
    # [TQ-FUSE-1] y_r = sum over columns of w_rc x_c
    products: list[list[float]] = [[] for _ in range(rows)]
    bounds: list[list[float]] = [[] for _ in range(rows)]
    for stage in entry["stages"]:
        size = manifest["transforms"][stage["transform"]]["size"]
        for part in decode_stage(stage, manifest, payload, (rows, cols)):
            before = np.abs(part.product) + np.abs(part.offset)
            for row in range(part.rows.start, part.rows.stop):
                products[row] += (part.exact[row - part.rows.start] * scaled).tolist()
                # [TQ-FUSE-2] for each block the norm of its values before T^-1, times that of its part of x
                blocks = zip(before[row - part.rows.start].reshape(-1, size), scaled.reshape(-1, size), strict=True)
                bounds[row] += [norm(u) * norm(v) for u, v in blocks]
    return [math.fsum(terms) for terms in products], [math.fsum(terms) for terms in bounds]


def norm(values: Floats) -> float:
    """The Euclidean norm."""
    return math.sqrt(math.fsum((values * values).tolist()))


BEST_GRADE = 40  # the precision to which the products of the vectors are known [TQ-FUSE-3]


def grade(got: float, exact: float, bound: float) -> int:
    """The largest g up to 40 with |got - exact| <= 2^-g * bound + 2^-126 [TQ-FUSE-2]; -1 if there is none from 0 on."""
    error = abs(got - exact) - 2.0**-126
    return next((g for g in range(BEST_GRADE, -1, -1) if error <= math.ldexp(bound, -g)), -1)
