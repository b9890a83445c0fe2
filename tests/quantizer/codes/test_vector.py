"""Vector codebooks and stages: books, exact search, block feedback, residuals, unbiased signs, and whole jobs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import interrupted, run_python
from helpers import (
    Make,
    correlated,
    files_of,
    gaussian,
    keep_decoded,
    make_checkpoint,
    make_text,
    manifest_of,
    sample_tensors,
)
from torch import Tensor

from reference_quantizer.__main__ import _parser, main
from reference_quantizer.checkpoint.source import Reader, open_source
from reference_quantizer.codes import vector
from reference_quantizer.codes.codebook import lloyd_max_levels
from reference_quantizer.codes.encode import SIGN_LEVELS, Encoder, decode, encode, encode_stages
from reference_quantizer.codes.feedback import encode as encode_feedback
from reference_quantizer.codes.feedback import encode_stages as encode_stages_with_feedback
from reference_quantizer.codes.feedback import inverse_factor
from reference_quantizer.codes.rotation import haar_matrix, make_rotation
from reference_quantizer.commands.settings import settings
from reference_quantizer.job import encoding
from reference_quantizer.release import card
from tqformat import open_repo

plain_train = vector.train_codebook


def train(bits: int, dimension: int) -> np.ndarray:
    """A book that was trained for a moment; of E8, the lattice alone."""
    return plain_train(bits, dimension, iterations=0 if bits * dimension > 12 else 10)


@pytest.fixture(scope="module")
def books() -> dict[tuple[int, int], Tensor]:
    return {(b, p): torch.tensor(train(b, p)) for b, p in [(2, 2), (2, 4), (1, 8), (2, 8)]}


@pytest.fixture
def quick_books(monkeypatch: pytest.MonkeyPatch, books: dict[tuple[int, int], Tensor]) -> None:
    kept = {key: levels.numpy() for key, levels in books.items()}
    monkeypatch.setattr(vector, "vector_levels", lambda b, p: kept[b, p] if (b, p) in kept else train(b, p))


def vector_encoder(cols: int, levels: Tensor, g: int | None = None, seed: int = 42) -> Encoder:
    return Encoder(g or cols, make_rotation("hadamard", g or cols, seed), levels, torch.float16, torch.bfloat16)


def scalar_encoder(cols: int, bits: int) -> Encoder:
    return vector_encoder(cols, torch.tensor(lloyd_max_levels(2**bits, cols, 8193, 96)))


# ------------------------------------------------------------------------------------------------ codebooks


@pytest.mark.parametrize(
    "bits, dimension, iterations, expected",
    [(2, 2, 40, 0.1078), (3, 2, 40, 0.0301), (2, 4, 40, 0.0971), (1, 8, 8, 0.3260), (2, 8, 0, 0.0906)],
)
def test_errors_on_gaussian_values(bits: int, dimension: int, iterations: int, expected: float) -> None:
    levels = vector.train_codebook(bits, dimension, iterations=iterations)
    assert levels.shape == (2 ** (bits * dimension), dimension)
    assert (levels == levels.astype(np.float16)).all() and len(np.unique(levels, axis=0)) == len(levels)
    x, book = gaussian_values(240_000, dimension), torch.tensor(levels)
    error = (book[vector.nearest(x, book)] - x).square().mean().item()
    assert error == pytest.approx(expected, rel=0.012)


def gaussian_values(count: int, dimension: int, seed: int = 5) -> Tensor:
    return torch.randn(count // dimension, dimension, generator=torch.Generator().manual_seed(seed))


def test_training_gives_the_same_bytes_again() -> None:
    assert train(2, 4).tobytes() == train(2, 4).tobytes()


def test_training_goes_on_to_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(vector, "train_codebook", train)
    vector.vector_levels.cache_clear()
    first = vector.vector_levels(1, 2)
    monkeypatch.setattr(vector, "train_codebook", None)
    vector.vector_levels.cache_clear()
    assert (vector.vector_levels(1, 2) == first).all() and not first.flags.writeable
    vector.vector_levels.cache_clear()


def test_e8_points_are_those_of_the_shifted_lattice_nearest_to_0() -> None:
    points = vector.e8_points().astype(np.float64)
    radius = np.linalg.norm(points, axis=1).max()
    assert radius == pytest.approx(vector.E8_RADIUS)
    unit = np.abs(points).min() * 4  # the coordinates are odd multiples of a quarter
    points, radius = points / unit, radius / unit

    def even(x: np.ndarray) -> np.ndarray:  # the nearest point of D8, by the rule of Conway and Sloane (1982)
        near = np.round(x)
        worst = np.abs(x - near).argmax(1)
        other = near.copy()
        other[np.arange(len(x)), worst] += np.where((x - near)[np.arange(len(x)), worst] < 0, -1, 1)
        return np.where((near.sum(1) % 2 == 0)[:, None], near, other)

    def lattice(x: np.ndarray) -> np.ndarray:  # the nearest point of E8 + 1/4
        found = np.stack([even(x - s) + s for s in (0.25, 0.75)])
        return np.take_along_axis(found, np.square(found - x).sum(-1).argmin(0)[None, :, None], 0)[0]

    assert np.abs(lattice(points) - points).max() < 1e-4
    whole = {tuple(row) for row in np.round(4 * points).astype(int)}
    assert len(whole) == 2**16 and {tuple(-v for v in row) for row in whole} == whole
    near = lattice(np.random.default_rng(0).normal(size=(20_000, 8)))
    near = near[np.linalg.norm(near, axis=1) < radius - 1e-3]
    assert len(near) > 15_000 and {tuple(row) for row in np.round(4 * near).astype(int)} <= whole


# ------------------------------------------------------------------------------------------------ search


@pytest.mark.parametrize("bits, dimension", [(2, 2), (2, 4), (1, 8), (2, 8)])
@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("search", [vector.nearest, vector.nearest_torch])
def test_the_nearest_entry_is_that_of_brute_force(
    books: dict[tuple[int, int], Tensor], bits: int, dimension: int, spread: float, search: Any
) -> None:
    levels, x = books[bits, dimension], spread * gaussian_values(300 * dimension, dimension)
    distances = torch.cdist(x.double(), levels.double(), compute_mode="donot_use_mm_for_euclid_dist")
    found = distances.gather(1, search(x, levels).long()[:, None]).squeeze(1)
    assert (found <= distances.amin(1) + 1e-5).all()


def test_the_search_needs_no_order_and_no_whole_blocks() -> None:
    rng = np.random.default_rng(3)
    levels, x = torch.tensor(rng.normal(size=(37, 3)), dtype=torch.float32), gaussian_values(3000, 3)
    assert torch.equal(vector.nearest(x, levels).long(), torch.cdist(x, levels).argmin(1))
    assert len(vector.nearest(x[:0], levels)) == 0


def plain_block_gptq(w: np.ndarray, scales: np.ndarray, h: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Symbols [rows, cols / p] in float64: what a block misses goes, by least squares in the norm of h, to the columns after it."""
    w, p, symbols = w.astype(np.float64), levels.shape[1], []
    for i in range(0, w.shape[1], p):
        block, scale = w[:, i : i + p].copy(), scales[:, i * scales.shape[1] // w.shape[1], None]
        symbols.append(np.square(block[:, None] / scale[:, None] - levels).sum(-1).argmin(1))
        missed = block - levels[symbols[-1]] * scale
        rest = slice(i + p, None)
        w[:, rest] += missed @ np.linalg.solve(h[rest, rest], h[rest, i : i + p]).T
    return np.stack(symbols, 1)


@pytest.mark.parametrize("dimension", [2, 4, 8])
def test_block_feedback_is_the_least_squares_solution(books: dict[tuple[int, int], Tensor], dimension: int) -> None:
    levels, y = books[1 if dimension == 8 else 2, dimension], gaussian(70, 32)
    h = correlated(32).double() + 0.1 * torch.eye(32)
    scales = y.reshape(70, 2, 16).square().mean(-1).sqrt()
    upper = inverse_factor(h, 0.0)
    wanted = plain_block_gptq(y.numpy(), scales.numpy(), h.numpy(), levels.numpy())
    assert (vector.search(y, scales, upper, levels).numpy() == wanted).mean() > 0.995  # float32 and float64 may differ


def test_feedback_in_torch_chooses_the_same(
    books: dict[tuple[int, int], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    y, upper = gaussian(70, 32), inverse_factor(correlated(32))
    y[3] = 0
    scales = y.reshape(70, 2, 16).square().mean(-1).sqrt()
    wanted = vector.search(y, scales, upper, books[2, 4])
    monkeypatch.setattr(vector, "_search_loops", vector.search_torch)
    assert (vector.search(y, scales, upper, books[2, 4]) == wanted).float().mean() > 0.995


def test_without_correlation_the_nearest_entries_are_taken(books: dict[tuple[int, int], Tensor]) -> None:
    encoder, w = vector_encoder(64, books[2, 4]), gaussian(32, 64)
    found = encode_feedback(w, torch.eye(64), encoder, 2, 2, 0)
    assert torch.equal(found.symbols, encode(w, encoder).symbols) and found.symbols.shape == (32, 16)


@pytest.mark.parametrize("bits, dimension", [(2, 2), (2, 4), (1, 8), (2, 8)])
def test_feedback_lowers_the_output_error(books: dict[tuple[int, int], Tensor], bits: int, dimension: int) -> None:
    w, h, encoder = gaussian(64, 512), correlated(512), vector_encoder(512, books[bits, dimension])
    w[3] = 0
    found = encode_feedback(w, h, encoder, bits, bits, 0)
    nearest = encode_feedback(w, torch.eye(512), encoder, bits, bits, 0).decoded - w
    before, whole = float(((nearest @ h) * nearest).sum()), float(((w @ h) * w).sum())
    assert found.output_error < 0.7 * before / whole and not found.decoded[3].any()
    d = found.decoded - w
    assert found.output_error == pytest.approx(float(((d @ h) * d).sum()) / whole, rel=1e-3)
    scalar = encode_feedback(w, h, scalar_encoder(512, bits), bits, bits, 0)
    assert found.output_error < scalar.output_error


# ------------------------------------------------------------------------------------------------ stages


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_errors_of_stages_multiply(books: dict[tuple[int, int], Tensor], kind: str) -> None:
    levels = scalar_encoder(256, 2).levels if kind == "scalar" else books[2, 4]
    x = gaussian(600, 256)
    encoders = [vector_encoder(256, levels, seed=seed) for seed in (42, 43)]
    found = encode_stages(x, encoders)
    total = sum(decode(f.symbols, f.scales, e) for f, e in zip(found, encoders, strict=True))
    error = float((total - x).double().square().sum())
    assert found[-1].squared_error == pytest.approx(error, rel=1e-3)
    assert found[-1].squared_norm == pytest.approx(float(x.double().square().sum()), rel=1e-5)
    first = encode(x, encoders[0])
    assert error / found[-1].squared_norm == pytest.approx((first.squared_error / first.squared_norm) ** 2, rel=0.02)


def test_a_sum_beyond_the_dtype_leaves_the_last_stage_out() -> None:
    x = torch.full((2, 64), 65504.0)
    x[1] /= 2
    levels = torch.tensor([-0.99, 0.99])
    plain = Encoder(64, make_rotation("identity", 1, 0), levels, torch.float32, torch.float16)
    above = Encoder(64, plain.rotation, 3 * levels, torch.float32, torch.float16, unbiased=True)
    found = encode_stages(x * 0.98, [plain, above])
    total = sum(decode(f.symbols, f.scales, e) for f, e in zip(found, [plain, above], strict=True))
    assert torch.isfinite(total.half()).all()
    over = encode_stages(x + 20 * (x == 65504), [plain, above])  # beyond what F16 holds
    assert over[1].scales.flatten().tolist()[0] == 0 and over[1].scales.flatten().tolist()[1] >= 0


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_feedback_of_the_last_stage_lowers_the_output_error(books: dict[tuple[int, int], Tensor], kind: str) -> None:
    levels, bits = scalar_encoder(256, 2).levels if kind == "scalar" else books[2, 4], 2
    x, encoders = gaussian(64, 256), [vector_encoder(256, levels, seed=seed) for seed in (42, 43)]
    h = correlated(256)
    earlier, last = encode_stages_with_feedback(x, h, encoders, bits, bits, 0)
    total = sum(decode(f.symbols, f.scales, e) for f, e in zip([*earlier, last], encoders, strict=True))
    assert torch.allclose(last.decoded, total, atol=1e-4)
    whole, d = float(((x @ h) * x).sum()), last.decoded - x
    assert last.output_error == pytest.approx(float(((d @ h) * d).sum()) / whole, rel=1e-3)
    assert last.relative_error == pytest.approx(float(d.square().sum() / x.square().sum()), rel=1e-3)
    found = encode_stages(x, encoders)
    d = sum(decode(f.symbols, f.scales, e) for f, e in zip(found, encoders, strict=True)) - x
    assert last.output_error < 0.6 * float(((d @ h) * d).sum()) / whole


def test_feedback_leaves_a_last_stage_beyond_the_dtype_out() -> None:
    x = torch.full((2, 64), 65504.0)
    x[1] *= torch.linspace(0.1, 0.5, 64)
    plain = Encoder(64, make_rotation("identity", 1, 0), torch.tensor([-0.99, 0.99]), torch.float32, torch.float16)
    above = replace(plain, levels=torch.tensor([-3.0, 3.0]))
    earlier, last = encode_stages_with_feedback(x + 20 * (x == 65504), torch.eye(64), [plain, above], 1, 1, 0)
    total = decode(earlier[0].symbols, earlier[0].scales, plain) + decode(last.symbols, last.scales, above)
    assert torch.isfinite(total.half()).all() and torch.allclose(total, last.decoded)
    assert last.scales.flatten().tolist()[0] == 0 and last.scales.flatten().tolist()[1] > 0


def prod_encoders(kind: str, size: int, seed: int) -> list[Encoder]:
    def rotation(seed: int) -> Any:
        return make_rotation(kind, size, seed, haar_matrix(seed, size) if kind == "dense" else None)

    mse = torch.tensor(lloyd_max_levels(4, size, 8193, 96))
    dtypes = torch.float32, torch.float32
    first = Encoder(size, rotation(2 * seed), mse, *dtypes)
    return [first, Encoder(size, rotation(2 * seed + 1), torch.tensor(SIGN_LEVELS), *dtypes, unbiased=True)]


@pytest.mark.parametrize("kind", ["dense", "hadamard"])
def test_inner_products_of_prod_are_unbiased(kind: str) -> None:
    """TurboQuant-prod (arXiv:2504.19874, theorem 2): the average of <y, x^> over the rotations is <y, x>."""
    size, seeds = 64, 800
    x, y = gaussian(6, size, 3), gaussian(6, size, 4)
    y = y + x  # so that a shrunken x^ shows
    prod, mse = [], []
    for seed in range(seeds):
        encoders = prod_encoders(kind, size, seed)
        found = encode_stages(x, encoders)
        first, second = (decode(f.symbols, f.scales, e) for f, e in zip(found, encoders, strict=True))
        assert torch.allclose((second * (x - first)).sum(1), (x - first).square().sum(1), rtol=1e-4)
        prod.append(((first + second - x) * y).sum(1))
        mse.append(((first - x) * y).sum(1))
    prod_errors, mse_errors = torch.stack(prod).double(), torch.stack(mse).double()  # [seeds, rows]
    deviation = prod_errors.std(0) / seeds**0.5
    assert (prod_errors.mean(0).abs() < 4 * deviation).all()
    assert float(prod_errors.mean(0).abs().sum()) < 0.15 * float(mse_errors.mean(0).abs().sum())
    assert (mse_errors.mean(0) < -4 * mse_errors.std(0) / seeds**0.5).all(), "rounding alone shrinks"


# ------------------------------------------------------------------------------------------------ jobs


JOBS: list[tuple[list[str], str, set[str]]] = [
    (["--bits", "2", "--dimension", "2"], "turboquant_mse_vector", {"vector_codebook"}),
    (["--bits", "2", "--dimension", "4", "--vector-length", "16"], "turboquant_mse_vector", {"vector_codebook"}),
    (["--bits", "1", "--dimension", "8", "--rotation", "haar"], "turboquant_mse_vector", {"vector_codebook", "dense"}),
    (["--bits", "2", "--dimension", "8"], "turboquant_mse_vector", {"vector_codebook"}),
    (["--stages", "2,2"], "turboquant_mse_stages", {"stages"}),
    (["--stages", "1,2,1", "--rotation", "none"], "turboquant_mse_stages", {"stages"}),
    (["--stages", "3,sign", "--rotation", "haar"], "turboquant_prod", {"stages", "dense"}),
    (["--stages", "2,sign", "--dimension", "2"], "turboquant_prod_vector", {"stages", "vector_codebook"}),
    (["--stages", "2,2", "--dimension", "8"], "turboquant_mse_vector_stages", {"stages", "vector_codebook"}),
]


@pytest.mark.usefixtures("quick_books")
@pytest.mark.parametrize("options, method, features", JOBS, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_every_combination_conforms(
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    method: str,
    features: set[str],
) -> None:
    path, out, said = make(sample_tensors()), tmp_path / "out", []
    monkeypatch.setattr(encoding, "encode_stages", keeping(said))
    options = [*options, "--uniform"]
    assert main(["plan", str(path), *options, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert main(["quantize", str(path), str(out), *options, "--quiet"]) == 0
    manifest = manifest_of(out)
    assert plan["accounting"] == manifest["accounting"] | {"ratio": plan["accounting"]["ratio"]}
    assert manifest["quantization"]["method"] == method and set(manifest["features"]) == features
    assert {t["effective_bits"] for t in manifest["tensors"].values() if t["kind"] == "quantized"} == {
        plan["settings"]["bits"]
    }
    assert len({t.get("seed") for t in manifest["transforms"].values() if t["kind"] == "hadamard"}) == (
        0 if "--rotation" in options else len(plan["settings"]["stages"]) or 1
    )
    with open_repo(out) as repo, Reader(open_source(path, None)) as reader:
        for name, weight in repo.manifest.tensors.items():
            if weight.stages and 0 not in weight.shape:
                decoded = repo.dequantize(name).reshape(-1, weight.shape[-1])
                original = torch.cat([r.float() for r in reader.row_chunks(reader.source.tensors[name])])
                wanted = next(total for rows, total in said if torch.equal(rows, original))
                assert torch.allclose(decoded.float(), wanted.to(decoded.dtype).float(), rtol=2**-7, atol=1e-6)
    run = run_python("-m", "conformance", "check", str(out))
    assert "PASS L3" in run.stdout, run.stdout


def keeping(said: list[tuple[Tensor, Tensor]]) -> Any:
    """encode_stages, which notes the rows and what it says that they will decode to."""

    def keep(x: Tensor, encoders: list[Encoder]) -> Any:
        found = encode_stages(x, encoders)
        parts = [decode(f.symbols, f.scales, e) for f, e in zip(found, encoders, strict=True)]
        said.append((x.clone(), torch.stack(parts).sum(0)))
        return found

    return keep


@pytest.mark.usefixtures("quick_books")
@pytest.mark.parametrize(
    "options, bits, method, features",
    [
        (["--bits", "2", "--dimension", "2"], 2, "feedback_vector", ["vector_codebook"]),
        (["--bits", "2", "--dimension", "4"], 2, "feedback_vector", ["vector_codebook"]),
        (["--bits", "2", "--dimension", "8"], 2, "feedback_vector", ["vector_codebook"]),
        (["--stages", "2,1,1"], 4, "feedback_stages", ["stages"]),
        (["--stages", "2,1", "--dimension", "8"], 3, "feedback_vector_stages", ["stages", "vector_codebook"]),
    ],
)
def test_a_calibrated_repository_conforms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], bits: int, method: str, features: list[str]
) -> None:
    base, out = make_checkpoint(tmp_path / "base"), tmp_path / "out"
    text, kept = make_text(tmp_path / "text.txt", 3000), keep_decoded(monkeypatch)
    assert main(["quantize", str(base), str(out), *options, "--calibration", str(text), "--quiet"]) == 0
    manifest = manifest_of(out)
    assert manifest["quantization"]["method"] == method and sorted(manifest["features"]) == features
    found = {n: t["effective_bits"] for n, t in manifest["tensors"].items() if t["kind"] == "quantized"}
    assert all(b == (bits if ".layers." in name else bits + 1) for name, b in found.items()) and len(kept) == 16
    with open_repo(out) as repo:
        for name, decoded in kept.items():
            assert torch.allclose(repo.dequantize(name).float(), decoded, rtol=2**-7, atol=1e-6)
    run = run_python("-m", "conformance", "check", str(out))
    assert "PASS L3" in run.stdout, run.stdout


@pytest.mark.usefixtures("quick_books")
def test_an_interrupted_job_of_stages_continues_with_the_same_bytes(
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = make(sample_tensors())
    options = ["--stages", "2,1", "--dimension", "2", "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode_stages", interrupted(encode_stages, 5))
        assert main(["quantize", str(path), str(tmp_path / "out"), *options]) == 130
    assert main(["quantize", str(path), str(tmp_path / "out"), *options]) == 0
    assert main(["quantize", str(path), str(tmp_path / "straight"), *options]) == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "straight")


@pytest.mark.usefixtures("quick_books")
def test_the_card_says_what_the_codes_are(make: Make, tmp_path: Path) -> None:
    path, out = make(sample_tensors()), tmp_path / "out"
    assert main(["quantize", str(path), str(out), "--stages", "2,sign", "--dimension", "2", "--quiet"]) == 0
    assert main(["card", str(out)]) == 0
    text = (out / "README.md").read_text()
    for words in ("up to 2 neighbouring coordinates", "stages of 2, sign bits", "2411.17525", "--stages 2,sign --"):
        assert words in text, words


def test_rows_that_p_does_not_divide_have_a_smaller_one(
    make: Make,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = make({"a.weight": torch.zeros(4, 24), "b.weight": torch.zeros(4, 20), "c.weight": torch.zeros(4, 9)})
    assert main(["plan", str(path), "--bits", "2", "--dimension", "8", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [t["dimension"] for t in plan["tensors"].values()] == [8, 4, 1]
    assert [t["stages"][0]["codebook"] for t in plan["tensors"].values()] == [
        *("vector-p8-b2", "vector-p4-b2", "lloyd-max-g9-b2")
    ]
    assert sum("8 do not divide them" in note for note in plan["notes"]) == 2


def test_a_sign_without_rotation_is_told(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(make({"a.weight": torch.zeros(4, 7)})), "--stages", "2,sign", "--json"]) == 0
    assert any("not unbiased" in note for note in json.loads(capsys.readouterr().out)["notes"])


@pytest.mark.parametrize(
    "options, word",
    [
        (["--bits", "3", "--dimension", "8"], "16 bits per symbol"),
        (["--stages", "2,3", "--dimension", "8"], "16 bits per symbol"),
        (["--preset", "best", "--bits", "2", "--dimension", "2"], "one weight per symbol"),
        (["--target-bpw", "3", "--dimension", "2"], "use --bits"),
        (["--preset", "best", "--stages", "2,2"], "one stage"),
        (["--preset", "balanced", "--stages", "2,sign"], "unbiased"),
        (["--stages", "3,sign", "--rotation", "none"], "after a rotation"),
    ],
)
def test_what_cannot_be_is_refused(
    make: Make,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    word: str,
) -> None:
    assert main(["plan", str(make({"a.weight": torch.zeros(4, 24)})), *options]) == 1
    error = capsys.readouterr().err
    assert "SCHEMA.VALUE" in error and word in error


@pytest.mark.parametrize("text", ["2", "sign,2", "2,9", "2,,2", "0,2", "2,x", "sign,sign", "1,1,1,1,1,1,1,1,1"])
def test_stages_that_are_no_list_of_bits_are_refused(text: str) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(["plan", "model", "--stages", text])


@pytest.mark.parametrize("options", [["--bits", "2", "--dimension", "4"], ["--stages", "3,sign"], ["--stages", "2,2"]])
def test_the_card_names_the_options(options: list[str]) -> None:
    def recorded(words: list[str]) -> dict[str, Any]:
        return settings(_parser().parse_args(["plan", "model", *words])).to_quantization()

    found = recorded(options)
    assert recorded(card._width_arguments(found)) == found
    assert card._more_options({"calibration": None} | found) == []
