"""`quantize`: from a checkpoint to a repository."""

import argparse
from pathlib import Path
from typing import Any

from reference_quantizer.checkpoint import gguf_source, support
from reference_quantizer.checkpoint.source import Source, open_source
from reference_quantizer.commands.options import EXAMPLES, STYLE, add_job_arguments, add_quantization_arguments
from reference_quantizer.commands.settings import (
    find_calibration,
    find_loader_kind,
    find_plan,
    find_tuning_tokens,
    settings,
    tuning_steps,
    without_walk,
)
from reference_quantizer.planning.expectations import expectations
from reference_quantizer.planning.plan import Plan, make_plan
from reference_quantizer.progress import tell
from reference_quantizer.release import report
from tqformat.load_quantized import MANIFEST, TQFormatError


def run_quantize(args: argparse.Namespace) -> int:
    """Write the repository and print what is in it."""
    source = prepare_source(args)
    write_repository(args, source)
    if gguf_source.is_gguf(args.source):
        gguf_source.discard(args.out)
    return 0


def prepare_source(args: argparse.Namespace) -> Source:
    """The source to quantize, for an OUT that may be written; a GGUF file is imported beside OUT."""
    if gguf_source.is_gguf(args.source):
        refuse_revision(args)
        check_target(args.out, Path(args.source), args.overwrite)  # before the work of importing
        source = gguf_source.prepared(args.source, args.out, args.quiet)
    else:
        source = open_source(args.source, args.revision)
    if source.is_inventory:
        raise TQFormatError("BIND.MISSING_FILE", args.source, "an inventory has no weights, only a plan can be made")
    check_target(args.out, source.path, args.overwrite)
    support.refuse_quantized(source.config)
    return source


def write_repository(args: argparse.Namespace, source: Source, extra: dict[str, Any] | None = None) -> None:
    """Quantize `source` to OUT and print what is in it; `extra` goes into the manifest."""
    # torch takes seconds to import, and plan does without
    from reference_quantizer.job.quantize import Target, quantize
    from reference_quantizer.model.machine import check_device
    from reference_quantizer.progress import Progress

    check_device(args.device)
    loader_kind = find_loader_kind(args, source)
    imported = gguf_source.base_model(source.provenance)  # a name, a licence and where it comes from, for the manifest
    base_model = imported | {
        "id": args.base_model or source.id or imported.get("id") or source.path.resolve().name,
        "revision": source.revision,
        "license": args.license or support.find_license(source.path) or imported.get("license"),
    }
    make_plan(source, settings(args))  # what is wrong with the options is told before a model is run
    args = without_walk(args, source)
    plan = find_plan(args, source)
    print_notes(plan, support.files_to_copy(source)[1])
    steps = tuning_steps(args, plan.settings, loader_kind)
    calibration = find_calibration(args, source, plan)

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


def check_target(out: Path, checkpoint: Path, overwrite: bool) -> None:
    """Nothing but a repository or an empty directory is ever replaced, and never the checkpoint (which may be a Hub id)."""
    target, origin = out.resolve(), checkpoint.resolve()
    if origin.exists() and (target.is_relative_to(origin) or origin.is_relative_to(target)):
        raise TQFormatError("PATH.NAME", str(out), "the target and the checkpoint must not lie in each other")
    if not out.exists():
        return
    if not overwrite:
        raise TQFormatError("PATH.COLLISION", str(out), "the target exists; pass --overwrite to replace it")
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).is_file()):
        raise TQFormatError("PATH.COLLISION", str(out), "the target is no tqformat repository, and is not replaced")


def refuse_revision(args: argparse.Namespace) -> None:
    if args.revision:
        raise TQFormatError("SCHEMA.VALUE", "--revision", "a GGUF file has no revisions; leave the option out")


def print_notes(plan: Plan, more: list[str] | None = None) -> None:
    """What is worth knowing of a plan: its notes and `more` of them, and what to expect of it."""
    for note in plan.notes + (more or []):
        tell(f"note: {note}")
    for line in expectations(plan):
        tell(line)


def add_command(commands: Any) -> None:
    """Add `quantize` to the command line."""
    quantize = commands.add_parser("quantize", help="write a repository", epilog=EXAMPLES, formatter_class=STYLE)
    quantize.add_argument("source", metavar="SRC", help="checkpoint directory, Hub id or GGUF file")
    quantize.add_argument("out", metavar="OUT", type=Path, help="directory to create")
    add_quantization_arguments(quantize)
    add_job_arguments(quantize)
    quantize.set_defaults(run=run_quantize)
