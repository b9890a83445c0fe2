"""Known-answer files for the parts of a decoder: SplitMix64, packing, Hadamard factors, Lloyd-Max levels."""

from __future__ import annotations

import numpy as np

from conformance import oracle
from conformance.vectors.builder import Json, Random, lloyd_max, pack, seed_signs, splitmix64


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


KNOWN = {
    "splitmix64": known_splitmix64,
    "packing": known_packing,
    "hadamard": known_hadamard,
    "lloyd_max": known_lloyd_max,
}
