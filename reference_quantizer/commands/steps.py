"""The commands `plan`, `quantize` and `evaluate`, and the options and steps that `release` shares with them."""

import argparse
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reference_quantizer.checkpoint import gguf_source, support
from reference_quantizer.checkpoint.source import Source, open_source
from reference_quantizer.planning import allocate
from reference_quantizer.planning.plan import (
    EMBEDDINGS,
    HEADS,
    MAX_SYMBOL,
    PRESETS,
    SIGN,
    WINDOWED_BITS,
    Plan,
    Settings,
    make_plan,
)
from reference_quantizer.release import report
from tqformat.__main__ import byte_count
from tqformat.load_quantized import LOADER_KINDS, MANIFEST, TQFormatError

EXAMPLES = """examples:
  python -m reference_quantizer plan ./model --bits 2
  python -m reference_quantizer quantize ./model ./model-2bit --bits 2
  python -m reference_quantizer quantize owner/name ./out --bits 4 --protect-fragment embed_tokens --protected-bits 8
  python -m reference_quantizer quantize ./model ./out --bits 3 --include '*.layers.*.weight' --exclude '*conv1d*'
  python -m reference_quantizer quantize model.gguf ./out --bits 4
  python -m reference_quantizer quantize ./model ./out --bits 2 --dimension 8 --calibration text.txt
  python -m reference_quantizer quantize ./model ./out --stages 3,sign
  python -m reference_quantizer release ./model ./out --bits 4 --dataset corpus.txt
  python -m reference_quantizer push ./out owner/name --private --dry-run

An interrupted `quantize`, `evaluate` or `release` continues when the same command is given again.
"""
EVALUATE = """Measure a repository against the checkpoint it was made from.

Perplexity in sliding windows, KL divergence and top-1 agreement of the next-token distributions, the cosine of the logits
after fixed prompts, and greedy samples. Writes eval_summary.json and sample_generations.json into the repository. Both
models are in memory at once. An interrupted run continues when the same command is given again.
"""
if TYPE_CHECKING:
    from reference_quantizer.calibration.tokens import Calibration

TUNE = """Train what costs no bits on the divergence from the base model, and write a new repository of the same size.

That is a factor for each row's scale, norms and biases; codes, embeddings and output layers stay as they are. Both models
are in memory at once. A step of a 135M model takes about 30 seconds of one CPU core, 100 steps less than an hour. An
interrupted run continues when the same command is given again. Nothing is written unless the divergence on held-out
calibration text falls.
"""
EMBEDDING_BITS = 8  # of embeddings and output layers beside calibrated codes
TUNING_TOKENS = 262144  # of calibration text to draw from
TUNING_STEPS = 100  # of `tune`, and of the preset best, which ends with it
INPUTS = ("original", "quantized", "paired")
FEEDBACK_TOKENS = 32768  # of calibration text for error feedback, unless another number is given
STYLE = argparse.RawDescriptionHelpFormatter


# ------------------------------------------------------------------------------------------------ commands


def run_plan(args: argparse.Namespace) -> int:
    """Print what `quantize` would write."""
    plan = find_plan(args, open_checkpoint(args))
    rows, accounting = report.plan_rows(plan), plan.accounting()
    if args.json:
        print(json.dumps(plan.to_dict() | {"figures": report.figures(rows, accounting)}, indent=1))
        return 0
    _print_notes(plan)
    report.print_table(rows, accounting, f"plan for {args.source} at {_width(plan)}")
    return 0


def run_quantize(args: argparse.Namespace) -> int:
    """Write the repository and print what is in it."""
    source = prepare_source(args)
    write_repository(args, source)
    if gguf_source.is_gguf(args.source):
        gguf_source.discard(args.out)
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    """Evaluate a repository, write the figures into it and print them."""
    from reference_quantizer.evaluation import evaluate  # torch takes seconds to import

    options = evaluation_options(args) | {"base_revision": args.revision}
    summary = evaluate.evaluate(args.source, args.repo, args.dataset, evaluation_settings(args), **options)
    print(evaluate.describe(summary))
    print(f"size          {report.size_line(args.repo)}")
    return 0


def run_tune(args: argparse.Namespace) -> int:
    """Tune a repository and print what it gained."""
    from reference_quantizer.calibration.tokens import find_tokens
    from reference_quantizer.evaluation.evaluate import default_cache, find_base
    from reference_quantizer.job import tune  # torch takes seconds to import

    check_target(args.out, args.repo, args.overwrite)
    source = find_base(args.source, args.revision, default_cache())
    manifest = report.read_manifest(args.repo)
    texts, tokens = tuple(args.calibration or ("self",)), args.calibration_tokens or TUNING_TOKENS
    calibration = find_tokens(source, manifest["loader_kind"], texts, tokens, None, args.device)
    settings = tune.Settings(args.steps, args.batch, args.learning_rate, args.seed, args.dtype)
    record = tune.tune(source, args.repo, args.out, calibration, settings, args.device, args.overwrite, args.quiet)
    before, after = record["held_out_kl"]
    print(f"written to {args.out}: KL on held-out text {before:.5f} -> {after:.5f}\nsize  {report.size_line(args.out)}")
    return 0


def add_commands(commands: Any) -> None:
    """Add `plan`, `quantize`, `tune` and `evaluate` to the command line."""
    quantize = commands.add_parser("quantize", help="write a repository", epilog=EXAMPLES, formatter_class=STYLE)
    quantize.add_argument("source", metavar="SRC", help="checkpoint directory, Hub id or GGUF file")
    quantize.add_argument("out", metavar="OUT", type=Path, help="directory to create")
    add_quantization_arguments(quantize)
    add_job_arguments(quantize)
    quantize.set_defaults(run=run_quantize)

    plan = commands.add_parser("plan", help="print the storage table", epilog=EXAMPLES, formatter_class=STYLE)
    help_ = 'checkpoint directory, Hub id, GGUF file, or a JSON file {name: {"shape": [...], "dtype": "BF16"}}'
    plan.add_argument("source", metavar="SRC", help=help_)
    add_plan_arguments(plan)
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=run_plan)

    help_ = "train a repository's scales and norms, with its codes as they are"
    tune = commands.add_parser("tune", help=help_, description=TUNE, formatter_class=STYLE)
    tune.add_argument("source", metavar="BASE", help="checkpoint directory or Hub id that REPO was made from")
    tune.add_argument("repo", metavar="REPO", type=Path, help="repository directory; it is left as it is")
    tune.add_argument("out", metavar="OUT", type=Path, help="directory to create")
    tune.add_argument("--revision", help="branch, tag or commit, where BASE is a Hub id")
    _add_text(tune.add_argument_group("calibration"), f"(default: {TUNING_TOKENS})")
    help_ = "optimizer steps (default: %(default)s)"
    tune.add_argument("--steps", metavar="N", type=integer(1, 10**7), default=TUNING_STEPS, help=help_)
    help_ = "sequences of 512 tokens in a step (default: %(default)s)"
    tune.add_argument("--batch", metavar="N", type=integer(1, 4096), default=4, help=help_)
    help_ = (
        "size of the first steps, relative to each parameter and to the root of the divergence (default: %(default)s)"
    )
    tune.add_argument("--learning-rate", metavar="X", type=allocate.positive(float), default=0.003, help=help_)
    tune.add_argument("--seed", metavar="N", type=integer(0, 2**53 - 1), default=0, help="of the order of the text")
    help_ = "of the matrix products (default: bfloat16 where the device has instructions for it)"
    tune.add_argument("--dtype", choices=("float32", "bfloat16"), help=help_)
    tune.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    add_job_arguments(tune)
    tune.set_defaults(run=run_tune)

    help_ = "measure a repository against its base"
    evaluate = commands.add_parser("evaluate", help=help_, description=EVALUATE, formatter_class=STYLE)
    help_ = "checkpoint directory, Hub id or GGUF file that REPO was made from; a GGUF file is imported into the cache"
    evaluate.add_argument("source", metavar="BASE", help=help_)
    evaluate.add_argument("repo", metavar="REPO", type=Path, help="repository directory; both files go into it")
    evaluate.add_argument("--revision", help="branch, tag or commit, where BASE is a Hub id")
    add_evaluation_arguments(evaluate)
    add_job_arguments(evaluate)
    evaluate.set_defaults(run=run_evaluate)


# ------------------------------------------------------------------------------------------------ steps


def open_checkpoint(args: argparse.Namespace) -> Source:
    """The source to plan: of a GGUF file its headers, of everything else what `open_source` gives."""
    if gguf_source.is_gguf(args.source):
        _refuse_revision(args)
        return gguf_source.plan_source(args.source)
    return open_source(args.source, args.revision)


def prepare_source(args: argparse.Namespace) -> Source:
    """The source to quantize, for an OUT that may be written; a GGUF file is imported beside OUT."""
    if gguf_source.is_gguf(args.source):
        _refuse_revision(args)
        check_target(args.out, Path(args.source), args.overwrite)  # before the work of importing
        source = gguf_source.prepared(args.source, args.out)
    else:
        source = open_source(args.source, args.revision)
    if source.is_inventory:
        raise TQFormatError("BIND.MISSING_FILE", args.source, "an inventory has no weights, only a plan can be made")
    check_target(args.out, source.path, args.overwrite)
    support.refuse_quantized(source.config)
    return source


def write_repository(args: argparse.Namespace, source: Source, extra: dict[str, Any] | None = None) -> None:
    """Quantize `source` to OUT and print what is in it; `extra` goes into the manifest."""
    loader_kind = find_loader_kind(args, source)
    imported = gguf_source.base_model(source.provenance)  # a name, a licence and where it comes from, for the manifest
    base_model = imported | {
        "id": args.base_model or source.id or imported.get("id") or source.path.resolve().name,
        "revision": source.revision,
        "license": args.license or support.find_license(source.path) or imported.get("license"),
    }
    plan = find_plan(args, source)
    _print_notes(plan, support.files_to_copy(source)[1])
    steps = tuning_steps(args, plan.settings, loader_kind)
    calibration = find_calibration(args, source, plan.settings)

    # torch takes seconds to import, and plan does without
    from reference_quantizer.job.quantize import Progress, Target, check_device, quantize

    check_device(args.device)
    target = Target(
        args.out,
        base_model,
        loader_kind,
        args.pipeline_tag or loader_kind,
        args.device,
        args.max_shard_size,
        args.overwrite,
        args.spill,
        extra,
    )
    progress = Progress(sum(t.info.scalars for t in plan.tensors), args.quiet)
    if calibration is not None and steps:
        from reference_quantizer.job import tune

        tokens = find_tuning_tokens(args, source, calibration)
        how = tune.Settings(steps=steps)
        out = tune.quantize_tuned(source, plan, target, progress, calibration, tokens, how, args.quiet)
    else:
        out = quantize(source, plan, target, progress, calibration)
    manifest = report.read_manifest(out)
    error = report.mean_relative_error(manifest)
    report.print_table(report.repo_rows(out), manifest["accounting"], f"written to {args.out}", error)


def find_plan(args: argparse.Namespace, source: Source) -> Plan:
    """The plan that the options ask for; with a target, the bits are chosen by measuring the model."""
    request, chosen = allocate.request_of(args), settings(args)
    if chosen.output_feedback and (kind := find_loader_kind(args, source)) not in support.KINDS:
        if args.output_feedback:
            advice = f"expected a model that predicts the next token ({', '.join(support.KINDS)}), found {kind}"
            raise TQFormatError("SCHEMA.VALUE", "--output-feedback", advice)
        chosen = replace(chosen, output_feedback=False)
    if request is None:
        return make_plan(source, with_wide_embeddings(chosen, source))
    job = {name: getattr(args, name) for name in ("device", "quiet") if hasattr(args, name)}  # not of `plan`
    kind, cache = find_loader_kind(args, source), getattr(args, "cache_dir", None)
    return make_plan(source, *allocate.make_allocation(source, chosen, request, kind, cache, **job))


def with_wide_embeddings(chosen: Settings, source: Source) -> Settings:
    """With embeddings and output layers at 8 bit where codes are calibrated and no option says what to protect.

    Feedback cannot help them, and at few bits they would undo what it gains elsewhere.
    """
    if chosen.preset == "fast" or chosen.bits >= EMBEDDING_BITS or chosen.protect or chosen.protect_fragments:
        return chosen
    endings = tuple(e for e in EMBEDDINGS + HEADS if any(e in name for name in source.tensors))
    if not endings:
        return chosen
    print(f"note: {', '.join(endings)}: {EMBEDDING_BITS} bits, unless --protect options say otherwise", file=sys.stderr)
    return replace(chosen, protect_fragments=endings, protected_bits=EMBEDDING_BITS)


def find_calibration(args: argparse.Namespace, source: Source, chosen: Settings) -> "Calibration | None":
    """The tokens that a preset with error feedback needs; None for the others."""
    if chosen.preset == "fast":
        return None
    if args.device == "cpu" and importlib.util.find_spec("numba") is None:  # told before hours of work
        advice = "numba cannot be imported; expected: pip install 'tqformat[encoders]'"
        raise TQFormatError("UNSUPPORTED.LIBRARY", f"--preset {chosen.preset}", advice)
    from reference_quantizer.calibration.tokens import find_tokens  # torch takes seconds to import

    texts, tokens = tuple(args.calibration or ("self",)), args.calibration_tokens or FEEDBACK_TOKENS
    return find_tokens(
        source, find_loader_kind(args, source), texts, tokens, getattr(args, "cache_dir", None), args.device
    )


def tuning_steps(args: argparse.Namespace, chosen: Settings, loader_kind: str) -> int:
    """How many steps of tuning follow on quantizing; none for models that cannot be tuned, which a line then says."""
    usual = TUNING_STEPS if chosen.preset == "best" else 0
    steps = usual if args.tune_steps is None else int(args.tune_steps)
    if not steps:
        return 0
    if chosen.preset == "fast":
        advice = "the preset fast uses no text, and tuning needs some; use --preset balanced or best"
        raise TQFormatError("SCHEMA.VALUE", "--tune-steps", advice)
    if loader_kind not in support.KINDS:
        print(f"note: not tuned: a model for {loader_kind} does not predict the next token", file=sys.stderr)
        return 0
    return steps


def find_tuning_tokens(args: argparse.Namespace, source: Source, calibration: "Calibration") -> "Calibration":
    """More tokens of the texts that feedback has; the same ones where the model writes them itself, which takes long."""
    from reference_quantizer.calibration.tokens import SELF, find_tokens

    if calibration.texts == (SELF,):
        return calibration
    tokens = max(TUNING_TOKENS, calibration.tokens)
    return find_tokens(source, find_loader_kind(args, source), tuple(args.calibration), tokens, None, args.device)


def find_loader_kind(args: argparse.Namespace, source: Source) -> str:
    """Which class builds the model: the option's word, or what config.json calls for."""
    return getattr(args, "loader_kind", None) or support.find_loader_kind(source.config)


def check_target(out: Path, checkpoint: Path, overwrite: bool) -> None:
    """Nothing but a repository or an empty directory is ever replaced, and never the checkpoint."""
    target, origin = out.resolve(), checkpoint.resolve()
    if target.is_relative_to(origin) or origin.is_relative_to(target):
        raise TQFormatError("PATH.NAME", str(out), "the target and the checkpoint must not lie in each other")
    if not out.exists():
        return
    if not overwrite:
        raise TQFormatError("PATH.COLLISION", str(out), "the target exists; pass --overwrite to replace it")
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).is_file()):
        raise TQFormatError("PATH.COLLISION", str(out), "the target is no tqformat repository, and is not replaced")


def settings(args: argparse.Namespace) -> Settings:
    """The settings of a plan that the options ask for."""
    if args.protected_bits is not None and not (args.protect or args.protect_fragment):
        advice = "nothing is protected: add --protect NAME or --protect-fragment TEXT, or leave it out"
        raise TQFormatError("SCHEMA.VALUE", "--protected-bits", advice)
    preset = args.preset or ("balanced" if args.calibration else "fast")
    sized = args.target_bpw is not None or args.target_bytes is not None
    if preset == "fast" and not sized and (args.calibration or args.calibration_tokens):
        advice = "the preset fast uses no text; use --preset balanced or best, or a target"
        raise TQFormatError("SCHEMA.VALUE", "--calibration", advice)
    if preset == "fast" and args.output_feedback:
        raise TQFormatError(
            "SCHEMA.VALUE", "--output-feedback", "the preset fast has no feedback; use balanced or best"
        )
    if preset == "best" and not sized and args.bits > WINDOWED_BITS:
        advice = f"trellis codes have at most {WINDOWED_BITS} bits; use --preset balanced"
        raise TQFormatError("SCHEMA.VALUE", f"--preset best --bits {args.bits}", advice)
    window = PRESETS[preset][1] if args.window is None else args.window
    if window is not None and not sized and window <= args.bits:
        raise TQFormatError("SCHEMA.VALUE", "--window", f"expected more than --bits {args.bits}, got {window}")
    if args.window is not None and PRESETS[preset][1] is None:
        raise TQFormatError("SCHEMA.VALUE", "--window", f"the preset {preset} has no trellis codes; use --preset best")
    stages = args.stages or ()
    bits = sum(1 if word == SIGN else word for word in stages) or args.bits
    if stages and preset == "best":
        advice = f"trellis codes have one stage; use --preset balanced or fast, or --bits {bits}"
        raise TQFormatError("SCHEMA.VALUE", "--stages with --preset best", advice)
    if SIGN in stages and preset != "fast":
        advice = f"error feedback leaves no product unbiased; use --preset fast, or --bits {bits}"
        raise TQFormatError("SCHEMA.VALUE", f"--stages with --preset {preset}", advice)
    if SIGN in stages and args.rotation == "none":
        raise TQFormatError(
            "SCHEMA.VALUE", "--stages", "a sign is unbiased after a rotation only; use another --rotation"
        )
    widest = max((word for word in stages if word != SIGN), default=bits)
    if args.dimension > 1 and preset == "best":
        advice = "trellis codes have one weight per symbol; use --preset balanced or fast"
        raise TQFormatError("SCHEMA.VALUE", "--dimension", advice)
    if args.dimension > 1 and sized:
        advice = "mixed precision has codebooks of one weight per symbol; use --bits"
        raise TQFormatError("SCHEMA.VALUE", "--dimension", advice)
    if args.dimension * widest > MAX_SYMBOL:
        advice = f"expected at most {MAX_SYMBOL} bits per symbol, got {args.dimension} weights of {widest} bits"
        raise TQFormatError("SCHEMA.VALUE", "--dimension", f"{advice}; use fewer of either, or --stages")
    return Settings(
        bits=bits,
        preset=preset,
        window=window,
        dimension=args.dimension,
        stages=stages,
        rotation=args.rotation,
        vector_length=args.vector_length,
        seed=args.seed,
        grid_size=args.grid_size,
        iterations=args.iterations,
        scale_dtype=args.scale_dtype if args.scale_dtype == "auto" else args.scale_dtype.upper(),
        include=tuple(args.include),
        exclude=tuple(args.exclude),
        protect=tuple(args.protect),
        protect_fragments=tuple(args.protect_fragment),
        protected_bits=args.protected_bits,
        inputs=args.calibration_inputs,
        ordered=args.activation_order,
        output_feedback=preset == "best" if args.output_feedback is None else args.output_feedback,
    )


def evaluation_settings(args: argparse.Namespace) -> Any:
    """The evaluate.Settings that the options ask for."""
    from reference_quantizer.evaluation.evaluate import Settings

    names = ("max_length", "stride", "max_windows", "bos", "batch", "device", "dtype", "kl")
    return Settings(**{name: getattr(args, name) for name in names})


def evaluation_options(args: argparse.Namespace) -> dict[str, Any]:
    """The further arguments of evaluate.evaluate that the options ask for."""
    return {name: getattr(args, name) for name in ("split", "dataset_revision", "cache_dir", "quiet")}


def _refuse_revision(args: argparse.Namespace) -> None:
    if args.revision:
        raise TQFormatError("SCHEMA.VALUE", "--revision", "a GGUF file has no revisions; leave the option out")


def _width(plan: Plan) -> str:
    if plan.allocation is None:
        bits, p, stages = plan.settings.bits, plan.settings.dimension, plan.settings.stages
        words = [
            f"{bits} bit",
            f"{p} weights a symbol" * (p > 1),
            f"in stages of {', '.join(map(str, stages))}" * bool(stages),
        ]
        return ", ".join(filter(None, words))
    return f"mixed precision in at most {plan.allocation.record['extra']['target_bytes']:,} bytes"


def _print_notes(plan: Plan, more: list[str] | None = None) -> None:
    for note in plan.notes + (more or []):
        print(f"note: {note}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------ options


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """What decides the fate of each tensor: method, selection; the options of `plan`, `quantize` and `release`."""
    _add_method(parser)
    _add_selection(parser)
    add_calibration_arguments(parser)
    allocate.add_allocation_arguments(parser)
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
    help_ += " are parquet, for which pyarrow must be installed (default: %(default)s)"
    data.add_argument("--dataset", metavar="DATA", default="Salesforce/wikitext:wikitext-2-raw-v1", help=help_)
    data.add_argument("--split", default="test", help="of a data set on the Hub (default: %(default)s)")
    data.add_argument("--dataset-revision", metavar="REV", help="branch, tag or commit of a data set on the Hub")
    windows = parser.add_argument_group("windows")
    help_ = "tokens in a window (default: %(default)s)"
    windows.add_argument("--max-length", metavar="N", type=integer(2, 2**31), default=512, help=help_)
    help_ = "tokens from one window's begin to the next (default: %(default)s)"
    windows.add_argument("--stride", metavar="N", type=integer(1, 2**31), default=256, help=help_)
    help_ = "stop after this many (default: full pass)"
    windows.add_argument("--max-windows", metavar="N", type=integer(1, 2**53 - 1), help=help_)
    help_ = "auto puts a BOS token, which is not scored, in front of each window where the tokenizer itself puts one in"
    help_ += " front of a text (default: %(default)s)"
    windows.add_argument("--bos", choices=("auto", "never"), default="auto", help=help_)
    model = parser.add_argument_group("evaluation")
    model.add_argument("--batch", metavar="N", type=integer(1, 4096), help="windows at once (default: 1, on CUDA 8)")
    kinds = ("float32", "bfloat16", "float16")
    model.add_argument("--dtype", choices=kinds, help="of the arithmetic (default: float32, on CUDA bfloat16)")
    help_ = "leave the KL divergence out; with results in the cache the base is then not loaded"
    model.add_argument("--no-kl", dest="kl", action="store_false", help=help_)
    help_ = "where an interrupted run and the base's results are kept (default: tqformat in the user's cache directory)"
    model.add_argument("--cache-dir", metavar="DIR", type=Path, help=help_)


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """Where a job runs and what it shows."""
    parser.add_argument("--device", default="cpu", help="where the arithmetic runs: cpu, cuda (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def _add_method(parser: argparse.ArgumentParser) -> None:
    method = parser.add_argument_group("method")
    help_ = (
        "fast: TurboQuant, needs no data; balanced: error feedback with calibration text; best: the same with trellis "
    )
    help_ += "codes, slower (default: balanced if --calibration is given, else fast)"
    method.add_argument("--preset", choices=PRESETS, help=help_)
    help_ = f"bits that a trellis code reads; more is better and slower (default: {PRESETS['best'][1]}; preset best)"
    method.add_argument("--window", metavar="N", type=integer(4, 16), help=help_)
    size = method.add_mutually_exclusive_group()
    # the default is text, which argparse converts: it tells a given --bits 2 from none only if the two are not one object
    help_ = "bits per weight, 1 to 8 (default: %(default)s)"
    size.add_argument("--bits", type=integer(1, 8), default="2", help=help_)
    help_ = "residual quantization: bits of each stage, of which each but the first encodes what is left, such as 2,2; "
    help_ += "sign for the last one makes inner products unbiased (TurboQuant-prod), such as 3,sign (preset fast; without sign also balanced)"
    size.add_argument("--stages", metavar="N,N,...", type=_stages, help=help_)
    allocate.add_target_arguments(size)
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


def _stages(text: str) -> tuple[int | str, ...]:
    words = text.split(",")
    stages = tuple(int(word) if word.isdecimal() else word for word in words)
    plain = stages[:-1] if stages[-1] == SIGN else stages
    fine = 2 <= len(stages) <= 8 and all(isinstance(s, int) and 1 <= s <= 8 for s in plain)
    if not fine:
        raise argparse.ArgumentTypeError(f"expected 2 to 8 integers from 1 to 8, the last may be {SIGN}, got {text}")
    return stages


def _add_selection(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which tensors (each option may be repeated)")
    group.add_argument("--include", metavar="GLOB", action="append", default=[], help="quantize only these")
    group.add_argument("--exclude", metavar="GLOB", action="append", default=[], help="keep these as they are")
    group.add_argument("--protect", metavar="NAME", action="append", default=[], help="keep this tensor")
    help_ = "keep every tensor whose name holds this text"
    group.add_argument("--protect-fragment", metavar="TEXT", action="append", default=[], help=help_)
    help_ = (
        "quantize protected tensors at this many bits instead of keeping them (without --protect options and targets, "
    )
    help_ += f"the presets balanced and best give embeddings and output layers {EMBEDDING_BITS} bits)"
    group.add_argument("--protected-bits", metavar="N", type=integer(1, 8), help=help_)


def add_calibration_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration (for the presets balanced and best, and for mixed precision)")
    help_ = f"(default: {FEEDBACK_TOKENS} for feedback, 8192 for fisher, 1024 for perturbation; with feedback these two take no more)"
    _add_text(group, help_)
    help_ = "what the layers are fitted to: what reaches them in the original model, in the quantized one, or both, so that each layer "
    help_ += "makes up for what the ones before it lost (default: %(default)s)"
    group.add_argument("--calibration-inputs", choices=INPUTS, default="paired", help=help_)
    help_ = "encode columns of more power first, as GPTQ's option of this name does (default: yes)"
    group.add_argument("--activation-order", action=argparse.BooleanOptionalAction, default=True, help=help_)
    help_ = "let the rows of a weight make up for each other's errors, too, as the gradients of the model's prediction tell how; takes a "
    help_ += "backward pass over the tokens (default: yes for the preset best)"
    group.add_argument("--output-feedback", action=argparse.BooleanOptionalAction, help=help_)
    group.add_argument("--spill", action="store_true", help="keep hidden states in files beside OUT, not in memory")


def _add_text(group: Any, default: str) -> None:
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
