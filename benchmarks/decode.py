"""Time to have all weights of a model as bf16 tensors: this format, GGUF's own decoder, and a plain bf16 file.

    python benchmarks/decode.py REPO [--gguf FILE] [--checkpoint DIR] [--device cpu] [--runs 5]

The candidates take turns, so that a machine that slows down slows all of them; medians and the ratio to the plain file are
printed as JSON. Nothing is verified by digest, files come from the page cache, and each decode starts from closed files.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import tqformat


def decode_repo(path: str, device: str) -> int:
    with tqformat.open_repo(path, verify=False) as repo:
        return sum(repo.dequantize(name, device).numel() for name in repo.names())


def decode_gguf(path: str, device: str) -> int:
    from gguf import GGUFReader, dequantize

    count = 0
    for tensor in GGUFReader(path).tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).to(device, torch.bfloat16)
        count += values.numel()
    return count


def read_plain(path: str, device: str) -> int:
    from safetensors import safe_open

    count = 0
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, "pt", device=device) as tensors:
            count += sum(tensors.get_tensor(name).clone().numel() for name in tensors.keys())  # noqa: SIM118
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo")
    parser.add_argument("--gguf")
    parser.add_argument("--checkpoint")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    candidates: dict[str, Callable[[], int]] = {"tqformat": lambda: decode_repo(args.repo, args.device)}
    if args.gguf:
        candidates["gguf"] = lambda: decode_gguf(args.gguf, args.device)
    if args.checkpoint:
        candidates["plain bf16"] = lambda: read_plain(args.checkpoint, args.device)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    counts = {}
    for turn in range(args.runs + 1):  # the first turn warms up and is not counted
        for name, run in candidates.items():
            start = time.perf_counter()
            counts[name] = run()
            if args.device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["plain bf16"]) if "plain bf16" in seconds else None
    report = {
        name: {
            "weights": counts[name],
            "seconds": round(statistics.median(times), 3),
            "range": [round(min(times), 3), round(max(times), 3)],
            "ns_per_weight": round(statistics.median(times) / counts[name] * 1e9, 2),
            "ratio_to_plain": round(statistics.median(times) / base, 2) if base else None,
        }
        for name, times in seconds.items()
    }
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(json.dumps({"device": device, "runs": args.runs, **report}, indent=2))


if __name__ == "__main__":
    main()
