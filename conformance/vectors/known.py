"""Known-answer files for the parts of a decoder: from SplitMix64 and packing to scales of two levels and products."""

from __future__ import annotations

import numpy as np

from conformance import oracle
from conformance.vectors.builder import (
    Factor,
    Json,
    Random,
    Raw,
    Repo,
    Stage,
    lloyd_max,
    pack,
    product,
    seed_signs,
    splitmix64,
)


def known_splitmix64() -> Json:
    """Outputs and signs of seeds; 64-bit integers are in hexadecimal, as JSON's do not reach that far [TQ-JSON-4]."""
    seeds = [0, 1, 7, 1234567, 2**32, 2**53 - 1]
    sizes = [1, 2, 4, 8, 12, 63, 64, 65, 576]
    return {
        "rules": ["TQ-TRAN-5", "TQ-TRAN-6"],
        "outputs": {str(seed): [f"{z:016x}" for z in splitmix64(seed, 8)] for seed in seeds},
        "signs": [
            {"seed": seed, "size": size, "signs": seed_signs(seed, size)}
            for seed in (0, 7, 2**53 - 1)
            for size in sizes
        ],
    }


def known_packing() -> Json:
    """Streams of one tile: `hex` unpacks to `symbols`; where window = bits, packing the symbols gives `hex`."""
    random = Random("known/packing")
    table = []
    for n, bits, window in [
        *((11, bits, bits) for bits in range(1, 17)),
        *((1, bits, bits) for bits in (1, 7, 8, 9, 16)),
        (4, 1, 3),
        *(
            (13, bits, window)
            for bits, window in ((1, 2), (1, 8), (1, 12), (2, 8), (2, 16), (3, 10), (4, 12), (5, 16), (7, 8), (15, 16))
        ),
        *((n, 2, 8) for n in (4, 5, 6, 7, 8)),
        (16, 1, 16),
    ]:
        stream = random.integers(0, 2, [n * bits]).astype(np.uint8)
        codes = np.packbits(stream, bitorder="little")
        symbols = oracle.unpack(codes.reshape(1, -1), n, bits, window)
        if window == bits and pack(symbols, bits) != codes.tobytes():
            raise AssertionError("packing does not invert unpacking")
        table.append(
            {"n": n, "bits": bits, "window": window, "hex": codes.tobytes().hex(), "symbols": symbols[0].tolist()}
        )
    return {"rules": ["TQ-CODE-5", "TQ-CODE-6"], "tiles": table}


def known_hadamard() -> Json:
    """Rows of H_f as strings of + and -."""
    kinds = {2: "sylvester", 4: "sylvester", 8: "sylvester", 16: "sylvester"}
    kinds |= {12: "paley-1", 20: "paley-1", 24: "paley-1", 44: "paley-1", 48: "paley-1", 60: "paley-1"}
    kinds |= {28: "paley-2", 36: "paley-2", 76: "paley-2"}
    rows = {f: ["".join("+" if x > 0 else "-" for x in row) for row in oracle.hadamard_factor(f)] for f in kinds}
    orders = [f for f in range(2, 200) if not has_factor(f)]
    return {
        "rules": ["TQ-TRAN-4"],
        "factors": [{"order": f, "construction": kinds[f], "rows": rows[f]} for f in sorted(kinds)],
        "no_factor": {"below": 200, "orders": orders},
    }


def has_factor(f: int) -> bool:
    try:
        oracle.hadamard_factor(f)
    except ValueError:
        return False
    return True


def known_lloyd_max() -> Json:
    """Levels of [TQ-BOOK-7], each within `tolerance` of the construction in binary64."""
    table = []
    for entries, d, grid, iterations in [
        (2, 1, 1025, 96),
        (2, 3, 8193, 96),
        (4, 3, 8193, 96),
        (4, 4, 8193, 96),
        (3, 16, 8193, 96),
        (8, 16, 8193, 96),
        (4, 64, 8193, 96),
        (4, 1024, 8193, 96),
        (8, 1024, 8193, 96),
        (16, 1024, 8193, 96),
        (16, 65536, 8193, 96),
        (1, 128, 3, 1),
        (4, 128, 101, 1),
        (256, 4096, 65537, 96),
    ]:
        levels = lloyd_max(entries, d, grid, iterations)
        table.append(
            {"entries": entries, "vector_length": d, "grid_size": grid, "iterations": iterations, "levels": levels}
        )
    return {"rules": ["TQ-BOOK-7"], "tolerance": 1e-5, "levels": table}


def known_float8() -> Json:
    """The value of each byte, in the order of bytes; null is NaN."""
    tables = {
        dtype: [None if np.isnan(value) else value.hex() for value in table.tolist()]
        for dtype, table in oracle.FLOAT8.items()
    }
    return {"rules": ["TQ-NUM-8"], "values": tables}


def payload_of(repo: Repo) -> oracle.Payload:
    return {name: (raw.dtype, raw.shape, raw.data) for name, raw in repo.payload.items()}


def shown(raw: Raw) -> Json:
    return {"dtype": raw.dtype, "shape": list(raw.shape), "hex": raw.data.hex()}


def known_scales() -> Json:
    """Scales or offsets `stored` [rows, vectors], times `outer`, are `values`, row by row."""
    repo = Repo("known/scales")
    table: list[Json] = []
    for dtype, vectors, outer, outer_dtype in (
        ("U8", (2, 4), (2, 2), "F16"),
        ("I8", (2, 4), (1, 1), "BF16"),
        ("F8_E4M3", (3, 6), (3, 3), "F32"),
        ("F8_E8M0", (3, 6), (1, 2), "F16"),
        ("I8", (3, 6), (3, 6), "F32"),
        ("U8", (1, 6), (1, 3), "F32"),
    ):
        record: Json = {}
        repo.factor(record, str(len(table)), "scales", Factor(dtype, outer, outer_dtype), vectors)
        values = oracle.vector_values(record, "scales", payload_of(repo))
        stored, outer_raw = (repo.payload[record[key]] for key in ("scales", "outer_scales"))
        hexes = [value.hex() for value in values.ravel().tolist()]
        table.append({"stored": shown(stored), "outer": shown(outer_raw), "values": hexes})
    return {"rules": ["TQ-NUM-8", "TQ-NUM-9"], "scales": table}


def known_stages() -> Json:
    """Levels by their symbols, times scales, plus offsets, all row by row: `before`; and T^-1 of it: `after`.

    The transform is `hadamard` of `factors` and `signs`; `vector_length` may be smaller than its size, or larger.
    """
    table: list[Json] = []
    for factors, cols, length, with_offsets in (
        ((4,), 8, 4, True),
        ((4,), 8, 8, True),
        ((8,), 16, 2, False),
        ((8,), 16, 2, True),
        ((12, 2), 24, 3, True),
    ):
        repo = Repo(f"known/stages-{len(table)}")
        repo.hadamard(*factors)
        repo.book(4)
        repo.weight("w", (2, cols), Stage(2, vector_length=length, offsets=Factor("F32") if with_offsets else None))
        stage, parts = repo.tensors["w"]["stages"][0], payload_of(repo)
        (part,) = oracle.decode_stage(stage, repo.manifest(), parts, (2, cols))
        numbers = {
            "levels": repo.codebooks["b"]["values"],
            "scales": oracle.vector_values(stage, "scales", parts).ravel().tolist(),
            "offsets": oracle.vector_values(stage, "offsets", parts).ravel().tolist() if with_offsets else [],
            "before": (part.product + part.offset).ravel().tolist(),
            "after": part.exact.ravel().tolist(),
        }
        symbols = oracle.unpack(np.frombuffer(repo.payload["w.codes"].data, np.uint8).reshape(2, -1), cols, 2, 2)
        about = {
            "shape": [2, cols],
            "vector_length": length,
            **{k: repo.transforms["t"][k] for k in ("factors", "signs")},
        }
        hexes = {key: [value.hex() for value in values] for key, values in numbers.items()}
        table.append(about | {"symbols": symbols.ravel().tolist()} | hexes)
    return {"rules": ["TQ-TRAN-1", "TQ-NUM-9", "TQ-STAGE-1"], "stages": table}


def known_permutation() -> Json:
    """T^-1 of the integers 0 to B - 1 under the permutation `index` is `inverse`."""
    random = Random("known/permutation")
    table: list[Json] = []
    for size in (1, 2, 4, 7, 16):
        index = np.argsort(random.words(size), kind="stable").astype("<i4")
        inverse = oracle.inverse_permutation({"index": "i"}, {"i": ("I32", (size,), index.tobytes())})
        table.append(
            {
                "index": index.tolist(),
                "inverse": inverse(np.arange(size, dtype=np.float64)[None])[0].astype(int).tolist(),
            }
        )
    return {"rules": ["TQ-TRAN-9"], "permutations": table}


def known_products() -> Json:
    """y and `bound` (A) of T^-1 of the values u = `scale_level` plus `offset` with x, for one row in blocks of B."""
    table: list[Json] = []
    for factors, cols, length in (((4,), 8, 4), ((12,), 24, 6), ((2, 4), 16, 16)):
        repo = Repo(f"known/products-{len(table)}")
        repo.hadamard(*factors)
        repo.book(8)
        repo.weight("w", (1, cols), Stage(3, vector_length=length, offsets=Factor("F16")))
        repo.multiply("w")
        manifest, parts = repo.manifest(), payload_of(repo)
        (part,) = oracle.decode_stage(repo.tensors["w"]["stages"][0], manifest, parts, (1, cols))
        values = {"scale_level": part.product, "offset": part.offset}
        found = product(manifest, parts, "w", repo.products[0][1])
        about = {key: repo.transforms["t"][key] for key in ("factors", "signs")}
        hexes = {key: [value.hex() for value in each.ravel().tolist()] for key, each in values.items()}
        table.append(about | hexes | {key: found[key] for key in ("x", "y", "bound")})
    return {"rules": ["TQ-FUSE-1", "TQ-FUSE-2"], "products": table}


KNOWN = {
    "splitmix64": known_splitmix64,
    "packing": known_packing,
    "hadamard": known_hadamard,
    "lloyd_max": known_lloyd_max,
    "float8": known_float8,
    "scales": known_scales,
    "stages": known_stages,
    "permutation": known_permutation,
    "products": known_products,
}
