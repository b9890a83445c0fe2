"""An imported GGUF file beside the file itself: seconds to load, and whether both write the same.

    python benchmarks/imported.py REPO FILE.gguf [--runs 3] [--tokens 40]

REPO is what `reference_quantizer import FILE.gguf REPO` wrote. `packed` and `decoded` are tqformat.load, `gguf` is from_pretrained
of transformers with gguf_file; all in float32, each run in a fresh process, one after another in turn. Seconds are those of the
loading call, after imports and the tokenizer; greedy tokens follow two prompts, in the first run alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

WAYS = ("packed", "decoded", "gguf")
PROMPTS = ["What is the capital of France?", "Write one sentence on the sea."]


def run(way: str, repo: str, file: Path, count: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    import tqformat

    tokenizer = tqformat.load_tokenizer(repo)
    start = time.perf_counter()
    if way == "gguf":
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    else:
        model = tqformat.load(repo, packed=way == "packed")
    seconds, tokens = time.perf_counter() - start, []
    for text in PROMPTS if count else ():
        given = tokenizer(text)["input_ids"]
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": text}]
            given = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        with torch.inference_mode():
            found = model.generate(torch.tensor([given]), max_new_tokens=count, do_sample=False)[0, len(given) :]
        tokens.append(found.tolist())
    print(json.dumps({"seconds": seconds, "tokens": tokens}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repo", metavar="REPO")
    parser.add_argument("file", metavar="GGUF", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        run(args.way, args.repo, args.file, args.tokens)
        return
    found: dict[str, list[dict[str, object]]] = {way: [] for way in WAYS}
    for i in range(args.runs):
        for way in WAYS:
            command = [
                sys.executable,
                __file__,
                args.repo,
                args.file,
                "--way",
                way,
                "--tokens",
                str(0 if i else args.tokens),
            ]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    for way, runs in found.items():
        seconds = sorted(float(str(one["seconds"])) for one in runs)
        same = runs[0]["tokens"] == found["gguf"][0]["tokens"]
        shown = f"{way:8} {statistics.median(seconds):7.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f})"
        print(f"{shown}, tokens {'as' if same else 'NOT as'} those of gguf")


if __name__ == "__main__":
    main()
