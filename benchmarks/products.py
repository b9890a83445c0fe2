"""Time of y = W x with packed weights on a CPU, against torch's bf16 linear, all from memory.

    python benchmarks/products.py [--batch 1] [--threads 2] [--runs 7] [--size 4096] [--layers 16] [--only NAME ...] [--processor-time]

Needs the distribution in kernels/. Each candidate multiplies with `layers` different square weights in turn, so that none
comes from the cache; candidates take turns, medians are printed as JSON. The packed ones take a bf16 activation, rotate
it (hadamard) and give a bf16 result, all of it timed. Codes and levels are random.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import tqformat_kernels

Layer = Callable[[torch.Tensor], torch.Tensor]
# name -> bits, window, tile rows (None: codes run along rows), vector_length (None: the row), dimension
SETTINGS: dict[str, tuple[int, int | None, int | None, int | None, int]] = {
    "1 bit": (1, None, None, None, 1),
    "2 bit": (2, None, None, None, 1),
    "3 bit": (3, None, None, None, 1),
    "4 bit": (4, None, None, None, 1),
    "4 bit, scales of 32": (4, None, None, 32, 1),
    "4 bit, tiles of 256 rows": (4, None, 256, None, 1),
    "6 bit": (6, None, None, None, 1),
    "8 bit": (8, None, None, None, 1),
    "trellis 2 bit, window 12": (2, 12, 256, None, 1),
    "trellis 3 bit, window 12": (3, 12, 256, None, 1),
    "trellis 2 bit, window 12, computed": (2, 12, 256, None, 1),
    "trellis 2 bit, window 16, computed": (2, 16, 256, None, 1),
    "trellis 3 bit, window 12, computed": (3, 12, 256, None, 1),
    "8 weights in 16 bit": (16, None, None, None, 8),
}


def rotation(size: int) -> tqformat_kernels.Transform:
    """T of a hadamard transform with two Sylvester factors, as equal as can be."""
    left = 2 ** (int(math.log2(size)) // 2)
    factors = [[[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)] for n in (left, size // left)]
    return tqformat_kernels.Transform(torch.randint(0, 2, (size,)).mul(2).sub(1), factors)


def computed(window: int) -> torch.Tensor:
    """Level s is (the sum of the four bytes of s * 0x83DCD12D mod 2^32, less 510) / 128: kernels need no table."""
    hashed = torch.arange(2**window) * 0x83DCD12D
    return sum(hashed >> shift & 255 for shift in (0, 8, 16, 24)).sub(510).div(128)  # type: ignore[union-attr]


def packed(name: str, size: int) -> Layer:
    setting = SETTINGS[name]
    bits, window, tile_rows, g, p = setting
    codes = torch.randint(
        0, 256, (size // (tile_rows or 1), size * (tile_rows or 1) * bits // p // 8), dtype=torch.uint8
    )
    codes = codes.view(size // tile_rows * size, -1) if tile_rows else codes
    scales = torch.rand(size, size // (g or size)).to(torch.float16)
    levels = computed(window or bits) if "computed" in name else torch.randn(2 ** (window or bits), p).half()
    stage = tqformat_kernels.Stage(
        codes, levels, scales, shape=(size, size), bits=bits, window=window,
        vector_length=g, tile=(tile_rows, 1) if tile_rows else None,
    )  # fmt: skip
    return tqformat_kernels.Weight([stage], [rotation(size)]).linear  # type: ignore[no-any-return]


def plain(size: int) -> Layer:
    weight = torch.randn(size, size).bfloat16()
    return lambda x: torch.nn.functional.linear(x, weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--only", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--forms", nargs="*", default=list(tqformat_kernels.forms()), help="default: all that run here")
    parser.add_argument(
        "--processor-time", action="store_true", help="of all threads, for a machine that is busy; see --threads 1"
    )
    args = parser.parse_args()
    clock = time.process_time if args.processor_time else time.perf_counter
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    x = torch.randn(args.batch, args.size).bfloat16()
    layers = {"bf16 linear": [plain(args.size) for _ in range(args.layers)]}
    layers |= {name: [packed(name, args.size) for _ in range(args.layers)] for name in args.only}
    candidates = [("bf16 linear", "")] + [(name, form) for name in args.only for form in args.forms]
    times: dict[tuple[str, str], list[float]] = {candidate: [] for candidate in candidates}
    for turn in range(args.runs + 1):  # the first turn warms up and is not counted
        for name, form in candidates:
            if form:
                tqformat_kernels.set_form(form)
            start = clock()
            for layer in layers[name]:
                layer(x)
            if turn:
                times[name, form].append((clock() - start) / (args.layers * args.size**2) * 1e9)
    base = statistics.median(times["bf16 linear", ""])
    report: dict[str, Any] = {
        "what": f"batch {args.batch}, {args.layers} x {args.size} x {args.size}, {args.threads} threads"
        + ", processor time" * args.processor_time
    }
    for (name, form), seen in times.items():
        median = statistics.median(seen)
        report[f"{name}, {form}" if form else name] = {
            "ns_per_weight": round(median, 3),
            "range": [round(min(seen), 3), round(max(seen), 3)],
            "times_as_fast_as_bf16": round(base / median, 2),
        }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
