"""`python -m conformance check REPO`: a verdict on any repository, by anyone, without trusting it."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from importlib.resources import files
from pathlib import Path

from conformance import checks_binding, checks_data, checks_decode, checks_evaluation, checks_structure, report
from conformance.check import CHECKS, LEVELS, Judgement, judge
from conformance.folder import Folder
from conformance.runner import run
from conformance.subject import Options, Subject

# importing the checks lists them, in the order of judgement
assert list(dict.fromkeys(each.find.__module__ for each in CHECKS.values())) == [
    module.__name__ for module in (checks_structure, checks_binding, checks_data, checks_decode, checks_evaluation)
]

CONFORMANT, NOT_CONFORMANT, USAGE, INTERNAL = range(4)

DESCRIPTION = """\
Judge a repository by SPEC.md, without trusting it: nothing in it is run (but for --run-loader), no link
is followed out of it, and nothing is allocated before its size is checked.

levels, each with all below it:
  L0  structure: paths, JSON, the manifest's schema and references, payload headers
  L1  binding:   every file, size, digest, payload tensor, total and tie; evaluation files follow from themselves
  L2  data:      scales, padding, code range, levels, signs, matrices, rotations
  L3  decode:    every weight is finite; the embedded loader is a known release, or (--run-loader) is run
                 in isolation and gives the oracle's weights within the tolerance of [TQ-NUM-5]
A level that could not be judged in full is INCOMPLETE, never PASS.
"""

EPILOG = """\
exit status:
  0  conformant: no violation, and the level asked for passed; without --level, L2 or more passed
     (L3 stays INCOMPLETE where the embedded loader is absent or no known release; with
     --level L3 and without --run-loader, one that is no known release is BIND.LOADER)
  1  not conformant, or the level asked for is INCOMPLETE
  2  usage: a wrong option, or REPO is no directory
  3  a defect of the validator (INTERNAL.ERROR)

examples:
  python -m conformance check my-model
  python -m conformance check my-model --level L1 --json report.json --junit report.xml
  python -m conformance check my-model --card
  python -m conformance check my-model --run-loader --loader-memory 16
  python -m conformance check ~/.cache/huggingface/hub/models--a--b/snapshots/0123abcd --hub-cache
"""


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="python -m conformance", description="The conformance suite of tqformat.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check", help="judge a repository", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw
    )
    check.add_argument("repository", metavar="REPO", type=Path, help="directory that holds quant_manifest.json")
    check.add_argument("--level", choices=LEVELS, help="highest level to judge, and the one to pass (default: all)")
    check.add_argument("--json", metavar="F", type=Path, help="write the report as JSON to F")
    check.add_argument("--junit", metavar="F", type=Path, help="write the report as JUnit XML to F")
    check.add_argument("--card", action="store_true", help="state the verdict in REPO's README.md, the model card")
    check.add_argument("--hub-cache", action="store_true", help="accept the links that the Hub's local cache makes")
    loader = check.add_argument_group("the embedded loader")
    loader.add_argument("--run-loader", action="store_true", help="run load_quantized.py of REPO, isolated (L3)")
    loader.add_argument(
        "--loader-memory", metavar="GiB", type=_positive, default=8, help="its limit of address space (8)"
    )
    loader.add_argument("--loader-seconds", metavar="S", type=_positive, default=3600, help="its limit of time (3600)")
    loader.add_argument(
        "--allow-network-unisolated", action="store_true", help="run it even where the network cannot be shut off"
    )
    run.add_parser(commands)
    return top


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer from 1, got {text}")
    return value


def exit_code(judgement: Judgement, explicit: bool) -> int:
    if judgement.crashed:
        return INTERNAL
    wanted = judgement.level if explicit else "L2"
    ok = not judgement.violations and judgement.passed is not None and judgement.passed >= wanted
    return CONFORMANT if ok else NOT_CONFORMANT


def check(arguments: argparse.Namespace) -> int:
    options = Options(
        require_release=arguments.level == "L3",
        run_loader=arguments.run_loader,
        allow_network=arguments.allow_network_unisolated,
        loader_memory=arguments.loader_memory * 2**30,
        loader_seconds=arguments.loader_seconds,
        known_loaders=checks_decode.known_loaders(
            files("conformance").joinpath("known_loaders.json").read_text("utf-8")
        ),
        progress=sys.stderr.isatty(),
    )
    try:
        folder = Folder(arguments.repository, arguments.hub_cache)
    except OSError as error:
        print(f"python -m conformance check: {error.strerror}: {arguments.repository}", file=sys.stderr)
        return USAGE
    subject = Subject(folder, options)
    judgement = judge(subject, arguments.level or "L3")
    code, version = exit_code(judgement, arguments.level is not None), "1.0"
    print(report.text(judgement, version))
    folder.close()
    try:
        if arguments.json:
            document = report.as_json(judgement, subject, version, code)
            arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        if arguments.junit:
            arguments.junit.write_text(report.as_junit(judgement, subject), encoding="utf-8")
        if arguments.card:
            update_card(arguments.repository / "README.md", report.verdict(judgement, version))
    except OSError as error:
        print(f"python -m conformance check: {error.strerror}: {error.filename}", file=sys.stderr)
        return USAGE
    return code


def update_card(card: Path, line: str) -> None:
    """Puts the verdict into a model card, in one step; a link is replaced and not followed."""
    old = card.read_text("utf-8") if card.is_file() and not card.is_symlink() else ""
    new = card.with_name(f".{card.name}.new")
    new.write_text(report.with_verdict(old, line), "utf-8")
    os.replace(new, card)


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    return run.run(arguments) if arguments.command == "run" else check(arguments)


if __name__ == "__main__":
    gc.disable()  # a check is short and makes hardly a cycle; the collector would visit millions of JSON values in vain
    sys.exit(main())
