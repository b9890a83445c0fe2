"""Builds tiny repositories in memory, byte for byte the same on every machine.

Codes are drawn from SplitMix64. Levels, scales and matrices are drawn as short fixed-point numbers, so that every sum in
the oracle's transforms is exact in float64 and independent of the order in which a BLAS adds.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from conformance import oracle
from conformance.vectors import SIZES, join, layout

Json: TypeAlias = dict[str, Any]
Floats: TypeAlias = NDArray[np.float64]

LARGE = 2**16  # elements of a weight whose values are listed only as far as they do not repeat

LOADER_KINDS = [
    "text-generation",
    "image-text-to-text",
    "text2text-generation",
    "automatic-speech-recognition",
    "fill-mask",
    "text-classification",
    "image-classification",
    "feature-extraction",
]
FEATURES = [
    *("trellis", "vector_codebook", "row_codebook", "stages", "column_scale", "tiles"),
    *("offsets", "outer_scales", "fine_scales", "dense", "givens", "permutation"),
]


class Random:
    """The SplitMix64 stream whose seed is the first eight bytes of the SHA-256 of a name."""

    def __init__(self, name: str) -> None:
        self.state = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")

    def words(self, count: int) -> NDArray[np.uint64]:
        """The next `count` outputs."""
        gamma = 0x9E3779B97F4A7C15
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(gamma)
        z = steps + np.uint64(self.state)
        self.state = (self.state + count * gamma) % 2**64
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        out: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
        return out

    def integers(self, low: int, high: int, shape: Sequence[int]) -> NDArray[np.int64]:
        """Integers in [low, high), nearly uniform."""
        drawn = (self.words(math.prod(shape)) % np.uint64(high - low)).astype(np.int64)
        out: NDArray[np.int64] = drawn.reshape(tuple(shape)) + low
        return out

    def fixed(self, low: int, high: int, one: int, shape: Sequence[int]) -> Floats:
        """Multiples of 1 / `one` in [low / one, high / one)."""
        return self.integers(low, high, shape) / one


def splitmix64(seed: int, count: int) -> list[int]:
    """The first `count` outputs of the stream of `seed` [TQ-TRAN-6]."""
    outputs = []
    for k in range(1, count + 1):
        z = (seed + k * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        outputs.append(z ^ (z >> 31))
    return outputs


def seed_signs(seed: int, size: int) -> str:
    """The hex digits of the signs of a seed [TQ-TRAN-5, TQ-TRAN-6]."""
    words = splitmix64(seed, -(-size // 64))
    data = b"".join(word.to_bytes(8, "little") for word in words)
    bits = int.from_bytes(data, "little") & ((1 << size) - 1)
    return bits.to_bytes(-(-size // 8), "little").hex()


def lloyd_max(entries: int, vector_length: int, grid_size: int, iterations: int) -> list[float]:
    """The levels of [TQ-BOOK-7], rounded to multiples of 2^-17 (well within 10^-5) so that no library's last bit shows."""
    d = max(3, vector_length)
    radius = min(math.sqrt(d), 8.0)
    t = radius * (2 * np.arange(grid_size) / (grid_size - 1) - 1)
    density = np.maximum(1 - t**2 / d, 0) ** ((d - 3) / 2)

    def running_integral(y: Floats) -> Floats:
        trapezoids = (y[1:] + y[:-1]) / 2 * (2 * radius / (grid_size - 1))
        return np.concatenate([[0], np.cumsum(trapezoids)])

    mass, moment, start = running_integral(density), running_integral(t * density), running_integral(density ** (1 / 3))
    levels = np.interp((np.arange(entries) + 0.5) / entries * start[-1], start, t)
    for _ in range(iterations):
        borders = np.concatenate([[-radius], (levels[:-1] + levels[1:]) / 2, [radius]])
        cell_mass, cell_moment = np.diff(np.interp(borders, t, mass)), np.diff(np.interp(borders, t, moment))
        levels = np.array([m / f if f > 0 else c for m, f, c in zip(cell_moment, cell_mass, levels, strict=True)])
    return [float(level) + 0.0 for level in np.rint(levels * 2**17) / 2**17]


def byte_sum(entries: int) -> list[float]:
    """The levels of [TQ-BOOK-8]."""
    return [(sum((w * 0x83DCD12D % 2**32).to_bytes(4, "little")) - 510) / 128 for w in range(entries)]


def orthogonal(size: int, one: int) -> Floats:
    """An orthogonal matrix [size, size] of plane rotations by 3-4-5 and 5-12-13 triangles, in multiples of 1 / `one`."""
    q = np.eye(size)
    for k in range(size - 1):
        cos, sin = [(3 / 5, 4 / 5), (5 / 13, -12 / 13)][k % 2]
        a, b = q[k].copy(), q[k + 1].copy()
        q[k], q[k + 1] = cos * a - sin * b, sin * a + cos * b
    return np.rint(q * one) / one + 0.0


def encode(values: ArrayLike, dtype: str) -> bytes:
    """The little-endian bytes of float64 values that `dtype` holds exactly."""
    exact = np.asarray(values, np.float64)
    if dtype in oracle.FLOAT8:
        table = {value: byte for byte, value in enumerate(oracle.FLOAT8[dtype].tolist())}
        return bytes(table[value] for value in exact.ravel().tolist())
    single = exact.astype("<f4")
    if dtype == "F16":
        half = exact.astype("<f2")
        back, raw = half.astype(np.float64), half.tobytes()
    elif dtype in ("U8", "I8"):
        byte = exact.astype("i1" if dtype == "I8" else "u1")
        back, raw = byte.astype(np.float64), byte.tobytes()
    elif dtype == "BF16":
        upper = (single.view("<u4") >> np.uint32(16)).astype("<u2")
        back, raw = (upper.astype("<u4") << np.uint32(16)).view("<f4").astype(np.float64), upper.tobytes()
    else:
        back, raw = single.astype(np.float64), single.tobytes()
    if not np.array_equal(back, exact):
        raise ValueError(f"not exact in {dtype}")
    return raw


def pack(symbols: NDArray[np.int64], bits: int) -> bytes:
    """The codes [tiles, tile_bytes] of `symbols` [tiles, n], packed plainly [TQ-CODE-5, TQ-CODE-6]."""
    stream = (
        (symbols[:, :, None] >> np.arange(bits) & 1).astype(np.uint8).reshape(len(symbols), symbols.shape[1] * bits)
    )
    return np.packbits(stream, axis=1, bitorder="little").tobytes()


@dataclass
class Factor:
    """Scales or offsets to be drawn at random, or their `values` [rows, cols / G].

    `outer` is the shape [a, b] of the outer ones, or their values; None for none.
    """

    dtype: str = "F16"
    outer: tuple[int, int] | Floats | None = None
    outer_dtype: str = "F16"
    values: ArrayLike | None = None


@dataclass
class Stage:
    """A stage to be drawn at random; `scales` [rows, cols / G] and `symbols` [tiles, n] may be given.

    `factor` says more about the scales than `scale_dtype` and `scales` do.
    """

    bits: int
    codebook: str = "b"
    transform: str = "t"
    window: int | None = None
    vector_length: int | None = None
    tile: tuple[int, int] | None = None
    scale_dtype: str = "F16"
    scales: ArrayLike | None = None
    symbols: ArrayLike | None = None
    factor: Factor | None = None
    offsets: Factor | None = None
    keys: Json = field(default_factory=dict)  # further keys of the manifest's stage


@dataclass
class Raw:
    """A payload tensor."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Repo:
    """A conformant repository in memory."""

    def __init__(self, name: str, shards: int = 1) -> None:
        self.random = Random(name)
        self.shards = shards
        self.transforms: Json = {}
        self.codebooks: Json = {}
        self.tensors: Json = {}
        self.tied: Json = {}
        self.payload: dict[str, Raw] = {}
        self.others: dict[str, tuple[str, bytes]] = {}  # file name -> (role, content)
        self.unlisted: dict[str, bytes] = {}
        self.top: Json = {}  # keys of the manifest to set or override at the end
        self.metadata: Json | None = None
        self.header_tail = b""
        self.alignment = 64  # of the data of a payload file
        self.chunk_size: int | None = None  # of the files' digests
        self.products: list[tuple[str, Floats]] = []  # weights and the x [cols] that they are multiplied by
        self.order: list[str] | None = None  # storage names in the order of their data
        kinds = LOADER_KINDS
        self.loader_kind = kinds[int(self.random.words(1)[0]) % len(kinds)]

    # transforms

    def identity(self, size: int = 1, id: str = "t", **keys: Any) -> None:
        self.transforms[id] = {"kind": "identity", "size": size, **keys}

    def hadamard(self, *factors: int, seed: int | None = None, id: str = "t", **keys: Any) -> None:
        size = math.prod(factors)
        signs = seed_signs(self.random.integers(0, 2**32, [1])[0].item() if seed is None else seed, size)
        entry = {"kind": "hadamard", "size": size, "factors": list(factors), "signs": signs}
        self.transforms[id] = entry | ({} if seed is None else {"seed": seed}) | keys

    def dense(self, matrix: Floats, dtype: str, id: str = "t", **keys: Any) -> None:
        self.transforms[id] = {"kind": "dense", "size": len(matrix), "matrix": f"{id}.matrix", **keys}
        self.put(f"{id}.matrix", dtype, matrix)

    def givens(self, size: int, rounds: int, id: str = "t", **keys: Any) -> None:
        pairs = np.stack([np.argsort(self.random.words(size), kind="stable") for _ in range(rounds)])
        names = {"pairs": f"{id}.pairs", "angles": f"{id}.angles"}
        self.transforms[id] = {"kind": "givens", "size": size, **names, **keys}
        self.payload[f"{id}.pairs"] = Raw("I32", (rounds, size // 2, 2), pairs.astype("<i4").tobytes())
        self.put(f"{id}.angles", "F32", self.random.fixed(-1000, 1000, 256, (rounds, size // 2)))

    def permutation(self, size: int, id: str = "t", **keys: Any) -> None:
        index = np.argsort(self.random.words(size), kind="stable")
        self.transforms[id] = {"kind": "permutation", "size": size, "index": f"{id}.index", **keys}
        self.payload[f"{id}.index"] = Raw("I32", (size,), index.astype("<i4").tobytes())

    # codebooks

    def book(self, entries: int, p: int = 1, id: str = "b", values: Sequence[float] | None = None, **keys: Any) -> None:
        """An inline codebook, random unless `values` are given."""
        drawn = self.random.fixed(-600, 600, 256, [entries * p]).tolist() if values is None else list(values)
        self.codebooks[id] = {"entries": entries, "dimension": p, "values": drawn, **keys}

    def lloyd(self, entries: int, vector_length: int, id: str = "b", grid: int = 8193, iterations: int = 96) -> None:
        origin = {
            "method": "lloyd-max-sphere",
            "vector_length": vector_length,
            "grid_size": grid,
            "iterations": iterations,
        }
        self.book(entries, 1, id, lloyd_max(entries, vector_length, grid, iterations), origin=origin)

    def stored_book(
        self,
        entries: int,
        p: int = 1,
        dtype: str = "F16",
        id: str = "b",
        rows: int | None = None,
        values: Floats | None = None,
        **keys: Any,
    ) -> None:
        shape = (entries, p) if rows is None else (rows, entries, p)
        self.codebooks[id] = {"entries": entries, "dimension": p, "tensor": f"{id}.levels", **keys}
        if rows is not None:
            self.codebooks[id]["rows"] = rows
        span = 256 if dtype == "BF16" else 600  # what it holds exactly
        self.put(f"{id}.levels", dtype, self.random.fixed(-span, span, 256, shape) if values is None else values)

    # tensors

    def put(self, name: str, dtype: str, values: ArrayLike) -> None:
        """Adds a payload tensor of floats."""
        self.payload[name] = Raw(dtype, np.shape(values), encode(values, dtype))

    def draw_codes(self, stage: Stage, tiles: int, n: int, entries: int) -> Raw:
        """Random valid codes."""
        bits = stage.bits
        tile_bytes = -(-n * bits // 8)
        if stage.symbols is not None:
            data = pack(np.asarray(stage.symbols).reshape(tiles, n), bits)
        elif stage.window is None and entries < 2**bits:
            data = pack(self.random.integers(0, entries, (tiles, n)), bits)
        else:
            codes = self.random.integers(0, 256, (tiles, tile_bytes)).astype(np.uint8)
            if n * bits % 8:
                codes[:, -1] &= 2 ** (n * bits % 8) - 1
            data = codes.tobytes()
        return Raw("U8", (tiles, tile_bytes), data)

    def factor(self, record: Json, prefix: str, key: str, factor: Factor, vectors: tuple[int, int]) -> None:
        """Adds the scales or offsets [rows, cols / G] of a stage, and the outer ones if there are any."""
        record[key] = f"{prefix}.{key}"
        drawn: ArrayLike
        if factor.values is not None:
            drawn = np.reshape(factor.values, vectors)
        elif factor.dtype in oracle.FLOAT8:  # of both signs and all sizes where there are any
            signs = self.random.integers(0, 2, vectors) << 7
            numbers = self.random.integers(0, 127, vectors) + signs
            exponents = self.random.integers(118, 130, vectors)
            drawn = oracle.FLOAT8[factor.dtype][numbers if factor.dtype == "F8_E4M3" else exponents]
        elif factor.dtype in ("U8", "I8"):
            drawn = self.random.integers(
                0 if factor.dtype == "U8" else -128, 256 if factor.dtype == "U8" else 128, vectors
            )
        else:
            drawn = self.random.fixed(16 if key == "scales" else -256, 256, 256, vectors)
        self.put(f"{prefix}.{key}", factor.dtype, drawn)
        if factor.outer is not None:
            record[f"outer_{key}"] = f"{prefix}.outer_{key}"
            given = factor.outer
            outer = self.random.fixed(-32, 32, 4096, given) if isinstance(given, tuple) else given
            self.put(f"{prefix}.outer_{key}", factor.outer_dtype, outer)

    def weight(
        self,
        name: str,
        shape: Sequence[int],
        *stages: Stage,
        dtype: str = "F32",
        column_scale: str | Floats | None = None,
        column_scale_dtype: str = "F32",
        **keys: Any,
    ) -> None:
        """A quantized weight of random codes and scales; `column_scale` is a dtype (drawn) or the values."""
        rows, cols = math.prod(shape[:-1]), shape[-1]
        entry: Json = {"kind": "quantized", "shape": list(shape), "dtype": dtype, "effective_bits": 0, "stages": []}
        for k, stage in enumerate(stages):
            prefix = f"{name}.{k}" if k else name
            p, entries = (self.codebooks[stage.codebook][key] for key in ("dimension", "entries"))
            record: Json = {"bits": stage.bits, "codebook": stage.codebook, "transform": stage.transform}
            for key in ("window", "vector_length", "tile"):
                if (value := getattr(stage, key)) is not None:
                    record[key] = list(value) if key == "tile" else value
            record |= {"codes": f"{prefix}.codes", "scales": f"{prefix}.scales"} | stage.keys
            entry["stages"].append(record)
            entry["effective_bits"] += stage.bits / p
            tr, tc = stage.tile or (1, cols)
            self.payload[f"{prefix}.codes"] = self.draw_codes(stage, rows * cols // (tr * tc), tr * tc // p, entries)
            vectors = (rows, cols // (stage.vector_length or cols))
            scales = stage.factor or Factor(stage.scale_dtype, values=stage.scales)
            self.factor(record, prefix, "scales", scales, vectors)
            if stage.offsets is not None:
                self.factor(record, prefix, "offsets", stage.offsets, vectors)
        if column_scale is not None:
            entry["column_scale"] = f"{name}.column_scale"
            if isinstance(column_scale, str):
                self.put(f"{name}.column_scale", column_scale, self.random.fixed(-128, 128, 64, [cols]))
            else:
                self.put(f"{name}.column_scale", column_scale_dtype, column_scale)
        self.tensors[name] = entry | keys

    def passthrough(self, name: str, dtype: str, shape: Sequence[int], data: bytes | None = None, **keys: Any) -> None:
        """A passthrough tensor, of small random bytes unless `data` is given."""
        size = math.prod(shape) * SIZES[dtype]
        drawn = self.random.integers(0, 2 if dtype == "BOOL" else 64, [size]).astype(np.uint8).tobytes()
        self.tensors[name] = {
            "kind": "passthrough",
            "shape": list(shape),
            "dtype": dtype,
            "data": f"{name}.data",
        } | keys
        self.payload[f"{name}.data"] = Raw(dtype, tuple(shape), drawn if data is None else data)

    # the whole

    def features(self) -> list[str]:
        """The features in use [TQ-VER-1]."""
        weights = [t for t in self.tensors.values() if t["kind"] == "quantized"]
        stages = [(t["shape"][-1], s) for t in weights for s in t["stages"]]
        used = {
            "trellis": any((s.get("window") or s["bits"]) > s["bits"] for _, s in stages),
            "vector_codebook": any(b["dimension"] > 1 for b in self.codebooks.values()),
            "row_codebook": any(b.get("rows") is not None for b in self.codebooks.values()),
            "stages": any(len(t["stages"]) > 1 for t in weights),
            "column_scale": any(t.get("column_scale") is not None for t in weights),
            "tiles": any((s.get("tile") or [1, cols]) != [1, cols] for cols, s in stages),
            "offsets": any(s.get("offsets") for _, s in stages),
            "outer_scales": any(s.get("outer_scales") or s.get("outer_offsets") for _, s in stages),
            "fine_scales": any(
                (s.get("vector_length") or cols) < self.transforms[s["transform"]]["size"] for cols, s in stages
            ),
            **{
                kind: any(t["kind"] == kind for t in self.transforms.values())
                for kind in ("dense", "givens", "permutation")
            },
        }
        return [feature for feature in FEATURES if used[feature]]

    def accounting(self) -> Json:
        """The totals of [TQ-ACC-1, TQ-ACC-2]."""
        kinds: dict[str, list[int]] = {"quantized": [], "passthrough": []}
        original = 0
        for t in self.tensors.values():
            kinds[t["kind"]].append(math.prod(t["shape"]))
            original += math.prod(t["shape"]) * SIZES[t["dtype"]]
        stored = sum(len(raw.data) for raw in self.payload.values())
        return {
            "original_bytes": original,
            "stored_bytes": stored,
            "ratio": round(original / stored, 6) if stored else 0,
            "quantized_tensors": len(kinds["quantized"]),
            "passthrough_tensors": len(kinds["passthrough"]),
            "quantized_scalars": sum(kinds["quantized"]),
            "passthrough_scalars": sum(kinds["passthrough"]),
        }

    def payload_file(self, names: Sequence[str]) -> bytes:
        """A safetensors file of the tensors `names`; the data may lie in another order than the header's keys."""
        header: Json = {} if self.metadata is None else {"__metadata__": self.metadata}
        header |= {name: {"dtype": self.payload[name].dtype, "shape": list(self.payload[name].shape)} for name in names}
        data_order = sorted(names, key=self.order.index) if self.order else names
        offsets = layout({name: (SIZES[self.payload[name].dtype], len(self.payload[name].data)) for name in data_order})
        for name, begin in offsets.items():
            header[name]["data_offsets"] = [begin, begin + len(self.payload[name].data)]
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode() + self.header_tail
        return join(text, b"".join(self.payload[name].data for name in offsets), self.alignment)

    def file_entry(self, role: str, content: bytes) -> Json:
        """An entry of `files` [TQ-REPO-4, TQ-REPO-8]."""
        entry: Json = {"role": role, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if self.chunk_size is not None:
            pieces = [content[k : k + self.chunk_size] for k in range(0, len(content), self.chunk_size)]
            entry |= {"chunk_size": self.chunk_size, "chunks": [hashlib.sha256(piece).hexdigest() for piece in pieces]}
        return entry

    def multiply(self, name: str) -> None:
        """Has the weight `name` multiplied by an x drawn at random, of binary32 values [TQ-FUSE-3]."""
        x = self.random.fixed(-(2**12), 2**12, 2**10, [self.tensors[name]["shape"][-1]])
        self.products.append((name, x))

    def manifest(self) -> Json:
        """The manifest."""
        files: dict[str, tuple[str, bytes]] = {}
        names = list(self.payload)
        for k in range(self.shards):
            shard = "" if self.shards == 1 else f"-{k + 1:05}-of-{self.shards:05}"
            files[f"turboquant_weights{shard}.safetensors"] = ("payload", self.payload_file(names[k :: self.shards]))
        self.contents = {name: content for name, (_, content) in (files | self.others).items()}
        return {
            "format": "tqformat",
            "format_version": "1.0",
            "features": self.features(),
            "generator": "tqformat conformance vectors",
            "base_model": {"id": "example/model"},
            "loader_kind": self.loader_kind,
            "quantization": {"method": "random", "bits": 2},
            "files": {name: self.file_entry(role, content) for name, (role, content) in (files | self.others).items()},
            "transforms": self.transforms,
            "codebooks": self.codebooks,
            "tensors": self.tensors,
            **({"tied_weights": self.tied} if self.tied else {}),
            "accounting": self.accounting(),
        } | self.top

    def build(self) -> tuple[Json, dict[str, bytes], Json, list[Json]]:
        """The manifest, the other files of the repository, and the content of `expected.json` and `products.json`."""
        manifest = self.manifest()
        parts = {name: (raw.dtype, raw.shape, raw.data) for name, raw in self.payload.items()}
        products = [product(manifest, parts, name, x) for name, x in self.products]
        return manifest, self.contents | self.unlisted, expected(oracle.decode(manifest, parts)), products


def product(manifest: Json, payload: oracle.Payload, name: str, x: Floats) -> Json:
    """An entry of `products.json`: the oracle's fused product with floats in hexadecimal."""
    y, bound = oracle.fused_product(manifest, payload, name, x)
    rows = {"x": x.tolist(), "y": y, "bound": bound}
    return {"weight": name} | {key: [value.hex() for value in values] for key, values in rows.items()}


def unrepeated(values: Floats) -> Floats:
    """The rows [.., cols] that repeat to the end of a large weight, all of them where none do or the weight is small."""
    rows = values.reshape(-1, values.shape[-1])
    for period in range(1, 65 if values.size >= LARGE else 1):
        if np.array_equal(rows[period:], rows[:-period]):
            return rows[:period]
    return rows


def expected(decoded: dict[str, oracle.Decoded]) -> Json:
    """The content of `expected.json`: the oracle's tensors with floats in hexadecimal."""
    out: Json = {}
    for name, tensor in decoded.items():
        out[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape)}
        if tensor.data is not None:
            out[name]["bytes"] = tensor.data.hex()
        else:
            out[name]["exact"] = [value.hex() for value in unrepeated(tensor.exact).ravel().tolist()]
            out[name]["tolerance"] = [value.hex() for value in unrepeated(tensor.tolerance).ravel().tolist()]
    return out


def dump_tables(document: Json) -> str:
    """JSON text with one line for each key, and for each key of a table of objects."""
    lines = []
    for key, value in document.items():
        if isinstance(value, dict) and value and all(isinstance(v, dict | list) for v in value.values()):
            inner = ",\n".join(f"  {compact(k)}: {compact(v)}" for k, v in value.items())
            lines.append(f" {compact(key)}: {{\n{inner}\n }}")
        else:
            lines.append(f" {compact(key)}: {compact(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
