"""Whether llama.cpp computes from an exported GGUF file what transformers computes from the repository.

    npm install --prefix .work/llama node-llama-cpp
    python -m tqformat export REPO model.gguf --format gguf
    python benchmarks/llama_cpp.py REPO model.gguf .work/llama/node_modules

The package node-llama-cpp brings llama.cpp's own libraries, built for CPUs. Compared are the token ids of texts, the
probabilities of the next token after 20, 40, ... 120 tokens, and 40 tokens that greedy decoding writes after each of two
prompts. transformers computes in float32, on weights that `tqformat.load` decodes; llama.cpp rounds activations to the type of
the weights, so only an F32 file can be as good as equal.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import torch

import tqformat

NODE = Path(__file__).with_suffix(".mjs")
TEXTS = [
    "Hello, world!",
    "The year 2024 had 366 days; 1,234,567.89",
    "  two  spaces\n\n\tand tabs\r\n",
    "L'été à Zürich: naïve café, 東京 こんにちは 안녕 🙂🙃",
    "<|im_start|>user\nhi<|im_end|>\n<start_of_turn>user\nhi<end_of_turn>\n",
    "def f(x):\n    return x**2  # it's can't WE'LL",
    "a" * 50 + "     " + "_" * 7,
    "<table><tr>  \n\n\n x",
]
PROMPTS = ["What is the capital of France?", "Write one sentence on the sea."]
COUNT = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repo", metavar="REPO")
    parser.add_argument("file", metavar="GGUF", type=Path)
    parser.add_argument("modules", metavar="NODE_MODULES", type=Path)
    args = parser.parse_args()
    tokenizer = tqformat.load_tokenizer(args.repo)
    model = tqformat.load(args.repo, dtype=torch.float32)
    ids = tokenizer((TEXTS[0] + TEXTS[1] + TEXTS[5]) * 9, add_special_tokens=False)["input_ids"][:120]
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    if tokenizer.chat_template:
        chats = [[{"role": "user", "content": text}] for text in PROMPTS]
        prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True)["input_ids"] for c in chats]
    with tempfile.TemporaryDirectory() as work:
        job = Path(work, "job.json")
        job.write_text(json.dumps({"texts": TEXTS, "ids": ids, "prompts": prompts, "count": COUNT}))
        subprocess.run(["node", NODE, args.modules.absolute(), args.file.absolute(), job], check=True)
        there = json.loads(job.read_text())
    print(f"llama.cpp {there['release']}, {args.file.stat().st_size:,} bytes, {there['rate']:.1f} tokens/s")

    here = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    print(
        f"texts with the same token ids: {sum(a == b for a, b in zip(here, there['ids'], strict=True))} of {len(TEXTS)}"
    )
    with torch.inference_mode():
        rows = model(torch.tensor([ids])).logits[0, 19::20].double().softmax(-1)
    differences, divergences = [], []
    for row, known in zip(rows, there["probabilities"], strict=True):
        found = torch.zeros_like(row)
        found[[token for token, _ in known]] = torch.tensor([p for _, p in known], dtype=found.dtype)
        found /= found.sum()  # summed in float32 there, which is off in the fourth digit
        differences.append(float((row - found).abs().max()))
        likely = row > 1e-12
        divergences.append(float((row[likely] * (row[likely] / found[likely].clamp(min=1e-30)).log()).sum()))
    print(f"largest difference of a probability: {max(differences):.1e}; largest KL divergence: {max(divergences):.1e}")
    for prompt, text, found in zip(prompts, PROMPTS, there["greedy"], strict=True):
        with torch.inference_mode():
            ours = model.generate(torch.tensor([prompt]), max_new_tokens=COUNT, do_sample=False)[
                0, len(prompt) :
            ].tolist()
        ours = ours[:-1] if len(ours) == len(found) + 1 else ours  # llama.cpp does not show the token that ends a turn
        same = next(
            (i for i, (a, b) in enumerate(zip(ours, found, strict=False)) if a != b), min(len(ours), len(found))
        )
        print(f"{text} {same} of {len(ours)} tokens equal: {tokenizer.decode(found)!r}")


if __name__ == "__main__":
    main()
