"""The validator: a sound repository passes, each check finds the breach it is there for, and nothing brings it down."""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conformance import checks_data, checks_decode, jsonio, oracle, shape
from conformance.__main__ import main
from conformance.check import CHECKS, Judgement, judge
from conformance.folder import Folder
from conformance.formulas import lloyd_max_sphere, seed_signs
from conformance.subject import Options, Subject
from conformance.vectors import SIZES, cases, join, layout, load_case, materialise

MANIFEST, PAYLOAD = "quant_manifest.json", "turboquant_weights.safetensors"

# A tiny repository with every feature


@dataclass
class Repo:
    """A repository in memory: change it, then write it."""

    manifest: dict[str, Any]
    tensors: dict[str, tuple[str, list[int], bytes]]  # storage name -> (dtype, shape, bytes)
    files: dict[str, bytes] = field(default_factory=lambda: {"config.json": b"{}"})
    accounting: dict[str, Any] = field(default_factory=dict)  # values that are not to be recomputed
    header: Callable[[dict[str, Any]], Any] = lambda header: None
    shards: Callable[[bytes], dict[str, bytes]] = lambda payload: {PAYLOAD: payload}
    listed: Callable[[dict[str, Any]], Any] = lambda files: None
    text: Callable[[bytes], bytes] = lambda text: text
    payload: Callable[[bytes], bytes] = lambda payload: payload
    after: Callable[[Path], Any] = lambda path: None

    def write(self, path: Path) -> Path:
        path.mkdir(parents=True)
        header: dict[str, Any] = {}
        begins = layout({name: (SIZES[dtype], len(raw)) for name, (dtype, _, raw) in self.tensors.items()})
        for name, (dtype, dims, raw) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": dims, "data_offsets": [begins[name], begins[name] + len(raw)]}
        self.header(header)
        data = b"".join(self.tensors[name][2] for name in begins)
        payload = self.payload(join(json.dumps(header).encode(), data))
        files = {**self.files, **self.shards(payload)}
        for name, content in files.items():
            (path / name).write_bytes(content)
        manifest = copy.deepcopy(self.manifest)
        table = {name: self.entry(name, content) for name, content in files.items()}
        self.listed(table)
        manifest.setdefault("files", table)
        manifest.setdefault("accounting", self.totals() | self.accounting)
        (path / MANIFEST).write_bytes(self.text(json.dumps(manifest).encode()))
        self.after(path)
        return path

    @staticmethod
    def entry(name: str, content: bytes) -> dict[str, Any]:
        role = "payload" if name.endswith(".safetensors") else "code" if name.endswith(".py") else "support"
        return {"role": role, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def totals(self) -> dict[str, Any]:
        entries = list(self.manifest["tensors"].values())
        original = sum(int(np.prod(e["shape"], dtype=object)) * SIZES.get(e["dtype"], 1) for e in entries)
        stored = sum(len(raw) for _, _, raw in self.tensors.values())
        totals: dict[str, Any] = {"original_bytes": original, "stored_bytes": stored, "ratio": original / stored}
        for kind in ("quantized", "passthrough"):
            of_kind = [e for e in entries if e["kind"] == kind]
            totals[f"{kind}_tensors"] = len(of_kind)
            totals[f"{kind}_scalars"] = sum(int(np.prod(e["shape"], dtype=object)) for e in of_kind)
        return totals


def repo() -> Repo:
    """Weights `a` (two stages: a trellis under givens; vectors in tiles), `b` (per-row levels, dense), `c` (ternary), `d` (two
    levels of scales and offsets, finer than a permutation), `n`."""
    rng = np.random.default_rng(0)
    dense = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    signs = seed_signs(7, 12)

    def floats(*dims: int) -> tuple[str, list[int], bytes]:
        return "F32", list(dims), rng.uniform(0.5, 1, dims).astype("<f4").tobytes()

    def codes(*dims: int) -> tuple[str, list[int], bytes]:
        return "U8", list(dims), rng.integers(0, 256, dims, np.uint8).tobytes()

    def ternary(rows: int) -> tuple[str, list[int], bytes]:  # 13 symbols of 2 bits below 3: 26 bits in 4 bytes
        packed = [sum(int(s) << 2 * i for i, s in enumerate(rng.integers(0, 3, 13))) for _ in range(rows)]
        return "U8", [rows, 4], b"".join(value.to_bytes(4, "little") for value in packed)

    tensors = {
        "a.codes.0": codes(4, 3),  # rows of 24 symbols, 1 bit
        "a.scales.0": floats(4, 2),
        "a.codes.1": codes(4, 6),  # tiles [2, 12] of 12 vectors of 2, 4 bits
        "a.scales.1": floats(4, 1),
        "a.columns": floats(24),
        "b.codes": codes(2, 4),  # rows of 8 symbols, 4 bits
        "b.scales": ("BF16", [2, 2], bytes([0x80, 0x3F] * 4)),
        "b.levels": floats(2, 16, 1),
        "dense": ("F32", [4, 4], dense.astype("<f4").tobytes()),
        "pairs": ("I32", [2, 6, 2], np.array([rng.permutation(12) for _ in range(2)], "<i4").tobytes()),
        "angles": floats(2, 6),
        "c.codes": ternary(3),
        "c.scales": floats(3, 1),
        "d.codes": codes(2, 2),  # rows of 4 symbols, 4 bits
        "d.scales": ("U8", [2, 4], bytes(range(8))),
        "d.outer": floats(2, 2),
        "d.offsets": ("F8_E4M3", [2, 4], bytes(range(8))),
        "d.outer_offsets": floats(1, 1),
        "index": ("I32", [4], np.array([2, 0, 3, 1], "<i4").tobytes()),
        "n": ("F16", [3], b"\0\x7c" * 3),  # infinities: a passthrough tensor may hold them
    }

    def stage(bits: int, book: str, transform: str, codes: str, scales: str, **more: Any) -> dict[str, Any]:
        return {"bits": bits, "codebook": book, "transform": transform, "codes": codes, "scales": scales, **more}

    trellis = stage(1, "trellis", "givens", "a.codes.0", "a.scales.0", window=3, vector_length=12)
    tiled = stage(4, "vectors", "hadamard", "a.codes.1", "a.scales.1", tile=[2, 12], vector_length=None)
    second = {"outer_scales": "d.outer", "offsets": "d.offsets", "outer_offsets": "d.outer_offsets"}
    fine = stage(4, "vectors", "permutation", "d.codes", "d.scales", vector_length=2, **second)
    lloyd = [float(x) for x in lloyd_max_sphere(3, 13, 1025, 10)]
    origin = {"method": "lloyd-max-sphere", "vector_length": 13, "grid_size": 1025, "iterations": 10}
    manifest = {
        "format": "tqformat",
        "format_version": "1.0",
        "features": [
            "trellis",
            "vector_codebook",
            "row_codebook",
            "stages",
            "column_scale",
            "tiles",
            "offsets",
            "outer_scales",
            "fine_scales",
            "dense",
            "givens",
            "permutation",
        ],
        "generator": "test",
        "base_model": {"id": "none/none"},
        "loader_kind": "feature-extraction",
        "quantization": {"method": "test", "bits": 2.5},
        "transforms": {
            "givens": {"kind": "givens", "size": 12, "pairs": "pairs", "angles": "angles"},
            "hadamard": {"kind": "hadamard", "size": 12, "factors": [12], "signs": signs, "seed": 7},
            "dense": {"kind": "dense", "size": 4, "matrix": "dense"},
            "permutation": {"kind": "permutation", "size": 4, "index": "index"},
            "none": {"kind": "identity", "size": 1},
        },
        "codebooks": {
            "trellis": {"entries": 8, "dimension": 1, "values": list(range(8)), "origin": None},
            "vectors": {"entries": 16, "dimension": 2, "values": [x / 16 for x in range(32)], "tensor": None},
            "rows": {"entries": 16, "dimension": 1, "tensor": "b.levels", "rows": 2},
            "ternary": {"entries": 3, "dimension": 1, "values": lloyd, "origin": origin},
        },
        "tensors": {
            "a": {
                "kind": "quantized",
                "shape": [2, 2, 24],
                "dtype": "BF16",
                "effective_bits": 3,
                "stages": [trellis, tiled],
                "column_scale": "a.columns",
            },
            "b": {
                "kind": "quantized",
                "shape": [2, 8],
                "dtype": "F16",
                "effective_bits": 4.0,
                "stages": [stage(4, "rows", "dense", "b.codes", "b.scales", vector_length=4)],
            },
            "c": {
                "kind": "quantized",
                "shape": [3, 13],
                "dtype": "F32",
                "effective_bits": 2,
                "stages": [stage(2, "ternary", "none", "c.codes", "c.scales")],
            },
            "d": {"kind": "quantized", "shape": [2, 8], "dtype": "F32", "effective_bits": 2, "stages": [fine]},
            "n": {"kind": "passthrough", "shape": [3], "dtype": "F16", "data": "n"},
        },
        "tied_weights": {"alias": "a"},
    }
    return Repo(manifest, tensors)


def judged(path: Path, level: str = "L3", skip: frozenset[str] = frozenset(), **options: Any) -> Judgement:
    folder = Folder(path, options.pop("hub_cache", False))
    try:
        return judge(Subject(folder, Options(**options)), level, skip)
    finally:
        folder.close()


def test_a_sound_repository_passes(tmp_path: Path) -> None:
    judgement = judged(repo().write(tmp_path / "r"))
    assert judgement.violations == []
    assert judgement.passed == "L3"
    assert judgement.unreached == {}  # without a loader there is none to judge


# Each check finds the breach that it is there for

Change = Callable[[Repo], Any]
CASES: dict[str, list[tuple[str, str | None, Change]]] = {}  # check -> (code, pointer, change)


def case(id: str, code: str, pointer: str | None = None) -> Callable[[Change], Change]:
    def listed(change: Change) -> Change:
        CASES.setdefault(id, []).append((code, pointer, change))
        return change

    return listed


def put(id: str, code: str, path: str, value: Any, pointer: str | None = None) -> None:
    """A case that sets one value of the manifest; `...` removes the key."""

    def change(r: Repo) -> None:
        *parents, key = path.strip("/").split("/")
        place: Any = r.manifest
        for parent in parents:
            place = place[int(parent)] if isinstance(place, list) else place[parent]
        if value is ...:
            del place[key]
        else:
            place[int(key) if isinstance(place, list) else key] = value

    CASES.setdefault(id, []).append((code, pointer or path, change))


def text(id: str, code: str, old: bytes, new: bytes, pointer: str | None = None) -> None:
    """A case that replaces one piece of the manifest's text."""

    def change(r: Repo) -> None:
        def replaced(manifest: bytes) -> bytes:
            assert manifest.count(old) == 1, old
            return manifest.replace(old, new)

        r.text = replaced

    CASES.setdefault(id, []).append((code, pointer, change))


def raw(id: str, code: str, name: str, at: int, data: bytes, pointer: str) -> None:
    """A case that overwrites bytes of a payload tensor."""

    def change(r: Repo) -> None:
        dtype, dims, old = r.tensors[name]
        r.tensors[name] = dtype, dims, old[:at] + data + old[at + len(data) :]

    CASES.setdefault(id, []).append((code, pointer, change))


def after(id: str, code: str, pointer: str | None, change: Callable[[Path], Any]) -> None:
    CASES.setdefault(id, []).append((code, pointer, lambda r: setattr(r, "after", change)))


def header(id: str, code: str, change: Callable[[dict[str, Any]], Any], pointer: str | None = None) -> None:
    CASES.setdefault(id, []).append((code, pointer, lambda r: setattr(r, "header", change)))


def payload(id: str, code: str, change: Callable[[bytes], bytes]) -> None:
    CASES.setdefault(id, []).append((code, None, lambda r: setattr(r, "payload", change)))


def relinked(path: Path, name: str) -> None:
    (path / name).rename(path.parent / name)
    (path / name).symlink_to(path.parent / name)


after("manifest.missing", "BIND.MISSING_FILE", None, lambda p: (p / MANIFEST).unlink())
after("manifest.type", "PATH.TYPE", None, lambda p: relinked(p, MANIFEST))
after("manifest.type", "PATH.TYPE", None, lambda p: ((p / MANIFEST).unlink(), os.mkfifo(p / MANIFEST)))
after("manifest.size", "LIMIT.SIZE", None, lambda p: os.truncate(p / MANIFEST, 64 * 2**20 + 1))
text("json.encoding", "JSON.ENCODING", b'"test", "bits"', b'"\xff", "bits"')
text("json.encoding", "JSON.ENCODING", b'{"format":', b'\xef\xbb\xbf{"format":')
text("json.surrogate", "JSON.ENCODING", b'"generator": "test"', b'"generator": "\\ud800"', "/generator")
text("json.syntax", "JSON.SYNTAX", b'"generator": "test",', b'"generator": "test",,')
text("json.constant", "JSON.SYNTAX", b'"bits": 2.5', b'"bits": NaN', "/quantization/bits")
after("json.object", "JSON.SYNTAX", "", lambda p: (p / MANIFEST).write_bytes(b"[]"))
text("json.duplicate_key", "JSON.DUPLICATE_KEY", b'"dimension": 2', b'"dimension": 2, "dim\\u0065nsion": 2')
text("json.integer", "JSON.NUMBER", b'"bits": 2.5', b'"bits": 9007199254740992', "/quantization/bits")
text("json.number", "JSON.NUMBER", b'"bits": 2.5', b'"bits": 1e999', "/quantization/bits")
text("json.depth", "JSON.DEPTH", b'"none/none"', b'"none/none", "extra": {"x": ' + b"[" * 62 + b"]" * 62 + b"}")
put("version.format", "SCHEMA.VERSION", "/format", ...)
put("version.number", "SCHEMA.VERSION", "/format_version", 1)
put("version.number", "SCHEMA.VERSION", "/format_version", ...)
put("version.format", "SCHEMA.VERSION", "/format", "other")
put("version.number", "SCHEMA.VERSION", "/format_version", "2.0")
put("version.number", "SCHEMA.VERSION", "/format_version", "1.0\n")
put("version.features", "SCHEMA.UNKNOWN_FEATURE", "/features", ["sparse"], "/features/0")


@case("path.name", "PATH.NAME", "/files/..~1x")
def _(r: Repo) -> None:
    r.listed = lambda files: files.update({"../x": Repo.entry("x", b"")})


@case("path.name", "PATH.NAME", "/files/config.json\n")
def _(r: Repo) -> None:
    r.listed = lambda files: files.update({"config.json\n": files.pop("config.json")})


@case("path.reserved", "PATH.NAME", "/files/README.md")
def _(r: Repo) -> None:
    r.files["README.md"] = b""


@case("path.reserved", "PATH.NAME", "/files/__PyCache__")
def _(r: Repo) -> None:
    r.listed = lambda files: files.update({"__PyCache__": Repo.entry("x", b"")})


@case("path.device", "PATH.NAME", "/files/Aux.json")
def _(r: Repo) -> None:
    r.files["Aux.json"] = b""


@case("schema.chunks_alone", "SCHEMA.MISSING_FIELD", "/files/config.json/chunk_size")
def _(r: Repo) -> None:
    r.listed = lambda files: files["config.json"].update(chunks=[])


@case("schema.chunks_count", "SCHEMA.VALUE", "/files/config.json/chunks")
def _(r: Repo) -> None:
    r.listed = lambda files: files["config.json"].update(chunk_size=4096, chunks=["0" * 64] * 2)


@case("bind.chunks", "BIND.DIGEST", "/files/config.json/chunks/2")
def _(r: Repo) -> None:
    pieces = [b"a" * 4096, b"b" * 4096, b"c"]
    chunks = [hashlib.sha256(piece).hexdigest() for piece in pieces[:2]] + ["0" * 64]
    r.files["config.json"] = b"".join(pieces)
    r.listed = lambda files: files["config.json"].update(chunk_size=4096, chunks=chunks)


@case("path.collision", "PATH.COLLISION", "/files/Config.json")
def _(r: Repo) -> None:
    r.files["Config.json"] = b""


after("path.type", "PATH.TYPE", "/files/config.json", lambda p: relinked(p, "config.json"))
after("path.type", "PATH.TYPE", f"/files/{PAYLOAD}", lambda p: ((p / PAYLOAD).unlink(), os.mkfifo(p / PAYLOAD)))
after(
    "path.type",
    "PATH.TYPE",
    "/files/config.json",
    lambda p: ((p / "config.json").unlink(), (p / "config.json").mkdir()),
)

put("schema.shape.unknown_field", "SCHEMA.UNKNOWN_FIELD", "/tensors/a/stages/0/spare", 1)
put("schema.shape.missing_field", "SCHEMA.MISSING_FIELD", "/tensors/a/stages/1/scales", ...)
put("schema.shape.missing_field", "SCHEMA.MISSING_FIELD", "/quantization/bits", ...)
put("schema.shape.type", "SCHEMA.TYPE", "/tensors/a/stages/0/bits", 1.0)
put("schema.shape.type", "SCHEMA.TYPE", "/tensors/a/stages/0/bits", True)
put("schema.shape.type", "SCHEMA.TYPE", "/tied_weights", [])
put("schema.shape.type", "SCHEMA.TYPE", "/loader_kind", 3)
put("schema.shape.value", "SCHEMA.VALUE", "/tensors/a/stages/0/bits", 17)
put("schema.shape.value", "SCHEMA.VALUE", "/tensors/n/data", "n\n")
put("schema.shape.value", "SCHEMA.VALUE", "/features/1", "trellis", "/features")
put("schema.shape.ambiguous", "SCHEMA.AMBIGUOUS", "/tensors/n/column_scale", None)
put("schema.shape.ambiguous", "SCHEMA.AMBIGUOUS", "/transforms/none/signs", "00")
put("schema.reference", "SCHEMA.REFERENCE", "/tensors/c/stages/0/transform", "nowhere")
put("schema.unused", "SCHEMA.REFERENCE", "/transforms/spare", {"kind": "identity", "size": 1})
put("schema.columns", "SCHEMA.VALUE", "/tensors/c/shape", [3, 0], "/tensors/c/shape/1")
put("schema.effective_bits", "SCHEMA.VALUE", "/tensors/a/effective_bits", 3.00001)
put("schema.bits", "SCHEMA.VALUE", "/tensors/c/stages/0/bits", 9)
put("schema.window", "SCHEMA.VALUE", "/tensors/c/stages/0/window", 1)
put("schema.tile_rows", "SCHEMA.VALUE", "/tensors/a/stages/1/tile", [3, 12], "/tensors/a/stages/1/tile/0")
put("schema.tile_columns", "SCHEMA.VALUE", "/tensors/a/stages/1/tile", [2, 10], "/tensors/a/stages/1/tile/1")
put("schema.tile_dimension", "SCHEMA.VALUE", "/tensors/a/stages/1/tile", [2, 3], "/tensors/a/stages/1/tile")
put("schema.vector_dimension", "SCHEMA.VALUE", "/tensors/a/stages/1/vector_length", 3)
put("schema.tile_window", "SCHEMA.VALUE", "/tensors/a/stages/0/tile", [1, 2], "/tensors/a/stages/0/tile")
put("schema.tile_size", "LIMIT.SIZE", "/tensors/c", {"rows": 0}, "/tensors/c/stages/0/tile/0")
put("schema.levels_twice", "SCHEMA.AMBIGUOUS", "/codebooks/rows/values", [0.0] * 16, "/codebooks/rows")
put("schema.levels_missing", "SCHEMA.MISSING_FIELD", "/codebooks/vectors/values", None, "/codebooks/vectors")
put("schema.values_count", "SCHEMA.VALUE", "/codebooks/vectors/values", [0.0] * 31)
put("schema.rows_inline", "SCHEMA.VALUE", "/codebooks/vectors/rows", 4)
put("schema.rows_weight", "SCHEMA.VALUE", "/codebooks/rows/rows", 3, "/tensors/b/stages/0/codebook")
put("schema.entries_trellis", "SCHEMA.VALUE", "/tensors/a/stages/0/window", 4, "/tensors/a/stages/0/codebook")
put("schema.entries_plain", "SCHEMA.VALUE", "/tensors/b/stages/0/bits", 3, "/tensors/b/stages/0/codebook")
put("schema.book_size", "LIMIT.SIZE", "/codebooks/rows/entries", 2**16, "/codebooks/rows")
put("schema.origin", "SCHEMA.VALUE", "/codebooks/rows/origin", {"method": "lloyd-max-sphere"}, "/codebooks/rows/rows")
put("schema.vector_columns", "SCHEMA.VALUE", "/tensors/c/stages/0/vector_length", 2)
put("schema.block", "SCHEMA.VALUE", "/tensors/a/stages/0/vector_length", 8, "/tensors/a/stages/0/transform")
put("schema.block_columns", "SCHEMA.VALUE", "/tensors/b/stages/0/transform", "hadamard")
put("schema.outer_alone", "SCHEMA.MISSING_FIELD", "/tensors/d/stages/0/offsets", None)
put("schema.factors", "SCHEMA.VALUE", "/transforms/hadamard/factors", [2, 6], "/transforms/hadamard/factors/1")
put("schema.factors_product", "SCHEMA.VALUE", "/transforms/hadamard/factors", [4, 4])
put("schema.signs_length", "SCHEMA.VALUE", "/transforms/hadamard/signs", "000000")
put("schema.signs_padding", "SCHEMA.VALUE", "/transforms/hadamard/signs", "0010")
put("schema.features_missing", "SCHEMA.FEATURES", "/features", [], "/features")
put("schema.features_unused", "SCHEMA.FEATURES", "/tensors/a/column_scale", None, "/features/4")


@case("schema.scalars", "LIMIT.SIZE", "/tensors/n/shape")
def _(r: Repo) -> None:
    r.manifest["tensors"]["n"]["shape"] = [2**30, 2**30]
    r.accounting = {"original_bytes": 0, "passthrough_scalars": 0}


@case("schema.loader_role", "SCHEMA.VALUE", "/files/load_quantized.py/role")
def _(r: Repo) -> None:
    r.files["load_quantized.py"] = b""
    r.listed = lambda files: files["load_quantized.py"].update(role="document")


# two values that one change cannot make: a weight tall enough for its tiles to be too big, and a full origin
def _tall(r: Repo) -> None:
    stage = r.manifest["tensors"]["c"]["stages"][0] | {"tile": [2**19, 13]}
    r.manifest["tensors"]["c"] |= {"shape": [2**19, 13], "stages": [stage]}


CASES["schema.tile_size"][0] = (*CASES["schema.tile_size"][0][:2], _tall)
_lloyd = {"method": "lloyd-max-sphere", "vector_length": 8, "grid_size": 9, "iterations": 1}
put("schema.origin", "SCHEMA.VALUE", "/codebooks/vectors/origin", _lloyd, "/codebooks/vectors/dimension")
CASES["schema.origin"].pop(0)
put(
    "schema.byte_sum",
    "SCHEMA.VALUE",
    "/codebooks/vectors/origin",
    {"method": "byte-sum"},
    "/codebooks/vectors/dimension",
)
put("schema.byte_sum", "SCHEMA.VALUE", "/codebooks/rows/origin", {"method": "byte-sum"}, "/codebooks/rows/rows")
put("schema.book_size", "LIMIT.SIZE", "/codebooks/rows", {"entries": 2**16, "dimension": 32, "tensor": "b.levels"})
CASES["schema.book_size"].pop(0)

after("container.absent", "BIND.MISSING_FILE", f"/files/{PAYLOAD}", lambda p: (p / PAYLOAD).unlink())
payload("container.header_length", "CONTAINER.HEADER_LENGTH", lambda data: (2**62).to_bytes(8, "little") + data[8:])
payload("container.header_length", "CONTAINER.HEADER_LENGTH", lambda data: (1).to_bytes(8, "little") + data[8:])
payload("container.header_length", "CONTAINER.HEADER_LENGTH", lambda data: b"1234567")
payload("container.header", "CONTAINER.HEADER", lambda data: data[:8] + b"[" + data[9:])
payload("container.header", "CONTAINER.HEADER", lambda data: data[:8] + b"{\xff" + data[10:])
payload(
    "container.duplicate_name", "CONTAINER.DUPLICATE_NAME", lambda data: data.replace(b'"a.codes.1"', b'"a.codes.0"')
)
header("container.metadata", "CONTAINER.HEADER", lambda h: h.update(__metadata__={"a": 1}), "/__metadata__")
header("container.entry", "CONTAINER.HEADER", lambda h: h["n"].update(extra=1), "/n")
header("container.entry", "CONTAINER.HEADER", lambda h: h["n"].update(shape=[3.0]), "/n/shape")
header("container.entry", "CONTAINER.HEADER", lambda h: h["n"].update(shape=[True, 3]), "/n/shape")
header("container.entry", "CONTAINER.HEADER", lambda h: h["n"].update(data_offsets=[-1, 5]), "/n/data_offsets")
header("container.name", "CONTAINER.HEADER", lambda h: h.update({"\n": h.pop("n")}), "/\n")
header("container.dtype", "CONTAINER.DTYPE", lambda h: h["n"].update(dtype="F128"), "/n/dtype")
header("container.shape", "CONTAINER.SHAPE", lambda h: h["n"].update(shape=[4]), "/n/data_offsets")
header("container.shape", "CONTAINER.SHAPE", lambda h: h["n"].update(shape=[2**32, 2**32]), "/n/shape")
header("container.offsets", "CONTAINER.OFFSETS", lambda h: h["n"].update(data_offsets=[10**6, 10**6 + 6]))
header("container.offsets", "CONTAINER.OFFSETS", lambda h: h.pop("c.scales"))
header(
    "container.offsets",
    "CONTAINER.OFFSETS",
    lambda h: h["c.scales"].update(data_offsets=h["b.scales"]["data_offsets"], dtype="U16", shape=[4]),
)
header(
    "container.offsets",
    "CONTAINER.OFFSETS",
    lambda h: h.update(e={"dtype": "U8", "shape": [0], "data_offsets": [1, 1]}),
)
payload("container.offsets", "CONTAINER.OFFSETS", lambda data: data + b"\0")


payload(
    "container.alignment",
    "CONTAINER.ALIGNMENT",
    lambda data: (int.from_bytes(data[:8], "little") + 1).to_bytes(8, "little") + b"{ " + data[9:],
)


def two(first: str, second: str) -> Callable[[bytes], dict[str, bytes]]:
    extra = b'{"n":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    return lambda data: {first: data, second: len(extra).to_bytes(8, "little") + extra + b"\0"}


SHARDS = ("turboquant_weights-00001-of-00002.safetensors", "turboquant_weights-00002-of-00002.safetensors")


@case("container.name_in_shards", "CONTAINER.DUPLICATE_NAME", "/n")
def _(r: Repo) -> None:
    r.shards = two(*SHARDS)


@case("bind.shards", "BIND.SHARDS", "/files/other.safetensors")
def _(r: Repo) -> None:
    r.shards = lambda data: {"other.safetensors": data}


@case("bind.empty_shard", "BIND.SHARDS", f"/files/{SHARDS[1]}")
def _(r: Repo) -> None:
    r.shards = lambda data: {SHARDS[0]: data, SHARDS[1]: (2).to_bytes(8, "little") + b"{}"}


after("bind.missing_file", "BIND.MISSING_FILE", "/files/config.json", lambda p: (p / "config.json").unlink())
after("bind.extra_file", "BIND.EXTRA_FILE", None, lambda p: (p / "model.bin").write_bytes(b""))
after("bind.extra_file", "BIND.EXTRA_FILE", None, lambda p: (p / "folder").mkdir())
after("bind.extra_file", "BIND.EXTRA_FILE", None, lambda p: (p / "__pycache__").write_bytes(b""))
after("bind.extra_file", "BIND.EXTRA_FILE", None, lambda p: (p / "README.md").mkdir())
after("bind.extra_file", "BIND.EXTRA_FILE", None, lambda p: (p / "x").symlink_to("/etc/passwd"))
after("bind.size", "BIND.SIZE", "/files/config.json/size", lambda p: (p / "config.json").write_bytes(b"{ }"))
after("bind.digest", "BIND.DIGEST", "/files/config.json/sha256", lambda p: (p / "config.json").write_bytes(b"[]"))
put("bind.missing_tensor", "BIND.MISSING_TENSOR", "/tensors/n/data", "m")
put(
    "bind.multiple",
    "BIND.MULTIPLE",
    "/tensors/m",
    {"kind": "passthrough", "shape": [3], "dtype": "F16", "data": "n"},
    "/tensors/m/data",
)
put("bind.dtype", "BIND.TENSOR", "/tensors/n/dtype", "BF16", "/tensors/n/data")
put("bind.shape", "BIND.TENSOR", "/tensors/n/shape", [3, 1], "/tensors/n/data")
put("bind.dtype", "BIND.TENSOR", "/tensors/d/stages/0/outer_scales", None, "/tensors/d/stages/0/scales")
put("bind.tied_alias", "BIND.TIED", "/tied_weights/n", "a")
put("bind.tied_target", "BIND.TIED", "/tied_weights/other", "alias")


@case("bind.extra_tensor", "BIND.EXTRA_TENSOR", "/spare")
def _(r: Repo) -> None:
    r.tensors["spare"] = "U8", [0], b""


@case("bind.outer", "BIND.TENSOR", "/tensors/d/stages/0/outer_scales")
def _(r: Repo) -> None:
    r.tensors["d.outer"] = "F32", [2, 3], bytes(24)


@case("bind.outer", "BIND.TENSOR", "/tensors/d/stages/0/outer_offsets")
def _(r: Repo) -> None:
    r.tensors["d.outer_offsets"] = "F32", [4, 1], bytes(16)


@case("bind.rounds", "BIND.TENSOR", "/transforms/givens")
def _(r: Repo) -> None:
    r.tensors["angles"] = "F32", [3, 6], bytes(72)


@case("bind.accounting", "BIND.ACCOUNTING", "/accounting/original_bytes")
def _(r: Repo) -> None:
    r.accounting["original_bytes"] = 1


@case("bind.ratio", "BIND.ACCOUNTING", "/accounting/ratio")
def _(r: Repo) -> None:
    r.accounting["ratio"] = r.totals()["ratio"] + 0.0011


@case("pack.length", "PACK.LENGTH", "/tensors/c/stages/0/codes")
def _(r: Repo) -> None:
    r.tensors["c.codes"] = "U8", [3, 5], bytes(15)


raw("pack.padding", "PACK.PADDING", "c.codes", 7, b"\x04", "/tensors/c/stages/0/codes")
raw("pack.code_range", "PACK.CODE_RANGE", "c.codes", 4, b"\xff", "/tensors/c/stages/0/codes")
raw("data.levels", "DATA.NON_FINITE", "b.levels", 8, b"\0\0\x80\x7f", "/codebooks/rows/tensor")
put("data.values", "DATA.NON_FINITE", "/codebooks/vectors/values/3", 3.5e38)
put("data.origin", "DATA.CODEBOOK", "/codebooks/ternary/values/1", 0.001, "/codebooks/ternary")
put("data.byte_sum", "DATA.CODEBOOK", "/codebooks/trellis/origin", {"method": "byte-sum"}, "/codebooks/trellis")
put("data.signs", "DATA.SIGNS", "/transforms/hadamard/seed", 8, "/transforms/hadamard/signs")
raw("data.matrix", "DATA.NON_FINITE", "dense", 0, b"\0\0\xc0\x7f", "/transforms/dense/matrix")
raw("data.orthogonality", "DATA.ORTHOGONALITY", "dense", 0, b"\0\0\x80\x3f", "/transforms/dense/matrix")
raw("data.angles", "DATA.NON_FINITE", "angles", 4, b"\0\0\x80\xff", "/transforms/givens/angles")
raw("data.pairs", "DATA.PAIRS", "pairs", 48, b"\xff\xff\xff\xff", "/transforms/givens/pairs")
raw("data.scales", "DATA.NON_FINITE", "b.scales", 2, b"\x80\x7f", "/tensors/b/stages/0/scales")
raw("data.offsets", "DATA.NON_FINITE", "d.offsets", 5, b"\xff", "/tensors/d/stages/0/offsets")
raw("data.outer", "DATA.NON_FINITE", "d.outer", 12, b"\0\0\x80\xff", "/tensors/d/stages/0/outer_scales")
raw("data.outer", "DATA.NON_FINITE", "d.outer_offsets", 0, b"\0\0\x80\x7f", "/tensors/d/stages/0/outer_offsets")
raw("data.permutation", "DATA.PERMUTATION", "index", 4, b"\4\0\0\0", "/transforms/permutation/index")
raw("data.column_scale", "DATA.NON_FINITE", "a.columns", 0, b"\0\0\x80\x7f", "/tensors/a/column_scale")
raw("decode.finite", "DATA.NON_FINITE", "b.scales", 0, b"\x80\x4b", "/tensors/b")


@case("decode.finite", "DATA.NON_FINITE", "/tensors/d")  # levels of 0 do not hide a scale times its outer one
def _(r: Repo) -> None:
    r.tensors["d.outer"] = "F32", [2, 2], np.full((2, 2), 3e38, "<f4").tobytes()
    r.tensors["d.codes"] = "U8", [2, 2], bytes(4)


@case("decode.finite", "DATA.NON_FINITE", "/tensors/d")
def _(r: Repo) -> None:
    r.tensors["d.offsets"] = "F32", [2, 4], np.full((2, 4), 3.4e38, "<f4").tobytes()
    r.tensors["d.scales"] = "F32", [2, 4], np.full((2, 4), 3.4e38, "<f4").tobytes()
    for key in ("outer_scales", "outer_offsets"):
        del r.manifest["tensors"]["d"]["stages"][0][key]
    r.manifest["features"].remove("outer_scales")
    del r.tensors["d.outer"], r.tensors["d.outer_offsets"]


@case("decode.finite", "DATA.NON_FINITE", "/tensors/a")  # column scales of 0 do not hide what overflows before them
def _(r: Repo) -> None:
    r.tensors["a.scales.0"] = "F32", [4, 2], np.full((4, 2), 3e38, "<f4").tobytes()
    r.tensors["a.columns"] = "F32", [24], bytes(96)


def stamped(body: bytes, version: str = "1.0.0", digest: str | None = None) -> bytes:
    stamp = {"format": "1.0", "version": version, "body_sha256": digest or hashlib.sha256(body).hexdigest()}
    return body + b"# tqformat-stamp: " + json.dumps(stamp).encode() + b"\n"


@case("decode.loader_stamp", "BIND.LOADER")
def _(r: Repo) -> None:
    r.files["load_quantized.py"] = stamped(b"pass\n", "0.9", "0" * 64)


@case("decode.loader_release", "BIND.LOADER")
def _(r: Repo) -> None:
    r.files["load_quantized.py"] = stamped(b"pass\n")


# shown by tests of their own below: their repositories are big, or need a running loader
ELSEWHERE = {"json.values", "container.values", "schema.shape.entries", "decode.loader_run"}
ELSEWHERE |= {id for id in CHECKS if id.startswith("evaluation.")}  # test_evaluate.py, test_validator_evaluation.py
ALL_CASES = [pytest.param(id, *each, id=f"{id}-{n}") for id, of_id in CASES.items() for n, each in enumerate(of_id)]


@pytest.mark.parametrize(("id", "code", "pointer", "change"), ALL_CASES)
def test_the_check_finds_the_breach(id: str, code: str, pointer: str | None, change: Change, tmp_path: Path) -> None:
    r = repo()
    change(r)
    path = r.write(tmp_path / "r")
    known = {"known_loaders": {"1.0.0": ["0" * 64]}}
    judgement = judged(path, **known)
    found = [v for v in judgement.violations if v.check == id]
    assert not judgement.crashed
    assert [v.code for v in found[:1]] == [code]
    assert pointer is None or pointer in [v.pointer for v in found]
    assert all(v.rule.startswith("TQ-") and v.message and v.advice for v in judgement.violations)
    level = CHECKS[id].level
    assert judgement.state(level) == "FAIL"
    assert "PASS" not in [judgement.state(each) for each in ("L0", "L1", "L2", "L3") if each > level]
    # the breach is this check's alone: switched off, nothing of an earlier stage takes its place
    without = judged(path, skip=frozenset({id}), **known)
    assert not any(v.check == id for v in without.violations)


def test_every_check_has_a_case() -> None:
    assert CHECKS.keys() == CASES.keys() | ELSEWHERE


def test_all_breaches_are_reported(tmp_path: Path) -> None:
    r = repo()
    r.manifest["tensors"]["b"]["effective_bits"] = 1
    r.manifest["transforms"]["hadamard"]["signs"] = "ff0f"
    r.manifest["tied_weights"]["x"] = "nowhere"
    r.after = lambda p: ((p / "config.json").write_bytes(b"[]"), (p / "spare").mkdir())
    codes = [v.code for v in judged(r.write(tmp_path / "r")).violations]
    assert codes == ["SCHEMA.VALUE", "BIND.EXTRA_FILE", "BIND.DIGEST", "BIND.TIED"]


def test_ignored_entries(tmp_path: Path) -> None:
    path = repo().write(tmp_path / "r")
    (path / "__pycache__").mkdir()
    (path / ".git").mkdir()
    (path / "README.md").write_text("# card")
    assert judged(path).violations == []


def test_a_later_minor_version_is_judged_by_1_0(tmp_path: Path) -> None:
    r = repo()
    r.manifest["format_version"] = "1.12"
    assert judged(r.write(tmp_path / "r")).violations == []


def test_links_of_the_hub_cache(tmp_path: Path) -> None:
    path = repo().write(tmp_path / "models--a--b" / "snapshots" / "0123")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(path.iterdir())):
        file.rename(blobs / f"{number:040x}")
        file.symlink_to(f"../../blobs/{number:040x}")
    assert {v.code for v in judged(path).violations} == {"PATH.TYPE"}
    assert judged(path, hub_cache=True).passed == "L3"
    (path / "config.json").unlink()
    (path / "config.json").symlink_to("../../../outside")
    (tmp_path / "outside").write_bytes(b"{}")
    assert [v.code for v in judged(path, hub_cache=True).violations] == ["PATH.TYPE"]


def test_too_many_entries(tmp_path: Path) -> None:
    r = repo()
    r.manifest["tied_weights"] = {str(i): "a" for i in range(2**20 + 1)}
    judgement = judged(r.write(tmp_path / "r"))
    assert [(v.check, v.code) for v in judgement.violations] == [("schema.shape.entries", "LIMIT.SIZE")]


def test_too_many_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = repo().write(tmp_path / "r")
    monkeypatch.setattr(jsonio, "MAX_VALUES", 100)
    assert [(v.check, v.code) for v in judged(path).violations] == [("json.values", "LIMIT.MEMORY")]
    finding = jsonio.read_object(b'{"a":[' + b"1," * 101 + b"1]}").findings[0]
    assert finding.kind == "values"
    r = repo()
    r.tensors |= {f"spare{i}": ("U8", [0], b"") for i in range(200)}
    monkeypatch.setattr(jsonio, "MAX_VALUES", 1000)
    assert [v.check for v in judged(r.write(tmp_path / "s")).violations] == ["container.values"]


def test_a_defect_of_the_validator_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks_data, "_inline", lambda values: 1 / 0)
    judgement = judged(repo().write(tmp_path / "r"))
    assert judgement.crashed
    assert "INTERNAL.ERROR" in [v.code for v in judgement.violations]


# Parts


TEXT = st.text(st.characters(exclude_categories=[]), max_size=6)  # surrogates too


def any_json(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves, lambda c: st.lists(c, max_size=4) | st.dictionaries(st.text(max_size=4), c, max_size=4), max_leaves=12
    )


@settings(deadline=None)
@given(
    any_json(st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | TEXT),
    st.booleans(),
)
def test_the_two_readings_of_json_agree(value: Any, escaped: bool) -> None:
    data = json.dumps({"v": value}, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    parsed = jsonio.read_object(data)
    if parsed.findings:
        assert {finding.kind for finding in parsed.findings} <= {
            "integer",
            "number",
            "surrogate",
            "constant",
            "encoding",
        }
    else:
        assert parsed.value == jsonio._locate(data.decode()).value == {"v": value}


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text('{}[]",:\\ u0d8e1.-+EtrufalsnNI\n', max_size=60).map(str.encode))
def test_json_never_crashes_and_its_readings_agree(data: bytes) -> None:
    parsed = jsonio.read_object(b'{"v":' + data + b"}")
    assert (parsed.value is not None) or parsed.findings
    if not any(finding.kind == "encoding" for finding in parsed.findings):
        located = jsonio._locate((b'{"v":' + data + b"}").decode())
        assert [f.kind for f in located.findings] == [f.kind for f in parsed.findings]


def test_nesting_is_bounded_exactly() -> None:
    def nested(depth: int) -> bytes:
        return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"

    assert jsonio.read_object(nested(64)).findings == []
    finding = jsonio.read_object(nested(65)).findings[0]
    assert (finding.kind, finding.offset) == ("depth", 5 + 63)
    assert jsonio.read_object(b'{"a":"' + b'[\\"' * 100 + b'"}').findings == []
    for shift in range(4):  # escapes on the border of two chunks
        data = b'{"a":"' + b" " * (2**16 - 8 + shift) + b"\\\\" * 3 + b'\\"' + b"[" * 99 + b'"}'
        assert jsonio.read_object(data).findings == []


ENTRY = st.sampled_from(["kind", "shape", "dtype", "stages", "data", "column_scale", "effective_bits", "extra", "zzz"])
LEAF = st.sampled_from(
    ["quantized", "passthrough", "F16", "", "a\n", "x", "__metadata__", 0, 1, 2.0, True, None, 2**53, -1, 1e9]
)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_the_sieve_and_jsonschema_agree(data: st.DataObject) -> None:
    schema = shape.load_schema()
    manifest = repo().manifest
    path: list[Any] = []
    place: Any = {"/": {name: manifest[name] for name in ("tensors", "transforms", "codebooks", "tied_weights")}}
    while isinstance(place, dict | list) and place and (len(path) < 3 or data.draw(st.booleans())):
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        path, parent, place = [*path, key], place, place[key]
    parent[path[-1]] = data.draw(LEAF | any_json(LEAF) | st.dictionaries(ENTRY, any_json(LEAF), max_size=4))
    part = {"$defs": schema["$defs"]}
    for name, kind in (("tensors", "Tensor"), ("transforms", "Transform"), ("codebooks", "Codebook")):
        rule = {"$ref": f"#/$defs/{kind}"}
        for entry in manifest[name].values() if isinstance(manifest[name], dict) else [manifest[name]]:
            assert shape.compile_schema(rule, schema)(entry) == shape.validator(part | rule).is_valid(entry)


NAMES = ["a", "console", "com0", "com10.x", "x.con", "readme.md5", "README.md.x", "a.", "a..", ".a", "con", "Con.txt"]
NAMES += [
    "LPT9",
    "lpt1.a.b",
    "AUX",
    "prn.",
    "nul",
    "README.MD",
    "quant_manifest.JSON",
    "__pyCache__",
    "a" * 128,
    "a" * 129,
]


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_and_the_checks_of_file_names_agree(name: str, tmp_path: Path) -> None:
    schema = shape.load_schema()
    rule = {"$ref": "#/$defs/FileName"}
    by_schema = shape.validator({"$defs": schema["$defs"]} | rule).is_valid(name)
    assert shape.compile_schema(rule, schema)(name) == by_schema
    r = repo()
    r.listed = lambda files: files.update({name: Repo.entry("x", b"")})
    codes = {v.code for v in judged(r.write(tmp_path / "r"), "L0").violations}
    assert codes == (set() if by_schema else {"PATH.NAME"})


def test_files_are_judged_before_the_content_of_payloads(tmp_path: Path) -> None:
    """[TQ-ERR-2] What the table of files says comes behind SCHEMA and before CONTAINER."""
    r = repo()
    r.manifest["tensors"]["c"]["effective_bits"] = 1
    r.header = lambda h: h["n"].update(dtype="F128")
    r.after = lambda p: ((p / "config.json").unlink(), os.mkfifo(p / "config.json"))
    found = judged(r.write(tmp_path / "r")).violations
    assert [v.code for v in found if v.check != "container.dtype"] == ["SCHEMA.VALUE", "PATH.TYPE"]
    r = repo()
    r.header = lambda h: h["n"].update(dtype="F128")
    r.after = lambda p: (p / "config.json").unlink()
    assert [v.code for v in judged(r.write(tmp_path / "s")).violations] == ["BIND.MISSING_FILE", "CONTAINER.DTYPE"]


def test_codes_are_judged_tensor_by_tensor(tmp_path: Path) -> None:
    """[TQ-ERR-2] Codes of the wrong length in one tensor do not hide a padding bit or a NaN in another."""
    r = repo()
    r.tensors["a.codes.0"] = "U8", [4, 4], bytes(16)
    r.tensors["c.codes"] = "U8", [3, 4], bytes([0, 0, 0, 0x80] * 3)
    r.tensors["b.scales"] = "BF16", [2, 2], bytes([0xC0, 0x7F] * 4)
    codes = [v.code for v in judged(r.write(tmp_path / "r")).violations]
    assert codes == ["PACK.LENGTH", "PACK.PADDING", "DATA.NON_FINITE"]


@pytest.mark.parametrize("bits", range(1, 17))
def test_code_range_by_an_obvious_unpacking(bits: int) -> None:
    rng = np.random.default_rng(bits)
    for symbols in (1, 7, 8, 9, 40, 61):
        size = -(-symbols * bits // 8)
        codes = rng.integers(0, 256, (3, size), np.uint8)
        stream = np.unpackbits(codes, axis=1, bitorder="little")[:, : symbols * bits].reshape(3, symbols, bits)
        values = stream.astype(np.int64) @ (1 << np.arange(bits))
        for entries in (1, 2**bits - 1, int(values.max()), int(values.max()) + 1):
            found = checks_data._first_beyond(codes, symbols, bits, entries)
            assert (found is not None) == bool((values >= entries).any())
            assert found is None or values[found[0], found[1]] == found[2] >= entries


@pytest.mark.parametrize("dtype", ["U8", "I8", "F8_E4M3", "F8_E8M0"])
def test_bytes_are_judged_by_their_bits(dtype: str) -> None:
    data = np.arange(256, dtype=np.uint8)
    exact = checks_data.floats(data.tobytes(), dtype)
    assert (checks_data.not_finite(data, dtype) == ~np.isfinite(exact)).all()


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_numbers_are_judged_by_their_bits(dtype: str) -> None:
    width = 4 if dtype == "F32" else 2
    values = np.arange(2**16, dtype=np.uint32) << (16 if width == 4 else 0)
    data = values.astype("<u4" if width == 4 else "<u2")
    exact = checks_data.floats(data.tobytes(), dtype)
    assert (checks_data.not_finite(data, dtype) == ~np.isfinite(exact)).all()


@settings(deadline=None)
@given(st.data(), st.sampled_from(["F16", "BF16", "F32"]))
def test_the_sieve_of_decoded_values_lets_nothing_wrong_pass(data: st.DataObject, dtype: str) -> None:
    finite = st.floats(-7e4, 7e4) | st.floats(-1e-37, 1e-37) | st.sampled_from([0.0, 65519.0, 65520.0, 3.3999e38, 1.0])
    exact = np.array(data.draw(st.lists(finite, min_size=1, max_size=20)))
    factor = np.array(
        data.draw(st.lists(st.sampled_from([0, 1e-9, 1e-3, -4e-3]), min_size=len(exact), max_size=len(exact)))
    )
    decoded = oracle.Decoded(dtype, exact.shape, exact, np.abs(exact) * 2.0**-20)
    rounded = oracle.round_to(exact * (1 + factor), dtype)
    with np.errstate(over="ignore"):
        words = rounded.astype("<f2").tobytes() if dtype == "F16" else rounded.astype("<f4").tobytes()
    if dtype == "BF16":
        words = np.frombuffer(words, "<u2")[1::2].tobytes()
    sure = checks_decode.surely_correct(words, decoded)
    assert (sure <= oracle.is_correct(rounded, decoded)).all()
    common = (factor == 0) & (np.abs(exact) > 1e-30) & np.isfinite(rounded)
    assert sure[common].all()


def test_conformance_stands_alone() -> None:
    """A validator that shares the loader's parser cannot expose its bugs."""
    forbidden = {"tqformat", "torch", "transformers", "safetensors", "reference_quantizer"}
    for file in (ROOT / "conformance").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not forbidden & {name.partition(".")[0] for name in names}, file
    code = "import sys, conformance.__main__; print(sorted(m for m in sys.modules if '.' not in m))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not forbidden & set(ast.literal_eval(loaded))


# Whatever is done to a repository, there is a verdict


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_changed_value_never_crashes(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    r = repo()
    place: Any = {"/": r.manifest}
    path: list[Any] = []
    while isinstance(place, dict | list) and place and (len(path) < 3 or data.draw(st.booleans())):
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        path, parent, place = [*path, key], place, place[key]
    numbers = st.sampled_from([0, 1, 2, 3, 5, 8, 16, 255, 2**20, 2**31, 2**53 - 1, -1, 0.5, 1e300])
    parent[path[-1]] = data.draw(numbers | LEAF | any_json(LEAF))
    if not isinstance(r.manifest.get("tensors"), dict):
        return
    r.totals = lambda: dict.fromkeys(("original_bytes", "stored_bytes", "ratio"), 0)  # type: ignore[method-assign]
    assert not judged(r.write(tmp_path_factory.mktemp("fuzz") / "r")).crashed


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from([MANIFEST, PAYLOAD]),
    at=st.integers(0, 2000),
    data=st.binary(max_size=6),
    cut=st.integers(0, 6),
)
def test_a_changed_byte_never_crashes(
    name: str, at: int, data: bytes, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = repo().write(tmp_path_factory.mktemp("fuzz") / "r")
    old = (path / name).read_bytes()
    new = old[:at] + data + old[at + cut :]
    (path / name).write_bytes(new)
    judgement = judged(path)
    assert not judgement.crashed
    assert judgement.violations or old == new or name == MANIFEST


# Reports and exit status


def test_exit_status_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = repo().write(tmp_path / "r")
    json_file, junit_file = tmp_path / "r.json", tmp_path / "r.xml"
    assert main(["check", str(path), "--json", str(json_file), "--junit", str(junit_file)]) == 0
    verdict = "tqformat 1.0: PASS L3"
    assert capsys.readouterr().out.splitlines()[-1] == verdict
    document = json.loads(json_file.read_text())
    assert document["verdict"] == verdict
    assert document["levels"]["L2"] == {"state": "PASS", "reason": None}
    assert document["totals"]["weights"] == 5
    listed = ElementTree.parse(junit_file).getroot().iter("testcase")
    assert {each.get("name") for each in listed} == set(CHECKS)
    for level in ("L2", "L3"):
        assert main(["check", str(path), "--level", level]) == 0
    (path / "x\x1b[2J").write_bytes(b"")
    assert main(["check", str(path), "--level", "L1", "--junit", str(junit_file)]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "tqformat 1.0: FAIL L1 (1 violation, first BIND.EXTRA_FILE)"
    assert "\x1b" not in out
    assert [each.get("failures") for each in ElementTree.parse(junit_file).getroot()] == ["0", "1", "0", "0"]
    for wrong in ([], ["nothing"], [str(path), "--revision", "main"], ["a/b", "--card"], [str(path / MANIFEST)]):
        with pytest.raises(SystemExit, match="2"):
            main(["check", *wrong])


# Vectors


@pytest.mark.parametrize("path", [pytest.param(p, id="-".join(p.parts[-3:])) for p in cases()])
def test_vectors_are_judged_as_stated(path: Path, tmp_path: Path) -> None:
    vector = load_case(path)
    judgement = judged(materialise(path, tmp_path / "r"))
    codes = [violation.code for violation in judgement.violations]
    assert not judgement.crashed
    if vector["result"] == "valid":
        assert codes == []
        assert judgement.passed == ("L2" if (tmp_path / "r" / "load_quantized.py").exists() else "L3")  # no release
    elif vector["result"] == "invalid" or codes:
        assert codes[:1]
        assert codes[0] in vector["codes"]


# Bombs

# a small process starts the check, for a child's peak counts the memory of the process that it was forked from
MEASURE = """
import resource, subprocess, sys
status = subprocess.run([sys.executable, "-m", "conformance", *sys.argv[1:]]).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(status, used.ru_maxrss, used.ru_utime + used.ru_stime, flush=True)
"""


def bomb_43_bytes(path: Path) -> str:
    r = repo()
    r.after = lambda p: (p / MANIFEST).write_bytes(b'{"format":"tqformat","format_version":"1.0"')
    r.write(path)
    assert (path / MANIFEST).stat().st_size == 43
    return "JSON.SYNTAX"


def bomb_header(path: Path) -> str:
    r = repo()
    r.payload = lambda data: (2**62).to_bytes(8, "little") + data[8:]
    r.write(path)
    return "CONTAINER.HEADER_LENGTH"


def bomb_rows(path: Path) -> str:
    r = repo()
    r.manifest["tensors"]["c"]["shape"][0] = 10**9
    r.write(path)
    return "BIND.TENSOR"


def bomb_rows_in_header(path: Path) -> str:
    r = repo()
    r.manifest["tensors"]["c"]["shape"][0] = 10**9
    r.header = lambda h: h["c.codes"].update(shape=[10**9, 4], data_offsets=[0, 4 * 10**9])
    r.write(path)
    return "CONTAINER.OFFSETS"


def bomb_brackets(path: Path) -> str:
    r = repo()
    r.after = lambda p: (p / MANIFEST).write_bytes(b"[" * (60 * 2**20))
    r.write(path)
    return "JSON.DEPTH"


@pytest.mark.parametrize("bomb", [bomb_43_bytes, bomb_header, bomb_rows, bomb_rows_in_header, bomb_brackets])
def test_bombs(bomb: Callable[[Path], str], tmp_path: Path) -> None:
    code = bomb(tmp_path / "r")
    command = [sys.executable, "-c", MEASURE, "check", str(tmp_path / "r")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *out, last = result.stdout.splitlines()
    status, kilobytes, seconds = map(float, last.split())
    assert status == 1
    assert out[-1].endswith(f"first {code})")
    assert kilobytes < 200 * 1024
    assert seconds < 1  # of processor time: a busy machine is not our bomb


def test_a_schema_keyword_that_the_compiler_does_not_know_is_an_error() -> None:
    with pytest.raises(ValueError, match="contains"):
        shape.compile_schema({"type": "array", "contains": {"type": "integer"}}, {})


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 8192, 10000])
@pytest.mark.parametrize("chunk", [None, 4096, 5000, 2**40])
def test_digests_of_chunks(size: int, chunk: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from conformance import subject

    monkeypatch.setattr(subject, "CHUNK", 1000)  # bytes that are read at a time
    content = np.random.default_rng(size).bytes(size)
    r = repo()
    r.files["config.json"] = content
    pieces = [content[k : k + (chunk or 1)] for k in range(0, size if chunk else 0, chunk or 1)]
    digests = [hashlib.sha256(piece).hexdigest() for piece in pieces]
    r.listed = lambda files: files["config.json"].update(chunk_size=chunk, chunks=None if chunk is None else digests)
    folder = Folder(r.write(tmp_path / "r"))
    try:
        assert Subject(folder).digests["config.json"] == (hashlib.sha256(content).hexdigest(), digests)
    finally:
        folder.close()
    assert judged(tmp_path / "r").violations == []
