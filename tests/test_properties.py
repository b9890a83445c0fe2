"""Properties over random manifests, headers and codes: loader, validator and oracle agree; and the fuzz targets still work."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import io
import json
import math
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conformance import container, oracle
from tqformat import load_quantized, pack
from tqformat.load_quantized import TQFormatError

PAYLOAD = "turboquant_weights.safetensors"
Json = dict[str, Any]


def fuzz_target() -> ModuleType:
    """fuzz/target.py, which is no package."""
    spec = importlib.util.spec_from_file_location("fuzz_target", ROOT / "fuzz" / "target.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


fuzz = fuzz_target()
REPRODUCIBLE = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

# Random repositories, written with json and NumPy alone

DTYPES = {"F16": "<f2", "F32": "<f4", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E8M0": "u1", "I32": "<i4"}
WIDE = ["F16", "BF16", "F32"]
TRANSFORMS = [("identity", 1), ("identity", 2), ("identity", 3), ("dense", 1), ("dense", 3), ("dense", 4)]
TRANSFORMS += [("givens", 2), ("givens", 6), ("hadamard", 2), ("hadamard", 4), ("hadamard", 12), ("hadamard", 20)]
TRANSFORMS += [("hadamard", 24), ("hadamard", 28), ("hadamard", 16), ("permutation", 1), ("permutation", 6)]
FACTORS = {2: [[2]], 4: [[4], [2, 2]], 12: [[12]], 16: [[16], [2, 8], [4, 2, 2]], 20: [[20]]}
FACTORS |= {24: [[24], [2, 12], [12, 2]], 28: [[28]]}


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


class Payload:
    """Payload tensors, as their header and their data, which lie in the file in the order of their widths: all are aligned."""

    def __init__(self) -> None:
        self.header: Json = {}
        self.data: dict[str, bytes] = {}

    def put(self, name: str, dtype: str, values: np.ndarray) -> str:
        if dtype == "BF16":  # the upper half of a binary32
            raw = (np.ascontiguousarray(values, "<f4").view("<u4") >> 16).astype("<u2").tobytes()
        else:
            raw = np.ascontiguousarray(values).astype(DTYPES[dtype]).tobytes()
        self.header[name], self.data[name] = {"dtype": dtype, "shape": list(values.shape)}, raw
        return name

    def file(self) -> bytes:
        end, data = 0, b""
        for name in sorted(self.data, key=lambda name: -container.DTYPES[self.header[name]["dtype"]]):
            self.header[name]["data_offsets"] = [end, end := end + len(self.data[name])]
            data += self.data[name]
        text = json.dumps(self.header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + data


def draw_numbers(draw: st.DrawFn, rng: np.random.Generator, payload: Payload, name: str, kind: str, shape: Any) -> Json:
    """Scales or offsets of a stage, with outer ones where they have 8 bits."""
    dtype = draw(st.sampled_from([*WIDE, *WIDE, "U8", "I8", "F8_E4M3", "F8_E8M0"]))
    if dtype in WIDE:
        return {kind: payload.put(f"{name}/{kind}", dtype, rng.normal(size=shape) * 2)}
    low, high = {"U8": (0, 256), "I8": (-128, 128), "F8_E4M3": (0, 0x7F), "F8_E8M0": (90, 130)}[dtype]
    values = rng.integers(low, high, shape)
    values += 128 * rng.integers(0, 2, shape) if dtype == "F8_E4M3" else 0
    outer = (draw(st.sampled_from([1, shape[0]])), draw(st.sampled_from(divisors(shape[1]))))
    return {
        kind: payload.put(f"{name}/{kind}", dtype, values),
        f"outer_{kind}": payload.put(f"{name}/outer_{kind}", draw(st.sampled_from(WIDE)), rng.normal(size=outer) / 32),
    }


def draw_transform(draw: st.DrawFn, rng: np.random.Generator, payload: Payload, id: str) -> Json:
    kind, size = draw(st.sampled_from(TRANSFORMS))
    entry: Json = {"kind": kind, "size": size}
    if kind == "hadamard":
        bits = rng.integers(0, 2, size)
        entry |= {"factors": draw(st.sampled_from(FACTORS[size]))}
        entry |= {"signs": np.packbits(bits, bitorder="little").tobytes().hex()}
    elif kind == "dense":
        q = np.linalg.qr(rng.normal(size=(size, size)))[0]
        entry["matrix"] = payload.put(f"{id}/matrix", draw(st.sampled_from(WIDE)), q)
    elif kind == "givens":
        rounds = draw(st.integers(1, 4))
        pairs = np.stack([rng.permutation(size).reshape(-1, 2) for _ in range(rounds)])
        entry["pairs"] = payload.put(f"{id}/pairs", "I32", pairs)
        entry["angles"] = payload.put(f"{id}/angles", "F32", rng.normal(size=(rounds, size // 2)) * 3)
    elif kind == "permutation":
        entry["index"] = payload.put(f"{id}/index", "I32", rng.permutation(size))
    return entry


def draw_codes(rng: np.random.Generator, tiles: int, n: int, bits: int, entries: int) -> np.ndarray:
    """Codes of random symbols below `entries`; with entries = 2^window any stream will do."""
    symbols = rng.integers(0, min(entries, 1 << bits), (tiles, n))
    stream = (symbols[:, :, None] >> np.arange(bits) & 1).reshape(tiles, n * bits).astype(np.uint8)
    return np.packbits(stream, axis=1, bitorder="little").reshape(tiles, -(-n * bits // 8))


@st.composite
def repositories(draw: st.DrawFn) -> tuple[Json, bytes]:
    """The manifest, and the payload file, of a conformant repository with one quantized and one passthrough tensor."""
    rng, payload = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), Payload()
    lead = draw(st.lists(st.sampled_from([1, 1, 2, 3, 4, 6]), min_size=1, max_size=3))
    if draw(st.integers(0, 11)) == 0:
        lead[draw(st.integers(0, len(lead) - 1))] = 0
    rows, features, stages, transforms, books = math.prod(lead), set(), [], {}, {}
    plans = []
    for k in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        transform = transforms[f"t{k}"] = draw_transform(draw, rng, payload, f"t{k}")
        p = draw(st.sampled_from([1, 1, 1, 2, 3, 4]))
        size = transform["size"]
        fine = [g for g in divisors(size) if g % p == 0]
        if fine and draw(st.booleans()):
            plans.append((transform, p, draw(st.sampled_from(fine))))
        else:
            plans.append((transform, p, math.lcm(p, size) * draw(st.sampled_from([1, 1, 2]))))
    cols = math.lcm(*(n for t, _, g in plans for n in (t["size"], g))) * draw(st.sampled_from([1, 2, 3]))
    for k, (transform, p, length) in enumerate(plans):
        tile = None
        if draw(st.booleans()):
            across = draw(st.sampled_from([tc for tc in divisors(cols) if tc % p == 0]))
            tile = [draw(st.sampled_from(divisors(rows) if rows else [1, 2, 5])), across]
        tr, tc = tile or (1, cols)
        n = tr * tc // p
        bits = draw(st.integers(1, min(8 * p, 9)))
        window = draw(st.integers(bits, min(10, n * bits)))
        entries = 1 << window if window > bits else draw(st.sampled_from([1 << bits, max(1, (1 << bits) - 1), 1]))
        book: Json = {"entries": entries, "dimension": p}
        kind = draw(st.sampled_from(["values", "tensor", "rows"]))
        shape = (rows, entries, p) if kind == "rows" else (entries, p)
        if math.prod(shape) > 4096:
            kind, shape = "tensor", (entries, p)
        levels = rng.normal(size=shape)
        if kind == "values":
            book["values"] = [float(x) for x in levels.ravel()]
        else:
            book["tensor"] = payload.put(f"b{k}/levels", draw(st.sampled_from(WIDE)), levels)
            book |= {"rows": rows} if kind == "rows" else {}
        books[f"b{k}"] = book
        codes = draw_codes(rng, rows * cols // (tr * tc), n, bits, entries)
        stage: Json = {"bits": bits, "codebook": f"b{k}", "transform": f"t{k}"}
        stage |= {"codes": payload.put(f"s{k}/codes", "U8", codes)}
        stage |= draw_numbers(draw, rng, payload, f"s{k}", "scales", (rows, cols // length))
        if draw(st.integers(0, 2)) == 0:
            stage |= draw_numbers(draw, rng, payload, f"s{k}", "offsets", (rows, cols // length))
        # [TQ-MAN-2] a default may be left out, written as null, or written out
        for key, value, default in (("window", window, bits), ("vector_length", length, cols), ("tile", tile, None)):
            if value != default or draw(st.booleans()):
                stage[key] = value if value != default else draw(st.sampled_from([None, value]))
        stages.append(stage)
        features |= {"trellis"} if window > bits else set()
        features |= {"vector_codebook"} if p > 1 else set()
        features |= {"row_codebook"} if kind == "rows" else set()
        features |= {"tiles"} if (tr, tc) != (1, cols) else set()
        features |= {"offsets"} & stage.keys()
        features |= {"outer_scales"} if {"outer_scales", "outer_offsets"} & stage.keys() else set()
        features |= {"fine_scales"} if length < transform["size"] else set()
        features |= {transform["kind"]} & {"dense", "givens", "permutation"}
    entry: Json = {"kind": "quantized", "shape": [*lead, cols], "dtype": draw(st.sampled_from(WIDE))}
    entry |= {"effective_bits": sum(s["bits"] / books[s["codebook"]]["dimension"] for s in stages), "stages": stages}
    if draw(st.booleans()):
        entry["column_scale"] = payload.put("columns", draw(st.sampled_from(WIDE)), rng.normal(size=cols))
        features.add("column_scale")
    features |= {"stages"} if len(stages) > 1 else set()
    payload.put("plain", "F32", rng.normal(size=3))
    tensors = {"w": entry, "n": {"kind": "passthrough", "shape": [3], "dtype": "F32", "data": "plain"}}
    original = rows * cols * {"F16": 2, "BF16": 2, "F32": 4}[entry["dtype"]] + 12
    stored = sum(map(len, payload.data.values()))
    manifest: Json = {
        "format": "tqformat",
        "format_version": "1.0",
        "features": draw(st.permutations(sorted(features))),
        "generator": "tests/test_properties.py",
        "base_model": {"id": "none/none"},
        "loader_kind": "feature-extraction",
        "quantization": {"method": "random", "bits": 1},
        "files": {PAYLOAD: {"role": "payload", "size": 0, "sha256": ""}},
        "transforms": transforms,
        "codebooks": books,
        "tensors": tensors,
        "tied_weights": {"alias": "w"} if draw(st.booleans()) else {},
        "accounting": {
            "original_bytes": original,
            "stored_bytes": stored,
            "ratio": original / stored,
            "quantized_tensors": 1,
            "passthrough_tensors": 1,
            "quantized_scalars": rows * cols,
            "passthrough_scalars": 3,
        },
    }
    raw = payload.file()
    manifest["files"][PAYLOAD] |= {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    return manifest, raw


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """One directory for all examples of a test, in memory where the system has such a place."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    path = Path(tempfile.mkdtemp(dir=memory))
    yield path
    shutil.rmtree(path)


def write(folder: Path, text: bytes, payload: bytes) -> Path:
    (folder / "quant_manifest.json").write_bytes(text)
    (folder / PAYLOAD).write_bytes(payload)
    return folder


# Manifests


@settings(REPRODUCIBLE, max_examples=150)
@given(repository=repositories())
def test_a_random_manifest_is_judged_and_decoded_alike(folder: Path, repository: tuple[Json, bytes]) -> None:
    manifest, payload = repository
    path = write(folder, json.dumps(manifest).encode(), payload)
    # validator passes, loader decodes, and its values are the oracle's within [TQ-NUM-5]
    assert fuzz.check(path, reports=True) == "decoded"
    with load_quantized.open_repo(path) as repo:
        assert oracle.is_correct(repo.dequantize("w").double().numpy(), oracle.decode_repo(path)["w"]).all()


ODD = st.sampled_from(
    [None, True, False, 0, 1, -1, 2, 3, 7, 17, 2**20 + 1, 2**53, 0.5, 2.0, "", "x", "F16", [], [1], {}]
)
TOKENS = [
    b"NaN",
    b"1e999",
    b"-0",
    b"2e0",
    b"01",
    b'"\\ud800"',
    b"9" * 20,
    b'{"a":1,"\\u0061":2}',
    b"[" * 70 + b"]" * 70,
]


@st.composite
def mutations(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """The text of a random valid manifest with a single mutation, and the payload file."""
    manifest, payload = draw(repositories())
    manifest = copy.deepcopy(manifest)
    # most of the text says little about decoding: the tables that do come first
    part = draw(
        st.sampled_from(["tensors", "tensors", "codebooks", "transforms", "transforms", "files", "features", None])
    )
    places = fuzz.places(manifest[part] if part else manifest) or fuzz.places(manifest)
    holder, key = random.Random(draw(st.integers(0, 2**32 - 1))).choice(places)
    action = draw(st.sampled_from(["set", "step", "remove", "add", "rename", "twice", "copy", "token"]))
    if action == "step" and type(holder[key]) in (int, float):
        holder[key] += draw(st.sampled_from([-1, 1, 0.25]))
    elif action == "remove":
        del holder[key]
    elif action == "add" and isinstance(holder, dict):
        holder[draw(st.sampled_from(["extra", "window", "seed", "rows", "values", "tile", "spare", ""]))] = draw(ODD)
    elif action == "rename" and isinstance(holder, dict):
        holder[draw(st.sampled_from([f"{key}x", "é", "extra"]))] = holder.pop(key)
    elif action == "copy":
        other, name = places[draw(st.integers(0, len(places) - 1))]
        holder[key] = copy.deepcopy(other[name])
    elif action in ("token", "twice"):
        old = holder[key]
        holder[key] = "\u0002"
        text = json.dumps(manifest).encode()
        plain = json.dumps(old).encode()
        if action == "token":
            return text.replace(b'"\\u0002"', draw(st.sampled_from(TOKENS)), 1), payload
        again = plain + b"," + (json.dumps(key).encode() + b":" if isinstance(holder, dict) else b"") + plain
        return text.replace(b'"\\u0002"', again, 1), payload
    else:
        holder[key] = draw(ODD)
    return json.dumps(manifest).encode(), payload


@settings(REPRODUCIBLE, max_examples=400)
@given(repository=mutations())
def test_a_mutated_manifest_is_accepted_by_both_or_rejected(folder: Path, repository: tuple[bytes, bytes]) -> None:
    # accepted with the oracle's values, or rejected with a code of SPEC.md; loader and validator agree, but for what
    # [TQ-ERR-3] leaves to validators
    fuzz.check(write(folder, *repository))


# What fuzzing found (fuzz/RESULTS.md)


def test_strides_of_an_empty_tensor_do_not_overflow(folder: Path) -> None:
    payload = Payload()
    payload.put("plain", "F32", np.empty((0, 1, 1)))
    shape = payload.header["plain"]["shape"] = [0, 2**52, 2**52]
    names = ("original_bytes", "stored_bytes", "ratio", "quantized_scalars", "quantized_tensors", "passthrough_scalars")
    raw = payload.file()
    manifest = {
        "format": "tqformat",
        "format_version": "1.0",
        "features": [],
        "generator": "test",
        "base_model": {"id": "a/b"},
        "loader_kind": "fill-mask",
        "quantization": {"method": "none", "bits": 32},
        "files": {PAYLOAD: {"role": "payload", "size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}},
        "transforms": {},
        "codebooks": {},
        "tensors": {"n": {"kind": "passthrough", "shape": shape, "dtype": "F32", "data": "plain"}},
        "accounting": dict.fromkeys(names, 0) | {"passthrough_tensors": 1},
    }
    assert fuzz.check(write(folder, json.dumps(manifest).encode(), raw)) == "SCHEMA.VALUE"
    shape[1:] = [2**50, 1]
    raw = payload.file()
    manifest["files"] = {PAYLOAD: {"role": "payload", "size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}}
    assert fuzz.check(write(folder, json.dumps(manifest).encode(), raw)) == "decoded"


def test_a_version_that_is_a_number_is_no_version(folder: Path) -> None:
    assert fuzz.check(write(folder, b'{"format": "tqformat", "format_version": 1.0}', b"")) == "SCHEMA.VERSION"


def test_hadamard_factors_are_not_kept_for_ever() -> None:
    most = load_quantized.hadamard_factor.cache_info().maxsize
    assert most is not None and most * 2048**2 * 4 <= 2**28


# Headers


def headers_agree(raw: bytes) -> bool:
    """Whether both readers accept a payload file; they see the same in it."""
    theirs = container.read_header("f", len(raw), lambda offset, size: raw[offset : offset + size])
    try:
        spans = load_quantized.read_header(io.BytesIO(raw), len(raw), "f")
    except TQFormatError as error:
        assert error.code.startswith("CONTAINER.") and theirs.findings, error
        return False
    # [TQ-ERR-3] a reader may leave the characters of names to validators
    assert {finding.kind for finding in theirs.findings} <= {"name"}, theirs.findings
    if not theirs.findings:
        ours = {name: (s.dtype, s.shape, s.begin, s.end - s.begin) for name, s in spans.items()}
        assert ours == {name: (s.dtype, s.shape, s.offset, s.size) for name, s in theirs.tensors.items()}
    return not theirs.findings


@settings(REPRODUCIBLE, max_examples=300)
@given(raw=st.binary(max_size=80), claimed=st.booleans())
def test_random_bytes_as_a_payload_file(raw: bytes, claimed: bool) -> None:
    headers_agree(len(raw).to_bytes(8, "little") + raw if claimed else raw)


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6)
ENTRY_DTYPES = ["U8", "I8", "BOOL", "F8_E4M3", "F16", "BF16", "U16", "F32", "I32", "F64", "U64"]


@st.composite
def header_files(draw: st.DrawFn) -> bytes:
    """A payload file whose header is right, but for at most two of many faults."""
    header: Json = {}
    end = 0
    for name in draw(st.lists(NAMES, unique=True, max_size=4)):
        dtype, shape = draw(st.sampled_from(ENTRY_DTYPES)), draw(st.lists(st.integers(0, 3), max_size=3))
        size = math.prod(shape) * container.DTYPES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.sampled_from([{}, {"a": "b"}]))
    items = draw(st.permutations(list(header.items())))
    text, spare, before, after = json.dumps(dict(items)).encode(), 0, b"", b" " * draw(st.integers(0, 9))
    entries = [value for key, value in items if key != "__metadata__"]
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        fault = draw(st.sampled_from(["value", "edge", "whole", "twice", "tail", "before", "after", "bytes"]))
        if fault == "value" and entries:
            entry = draw(st.sampled_from(entries))
            key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra"]))
            entry[key] = draw(
                st.sampled_from([None, True, "F16", "f16", [], [0, 0], [1.0], [True], [-1, 0], [2**62, 4]])
            )
        elif fault == "edge" and entries:
            entry = draw(st.sampled_from(entries))
            if isinstance(entry["data_offsets"], list) and entry["data_offsets"]:
                entry["data_offsets"][-1] += draw(st.sampled_from([-1, 1, 2**53, 0.0]))
        elif fault == "whole" and items:
            items[0] = (items[0][0], draw(st.sampled_from([None, [], {}, {"dtype": "U8"}, 1])))
        text = json.dumps(dict(items)).encode()
        if fault == "twice" and items:
            text = text[:-1] + b"," + json.dumps(dict(items[:1])).encode()[1:]
        elif fault == "tail":
            spare = draw(st.sampled_from([-1, 1, 8]))
        elif fault == "before":
            before = draw(st.sampled_from([b" ", b"\n", b"\xef\xbb\xbf"]))
        elif fault == "after":
            after = draw(st.sampled_from([b"\n", b"\x00", b" \t", b"{}", b"x"]))
        elif fault == "bytes":
            at = draw(st.integers(0, len(text)))
            text = text[:at] + draw(st.binary(max_size=2)) + text[at + draw(st.integers(0, 2)) :]
    text = before + text + after
    return len(text).to_bytes(8, "little") + text + bytes(max(0, end + spare))


def test_headers_with_faults_are_read_alike() -> None:
    verdicts = []

    @settings(REPRODUCIBLE, max_examples=800)
    @given(raw=header_files())
    def check(raw: bytes) -> None:
        verdicts.append(headers_agree(raw))

    check()
    assert min(verdicts.count(True), verdicts.count(False)) > 100  # both are common


# Packing


@st.composite
def streams(draw: st.DrawFn) -> tuple[np.ndarray, int, int, int]:
    """Codes [tiles, tile_bytes] of random streams, n, bits, window."""
    bits, n = draw(st.integers(1, 16)), draw(st.integers(1, 41))
    window, tiles = draw(st.integers(bits, 16)), draw(st.integers(0, 3))
    while n * bits < window:
        n += 1
    seed = draw(st.integers(0, 2**32 - 1))
    stream = np.random.default_rng(seed).integers(0, 2, (tiles, n * bits), np.uint8)
    codes = np.packbits(stream, axis=1, bitorder="little").reshape(tiles, -(-n * bits // 8))
    return codes, n, bits, window


@settings(REPRODUCIBLE, max_examples=400)
@given(stream=streams())
def test_pack_and_unpack_are_inverse_and_the_oracle_agrees(stream: tuple[np.ndarray, int, int, int]) -> None:
    codes, n, bits, window = stream
    symbols = load_quantized.unpack(torch.from_numpy(codes), n, bits, window)
    assert np.array_equal(symbols.numpy(), oracle.unpack(codes, n, bits, window))
    packed = pack(symbols, bits, window)
    assert np.array_equal(packed.numpy(), codes)
    assert torch.equal(load_quantized.unpack(packed, n, bits, window), symbols)


@settings(REPRODUCIBLE, max_examples=100)
@given(stream=streams(), data=st.data())
def test_a_padding_bit_is_seen(stream: tuple[np.ndarray, int, int, int], data: st.DataObject) -> None:
    codes, n, bits, window = stream
    if n * bits % 8 and len(codes):
        codes[data.draw(st.integers(0, len(codes) - 1)), -1] |= 1 << data.draw(st.integers(n * bits % 8, 7))
        with pytest.raises(TQFormatError, match=r"PACK\.PADDING"):
            load_quantized.unpack(torch.from_numpy(codes), n, bits, window)


# The fuzz targets, without atheris


@pytest.mark.parametrize("mode", ["loader", "validator"])
def test_a_fuzz_target_runs(mode: str) -> None:
    verdicts = fuzz.without_atheris(mode, 200)
    assert sum(verdicts.values()) == 200 and 50 < verdicts["decoded"] < 200 and len(verdicts) > 8


def test_the_seed_corpus_is_small_and_sound() -> None:
    seeds = {path.name: path.read_bytes() for path in fuzz.CORPUS.iterdir()}
    assert len(seeds) >= 50 and sum(map(len, seeds.values())) < 300 * 1024
    with fuzz.Runner("validator") as runner:
        for name, seed in seeds.items():
            assert (runner(seed) == "decoded") == name.startswith("valid-"), f"{name}: run fuzz/make_corpus.py"
            assert fuzz.pack(*fuzz.unpack(seed)) == seed


@pytest.mark.parametrize(
    ("place", "defect"),
    [
        ("load_quantized.read_header", lambda *_: {}["x"]),  # another exception than TQFormatError
        ("load_quantized.parse_json", lambda *_: load_quantized.require(False, "ODD.CODE", "x", "y")),
        ("load_quantized.finite", lambda values, _: values + 1),  # wrong values
        ("load_quantized.check_weight", lambda *_: load_quantized.require(False, "SCHEMA.VALUE", "x", "y")),
        ("container.read_header", lambda *_: {}["x"]),  # INTERNAL.ERROR
        ("load_quantized.Repo.__exit__", lambda *_: None),  # an open file
    ],
)
def test_a_fuzz_target_sees_a_defect(place: str, defect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, name = place.partition(".")
    target = {"load_quantized": "tqformat.load_quantized", "container": "conformance.subject"}[module]
    monkeypatch.setattr(f"{target}.{name}", defect)
    seed = max((path.read_bytes() for path in sorted(fuzz.CORPUS.glob("valid-*"))), key=len)
    with fuzz.Runner("validator") as runner, pytest.raises(Exception) as caught:
        runner(seed)
    assert not isinstance(caught.value, TQFormatError)
