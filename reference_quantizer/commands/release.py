"""From a checkpoint to a finished release in one command: quantize, evaluate, write the card, check.

A stage whose result is there is skipped. What is there is judged by content: the manifest names the job that it came from,
a digest of the checkpoint and of all options that decide the weights; the evaluation files name the payload, the data set
and the settings; and `.release.json` in the repository holds the digest of the manifest that the card describes.
"""

import argparse
import hashlib
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from reference_quantizer import __version__
from reference_quantizer.checkpoint import gguf_source, support
from reference_quantizer.checkpoint.source import HUB_ID, Source, file_sha256, open_source, weights_sha256
from reference_quantizer.commands.options import (
    STYLE,
    add_evaluation_arguments,
    add_job_arguments,
    add_quantization_arguments,
)
from reference_quantizer.commands.quantize import prepare_source, write_repository
from reference_quantizer.commands.settings import (
    evaluation_datasets,
    evaluation_options,
    evaluation_settings,
    find_loader_kind,
)
from reference_quantizer.model.text import read_corpora
from reference_quantizer.planning.expectations import expected_evaluation
from reference_quantizer.progress import program, tell
from reference_quantizer.release import base, card, report
from tqformat.load_quantized import MANIFEST, TQFormatError

CARD, SUMMARY = "README.md", "eval_summary.json"
LEVEL = "L3"
SHOWN = 5  # findings of a failed check
DESCRIPTION = """Quantize, evaluate, write the card and check, in one command.

The result is a directory that is ready to be published. Given again, the command goes on where it was interrupted, skips
the stages whose results are there, and repeats those that a changed option makes stale; weights of another job are
replaced only with --overwrite. A person at the terminal is asked for the base model's Hub id and licence where neither
options nor files tell them; elsewhere a line says so.
"""
RELEASE_EXAMPLES = """examples:
  python -m reference_quantizer release ./model ./model-4bit --bits 4 --dataset test.txt
  python -m reference_quantizer release owner/name ./model-4bit --bits 4 --calibration text.txt --dataset test.txt
  python -m reference_quantizer release ./model ./out --bits 3 --base-model owner/name --license apache-2.0
  python -m reference_quantizer release model.gguf ./out --bits 4 --dataset test.txt --max-windows 40
  python -m reference_quantizer release ./model ./out --target-bpw 3.5 --calibration text.txt --repo-id owner/name-3bit

`plan` shows the sizes beforehand, `push` publishes the result.
"""


def run_release(args: argparse.Namespace) -> int:
    """Carry out the stages that are not complete, and say what came of it; 1 unless the check passes in full."""
    start = time.monotonic()

    def stage(number: int, title: str) -> None:
        print(f"=== {number}/4 {title}  [{time.monotonic() - start:.0f} s]", flush=True)

    if args.repo_id is not None and not HUB_ID.fullmatch(args.repo_id):
        raise TQFormatError("SCHEMA.VALUE", args.repo_id, "expected a Hub id such as owner/name")
    stage(1, "quantize")
    job = job_digest(args)
    quantized, evaluated = is_quantized(args.out, job), args.skip_evaluation
    if not quantized:
        _check_target(args)
    if quantized and not evaluated:
        evaluated = is_evaluated(args)
    if not evaluated:
        read_corpora(
            evaluation_datasets(args), args.split, args.dataset_revision
        )  # a data set that is not there is told at once
    if quantized:
        print(f"complete: {args.out}")
    else:
        _quantize(args, job)

    stage(2, "evaluate")
    if args.skip_evaluation:
        print("skipped, as asked")
    elif evaluated:
        print(f"complete: {args.out / SUMMARY}")
    else:
        _evaluate(args)
    gguf_source.discard(args.out)

    stage(3, "card")
    if is_described(args.out, args.repo_id):
        print(f"complete: {args.out / CARD}")
    else:
        print(f"written: {card.write_card(args.out, args.overwrite, args.repo_id)}")

    stage(4, "check")
    verdict = check(args.out)
    if verdict["level_passed"] != LEVEL:
        print(f"error: expected a release that passes {LEVEL}, got {verdict['verdict']}", file=sys.stderr)
        return 1
    print(f"{verdict['verdict']}  [{time.monotonic() - start:.0f} s]\n\n{describe(args.out, args.repo_id)}")
    return 0


# ------------------------------------------------------------------------------------------------ quantize


def job_digest(args: argparse.Namespace) -> str:
    """A digest of everything that decides the weights and what is stored beside them: program, checkpoint, options."""
    parser = argparse.ArgumentParser()
    add_quantization_arguments(parser)
    names = vars(parser.parse_args([])).keys() - {"overwrite", "spill"}
    chosen = {name: _content(getattr(args, name)) for name in sorted(names)}
    job = [__version__, _checkpoint_facts(args), chosen, args.device]
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


def _content(value: Any) -> Any:
    """An option's value; of a file that it names, what is in it."""
    if isinstance(value, list | tuple):
        return [_content(item) for item in value]
    return file_sha256(Path(value)) if isinstance(value, str) and Path(value).is_file() else value


def _checkpoint_facts(args: argparse.Namespace) -> Any:
    """What the checkpoint is, by content: the digests of all files that quantizing reads."""
    if gguf_source.is_gguf(args.source):
        facts = gguf_source.identity(args.source)
        return facts if "version" in facts else [Path(facts["source"]).name, file_sha256(Path(facts["source"]))]
    source = open_source(args.source, args.revision)
    if source.is_inventory:
        raise TQFormatError("BIND.MISSING_FILE", args.source, "an inventory has no weights, only a plan can be made")
    beside = [*support.files_to_copy(source)[0], *(p for p in [source.path / CARD] if p.is_file())]
    names = [source.id or source.path.resolve().name, source.revision]
    return [*names, weights_sha256(source), [[path.name, file_sha256(path)] for path in beside]]


def is_quantized(out: Path, job: str) -> bool:
    """Whether `out` is a repository that came from this job."""
    return (out / MANIFEST).is_file() and _recorded(out).get("job") == job


def _recorded(out: Path) -> dict[str, Any]:
    """What `release` has put into the manifest; empty for a repository that it has not made."""
    found = report.read_manifest(out).get("extra", {}).get("release")
    return found if isinstance(found, dict) else {}


def _check_target(args: argparse.Namespace) -> None:
    """PATH.COLLISION where OUT is a release of another job, and may not be replaced."""
    if not args.overwrite and (args.out / MANIFEST).is_file() and _recorded(args.out):
        message = "the release there came from another checkpoint, other options or another version of this program"
        raise TQFormatError("PATH.COLLISION", str(args.out), f"{message}; pass --overwrite to replace it")


def _quantize(args: argparse.Namespace, job: str) -> None:
    source = prepare_source(args)
    if not args.skip_evaluation and (kind := find_loader_kind(args, source)) not in support.KINDS:
        advice = f"a model for {kind} does not predict the next token; pass --skip-evaluation"
        raise TQFormatError("SCHEMA.VALUE", "loader_kind", advice)
    if not args.skip_evaluation:
        from reference_quantizer.evaluation.evaluate import cut_text
        from reference_quantizer.model.base import load_tokenizer

        tokenizer, windows = load_tokenizer(source.path), 0
        for corpus in read_corpora(evaluation_datasets(args), args.split, args.dataset_revision):
            # a text that is too short is told at once
            windows += len(cut_text(corpus, tokenizer, evaluation_settings(args))[1])
        if args.device == "cpu":
            scalars = sum(info.scalars for info in source.tensors.values())
            tell(expected_evaluation(scalars, windows * args.max_length, os.cpu_count() or 1))
    args.base_model, args.license = _base_facts(args, source)
    recorded = {"job": job, "base_weights_sha256": weights_sha256(source)}
    write_repository(args, source, {"release": recorded})


def _base_facts(args: argparse.Namespace, source: Source) -> tuple[str, str | None]:
    """The base model's id and licence: of the options, else what is found, else what is asked for."""
    imported = gguf_source.base_model(source.provenance)
    id = args.base_model or source.id or imported.get("id") or source.path.resolve().name
    license = args.license or support.find_license(source.path) or imported.get("license")
    return base.complete(id, license, "--base-model", "--license")


# ------------------------------------------------------------------------------------------------ evaluate


def is_evaluated(args: argparse.Namespace) -> bool:
    """Whether the evaluation files in OUT are about these weights, this data set and these settings."""
    from reference_quantizer.evaluation import evaluate

    wanted = evaluation_settings(args)
    data = {"split": args.split, "dataset_revision": args.dataset_revision}
    datasets = evaluation_datasets(args)
    return evaluate.is_current(args.out, _recorded(args.out)["base_weights_sha256"], datasets, wanted, **data)


def _evaluate(args: argparse.Namespace) -> None:
    from reference_quantizer.evaluation import evaluate

    base = _base(args)
    wanted, options = evaluation_settings(args), evaluation_options(args)
    summary = evaluate.evaluate(str(base.path), args.out, evaluation_datasets(args), wanted, **options)
    print(evaluate.describe(summary, evaluate.read_samples(args.out)))


def _base(args: argparse.Namespace) -> Source:
    """The checkpoint that was quantized; a GGUF file's import is beside OUT until the evaluation is done."""
    if gguf_source.is_gguf(args.source):
        return gguf_source.prepared(args.source, args.out, args.quiet)
    return open_source(args.source, args.revision)


# ------------------------------------------------------------------------------------------------ card and check


def is_described(out: Path, repo_id: str | None) -> bool:
    """Whether the card is about the manifest as it is, which binds all other files. A card edited by hand remains."""
    if not (out / CARD).is_file():
        return False
    state = card.read_state(out)
    return state.get("manifest") == file_sha256(out / MANIFEST) and repo_id in (None, state.get("repo_id"))


def check(out: Path) -> dict[str, Any]:
    """The report of the conformance suite on `out`; its first findings are printed."""
    found = card.conformance(out)
    for violation in found["violations"][:SHOWN]:
        place = " ".join(str(part) for part in (violation["file"], violation["pointer"]) if part)
        print(f"{violation['code']} {place} [{violation['rule']}]: {violation['message']}", file=sys.stderr)
    if (more := sum(found["counts"].values()) - SHOWN) > 0:
        print(f"and {more} more: python -m conformance check {shlex.quote(str(out))}", file=sys.stderr)
    return found


def describe(out: Path, repo_id: str | None) -> str:
    """Where a sound release is and what it is worth, and the command that publishes it."""
    lines = [f"release     {out}", f"size        {report.size_line(out)}"]
    if (out / SUMMARY).is_file():
        summary = json.loads((out / SUMMARY).read_bytes())
        base, quantized = (summary[model]["perplexity"] for model in ("base", "quantized"))
        ratio = f"ratio {summary['perplexity_ratio']:.4f} ± {summary['perplexity_ratio_standard_error']:.4f}"
        lines.append(f"perplexity  base {base:.4f}, quantized {quantized:.4f}, {ratio}")
        if kl := summary["kl_divergence"]:
            lines.append(
                f"KL (nats)   mean {kl['mean']:.5f}, median {kl['median']:.5f}, p99 {kl['p99']:.5f}, p99.9 {kl['p999']:.5f}"
            )
    else:
        lines.append("perplexity  not measured")
    push = f"{program()} push {shlex.quote(str(out))} {repo_id or 'OWNER/NAME'} --private"
    return "\n".join([*lines, f"publish     {push}"])


# ------------------------------------------------------------------------------------------------ command


def add_command(subparsers: Any) -> None:
    """Add `release` to the command line."""
    help_ = "quantize, evaluate, write the card and check, in one command"
    parser = subparsers.add_parser(
        "release", help=help_, description=DESCRIPTION, epilog=RELEASE_EXAMPLES, formatter_class=STYLE
    )
    parser.add_argument("source", metavar="SRC", help="checkpoint directory, Hub id or GGUF file")
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to create")
    add_quantization_arguments(parser)
    add_evaluation_arguments(parser)
    add_job_arguments(parser)
    parser.add_argument("--skip-evaluation", action="store_true", help="measure nothing; the card then says so")
    help_ = "the Hub id under which it will be published, for the card's examples"
    parser.add_argument("--repo-id", metavar="OWNER/NAME", help=help_)
    parser.set_defaults(run=run_release)
