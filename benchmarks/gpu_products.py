"""Time of y = W x with packed weights on a GPU, against torch's bf16 linear, all from memory.

    python benchmarks/gpu_products.py [--batch 1 4 16] [--shape 4096x4096 14336x4096] [--runs 20] [--json FILE]
    TRITON_INTERPRET=1 python benchmarks/gpu_products.py --toy

Each candidate multiplies with so many different weights in turn that none comes from the cache; all of a turn stands in one
CUDA graph, so that the time of launching from Python is not counted. "product" is tqformat.products_triton alone, "rotated"
the same from a bf16 activation to a bf16 result: hadamard, factors as equal as can be. Medians of `--runs` turns, in
microseconds a product. Before it is timed, a product is compared with float64 sums [TQ-FUSE-2]. Codes and levels are random.
`--toy` runs everything once, small, on the CPU in Triton's interpreter: its times mean nothing.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from reference_quantizer.codes.rotation import hadamard_factors
from tqformat import products_triton
from tqformat.load_quantized import Transform, unpack
from tqformat.packed import forward_transform

MEMORY = 1 << 28  # bytes that a turn reads at least: several times what caches hold
CHECKED = 64  # rows that are compared


class Setting(NamedTuple):
    """How a candidate's weights are coded."""

    bits: int
    window: int = 0  # 0: bits
    tile_rows: int = 1
    computed: bool = False


SETTINGS = {
    "2 bit": Setting(2),
    "3 bit": Setting(3),
    "4 bit": Setting(4),
    "8 bit": Setting(8),
    "trellis 2 bit, window 12, table": Setting(2, 12, 256),
    "trellis 3 bit, window 12, table": Setting(3, 12, 256),
    "trellis 4 bit, window 12, table": Setting(4, 12, 256),
    "trellis 2 bit, window 12, computed": Setting(2, 12, 256, True),
    "trellis 2 bit, window 16, computed": Setting(2, 16, 256, True),
    "trellis 3 bit, window 16, computed": Setting(3, 16, 256, True),
}
Product = Callable[[Tensor], Tensor]


def make_stage(s: Setting, rows: int, cols: int, device: str) -> products_triton.Stage:
    """A stage with random codes."""
    n, window = s.tile_rows if s.tile_rows > 1 else cols, s.window or s.bits
    codes = torch.randint(0, 256, (rows * cols // n, n * s.bits // 8), dtype=torch.uint8, device=device)
    levels = products_triton.byte_sum(1 << window) if s.computed else torch.randn(1 << window).half()
    scales = torch.rand(rows, 1, device=device).half()
    tile = (s.tile_rows, 1) if s.tile_rows > 1 else None
    stage = products_triton.stage(codes, levels, scales, shape=(rows, cols), bits=s.bits, window=window, tile=tile)
    assert stage is not None and stage.computed == s.computed
    return stage


def error(stage: products_triton.Stage, batch: int) -> float:
    """The largest |y' - y| / A of the first rows and the last tile's, against float64 sums."""
    (rows, cols), n, worst = stage.shape, stage.tile_rows, 0.0
    z = torch.randn(batch, cols, device=stage.codes.device)
    y = stage.product(z)
    height = n if n > 1 else min(rows, CHECKED)
    for first in (0, rows - height):
        tiles = stage.codes[first * cols // n :][: height * cols // n] if n > 1 else stage.codes[first:][:height]
        symbols = unpack(tiles.contiguous().view(torch.uint8).cpu(), n if n > 1 else cols, stage.bits, stage.window)
        symbols = symbols.long().reshape(-1, n).reshape(1, cols, n).transpose(1, 2) if n > 1 else symbols.long()
        u = stage.levels.cpu().double()[symbols.reshape(height, cols)] * stage.scales[first:][:height].cpu().double()
        difference = (y[:, first:][:, :height].cpu().double() - z.cpu().double() @ u.t()).abs()
        bound = z.cpu().double().norm(dim=1)[:, None] * u.norm(dim=1)
        worst = max(worst, float((difference / bound).max()))
    return worst


def rotation(size: int, device: str) -> Product:
    """T of the hadamard transform that encoders choose, as packed weights compute it."""
    factors = tuple(hadamard_factors(size) or ())
    t = Transform(kind="hadamard", size=size, factors=factors, signs="5a" * (size // 8))
    return forward_transform(t, lambda key: torch.empty(0), torch.device(device))


def seconds(products: list[Product], x: Tensor, runs: int) -> float:
    """The median time of a product, each with the next weights."""
    if x.device.type == "cpu":
        start = time.perf_counter()
        for product in products:
            product(x)
        return (time.perf_counter() - start) / len(products)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiles kernels and fills torch's pools before anything is recorded
        for _ in range(2):
            for product in products:
                product(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product(x)
    graph.replay()
    found = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1000)
    return statistics.median(found) / len(products)


def measure(name: str, shape: tuple[int, int], batches: list[int], device: str, runs: int) -> dict[str, Any]:
    """Microseconds of a candidate at each batch, `product` and `rotated`, and the largest error over A."""
    rows, cols = shape
    x = {batch: torch.randn(batch, cols, device=device).bfloat16() for batch in batches}
    layers: list[Product]
    if name == "bf16 linear":
        count = 1 if device == "cpu" else max(2, -(-MEMORY // (2 * rows * cols)))
        weights = [torch.randn(rows, cols, device=device).bfloat16() for _ in range(count)]
        layers = [lambda x, w=w: torch.nn.functional.linear(x, w) for w in weights]  # type: ignore[misc]
        return {"rotated": {b: 1e6 * seconds(layers, x[b], runs) for b in batches}}
    s = SETTINGS[name]
    count = 1 if device == "cpu" else max(2, -(-8 * MEMORY // (s.bits * rows * cols)))
    stages = [make_stage(s, rows, cols, device) for _ in range(count)]
    worst = max(error(stages[0], batch) for batch in batches)
    if not worst <= 2**-14:
        raise SystemExit(f"{name}, {rows} x {cols}: wrong by {worst:.3g} A, where grade 14 allows {2**-14:.3g} A")
    rotate = rotation(cols, device)
    whole = [lambda x, p=stage.product: p(rotate(x.float())).bfloat16() for stage in stages]  # type: ignore[misc]
    found: dict[str, Any] = {"error": f"2^{math.log2(worst):.1f} A" if worst else "0"}
    found["product"] = {b: 1e6 * seconds([stage.product for stage in stages], x[b].float(), runs) for b in batches}
    return found | {"rotated": {b: 1e6 * seconds(whole, x[b], runs) for b in batches}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--shape", nargs="+", default=["4096x4096", "14336x4096"], help="rows x columns")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    parser.add_argument("--toy", action="store_true", help="small, on the CPU, in Triton's interpreter")
    args = parser.parse_args()
    device = "cpu" if args.toy else "cuda"
    if not args.toy and not torch.cuda.is_available():
        raise SystemExit(
            "no GPU: TRITON_INTERPRET=1 python benchmarks/gpu_products.py --toy shows that the script runs"
        )
    torch.manual_seed(0)
    shapes = ["256x64"] if args.toy else args.shape
    machine = (
        f"{platform.processor() or 'CPU'}, interpreted: times mean nothing"
        if args.toy
        else torch.cuda.get_device_name()
    )
    print(f"{machine}; torch {torch.__version__}, triton {triton.__version__}")
    report: dict[str, Any] = {"machine": machine, "torch": torch.__version__, "triton": triton.__version__}
    for text in shapes:
        rows, cols = map(int, text.split("x"))
        print(
            f"\n{rows} x {cols}; microseconds, and times as fast as bf16\n\n| weights | {' | '.join(f'batch {b}: product | rotated | as fast' for b in args.batch)} | error |"
        )
        print("|---" * (3 * len(args.batch) + 2) + "|")
        base = None
        for name in ["bf16 linear", *args.only]:
            found = report.setdefault(text, {})[name] = measure(name, (rows, cols), args.batch, device, args.runs)
            base = base or found["rotated"]
            cells = [
                cell
                for b in args.batch
                for cell in (
                    f"{found['product'][b]:.1f}" if "product" in found else "",
                    f"{found['rotated'][b]:.1f}",
                    f"{base[b] / found['rotated'][b]:.2f}",
                )
            ]
            print(f"| {name} | {' | '.join(cells)} | {found.get('error', '')} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
