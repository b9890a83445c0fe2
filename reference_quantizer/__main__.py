"""Command line of the reference quantizer: `python -m reference_quantizer quantize | plan | import-gguf | push`."""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from reference_quantizer import __version__, gguf_source, push, report, support
from reference_quantizer.plan import Plan, Settings, make_plan
from reference_quantizer.source import open_source
from tqformat.load_quantized import LOADER_KINDS, MANIFEST, TQFormatError

EXAMPLES = """examples:
  python -m reference_quantizer plan ./model --bits 2
  python -m reference_quantizer quantize ./model ./model-2bit --bits 2
  python -m reference_quantizer quantize owner/name ./out --bits 4 --protect-fragment embed_tokens --protected-bits 8
  python -m reference_quantizer quantize ./model ./out --bits 3 --include '*.layers.*.weight' --exclude '*conv1d*'
  python -m reference_quantizer quantize model.gguf ./out --bits 4
  python -m reference_quantizer push ./out owner/name --private --dry-run

An interrupted `quantize` continues when the same command is given again.
"""
EVALUATE = """Measure a repository against the checkpoint it was made from.

Perplexity in sliding windows, KL divergence and top-1 agreement of the next-token distributions, the cosine of the logits
after fixed prompts, and greedy samples. Writes eval_summary.json and sample_generations.json into the repository. Both
models are in memory at once. An interrupted run continues when the same command is given again.
"""
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 if it worked, 1 after an error in the input, 2 for wrong usage, 130 if interrupted."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except TQFormatError as error:
        print(f"error [{error.code}] {error.where}: {error.message}", file=sys.stderr)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = error.filename or args.source
        print(f"error [INTERNAL.ERROR] {where}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    return 1


def run_plan(args: argparse.Namespace) -> int:
    """Print what `quantize` would write."""
    gguf = gguf_source.is_gguf(args.source)
    source = gguf_source.plan_source(args.source) if gguf else open_source(args.source, args.revision)
    plan = make_plan(source, _settings(args))
    if args.json:
        accounting = plan.accounting()
        print(json.dumps(plan.to_dict() | {"figures": report.figures(report.plan_rows(plan), accounting)}, indent=1))
        return 0
    _print_notes(plan)
    report.print_table(report.plan_rows(plan), plan.accounting(), f"plan for {args.source} at {args.bits} bit")
    return 0


def run_quantize(args: argparse.Namespace) -> int:
    """Write the repository and print what is in it."""
    gguf = gguf_source.is_gguf(args.source)
    if gguf:
        _check_target(args.out, Path(args.source), args.overwrite)  # before the work of importing
    source = gguf_source.prepared(args.source, args.out) if gguf else open_source(args.source, args.revision)
    if source.is_inventory:
        raise TQFormatError("BIND.MISSING_FILE", args.source, "an inventory has no weights, only a plan can be made")
    _check_target(args.out, source.path, args.overwrite)
    support.refuse_quantized(source.config)
    loader_kind = args.loader_kind or support.find_loader_kind(source.config)
    imported = gguf_source.base_model(source.provenance)  # a name, a licence and where it comes from, for the manifest
    base_model = imported | {
        "id": args.base_model or source.id or imported.get("id") or source.path.resolve().name,
        "revision": source.revision,
        "license": args.license or support.find_license(source.path) or imported.get("license"),
    }
    plan = make_plan(source, _settings(args))
    _print_notes(plan, support.files_to_copy(source)[1])

    # torch takes seconds to import, and plan does without
    from reference_quantizer.quantize import Progress, Target, check_device, quantize

    check_device(args.device)
    target = Target(
        args.out,
        base_model,
        loader_kind,
        args.pipeline_tag or loader_kind,
        args.device,
        args.max_shard_size,
        args.overwrite,
    )
    out = quantize(source, plan, target, Progress(sum(t.info.scalars for t in plan.tensors), args.quiet))
    manifest = report.read_manifest(out)
    error = report.mean_relative_error(manifest)
    report.print_table(report.manifest_rows(manifest), manifest["accounting"], f"written to {args.out}", error)
    if gguf:
        gguf_source.discard(args.out)
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    """Evaluate a repository, write the figures into it and print them."""
    from reference_quantizer import evaluate  # torch takes seconds to import

    names = ("max_length", "stride", "max_windows", "bos", "batch", "device", "dtype", "kl")
    settings = evaluate.Settings(**{name: getattr(args, name) for name in names})
    options = {"split": args.split, "dataset_revision": args.dataset_revision, "base_revision": args.revision}
    options |= {"cache_dir": args.cache_dir, "quiet": args.quiet}
    print(evaluate.describe(evaluate.evaluate(args.source, args.repo, args.dataset, settings, **options)))
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    return Settings(
        bits=args.bits,
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
    )


def _print_notes(plan: Plan, more: list[str] | None = None) -> None:
    for note in plan.notes + (more or []):
        print(f"note: {note}", file=sys.stderr)


def _check_target(out: Path, checkpoint: Path, overwrite: bool) -> None:
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


# ------------------------------------------------------------------------------------------------ arguments


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m reference_quantizer",
        description="Turn a safetensors checkpoint into a tqformat repository.",
        epilog=EXAMPLES,
        formatter_class=style,
    )
    parser.add_argument("--version", action="version", version=f"reference_quantizer {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    quantize = commands.add_parser("quantize", help="write a repository", epilog=EXAMPLES, formatter_class=style)
    quantize.add_argument("source", metavar="SRC", help="checkpoint directory, Hub id or GGUF file")
    quantize.add_argument("out", metavar="OUT", type=Path, help="directory to create")
    _add_method(quantize)
    _add_selection(quantize)
    output = quantize.add_argument_group("output")
    output.add_argument("--base-model", metavar="ID", help="recorded id (default: the Hub id or the directory's name)")
    output.add_argument("--license", metavar="ID", help="recorded licence (default: from the model card or LICENSE)")
    kinds = ", ".join(LOADER_KINDS)
    help_ = f"which class builds the model (default: from config.json): {kinds}"
    output.add_argument("--loader-kind", metavar="KIND", choices=list(LOADER_KINDS), help=help_)
    output.add_argument("--pipeline-tag", metavar="TAG", help="the Hub's task name (default: the loader kind)")
    help_ = "start a new payload file beyond this size: bytes, or with K, M or G (default: 5G)"
    output.add_argument("--max-shard-size", metavar="SIZE", type=_size, default=5 * 10**9, help=help_)
    output.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    output.add_argument("--device", default="cpu", help="where the arithmetic runs: cpu, cuda (default: %(default)s)")
    output.add_argument("--quiet", action="store_true", help="show no progress")
    quantize.set_defaults(run=run_quantize)

    plan = commands.add_parser("plan", help="print the storage table", epilog=EXAMPLES, formatter_class=style)
    help_ = 'checkpoint directory, Hub id, GGUF file, or a JSON file {name: {"shape": [...], "dtype": "BF16"}}'
    plan.add_argument("source", metavar="SRC", help=help_)
    _add_method(plan)
    _add_selection(plan)
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=run_plan)

    evaluate = commands.add_parser(
        "evaluate", help="measure a repository against its base", description=EVALUATE, formatter_class=style
    )
    _add_evaluation(evaluate)
    evaluate.set_defaults(run=run_evaluate)
    gguf_source.add_command(commands)
    push.add_command(commands)
    return parser


def _add_method(parser: argparse.ArgumentParser) -> None:
    method = parser.add_argument_group("method (turboquant_mse)")
    method.add_argument("--bits", type=_integer(1, 8), default=2, help="bits per weight, 1 to 8 (default: %(default)s)")
    rotations = ("hadamard", "haar", "none")
    help_ = "random rotation of each vector; haar is stored in the payload (default: %(default)s)"
    method.add_argument("--rotation", choices=rotations, default="hadamard", help=help_)
    help_ = "weights that share one scale (default: the whole row)"
    method.add_argument("--vector-length", metavar="N", type=_integer(1, 2**20), help=help_)
    help_ = "seed of the rotations (default: %(default)s)"
    method.add_argument("--seed", type=_integer(0, 2**53 - 1), default=42, help=help_)
    help_ = "points of the Lloyd-Max construction (default: %(default)s)"
    method.add_argument("--grid-size", metavar="N", type=_integer(3, 2**20 + 1), default=8193, help=help_)
    help_ = "refinements of the Lloyd-Max construction (default: %(default)s)"
    method.add_argument("--iterations", metavar="N", type=_integer(1, 4096), default=96, help=help_)
    help_ = "dtype of the scales; auto is f16, but bf16 where they leave f16's normal range (default: %(default)s)"
    method.add_argument("--scale-dtype", choices=("auto", "f16", "bf16", "f32"), default="auto", help=help_)
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id; recorded for a local directory")


def _add_selection(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which tensors (each option may be repeated)")
    group.add_argument("--include", metavar="GLOB", action="append", default=[], help="quantize only these")
    group.add_argument("--exclude", metavar="GLOB", action="append", default=[], help="keep these as they are")
    group.add_argument("--protect", metavar="NAME", action="append", default=[], help="keep this tensor")
    help_ = "keep every tensor whose name holds this text"
    group.add_argument("--protect-fragment", metavar="TEXT", action="append", default=[], help=help_)
    help_ = "quantize protected tensors at this many bits instead of keeping them"
    group.add_argument("--protected-bits", metavar="N", type=_integer(1, 8), help=help_)


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="BASE", help="checkpoint directory or Hub id that REPO was made from")
    parser.add_argument("repo", metavar="REPO", type=Path, help="repository directory; both files are written into it")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id BASE")
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
    windows.add_argument("--max-length", metavar="N", type=_integer(2, 2**31), default=512, help=help_)
    help_ = "tokens from one window's begin to the next (default: %(default)s)"
    windows.add_argument("--stride", metavar="N", type=_integer(1, 2**31), default=256, help=help_)
    help_ = "stop after this many (default: full pass)"
    windows.add_argument("--max-windows", metavar="N", type=_integer(1, 2**53 - 1), help=help_)
    help_ = "auto puts a BOS token, which is not scored, in front of each window where the tokenizer itself puts one in"
    help_ += " front of a text (default: %(default)s)"
    windows.add_argument("--bos", choices=("auto", "never"), default="auto", help=help_)
    job = parser.add_argument_group("computation")
    job.add_argument("--batch", metavar="N", type=_integer(1, 4096), help="windows at once (default: 1, on CUDA 8)")
    job.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    kinds = ("float32", "bfloat16", "float16")
    job.add_argument("--dtype", choices=kinds, help="of the arithmetic (default: float32, on CUDA bfloat16)")
    help_ = "leave the KL divergence out; with results in the cache the base is then not loaded"
    job.add_argument("--no-kl", dest="kl", action="store_false", help=help_)
    help_ = "where an interrupted run and the base's results are kept (default: tqformat in the user's cache directory)"
    job.add_argument("--cache-dir", metavar="DIR", type=Path, help=help_)
    job.add_argument("--quiet", action="store_true", help="show no progress")


def _integer(low: int, high: int) -> Any:
    def integer(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected an integer from {low} to {high}, got {text}")
        return value

    return integer


def _size(text: str) -> int:
    found = re.fullmatch(r"([0-9]+)([kmgt]?)b?", text.lower())
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(f"expected a size such as 5G or 500M, got {text}")
    return int(found[1]) * UNITS[found[2]]


if __name__ == "__main__":
    sys.exit(main())
