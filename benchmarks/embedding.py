"""What a model loses by its tied embedding alone, at some bits, without feedback and with it; also on rare tokens.

    python benchmarks/embedding.py BASE --calibration FILE... --text FILE...

The embedding is encoded with Lloyd-Max levels for its whole rows, everything else stays as it is. Prints, for each text, perplexity
ratio and mean KL(base || quantized) of a few windows; then the ratio in five parts of all these tokens, by how often a token occurs in the
calibration files, rarest first.
"""

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference_quantizer.calibration.curvature import measure_output_hessians
from reference_quantizer.calibration.embeddings import ends, measure_uses
from reference_quantizer.calibration.tokens import calibration_tokens
from reference_quantizer.checkpoint.source import open_source
from reference_quantizer.codes import feedback
from reference_quantizer.codes.codebook import lloyd_max_levels
from reference_quantizer.codes.encode import Encoder
from reference_quantizer.codes.rotation import make_rotation, rotation_size
from reference_quantizer.evaluation.metrics import next_logits
from reference_quantizer.model.base import load_base, load_tokenizer, running_models

PARTS = 5
ROWS = 8192  # that are encoded at once
CANDIDATES = ((8, ""), (6, "H+G"), (4, ""), (4, "H"), (4, "H+G"), (3, "H+G"))  # bits, and what feedback goes by


def cut(tokenizer: Any, path: Path, length: int, windows: int) -> Tensor:
    """Evenly spaced windows [windows, length] of the text."""
    ids = torch.tensor(tokenizer(path.read_text("utf-8"), add_special_tokens=False, verbose=False)["input_ids"])
    rows = ids[: len(ids) // length * length].reshape(-1, length)
    return rows[(2 * torch.arange(windows) + 1) * len(rows) // (2 * windows)]


def compare(model: Any, windows: Tensor, base: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of each predicted token: by how much its log-probability falls, and KL(base || model); float64 [tokens]."""
    lost, divergences = [], []
    for row, before in zip(windows, base, strict=True):
        after = next_logits(model, row[None], len(row) - 1)[0].log_softmax(-1)
        lost.append((before - after).gather(1, row[1:, None])[:, 0].double())
        divergences.append((before.exp() * (before - after)).sum(-1, dtype=torch.float64))
    return torch.cat(lost), torch.cat(divergences)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a checkpoint directory whose embedding is its output layer, too")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--text", nargs="+", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=3, help="of 512 tokens, for each text")
    args = parser.parse_args()
    source = open_source(args.base)
    with running_models(), tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(source.path)
        model = load_base(source, "text-generation").requires_grad_(False)
        ids = calibration_tokens(None, tokenizer, args.calibration, args.tokens, 256).ids
        name = next(iter(ends(model)))
        gradients = measure_output_hessians(model, [name], ids, Path(folder), quiet=True)
        uses = {"H": measure_uses(model, ids, {})[name], "H+G": measure_uses(model, ids, gradients)[name]}
        print({key: f"trace {use.hessian.trace():.4g}" for key, use in uses.items()})
        weight = model.get_input_embeddings().weight
        original, cols = weight.clone(), weight.shape[1]
        rotation = make_rotation("hadamard", rotation_size("hadamard", cols), 42)

        windows = [cut(tokenizer, path, 512, args.windows) for path in args.text]
        base = [[next_logits(model, r[None], len(r) - 1)[0].log_softmax(-1) for r in rows] for rows in windows]
        counts = torch.zeros(len(weight), dtype=torch.int64)
        for path in args.calibration:
            known = tokenizer(Path(path).read_text("utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
            counts += torch.bincount(torch.tensor(known), minlength=len(weight))
        order = counts[torch.cat([rows[:, 1:].flatten() for rows in windows])].argsort(stable=True)

        for bits, key in CANDIDATES:
            levels = torch.tensor(lloyd_max_levels(2**bits, cols, 8193, 96))
            encoder = Encoder(cols, rotation, levels, torch.float16, torch.bfloat16)
            hessian = uses[key].hessian if key else torch.eye(cols)
            for a in range(0, len(weight), ROWS):
                found = feedback.encode(original[a : a + ROWS], hessian, encoder, bits, bits, 0)
                weight[a : a + ROWS] = found.decoded.bfloat16().float()
            results = [compare(model, rows, before) for rows, before in zip(windows, base, strict=True)]
            texts = [f"{math.exp(lost.mean()):.4f} {kl.mean():.5f}" for lost, kl in results]
            parts = torch.cat([lost for lost, _ in results])[order].tensor_split(PARTS)
            print(bits, key or "none", *texts, "by rarity", *(f"{math.exp(p.mean()):.4f}" for p in parts), flush=True)


if __name__ == "__main__":
    main()
