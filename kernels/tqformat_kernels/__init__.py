"""Products with tqformat weights that stay packed, on CPUs: C functions behind a small interface.

`Stage` holds the arrays of one stage of a weight, and multiplies with them or decodes rows; `Weight` is the sum of stages
with their transforms, and computes a linear layer. README.md shows their use,
src/tqformat_kernels.h is the C interface, SPEC.md (sections 6 to 10 and 22) says what is computed.
"""

import contextlib
import ctypes
import functools
import itertools
import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

__version__ = "1.0.0"
__all__ = ["Levels", "Stage", "Transform", "Weight", "encode", "form", "forms", "set_form"]

ABI = 4
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "uint8": 3, "int8": 4, "float8_e4m3fn": 5, "float8_e8m0fnu": 6}
SIZES = (4, 2, 2, 1, 1, 1, 1)
FLOATS = ("float32", "float16", "bfloat16")
ROOM = 16  # TQ_ROOM: rows of matrices are filled up to a multiple of it
ENOUGH = 1 << 19  # weights that make a thread of Python worth waking: about 25 microseconds of work
ENOUGH_FOR_TEAM = 1 << 17  # the same for the threads of OpenMP, which wait awake
MULTIPLIER, MIDDLE = 0x83DCD12D, 510  # of computed levels

Array = Any  # a contiguous CPU tensor of torch, or an array of numpy


class _Factors(ctypes.Structure):  # tq_factors
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("outer", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("outer_bytes", ctypes.c_int64),
        ("outer_rows", ctypes.c_int64),
        ("outer_cols", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("outer_dtype", ctypes.c_int32),
    )


class _Stage(ctypes.Structure):  # tq_stage
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("levels", ctypes.c_void_p),
        ("pairs", ctypes.c_void_p),
        ("codes_bytes", ctypes.c_int64),
        ("levels_count", ctypes.c_int64),
        ("pairs_count", ctypes.c_int64),
        ("scales", _Factors),
        ("offsets", _Factors),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("vector_length", ctypes.c_int64),
        ("tile_rows", ctypes.c_int64),
        ("tile_cols", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("dimension", ctypes.c_int32),
        ("levels_per_row", ctypes.c_int32),
        ("computed", ctypes.c_float),
        ("unused", ctypes.c_int32),
    )


class _Transform(ctypes.Structure):  # tq_transform
    _fields_ = (
        ("signs", ctypes.c_void_p),
        ("matrices", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
        ("matrices_count", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("count", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


class _Weight(ctypes.Structure):  # tq_weight
    _fields_ = (
        ("stages", ctypes.POINTER(ctypes.POINTER(_Stage))),
        ("transforms", ctypes.POINTER(ctypes.POINTER(_Transform))),
        ("column_scale", ctypes.c_void_p),
        ("column_scale_bytes", ctypes.c_int64),
        ("column_scale_dtype", ctypes.c_int32),
        ("count", ctypes.c_int32),
    )


class _Search(ctypes.Structure):  # tq_search
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("targets", "scales", "roots", "upper", "levels", "symbols")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "groups", "overlap")),
        ("bits", ctypes.c_int32),
        ("window", ctypes.c_int32),
    )


_Work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Parallel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)  # tq_parallel


def _open() -> ctypes.CDLL:
    """The compiled library, with the types of its functions."""
    if sys.byteorder != "little":
        raise ImportError("tqformat_kernels needs a little-endian processor")
    library = ctypes.CDLL(str(Path(__file__).with_name("_library.so")))
    stage, floats, i32, i64 = ctypes.POINTER(_Stage), ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    for name, result, arguments in (
        ("tq_abi", i32, []),
        ("tq_form_name", ctypes.c_char_p, [i32]),
        ("tq_check", i32, [stage]),
        ("tq_is_fast", i32, [stage, i32]),
        ("tq_product_parallel", i32, [stage, floats, i64, floats, i64, i64, i64, i64, i32, i32, ctypes.c_void_p]),
        ("tq_check_weight", i32, [ctypes.POINTER(_Weight)]),
        ("tq_linear", i32, [ctypes.c_void_p, floats, i32, i64, floats, i32, i64, i64, i32, i32, ctypes.c_void_p]),
        ("tq_decode", i32, [stage, floats, i64, i64, i64, i32]),
        ("tq_encode", i32, [ctypes.POINTER(_Search), i32]),
        ("tq_rows", i32, [stage, floats, i64, ctypes.c_void_p, i64, i32]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    if library.tq_abi() != ABI:
        raise ImportError(
            f"the compiled library of tqformat_kernels has ABI {library.tq_abi()}, not {ABI}: reinstall it"
        )
    return library


_library = _open()
_form = 0


def forms() -> dict[str, int]:
    """The forms that this processor can run, the best last: name -> number in the C interface."""
    names = ((i, _library.tq_form_name(i)) for i in range(8))
    return {name.decode(): i for i, name in names if name is not None}


def form() -> str:
    """The name of the form in use."""
    return {i: name for name, i in forms().items()}[_form]


def set_form(name: str) -> None:
    """Uses another form from now on, in the whole process. ValueError names those that this processor can run."""
    global _form
    if name not in forms():
        raise ValueError(f"form {name!r}: this processor can run {', '.join(forms())}")
    _form = forms()[name]


set_form(os.environ.get("TQFORMAT_KERNELS_FORM") or list(forms())[-1])


def _is_torch(array: Array) -> bool:
    return type(array).__module__.partition(".")[0] == "torch" or hasattr(array, "data_ptr")


@functools.cache
def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(array: Array) -> str:
    return _name(array.dtype)


def _pointer(array: Array, what: str, *dtypes: str) -> int:
    """The address of a contiguous CPU array of one of these dtypes; ValueError for anything else."""
    if _dtype(array) not in dtypes:
        raise ValueError(f"{what}: expected {' or '.join(dtypes)}, got {_dtype(array)}")
    if _is_torch(array):
        if not (array.is_cpu and array.is_contiguous()):
            raise ValueError(f"{what}: expected a contiguous tensor on the CPU")
        return int(array.data_ptr())
    if not array.flags.c_contiguous or not array.dtype.isnative:
        raise ValueError(f"{what}: expected a contiguous array in native byte order")
    return int(array.ctypes.data)


def _new(shape: tuple[int, ...], like: Array) -> Array:
    """An uninitialised float32 array of the library that `like` came from."""
    if _is_torch(like):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=torch.float32)
    return np.empty(shape, dtype=np.float32)


def _count(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= int(size)
    return product


def default_threads() -> int:
    """torch's number of threads where torch is loaded, else the number of processors."""
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else os.cpu_count() or 1


class _Interrupt(threading.local):
    error: BaseException | None = None  # that came while C code called back


_interrupt = _Interrupt()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_forked = False


def _forget_pool() -> None:
    """A forked process has none of its parent's threads, and GNU's OpenMP would wait for them."""
    global _pool, _forked
    _pool, _forked = None, True


@functools.cache
def _gomp_parallel() -> int | None:
    """The address of GOMP_parallel in the OpenMP of torch, where that has it.

    It is found as the linker finds it for torch: first among what the whole process sees, where an OpenMP that was
    preloaded stands, then among the libraries that torch itself needs (wheels for aarch64 show theirs to nobody else).
    """
    for path in (None, getattr(getattr(sys.modules.get("torch"), "_C", None), "__file__", None)):
        with contextlib.suppress(AttributeError, OSError, TypeError):
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
    return None


def _threads_of_python(work: int, data: int, threads: int, flags: int) -> None:
    """tq_parallel: work(data) in up to so many threads of Python, of which this is one.

    `data` ends with this call. So it must not end before all that began have ended, whatever interrupts it, and what
    the pool begins later (it keeps work even where it says that it cannot start a thread) must not touch `data`.
    An exception cannot pass through C: `_raise` does it afterwards. Plain locks, which an interrupt cannot leave locked.
    """
    run, gate, closed = _Work(work), threading.Lock(), False
    begun: list[threading.Lock] = []  # of each thread that does some of the work, locked while it does

    def help_out() -> None:
        busy = threading.Lock()
        with busy:
            with gate:
                if closed:
                    return
                begun.append(busy)
            run(data)

    try:
        with contextlib.suppress(RuntimeError):  # no more threads: those that there are do all of the work
            for _ in range(threads - 1):
                _pool_of(threads - 1).submit(help_out)
        run(data)
    except BaseException as error:  # Ctrl-C
        _interrupt.error = error
    while True:
        try:
            with gate:
                closed = True
            for busy in begun:
                with busy:
                    pass
            return
        except BaseException as error:
            _interrupt.error = error


_python_parallel = _Parallel(_threads_of_python)
_python_address = ctypes.cast(_python_parallel, ctypes.c_void_p).value


def _team() -> int | None:
    """The address of what divides a product among the threads of torch, or of Python where these cannot be had.

    Python's would share the processors with torch's, which keep them busy for a while after each operation.
    """
    return (_gomp_parallel() if "torch" in sys.modules and not _forked else None) or _python_address


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _pool_of(threads: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    if _pool is None or _pool_size < threads:
        _pool, _pool_size = ThreadPoolExecutor(threads, "tqformat-kernels"), threads
    return _pool


def _in_parts(run: Callable[[int, int], Any], begin: int, end: int, step: int, threads: int) -> None:
    """run(begin, end) on as many equal parts as threads, at multiples of step; raises for the first error number."""
    steps = -(-(end - begin) // step)
    threads = max(1, min(threads, steps))
    borders = [min(begin + steps * i // threads * step, end) for i in range(threads + 1)]
    if threads == 1:
        errors = [run(begin, end)]
    else:
        others = [_pool_of(threads - 1).submit(run, *part) for part in itertools.pairwise(borders[1:])]
        errors = [run(*borders[:2]), *(other.result() for other in others)]
    for error in errors:
        _raise(error)


def _raise(error: int) -> None:
    interrupt, _interrupt.error = _interrupt.error, None
    if interrupt is not None:
        raise interrupt
    if error == 3:
        raise MemoryError("tqformat_kernels: no memory for scratch space")
    if error:
        raise ValueError(f"tqformat_kernels: the library refused its arguments ({error})")


class Levels:
    """The levels of a codebook as the C code reads them. Stages with the same codebook, bits and window can share them.

    levels         float [entries, p] (or [entries]), or [rows, entries, p] for a codebook per row; finite; copied
    bits, window   of the stages

    They are kept as float32, filled up with zeros to 2^window entries, so that no symbol points outside. For a trellis of
    binary16 levels with window + bits up to 14 there is a table of neighbours, too; levels that can be computed need
    none: that of symbol s is the sum of the four bytes of s * 0x83DCD12D mod 2^32, less 510, times a power of two.
    """

    def __init__(self, levels: Array, bits: int, window: int | None = None) -> None:
        window = bits if window is None else window
        if not 1 <= bits <= window <= 16:
            raise ValueError(f"bits {bits}, window {window}: outside SPEC.md's limits")
        self.bits, self.window = bits, window
        self._full, self.dimension = _full_levels(levels, window)
        one = self._full[:, 0] if self._full.ndim == 2 and self.dimension == 1 and window > bits else None
        self._unit = 0.0 if one is None else _unit(one, window)
        self._pairs: Any = None
        if one is not None and not self._unit and window + bits <= 14:
            half = one.astype(np.float16) if np.abs(one).max() <= 65504 else one
            if np.array_equal(half, one):
                pair = np.arange(1 << window + bits)
                self._pairs = np.stack([half[pair & (1 << window) - 1], half[pair >> bits]], axis=1).astype(np.float16)

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return int(self._full.nbytes) + (0 if self._pairs is None else int(self._pairs.nbytes))


def _unit(levels: Any, window: int) -> float:
    """The power of two, at most 1, that these levels [2^window] are computed with; 0 for others."""
    unit = float(levels[0]) / -MIDDLE
    if not 0 < unit <= 1 or math.frexp(unit)[0] != 0.5:
        return 0.0
    hashed = (np.arange(1 << window, dtype=np.uint64) * MULTIPLIER).astype("<u4")
    computed = (hashed.view(np.uint8).reshape(-1, 4).sum(axis=1, dtype=np.int64) - MIDDLE) * unit
    return unit if np.array_equal(levels, computed) else 0.0


class Stage:
    """One stage of a quantized weight [rows, cols], packed [TQ-STAGE-1].

    codes          uint8 [rows * cols / (tr * tc), tile_bytes]
    levels         Levels, or an array of which they are made here
    scales         [rows, cols / vector_length], float32, float16 or bfloat16; with outer_scales uint8, int8, float8_e4m3fn
                   or float8_e8m0fnu too
    shape          (rows, cols)
    bits, window, vector_length, tile, outer_scales, offsets, outer_offsets    as in the manifest, with its defaults

    Arrays are contiguous and on the CPU. What does not fit is a ValueError. A code that names no entry reads a level of 0:
    a reader of files refuses it earlier [TQ-BOOK-4].
    """

    Levels = Levels

    def __init__(
        self,
        codes: Array,
        levels: Array | Levels,
        scales: Array,
        *,
        shape: Sequence[int],
        bits: int,
        window: int | None = None,
        vector_length: int | None = None,
        tile: Sequence[int] | None = None,
        outer_scales: Array | None = None,
        offsets: Array | None = None,
        outer_offsets: Array | None = None,
    ) -> None:
        rows, cols = (int(size) for size in shape)
        window = bits if window is None else window
        tile_rows, tile_cols = (1, cols) if tile is None else tile
        self.shape = rows, cols
        if not (1 <= bits <= window <= 16 and 0 <= rows <= 2**53 and 1 <= cols <= 2**20 and tile_rows >= 1):
            raise ValueError(
                f"bits {bits}, window {window}, shape {tuple(shape)}, tile {tile}: outside SPEC.md's limits"
            )
        self.levels = levels if isinstance(levels, Levels) else Levels(levels, bits, window)
        if (self.levels.bits, self.levels.window) != (bits, window):
            raise ValueError(f"levels: made for bits {self.levels.bits} and window {self.levels.window}")
        full, pairs = self.levels._full, self.levels._pairs
        stage = _Stage(
            codes=_pointer(codes, "codes", "uint8"),
            levels=full.ctypes.data,
            pairs=None if pairs is None else pairs.ctypes.data,
            pairs_count=0 if pairs is None else pairs.size,
            computed=self.levels._unit,
            codes_bytes=_count(codes.shape),
            levels_count=full.size,
            scales=_factors(scales, outer_scales, "scales"),
            rows=rows,
            cols=cols,
            vector_length=cols if vector_length is None else vector_length,
            tile_rows=tile_rows,
            tile_cols=tile_cols,
            bits=bits,
            window=window,
            dimension=self.levels.dimension,
            levels_per_row=full.ndim == 3,
        )
        if offsets is not None:
            stage.offsets = _factors(offsets, outer_offsets, "offsets")
        elif outer_offsets is not None:
            raise ValueError("outer_offsets without offsets")
        if _library.tq_check(ctypes.byref(stage)):
            raise ValueError(
                f"bits {bits}, window {window}, vector_length {vector_length}, tile {tile}, shape {self.shape}: codes"
                f" {tuple(codes.shape)}, levels {full.shape}, scales {tuple(scales.shape)} or what goes with them"
                " do not fit (SPEC.md, sections 6 to 9)"
            )
        self._stage = stage
        self._kept = (codes, scales, outer_scales, offsets, outer_offsets)  # the C code reads their memory

    @property
    def fast(self) -> bool:
        """Whether products take a vector path in the form in use; if not they are right, and slow."""
        return bool(_library.tq_is_fast(ctypes.byref(self._stage), _form))

    def product(self, z: Array, threads: int | None = None) -> Array:
        """y[b, r] = sum over c of (scale * level + offset)[r, c] * z[b, c], summed in binary32 [TQ-FUSE-1].

        z is float32 [batch, cols], already transformed; y is float32 [batch, rows].
        """
        rows, cols = self.shape
        if z.ndim != 2 or z.shape[1] != cols:
            raise ValueError(f"z: expected [batch, {cols}], got {tuple(z.shape)}")
        address, batch = _pointer(z, "z", "float32"), int(z.shape[0])
        if address % 4:
            raise ValueError("z: expected floats at multiples of 4 bytes")
        y = _new((batch, rows), z)
        target, many = _pointer(y, "y", "float32"), threads or _threads_for(rows * cols)
        counts = (batch * cols, target, batch * rows, batch, 0, rows)
        _raise(_library.tq_product_parallel(self._stage, address, *counts, _form, many, _team()))
        return y

    def decode(self, begin: int, end: int, threads: int | None = None) -> Array:
        """scale * level + offset of rows begin to end - 1, before T^-1: float32 [end - begin, cols]."""
        rows, cols = self.shape
        if not 0 <= begin <= end <= rows:
            raise ValueError(f"rows {begin} to {end} of {rows}")
        out = _new((end - begin, cols), self._kept[0])
        target, stage, number = _pointer(out, "out", "float32"), ctypes.byref(self._stage), _form

        def run(first: int, last: int, kept: Any = (self, out)) -> Any:  # after an interrupt, too, parts are written
            to = target + (first - begin) * cols * 4
            return _library.tq_decode(stage, to, (last - first) * cols, first, last, number)

        tile_rows = self._stage.tile_rows
        _in_parts(run, begin, end, tile_rows if begin % tile_rows == 0 else 1, self._threads(threads, end - begin))
        return out

    def rows(self, index: Sequence[int] | Array, threads: int | None = None) -> Array:
        """scale * level + offset of these rows, before T^-1: float32 [len(index), cols]; IndexError for one out of range."""
        cols = self.shape[1]
        values: Any = index.tolist() if hasattr(index, "tolist") else index
        wanted = np.array(values, dtype=np.int64)  # a copy, checked here and in C
        if wanted.ndim != 1:
            raise ValueError(f"index: expected one dimension, got {wanted.ndim}")
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.shape[0]):
            raise IndexError(f"row {wanted.min()} or {wanted.max()} of {self.shape[0]}")
        out = _new((wanted.size, cols), self._kept[0])
        target, stage, number = _pointer(out, "out", "float32"), ctypes.byref(self._stage), _form
        source = wanted.ctypes.data

        def run(begin: int, end: int, kept: Any = (self, out, wanted)) -> Any:  # as in decode
            n = end - begin
            return _library.tq_rows(stage, target + begin * cols * 4, n * cols, source + begin * 8, n, number)

        _in_parts(run, 0, wanted.size, 1, self._threads(threads, wanted.size))
        return out

    def _threads(self, threads: int | None, rows: int) -> int:
        return max(1, min(default_threads(), rows * self.shape[1] // ENOUGH)) if threads is None else threads


def _threads_for(weights: int) -> int:
    """A team is always of as many threads: OpenMP ends those that a smaller one does without."""
    return default_threads() if weights >= ENOUGH_FOR_TEAM else 1


class Transform:
    """The transform T of the kind hadamard, y -> (H_1 (x) H_2 (x) ...) (signs * y) / sqrt(B) [TQ-TRAN-3]. Weights can share it.

    signs       [B], 1 and -1; copied
    matrices    H_1, H_2, ..., each [f, f]; the product of all f is B; copied
    """

    def __init__(self, signs: Array, matrices: Sequence[Array]) -> None:
        self._signs, square = np.array(signs, dtype=np.float32), [np.array(h, np.float32) for h in matrices]
        if self._signs.ndim != 1 or any(h.ndim != 2 or len(h) != h.shape[1] for h in square):
            raise ValueError(
                f"signs {self._signs.shape}, matrices {[h.shape for h in square]}: expected [B], each [f, f]"
            )
        self._signs /= np.float32(math.sqrt(len(signs)))
        self._factors = np.array([len(h) for h in square], dtype=np.int32)
        padded = [np.pad(h.T, ((0, 0), (0, -len(h) % ROOM))) for h in square]
        self._matrices = np.concatenate([h.ravel() for h in padded]) if padded else np.zeros(0, np.float32)
        self._transform = _Transform(
            signs=self._signs.ctypes.data,
            matrices=self._matrices.ctypes.data,
            factors=self._factors.ctypes.data,
            matrices_count=self._matrices.size,
            size=self._signs.size,
            count=len(self._factors),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return int(self._signs.nbytes + self._matrices.nbytes)


class Weight:
    """A quantized weight [rows, cols]: the sum of stages, each with its transform, times a scale of columns [TQ-STAGE-2].

    stages          Stages of one shape
    transforms      of each stage, a Transform or None
    column_scale    None or [cols], float32, float16 or bfloat16; not copied
    """

    def __init__(
        self, stages: Sequence[Stage], transforms: Sequence[Transform | None], column_scale: Array | None = None
    ) -> None:
        if not stages or len(stages) != len(transforms):
            raise ValueError(f"{len(stages)} stages, {len(transforms)} transforms: expected as many, and at least one")
        self.shape = stages[0].shape
        self._kept = tuple(stages), tuple(transforms), column_scale
        n = len(stages)
        self._stages = (ctypes.POINTER(_Stage) * n)(*(ctypes.pointer(stage._stage) for stage in stages))
        self._transforms = (ctypes.POINTER(_Transform) * n)(
            *(None if t is None else ctypes.pointer(t._transform) for t in transforms)
        )
        weight = _Weight(stages=self._stages, transforms=self._transforms, count=n)
        if column_scale is not None:
            weight.column_scale = _pointer(column_scale, "column_scale", *FLOATS)
            weight.column_scale_dtype = DTYPES[_dtype(column_scale)]
            weight.column_scale_bytes = _count(column_scale.shape) * SIZES[weight.column_scale_dtype]
        if _library.tq_check_weight(ctypes.byref(weight)):
            raise ValueError(
                f"stages, transforms and column_scale do not fit {self.shape} (SPEC.md, sections 9 and 12)"
            )
        self._weight, self._address = weight, ctypes.addressof(weight)

    def linear(self, x: Array, threads: int | None = None) -> Array:
        """y = W x: [..., cols] -> [..., rows], of the dtype of x: float32, float16 or bfloat16 (of torch); computed in binary32.

        Made for few rows: each is one of z = T(column_scale * x), which is multiplied with the codes [TQ-FUSE-1].
        """
        rows, cols = self.shape
        shape = (*x.shape[:-1], rows)
        if tuple(x.shape[-1:]) != (cols,):
            raise ValueError(f"x: expected [..., {cols}], got {tuple(x.shape)}")
        source, number, batch = _pointer(x, "x", *FLOATS), DTYPES[_dtype(x)], _count(shape[:-1])
        if _is_torch(x):
            y = x.new_empty(shape)
            target = y.data_ptr()
        else:
            y = np.empty(shape, x.dtype)
            target = y.ctypes.data
        many = threads or _threads_for(rows * cols)
        sizes = (number, batch * cols, target, number, batch * rows, batch, _form, many)
        _raise(_library.tq_linear(self._address, source, *sizes, _team()))
        return y


def _full_levels(levels: Array, window: int) -> tuple[Any, int]:
    """Levels as float32 [.., 2^window, p], filled up with zeros, and p; ValueError unless they are finite and that many."""
    if _is_torch(levels):
        levels = levels.detach().float().cpu().numpy()
    book = np.asarray(levels, dtype=np.float32)
    book = book[:, None] if book.ndim == 1 else book
    if book.ndim not in (2, 3) or not 1 <= book.shape[-2] <= 1 << window:
        raise ValueError(
            f"levels: expected [entries, p] or [rows, entries, p], entries at most {1 << window}, got {book.shape}"
        )
    if not np.isfinite(book).all():
        raise ValueError("levels: not all finite")
    full = np.zeros((*book.shape[:-2], 1 << window, book.shape[-1]), dtype=np.float32)
    full[..., : book.shape[-2], :] = book
    return full, int(book.shape[-1])


def _factors(data: Array, outer: Array | None, what: str) -> _Factors:
    factors = _Factors(
        data=_pointer(data, what, *(FLOATS if outer is None else DTYPES)),
        dtype=DTYPES[_dtype(data)],
        bytes=_count(data.shape) * SIZES[DTYPES[_dtype(data)]],
    )
    if outer is not None:
        if outer.ndim != 2:
            raise ValueError(f"outer_{what}: expected two dimensions, got {outer.ndim}")
        factors.outer = _pointer(outer, f"outer_{what}", *FLOATS)
        factors.outer_dtype = DTYPES[_dtype(outer)]
        factors.outer_rows, factors.outer_cols = (int(size) for size in outer.shape)
        factors.outer_bytes = _count(outer.shape) * SIZES[DTYPES[_dtype(outer)]]
    return factors


def encode(
    targets: Array,
    scales: Array,
    roots: Array,
    levels: Array,
    bits: int,
    window: int,
    overlap: int,
    upper: Array | None = None,
) -> Any:
    """The trellis symbols whose levels are nearest to `targets`, each column a tail-biting tile: uint16 NumPy array [cols, rows].

    targets        [cols, rows]: levels times scales are to come near to them; with `upper` changed
    scales, roots  [groups, rows], groups a divisor of cols; the squares of roots say what an error in units of a scale counts
    levels         [2^window]; bits from 1 to 8, window from bits + 4 to 16
    overlap        symbols on either side of a tile's begin by which the state there is found
    upper          [cols, cols], upper triangular: what column c misses, times upper[c, j] / upper[c, c], is taken off each
                   column j behind it (GPTQ, arXiv:2210.17323, algorithm 1); None: no feedback

    All arrays are float32 and contiguous. One thread; Python's lock is released. ValueError for what does not fit.
    """
    cols, rows = (int(size) for size in targets.shape)
    groups = int(scales.shape[0])
    wanted = {"scales": (groups, rows), "roots": (groups, rows), "levels": (1 << window,), "upper": (cols, cols)}
    given = {"scales": scales, "roots": roots, "levels": levels} | ({} if upper is None else {"upper": upper})
    for name, array in given.items():
        if tuple(array.shape) != wanted[name]:
            raise ValueError(f"{name}: expected {list(wanted[name])}, got {list(array.shape)}")
    symbols = np.empty((cols, rows), np.uint16)
    if not cols:
        return symbols
    search = _Search(
        targets=_pointer(targets, "targets", "float32"),
        symbols=symbols.ctypes.data,
        **{name: _pointer(array, name, "float32") for name, array in given.items()},
        rows=rows,
        cols=cols,
        groups=groups,
        overlap=overlap,
        bits=bits,
        window=window,
    )
    _raise(_library.tq_encode(ctypes.byref(search), _form))
    return symbols
