"""The valid and the acceptable cases: `valid()` lists what each repository holds and which rules it exercises."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conformance import oracle
from conformance.vectors import SIZES
from conformance.vectors.builder import (
    FEATURES,
    Factor,
    Json,
    Repo,
    Stage,
    byte_sum,
    dump_tables,
    lloyd_max,
    orthogonal,
)


@dataclass
class Valid:
    """A valid or acceptable case that stores its repository; `text` may rewrite the manifest's text where the way of writing is the point."""

    id: str  # <area>/<id>
    rules: list[str]
    reason: str
    repo: Repo
    text: Callable[[str], str] = field(default=lambda text: text)
    result: str = "valid"
    codes: list[str] = field(default_factory=list)  # what an acceptable case may be rejected with

    def manifest_text(self, manifest: Json) -> str:
        return self.text(dump_tables(manifest))


def rules(text: str) -> list[str]:
    """`CODE-1 BOOK-2` as rule numbers."""
    return [f"TQ-{rule}" for rule in text.split()]


def codes() -> Iterator[Valid]:
    for bits in range(1, 9):
        repo = Repo(f"codes/bits-{bits}")
        repo.identity()
        repo.book(2**bits)
        repo.weight("w", (3, 21), Stage(bits))
        text = f"{bits}-bit scalar symbols; 21 symbols in a tile leave {-21 * bits % 8} padding bits."
        yield Valid(f"codes/bits-{bits}", rules("CODE-1 CODE-4 CODE-5 CODE-6 BOOK-4"), text, repo)
    for entries, bits in ((1, 1), (3, 2), (5, 3), (200, 8)):
        repo = Repo(f"codes/entries-{entries}")
        repo.identity()
        repo.book(entries)
        repo.weight("w", (4, 18), Stage(bits))
        text = f"A codebook of {entries} entries, fewer than 2^{bits} where that is possible."
        yield Valid(f"codes/entries-{entries}", rules("BOOK-4"), text, repo)
    for bits, window in ((1, 2), (1, 8), (1, 12), (2, 3), (2, 8), (2, 12), (3, 10), (4, 12), (5, 7), (8, 9)):
        repo = Repo(f"codes/trellis-{bits}-{window}")
        repo.identity()
        repo.stored_book(2**window)
        repo.weight("w", (2, 37), Stage(bits, window=window))
        text = f"Windows of {window} bits at {bits} new bits a symbol; 37 symbols wrap in mid byte where 37 * bits is no multiple of 8."
        yield Valid(f"codes/trellis-{bits}-{window}", rules("CODE-1 CODE-6 BOOK-4 VER-1"), text, repo)

    repo = Repo("codes/trellis-2-16")
    repo.identity()
    repo.stored_book(2**16, values=(np.arange(2**16) % 1000 / 256 - 2).reshape(-1, 1))
    repo.weight("w", (2, 24), Stage(2, window=16))
    yield Valid(
        "codes/trellis-2-16",
        rules("CODE-1 CODE-6 BOOK-4 LIM-1"),
        "The widest window, 16 bits, with its 65,536 entries.",
        repo,
    )

    repo = Repo("codes/trellis-whole-stream")
    repo.identity()
    repo.stored_book(2**8)
    repo.weight("w", (5, 4), Stage(2, window=8))
    text = "The window is the whole stream, n * bits = window: every symbol is a rotation of it."
    yield Valid("codes/trellis-whole-stream", rules("CODE-2 CODE-6"), text, repo)

    repo = Repo("codes/trellis-bits-3-n-7")
    repo.identity()
    repo.stored_book(2**10)
    repo.weight("w", (4, 7), Stage(3, window=10))
    text = "21 stream bits in 3 bytes: wrapping symbols skip the 3 padding bits."
    yield Valid("codes/trellis-bits-3-n-7", rules("CODE-5 CODE-6"), text, repo)

    repo = Repo("codes/two-weights")
    repo.identity()
    repo.book(5)
    repo.weight("a", (3, 16), Stage(3))
    repo.weight("b", (3, 16), Stage(3))
    yield Valid("codes/two-weights", rules("BOOK-4"), "Two weights, one after the other in the payload.", repo)

    repo = Repo("codes/window-equals-bits")
    repo.identity()
    repo.book(5)
    repo.weight("w", (3, 11), Stage(3, keys={"window": 3}))
    text = "A window written equal to bits is plain packing, may have fewer entries, and is no feature."
    yield Valid("codes/window-equals-bits", rules("CODE-6 BOOK-4 VER-1"), text, repo)

    repo = Repo("codes/bits-16")
    repo.identity()
    repo.stored_book(4096, 2, values=np.stack([np.arange(4096) % 64 / 16 - 2, np.arange(4096) // 64 / 16 - 2], axis=1))
    repo.weight("w", (3, 20), Stage(16))
    yield Valid(
        "codes/bits-16", rules("CODE-1 BOOK-4"), "16-bit symbols of a two-dimensional codebook of 4,096 entries.", repo
    )

    repo = Repo("codes/bits-16-p-8")
    repo.identity()
    repo.stored_book(300, 8)
    repo.weight("w", (3, 40), Stage(16))
    yield Valid(
        "codes/bits-16-p-8",
        rules("CODE-1 CODE-3 BOOK-4"),
        "16-bit symbols of p = 8, two bits a weight (as E8P or AQLM).",
        repo,
    )

    repo = Repo("codes/bits-11-p-2")
    repo.identity()
    repo.stored_book(2**11, 2, "F16")
    repo.weight("w", (3, 14), Stage(11))
    yield Valid("codes/bits-11-p-2", rules("CODE-1 CODE-6"), "11-bit symbols cross up to two byte borders.", repo)

    repo = Repo("codes/trellis-vector")
    repo.identity()
    repo.stored_book(2**9, 2)
    repo.weight("w", (3, 26), Stage(4, window=9))
    text = "A trellis over a vector codebook: 13 symbols of 4 new bits and p = 2."
    yield Valid("codes/trellis-vector", rules("CODE-6 BOOK-6"), text, repo)


def codebooks() -> Iterator[Valid]:
    for p, entries, bits in ((2, 16, 4), (3, 60, 6), (4, 256, 8), (8, 256, 8), (64, 16, 4)):
        repo = Repo(f"codebooks/vector-{p}")
        repo.identity()
        repo.book(entries, p)
        repo.weight("w", (3, 3 * p), Stage(bits))
        yield Valid(
            f"codebooks/vector-{p}",
            rules("BOOK-6 CODE-3 MAN-8"),
            f"A vector codebook of p = {p}, {entries} entries.",
            repo,
        )
    for dtype in ("F16", "BF16", "F32"):
        repo = Repo(f"codebooks/stored-{dtype}")
        repo.identity()
        repo.stored_book(8, 1, dtype)
        repo.weight("w", (3, 10), Stage(3))
        yield Valid(
            f"codebooks/stored-{dtype.lower()}", rules("BOOK-1 BOOK-3 ACC-2"), f"Levels stored as {dtype}.", repo
        )

    repo = Repo("codebooks/rows-scalar")
    repo.identity()
    repo.stored_book(4, 1, "F16", rows=5)
    repo.weight("w", (5, 12), Stage(2))
    yield Valid("codebooks/rows-scalar", rules("BOOK-3 VER-1"), "A scalar codebook per row.", repo)

    repo = Repo("codebooks/rows-vector-tiles")
    repo.hadamard(4)
    repo.stored_book(8, 2, "F32", rows=6)
    repo.weight("w", (2, 3, 8), Stage(3, tile=(3, 4)))
    text = "A vector codebook per row in tiles of three rows: the row of the weight counts, not of the tile."
    yield Valid("codebooks/rows-vector-tiles", rules("BOOK-3 CODE-3"), text, repo)

    repo = Repo("codebooks/rows-shared")
    repo.identity()
    repo.stored_book(4, 1, "F16", rows=3)
    repo.weight("a", (3, 6), Stage(2))
    repo.weight("b", (3, 1, 5), Stage(2), dtype="BF16")
    yield Valid(
        "codebooks/rows-shared", rules("BOOK-3 PAY-6"), "Two weights of equal rows share a codebook per row.", repo
    )

    repo = Repo("codebooks/rows-trellis")
    repo.identity()
    repo.stored_book(16, 1, "F16", rows=2)
    repo.weight("w", (2, 13), Stage(2, window=4))
    yield Valid("codebooks/rows-trellis", rules("BOOK-3 BOOK-4"), "A trellis with a codebook per row.", repo)

    for entries, d in ((2, 1), (3, 2), (4, 3), (4, 16), (8, 128), (16, 1024), (256, 4096)):
        repo = Repo(f"codebooks/lloyd-max-{entries}-{d}")
        repo.identity()
        grid = 8193 if entries < 256 else 65537
        repo.lloyd(entries, d, grid=grid)
        repo.weight("w", (2, 16), Stage(max(1, (entries - 1).bit_length())), dtype="BF16")
        text = f"Lloyd-Max levels on the sphere, {entries} entries, vector_length {d}, with their origin."
        yield Valid(f"codebooks/lloyd-max-{entries}-{d}", rules("BOOK-7"), text, repo)

    repo = Repo("codebooks/lloyd-max-stored")
    repo.identity()
    keys: Json = {
        "origin": {"method": "lloyd-max-sphere", "vector_length": 64, "grid_size": 1025, "iterations": 20, "extra": {}}
    }
    repo.stored_book(8, 1, "F32", values=np.array(lloyd_max(8, 64, 1025, 20)).reshape(-1, 1), **keys)
    repo.weight("w", (2, 16), Stage(3))
    yield Valid(
        "codebooks/lloyd-max-stored",
        rules("BOOK-7 BOOK-3"),
        "Lloyd-Max levels stored as a tensor, with their origin.",
        repo,
    )

    repo = Repo("codebooks/lloyd-max-small-grid")
    repo.identity()
    repo.lloyd(2, 8, grid=3, iterations=1)
    repo.weight("w", (2, 16), Stage(1))
    yield Valid("codebooks/lloyd-max-small-grid", rules("BOOK-7"), "The least grid_size and iterations.", repo)

    repo = Repo("codebooks/byte-sum")
    repo.identity()
    keys = {"origin": {"method": "byte-sum"}}
    repo.stored_book(4096, 1, "F16", values=np.array(byte_sum(4096)).reshape(-1, 1), **keys)
    repo.weight("w", (128, 3), Stage(2, window=12, tile=(128, 1)))
    text = "A trellis with computed levels, stored as any others are."
    yield Valid("codebooks/byte-sum", rules("BOOK-8 BOOK-3 CODE-6"), text, repo)

    repo = Repo("codebooks/byte-sum-inline")
    repo.identity()
    repo.book(5, values=byte_sum(5), **keys)
    repo.weight("w", (2, 16), Stage(3))
    yield Valid("codebooks/byte-sum-inline", rules("BOOK-8 BOOK-2"), "The first five computed levels, inline.", repo)

    repo = Repo("codebooks/origin-other")
    repo.identity()
    repo.book(4, origin={"method": "k-means on my data", "vector_length": None, "grid_size": None, "iterations": 7})
    repo.weight("w", (2, 16), Stage(2))
    yield Valid(
        "codebooks/origin-other",
        rules("BOOK-7 MAN-2"),
        "Another method of origin is free text and is not checked.",
        repo,
    )

    repo = Repo("codebooks/inline-4096")
    repo.identity()
    repo.book(1024, 4, values=(np.arange(4096) * 37 % 256 / 64 - 2).tolist())
    repo.weight("w", (2, 28), Stage(10))
    yield Valid("codebooks/inline-4096", rules("LIM-1 BOOK-1"), "The most inline values.", repo)

    repo = Repo("codebooks/inline-rounding")
    repo.identity()
    values = [0.1, -0.3, 1e-46, -1e-46, 1e-45, 3.4028235e38, 1 + 2**-24, 1 + 3 * 2**-24]
    repo.book(8, values=values)
    repo.weight("w", (2, 8), Stage(3, symbols=[range(8), range(7, -1, -1)], scales=[[1.0], [0.5]], vector_length=8))
    text = "Inline values round to binary32, ties to even; some become zero, subnormal or the largest number."
    yield Valid("codebooks/inline-rounding", rules("BOOK-2"), text, repo)

    repo = Repo("codebooks/inline-integers")
    repo.identity()
    repo.book(3, values=[-1, 0, 1])
    repo.weight("w", (3, 9), Stage(2))
    yield Valid("codebooks/inline-integers", rules("JSON-4 BOOK-1"), "Levels written as integers (ternary).", repo)

    repo = Repo("codebooks/unsorted-duplicates")
    repo.identity()
    repo.book(4, values=[0.5, -0.5, 0.5, -2.0])
    repo.weight("w", (3, 9), Stage(2))
    yield Valid("codebooks/unsorted-duplicates", rules("BOOK-1"), "Levels need be neither sorted nor distinct.", repo)


def transforms() -> Iterator[Valid]:
    for size in (1, 3, 24):
        repo = Repo(f"transforms/identity-{size}")
        repo.identity(size)
        repo.book(4)
        repo.weight("w", (2, 24), Stage(2))
        yield Valid(f"transforms/identity-{size}", rules("TRAN-1 TRAN-2 NUM-4"), f"Identity in blocks of {size}.", repo)
    products = [
        ((2,), 12, "Sylvester, two signs in a byte with six unused bits"),
        ((16,), 16, "Sylvester"),
        ((4, 4), 16, "a product of two Sylvester factors"),
        ((256,), 256, "Sylvester"),
        ((12,), 24, "Paley I, q = 11"),
        ((20,), 20, "Paley I, q = 19"),
        ((24,), 24, "Paley I, q = 23"),
        ((28,), 28, "Paley II, q = 13"),
        ((36,), 36, "Paley II, q = 17"),
        ((60,), 60, "Paley I, q = 59, which goes before Paley II, q = 29"),
        ((76,), 76, "Paley II, q = 37"),
        ((12, 2), 24, "Paley I, then Sylvester"),
        ((2, 12), 24, "Sylvester, then Paley I: the order of factors counts"),
        ((2, 28, 2), 112, "three factors"),
        ((12, 12), 144, "two Paley factors"),
        ((36, 16), 576, "576 = 36 * 16"),
        ((12, 64), 768, "768 = 12 * 64"),
        ((1024,), 1024, "Sylvester of order 1,024"),
        ((28, 128), 3584, "3,584 = 28 * 128"),
        ((2,) * 6, 64, "six factors of order two"),
    ]
    for factors, cols, text in products:
        name = "x".join(map(str, factors))
        repo = Repo(f"transforms/hadamard-{name}")
        repo.hadamard(*factors)
        repo.lloyd(4, 64)
        repo.weight("w", (1 if cols > 300 else 2, cols), Stage(2, scale_dtype="F32" if cols < 300 else "BF16"))
        yield Valid(
            f"transforms/hadamard-{name}", rules("TRAN-1 TRAN-3 TRAN-4 TRAN-5 NUM-3"), f"Hadamard: {text}.", repo
        )
    for seed, factors in ((0, (4,)), (1, (64,)), (2**53 - 1, (12, 8)), (1234567, (20,))):
        size = math.prod(factors)
        repo = Repo(f"transforms/seed-{seed}")
        repo.hadamard(*factors, seed=seed)
        repo.book(4)
        repo.weight("w", (1, size), Stage(2))
        yield Valid(f"transforms/seed-{seed}", rules("TRAN-6 TRAN-5"), f"The {size} signs of seed {seed}.", repo)

    repo = Repo("transforms/coherent")
    repo.hadamard(1024)
    near, far = 1 + 2.0**-12, -1 - 3 * 2.0**-12
    repo.book(2, values=[near, far])
    bent = [(k >> 5 & k & 31).bit_count() % 2 for k in range(1024)]
    repo.weight("w", (1, 1024), Stage(1, symbols=[bent], scales=[[near]], scale_dtype="F32"), dtype="F32")
    text = "Both products round down in binary32; T^-1 gathers that in one element of a block that is flat otherwise."
    yield Valid("transforms/coherent", rules("NUM-4 NUM-5 TRAN-3"), text, repo)

    repo = Repo("transforms/blocks-in-vectors")
    repo.hadamard(8)
    repo.book(8)
    repo.weight("w", (2, 48), Stage(3, vector_length=24))
    text = "Blocks of 8 in vectors of 24 in rows of 48, each vector with its scale."
    yield Valid("transforms/blocks-in-vectors", rules("TRAN-1 NUM-1 STAGE-1"), text, repo)

    for dtype, one, size in (("F32", 2**20, 8), ("F16", 2**11, 6), ("BF16", 2**8, 4)):
        repo = Repo(f"transforms/dense-{dtype}")
        repo.dense(orthogonal(size, one), dtype)
        repo.book(16)
        repo.weight("w", (3, 24), Stage(4, vector_length=12 if size != 8 else 24))
        text = f"A dense rotation of order {size}, stored as {dtype} and orthogonal to that precision."
        yield Valid(f"transforms/dense-{dtype.lower()}", rules("TRAN-7 VER-1 ACC-2"), text, repo)

    repo = Repo("transforms/dense-shared")
    repo.dense(orthogonal(4, 2**20), "F32")
    repo.book(4)
    repo.weight("a", (2, 8), Stage(2), dtype="BF16")
    repo.weight("b", (3, 4), Stage(2), dtype="F16")
    yield Valid("transforms/dense-shared", rules("TRAN-7 PAY-6"), "Two weights share a dense rotation.", repo)

    for size, rounds in ((2, 1), (8, 1), (10, 3), (4, 64)):
        repo = Repo(f"transforms/givens-{size}-{rounds}")
        repo.givens(size, rounds)
        repo.book(4)
        repo.weight("w", (2, 2 * size), Stage(2))
        yield Valid(
            f"transforms/givens-{size}-{rounds}",
            rules("TRAN-8 VER-1"),
            f"Givens rotations of {size} in {rounds} rounds.",
            repo,
        )

    for size, cols, length in ((1, 5, None), (24, 24, 8), (4, 24, 12), (36, 36, 36)):
        repo = Repo(f"transforms/permutation-{size}")
        repo.permutation(size)
        repo.book(8)
        repo.weight("w", (3, cols), Stage(3, vector_length=length), dtype="BF16" if size == 24 else "F32")
        text = f"A permutation of {size} in rows of {cols}, vectors of {length or cols}."
        yield Valid(f"transforms/permutation-{size}", rules("TRAN-9 TRAN-1 VER-1"), text, repo)

    fine: list[tuple[str, Callable[[Repo], None], int, int]] = [
        ("identity", lambda repo: repo.identity(8), 8, 4),
        ("hadamard", lambda repo: repo.hadamard(12, 2), 24, 6),
        ("dense", lambda repo: repo.dense(orthogonal(8, 2**20), "F32"), 8, 1),
        ("givens", lambda repo: repo.givens(8, 2), 8, 2),
    ]
    for name, transform, size, length in fine:
        repo = Repo(f"transforms/fine-{name}")
        transform(repo)
        repo.book(8)
        repo.weight("w", (3, 2 * size), Stage(3, vector_length=length), dtype="F16")
        text = f"Blocks of {size} in vectors of {length}: {size // length} scales in each block."
        yield Valid(f"transforms/fine-{name}", rules("TRAN-1 NUM-4 STAGE-1 VER-1"), text, repo)

    repo = Repo("transforms/every-kind")
    repo.identity(id="i")
    repo.hadamard(4, id="h", seed=9)
    repo.dense(orthogonal(4, 2**20), "F32", id="d")
    repo.givens(4, 2, id="g")
    repo.permutation(4, id="p")
    repo.book(4)
    for id in "ihdgp":
        repo.weight(f"w.{id}", (2, 8), Stage(2, transform=id))
    yield Valid("transforms/every-kind", rules("TRAN-1"), "Five weights with the five kinds of transform.", repo)


def scales() -> Iterator[Valid]:
    for dtype in ("F16", "BF16", "F32"):
        repo = Repo(f"scales/{dtype}")
        repo.identity(4)
        repo.book(4)
        repo.weight("w", (3, 16), Stage(2, vector_length=8, scale_dtype=dtype))
        yield Valid(f"scales/{dtype.lower()}", rules("NUM-1"), f"Scales stored as {dtype}, two vectors a row.", repo)

    repo = Repo("scales/zero")
    repo.hadamard(4)
    repo.book(4)
    repo.weight("w", (3, 8), Stage(2, vector_length=4, scales=[[0.0, 1.0], [0.5, -0.0], [0.0, 0.0]]))
    yield Valid("scales/zero", rules("NUM-1 NUM-4"), "Scales that are 0 and -0.", repo)

    for dtype in ("F16", "BF16", "F32"):
        repo = Repo(f"scales/negative-{dtype}")
        repo.hadamard(4)
        repo.book(4)
        signed = repo.random.fixed(-256, 256, 256, (3, 2))
        repo.weight("w", (3, 8), Stage(2, vector_length=4, scale_dtype=dtype, scales=signed))
        yield Valid(f"scales/negative-{dtype.lower()}", rules("NUM-1"), f"Scales of both signs, {dtype}.", repo)

    repo = Repo("scales/subnormal")
    repo.identity()
    repo.book(4)
    repo.weight("w", (3, 4), Stage(2, scales=[[2.0**-24], [3 * 2.0**-24], [2.0**-15]]))
    yield Valid("scales/subnormal", rules("NUM-1"), "Subnormal F16 scales.", repo)

    repo = Repo("scales/vector-length-1")
    repo.identity()
    repo.book(2, values=[-1.0, 1.0])
    repo.weight("w", (3, 5), Stage(1, vector_length=1, scale_dtype="F32"))
    yield Valid("scales/vector-length-1", rules("NUM-1"), "A scale for each element.", repo)

    for dtype in ("F32", "F16", "BF16"):
        repo = Repo(f"scales/dtype-{dtype}")
        repo.hadamard(16)
        repo.book(16)
        repo.weight("w", (4, 32), Stage(4, vector_length=16), dtype=dtype)
        yield Valid(f"scales/dtype-{dtype.lower()}", rules("NUM-5 STAGE-2"), f"A weight of dtype {dtype}.", repo)

    small = {"F16": 2.0**-24, "BF16": 2.0**-133, "F32": 2.0**-149}
    values = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.5, 1000.0, -0.5, -1.5, -2.5, -1023.5, 0.25, 3.5, 7.0, 1024.0]
    for dtype, one in small.items():
        repo = Repo(f"scales/subnormal-{dtype}")
        repo.identity()
        repo.book(16, values=values)
        column_scale = np.full(16, 2.0**-60 if dtype == "BF16" else 2.0**-70 if dtype == "F32" else 1.0)
        scale = one / column_scale[0]
        stage = Stage(4, symbols=[range(16)], scales=[[scale]], scale_dtype="F32")
        repo.weight("w", (1, 16), stage, dtype=dtype, column_scale=column_scale)
        text = f"Elements among the subnormal numbers of {dtype}, some of them ties."
        yield Valid(f"scales/subnormal-{dtype.lower()}", rules("NUM-5"), text, repo)

    for dtype, largest in (("F16", 65504.0), ("BF16", 2.0**128 - 2.0**120), ("F32", 2.0**128 - 2.0**104)):
        repo = Repo(f"scales/largest-{dtype}")
        repo.identity()
        repo.book(2, values=[-1.0, 1.0])
        repo.weight("w", (1, 4), Stage(1, scales=[[largest]], scale_dtype="F32"), dtype=dtype)
        text = f"The largest number of {dtype} and its negative are finite."
        yield Valid(f"scales/largest-{dtype.lower()}", rules("NUM-5 NUM-6"), text, repo)

    for dtype in ("F16", "BF16", "F32"):
        repo = Repo(f"scales/column-{dtype}")
        repo.hadamard(12)
        repo.book(8)
        repo.weight("w", (3, 12), Stage(3), column_scale=dtype, dtype="BF16")
        yield Valid(
            f"scales/column-{dtype.lower()}",
            rules("NUM-2 NUM-4 VER-1"),
            f"A column scale stored as {dtype}, of both signs.",
            repo,
        )

    repo = Repo("scales/column-zero")
    repo.identity()
    repo.book(8)
    repo.weight(
        "w", (2, 6), Stage(3), column_scale=np.array([1.0, 0.0, -1.0, -0.0, 2.0, -3.5]), column_scale_dtype="F16"
    )
    yield Valid("scales/column-zero", rules("NUM-2"), "A column scale with zeros, negative and positive.", repo)

    repo = Repo("scales/column-rank-4")
    repo.identity()
    repo.book(8)
    repo.weight("w", (2, 3, 2, 5), Stage(3), column_scale="F32", dtype="F16")
    yield Valid("scales/column-rank-4", rules("NUM-2"), "A column scale belongs to the last dimension.", repo)


def outer_scales() -> Iterator[Valid]:
    table: list[tuple[str, tuple[int, int], str]] = [
        ("U8", (3, 2), "F16"),
        ("I8", (3, 1), "BF16"),
        ("F8_E4M3", (1, 4), "F32"),
        ("F8_E8M0", (1, 1), "F16"),
        ("U8", (3, 4), "F32"),
    ]
    for k, (dtype, outer, outer_dtype) in enumerate(table):
        name = f"outer-{dtype.lower().replace('_', '-')}{'-each' if k == 4 else ''}"
        repo = Repo(f"scales/{name}")
        repo.hadamard(4)
        repo.book(8)
        stage = Stage(3, vector_length=4, factor=Factor(dtype, outer, outer_dtype))
        repo.weight("w", (3, 16), stage, dtype="BF16" if k % 2 else "F32")
        text = f"{dtype} scales of four vectors a row, multiplied by {outer_dtype} {list(outer)}."
        yield Valid(f"scales/{name}", rules("NUM-1 NUM-8 NUM-4 VER-1 ACC-2"), text, repo)
    repo = Repo("scales/outer-subnormal")
    repo.identity()
    repo.book(4, values=[-(2.0**100), -(2.0**99), 2.0**99, 2.0**100])
    factor = Factor("F8_E4M3", np.full((2, 1), 881 * 2.0**-149), "F32", [[0.0703125], [-0.0703125]])
    repo.weight("w", (2, 8), Stage(2, factor=factor), dtype="F32")
    text = "Scales times their outer ones are subnormal in binary32, and the levels large."
    yield Valid("scales/outer-subnormal", rules("NUM-5 NUM-8"), text, repo)
    for dtype, shape in (("F8_E4M3", (2, 127)), ("F8_E8M0", (5, 51))):
        repo = Repo(f"scales/every-{dtype}")
        repo.identity()
        repo.book(1, values=[1.0])
        every = oracle.FLOAT8[dtype][~np.isnan(oracle.FLOAT8[dtype])]
        repo.weight("w", shape, Stage(1, vector_length=1, factor=Factor(dtype, np.ones((1, 1)), "F32", every)))
        name, text = (
            dtype.lower().replace("_", "-"),
            f"Every finite number of {dtype}, subnormal ones and zeros included.",
        )
        yield Valid(f"scales/every-{name}", rules("NUM-8"), text, repo)
    e2m1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    formats: list[tuple[str, list[float], Stage, str]] = [
        (
            "mxfp4",
            [*e2m1, *[-x for x in e2m1]],
            Stage(4, vector_length=32, factor=Factor("F8_E8M0", np.ones((1, 1)))),
            "MXFP4",
        ),
        (
            "nvfp4",
            [*e2m1, *[-x for x in e2m1]],
            Stage(4, vector_length=16, factor=Factor("F8_E4M3", (1, 1), "F32")),
            "NVFP4",
        ),
        (
            "q6-k",
            [float(k) for k in range(-32, 32)],
            Stage(6, vector_length=16, factor=Factor("I8", (2, 1))),
            "GGUF Q6_K",
        ),
    ]
    for name, levels, stage, what in formats:
        repo = Repo(f"scales/{name}")
        repo.identity()
        repo.book(len(levels), values=levels)
        repo.weight("w", (2, 64), stage, dtype="BF16")
        yield Valid(f"scales/{name}", rules("NUM-8"), f"The arithmetic of {what}.", repo)


def offsets() -> Iterator[Valid]:
    for dtype in ("F16", "BF16", "F32"):
        repo = Repo(f"offsets/{dtype}")
        repo.identity()
        repo.book(16, values=[float(k) for k in range(16)])
        repo.weight("w", (3, 16), Stage(4, vector_length=8, offsets=Factor(dtype)), dtype="F16")
        text = f"Offsets stored as {dtype}, two a row, and levels 0 to 15."
        yield Valid(f"offsets/{dtype.lower()}", rules("NUM-9 STAGE-1 VER-1 ACC-2"), text, repo)

    repo = Repo("offsets/hadamard")
    repo.hadamard(12)
    repo.book(8)
    repo.weight("w", (3, 24), Stage(3, vector_length=12, offsets=Factor("F32")))
    yield Valid("offsets/hadamard", rules("NUM-9 NUM-4 STAGE-1"), "Offsets are added before T^-1.", repo)

    repo = Repo("offsets/fine")
    repo.hadamard(16)
    repo.book(8)
    repo.weight("w", (3, 16), Stage(3, vector_length=4, offsets=Factor("F16")), dtype="BF16")
    yield Valid("offsets/fine", rules("NUM-9 TRAN-1 NUM-4"), "Four scales and four offsets in one block.", repo)

    repo = Repo("offsets/outer")
    repo.identity()
    repo.book(16, values=[float(k) for k in range(16)])
    scale, offset = Factor("U8", (2, 1)), Factor("U8", (2, 1))
    repo.weight("w", (2, 256), Stage(4, vector_length=32, factor=scale, offsets=offset), dtype="BF16")
    yield Valid("offsets/outer", rules("NUM-9 NUM-8"), "The arithmetic of GGUF Q4_K.", repo)

    repo = Repo("offsets/outer-mixed")
    repo.givens(4, 2)
    repo.book(16)
    scale, offset = Factor("F8_E4M3", (1, 2), "BF16"), Factor("I8", (3, 4), "F32")
    repo.weight("w", (3, 16), Stage(4, vector_length=4, factor=scale, offsets=offset))
    text = "Scales and offsets of other dtypes, with outer ones of other shapes."
    yield Valid("offsets/outer-mixed", rules("NUM-9 NUM-8"), text, repo)

    repo = Repo("offsets/outer-offsets-alone")
    repo.identity()
    repo.book(4)
    repo.weight("w", (2, 8), Stage(2, vector_length=4, offsets=Factor("F8_E8M0", (2, 2))))
    text = "Scales without outer ones, offsets with them: the feature is in use."
    yield Valid("offsets/outer-offsets-alone", rules("NUM-9 VER-1"), text, repo)

    repo = Repo("offsets/cancel")
    repo.identity(4)
    repo.book(4, values=[0.0, 1.0, 2.0, 3.0])
    stage = Stage(2, symbols=[[0, 1, 2, 3]] * 2, scales=[[1.0], [0.5]], offsets=Factor("F32", values=[[-3.0], [-0.5]]))
    repo.weight("w", (2, 4), stage)
    yield Valid(
        "offsets/cancel", rules("NUM-4 NUM-9"), "Where an offset cancels, the value is 0, the tolerance is not.", repo
    )

    repo = Repo("offsets/cancel-large")
    repo.identity()
    repo.book(2, values=[-1.0, 1.0])
    large = Factor("F32", values=[[2.0**127], [-(2.0**127)]])
    symbols = [[0, 0, 0], [1, 1, 1]]
    repo.weight("w", (2, 3), Stage(1, symbols=symbols, scales=[[2.0**127]] * 2, scale_dtype="F32", offsets=large))
    text = "Nothing on the way is beyond binary32, though the sum of the magnitudes is."
    yield Valid("offsets/cancel-large", rules("NUM-6 NUM-9"), text, repo)

    repo = Repo("offsets/negative-scales")
    repo.identity()
    repo.book(16, values=[float(k) for k in range(16)])
    scales = repo.random.fixed(-64, 64, 256, (3, 4))
    zeros = repo.random.integers(0, 16, (3, 4))
    offset = Factor("F32", values=-scales * zeros)
    repo.weight("w", (3, 16), Stage(4, vector_length=4, scales=scales, offsets=offset), dtype="BF16")
    yield Valid(
        "offsets/negative-scales", rules("NUM-9 NUM-1"), "The arithmetic of GPTQ: offset = -scale * zero.", repo
    )

    repo = Repo("offsets/activation-order")
    repo.permutation(32)
    repo.book(16, values=[float(k) for k in range(16)])
    repo.weight("w", (3, 32), Stage(4, vector_length=8, offsets=Factor("F16")), dtype="F16")
    text = "The arithmetic of GPTQ with activation order: groups of permuted columns."
    yield Valid("offsets/activation-order", rules("TRAN-9 NUM-9 TRAN-1"), text, repo)

    repo = Repo("offsets/everything")
    repo.hadamard(4, 2, id="h")
    repo.permutation(12, id="p")
    repo.stored_book(2**6, dtype="BF16", id="trellis")
    repo.stored_book(16, 2, rows=4, id="rows")
    first = Stage(
        2, "trellis", "h", window=6, tile=(2, 12), vector_length=4, factor=Factor("I8", (1, 3)), offsets=Factor("BF16")
    )
    second = Stage(4, "rows", "p", vector_length=6, offsets=Factor("F8_E4M3", (4, 4), "F32"))
    repo.weight("w", (4, 24), first, second, dtype="F16", column_scale="F16")
    text = "Two stages, tiles, a trellis, a codebook per row, fine scales, outer scales and offsets, a column scale."
    yield Valid("offsets/everything", rules("NUM-9 NUM-8 STAGE-1 STAGE-2 NUM-2"), text, repo)


def products() -> Iterator[Valid]:
    """Weights and what they make of an x, for engines that do not decode."""
    table: list[tuple[str, Callable[[Repo], None], tuple[int, ...], list[Stage], Json, str]] = [
        ("identity", lambda r: r.identity(), (3, 16), [Stage(3, vector_length=8)], {}, "Two scales a row."),
        (
            "hadamard",
            lambda r: r.hadamard(12, 2),
            (4, 48),
            [Stage(3, vector_length=24)],
            {"dtype": "BF16"},
            "T x, block by block.",
        ),
        (
            "dense",
            lambda r: r.dense(orthogonal(8, 2**20), "F32"),
            (3, 24),
            [Stage(3)],
            {},
            "Three blocks in one vector.",
        ),
        ("givens", lambda r: r.givens(8, 3), (3, 16), [Stage(3)], {}, "Plane rotations."),
        (
            "permutation",
            lambda r: r.permutation(32),
            (3, 32),
            [Stage(3, vector_length=8)],
            {},
            "Four groups of permuted columns.",
        ),
        (
            "fine",
            lambda r: r.hadamard(16),
            (3, 32),
            [Stage(3, vector_length=4)],
            {"dtype": "F16"},
            "Scales finer than blocks.",
        ),
        (
            "offsets",
            lambda r: r.hadamard(8),
            (3, 32),
            [Stage(3, vector_length=16, offsets=Factor("F16"))],
            {},
            "Offsets times sums of T x.",
        ),
        (
            "outer",
            lambda r: r.identity(),
            (2, 256),
            [Stage(3, vector_length=32, factor=Factor("U8", (2, 1)), offsets=Factor("U8", (2, 1)))],
            {"dtype": "BF16"},
            "Two levels of scales and offsets.",
        ),
        (
            "column-scale",
            lambda r: r.hadamard(16),
            (3, 16),
            [Stage(3)],
            {"column_scale": "F16"},
            "The column scale goes to x.",
        ),
        (
            "stages",
            lambda r: r.hadamard(16),
            (2, 2, 32),
            [Stage(3), Stage(3, vector_length=16)],
            {"dtype": "F16"},
            "Two stages, rank 3.",
        ),
        ("tiles", lambda r: r.hadamard(8), (6, 16), [Stage(3, tile=(3, 8))], {}, "Tiles of three rows."),
    ]
    for name, transform, shape, parts, keys, text in table:
        repo = Repo(f"products/{name}")
        transform(repo)
        repo.book(8)
        repo.weight("w", shape, *parts, **keys)
        repo.multiply("w")
        yield Valid(f"products/{name}", rules("FUSE-1 FUSE-2 FUSE-3"), text, repo)

    repo = Repo("products/trellis-rows")
    repo.hadamard(28)
    repo.stored_book(64, rows=3)
    repo.weight("w", (3, 28), Stage(2, window=6), dtype="BF16")
    repo.multiply("w")
    repo.multiply("w")
    yield Valid(
        "products/trellis-rows", rules("FUSE-1 FUSE-2 FUSE-3"), "A trellis, a codebook per row, two products.", repo
    )


def shapes() -> Iterator[Valid]:
    table: list[tuple[str, tuple[int, ...], str]] = [
        ("rank-3", (2, 3, 8), "Rank 3."),
        ("rank-4", (2, 1, 3, 8), "Rank 4 with a dimension of 1."),
        ("rank-5", (4, 3, 2, 2, 4), "Rank 5, as a video patch embedding."),
        ("rank-6", (2, 1, 2, 1, 2, 4), "Rank 6."),
        ("rank-7", (1, 2, 1, 2, 1, 2, 4), "Rank 7."),
        ("rank-8", (1, 2, 1, 2, 1, 2, 1, 8), "Rank 8."),
        ("zero-rows", (0, 8), "No rows: empty payload tensors."),
        ("zero-inner", (3, 0, 4), "A zero among the leading dimensions gives zero rows."),
        ("one-row", (1, 24), "One row."),
        ("one-column", (5, 1), "One column: tiles of one symbol."),
        ("one-element", (1, 1), "One element."),
        ("odd", (7, 13), "Odd rows and columns."),
    ]
    for name, shape, text in table:
        repo = Repo(f"shapes/{name}")
        repo.hadamard(4) if shape[-1] % 4 == 0 else repo.identity()
        repo.book(8)
        repo.weight("w", shape, Stage(3), dtype="BF16")
        yield Valid(
            f"shapes/{name}", rules("MAN-7 CODE-4 STAGE-2 PAY-5" if 0 in shape else "MAN-7 STAGE-2"), text, repo
        )

    repo = Repo("shapes/zero-rows-rich")
    repo.dense(orthogonal(4, 2**20), "F32")
    repo.stored_book(16, 2, "F16", rows=0)
    repo.weight("w", (0, 8), Stage(2, window=4, tile=(2, 8)), Stage(2, window=4, vector_length=4), column_scale="F16")
    text = "No rows together with a codebook per row, a trellis, tiles, stages, a column scale and a dense rotation."
    yield Valid("shapes/zero-rows-rich", rules("MAN-7 BOOK-3 CODE-2"), text, repo)

    repo = Repo("shapes/zero-rows-offsets")
    repo.permutation(8)
    repo.book(4)
    stage = Stage(2, vector_length=4, factor=Factor("U8", (0, 2)), offsets=Factor("I8", (1, 1)))
    repo.weight("w", (0, 8), stage)
    yield Valid(
        "shapes/zero-rows-offsets", rules("NUM-8 NUM-9 MAN-7"), "No rows, and outer scales of none and of one.", repo
    )

    repo = Repo("shapes/widest")
    repo.identity(2**20)
    repo.book(2)
    repo.weight("w", (0, 2**20), Stage(1, tile=(4, 2**20), keys={"vector_length": 2**20}))
    text = "The most columns, the largest transform size, vector_length and tile, in a weight without rows."
    yield Valid("shapes/widest", rules("LIM-1 CODE-2"), text, repo)


def tiles() -> Iterator[Valid]:
    table: list[tuple[str, tuple[int, int], tuple[int, int], Stage, str]] = [
        ("2x2", (6, 8), (2, 2), Stage(2), "Tiles of one byte."),
        ("2x2-3-bits", (4, 6), (2, 2), Stage(3), "Tiles of 12 bits, padded to two bytes each."),
        ("16x16", (32, 32), (16, 16), Stage(2), "Tiles of 256 symbols."),
        ("1x8", (3, 24), (1, 8), Stage(3), "Parts of a row."),
        ("rows", (6, 8), (6, 8), Stage(5), "One tile is the whole weight."),
        ("column-blocks", (6, 8), (6, 2), Stage(3), "All rows, two columns."),
        ("1x1", (3, 5), (1, 1), Stage(3), "Each symbol in its own byte."),
        ("across-vectors", (4, 24), (2, 12), Stage(3, vector_length=8), "Tiles that cut vectors."),
        ("3x1", (6, 4), (3, 1), Stage(4), "Columns of three."),
    ]
    for name, shape, tile, stage, text in table:
        repo = Repo(f"tiles/{name}")
        repo.hadamard(4) if shape[1] % 4 == 0 and (stage.vector_length or shape[1]) % 4 == 0 else repo.identity()
        repo.book(2**stage.bits)
        stage.tile = tile
        repo.weight("w", shape, stage)
        yield Valid(f"tiles/{name}", rules("CODE-2 CODE-3 CODE-4 VER-1"), text, repo)

    repo = Repo("tiles/default-written")
    repo.identity()
    repo.book(4)
    repo.weight("w", (3, 8), Stage(2, tile=(1, 8)))
    yield Valid("tiles/default-written", rules("VER-1 CODE-3"), "A tile written as [1, cols] is no feature.", repo)

    repo = Repo("tiles/trellis-16x16")
    repo.hadamard(16)
    repo.stored_book(2**8)
    repo.weight("w", (16, 32), Stage(2, window=8, tile=(16, 16)), dtype="BF16")
    yield Valid(
        "tiles/trellis-16x16", rules("CODE-3 CODE-6"), "A tail-biting trellis along tiles of 256 symbols.", repo
    )

    repo = Repo("tiles/trellis-odd")
    repo.identity()
    repo.stored_book(2**6)
    repo.weight("w", (6, 9), Stage(3, window=6, tile=(3, 3)))
    text = "A trellis in tiles of 9 symbols of 3 bits: 27 stream bits, 5 padding bits."
    yield Valid("tiles/trellis-odd", rules("CODE-5 CODE-6"), text, repo)

    repo = Repo("tiles/vector")
    repo.identity()
    repo.book(60, 3)
    repo.weight("w", (4, 18), Stage(6, tile=(2, 6), vector_length=9))
    yield Valid(
        "tiles/vector", rules("CODE-2 CODE-3 BOOK-6"), "Tiles of a codebook with p = 3: two symbols across.", repo
    )


def stages() -> Iterator[Valid]:
    repo = Repo("stages/two")
    repo.hadamard(16)
    repo.book(4)
    repo.weight("w", (3, 16), Stage(2), Stage(2))
    yield Valid(
        "stages/two",
        rules("STAGE-1 STAGE-2 NUM-4 MAN-8 VER-1"),
        "Two stages with one codebook and one transform.",
        repo,
    )

    repo = Repo("stages/turboquant-prod")
    repo.hadamard(16, seed=1, id="mse")
    repo.hadamard(16, seed=2, id="qjl")
    repo.lloyd(2, 16, id="lloyd-max-1")
    repo.book(2, id="sign", values=[-1.25, 1.25])
    second = Stage(1, codebook="sign", transform="qjl", scale_dtype="F16")
    repo.weight("w", (4, 16), Stage(1, "lloyd-max-1", "mse"), second, dtype="BF16")
    text = (
        "TurboQuant-prod: a stage at b - 1 bits, then signs with their own rotation and the residual's norm as scale."
    )
    yield Valid("stages/turboquant-prod", rules("STAGE-1 STAGE-2"), text, repo)

    repo = Repo("stages/three")
    repo.hadamard(12, id="h")
    repo.identity(id="i")
    repo.dense(orthogonal(4, 2**20), "F32", id="d")
    repo.stored_book(2**6, id="trellis")
    repo.book(8, id="scalar")
    repo.book(16, 4, id="vector")
    repo.weight(
        "w",
        (4, 24),
        Stage(2, "trellis", "h", window=6, tile=(2, 12)),
        Stage(3, "scalar", "i", vector_length=8, scale_dtype="F32"),
        Stage(4, "vector", "d", vector_length=12, scale_dtype="BF16", tile=(4, 4)),
        dtype="F16",
        column_scale="BF16",
    )
    text = "Three stages that differ in every setting, and a column scale after the sum."
    yield Valid("stages/three", rules("STAGE-1 STAGE-2 NUM-2 NUM-4 MAN-8"), text, repo)

    repo = Repo("stages/tile-heights")
    repo.hadamard(4)
    repo.book(8)
    repo.weight("w", (12, 8), Stage(3, tile=(4, 8)), Stage(3, tile=(6, 4)), Stage(3, tile=(1, 2)))
    text = "Stages with tiles of 4, 6 and 1 rows: they meet only every 12 rows."
    yield Valid("stages/tile-heights", rules("CODE-2 CODE-3 STAGE-2"), text, repo)

    repo = Repo("stages/eight")
    repo.identity()
    repo.book(2)
    repo.weight("w", (2, 8), *[Stage(1) for _ in range(8)])
    yield Valid("stages/eight", rules("STAGE-2 LIM-1"), "The most stages.", repo)

    repo = Repo("stages/cancel")
    repo.identity()
    repo.book(2, values=[-1.0, 1.0])
    one_way, other_way = [[0, 1]] * 2, [[1, 0]] * 2
    repo.weight(
        "w",
        (2, 2),
        Stage(1, symbols=one_way, scales=[[1.0], [1.0]]),
        Stage(1, symbols=other_way, scales=[[1.0], [0.5]]),
    )
    text = "Two stages that cancel: the exact value is 0, the tolerance is not."
    yield Valid("stages/cancel", rules("NUM-4 NUM-5"), text, repo)

    repo = Repo("stages/residual-vector")
    repo.identity()
    repo.stored_book(256, 8, id="first")
    repo.stored_book(256, 8, id="second")
    repo.weight("w", (2, 24), Stage(8, "first"), Stage(8, "second", scale_dtype="BF16"), dtype="F16")
    yield Valid("stages/residual-vector", rules("STAGE-1 MAN-8"), "Residual vector quantization, p = 8.", repo)


def passthrough() -> Iterator[Valid]:
    repo = Repo("passthrough/every-dtype")
    for dtype in SIZES:
        repo.passthrough(f"t.{dtype}", dtype, (2, 3))
    yield Valid("passthrough/every-dtype", rules("PASS-1 PAY-4 PAY-7"), "A passthrough tensor of every dtype.", repo)

    repo = Repo("passthrough/non-finite")
    repo.passthrough("t.F16", "F16", (4,), bytes.fromhex("007e007c00fcffff"))
    repo.passthrough("t.BF16", "BF16", (4,), bytes.fromhex("c07f807f80ff81ff"))
    repo.passthrough("t.F32", "F32", (2, 2), bytes.fromhex("0000c07f0000807f000080ff010080ff"))
    repo.passthrough("t.F64", "F64", (2,), bytes.fromhex("000000000000f87f000000000000f0ff"))
    yield Valid(
        "passthrough/non-finite", rules("PASS-1"), "NaN with payloads and infinities are allowed, bit for bit.", repo
    )

    repo = Repo("passthrough/rank-0")
    repo.passthrough("scalar", "F32", ())
    repo.passthrough("flag", "BOOL", ())
    yield Valid("passthrough/rank-0", rules("PASS-1"), "Tensors of rank 0 hold one element.", repo)

    repo = Repo("passthrough/rank-8")
    repo.passthrough("t", "I16", (1, 2, 1, 2, 1, 1, 3, 1))
    yield Valid("passthrough/rank-8", rules("PASS-1 PAY-3"), "A passthrough tensor of rank 8.", repo)

    repo = Repo("passthrough/empty")
    repo.passthrough("a", "F32", (0,))
    repo.passthrough("b", "U8", (3,))
    repo.passthrough("c", "I64", (2, 0, 5))
    yield Valid("passthrough/empty", rules("PASS-1 PAY-5"), "Tensors without elements beside one with some.", repo)

    repo = Repo("passthrough/only-empty")
    repo.passthrough("a", "F32", (0,))
    yield Valid("passthrough/only-empty", rules("PAY-5 ACC-1"), "Nothing is stored: the ratio is 0.", repo)

    repo = Repo("passthrough/sizes")
    repo.passthrough("a", "U8", (3,))
    repo.passthrough("b", "F64", (2,))
    repo.passthrough("c", "BF16", (3,))
    text = "The part with an odd length lies behind the others, so that all are aligned."
    yield Valid("passthrough/sizes", rules("PAY-5 PAY-7 PAY-8"), text, repo)

    repo = Repo("passthrough/nothing")
    yield Valid(
        "passthrough/nothing", rules("SHARD-2 ACC-1 PAY-1"), "No tensors: the one payload file has the header {}.", repo
    )


def small(name: str, shards: int = 1) -> Repo:
    """A quantized weight `w` [4, 16] and a passthrough tensor `norm` [16]."""
    repo = Repo(name, shards)
    repo.hadamard(16, seed=7)
    repo.lloyd(4, 16)
    repo.weight("w", (4, 16), Stage(2), dtype="BF16")
    repo.passthrough("norm", "BF16", (16,))
    return repo


def typical() -> Repo:
    """The repository that most invalid cases mutate: several files, weights, transforms and codebooks."""
    repo = small("repository/typical")
    repo.book(8, 2, id="pairs")
    repo.dense(orthogonal(4, 2**20), "F32", id="dense")
    repo.givens(4, 2, id="givens")
    repo.stored_book(16, 1, "F16", id="trellis", rows=2)
    repo.weight(
        "w2",
        (2, 8),
        Stage(3, "pairs", "dense"),
        Stage(2, "trellis", "givens", window=4, tile=(2, 4)),
        column_scale="F32",
    )
    repo.permutation(8, id="permutation")
    stage = Stage(
        3, "pairs", "permutation", vector_length=4, factor=Factor("U8", (1, 1)), offsets=Factor("I8", (2, 2), "F32")
    )
    repo.weight("w3", (2, 8), stage)
    repo.tied = {"alias": "w"}
    repo.others["config.json"] = ("support", b'{"model_type": "example"}\n')
    repo.others["example.py"] = ("code", b'raise SystemExit("a reader must not run this")\n')
    repo.others["LICENSE"] = ("document", b"Public domain.\n")
    return repo


def repository() -> Iterator[Valid]:
    repo = typical()
    text = "Support, code and document files, three weights, a passthrough tensor, every feature, a tie."
    yield Valid("repository/typical", rules("REPO-1 REPO-3 REPO-4 SEC-1 MAN-9 PAY-6 ACC-1 TIE-1"), text, repo)

    repo = small("repository/loader")
    body = b'"""Stands for a loader: only its stamp matters here."""\n'
    stamp = {"format": "1.0", "version": "0.0.0", "body_sha256": hashlib.sha256(body).hexdigest()}
    repo.others["load_quantized.py"] = ("code", body + f"# tqformat-stamp: {json.dumps(stamp)}\n".encode())
    yield Valid(
        "repository/loader", rules("REPO-6 REPO-7"), "A stamped loader; which release it is, is another question.", repo
    )

    repo = small("repository/chunks")
    repo.chunk_size = 4096
    for name, size in (("empty.txt", 0), ("one.txt", 4096), ("three.txt", 8193)):
        repo.others[name] = ("support", b"0123456789abcdef" * 512 + b"x" if size == 8193 else b"y" * size)
    yield Valid("repository/chunks", rules("REPO-8"), "Files of none, one and three chunks.", repo)

    repo = small("repository/file-names")
    for name in (
        "_",
        "0",
        "a" + "-._" * 42 + "a",
        "A.JSON",
        "tokenizer.model",
        "console",
        "com0.txt",
        "lpt10",
        "x.nul",
    ):
        repo.others[name] = ("support", name.encode())
    repo.others["turboquant_weights.md"] = ("document", b"")
    yield Valid(
        "repository/file-names", rules("REPO-2 REPO-4"), "File names up to 128 characters, and an empty file.", repo
    )

    repo = small("repository/unlisted")
    repo.unlisted = {"README.md": b"# A card\n", ".gitattributes": b"* -text\n"}
    yield Valid(
        "repository/unlisted", rules("REPO-5"), "README.md and entries that begin with a dot need no listing.", repo
    )


def json_text() -> Iterator[Valid]:
    def white(text: str) -> str:
        return " \t\r\n" + text.replace("\n", "\r\n\t") + "\n\n "

    repo = small("json/white-space")
    yield Valid("json/white-space", rules("JSON-2"), "White space around and within the manifest.", repo, white)

    repo = small("json/escapes")
    repo.top["extra"] = {"smile": "SMILE", "slash": "SLASH"}

    def escape(text: str) -> str:
        text = text.replace('"format"', '"\\u0066ormat"').replace('"w"', '"\\u0077"')
        return text.replace("SMILE", "\\ud83d\\ude00 \\ufffe").replace("SLASH", '\\/\\b\\f\\n\\r\\t\\"\\\\\\u0000')

    text = "Escapes in keys and names mean what they escape; a surrogate pair is one character."
    yield Valid("json/escapes", rules("JSON-1 JSON-3"), text, repo, escape)

    repo = Repo("json/unicode")
    repo.identity(id="单位")
    repo.book(4, id="码本 \u2028 1")
    repo.weight("模型.слой.0.वज़न.😀", (2, 8), Stage(2, "码本 \u2028 1", "单位"))
    repo.weight("x" * 505, (2, 8), Stage(2, "码本 \u2028 1", "单位"))
    repo.tensors["x" * 512] = repo.tensors.pop("x" * 505)
    repo.weight("é", (1, 8), Stage(2, "码本 \u2028 1", "单位"))
    repo.weight("e\u0301", (1, 8), Stage(2, "码本 \u2028 1", "单位"))
    repo.passthrough("😀" * 507, "U8", (1,))
    text = "Names in many scripts, of up to 512 code points; names that differ only by Unicode normalisation differ."
    yield Valid("json/unicode", rules("JSON-1 MAN-4"), text, repo)

    repo = Repo("json/odd-names")
    repo.identity(id="...")
    repo.book(4, id="__metadata__ ")
    repo.weight("..a/b../c.. /...", (1, 8), Stage(2, "__metadata__ ", "..."))
    repo.weight("C:\\w\\0", (1, 8), Stage(2, "__metadata__ ", "..."))
    repo.passthrough("__proto__", "U8", (2,))
    repo.passthrough(" ", "U8", (1,))
    yield Valid(
        "json/odd-names",
        rules("MAN-4"),
        "Names of weights and storage are not paths: any character from U+0020 on, but no segment of two dots.",
        repo,
    )

    def nested(levels: int) -> Any:
        value: Any = "bottom"
        for k in range(levels):
            value = [value] if k % 2 else {"a": value}
        return value

    repo = small("json/depth-64")
    repo.top["extra"] = {"a": nested(62)}
    yield Valid("json/depth-64", rules("JSON-5 MAN-1"), "64 levels of nesting, the manifest being the first.", repo)

    repo = Repo("json/minus-zero")
    repo.passthrough("empty", "F32", (0, 3))
    text = "-0 is the integer 0, in the manifest and in the header."

    def minus(text: str) -> str:
        return text.replace('"shape": [0, 3]', '"shape": [-0, 3]')

    yield Valid("json/minus-zero", rules("JSON-4"), text, repo, minus)

    repo = small("json/numbers")
    repo.top["extra"] = {"largest": 2**53 - 1, "least": -(2**53) + 1, "tiny": "TINY", "big": "BIG", "zero": "ZERO"}
    repo.codebooks["b"]["values"] = [-1.5, -0.5, 0.5, 1.5]
    del repo.codebooks["b"]["origin"]

    def numbers(text: str) -> str:
        text = text.replace("[-1.5, -0.5, 0.5, 1.5]", "[-15E-1, -0.05e+1, 5e-1, 1.50]")
        text = (
            text.replace('"bits": 2}', '"bits": 2.0e0}')
            .replace('"TINY"', "1e-400")
            .replace('"BIG"', "1.7976931348623157e308")
        )
        return text.replace('"ZERO"', "-0.0")

    text = "Numbers in every notation where a number is asked for, and the largest integers."
    yield Valid("json/numbers", rules("JSON-4"), text, repo, numbers)


def manifest() -> Iterator[Valid]:
    extra = {"note": "free", "nested": {"list": [1, 2.5, None, True]}}
    repo = Repo("manifest/extra-everywhere")
    repo.identity(id="i", extra=extra)
    repo.hadamard(4, id="h", extra=extra)
    repo.dense(orthogonal(4, 2**20), "F32", id="d", extra=extra)
    repo.givens(4, 1, id="g", extra=extra)
    repo.permutation(4, id="p", extra=extra)
    repo.book(4, origin={"method": "none", "extra": extra}, extra=extra)
    for id in "ihdgp":
        repo.weight(f"w.{id}", (2, 4), Stage(2, transform=id, keys={"extra": extra}), extra=extra)
    repo.passthrough("p", "U8", (2,), extra=extra)
    repo.top["extra"] = extra
    repo.top["base_model"] = {"id": "example/model", "extra": extra}
    allocation, calibration = {"allocator": "none", "extra": extra}, {"source": "none", "extra": extra}
    repo.top["quantization"] = {
        "method": "m",
        "bits": 2,
        "allocation": allocation,
        "calibration": calibration,
        "extra": extra,
    }

    def extra_in_files(text: str) -> str:
        document = json.loads(text)
        document["accounting"]["extra"] = extra
        for file in document["files"].values():
            file["extra"] = extra
        return dump_tables(document)

    yield Valid(
        "manifest/extra-everywhere", rules("MAN-1"), "Every object that may hold `extra` does.", repo, extra_in_files
    )

    repo = small("manifest/defaults-written")
    repo.identity(id="i", extra={})
    stage_defaults: Json = dict.fromkeys(
        ("window", "vector_length", "tile", "outer_scales", "offsets", "outer_offsets")
    )
    stage_defaults["extra"] = {}
    repo.weight("d", (2, 8), Stage(2, transform="i", keys=stage_defaults), column_scale=None, extra={})
    repo.tensors["d"]["column_scale"] = None
    repo.transforms["t"]["seed"] = None
    repo.transforms["t"]["extra"] = {}
    repo.codebooks["b"] |= {"tensor": None, "rows": None, "origin": None, "extra": {}}
    repo.tensors["norm"]["extra"] = {}
    lists: Json = {key: [] for key in ("include", "exclude", "protected_names", "protected_fragments")}
    nulls: Json = dict.fromkeys(
        [
            "seed",
            "rotation",
            "vector_length",
            "grid_size",
            "iterations",
            "scale_dtype",
            "protected_bits",
            "allocation",
            "calibration",
        ]
    )
    repo.top = {
        "base_model": {"id": "", "revision": None, "license": None, "extra": {}},
        "pipeline_tag": None,
        "quantization": {"method": "", "bits": 2, **lists, **nulls, "extra": {}},
        "tied_weights": {},
        "extra": {},
    }
    text = "Every default is written out: that means the same as leaving it out."

    def file_defaults(text: str) -> str:
        document = json.loads(text)
        for file in document["files"].values():
            file |= {"chunk_size": None, "chunks": None, "extra": {}}
        return dump_tables(document)

    yield Valid("manifest/defaults-written", rules("MAN-2"), text, repo, file_defaults)

    repo = small("manifest/quantization-full")
    repo.top["pipeline_tag"] = "text-generation"
    repo.top["base_model"] = {"id": "example/model", "revision": "0123456789abcdef", "license": "apache-2.0"}
    repo.top["quantization"] = {
        "method": "turboquant_mse",
        "bits": 2.5,
        "seed": 7,
        "rotation": "hadamard",
        "vector_length": 128,
        "grid_size": 8193,
        "iterations": 96,
        "scale_dtype": "F16",
        "include": ["*.weight"],
        "exclude": ["lm_head.*"],
        "protected_names": ["a"],
        "protected_fragments": ["embed"],
        "protected_bits": 8,
        "allocation": {"allocator": "greedy", "target_bits": 2.5, "candidate_bits": [2, 2.5, 3]},
        "calibration": {"source": "some text", "texts": 128, "tokens": 65536},
        "extra": {"knob": 1},
    }
    text = "A full record of quantization; a decoder does not need it, and the record need not match the tensors."
    yield Valid("manifest/quantization-full", rules("MAN-2"), text, repo)

    for k, kind in enumerate(
        [
            "text-generation",
            "image-text-to-text",
            "text2text-generation",
            "automatic-speech-recognition",
            "fill-mask",
            "text-classification",
            "image-classification",
            "feature-extraction",
        ]
    ):
        repo = Repo(f"manifest/loader-{k}")
        repo.loader_kind = kind
        repo.passthrough("p", "U8", (1,))
        yield Valid(f"manifest/loader-{kind}", rules("MAN-5"), f"The loader_kind {kind}.", repo)

    repo = small("manifest/key-order")

    def backwards(text: str) -> str:
        def turn(value: Any) -> Any:
            return {k: turn(v) for k, v in reversed(value.items())} if isinstance(value, dict) else value

        return dump_tables(turn(json.loads(text)))

    yield Valid("manifest/key-order", rules("MAN-3"), "The order of keys means nothing.", repo, backwards)


def container() -> Iterator[Valid]:
    repo = small("container/trailing-spaces")
    repo.header_tail = b" " * 13
    yield Valid("container/trailing-spaces", rules("PAY-2"), "Spaces behind the header's object.", repo)

    repo = small("container/metadata")
    repo.metadata = {"format": "pt", "": "", "ключ": "значение"}
    yield Valid("container/metadata", rules("PAY-2"), "A __metadata__ object of strings is ignored.", repo)

    repo = small("container/metadata-empty")
    repo.metadata = {}
    yield Valid("container/metadata-empty", rules("PAY-2"), "An empty __metadata__ object.", repo)

    repo = small("container/data-order")
    repo.order = ["norm.data", "w.scales", "w.codes"]
    yield Valid("container/data-order", rules("PAY-5"), "The data lie in another order than the header's keys.", repo)

    repo = Repo("container/header-unpadded")
    repo.alignment = 4
    repo.passthrough("a", "F32", (3,))
    repo.metadata = {"pad": "xxxx"}
    text = "The data begin at a multiple of 4, and of no more: that is enough for F32."
    yield Valid("container/header-unpadded", rules("PAY-8"), text, repo)

    repo = Repo("container/empty-unaligned")
    repo.passthrough("b", "U8", (3,))
    repo.passthrough("c", "F64", (0,))
    yield Valid(
        "container/empty-unaligned", rules("PAY-8 PAY-5"), "A tensor without elements may begin anywhere.", repo
    )

    repo = Repo("container/empty-anywhere")
    for name, length in (("a", 0), ("b", 3), ("c", 0), ("d", 2), ("e", 0)):
        repo.passthrough(name, "U8", (length,))
    text = "Tensors without elements at the start, between others and at the end."
    yield Valid("container/empty-anywhere", rules("PAY-5"), text, repo)

    for shards in (2, 3):
        repo = small(f"shards/{shards}", shards)
        text = f"{shards} shards; codes and scales of a weight lie in different ones."
        yield Valid(f"shards/{shards}", rules("SHARD-1 SHARD-2 PAY-3"), text, repo)

    repo = Repo("shards/tables-apart", 2)
    repo.dense(orthogonal(4, 2**20), "F32")
    repo.stored_book(4)
    repo.weight("w", (2, 8), Stage(2), column_scale="F16")
    yield Valid(
        "shards/tables-apart", rules("SHARD-2"), "Matrix and levels lie in other shards than codes and scales.", repo
    )


def ties() -> Iterator[Valid]:
    repo = small("ties/two-aliases")
    repo.tied = {"lm_head.weight": "w", "decoder.weight": "w", "norm2": "norm"}
    yield Valid(
        "ties/two-aliases",
        rules("TIE-1 ACC-2"),
        "Two aliases of a quantized weight and one of a passthrough tensor.",
        repo,
    )


def limits() -> Iterator[Valid]:
    """Cases for the limits, without rows so that they stay small."""
    repo = Repo("limits/paley")
    repo.hadamard(2040)
    repo.book(2)
    repo.weight("w", (0, 2040), Stage(1))
    yield Valid(
        "limits/paley-2040", rules("LIM-1 TRAN-4"), "The largest Paley I factor, in a weight without rows.", repo
    )

    repo = Repo("limits/entries")
    repo.identity()
    repo.stored_book(256, 64, values=(np.arange(256 * 64) % 251 / 64 - 2).reshape(256, 64))
    repo.weight("w", (0, 64), Stage(16))
    yield Valid(
        "limits/entries-p-64",
        rules("LIM-1 BOOK-5"),
        "16-bit symbols of 64 elements, of which 256 entries are there.",
        repo,
    )

    repo = Repo("limits/values")
    repo.identity()
    repo.book(2048, 2, values=(np.arange(4096) * 37 % 256 / 64 - 2).tolist())
    repo.weight("w", (0, 4), Stage(12))
    yield Valid("limits/values-4096", rules("LIM-1 BOOK-1"), "4,096 inline values.", repo)

    repo = Repo("limits/lcm")
    repo.identity()
    repo.book(2)
    repo.weight("w", (0, 2**18), Stage(1, tile=(4, 2**18)), Stage(1, tile=(16, 2**18)))
    text = "Tiles of 4 and 16 rows: their least common multiple, 16, times cols is 2^22."
    yield Valid("limits/tile-lcm", rules("LIM-1 CODE-2"), text, repo)


def large() -> Iterator[Valid]:
    """Weights too large to be decoded at once; their rows repeat every few, for the sake of expected.json.

    Seven rows, or tile rows, are no divisor of a power of two: a group that begins at the wrong row is noticed.
    """
    repo = Repo("large/rows")
    repo.hadamard(64)
    repo.book(2)
    symbols, scales = repo.random.integers(0, 2, (7, 64)), repo.random.fixed(16, 256, 256, (7, 1))
    stage = Stage(1, symbols=np.tile(symbols, (600, 1)), scales=np.tile(scales, (600, 1)))
    repo.weight("w", (4200, 64), stage, dtype="BF16")
    text = "268,800 elements: readers decode so many in groups of rows."
    yield Valid("large/rows", rules("LIM-2 STAGE-1"), text, repo)

    repo = Repo("large/tiles")
    repo.identity()
    repo.book(3, 8)
    symbols = np.tile(repo.random.integers(0, 3, (7, 8)), (600, 1))
    bytes_, outer = repo.random.integers(1, 256, (14, 1)), repo.random.fixed(-32, 32, 4096, (14, 1))
    factor = Factor("U8", np.tile(outer, (600, 1)), "F16", np.tile(bytes_, (600, 1)))
    repo.weight("w", (4, 2100, 32), Stage(2, tile=(2, 32), symbols=symbols, factor=factor), dtype="F16")
    text = "The same of rank 3, in tiles of two rows, with an outer scale for each row."
    yield Valid("large/tiles", rules("LIM-2 CODE-3 NUM-8"), text, repo)


def overflow() -> Iterator[Valid]:
    repo = Repo("overflow-outer")
    repo.identity()
    repo.book(2, values=[-(2.0**-40), 2.0**-40])
    stage = Stage(1, factor=Factor("U8", np.full((1, 1), 2.0**125), "F32", [[255.0], [16.0]]))
    repo.weight("w", (2, 4), stage)
    yield Valid(
        "numbers/overflow-of-outer-scales",
        rules("NUM-6 NUM-8"),
        "A scale times its outer one is beyond binary32, the element is not.",
        repo,
        result="acceptable",
        codes=["DATA.NON_FINITE"],
    )
    repo = Repo("overflow")
    repo.identity()
    repo.book(2, values=[-(2.0**100), 2.0**100])
    stage = Stage(1, scales=[[2.0**30], [2.0**28]], scale_dtype="F32")
    repo.weight("w", (2, 4), stage, column_scale=np.array([2.0**-10, 2.0**-30, -(2.0**-10), 2.0**-100]))
    yield Valid(
        "numbers/overflow-before-column-scale",
        rules("NUM-3 NUM-5"),
        "scale * level is beyond binary32, the element is not: a reader that computes in binary32 cannot decode it.",
        repo,
        result="acceptable",
        codes=["DATA.NON_FINITE"],
    )


def versions() -> Iterator[Valid]:
    repo = small("versions/minor-7")
    repo.top["format_version"] = "1.7"
    yield Valid("versions/minor-7", rules("VER-3 MAN-3"), "A later minor version with known features only.", repo)

    repo = small("versions/minor-huge")
    repo.top["format_version"] = "1.18446744073709551616"
    yield Valid("versions/minor-huge", rules("VER-3"), "A minor version is a string of digits of any length.", repo)

    repo = typical()
    repo.others = {}
    repo.top["features"] = FEATURES[::-1]
    yield Valid("versions/features-order", rules("VER-1"), "The features stand in any order.", repo)


AREAS = [
    codes,
    codebooks,
    transforms,
    scales,
    outer_scales,
    offsets,
    products,
    shapes,
    tiles,
    stages,
    passthrough,
    repository,
    json_text,
    manifest,
    container,
    ties,
    versions,
    limits,
    large,
    overflow,
]


def valid() -> list[Valid]:
    """All valid and acceptable cases that store their repository."""
    return [case for area in AREAS for case in area()]
