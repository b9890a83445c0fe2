"""Level L2, data: codes, levels, transforms and scales (SPEC.md sections 6 to 9). Payload is read in bounded chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conformance import oracle
from conformance.check import check
from conformance.checks_binding import STORED
from conformance.checks_structure import SHAPED
from conformance.container import DTYPES, Stored
from conformance.findings import Finding, NotReachedError, brief, join
from conformance.formulas import byte_sum, lloyd_max_sphere, seed_signs
from conformance.subject import BYTES, Stage, Subject

# tensors are there, once, with the right dtype and shape
BOUND = (
    *STORED,
    *SHAPED,
    "schema.",
    "bind.missing_tensor",
    "bind.multiple",
    "bind.rounds",
    "bind.outer",
    "bind.dtype",
    "bind.shape",
)
PACKED = (*BOUND, "pack.length")
MAX_CONSTRUCTIONS = 4096  # of Lloyd-Max levels; a limit of this judge

Words = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.uint32]

# 6 Codes


@check("pack.length", "L2", "PACK.LENGTH", "TQ-CODE-4", "Pack the codes again, tile by tile.", needs=BOUND)
def pack_length(repo: Subject) -> Iterator[Finding]:
    for stage in repo.stages:
        stored, wanted = repo.payload[stage.codes], (stage.tiles, stage.tile_bytes)
        if stored.shape != wanted:
            message = f"expected codes of shape {list(wanted)}, found {list(stored.shape)}"
            yield Finding(message, stage.pointer + "/codes")


@check("pack.padding", "L2", "PACK.PADDING", "TQ-CODE-5", "Clear the bits after a tile's last symbol.", needs=BOUND)
def pack_padding(repo: Subject) -> Iterator[Finding]:
    for stage in _of_right_length(repo):
        used = stage.symbols * stage.bits % 8
        if not used:
            continue
        for offset, codes in _tiles(repo, stage):
            bad = np.flatnonzero(codes[:, -1] >> used)
            if bad.size:
                place = offset + (int(bad[0]) + 1) * stage.tile_bytes - 1
                message = f"expected the bits from {used} on of a tile's last byte to be 0, found one set ({bad.size} such tiles here)"
                yield Finding(message, stage.pointer + "/codes", repo.payload[stage.codes].file, place)


@check("pack.code_range", "L2", "PACK.CODE_RANGE", "TQ-BOOK-4", "Write symbols below `entries`.", needs=BOUND)
def pack_code_range(repo: Subject) -> Iterator[Finding]:
    for stage in _of_right_length(repo):
        if stage.window > stage.bits or stage.entries == 2**stage.bits:
            continue  # every symbol has an entry
        for offset, codes in _tiles(repo, stage):
            if bad := _first_beyond(codes, stage.symbols, stage.bits, stage.entries):
                tile, symbol, value = bad
                place = offset + tile * stage.tile_bytes + symbol * stage.bits // 8
                message = f"symbol {symbol} of a tile is {value}, the codebook has {stage.entries} entries"
                yield Finding(message, stage.pointer + "/codes", repo.payload[stage.codes].file, place)


def _of_right_length(repo: Subject) -> Iterator[Stage]:
    """The stages whose codes can be unpacked: PACK is judged tensor by tensor [TQ-ERR-2]."""
    return (stage for stage in repo.stages if repo.payload[stage.codes].shape == (stage.tiles, stage.tile_bytes))


def _tiles(repo: Subject, stage: Stage) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """The codes of a stage, some tiles at a time [tiles, tile_bytes], each with its file offset."""
    for offset, data in repo.chunks(repo.payload[stage.codes], stage.tile_bytes, 2**22):
        yield offset, np.frombuffer(data, np.uint8).reshape(-1, stage.tile_bytes)


def _first_beyond(codes: NDArray[np.uint8], symbols: int, bits: int, entries: int) -> tuple[int, int, int] | None:
    """The first symbol that is not below `entries`, as (tile, symbol, value), of codes [tiles, tile_bytes]."""
    # eight symbols take `bits` bytes: with the tiles padded to such groups, symbol j of a group lies in the same bits of each
    groups = -(-symbols // 8)
    padded = np.zeros((len(codes), groups * bits), np.uint8)
    padded[:, : codes.shape[1]] = codes
    grouped = padded.reshape(len(codes), groups, bits)
    found: list[tuple[int, int, int]] = []
    for j in range(min(8, symbols)):
        first, shift = divmod(j * bits, 8)
        last = (j * bits + bits - 1) // 8
        word = np.zeros(grouped.shape[:2], np.uint32)
        for k in range(first, last + 1):
            word |= grouped[:, :, k].astype(np.uint32) << np.uint32(8 * (k - first))
        value = (word >> np.uint32(shift)) & np.uint32(2**bits - 1)
        value = value[:, : -(-(symbols - j) // 8)]  # the last group may lack symbol j
        if value.size and value.max() >= entries:
            tile, group = (int(x[0]) for x in np.nonzero(value >= entries))
            found.append((tile, 8 * group + j, int(value[tile, group])))
    return min(found, default=None)


# Numbers, judged by their bits

_EXPONENT = {"F8_E4M3": 0x7F, "F8_E8M0": 0xFF, "F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}
WORDS: dict[str, Any] = {
    **dict.fromkeys(BYTES, np.dtype("u1")),
    **dict.fromkeys(("F16", "BF16"), np.dtype("<u2")),
    "F32": np.dtype("<u4"),
}


def not_finite(words: Words, dtype: str) -> NDArray[np.bool_]:
    if dtype in ("U8", "I8"):
        return np.zeros(words.shape, np.bool_)
    # F8_E4M3 has no infinities, and F8_E8M0 no sign [TQ-NUM-8]
    mask = words.dtype.type(_EXPONENT[dtype])
    result: NDArray[np.bool_] = (words & mask) == mask
    return result


def _elements(
    repo: Subject, name: str, pointer: str, bad: Callable[[Words, str], NDArray[np.bool_]], what: str
) -> Iterator[Finding]:
    """One finding for each chunk of a payload tensor with elements that are `bad`, at the first of them."""
    stored = repo.payload[name]
    width = DTYPES[stored.dtype]
    for offset, data in repo.chunks(stored, width):
        where = np.flatnonzero(bad(np.frombuffer(data, WORDS[stored.dtype]), stored.dtype))
        if where.size:
            place = offset + int(where[0]) * width
            index = [int(i) for i in np.unravel_index((place - stored.offset) // width, stored.shape)]
            message = f"{what} at {index} of {brief(name, 200)} ({where.size} such elements here)"
            yield Finding(message, pointer, stored.file, place)


# 7 Codebooks


@check("data.levels", "L2", "DATA.NON_FINITE", "TQ-BOOK-3", "Store finite levels.", needs=BOUND)
def data_levels(repo: Subject) -> Iterator[Finding]:
    for id, book in repo.manifest["codebooks"].items():
        if book.get("tensor") is not None:
            yield from _elements(
                repo, book["tensor"], join("codebooks", id, "tensor"), not_finite, "a level that is not finite"
            )


@check(
    "data.values",
    "L2",
    "DATA.NON_FINITE",
    "TQ-BOOK-2",
    "Write levels that binary32 can hold.",
    needs=(*SHAPED, "schema."),
)
def data_values(repo: Subject) -> Iterator[Finding]:
    for id, book in repo.manifest["codebooks"].items():
        for index in np.flatnonzero(~np.isfinite(_inline(book.get("values") or []))):
            message = f"expected a level that is finite as binary32, found {book['values'][index]}"
            yield Finding(message, join("codebooks", id, "values", int(index)))


def _inline(values: list[float]) -> NDArray[np.float64]:
    """Inline levels, rounded to binary32 [TQ-BOOK-2]."""
    with np.errstate(over="ignore"):
        rounded: NDArray[np.float64] = np.array(values, np.float64).astype(np.float32).astype(np.float64)
    return rounded


@check(
    "data.origin",
    "L2",
    "DATA.CODEBOOK",
    "TQ-BOOK-7",
    "Store the levels of the construction, or name another method.",
    needs=BOUND,
)
def data_origin(repo: Subject) -> Iterator[Finding]:
    made: dict[tuple[int, int, int, int], NDArray[np.float64]] = {}
    for id, book in repo.manifest["codebooks"].items():
        origin = book.get("origin") or {}
        if origin.get("method") != "lloyd-max-sphere":
            continue
        key = (book["entries"], origin["vector_length"], origin["grid_size"], origin["iterations"])
        if key not in made:
            if len(made) == MAX_CONSTRUCTIONS:
                raise NotReachedError(f"more than {MAX_CONSTRUCTIONS} different origins: this judge constructs no more")
            made[key] = lloyd_max_sphere(*key)
        levels = _levels(repo, book)
        with np.errstate(invalid="ignore"):
            error = np.abs(levels - made[key])
        if not np.all(error <= 1e-5):
            index = int(np.argmax(~(error <= 1e-5)))
            message = f"expected level {index} to be {made[key][index]:.7g} within 10^-5, found {levels[index]:.7g}"
            yield Finding(message, join("codebooks", id))


@check(
    "data.byte_sum",
    "L2",
    "DATA.CODEBOOK",
    "TQ-BOOK-8",
    "Store the levels of the construction, or name another method.",
    needs=BOUND,
)
def data_byte_sum(repo: Subject) -> Iterator[Finding]:
    for id, book in repo.manifest["codebooks"].items():
        if (book.get("origin") or {}).get("method") != "byte-sum":
            continue
        levels, made = _levels(repo, book), byte_sum(book["entries"])
        if not np.array_equal(levels, made):
            index = int(np.argmax(levels != made))
            message = f"expected level {index} to be {made[index] * 128:.0f} / 128, found {levels[index]:.9g}"
            yield Finding(message, join("codebooks", id))


def _levels(repo: Subject, book: dict[str, Any]) -> NDArray[np.float64]:
    """All levels of a codebook, one after another."""
    if book.get("tensor") is None:
        return _inline(book["values"])
    return read_floats(repo, repo.payload[book["tensor"]]).ravel()


def read_floats(repo: Subject, stored: Stored) -> NDArray[np.float64]:
    """A payload tensor of floats as float64, exactly."""
    return floats(repo.bytes_of(stored), stored.dtype).reshape(stored.shape)


def floats(data: bytes, dtype: str) -> NDArray[np.float64]:
    """The exact values of the bytes of levels, scales, offsets or weights."""
    with np.errstate(invalid="ignore"):  # a signalling NaN is no surprise here
        return oracle.to_float64((dtype, (len(data) // DTYPES[dtype],), data))


# 8 Transforms


def _transforms(repo: Subject, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((id, transform) for id, transform in repo.manifest["transforms"].items() if transform["kind"] == kind)


@check(
    "data.signs",
    "L2",
    "DATA.SIGNS",
    "TQ-TRAN-6",
    "Write the signs of the seed's stream, or no seed.",
    needs=(*SHAPED, "schema."),
)
def data_signs(repo: Subject) -> Iterator[Finding]:
    for id, transform in _transforms(repo, "hadamard"):
        if transform.get("seed") is not None:
            wanted = seed_signs(transform["seed"], transform["size"])
            if transform["signs"] != wanted:
                place = next(i for i, (a, b) in enumerate(zip(transform["signs"], wanted, strict=True)) if a != b)
                message = f"the signs differ from the stream of seed {transform['seed']} from hex digit {place} on"
                yield Finding(message, join("transforms", id, "signs"))


@check("data.matrix", "L2", "DATA.NON_FINITE", "TQ-TRAN-7", "Store a finite matrix.", needs=BOUND)
def data_matrix(repo: Subject) -> Iterator[Finding]:
    for id, transform in _transforms(repo, "dense"):
        pointer = join("transforms", id, "matrix")
        yield from _elements(repo, transform["matrix"], pointer, not_finite, "a matrix element that is not finite")


@check(
    "data.orthogonality",
    "L2",
    "DATA.ORTHOGONALITY",
    "TQ-TRAN-7",
    "Orthogonalise the matrix.",
    needs=(*BOUND, "data.matrix"),
)
def data_orthogonality(repo: Subject) -> Iterator[Finding]:
    for id, transform in _transforms(repo, "dense"):
        stored = repo.payload[transform["matrix"]]
        q = read_floats(repo, stored)
        tolerance = 2.0**-12 if stored.dtype == "F32" else 2.0**-6
        worst, place = 0.0, [0, 0]
        for first in range(0, len(q), 512):
            block = q[:, first : first + 512].T @ q[:, first:]  # QᵗQ is symmetric: the upper blocks are enough
            block[np.arange(len(block)), np.arange(len(block))] -= 1
            at = np.unravel_index(np.argmax(np.abs(block)), block.shape)
            if abs(block[at]) > worst:
                worst, place = float(abs(block[at])), [first + int(at[0]), first + int(at[1])]
        if worst > tolerance:
            message = f"expected QᵗQ - I of at most {tolerance:.3g}, found {worst:.3g} at {place}"
            yield Finding(message, join("transforms", id, "matrix"), stored.file, stored.offset)


@check("data.angles", "L2", "DATA.NON_FINITE", "TQ-TRAN-8", "Store finite angles.", needs=BOUND)
def data_angles(repo: Subject) -> Iterator[Finding]:
    for id, transform in _transforms(repo, "givens"):
        pointer = join("transforms", id, "angles")
        yield from _elements(repo, transform["angles"], pointer, not_finite, "an angle that is not finite")


@check(
    "data.pairs", "L2", "DATA.PAIRS", "TQ-TRAN-8", "Let each round pair every index from 0 to B - 1 once.", needs=BOUND
)
def data_pairs(repo: Subject) -> Iterator[Finding]:
    for id, transform in _transforms(repo, "givens"):
        stored, size = repo.payload[transform["pairs"]], transform["size"]
        for offset, data in repo.chunks(stored, 4 * size, 4 * size):
            indices = np.sort(np.frombuffer(data, "<i4"))
            bad = np.flatnonzero(indices != np.arange(size))
            if bad.size:
                number = (offset - stored.offset) // (4 * size)
                message = (
                    f"round {number} does not hold the index {int(bad[0])} exactly once, or holds one beyond {size - 1}"
                )
                yield Finding(message, join("transforms", id, "pairs"), stored.file, offset)


@check("data.permutation", "L2", "DATA.PERMUTATION", "TQ-TRAN-9", "Let `index` hold 0 to B - 1 once each.", needs=BOUND)
def data_permutation(repo: Subject) -> Iterator[Finding]:
    for id, transform in _transforms(repo, "permutation"):
        stored = repo.payload[transform["index"]]
        bad = np.flatnonzero(np.sort(np.frombuffer(repo.bytes_of(stored), "<i4")) != np.arange(transform["size"]))
        if bad.size:
            message = f"expected each index from 0 to {transform['size'] - 1} exactly once, found {int(bad[0])} missing or more"
            yield Finding(message, join("transforms", id, "index"), stored.file, stored.offset)


# 9 Scales


@check("data.scales", "L2", "DATA.NON_FINITE", "TQ-NUM-1", "Store finite scales.", needs=BOUND)
def data_scales(repo: Subject) -> Iterator[Finding]:
    for stage in repo.stages:
        yield from _elements(repo, stage.scales, stage.pointer + "/scales", not_finite, "a scale that is not finite")


@check("data.offsets", "L2", "DATA.NON_FINITE", "TQ-NUM-9", "Store finite offsets.", needs=BOUND)
def data_offsets(repo: Subject) -> Iterator[Finding]:
    for stage in repo.stages:
        if stage.offsets is not None:
            what = "an offset that is not finite"
            yield from _elements(repo, stage.offsets, stage.pointer + "/offsets", not_finite, what)


@check("data.outer", "L2", "DATA.NON_FINITE", "TQ-NUM-8", "Store finite outer scales and offsets.", needs=BOUND)
def data_outer(repo: Subject) -> Iterator[Finding]:
    for stage in repo.stages:
        for key, _, outer in stage.factors:
            if outer is not None:
                what = f"one of the outer {key} that is not finite"
                yield from _elements(repo, outer, f"{stage.pointer}/outer_{key}", not_finite, what)


@check("data.column_scale", "L2", "DATA.NON_FINITE", "TQ-NUM-2", "Store finite column scales.", needs=BOUND)
def data_column_scale(repo: Subject) -> Iterator[Finding]:
    for name, entry in repo.quantized.items():
        if entry.get("column_scale") is not None:
            pointer = join("tensors", name, "column_scale")
            yield from _elements(repo, entry["column_scale"], pointer, not_finite, "a column scale that is not finite")
