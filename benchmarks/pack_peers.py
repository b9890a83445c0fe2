"""Low-bit checkpoints by other programs' quantizers, for `peers.py --packed`: GPTQ and AutoRound, on a CPU.

    python benchmarks/pack_peers.py gptq|autoround BASE OUT --bits B --calibration TEXT [TEXT ...]

GPTQ (arXiv:2210.17323) is llm-compressor's, AutoRound (arXiv:2309.05516) auto-round's; both write OUT in the layout of
compressed-tensors: codes of B bits, a scale and a zero point for each group of a row. The linear layers of the decoder are
coded, the embedding and the rest stay as they are. Calibration is as in `peers.py`. What is not set here is left as the
program has it; AutoRound codes no layer whose rows 32 does not divide, and says so.

Packages: llmcompressor (--no-deps) with loguru, compressed-tensors and datasets; auto-round (--no-deps) with py-cpuinfo.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference_quantizer.calibration.tokens import calibration_tokens

CALIBRATION_TOKENS = 24576


def gptq(model: Any, tokenizer: Any, ids: Tensor, out: Path, args: argparse.Namespace) -> None:
    """Error feedback along the rows, columns in the order of their power; scales and zero points from each group's extremes."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = {"num_bits": args.bits, "type": "int", "symmetric": args.symmetric}
    weights |= {"strategy": "group", "group_size": args.group}
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}),
        recipe=GPTQModifier(config_groups={"layers": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]),
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
        pipeline="sequential",
        output_dir=str(out),
    )


def autoround(model: Any, tokenizer: Any, ids: Tensor, out: Path, args: argparse.Namespace) -> None:
    """Roundings and the extremes of each group by signed gradient descent on the outputs of a block."""
    from auto_round import AutoRound

    rounder = AutoRound(
        model,
        tokenizer,
        bits=args.bits,
        group_size=args.group,
        sym=args.symmetric,
        iters=args.iterations,
        batch_size=args.batch,
        nsamples=len(ids),
        seqlen=ids.shape[1],
        dataset=list(ids[:, None]),
        device_map="cpu",
    )
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        rounder.quantize_and_save(work, format="llm_compressor")
        (made,) = Path(work).glob("**/config.json")  # in a folder that it names by the scheme
        made.parent.rename(out)


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=("gptq", "autoround"))
    parser.add_argument("base", help="checkpoint directory")
    parser.add_argument("out", type=Path, help="directory that is written")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, default=64, help="weights of a row that share a scale (default: 64)")
    parser.add_argument("--symmetric", action="store_true", help="no zero points")
    parser.add_argument("--calibration", nargs="+", required=True, metavar="TEXT")
    parser.add_argument("--tokens", type=int, default=CALIBRATION_TOKENS, help="default: %(default)s")
    parser.add_argument("--iterations", type=int, default=200, help="AutoRound's, for each block (default: 200)")
    parser.add_argument("--batch", type=int, default=8, help="sequences in an iteration of AutoRound (default: 8)")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    ids = calibration_tokens(None, tokenizer, args.calibration, args.tokens).ids
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype="auto")
    {"gptq": gptq, "autoround": autoround}[args.method](model, tokenizer, ids, args.out, args)


if __name__ == "__main__":
    main()
