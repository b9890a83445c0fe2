"""The search for trellis codes against the Viterbi algorithm as it is usually written, in float64."""

from typing import Any

import numpy as np
import pytest
import tqformat_kernels

Array = np.ndarray[Any, Any]
FORMS = list(tqformat_kernels.forms())


def viterbi(x: Array, weight: Array, levels: Array, bits: int, window: int, start: int | None) -> tuple[Array, float]:
    """The best path over x [steps] from state `start` back to it, or from anywhere: symbols [steps], and its cost."""
    states, branches = 1 << window - bits, 1 << bits
    symbol = np.arange(states)[:, None] * branches + np.arange(branches)  # [states, branches], into each state
    before = symbol % states
    cost = np.zeros(states) if start is None else np.where(np.arange(states) == start, 0, np.inf)
    back = []
    for value, w in zip(x.astype(np.float64), weight.astype(np.float64), strict=True):
        paths = cost[before] + w * (value - levels[symbol]) ** 2
        back.append(paths.argmin(1))
        cost = paths.min(1)
    state = int(cost.argmin()) if start is None else start
    least, found = float(cost[state]), []
    for branch in reversed(back):
        found.append(symbol[state, branch[state]])
        state = int(found[-1]) % states
    return np.array(found[::-1]), least


def tail_biting(x: Array, weight: Array, levels: Array, bits: int, window: int, overlap: int) -> float:
    """The cost of the best path through the state that the best path around the tile's begin has there."""
    at = np.arange(-overlap, overlap) % len(x)
    around, _ = viterbi(x[at], weight[at], levels, bits, window, None)
    return viterbi(x, weight, levels, bits, window, int(around[overlap]) % (1 << window - bits))[1]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    "bits, window, rows, groups",
    [(1, 5, 24, 1), (1, 12, 40, 1), (2, 6, 16, 2), (2, 8, 33, 1), (3, 9, 31, 3), (4, 8, 2, 1), (4, 12, 17, 1),
     (5, 9, 24, 1), (5, 12, 16, 6), (6, 10, 19, 1), (7, 11, 12, 2), (8, 12, 9, 1), (2, 13, 64, 1)],
)  # fmt: skip
def test_each_column_is_the_best_path(name: str, bits: int, window: int, rows: int, groups: int) -> None:
    rng, cols = np.random.default_rng(bits * window + rows), 6
    levels = rng.standard_normal(1 << window, np.float32)
    targets = rng.standard_normal((cols, rows), np.float32)
    scales = rng.random((groups, rows), np.float32) + 0.5
    scales[0, 1] = 0  # a row that asks for nothing
    roots = rng.random((groups, rows), np.float32) + 0.5
    upper = np.triu(rng.standard_normal((cols, cols), np.float32)) * 0.3
    np.fill_diagonal(upper, rng.random(cols, np.float32) + 0.5)
    before, overlap, tqformat_form = targets.copy(), 3, tqformat_kernels.form()
    tqformat_kernels.set_form(name)
    try:
        plain = tqformat_kernels.encode(targets, scales, roots, levels, bits, window, overlap)
        assert np.array_equal(targets, before)  # without feedback nothing changes
        symbols = tqformat_kernels.encode(targets, scales, roots, levels, bits, window, overlap, upper)
    finally:
        tqformat_kernels.set_form(tqformat_form)
    assert np.array_equal(symbols[0], plain[0])
    wanted = before.astype(np.float64)
    for c in range(cols):
        assert np.allclose(targets[c], wanted[c], rtol=0, atol=1e-5 * np.abs(wanted).max())
        s, w = scales[c * groups // cols], roots[c * groups // cols] ** 2
        x = np.where(s > 0, targets[c] / np.where(s > 0, s, 1), 0)
        least = tail_biting(x, w, levels, bits, window, overlap)
        found = float((w * (x - levels[symbols[c]]).astype(np.float64) ** 2).sum())
        assert found <= least * (1 + 1e-5) + 1e-6  # float32 may take another path of nearly the same cost
        states = 1 << window - bits  # a symbol's low bits are the high bits of the one before, the first's of the last
        assert np.array_equal(symbols[c] % states, np.roll(symbols[c], 1) >> bits)
        missed = (targets[c] - levels[symbols[c]] * s) / upper[c, c]
        wanted[c + 1 :] -= upper[c, c + 1 :, None].astype(np.float64) * missed


def test_what_does_not_fit_is_refused() -> None:
    ones = np.ones((2, 16), np.float32)
    good = {"targets": ones, "scales": ones[:1], "roots": ones[:1], "levels": np.ones(256, np.float32)}
    good |= {"bits": 2, "window": 8, "overlap": 4, "upper": np.eye(2, dtype=np.float32)}
    assert tqformat_kernels.encode(**good).shape == (2, 16)
    for name, wrong in (
        ("bits", 0),
        ("bits", 5),
        ("window", 7),
        ("window", 17),
        ("overlap", 0),
        ("targets", np.ones((2, 3), np.float32)),
        ("targets", np.ones((3, 16), np.float32)),
        ("targets", ones.astype(np.float64)),
        ("targets", np.ones((16, 2), np.float32).T),
        ("scales", ones[:1, :15].copy()),
        ("scales", np.ones((3, 16), np.float32)),
        ("roots", ones),
        ("levels", np.ones(255, np.float32)),
        ("upper", np.eye(3, dtype=np.float32)),
    ):
        with pytest.raises(ValueError):
            tqformat_kernels.encode(**(good | {name: wrong}))
