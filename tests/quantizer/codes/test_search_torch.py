"""The search in torch against the loops in numba: trellis paths, whole weights, chunks, and when it is used."""

from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import DEVICES
from helpers import correlated, gaussian
from torch import Tensor

from reference_quantizer import codes
from reference_quantizer.codes import feedback, search_torch
from reference_quantizer.codes.feedback import inverse_factor
from reference_quantizer.codes.search_torch import search, viterbi
from reference_quantizer.codes.trellis import encode_tiles, overlap_length


def same(found: Tensor, wanted: Tensor) -> float:
    return float((found == wanted).float().mean())


def make_weight(rows: int, cols: int, groups: int, window: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A weight whose row 3 and last third are zeros, its scales, the Hessian, the inverse's factor, and random levels."""
    y, h = gaussian(rows, cols), correlated(cols)
    y[3] = 0
    y[rows * 2 // 3 :] = 0
    scales = y.reshape(rows, groups, -1).square().mean(-1).sqrt()
    levels = torch.randn(1 << window, generator=torch.Generator().manual_seed(2))
    return y, scales, h, inverse_factor(h), levels


def output_error(symbols: Tensor, y: Tensor, scales: Tensor, h: Tensor, levels: Tensor) -> float:
    d = (levels[symbols] * scales.repeat_interleave(y.shape[1] // scales.shape[1], 1) - y).double()
    return float(((d @ h.double()) * d).sum())


def encode_numba(x: Tensor, levels: Tensor, bits: int, window: int, weights: Tensor) -> Tensor:
    return torch.from_numpy(encode_tiles(x.numpy(), levels.numpy(), bits, window, weights.numpy()).astype(np.int64))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("bits", "window"), [(1, 1), (1, 2), (1, 6), (2, 3), (2, 4), (2, 8), (2, 11), (3, 4), (3, 9), (4, 6)]
)
def test_paths_are_those_of_the_numba_loops(device: str, weighted: bool, bits: int, window: int) -> None:
    overlap = overlap_length(bits, window)
    n = 2 * overlap + 3  # in a shorter tile, which the first run sees more than once, two paths may be exactly as near
    x, levels = gaussian(12, n), torch.randn(1 << window, generator=torch.Generator().manual_seed(2))
    weights = gaussian(12, n, 3).mul(2).exp() if weighted else torch.ones(12, n)
    weights /= weights.amax(1, keepdim=True)
    wanted, root = encode_numba(x, levels, bits, window, weights), weights.sqrt()
    found = viterbi(*(part.to(device) for part in (x * root, root, levels)), bits, window, overlap).cpu()
    errors = [float((weights * (x - levels[symbols]).square()).double().sum()) for symbols in (found, wanted)]
    assert found.shape == x.shape and same(found, wanted) > 0.99
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("bits", "window", "n"), [(1, 2, 9), (1, 8, 32), (2, 3, 5), (2, 4, 24), (2, 7, 11), (3, 4, 20)]
)
def test_ties_go_to_the_first_branch(device: str, bits: int, window: int, n: int) -> None:
    g = torch.Generator().manual_seed(4)  # small integers: no sum is rounded, so many paths are exactly as near
    x, levels = (torch.randint(-4, 5, shape, generator=g).float() for shape in [(40, n), (1 << window,)])
    root = torch.randint(1, 3, (40, n), generator=g).float()
    wanted = encode_numba(x, levels, bits, window, root.square())
    parts = [part.to(device) for part in (x * root, root, levels)]
    assert torch.equal(viterbi(*parts, bits, window, overlap_length(bits, window)).cpu(), wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("bits", "window", "groups"),
    [
        (1, 1, 1),
        (2, 2, 3),
        (4, 4, 1),
        (8, 8, 6),
        (1, 4, 1),
        (2, 3, 3),
        (2, 8, 1),
        (2, 8, 6),
        (3, 4, 3),
        (3, 8, 1),
        (4, 7, 3),
    ],
)
def test_weights_get_the_symbols_of_the_numba_loops(device: str, bits: int, window: int, groups: int) -> None:
    y, scales, h, upper, levels = make_weight(
        240, 144, groups, window
    )  # two blocks of columns and a part; the last tile is zeros
    levels = levels if window > bits else levels.sort().values
    importance = torch.rand(240, generator=torch.Generator().manual_seed(9)) + 0.1
    given = y, scales, importance, upper, levels
    wanted = feedback._search(*given, bits, window, 80)
    parts = [part.to(device) for part in given]
    found = search(*parts, bits, window, 80).cpu()
    errors = [output_error(symbols, y, scales, h, levels) for symbols in (found, wanted)]
    kept = torch.arange(240) != 3  # next to rows that count, zeros hardly say which of their symbols is the nearer
    assert found.dtype == torch.int32 and same(found[kept], wanted[kept]) > 0.99
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)  # a symbol that differs makes later ones differ
    assert all(torch.equal(part.cpu(), old) for part, old in zip(parts, given, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_little_memory_changes_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    y, scales, _, upper, levels = (part.to(device) for part in make_weight(80, 12, 1, 8))
    given = y, scales, torch.ones_like(y[:, 0]), upper, levels, 2, 8, 16
    monkeypatch.setattr(search_torch, "load_triton", lambda: None)
    whole, plain, tiles = search(*given), search_torch._viterbi, set()

    def count(x: Tensor, *rest: object) -> Tensor:
        tiles.add(len(x))
        return plain(x, *rest)

    monkeypatch.setattr(search_torch, "_viterbi", count)
    assert torch.equal(search(*given, memory=1), whole) and tiles == {1}
    assert torch.equal(search(*given, memory=14_000), whole) and tiles == {1, 2}


def test_a_weight_that_is_not_on_the_cpu_is_searched_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    y, scales, _, upper, levels = (part.to("meta") for part in make_weight(32, 16, 1, 8))
    monkeypatch.setattr(search_torch, "search", lambda *args: args)
    given = y, scales, torch.ones_like(y[:, 0]), upper, levels, 2, 8, 32
    assert feedback._search(*given) == given


@pytest.mark.parametrize("version", ["13.0", None])
def test_the_kernel_is_taken_only_where_torch_is_for_cuda(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = ModuleType("search_triton")
    monkeypatch.setattr(codes, "search_triton", kernel, raising=False)
    monkeypatch.setattr(torch.version, "cuda", version)
    assert search_torch.load_triton() is (kernel if version else None)
