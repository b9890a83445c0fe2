"""`tune`: trains the scales and norms of a repository."""

import argparse
from pathlib import Path
from typing import Any

from reference_quantizer.commands.options import (
    FEEDBACK_TOKENS,
    STYLE,
    TUNING_STEPS,
    TUNING_TOKENS,
    add_job_arguments,
    add_text_arguments,
    integer,
    positive,
)
from reference_quantizer.commands.quantize import check_target
from reference_quantizer.commands.settings import add_written
from reference_quantizer.release import report

TUNE = """Train what costs no bits on the divergence from the base model, and write a new repository of the same size.

That is a factor for each row's scale, embeddings' and output layers' too, norms and biases; codes stay as they are. Both
models are in memory at once. A step of a 135M model takes about 30 seconds of one CPU core, 100 steps less than an hour. An
interrupted run continues when the same command is given again. Nothing is written unless the divergence on held-out
calibration text falls. Of the texts that REPO's codes were fitted to, only what these did not see is held out, if there is
such: give more tokens than to `quantize`.
"""


def run_tune(args: argparse.Namespace) -> int:
    """Tune a repository and print what it gained."""
    from reference_quantizer.calibration.tokens import find_tokens
    from reference_quantizer.job import tune  # torch takes seconds to import
    from reference_quantizer.model.base import find_base
    from reference_quantizer.model.machine import default_cache

    check_target(args.out, args.repo, args.overwrite)
    source = find_base(args.source, args.revision, default_cache(), args.quiet)
    manifest = report.read_manifest(args.repo)
    texts = tuple(args.calibration or ("self",))  # what the model writes takes long: no more than `quantize` asks for
    tokens = args.calibration_tokens or (TUNING_TOKENS if args.calibration else FEEDBACK_TOKENS["self"])
    kind, device = manifest["loader_kind"], args.device
    calibration = find_tokens(source, kind, texts, tokens, None, device)
    fitted = (manifest.get("quantization") or {}).get("calibration") or {"source": None}
    own, seen = texts == ("self",), None
    if fitted["source"] == ("self" if own else "texts") and (fitted["tokens"] <= tokens or not own):
        seen = find_tokens(source, kind, texts, fitted["tokens"], None, device)
        if seen.sha256 != fitted.get("extra", {}).get("sha256"):
            seen = None  # of other texts
    if own:
        calibration = add_written(source, kind, calibration, device)
    settings = tune.Settings(args.steps, args.batch, args.learning_rate, args.seed, args.dtype)
    where = args.repo, args.out, calibration, settings, device, args.overwrite, args.quiet
    record = tune.tune(source, *where, None if seen is None else seen.ids)
    before, after = record["held_out_kl"]
    print(f"written to {args.out}: KL on held-out text {before:.5f} -> {after:.5f}\nsize  {report.size_line(args.out)}")
    return 0


def add_command(commands: Any) -> None:
    """Add `tune` to the command line."""
    help_ = "train a repository's scales and norms, with its codes as they are"
    tune = commands.add_parser("tune", help=help_, description=TUNE, formatter_class=STYLE)
    tune.add_argument("source", metavar="BASE", help="checkpoint directory or Hub id that REPO was made from")
    tune.add_argument("repo", metavar="REPO", type=Path, help="repository directory; it is left as it is")
    tune.add_argument("out", metavar="OUT", type=Path, help="directory to create")
    tune.add_argument("--revision", help="branch, tag or commit, where BASE is a Hub id")
    add_text_arguments(
        tune.add_argument_group("calibration"),
        f"(default: {TUNING_TOKENS}; {FEEDBACK_TOKENS['self']} where the model writes them)",
    )
    help_ = "optimizer steps (default: %(default)s)"
    tune.add_argument("--steps", metavar="N", type=integer(1, 10**7), default=TUNING_STEPS, help=help_)
    help_ = "sequences of 512 tokens in a step (default: %(default)s)"
    tune.add_argument("--batch", metavar="N", type=integer(1, 4096), default=4, help=help_)
    help_ = (
        "size of the first steps, relative to each parameter and to the root of the divergence (default: %(default)s)"
    )
    tune.add_argument("--learning-rate", metavar="X", type=positive(float), default=0.003, help=help_)
    tune.add_argument("--seed", metavar="N", type=integer(0, 2**53 - 1), default=0, help="of the order of the text")
    help_ = "of the matrix products (default: bfloat16 where the device has instructions for it)"
    tune.add_argument("--dtype", choices=("float32", "bfloat16"), help=help_)
    tune.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    add_job_arguments(tune)
    tune.set_defaults(run=run_tune)
