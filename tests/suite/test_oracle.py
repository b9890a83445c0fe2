"""The oracle against hand-computed examples, known answers, exact rationals and the blocks of SPEC.md."""

from __future__ import annotations

import json
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT as PROJECT

from conformance import oracle
from conformance.vectors import ROOT, cases, load_case, materialise

SPEC = (PROJECT / "SPEC.md").read_text(encoding="utf-8")
STORED = [case for case in cases("valid") if (case / "repo").is_dir()]


def known(name: str) -> Any:
    return json.loads((ROOT / "known" / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    """The namespace after all python blocks of SPEC.md, run from top to bottom."""
    namespace: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", SPEC, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 8
    for block in blocks:
        exec(block, namespace)
    return namespace


def one_weight(
    shape: tuple[int, int], codes: bytes, levels: list[float], scales: list[float], **keys: Any
) -> oracle.Decoded:
    """Decodes a weight of one stage with F32 scales; `keys` are the stage's and `transform`."""
    stage = {"bits": 2, "codebook": "b", "transform": "t", "codes": "c", "scales": "s"} | keys
    transform = stage.pop("transform_entry", {"kind": "identity", "size": 1})
    tr, tc = stage.get("tile") or (1, shape[1])
    tiles = shape[0] * shape[1] // (tr * tc)
    manifest = {
        "transforms": {"t": transform},
        "codebooks": {"b": {"entries": len(levels), "dimension": 1, "values": levels}},
        "tensors": {"w": {"kind": "quantized", "shape": list(shape), "dtype": "BF16", "stages": [stage]}},
    }
    payload = {
        "c": ("U8", (tiles, len(codes) // tiles), codes),
        "s": ("F32", (shape[0], len(scales) // shape[0]), np.array(scales, "<f4").tobytes()),
    }
    return oracle.decode(manifest, payload)["w"]


# SPEC.md section 19, by hand


def test_worked_example_identity() -> None:
    w = one_weight((1, 4), bytes([0x63]), [-1.5, -0.5, 0.5, 1.5], [0.25])
    assert w.exact.tolist() == [[0.375, -0.375, 0.125, -0.125]]
    assert w.tolerance.tolist() == [[0.375 * 2**-20, 0.375 * 2**-20, 0.125 * 2**-20, 0.125 * 2**-20]]
    assert (w.dtype, w.shape, w.data) == ("BF16", (1, 4), None)


def test_worked_example_hadamard() -> None:
    hadamard = {"kind": "hadamard", "size": 4, "factors": [4], "signs": "0f"}
    w = one_weight((1, 4), bytes([0x63]), [-1.5, -0.5, 0.5, 1.5], [0.25], transform_entry=hadamard)
    assert w.exact.tolist() == [[0.0, -0.5, 0.0, -0.25]]
    # M is 0.5: the largest value after the transform, larger than 0.375 before it
    assert w.tolerance.tolist() == [[0.5 * 2**-20] * 4]


def test_worked_example_trellis() -> None:
    w = one_weight((1, 4), bytes([0x0D]), [float(k) for k in range(8)], [1.0], bits=1, window=3)
    assert w.exact.tolist() == [[0b101, 0b110, 0b111, 0b011]]


def test_worked_example_three_bits() -> None:
    w = one_weight((1, 8), bytes.fromhex("88c6fa"), [float(k) for k in range(8)], [1.0], bits=3)
    assert w.exact.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


def test_worked_example_tiles() -> None:
    w = one_weight((2, 4), bytes(range(8)), [float(k) for k in range(256)], [1.0, 1.0], bits=8, tile=[2, 2])
    assert w.exact.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_scales_belong_to_vectors() -> None:
    w = one_weight(
        (2, 4), bytes([0b11_10_01_00] * 2), [0.0, 1.0, 2.0, 3.0], [1.0, 10.0, 100.0, 1000.0], vector_length=2
    )
    assert w.exact.tolist() == [[0, 1, 20, 30], [0, 100, 2000, 3000]]


def test_groups_of_tile_rows_join(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ROOT / "valid/stages/tile-heights/repo"
    whole = oracle.decode_repo(case)["w"]
    monkeypatch.setattr(oracle, "GROUP", 1)
    grouped = oracle.decode_repo(case)["w"]
    assert np.array_equal(whole.exact, grouped.exact) and np.array_equal(whole.tolerance, grouped.tolerance)


# known answers


@pytest.mark.parametrize("tile", known("packing")["tiles"], ids=lambda t: f"{t['n']}-{t['bits']}-{t['window']}")
def test_unpack_known_answers(tile: dict[str, Any], spec: dict[str, Any]) -> None:
    data = bytes.fromhex(tile["hex"])
    symbols = oracle.unpack(np.frombuffer(data, np.uint8).reshape(1, -1), tile["n"], tile["bits"], tile["window"])
    assert symbols.tolist() == [tile["symbols"]]
    assert spec["unpack"](data, tile["n"], tile["bits"], tile["window"]) == tile["symbols"]


@pytest.mark.parametrize("factor", known("hadamard")["factors"], ids=lambda f: str(f["order"]))
def test_hadamard_known_answers(factor: dict[str, Any], spec: dict[str, Any]) -> None:
    rows = [[1 if sign == "+" else -1 for sign in row] for row in factor["rows"]]
    order = factor["order"]
    assert np.array_equal(np.array(rows) @ np.array(rows).T, order * np.eye(order))
    assert np.array_equal(oracle.hadamard_factor(order), rows)
    assert np.array_equal(spec["hadamard_factor"](order), rows)


def test_orders_without_factor(spec: dict[str, Any]) -> None:
    table = known("hadamard")["no_factor"]
    for order in range(2, table["below"]):
        expected = order in table["orders"]
        for factor in (oracle.hadamard_factor, spec["hadamard_factor"]):
            if expected:
                with pytest.raises(ValueError, match="no Hadamard factor"):
                    factor(order)
            else:
                assert factor(order).shape == (order, order)


@pytest.mark.parametrize("order", [108, 132, 140, 148, 252, 468, 2040])
def test_factors_are_orthogonal(order: int) -> None:
    h = oracle.hadamard_factor(order)
    assert set(np.unique(h)) == {-1.0, 1.0}
    assert np.array_equal(h @ h.T, order * np.eye(order))


def test_splitmix64_known_answers(spec: dict[str, Any]) -> None:
    table = known("splitmix64")
    assert table["outputs"]["0"][:3] == ["e220a8397b1dcdaf", "6e789e6aa1b965f4", "06c45d188009454f"]
    for seed, outputs in table["outputs"].items():
        stream = spec["splitmix64"](int(seed))
        assert [f"{next(stream):016x}" for _ in outputs] == outputs
    for entry in table["signs"]:
        assert spec["seed_signs"](entry["seed"], entry["size"]) == entry["signs"]
        first = int(table["outputs"][str(entry["seed"])][0], 16)
        count = min(entry["size"], 64)
        signs = oracle.read_signs(entry["signs"], entry["size"])
        assert signs[:count].tolist() == [1 - 2 * (first >> j & 1) for j in range(count)]


@pytest.mark.parametrize("entry", known("lloyd_max")["levels"], ids=lambda e: f"{e['entries']}-{e['vector_length']}")
def test_lloyd_max_known_answers(entry: dict[str, Any], spec: dict[str, Any]) -> None:
    settings = [entry[key] for key in ("entries", "vector_length", "grid_size", "iterations")]
    assert (
        np.abs(spec["lloyd_max_sphere"](*settings) - np.array(entry["levels"])).max()
        < known("lloyd_max")["tolerance"] / 2
    )


def test_lloyd_max_of_the_uniform_density() -> None:
    # in three dimensions a coordinate is uniform on [-sqrt(3), sqrt(3)]: the levels are equally spaced
    levels = next(e["levels"] for e in known("lloyd_max")["levels"] if (e["entries"], e["vector_length"]) == (4, 3))
    assert np.allclose(levels, np.array([-3, -1, 1, 3]) * math.sqrt(3) / 4, atol=1e-3)


# rounding


def nearest(x: Fraction, precision: int, smallest: int, overflow: int) -> Fraction | float:
    """Rounds by search between the two neighbours, in exact rationals."""
    if x == 0:
        return Fraction(0)
    exponent = math.floor(math.log2(abs(x)))
    while Fraction(2) ** (exponent + 1) <= abs(x):
        exponent += 1
    while Fraction(2) ** exponent > abs(x):
        exponent -= 1
    ulp = Fraction(2) ** max(exponent + 1 - precision, smallest)
    low = math.floor(x / ulp)
    gap_low, gap_high = x - low * ulp, (low + 1) * ulp - x
    below = gap_low < gap_high or (gap_low == gap_high and low % 2 == 0)
    result = (low if below else low + 1) * ulp
    return result if abs(result) < Fraction(2) ** overflow else math.copysign(math.inf, result)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_round_to_against_rationals(dtype: str) -> None:
    precision, smallest, overflow = oracle.FORMATS[dtype]
    random = np.random.default_rng(5)
    values = random.standard_normal(300) * 2.0 ** random.integers(smallest - 3, overflow + 1, 300)
    one = 2.0**smallest
    half = 2.0**-precision
    ties = [one * k / 2 for k in range(12)] + [1 + half * k for k in range(8)] + [-1 - half * k for k in range(8)]
    top = 2.0**overflow - 2.0 ** (overflow - precision)
    edges = [
        top,
        np.nextafter(top, math.inf),
        np.nextafter(top - 2.0 ** (overflow - precision - 1), 0),
        2.0 ** (overflow - 1),
    ]
    edges += [top + 2.0 ** (overflow - precision - 1), np.nextafter(top + 2.0 ** (overflow - precision - 1), 0), 0.0]
    for x in [*values, *ties, *edges]:
        assert float(oracle.round_to(np.array(float(x)), dtype)) == float(
            nearest(Fraction(float(x)), precision, smallest, overflow)
        ), x


def test_round_to_agrees_with_numpy() -> None:
    random = np.random.default_rng(6)
    values = random.standard_normal(20000) * 2.0 ** random.integers(-150, 127, 20000)
    assert np.array_equal(oracle.round_to(values, "F32"), values.astype(np.float32).astype(np.float64))
    values = random.standard_normal(20000) * 2.0 ** random.integers(-27, 15, 20000)
    with np.errstate(over="ignore"):
        assert np.array_equal(oracle.round_to(values, "F16"), values.astype(np.float16).astype(np.float64))


def test_round_to_bf16_by_hand() -> None:
    cases_ = {
        1.0: 1.0,
        1 + 2**-8: 1.0,  # tie, to even
        1 + 3 * 2**-8: 1 + 2**-6,  # tie, to even
        1 + 2**-8 + 2**-40: 1 + 2**-7,
        2.0**-134: 0.0,  # tie between 0 and the least subnormal
        3 * 2.0**-134: 2.0**-132,
        2.0**-134 * 1.5: 2.0**-133,
        -(2.0**128) + 2.0**119: -math.inf,  # tie between the largest and 2^128
        2.0**128 - 2.0**119 - 2.0**90: 2.0**128 - 2.0**120,
    }
    assert oracle.round_to(np.array(list(cases_)), "BF16").tolist() == list(cases_.values())


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_to_float64(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    size = 4 if dtype == "F32" else 2
    raw = np.random.default_rng(1).integers(0, 256, 4096 * size, dtype=np.uint8).tobytes()
    theirs = torch.frombuffer(
        bytearray(raw), dtype={"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[dtype]
    )
    with np.errstate(invalid="ignore"):
        ours = oracle.to_float64((dtype, (64, 64), raw))
    assert np.array_equal(ours, theirs.to(torch.float64).numpy().reshape(64, 64), equal_nan=True)


# correctness


def test_is_correct() -> None:
    shape = (6,)
    exact = np.array([1.0, 1.0, 1 + 2**-8, 1 + 2**-8, 1 + 2**-8, 1.0])
    decoded = oracle.Decoded("BF16", shape, exact, np.full(6, 2.0**-20))
    values = np.array([1.0, 1 + 2**-7, 1.0, 1 + 2**-7, 1 + 2**-8, math.nan])
    # near a tie both neighbours are correct; a number that BF16 does not hold is not
    assert oracle.is_correct(values, decoded).tolist() == [True, False, True, True, False, False]
    infinite = oracle.Decoded("F16", (1,), np.array([70000.0]), np.array([0.1]))
    assert not oracle.is_correct(np.array([math.inf]), infinite).any()


@pytest.mark.parametrize("case", STORED, ids=lambda case: "/".join(case.parts[-2:]))
def test_rounded_exact_values_are_correct(case: Path) -> None:
    for decoded in oracle.decode_repo(case / "repo").values():
        if decoded.data is None:
            values = oracle.round_to(decoded.exact, decoded.dtype)
            assert values.shape == decoded.shape == decoded.tolerance.shape
            assert np.isfinite(values).all() and oracle.is_correct(values, decoded).all()
            # a step of two units in the last place and of the tolerance is not
            step = 2.0 ** np.ceil(np.log2(np.maximum(np.abs(values), 2.0**-100))) * 2.0**-6 + 4 * decoded.tolerance
            step = np.maximum(step, 2.0 ** (oracle.FORMATS[decoded.dtype][1] + 1))
            wrong = oracle.round_to(values + step, decoded.dtype)
            assert not oracle.is_correct(wrong, decoded).any()


# an independent formulation: T as a dense matrix, from the blocks of SPEC.md


def dense_transform(transform: dict[str, Any], payload: oracle.Payload, spec: dict[str, Any]) -> Any:
    """T as a float64 matrix [B, B], row by row from the definitions of section 8."""
    size = transform["size"]
    if transform["kind"] == "identity":
        return np.eye(size)
    if transform["kind"] == "dense":
        return oracle.to_float64(payload[transform["matrix"]])
    if transform["kind"] == "hadamard":
        h = np.array([[1]])
        for f in transform["factors"]:
            h = np.kron(h, spec["hadamard_factor"](f))
        signs = [1 - 2 * (bytes.fromhex(transform["signs"])[j // 8] >> (j % 8) & 1) for j in range(size)]
        return h * np.array(signs) / math.sqrt(size)
    if transform["kind"] == "permutation":
        return np.eye(size)[np.frombuffer(payload[transform["index"]][2], "<i4")]
    t = np.eye(size)
    _, shape, raw = payload[transform["pairs"]]
    pairs = np.frombuffer(raw, "<i4").reshape(shape)
    angles = np.frombuffer(payload[transform["angles"]][2], "<f4").reshape(shape[:2])
    for round_pairs, round_angles in zip(pairs, angles, strict=True):
        for (i, j), a in zip(round_pairs, round_angles, strict=True):
            rotation = np.eye(size)
            rotation[i, i] = rotation[j, j] = math.cos(a)
            rotation[i, j], rotation[j, i] = -math.sin(a), math.sin(a)
            t = rotation @ t
    return t


def factors_by_spec(stage: dict[str, Any], key: str, payload: oracle.Payload) -> Any:
    """The scales or offsets of a stage, one by one as [TQ-NUM-8] says."""
    values = oracle.to_float64(payload[stage[key]])
    if not stage.get(f"outer_{key}"):
        return values
    outer = oracle.to_float64(payload[stage[f"outer_{key}"]])
    product = np.empty(values.shape)
    for r, v in np.ndindex(*values.shape):
        product[r, v] = values[r, v] * outer[r if len(outer) > 1 else 0, v // (values.shape[1] // outer.shape[1])]
    return product


def by_spec(manifest: Any, payload: oracle.Payload, name: str, spec: dict[str, Any]) -> Any:
    """A weight by SPEC.md's `decode_stage`, float64 [*shape]."""
    entry = manifest["tensors"][name]
    *_, cols = entry["shape"]
    rows = math.prod(entry["shape"][:-1])
    total = np.zeros((rows, cols))
    for stage in entry["stages"]:
        book, transform = manifest["codebooks"][stage["codebook"]], manifest["transforms"][stage["transform"]]
        t = dense_transform(transform, payload, spec)
        if transform["kind"] != "dense":
            assert np.allclose(t @ t.T, np.eye(len(t)), atol=1e-12)
        if book.get("tensor"):
            levels = oracle.to_float64(payload[book["tensor"]])
        else:
            levels = np.array([np.float32(v) for v in book["values"]], float).reshape(book["entries"], -1)
        _, (tiles, tile_bytes), raw = payload[stage["codes"]]
        total += spec["decode_stage"](
            [raw[k * tile_bytes : (k + 1) * tile_bytes] for k in range(tiles)],
            factors_by_spec(stage, "scales", payload),
            levels,
            lambda b, t=t: t.T @ b,
            (rows, cols),
            stage["bits"],
            stage.get("window") or stage["bits"],
            stage.get("vector_length") or cols,
            tuple(stage.get("tile") or (1, cols)),
            transform["size"],
            factors_by_spec(stage, "offsets", payload) if stage.get("offsets") else 0.0,
        )
    if entry.get("column_scale"):
        total = total * oracle.to_float64(payload[entry["column_scale"]])
    return total.reshape(entry["shape"])


@pytest.mark.parametrize("case", STORED, ids=lambda case: "/".join(case.parts[-2:]))
def test_oracle_agrees_with_the_specification(case: Path, spec: dict[str, Any]) -> None:
    manifest, payload = oracle.read_repo(case / "repo")
    for name, entry in manifest["tensors"].items():
        decoded = oracle.decode_weight(manifest, payload, name)
        if entry["kind"] == "passthrough":
            assert decoded.data == payload[entry["data"]][2]
        elif 0 not in entry["shape"]:
            theirs = by_spec(manifest, payload, name, spec)
            assert theirs.shape == decoded.shape
            # float64 rounds at 2^-53: far inside the tolerance, which is 2^-20 of the block's largest value
            assert (np.abs(theirs - decoded.exact) <= decoded.tolerance * 2.0**-20).all()
        else:
            assert decoded.exact.size == 0


@pytest.mark.parametrize("path", sorted(ROOT.glob("valid/*/*/products.json")), ids=lambda path: path.parent.name)
def test_products_agree_with_the_specification(path: Path, spec: dict[str, Any]) -> None:
    manifest, payload = oracle.read_repo(path.parent / "repo")
    for entry in json.loads(path.read_text())["products"]:
        x, y, bound = (np.array([float.fromhex(v) for v in entry[key]]) for key in ("x", "y", "bound"))
        weight = manifest["tensors"][entry["weight"]]
        if weight.get("column_scale"):
            x = x * oracle.to_float64(payload[weight["column_scale"]])
        stages, shape = [], (len(y), len(x))
        for stage in weight["stages"]:
            transform = manifest["transforms"][stage["transform"]]
            t = dense_transform(transform, payload, spec)
            parts = list(oracle.decode_stage(stage, manifest, payload, shape))
            u, offset = (np.concatenate([getattr(part, key) for part in parts]) for key in ("product", "offset"))
            stages.append((u, offset, lambda b, t=t: t @ b, transform["size"]))
        theirs, bounds = spec["fused_product"](x, stages)
        assert (abs(theirs - y) <= bound * 2.0**-40).all()
        # a stored matrix is orthogonal to its precision [TQ-TRAN-7]
        assert np.allclose(bounds, bound, rtol=1e-12) and (abs(y) <= bound * (1 + 2.0**-12)).all()


def test_grades_by_hand() -> None:
    assert oracle.grade(1.0, 1.0, 0.0) == oracle.grade(2.0**-126, 0.0, 0.0) == oracle.BEST_GRADE
    assert oracle.grade(math.nan, 1.0, 1.0) == oracle.grade(math.inf, 1.0, 1.0) == -1
    assert oracle.grade(1.0 + 2.0**-7, 1.0, 1.0) == 7
    assert oracle.grade(1.0 + 2.0**-7 + 2.0**-50, 1.0, 1.0) == 6
    assert oracle.grade(2.0, 1.0, 1.0) == 0 and oracle.grade(2.5, 1.0, 1.0) == -1


def test_float8_known_answers() -> None:
    torch = pytest.importorskip("torch")
    for dtype, name in (("F8_E4M3", "float8_e4m3fn"), ("F8_E8M0", "float8_e8m0fnu")):
        table = [math.nan if text is None else float.fromhex(text) for text in known("float8")["values"][dtype]]
        assert np.array_equal(oracle.FLOAT8[dtype], table, equal_nan=True)
        if hasattr(torch, name):  # e8m0 came with torch 2.7
            theirs = torch.arange(256, dtype=torch.uint8).view(getattr(torch, name)).to(torch.float64)
            assert np.array_equal(theirs.numpy(), table, equal_nan=True)
    assert [oracle.FLOAT8["F8_E4M3"][byte] for byte in (0x01, 0x38, 0x7E, 0xB8)] == [2.0**-9, 1.0, 448.0, -1.0]
    assert [oracle.FLOAT8["F8_E8M0"][byte] for byte in (0, 127, 254)] == [2.0**-127, 1.0, 2.0**127]


def test_scales_known_answers() -> None:
    for entry in known("scales")["scales"]:
        stored, outer = (
            oracle.to_float64((raw["dtype"], tuple(raw["shape"]), bytes.fromhex(raw["hex"])))
            for raw in (entry["stored"], entry["outer"])
        )
        rows, vectors = stored.shape
        outer = np.broadcast_to(outer, (rows, outer.shape[1])).repeat(vectors // outer.shape[1], axis=1)
        assert (stored * outer).ravel().tolist() == [float.fromhex(value) for value in entry["values"]]


def test_stages_known_answers(spec: dict[str, Any]) -> None:
    for entry in known("stages")["stages"]:
        numbers = {key: np.array([float.fromhex(v) for v in entry[key]]) for key in ("levels", "scales", "offsets")}
        rows, cols = entry["shape"]
        before = numbers["levels"][entry["symbols"]] * numbers["scales"].repeat(entry["vector_length"])
        if len(numbers["offsets"]):
            before = before + numbers["offsets"].repeat(entry["vector_length"])
        assert before.tolist() == [float.fromhex(v) for v in entry["before"]]
        size = math.prod(entry["factors"])
        t = dense_transform({"kind": "hadamard", "size": size, **{k: entry[k] for k in ("factors", "signs")}}, {}, spec)
        after = (before.reshape(-1, size) @ t).ravel()
        assert np.allclose(after, [float.fromhex(v) for v in entry["after"]], rtol=0, atol=1e-12)
        assert rows * cols == len(after)


def test_permutation_known_answers(spec: dict[str, Any]) -> None:
    for entry in known("permutation")["permutations"]:
        size = len(entry["index"])
        assert spec["inverse_permutation"](np.arange(size), entry["index"]).tolist() == entry["inverse"]


def test_products_known_answers(spec: dict[str, Any]) -> None:
    for entry in known("products")["products"]:
        u, offset, x, y, bound = (
            np.array([float.fromhex(v) for v in entry[key]]) for key in ("scale_level", "offset", "x", "y", "bound")
        )
        size = math.prod(entry["factors"])
        t = dense_transform({"kind": "hadamard", "size": size, **{k: entry[k] for k in ("factors", "signs")}}, {}, spec)
        theirs, bounds = spec["fused_product"](x, [(u[None], offset[None], lambda b, t=t: t @ b, size)])
        assert np.allclose(theirs, y, rtol=0, atol=bound[0] * 2.0**-40) and np.allclose(bounds, bound, rtol=1e-12)


def test_offsets_count_in_the_tolerance() -> None:
    """[TQ-NUM-4] M holds |scale * level| + |offset|, even where the two cancel."""
    (weight,) = oracle.decode_repo(ROOT / "valid/offsets/cancel/repo").values()
    # levels 0 to 3 times 1 and 0.5, offsets -3 and -0.5, blocks of 4
    assert weight.exact.tolist() == [[-3.0, -2.0, -1.0, 0.0], [-0.5, 0.0, 0.5, 1.0]]
    assert weight.tolerance.tolist() == [[6.0 * 2**-20] * 4, [2.0 * 2**-20] * 4]


def test_hadamard_sums_are_exact() -> None:
    """The generated numbers are so short that float64 sums are exact: expected.json depends on no BLAS."""
    manifest, payload = oracle.read_repo(ROOT / "valid/transforms/hadamard-36x16/repo")
    transform = manifest["transforms"]["t"] | {"signs": "00" * 72}
    levels = oracle.codebook_levels(manifest["codebooks"]["b"], payload)
    scale = oracle.to_float64(payload["w.scales"])[0, 0]
    symbols = oracle.unpack(np.frombuffer(payload["w.codes"][2], np.uint8).reshape(1, -1), 576, 2, 2)
    y = levels[symbols[0], 0] * scale
    h = np.kron(oracle.hadamard_factor(36), oracle.hadamard_factor(16))
    exact = [
        float(sum(Fraction(v) * int(sign) for v, sign in zip(y.tolist(), column, strict=True)))
        for column in h.T.tolist()
    ]
    ours = oracle.inverse_transform(transform, payload)(y.reshape(1, -1))
    assert (np.array(exact) / math.sqrt(576) == ours[0]).all()


def test_recipes_decode_as_their_base(tmp_path: Path) -> None:
    for case in cases("valid"):
        if (case / "repo").is_dir():
            continue
        repo = materialise(case, tmp_path / case.name)
        base = ROOT / load_case(case)["base"] / "repo"
        ours, theirs = oracle.decode_repo(repo), oracle.decode_repo(base)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert np.array_equal(ours[name].exact, theirs[name].exact) and ours[name].data == theirs[name].data
