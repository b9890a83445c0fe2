"""Every form against the specification's sums in float64, in all settings that a stage can have.

The reference unpacks bit by bit, as SPEC.md writes it. Products are held to grade 18, |y' - y| <= 2^-18 A, where
[TQ-FUSE-2] asks binary32 for grade 14; decoded rows to one rounding, or to two where there is an offset.
"""

import ctypes
import functools
import gc
import math
import os
import subprocess
import sys
import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import tqformat_kernels
from tqformat_kernels import Levels, Stage, Transform, Weight

FORMS = list(tqformat_kernels.forms())


@dataclass
class Case:
    """A random stage: what `Stage` takes, and scale * level + offset in float64 [rows, cols]."""

    rows: int
    cols: int
    bits: int
    window: int | None = None
    tile: tuple[int, int] | None = None
    vector_length: int | None = None
    dimension: int = 1
    per_row: bool = False
    scale_dtype: str = "float32"
    offsets: bool = False
    outer: tuple[str, str] | None = None  # rows and columns of the outer ones: "1" or "rows", "1" or "n"
    entries: int | None = None
    levels: str | None = None  # "halves": float16 numbers, as a table of pairs wants; "computed": by the formula
    arguments: dict[str, Any] = field(default_factory=dict)

    def make(self, seed: int = 0) -> tuple[Stage, np.ndarray]:
        rng = np.random.default_rng(seed)
        window, (tr, tc) = self.window or self.bits, self.tile or (1, self.cols)
        g = self.vector_length or self.cols
        tiles, n = self.rows * self.cols // (tr * tc), tr * tc // self.dimension
        entries = self.entries or 2**window
        stream = rng.integers(0, 2, (tiles, n * self.bits), dtype=np.uint8)
        if self.entries:
            symbols = rng.integers(0, self.entries, (tiles, n))
            stream = ((symbols[..., None] >> np.arange(self.bits)) & 1).astype(np.uint8).reshape(tiles, -1)
        codes = np.packbits(stream, axis=1, bitorder="little")
        levels = rng.standard_normal((*([self.rows] if self.per_row else []), entries, self.dimension)).astype(
            np.float32
        )
        if self.levels == "halves":
            levels = levels.astype(np.float16).astype(np.float32)
        if self.levels == "computed":
            hashed = [s * 0x83DCD12D % 2**32 for s in range(entries)]
            levels[:] = [[(sum(h.to_bytes(4, "little")) - 510) / 128] for h in hashed]
        at = (np.arange(n)[:, None] * self.bits + np.arange(window)) % (n * self.bits)
        symbols = (stream[:, at].astype(np.int64) << np.arange(window)).sum(axis=2)  # [tiles, n]
        grid = symbols.reshape(self.rows // tr, self.cols // tc, tr, tc // self.dimension).transpose(0, 2, 1, 3)
        grid = grid.reshape(self.rows, self.cols // self.dimension)
        u = (levels[np.arange(self.rows)[:, None], grid] if self.per_row else levels[grid]).reshape(
            self.rows, self.cols
        )
        u = u.astype(np.float64)

        def factors() -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
            shape = (self.rows, self.cols // g)
            if self.scale_dtype in ("uint8", "int8"):
                inner = rng.integers(1, 127, shape).astype(self.scale_dtype)
            else:
                inner = (rng.random(shape) + 0.5).astype(self.scale_dtype) * np.where(rng.random(shape) < 0.2, -1, 1)
                inner = inner.astype(self.scale_dtype)
            full = inner.astype(np.float64)
            if not self.outer:
                return inner, None, full
            a, b = (self.rows if self.outer[0] == "rows" else 1), (shape[1] if self.outer[1] == "n" else 1)
            outer = (rng.random((a, b)) + 0.5).astype(np.float16)
            return inner, outer, full * np.repeat(outer, shape[1] // b, axis=1).astype(np.float64)

        scales, outer_scales, full = factors()
        u *= np.repeat(full, g, axis=1)
        self.arguments = {
            "shape": (self.rows, self.cols), "bits": self.bits, "window": self.window, "tile": self.tile,
            "vector_length": self.vector_length, "outer_scales": outer_scales,
        }  # fmt: skip
        if self.offsets:
            offsets, outer_offsets, full = factors()
            u += np.repeat(full, g, axis=1)
            self.arguments |= {"offsets": offsets, "outer_offsets": outer_offsets}
        return Stage(codes, levels, scales, **self.arguments), u


ROWS = [
    Case(5, 256, bits, vector_length=g, offsets=offsets)
    for bits in (1, 2, 3, 4, 5, 6, 7, 8)
    for g, offsets in ((None, False), (32, True))
]
ROWS += [Case(3, cols, bits) for cols in (8, 24, 72, 576, 1000) for bits in (1, 3, 4, 8)]
ROWS += [Case(3, 1, 8), Case(2, 7, 3), Case(4, 33, 5), Case(3, 576, 4, vector_length=96), Case(0, 64, 4)]
ROWS += [Case(6, 64, 4, tile=(3, 64)), Case(4, 24, 3, tile=(2, 24), vector_length=8), Case(5, 40, 2, entries=3)]
ROWS += [Case(3, 128, bits, vector_length=16, scale_dtype="float16") for bits in (4, 8)]
WINDOWS = {1: (1, 9), 2: (2, 12, 16), 3: (3, 12), 4: (4, 13), 5: (5, 16), 6: (6,), 7: (7,), 8: (8, 10)}
COLUMNS = [
    Case(2 * tr, 70, bits, window, (tr, 1), vector_length=g)
    for bits, windows in WINDOWS.items()
    for window in windows
    for tr, g in ((32, None), (96, 14), (88, None), (288, None))
]
COLUMNS += [Case(20, 33, 4, None, (20, 1)), Case(10, 16, 2, None, (5, 1)), Case(8, 130, 2, 12, (8, 1), offsets=True)]
COLUMNS += [
    Case(128, 20, 3, 16, (128, 1), vector_length=4, offsets=True, scale_dtype="float16"),
    Case(4, 9, 8, 8, (1, 1)),
]
COLUMNS += [
    Case(2 * tr, 35, bits, window, (tr, 1), vector_length=g, levels=levels, offsets=bool(g))
    for levels, settings in {
        "halves": ((1, 9), (1, 13), (2, 12), (3, 11), (4, 10), (5, 9)),
        "computed": ((1, 9), (1, 16), (2, 12), (2, 16), (3, 12), (3, 16), (4, 12), (4, 16), (5, 12)),
    }.items()
    for bits, window in settings
    for tr, g in ((32, None), (96, 7), (88, None), (264, None), (16, 5))
]
GENERAL = [
    Case(6, 48, bits, window, tile, vector_length=12, dimension=p, per_row=per_row)
    for p in (1, 2, 3, 4, 6)
    for bits, window in ((2, 2), (3, 7), (8, 8), (5, 16))
    for tile, per_row in ((None, False), ((3, 24), True), ((6, 12), False))
]
GENERAL += [Case(5, 64, 8, dimension=8), Case(5, 64, 16, dimension=8, offsets=True), Case(4, 30, 7, None, (2, 3))]
GENERAL += [
    Case(16, 16, 2, 12, (16, 16)),
    Case(12, 5, 5, 16, (12, 1)),
    Case(7, 24, 1, 16, (7, 24)),
    Case(2, 128, 16, dimension=64),
]
SCALES = [
    Case(6, 64, 4, tile=tile, vector_length=16, scale_dtype=dtype, outer=outer, offsets=True)
    for dtype in ("uint8", "int8", "float16")
    for outer in (("1", "1"), ("rows", "n"), ("rows", "1"))
    for tile in (None, (6, 1))
]
CASES = ROWS + COLUMNS + GENERAL + SCALES


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Any:
    before = tqformat_kernels.form()
    tqformat_kernels.set_form(request.param)
    yield request.param
    tqformat_kernels.set_form(before)


def assert_grade(y: np.ndarray, u: np.ndarray, z: np.ndarray, grade: int = 18) -> None:
    """|y' - y| <= 2^-grade A with the whole row as one block, so that A is as small as it can be [TQ-FUSE-2]."""
    bound = np.linalg.norm(z.astype(np.float64), axis=1)[:, None] * np.linalg.norm(u, axis=1)
    assert y.dtype == np.float32 and y.shape == bound.shape
    worst = np.abs(y - z.astype(np.float64) @ u.T) / (2.0**-grade * bound + 2.0**-126)
    assert worst.max(initial=0) <= 1


def name(case: Case) -> str:
    return "-".join(str(v) for k, v in vars(case).items() if k != "arguments" and v not in (None, False))


@pytest.mark.parametrize("case", CASES, ids=name)
def test_products_and_rows_are_those_of_the_specification(case: Case, form: str) -> None:
    stage, u = case.make()
    for batch in (1, 2, 3, 4, 9):
        z = np.random.default_rng(batch).standard_normal((batch, case.cols)).astype(np.float32)
        assert_grade(stage.product(z, threads=1 + batch % 2), u, z)
    index = [i * 7 % case.rows for i in range(5)] if case.rows else []
    begin, end = case.rows // 3, case.rows
    for decoded, exact in (
        (stage.decode(0, end), u),
        (stage.decode(begin, end), u[begin:]),
        (stage.rows(index), u[index]),
    ):
        assert decoded.dtype == np.float32 and decoded.shape == exact.shape
        if case.offsets or case.outer:  # products of up to three binary32 numbers and a sum of two
            assert np.abs(decoded - exact).max(initial=0) <= 2.0**-21 * 300
        else:
            assert np.array_equal(decoded, exact.astype(np.float32))


def test_the_settings_of_releases_take_a_vector_path(form: str) -> None:
    for case in (Case(4, 576, 4), Case(4, 576, 8), Case(4, 256, 4, vector_length=32), Case(288, 8, 2, 12, (288, 1))):
        assert case.make()[0].fast
    assert not Case(4, 48, 8, dimension=8).make()[0].fast


@pytest.mark.parametrize(
    "case", [Case(9, 128, 4), Case(256, 64, 2, 12, (64, 1)), Case(9, 64, 8, dimension=8)], ids=name
)
def test_threads_change_nothing(case: Case, form: str) -> None:
    stage, _ = case.make()
    z = np.random.default_rng(1).standard_normal((3, case.cols)).astype(np.float32)
    assert np.array_equal(stage.product(z, threads=1), stage.product(z, threads=5))
    assert np.array_equal(stage.decode(0, case.rows, threads=1), stage.decode(0, case.rows, threads=5))
    assert np.array_equal(stage.rows([3, 0, 3], threads=1), stage.rows([3, 0, 3], threads=3))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_makes_threads_of_its_own() -> None:
    code = """if True:
        import os, numpy as np, tqformat_kernels
        scales = np.ones((8, 1), np.float32)
        stage = tqformat_kernels.Stage(np.zeros((8, 32), np.uint8), np.ones(16), scales, shape=(8, 64), bits=4)
        z = np.ones((1, 64), np.float32)
        stage.product(z, threads=4)
        child = os.fork()
        if child == 0:
            os._exit(0 if stage.product(z, threads=4).tolist() == [[64.0] * 8] else 1)
        print(os.waitpid(child, 0)[1])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.returncode) == ("0", 0), done.stderr


def test_torch_tensors_are_taken_and_given() -> None:
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (6, 32), dtype=torch.uint8, generator=generator)
    levels, z = torch.randn(16, generator=generator), torch.randn(2, 64, generator=generator)
    symbols = torch.stack([codes & 15, codes >> 4], dim=2).reshape(6, 64).long()
    kinds = {
        torch.float32: None, torch.bfloat16: None, torch.float16: None, torch.int8: torch.bfloat16,
        torch.float8_e4m3fn: torch.float32, torch.float8_e8m0fnu: torch.float16,
    }  # fmt: skip
    for dtype, outer_dtype in kinds.items():
        scales = (torch.rand(6, 4, generator=generator) * 8).add(1).to(dtype)
        outer = None if outer_dtype is None else torch.rand(6, 2, generator=generator).to(outer_dtype)
        full = scales.double() if outer is None else scales.double() * outer.double().repeat_interleave(2, dim=1)
        stage = Stage(codes, levels, scales, shape=(6, 64), bits=4, vector_length=16, outer_scales=outer)
        u = levels[symbols].double() * full.repeat_interleave(16, dim=1)
        y = stage.product(z)
        assert isinstance(y, torch.Tensor)
        assert_grade(y.numpy(), u.numpy(), z.numpy())
        assert isinstance(stage.rows(torch.tensor([5, 0])), torch.Tensor)
    with pytest.raises(ValueError, match="contiguous"):
        stage.product(z.t().contiguous().t())


def test_stages_share_levels() -> None:
    arguments = {"shape": (32, 4), "bits": 2, "window": 12, "tile": (32, 1)}
    codes, scales = np.arange(32, dtype=np.uint8).reshape(4, 8), np.ones((32, 1), np.float32)
    table, z = np.linspace(-1, 1, 4096).astype(np.float16), np.ones((1, 4), np.float32)
    levels = Levels(table, 2, 12)
    stages = [Stage(codes, each, scales, **arguments) for each in (levels, levels, table)]
    assert stages[0].levels is stages[1].levels is levels
    assert levels.nbytes == 4 * 2**12 + 4 * 2**14, "one of float32, one of two float16 neighbours"
    assert np.array_equal(stages[0].product(z), stages[2].product(z))
    assert Levels(table.astype(np.float32) + 2**-20, 2, 12).nbytes == 4 * 2**12, "no pairs of what is not binary16"
    with pytest.raises(ValueError, match="made for bits 2 and window 12"):
        Stage(codes, levels, scales, **(arguments | {"window": 10}))


def test_a_product_uses_the_threads_of_torch() -> None:
    code = """if True:
        import pathlib, torch, tqformat_kernels, numpy as np
        gomp, maps = tqformat_kernels._gomp_parallel() is not None, pathlib.Path("/proc/self/maps")
        assert gomp or not maps.exists() or "libgomp" not in maps.read_text()
        stage = tqformat_kernels.Stage(np.zeros((512, 512), np.uint8), np.ones(16), np.ones((512, 1), np.float32),
                                       shape=(512, 1024), bits=4)
        y = stage.product(torch.ones(2, 1024), threads=3)
        assert y.tolist() == [[1024.0] * 512] * 2 and (tqformat_kernels._pool is None) == gomp
    """
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_every_byte_of_the_small_floats() -> None:
    torch = pytest.importorskip("torch")
    codes, levels, every = np.zeros((256, 1), np.uint8), np.ones(2, np.float32), torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu):
        scales = every.view(dtype)[:, None]
        stage = Stage(codes, levels, scales, shape=(256, 1), bits=1, outer_scales=torch.ones(1, 1))
        assert np.array_equal(stage.decode(0, 256), scales.float().numpy(), equal_nan=True)
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = halves[np.isfinite(halves)][:, None]
    stage = Stage(np.zeros((finite.size, 1), np.uint8), levels, finite, shape=(finite.size, 1), bits=1)
    assert np.array_equal(stage.decode(0, finite.size), finite.astype(np.float32))


def turned(x: np.ndarray, signs: list[int], matrices: list[np.ndarray]) -> np.ndarray:
    """T of each block, in float64 [TQ-TRAN-3]."""
    product = functools.reduce(np.kron, matrices, np.ones((1, 1)))
    return (x.reshape(-1, len(signs)) * signs @ product.T / np.sqrt(len(signs))).reshape(x.shape)


@pytest.mark.parametrize(
    "factors", [(2,), (4,), (8,), (28,), (20, 4), (24, 24), (12, 8, 16), (3, 2, 5), (36,), (32, 2), ()]
)
def test_linear_layers(factors: tuple[int, ...], form: str) -> None:
    """One and two stages, whose transforms differ or are the same, in all types of x; of grade 18 before y is rounded."""
    torch = pytest.importorskip("torch")
    rng, size = np.random.default_rng(len(factors)), math.prod(factors)
    signs = rng.choice([-1, 1], size).tolist()
    matrices = [
        np.linalg.qr(rng.standard_normal((f, f)))[0].astype(np.float32) * np.sqrt(np.float32(f)) for f in factors
    ]
    transform, cols = Transform(signs, matrices), 2 * size
    cases = [(Case(10, cols, 4).make(i), t) for i, t in enumerate((transform, transform, None))]
    for n, column_scale in ((1, None), (2, rng.random(cols)), (3, None)):
        stages, transforms = [stage for (stage, _), _ in cases[:n]], [t for _, t in cases[:n]]
        scale = None if column_scale is None else column_scale.astype((np.float32, np.float16)[n % 2])
        weight = Weight(stages, transforms, scale)
        for batch, threads in ((1, 1), (3, 2), (9, None)):
            x = rng.standard_normal((batch, cols)).astype(np.float32)
            for dtype, digits in ((torch.float32, 24), (torch.float16, 11), (torch.bfloat16, 8)):
                given = torch.from_numpy(x).to(dtype)
                exact = given.double().numpy() * (1 if scale is None else scale.astype(np.float64))
                y = np.zeros((batch, 10))
                bound = np.zeros((batch, 10))
                for (_, u), t in cases[:n]:
                    z = exact if t is None else turned(exact, signs, matrices)
                    y += z @ u.T
                    bound += np.linalg.norm(z, axis=1)[:, None] * np.linalg.norm(u, axis=1)
                got = weight.linear(given.reshape(batch, 1, cols), threads=threads)
                assert got.dtype == dtype and got.shape == (batch, 1, 10)
                most = 2.0**-18 * bound + 2.0**-digits * np.abs(y)
                assert (np.abs(got.reshape(batch, 10).double().numpy() - y) <= most).all()
        assert np.array_equal(weight.linear(x), weight.linear(torch.from_numpy(x)).numpy())


def test_every_half_comes_in_and_goes_out() -> None:
    torch = pytest.importorskip("torch")
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    one = np.zeros((1, 1), np.uint8), np.ones(2, np.float32)
    for dtype in (torch.float16, torch.bfloat16):
        x = halves.view(dtype)[:, None]
        for scale in (1.0, 1 / 3, 0.99951171875, 2.0**-12, 3 * 2.0**-13):
            stage = Stage(*one, np.full((1, 1), scale, np.float32), shape=(1, 1), bits=1)
            y, exact = Weight([stage], [None]).linear(x), (x.float() * torch.tensor(scale)).to(dtype)
            assert torch.equal(y.isnan(), exact.isnan()) and torch.equal(y.nan_to_num(0.5), exact.nan_to_num(0.5))


def test_weights_that_do_not_fit_are_refused() -> None:
    (stage, _), (other, _) = Case(3, 16, 4).make(), Case(3, 8, 4).make()
    eight = Transform([1] * 8, [np.eye(8)])
    weight = Weight([stage], [eight], np.ones(16, np.float32))
    assert weight.linear(np.zeros((0, 16), np.float32)).shape == (0, 3) and eight.nbytes == 4 * (8 + 8 * 16)
    for arguments in (
        ([stage, other], [None, None]),
        ([stage], [Transform([1] * 12, [np.eye(12)])]),
        ([stage], [Transform([1] * 8, [np.eye(4)])]),
        ([stage], [Transform([1] * 8, [np.eye(4), np.eye(4)])]),
        ([], []),
        ([stage, stage], [eight]),
        ([stage], [eight, None]),
        ([stage], [None], np.ones(15, np.float32)),
        ([stage], [None], np.ones(16, np.int8)),
    ):
        with pytest.raises(ValueError):
            Weight(*arguments)
    zero = np.zeros((), np.float32)
    for wrong in (zero, np.zeros((1, 15), np.float32), np.zeros((1, 16)), np.zeros((2, 32), np.float32)[:, ::2]):
        with pytest.raises(ValueError):
            weight.linear(wrong)
    for signs, matrices in (
        ([[1, 1], [1, 1]], [np.eye(4)]),
        ([1] * 16, [np.ones((4, 3)), np.ones((4, 5))]),
        ([1], [1]),
    ):
        with pytest.raises(ValueError, match="expected"):
            Transform(signs, matrices)


def test_threads_of_python_give_what_torchs_give(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, _ = Case(64, 96, 4).make()
    weight, x = Weight([stage], [None]), np.random.default_rng(0).standard_normal((3, 96)).astype(np.float32)
    wanted = weight.linear(x, threads=1)
    for address in (tqformat_kernels._python_address, tqformat_kernels._team()):
        monkeypatch.setattr(tqformat_kernels, "_team", lambda address=address: address)
        assert np.array_equal(weight.linear(x, threads=4), wanted)
        assert np.array_equal(stage.product(x, threads=4), wanted)


def test_what_the_team_leaves_undone_is_done() -> None:
    """Also where it calls more often than asked: here 0, 1 and 7 times."""
    stage, _ = Case(64, 96, 4).make()
    weight, x = (
        Weight([stage, stage], [None, None]),
        np.random.default_rng(0).standard_normal((3, 96)).astype(np.float32),
    )
    for times in (0, 1, 7):

        def parallel(work: int, data: int, threads: int, flags: int, times: int = times) -> None:
            for _ in range(times):
                tqformat_kernels._Work(work)(data)

        team = tqformat_kernels._Parallel(parallel)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tqformat_kernels, "_team", lambda team=team: ctypes.cast(team, ctypes.c_void_p).value)
            y, product = weight.linear(x, threads=4), stage.product(x, threads=4)
            weight.linear(-x, threads=4), stage.product(-x, threads=4)  # so that no memory holds what is right
        assert np.array_equal(y, weight.linear(x, threads=1)) and np.array_equal(product, stage.product(x, threads=1))


class Pool:
    """Of threads that begin too late: `submit` keeps what it is given, and raises an error in the end."""

    def __init__(self, error: type[BaseException], most: int) -> None:
        self.kept, self.error, self.most = [], error, most

    def submit(self, run: Any, *arguments: Any) -> Any:
        self.kept.append(functools.partial(run, *arguments))
        if len(self.kept) == self.most:
            raise self.error()
        return None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])  # no more threads; Ctrl-C
def test_threads_that_come_too_late_touch_nothing(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    stage, _ = Case(64, 96, 4).make()
    weight, x = Weight([stage], [None]), np.random.default_rng(0).standard_normal((3, 96)).astype(np.float32)
    wanted, pool, calls = weight.linear(x, threads=1), Pool(error, 2), []
    monkeypatch.setattr(tqformat_kernels, "_pool_of", lambda threads: pool)
    monkeypatch.setattr(tqformat_kernels, "_team", lambda: tqformat_kernels._python_address)
    for run in (weight.linear, stage.product):
        pool.kept.clear()
        if error is RuntimeError:
            assert np.array_equal(run(x, threads=4), wanted)
        else:
            with pytest.raises(KeyboardInterrupt):
                run(x, threads=4)
        assert len(pool.kept) == 2
    pool.kept.clear()
    work = tqformat_kernels._Work(calls.append)
    tqformat_kernels._threads_of_python(ctypes.cast(work, ctypes.c_void_p).value, 8, 4, 0)
    assert isinstance(tqformat_kernels._interrupt.error, KeyboardInterrupt) == (error is KeyboardInterrupt)
    tqformat_kernels._interrupt.error = None
    before = len(calls)
    for late in pool.kept:
        late()
    assert len(calls) == before <= 1, "the memory that data points to may be gone"


def test_rows_that_come_too_late_have_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt ends the wait for other threads, which go on writing."""
    made, new, pool = [], tqformat_kernels._new, Pool(KeyboardInterrupt, 2)

    def remembered(shape: tuple[int, ...], like: np.ndarray) -> np.ndarray:
        array = new(shape, like)
        made.append(weakref.ref(array))
        return array

    monkeypatch.setattr(tqformat_kernels, "_new", remembered)
    monkeypatch.setattr(tqformat_kernels, "_pool_of", lambda threads: pool)
    for run in (lambda stage: stage.decode(0, 6, threads=3), lambda stage: stage.rows([0, 1, 2, 3], threads=4)):
        with pytest.raises(KeyboardInterrupt):
            run(Case(6, 24, 4).make()[0])
        gc.collect()
        assert made[-1]() is not None
        for late in pool.kept:
            assert late() == 0
        pool.kept.clear()
        late = None
        assert made[-1]() is None


def test_arrays_may_begin_at_any_byte(form: str) -> None:
    """Codes and factors, that is, as a file may have them; not z."""
    for case in (Case(4, 96, 3, vector_length=24, offsets=True), Case(64, 16, 2, 12, (64, 1), scale_dtype="float16")):
        stage, _ = case.make()
        codes, scales, _, offsets, _ = (None if a is None else at_odd_byte(a) for a in stage._kept)
        arguments = case.arguments | ({"offsets": offsets} if case.offsets else {})
        moved = Stage(codes, stage.levels, scales, **arguments)
        for batch in (1, 9):
            z = np.random.default_rng(batch).standard_normal((batch, case.cols)).astype(np.float32)
            assert np.array_equal(moved.product(z), stage.product(z))
            layer = Weight([moved], [None], at_odd_byte(np.ones(case.cols, np.float16)))
            assert np.array_equal(layer.linear(at_odd_byte(z)), stage.product(z))
            with pytest.raises(ValueError, match="multiples of 4 bytes"):
                moved.product(at_odd_byte(z))
        assert np.array_equal(moved.decode(0, case.rows), stage.decode(0, case.rows))
        assert np.array_equal(moved.rows([1, 0]), stage.rows([1, 0]))


def at_odd_byte(array: np.ndarray) -> np.ndarray:
    room = np.zeros(array.nbytes + 2, np.uint8)
    begin = 1 if room.ctypes.data % 2 == 0 else 2
    moved = room[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    moved[...] = array
    assert moved.ctypes.data % 2
    return moved


def test_what_does_not_fit_is_refused() -> None:
    case = Case(4, 32, 4, vector_length=8)
    case.make()
    codes, levels, scales = np.zeros((4, 16), np.uint8), np.zeros(16, np.float32), np.ones((4, 4), np.float32)
    good = {"shape": (4, 32), "bits": 4, "vector_length": 8}
    z = np.zeros((1, 32), np.float32)
    assert Stage(codes, levels, scales, **good).product(z).tolist() == [[0, 0, 0, 0]]
    for arrays, change in (
        ((codes[:3], levels, scales), {}),
        ((codes[:, :15].copy(), levels, scales), {}),
        ((codes[:, ::2], levels, scales), {}),
        ((codes.astype(np.int8), levels, scales), {}),
        ((codes, np.zeros(17, np.float32), scales), {}),
        ((codes, np.zeros((4, 4, 4), np.float32), scales), {}),
        ((codes, np.full(16, np.inf), scales), {}),
        ((codes, levels, scales[:2]), {}),
        ((codes, levels, scales.astype(np.uint8)), {}),
        ((codes, levels, scales), {"bits": 3}),
        ((codes, levels, scales), {"bits": 0}),
        ((codes, levels, scales), {"bits": 9}),
        ((codes, levels, scales), {"window": 17}),
        ((codes, levels, scales), {"shape": (4, 33)}),
        ((codes, levels, scales), {"shape": (-4, 32)}),
        ((codes, levels, scales), {"shape": (2**53, 2**20)}),
        ((codes, levels, scales), {"vector_length": 5}),
        ((codes, levels, scales), {"vector_length": 0}),
        ((codes, levels, scales), {"tile": (3, 32)}),
        ((codes, levels, scales), {"tile": (1, 0)}),
        ((codes, levels, scales), {"outer_scales": np.ones((3, 1), np.float32)}),
        ((codes, levels, scales), {"outer_scales": np.ones((1, 3), np.float32)}),
        ((codes, levels, scales), {"outer_offsets": np.ones((1, 1), np.float32)}),
        ((codes, levels, scales), {"offsets": np.ones((4, 3), np.float32)}),
    ):
        with pytest.raises(ValueError):
            Stage(*arrays, **(good | change))
    stage = Stage(codes, levels, scales, **good)
    for wrong in (np.zeros((1, 31), np.float32), np.zeros(32, np.float32), np.zeros((1, 32))):
        with pytest.raises(ValueError):
            stage.product(wrong)
    for index in ([4], [-1], [0, 2**40]):
        with pytest.raises(IndexError):
            stage.rows(index)
    with pytest.raises(ValueError):
        stage.decode(0, 5)
    with pytest.raises(ValueError, match="this processor can run"):
        tqformat_kernels.set_form("mmx")


@pytest.mark.parametrize("name", FORMS)
def test_the_environment_chooses_the_form(name: str) -> None:
    code = "import tqformat_kernels; print(tqformat_kernels.form())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TQFORMAT_KERNELS_FORM": name}, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.returncode) == (name, 0)
