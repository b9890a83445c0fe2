"""How fast text comes, and in how much memory: packed releases beside the plain model and other programs, in one run.

    python benchmarks/generate.py BASE --repo REPO... [--gguf FILE...] [--runs 5] [--prompt 32] [--tokens 64] [--out FILE.md]

BASE is the plain checkpoint that the releases come from. Greedy decoding of one sequence; every run is a fresh process, and
the candidates take turns. Seconds to load count from the path to the model, those to the first token from the path to that
token, imports before both; "weights read" reads one weight of each page of the mapped file, too; tokens a second are those
after the first; the peak is that of the process's resident memory, libraries included, of which the first row tells how
much they are. Peers that are not in the extras of this package are installed by hand, with --no-deps: bitsandbytes (NF4 in
transformers), ik-llama-cpp-python or llama-cpp-python (GGUF files). What is not there is listed as left out.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from load import child_of, machine
from load_measures import model_class, peak_memory

Generate = Callable[[int], Any]  # so many new tokens
LLAMA = ("ik_llama_cpp", "llama_cpp")


def libraries(path: str, prompt: list[int]) -> Generate:
    return lambda tokens: None


def transformers_model(build: Callable[[str], Any]) -> Callable[[str, list[int]], Generate]:
    """A model of transformers, however it is built."""

    def ready(path: str, prompt: list[int]) -> Generate:
        import torch

        model, ids = build(path), torch.tensor([prompt])
        mask = torch.ones_like(ids)

        def generate(tokens: int) -> Any:
            options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "attention_mask": mask}
            with torch.inference_mode():
                return model.generate(ids, pad_token_id=0, **options)

        return generate

    return ready


def plain(path: str) -> Any:
    import torch

    return model_class(path).from_pretrained(path, dtype=torch.bfloat16)


def plain_read(path: str) -> Any:
    model = plain(path)
    for weight in model.state_dict().values():
        weight.reshape(-1)[:: 4096 // weight.element_size()].sum()
    return model


def nf4(path: str) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    options = {"quantization_config": BitsAndBytesConfig(**four), "device_map": "cpu", "dtype": torch.bfloat16}
    return model_class(path).from_pretrained(path, **options)


def ours(packed: bool) -> Callable[[str], Any]:
    def build(path: str) -> Any:
        import tqformat

        return tqformat.load(path, packed=packed)

    return build


def llama(path: str, prompt: list[int]) -> Generate:
    """llama.cpp, or its fork, in as many threads as torch takes."""
    import torch

    name = next(name for name in LLAMA if importlib.util.find_spec(name))
    module, threads = importlib.import_module(name), torch.get_num_threads()
    if name == "ik_llama_cpp":
        model = module.IkLlama(path, n_ctx=512, n_threads=threads, verbose=False)
        return lambda tokens: model.generate(prompt, max_tokens=tokens)
    model = module.Llama(path, n_ctx=512, n_threads=threads, verbose=False)

    def generate(tokens: int) -> Any:
        model.reset()
        return [token for _, token in zip(range(tokens), model.generate(prompt, top_k=1), strict=False)]

    return generate


WAYS: dict[str, Callable[[str, list[int]], Generate]] = {
    "libraries alone": libraries,
    "bf16, transformers": transformers_model(plain),
    "bf16, weights read": transformers_model(plain_read),
    "decoded": transformers_model(ours(packed=False)),
    "packed": transformers_model(ours(packed=True)),
    "NF4, bitsandbytes": transformers_model(nf4),
    "GGUF, llama.cpp": llama,
}


def measure(way: str, path: str, prompt: str, tokens: str) -> dict[str, float]:
    """One run of one way, in this process."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if way.startswith("bf16") or (Path(path) / "config.json").exists():
        model_class(path)
        import tqformat.packed  # noqa: F401
    torch.ones(2**16).sum().item()  # starts torch's threads
    peak_memory(reset=True)
    start = time.perf_counter()
    generate = WAYS[way](path, [100 + i for i in range(int(prompt))])
    load = time.perf_counter() - start
    generate(1)
    first = time.perf_counter() - start
    spent = []
    for count in (1, int(tokens)):
        start = time.perf_counter()
        generate(count)
        spent.append(time.perf_counter() - start)
    speed = (int(tokens) - 1) / (spent[1] - spent[0]) if way != "libraries alone" else 0.0
    return {"load": load, "first": first, "speed": speed, "peak": peak_memory()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--repo", type=Path, nargs="+", default=[], help="releases of BASE")
    parser.add_argument("--gguf", type=Path, nargs="+", default=[], help="GGUF files of BASE, for llama.cpp")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens")
    parser.add_argument("--out", type=Path, help="a file for the table, which is printed, too")
    args = parser.parse_args()
    left_out = []
    candidates = [("libraries alone", args.base), ("bf16, transformers", args.base)]
    candidates += [("bf16, weights read", args.base)]
    candidates += [(way, repo) for repo in args.repo for way in ("decoded", "packed")]
    for way, packages, paths in (
        ("NF4, bitsandbytes", ("bitsandbytes",), [args.base]),
        ("GGUF, llama.cpp", LLAMA, args.gguf),
    ):
        if any(map(importlib.util.find_spec, packages)):
            candidates += [(way, path) for path in paths]
        elif paths:
            left_out.append(f"{way}: none of {', '.join(packages)} is installed")
    seen: list[list[dict[str, float]]] = [[] for _ in candidates]
    failed: dict[tuple[str, Path], str] = {}
    for turn in range(args.runs):
        for (way, path), found in zip(candidates, seen, strict=True):
            print(f"turn {turn + 1} of {args.runs}: {way} {path.name}", file=sys.stderr)
            try:
                found.append(child_of(__file__, way, str(path), str(args.prompt), str(args.tokens)))
            except subprocess.CalledProcessError as error:  # its message is above
                failed[way, path] = f"{way}, {path.name}: it ended with status {error.returncode}"
    left_out += failed.values()
    seen = [found for each, found in zip(candidates, seen, strict=True) if each not in failed]
    candidates = [each for each in candidates if each not in failed]
    middle = [{key: statistics.median(each[key] for each in found) for key in found[0]} for found in seen]
    lines = [
        f"{machine()}; {args.runs} runs; prompt {args.prompt}, {args.tokens} new tokens; {time.strftime('%d %B %Y')}",
        "",
    ]
    lines += [
        "| what | file | tokens a second (range) | against bf16 | seconds to load | to the first token | peak, MiB |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for (way, path), found, row in zip(candidates, seen, middle, strict=True):
        low, high = (end(each["speed"] for each in found) for end in (min, max))
        speed, ratio = f"{row['speed']:.1f} ({low:.1f} to {high:.1f})", f"{row['speed'] / middle[1]['speed']:.2f}"
        if way == "libraries alone":
            speed = ratio = ""
        times = f"{row['load']:.2f} | {row['first']:.2f}"
        lines.append(f"| {way} | {path.name} | {speed} | {ratio} | {times} | {row['peak'] / 2**20:.0f} |")
    lines += ["", *(f"Left out: {reason}." for reason in left_out)]
    table = "\n".join(lines).rstrip() + "\n"
    if args.out:
        args.out.write_text(table, "utf-8")
    print(table)


if __name__ == "__main__":
    if len(sys.argv) == 5 and sys.argv[1] in WAYS:
        print(json.dumps(measure(*sys.argv[1:])))
    else:
        main()
