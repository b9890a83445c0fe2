"""The trellis encoder: against all streams where they can be counted, and through the writer and the loader."""

import itertools
import sys

import numpy as np
import pytest
import torch

from reference_quantizer.codes import trellis
from reference_quantizer.codes.trellis import (
    MULTIPLIER,
    compiled_search,
    computed_levels,
    computed_scale,
    encode_tiles,
    train_codebook,
    trellis_levels,
)
from tqformat import TQFormatError, pack
from tqformat.load_quantized import unpack


def gaussian(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def all_sequences(n: int, bits: int, window: int) -> np.ndarray:
    """The symbols of all 2^(n * bits) streams [streams, n], from the sum of [TQ-CODE-6]."""
    streams = np.array(list(itertools.product((0, 1), repeat=n * bits)))
    place = (np.arange(n)[:, None] * bits + np.arange(window)) % (n * bits)
    return (streams[:, place] << np.arange(window)).sum(-1)


def errors(x: np.ndarray, levels: np.ndarray, symbols: np.ndarray, weights: np.ndarray | float = 1.0) -> np.ndarray:
    """The weighted squared error of each tile; float64 [tiles]."""
    return (weights * (x - levels[symbols]).astype(np.float64) ** 2).sum(-1)


@pytest.mark.parametrize(
    "n, bits, window",
    [(9, 1, 3), (12, 1, 4), (4, 1, 4), (6, 2, 3), (6, 2, 4), (3, 2, 6), (4, 3, 4), (3, 4, 5), (3, 4, 12)],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_exact_is_the_best_of_all_streams(n: int, bits: int, window: int, weighted: bool) -> None:
    x, levels = gaussian(1, 20, n), gaussian(2, 1 << window)
    weights = np.exp(2 * gaussian(3, 20, n)) if weighted else None
    w = 1.0 if weights is None else weights
    sequences = all_sequences(n, bits, window)
    least = np.array([errors(x[i], levels, sequences, 1.0 if weights is None else weights[i]).min() for i in range(20)])
    exact = errors(x, levels, encode_tiles(x, levels, bits, window, weights, exact=True), w)
    default = errors(x, levels, encode_tiles(x, levels, bits, window, weights), w)
    np.testing.assert_allclose(exact, least, rtol=1e-5)
    assert (default >= least * (1 - 1e-5)).all()


@pytest.mark.parametrize("bits, window", [(1, 4), (2, 4), (1, 6), (2, 6)])
def test_the_default_is_close_to_the_optimum_and_passes_bring_it_closer(bits: int, window: int) -> None:
    x, levels = gaussian(4, 64, 48), gaussian(5, 1 << window)
    once, twice, exact = (
        errors(x, levels, encode_tiles(x, levels, bits, window, **mode))
        for mode in ({}, {"passes": 3}, {"exact": True})
    )
    assert (once >= exact * (1 - 1e-5)).all() and (twice <= once * (1 + 1e-5)).all()
    assert once.sum() <= 1.01 * exact.sum() and twice.sum() <= 1.003 * exact.sum()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [4, 5, 6, 7, 8, 9, 11, 12, 13, 16])
def test_symbols_pack_and_come_back(bits: int, window: int) -> None:
    n = 19 if window < 13 else 17  # n * bits is no multiple of 8
    x, levels = gaussian(6, 3, n), gaussian(7, 1 << window)
    symbols = encode_tiles(x, levels, bits, window)
    assert symbols.dtype == np.uint16 and symbols.shape == x.shape
    packed = pack(torch.from_numpy(symbols.astype(np.int32)), bits, window)
    assert (unpack(packed, n, bits, window).numpy() == symbols).all()
    assert errors(x, levels, symbols).sum() < (x**2).sum()  # of any other symbols it would be twice that


def test_window_equal_to_bits_gives_the_nearest_levels() -> None:
    x, levels = gaussian(8, 5, 33), gaussian(9, 16)
    expected = np.abs(x[..., None] - levels).argmin(-1)
    assert (encode_tiles(x, levels, 4, 4) == expected).all()


@pytest.mark.parametrize("bits, window", [(2, 8), (3, 10), (2, 13)])
def test_threads_and_neighbours_change_nothing(bits: int, window: int) -> None:
    x, levels = gaussian(10, 21, 24), gaussian(11, 1 << window)
    one = encode_tiles(x, levels, bits, window, threads=1)
    assert (encode_tiles(x, levels, bits, window, threads=3) == one).all()
    assert (encode_tiles(x[5:6], levels, bits, window) == one[5:6]).all()


@pytest.mark.parametrize("bits, window", [(1, 8), (2, 12), (3, 9), (4, 12), (5, 12), (8, 12)])
def test_the_loops_in_c_find_what_numba_s_find(bits: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled_search(bits, window) is None:
        pytest.skip("needs tqformat-kernels, and a processor for which it has vectors")
    x, levels, weights = gaussian(8, 21, 40), gaussian(9, 1 << window), np.exp(gaussian(10, 21, 40))
    found = encode_tiles(x, levels, bits, window, weights)
    monkeypatch.setattr(trellis, "compiled_search", lambda bits, window: None)
    wanted = encode_tiles(x, levels, bits, window, weights)
    # both in float32, where another path may be as near
    assert errors(x, levels, found, weights) == pytest.approx(errors(x, levels, wanted, weights), rel=1e-4)
    assert (found == wanted).mean() > 0.99


def test_weights_say_where_errors_may_be() -> None:
    x, levels = gaussian(12, 32, 64), gaussian(13, 256)
    weights = np.where(np.arange(64) % 2, 1.0, 1e-3).astype(np.float32) * np.ones_like(x)
    plain, weighted = (levels[encode_tiles(x, levels, 2, 8, w)] for w in (None, weights))
    odd = (slice(None), slice(1, None, 2))
    assert ((x - weighted)[odd] ** 2).mean() < 0.3 * ((x - plain)[odd] ** 2).mean()
    scaled = encode_tiles(x, levels, 2, 8, np.full_like(x, 1e-30))
    assert (scaled == encode_tiles(x, levels, 2, 8)).all()


@pytest.mark.parametrize(
    "bits, window, bound", [(1, 6, 0.31), (2, 6, 0.086), (2, 8, 0.078), (3, 8, 0.0205), (4, 8, 0.0062)]
)
def test_trained_codebooks(bits: int, window: int, bound: float) -> None:
    levels, x = train_codebook(bits, window), gaussian(14, 256, 256)
    error = errors(x, levels, encode_tiles(x, levels, bits, window)).sum() / (x.astype(np.float64) ** 2).sum()
    assert error < bound, error
    assert levels.dtype == np.float32 and (levels == levels.astype(np.float16)).all()
    assert (levels == -levels[::-1]).all()
    assert (train_codebook(bits, window, iterations=3) == train_codebook(bits, window, iterations=3, threads=1)).all()


@pytest.mark.parametrize("bits, bound", [(1, 0.285), (2, 0.0735), (3, 0.0196), (4, 0.0050), (5, 0.00127), (6, 0.00037)])
def test_codebooks_of_the_package(bits: int, bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reference_quantizer.codes.trellis.train_codebook", lambda *_: pytest.fail("trained"))
    levels, x = trellis_levels(bits, 12), gaussian(15, 64, 256)
    error = errors(x, levels, encode_tiles(x, levels, bits, 12)).sum() / (x.astype(np.float64) ** 2).sum()
    assert error < bound, error
    assert (levels == -levels[::-1]).all() and not levels.flags.writeable


@pytest.mark.parametrize("bits, bound", [(1, 0.293), (2, 0.0757), (3, 0.0197), (4, 0.0052)])
def test_computed_levels(bits: int, bound: float) -> None:
    levels, x = computed_levels(12), gaussian(15, 64, 256)
    bytes_of = (np.arange(4096, dtype="<u4") * np.uint32(MULTIPLIER)).view(np.uint8).reshape(-1, 4)
    assert (128 * levels + 510 == bytes_of.sum(1)).all() and (levels == levels.astype(np.float16)).all()
    power = (x.astype(np.float64) ** 2).sum()

    def error(scale: float) -> float:
        return float(errors(x, scale * levels, encode_tiles(x, scale * levels, bits, 12)).sum() / power)

    assert error(computed_scale(bits)) < bound
    assert error(computed_scale(bits)) < 1.005 * min(error(computed_scale(bits) + step) for step in (-0.05, 0.05))


def test_codebooks_are_kept(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    trellis_levels.cache_clear()
    levels = trellis_levels(2, 4)
    (file,) = tmp_path.rglob("*.npy")
    monkeypatch.setattr("reference_quantizer.codes.trellis.train_codebook", lambda *_: pytest.fail("trained again"))
    trellis_levels.cache_clear()
    assert (trellis_levels(2, 4) == levels).all() and not levels.flags.writeable
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for damaged in (file.read_bytes()[:-4], b""):  # is replaced
        file.write_bytes(damaged)
        trellis_levels.cache_clear()
        assert (trellis_levels(2, 4) == levels).all()
        assert (np.load(file) == levels).all()
    trellis_levels.cache_clear()


@pytest.mark.parametrize(
    "change, code",
    [
        ({"bits": 0}, "SCHEMA.VALUE"),
        ({"window": 17}, "SCHEMA.VALUE"),
        ({"bits": 9}, "SCHEMA.VALUE"),
        ({"levels": np.zeros(255, np.float32)}, "SCHEMA.VALUE"),
        ({"x": np.zeros((2, 3), np.float32)}, "SCHEMA.VALUE"),
        ({"x": np.full((2, 8), np.nan, np.float32)}, "DATA.NON_FINITE"),
        ({"weights": np.zeros((2, 8), np.float32)}, "SCHEMA.VALUE"),
        ({"weights": np.ones((2, 1), np.float32)}, "SCHEMA.VALUE"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, code: str) -> None:
    fine = {"x": np.zeros((2, 8), np.float32), "levels": np.zeros(256, np.float32), "bits": 2, "window": 8}
    encode_tiles(**fine)
    with pytest.raises(TQFormatError) as error:
        encode_tiles(**{**fine, **change})
    assert error.value.code == code


def test_no_tiles_no_symbols() -> None:
    assert encode_tiles(np.zeros((0, 8), np.float32), gaussian(1, 256), 2, 8).shape == (0, 8)


def test_without_numba_the_advice_is_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqformat_kernels", None)
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "reference_quantizer.codes.viterbi", raising=False)
    monkeypatch.delattr("reference_quantizer.codes.viterbi", raising=False)
    with pytest.raises(TQFormatError, match=r"extra `encoders`") as error:
        encode_tiles(gaussian(1, 2, 8), gaussian(2, 256), 2, 8)
    assert error.value.code == "UNSUPPORTED.LIBRARY"
