"""The options of the command line, in groups that several commands share."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reference_quantizer.planning.allocate import ALLOCATORS, CANDIDATES
from reference_quantizer.planning.plan import EMBEDDING_BITS, EMBEDDING_MARGIN
from reference_quantizer.planning.settings import CODEBOOKS, PRESETS, SIGN
from tqformat.__main__ import byte_count
from tqformat.load_quantized import LOADER_KINDS

EXAMPLES = """examples:
  python -m reference_quantizer quantize ./model ./model-4bit                  # 4 bits, good quality, minutes
  python -m reference_quantizer quantize ./model ./model-4bit --preset fast    # in seconds, with more loss
  python -m reference_quantizer quantize owner/name ./out --bits 3 --preset best --calibration text.txt
  python -m reference_quantizer quantize model.gguf ./out --target-bpw 4.5
  python -m reference_quantizer quantize ./model ./out --include '*.layers.*.weight' --exclude '*conv1d*'
  python -m reference_quantizer plan ./model --bits 2 --uniform
  python -m reference_quantizer quantize ./model ./out --bits 2 --dimension 8 --calibration text.txt
  python -m reference_quantizer quantize ./model ./out --stages 3,sign
  python -m reference_quantizer release ./model ./out --bits 4 --dataset corpus.txt
  python -m reference_quantizer push ./out owner/name --private --dry-run

An interrupted `quantize`, `evaluate` or `release` continues when the same command is given again.
"""
DATASET = "Salesforce/wikitext:wikitext-2-raw-v1"  # that an evaluation takes where no option names one
TUNING_TOKENS = 262144  # of calibration text to draw from
TUNING_STEPS = 100  # of `tune`, and of the preset best, which ends with it
INPUTS = ("original", "quantized", "paired")
# of calibration text for error feedback, unless another number is given: what the model writes itself takes longer than what it reads
FEEDBACK_TOKENS = {"self": 8192, "given": 32768}
STYLE = argparse.RawDescriptionHelpFormatter


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """What decides the fate of each tensor: method, selection; the options of `plan`, `quantize` and `release`."""
    _add_method(parser)
    _add_selection(parser)
    add_calibration_arguments(parser)
    add_allocation_arguments(parser)
    help_ = "branch, tag or commit, where SRC is a Hub id; for a local directory it is recorded and selects nothing"
    parser.add_argument("--revision", help=help_)


def add_quantization_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `quantize` and `release`."""
    add_plan_arguments(parser)
    help_ = f"steps of tuning that follow, 0 for none (default: {TUNING_STEPS} for the preset best, else none)"
    parser.add_argument("--tune-steps", metavar="N", type=integer(0, 10**7), help=help_)
    output = parser.add_argument_group("output")
    output.add_argument("--base-model", metavar="ID", help="recorded id (default: the Hub id or the directory's name)")
    output.add_argument("--license", metavar="ID", help="recorded licence (default: from the model card or LICENSE)")
    add_repository_arguments(output)


def add_repository_arguments(output: Any) -> None:
    """How a repository is written, of all commands that write one; `output` is a parser, or a group of its options."""
    kinds = ", ".join(LOADER_KINDS)
    help_ = f"which class builds the model (default: from config.json): {kinds}"
    output.add_argument("--loader-kind", metavar="KIND", choices=list(LOADER_KINDS), help=help_)
    output.add_argument("--pipeline-tag", metavar="TAG", help="the Hub's task name (default: the loader kind)")
    help_ = "start a new payload file beyond this size: bytes, or with K, M or G (default: 5G)"
    output.add_argument("--max-shard-size", metavar="SIZE", type=byte_count, default=5 * 10**9, help=help_)
    output.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `evaluate` and `release`."""
    data = parser.add_argument_group("data set (its non-empty rows, joined by two line feeds)")
    help_ = (
        "local text file, one row a line, or id:config on the Hub, whose column `text` is read; most data sets there"
    )
    help_ += f" are parquet, for which pyarrow must be installed (default: {DATASET}); repeatable, the first gives the"
    help_ += " figures that stand first"
    data.add_argument("--dataset", metavar="DATA", action="append", help=help_)
    data.add_argument("--split", default="test", help="of a data set on the Hub (default: %(default)s)")
    data.add_argument("--dataset-revision", metavar="REV", help="branch, tag or commit of a data set on the Hub")
    windows = parser.add_argument_group("windows")
    help_ = "tokens in a window (default: %(default)s)"
    windows.add_argument("--max-length", metavar="N", type=integer(2, 2**31), default=512, help=help_)
    help_ = "tokens from one window's begin to the next (default: half of a window)"
    windows.add_argument("--stride", metavar="N", type=integer(1, 2**31), help=help_)
    help_ = "stop after this many, 2 or more (default: full pass)"
    windows.add_argument("--max-windows", metavar="N", type=integer(2, 2**53 - 1), help=help_)
    help_ = "auto puts a BOS token, which is not scored, in front of each window where the tokenizer itself puts one in"
    help_ += " front of a text (default: %(default)s)"
    windows.add_argument("--bos", choices=("auto", "never"), default="auto", help=help_)
    model = parser.add_argument_group("evaluation")
    model.add_argument("--batch", metavar="N", type=integer(1, 4096), help="windows at once (default: 1, on CUDA 8)")
    kinds = ("float32", "bfloat16", "float16")
    model.add_argument("--dtype", choices=kinds, help="of the arithmetic (default: float32, on CUDA bfloat16)")
    help_ = "leave the KL divergence out; with results in the cache the base is then not loaded"
    model.add_argument("--no-kl", dest="kl", action="store_false", help=help_)
    help_ = (
        "measure what bfloat16 arithmetic alone changes in the base, too: a release that is no farther from it cannot"
    )
    help_ += " be told from it; the base then runs twice more, and the result stays in the cache"
    model.add_argument("--floor", action="store_true", help=help_)
    help_ = "where an interrupted run and the base's results are kept (default: tqformat in the user's cache directory)"
    model.add_argument("--cache-dir", metavar="DIR", type=Path, help=help_)


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """Where a job runs and what it shows."""
    parser.add_argument("--device", default="cpu", help="where the arithmetic runs: cpu, cuda (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def _add_method(parser: argparse.ArgumentParser) -> None:
    method = parser.add_argument_group("method")
    help_ = "fast: TurboQuant, needs no data, seconds; balanced: error feedback with calibration text, minutes; best: the same "
    help_ += (
        "with trellis codes and tuning, hours (default: balanced, with text that the model writes itself; fast, and a "
    )
    help_ += "line says why, where the model's blocks cannot be run one by one)"
    method.add_argument("--preset", choices=PRESETS, help=help_)
    help_ = f"bits that a trellis code reads; more is better and slower (default: {PRESETS['best'][1]}; preset best)"
    method.add_argument("--window", metavar="N", type=integer(4, 16), help=help_)
    help_ = "levels of a trellis code: trained for normally distributed weights, or computed from the bits that are read, so that a "
    help_ += "kernel needs no table, with 5 %% more error at 2 bits and 7 %% at 3 (default: %(default)s; preset best)"
    method.add_argument("--codebook", choices=CODEBOOKS, default=CODEBOOKS[0], help=help_)
    size = method.add_mutually_exclusive_group()
    # the default is text, which argparse converts: it tells a given --bits 4 from none only if the two are not one object
    help_ = "bits per weight, 1 to 8 (default: %(default)s)"
    size.add_argument("--bits", type=integer(1, 8), default="4", help=help_)
    help_ = "residual quantization: bits of each stage, of which each but the first encodes what is left, such as 2,2; "
    help_ += "sign for the last one makes inner products unbiased (TurboQuant-prod), such as 3,sign (preset fast; without sign also balanced)"
    size.add_argument("--stages", metavar="N,N,...", type=_stages, help=help_)
    add_target_arguments(size)
    help_ = "every weight of two or more dimensions gets --bits by the preset fast, embeddings too, as TurboQuant releases are "
    help_ += "made; for comparison, since other presets lose much less"
    method.add_argument("--uniform", action="store_true", help=help_)
    help_ = "weights per symbol, whose codebook is then trained for so many; bits per symbol are at most 16 "
    help_ += "(default: %(default)s; presets fast and balanced)"
    method.add_argument("--dimension", metavar="P", type=int, choices=(1, 2, 4, 8), default=1, help=help_)
    rotations = ("hadamard", "haar", "none")
    help_ = "random rotation of each vector; haar is stored in the payload (default: %(default)s)"
    method.add_argument("--rotation", choices=rotations, default="hadamard", help=help_)
    help_ = "weights that share one scale (default: the whole row)"
    method.add_argument("--vector-length", metavar="N", type=integer(1, 2**20), help=help_)
    help_ = "seed of the rotations (default: %(default)s)"
    method.add_argument("--seed", type=integer(0, 2**53 - 1), default=42, help=help_)
    help_ = "points of the Lloyd-Max construction (default: %(default)s)"
    method.add_argument("--grid-size", metavar="N", type=integer(3, 2**20 + 1), default=8193, help=help_)
    help_ = "refinements of the Lloyd-Max construction (default: %(default)s)"
    method.add_argument("--iterations", metavar="N", type=integer(1, 4096), default=96, help=help_)
    help_ = "dtype of the scales; auto is f16, but bf16 where they leave f16's normal range (default: %(default)s)"
    method.add_argument("--scale-dtype", choices=("auto", "f16", "bf16", "f32"), default="auto", help=help_)


def _add_selection(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which tensors (each option may be repeated)")
    group.add_argument("--include", metavar="GLOB", action="append", default=[], help="quantize only these")
    group.add_argument("--exclude", metavar="GLOB", action="append", default=[], help="keep these as they are")
    group.add_argument("--protect", metavar="NAME", action="append", default=[], help="keep this tensor")
    help_ = "keep every tensor whose name holds this text"
    group.add_argument("--protect-fragment", metavar="TEXT", action="append", default=[], help=help_)
    help_ = "quantize protected tensors at this many bits instead of keeping them (without --protect options, "
    help_ += f"targets and --uniform, embeddings and output layers get {EMBEDDING_MARGIN} more than other weights, by the preset fast "
    help_ += f"{EMBEDDING_BITS})"
    group.add_argument("--protected-bits", metavar="N", type=integer(1, 8), help=help_)


def add_calibration_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration (for the presets balanced and best, and for mixed precision)")
    help_ = f"(default: {FEEDBACK_TOKENS['given']} for feedback, {FEEDBACK_TOKENS['self']} where the model writes them, 8192 for fisher, 1024 for perturbation; with feedback these two take no more)"
    add_text_arguments(group, help_)
    help_ = "what the layers are fitted to: what reaches them in the original model, in the quantized one, or both, so that each layer "
    help_ += "makes up for what the ones before it lost (default: %(default)s)"
    group.add_argument("--calibration-inputs", choices=INPUTS, default=INPUTS[-1], help=help_)
    help_ = "encode columns of more power first, as GPTQ's option of this name does (default: yes)"
    group.add_argument("--activation-order", action=argparse.BooleanOptionalAction, default=True, help=help_)
    help_ = "let the rows of a weight make up for each other's errors, too, as the gradients of the model's prediction tell how; takes a "
    help_ += "backward pass over the tokens (default: yes for the preset best)"
    group.add_argument("--output-feedback", action=argparse.BooleanOptionalAction, help=help_)
    group.add_argument("--spill", action="store_true", help="keep hidden states in files beside OUT, not in memory")


def add_target_arguments(group: Any) -> None:
    """The targets, into the group of `--bits`, which each of them replaces."""
    help_ = "mixed precision: at most this many bits per weight, over all weights and all that is stored"
    group.add_argument("--target-bpw", metavar="B", type=positive(float), help=help_)
    help_ = "mixed precision: at most this many stored bytes (the accounting's stored_bytes), or with K, M or G"
    group.add_argument("--target-bytes", metavar="SIZE", type=byte_count, help=help_)


def add_allocation_arguments(parser: argparse.ArgumentParser) -> None:
    """How the bits are chosen under a target."""
    group = parser.add_argument_group("mixed precision (with --target-bpw or --target-bytes; runs the model)")
    help_ = "bits that a weight may get, 1 to 8 (default: 2,3,4,5,6,8)"
    group.add_argument("--candidate-bits", metavar="N,N,...", type=_bits, default=CANDIDATES, help=help_)
    help_ = (
        "how sensitivity is measured: fisher takes gradients, perturbation a forward pass with noise for each weight"
    )
    group.add_argument("--allocator", choices=ALLOCATORS, default=ALLOCATORS[0], help=f"{help_} (default: %(default)s)")


def add_text_arguments(group: Any, default: str) -> None:
    """Which text is measured on or trained on, and how much of it; `default` speaks of the tokens."""
    help_ = "text to take: a file, id:config on the Hub, or self: the model writes it (default: self); repeatable"
    group.add_argument("--calibration", metavar="TEXT", action="append", help=help_)
    group.add_argument("--calibration-tokens", metavar="N", type=integer(1, 2**40), help=f"tokens of it {default}")


def integer(low: int, high: int) -> Any:
    """The type of an option that takes an integer from `low` to `high`."""

    def integer(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected an integer from {low} to {high}, got {text}")
        return value

    return integer


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def positive(text: str) -> Any:
        value = kind(text)
        if not 0 < value < 2**53:
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
        return value

    return positive


def _stages(text: str) -> tuple[int | str, ...]:
    words = text.split(",")
    stages = tuple(int(word) if word.isdecimal() else word for word in words)
    plain = stages[:-1] if stages[-1] == SIGN else stages
    fine = 2 <= len(stages) <= 8 and all(isinstance(s, int) and 1 <= s <= 8 for s in plain)
    if not fine:
        raise argparse.ArgumentTypeError(f"expected 2 to 8 integers from 1 to 8, the last may be {SIGN}, got {text}")
    return stages


def _bits(text: str) -> tuple[int, ...]:
    try:
        bits = tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        bits = ()
    if not bits or not 1 <= bits[0] <= bits[-1] <= 8:
        raise argparse.ArgumentTypeError(f"expected integers from 1 to 8, such as 2,3,4, got {text}")
    return bits
