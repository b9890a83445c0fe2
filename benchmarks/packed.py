"""A packed model beside the decoded one: memory, the same text, divergence, tokens a second.

    python benchmarks/packed.py REPO --text wikitext2_raw_test.txt [--windows 4] [--tokens 64] [--rounds 5]
    python benchmarks/packed.py REPO --text wikitext2_raw_test.txt --kl [--windows 4] [--length 128]

Speeds are medians of interleaved rounds, so that what else the machine does meets both. With --kl nothing but divergences
of the path for single tokens: each window is read token by token, with a cache, in float32 and in bfloat16.
"""

import argparse
import functools
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import tqformat
from tqformat import packed

PROMPTS = ("The capital of France is", "Once upon a time, there was", "To sort a list in Python,", "Water boils when")


def generate(model: Any, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)  # type: ignore[no-any-return]


def first_difference(plain: Any, a: torch.Tensor, b: torch.Tensor) -> str:
    """Where two texts part, and how far apart the decoded model holds the two tokens there, in logits."""
    if torch.equal(a, b):
        return "equal"
    at = int((a[0] != b[0]).nonzero()[0])
    with torch.no_grad():
        logits = plain(a[:, :at]).logits[0, -1].float()
    gap = float(logits[a[0, at]] - logits[b[0, at]])
    return f"differ from token {at} on, where the decoded model's logits of the two are {gap:.3f} apart"


def divergence(plain: Any, model: Any, ids: torch.Tensor, windows: int, length: int = 256) -> list[float]:
    """Mean KL divergence, in nats per token, of each window."""
    found = []
    for i in range(windows):
        window = ids[:, i * length : (i + 1) * length]
        with torch.no_grad():
            p, q = (m(window).logits[0].float().log_softmax(-1) for m in (plain, model))
        found.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return found


def log_probabilities(model: Any, window: torch.Tensor, single: bool) -> torch.Tensor:
    """Of the next token at each place of window [1, n], float32 [n, entries]; `single`: one token a step."""
    with torch.no_grad():
        if not single:
            return model(window).logits[0].float().log_softmax(-1)  # type: ignore[no-any-return]
        cache, steps = None, []
        for token in window.split(1, dim=1):
            out = model(token, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits[0, -1].float().log_softmax(-1))
        return torch.stack(steps)


def load_exact(repo: str) -> Any:
    """The decoded model in float32, its weights not rounded to the dtype of the repository first [TQ-NUM-3]."""
    model = tqformat.load(repo, dtype=torch.float32, packed=True)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(weight, packed.PackedWeight):
                value = weight.like(entry=replace(weight.entry, dtype="F32")).decode()
                setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    return model


def print_divergences(repo: str, ids: torch.Tensor, windows: int, length: int) -> None:
    """Mean KL(a || b) by window, in nats per token, and their mean, for pairs of ways to run the model.

    "exact": decoded, in float32, weights not rounded to the repository's dtype; "many": all tokens of a window at once.
    """
    seen: dict[tuple[str, str, str], list[torch.Tensor]] = {}
    parts = [ids[:, i * length : (i + 1) * length] for i in range(windows)]
    for dtype in ("float32", "bfloat16"):
        for kind in ("exact", "decoded", "packed") if dtype == "float32" else ("decoded", "packed"):
            load = functools.partial(tqformat.load, dtype=getattr(torch, dtype), packed=kind == "packed")
            model = load_exact(repo) if kind == "exact" else load(repo)
            for steps in ("single", "many") if kind == "decoded" else ("single",):
                seen[dtype, kind, steps] = [log_probabilities(model, part, steps == "single") for part in parts]
    print(f"KL divergence of {windows} windows of {parts[0].shape[1]} tokens (a || b): mean, and window by window")
    for a, b in (
        (("float32", "exact", "single"), ("float32", "packed", "single")),
        (("float32", "exact", "single"), ("float32", "decoded", "single")),
        (("float32", "decoded", "single"), ("float32", "packed", "single")),
        (("bfloat16", "decoded", "single"), ("bfloat16", "packed", "single")),
        (("bfloat16", "decoded", "single"), ("bfloat16", "decoded", "many")),
        (("float32", "decoded", "single"), ("bfloat16", "decoded", "single")),
        (("float32", "exact", "single"), ("bfloat16", "packed", "single")),
    ):
        found = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(seen[a], seen[b], strict=True)]
        print(f"{' '.join(a):>24} || {' '.join(b):24} {statistics.mean(found):.2e} :", *(f"{kl:.2e}" for kl in found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default=None, help="float32: without the rounding of bfloat16 in both")
    parser.add_argument("--kl", action="store_true", help="divergences of the path for single tokens, nothing else")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window, with --kl")
    args = parser.parse_args()
    if args.kl:
        text = tqformat.load_tokenizer(args.repo)(Path(args.text).read_text("utf-8")[:100000], return_tensors="pt")
        print_divergences(args.repo, text.input_ids, args.windows, args.length)
        return
    dtype = getattr(torch, args.dtype) if args.dtype else None
    plain, model = (tqformat.load(args.repo, dtype=dtype, packed=each) for each in (False, True))
    tokenizer = tqformat.load_tokenizer(args.repo)
    ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    print(f"kernels: {getattr(packed.kernels(), 'form', lambda: 'none')()}; torch threads: {torch.get_num_threads()}")
    for prompt, each in zip(PROMPTS, ids, strict=True):
        texts = [generate(m, each, args.tokens) for m in (plain, model)]
        print(f"{args.tokens} tokens after {prompt!r}: {first_difference(plain, *texts)}")
    text = Path(args.text).read_text("utf-8")[:20000]
    found = divergence(plain, model, tokenizer(text, return_tensors="pt").input_ids, args.windows)
    print("KL divergence by window:", " ".join(f"{kl:.2e}" for kl in found))
    with tqformat.open_repo(args.repo) as repo:
        stored = repo.manifest.accounting["stored_bytes"]
    resident, base = packed.resident_bytes(model), packed.resident_bytes(plain)
    print(f"resident bytes: packed {resident:,} ({resident / stored:.3f} of the payload's), decoded {base:,}")
    times: dict[str, list[float]] = {"decoded": [], "packed": []}
    for _ in range(args.rounds):
        for name, m in (("decoded", plain), ("packed", model)):
            begin = time.perf_counter()
            generate(m, ids[0], args.tokens)
            times[name].append(args.tokens / (time.perf_counter() - begin))
    for name, each in times.items():
        print(f"{name}: {statistics.median(each):.1f} tokens a second (from {min(each):.1f} to {max(each):.1f})")
    ratios = [b / a for a, b in zip(times["decoded"], times["packed"], strict=True)]
    print(f"packed over decoded: {statistics.median(ratios):.2f} (median of {args.rounds} rounds)")


if __name__ == "__main__":
    main()
