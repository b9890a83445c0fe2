"""Time to find the codes of one weight with error feedback: numba's loops and C's on the CPU, torch on a device, Triton on a GPU.

    python benchmarks/search.py [--device cuda] [--bits 2] [--window 12] [--rows 2048] [--cols 512] [--tile-rows 256] [--runs 3] [--cpu-only]

Weights are normally distributed, levels random, and the Hessian is that of correlated inputs: the time depends on none of
them. The candidates take turns; the first turn compiles and is not counted. Time grows with rows times columns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
import tqformat_kernels
from torch import Tensor

from reference_quantizer.codes import feedback, search_torch, trellis
from reference_quantizer.codes.trellis import initial_levels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--window", type=int, default=12)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--cols", type=int, default=512)
    parser.add_argument("--tile-rows", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cpu-only", action="store_true", help="leave out torch, which takes minutes on a CPU")
    args = parser.parse_args()
    if args.window > args.bits and args.rows % args.tile_rows:
        parser.error(f"--rows {args.rows}: expected a multiple of --tile-rows {args.tile_rows}")

    torch.manual_seed(0)
    y, mix = torch.randn(args.rows, args.cols), torch.randn(args.cols, args.cols)
    scales = y.square().mean(1, keepdim=True).sqrt()
    upper = feedback.inverse_factor(mix @ mix.T)
    levels = torch.from_numpy(initial_levels(args.bits, args.window, np.random.default_rng(0)))
    levels = levels if args.window > args.bits else levels.sort().values
    settings = (args.bits, args.window, args.tile_rows)
    given = (y, scales, torch.ones(args.rows), upper, levels)
    there = tuple(part.to(args.device) for part in given)

    def plain() -> Tensor:
        with mock.patch.object(search_torch, "load_triton", lambda: None):
            return search_torch.search(*there, *settings).cpu()  # .cpu() waits for the device

    def numba() -> Tensor:
        with mock.patch.object(trellis, "compiled_search", lambda bits, window: None):
            return feedback._search(*given, *settings)

    threads = f"cpu, {torch.get_num_threads()} threads"
    candidates: dict[str, Callable[[], Tensor]] = {f"numba, {threads}": numba}
    if args.window > args.bits and trellis.compiled_search(args.bits, args.window):
        candidates[f"C ({tqformat_kernels.form()}), {threads}"] = lambda: feedback._search(*given, *settings)
    if not args.cpu_only:
        candidates[f"torch, {args.device}"] = plain
    if args.device.startswith("cuda") and search_torch.load_triton():
        candidates[f"triton, {args.device}"] = lambda: search_torch.search(*there, *settings).cpu()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    found = {}
    for turn in range(args.runs + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            found[name] = run()
            if turn:
                seconds[name].append(time.perf_counter() - start)

    name = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else args.device
    print(
        f"{args.rows} x {args.cols}, {args.bits} bits, window {args.window}, tiles of {args.tile_rows} rows; {name}\n"
    )
    first, *_ = (statistics.median(times) for times in seconds.values())
    print("| candidate | median s (range) | µs per weight | speed-up |\n|---|---|---|---|")
    for candidate, times in seconds.items():
        median = statistics.median(times)
        span = f"{median:.3f} ({min(times):.3f} to {max(times):.3f})"
        print(f"| {candidate} | {span} | {median / y.numel() * 1e6:.3f} | {first / median:.2f} |")
    one, *others = found.values()
    shares = ", ".join(f"{float((one == other).float().mean()):.4%}" for other in others)
    print(f"\nsymbols equal to those of the first: {shares}")


if __name__ == "__main__":
    main()
