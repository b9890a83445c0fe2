"""`python -m conformance check REPO`: a verdict on any repository, by anyone, without trusting it."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from importlib.resources import files
from pathlib import Path

try:
    from conformance import checks_binding, checks_data, checks_decode, checks_evaluation, checks_structure, hub, report
    from conformance.check import CHECKS, LEVELS, Judgement, judge
    from conformance.findings import named, said, tell
    from conformance.folder import Folder
    from conformance.runner import run
    from conformance.subject import Options, Subject
except ImportError as error:
    if str(error.name).partition(".")[0] in ("conformance", "schemas"):
        raise
    raise SystemExit(
        f"error [UNSUPPORTED.LIBRARY] {error.name or 'a library'}: cannot be imported "
        f"({' '.join(str(error).split())[:200]}); install what the suite needs with "
        "python -m pip install numpy 'jsonschema>=4.18' 'tqdm>=4.60', "
        "or, in a checkout of tqformat, its extra `conformance`: python -m pip install '.[conformance]'"
    ) from None

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
  L1  binding:   every file, size, digest, payload tensor, total and tie; evaluation files follow from
                 themselves, and a marked model card states their figures
  L2  data:      scales, padding, code range, levels, signs, matrices, rotations
  L3  decode:    every weight is finite; load_quantized.py, if the repository has one, is a known release,
                 or (--run-loader) is run in isolation and gives the oracle's weights within [TQ-NUM-5]
A level that could not be judged in full is INCOMPLETE, never PASS.
"""

EPILOG = """\
exit status:
  0  the level asked for passed (without --level: L3, everything): no rule is broken, and all that the
     level stands for was judged, the repository's own loader included
  1  a rule is broken, or the level is INCOMPLETE, for one of these reasons, which the report names:
       load_quantized.py is no known release, so that nobody knows what it does:
                                 embed a release, or --run-loader, or --level L2 for all the rest
       --run-loader was asked for, and there is no loader, a library that it needs is missing, or
                                 this system cannot isolate it
       a file could not be read (or, from the Hub, fetched), or a report not written
     A repository without load_quantized.py lacks nothing: there is no program to judge.
  2  usage: a wrong option, or REPO is neither a directory nor a Hub id
  3  a defect of the validator (INTERNAL.ERROR)

examples:
  %(prog)s my-model
  %(prog)s owner/name --revision main
  %(prog)s my-model --level L1 --json report.json --junit report.xml
  %(prog)s my-model --card
  %(prog)s my-model --run-loader --loader-memory 16
  %(prog)s ~/.cache/huggingface/hub/models--a--b/snapshots/0123abcd --hub-cache
"""


def program() -> str:
    """How this program was started: as a console script, or as a module."""
    name = Path(sys.argv[0]).stem
    return name if name.startswith("tqformat") else "python -m conformance"


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog=program(), description="The conformance suite of tqformat.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check", help="judge a repository", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw
    )
    check.add_argument(
        "repository",
        metavar="REPO",
        help="directory that holds quant_manifest.json, or a Hub id such as owner/name, which is fetched whole",
    )
    check.add_argument("--revision", metavar="R", help="branch, tag or commit of a Hub id (main)")
    check.add_argument("--level", choices=LEVELS, default="L3", help="highest level to judge, and the one to pass (L3)")
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
    check.set_defaults(usage_error=check.error)
    run.add_parser(commands)
    return top


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer from 1, got {text}")
    return value


def exit_code(judgement: Judgement) -> int:
    if judgement.crashed:
        return INTERNAL
    return CONFORMANT if judgement.state(judgement.level) == "PASS" else NOT_CONFORMANT


def open_folder(arguments: argparse.Namespace) -> Folder:
    """The directory to judge; a Hub id is fetched, whose links are those of the Hub's cache [TQ-REPO-1]."""
    path = Path(arguments.repository)
    if path.is_dir() or not hub.is_id(arguments.repository):
        if arguments.revision:
            arguments.usage_error(f"--revision is for a Hub id, and {arguments.repository} is none")
        try:
            return Folder(path, arguments.hub_cache)
        except (FileNotFoundError, NotADirectoryError) as error:
            arguments.usage_error(f"{error.strerror}: {arguments.repository}; expected a directory or a Hub id")
    if arguments.card:
        arguments.usage_error("--card writes into REPO, which must be a directory and not a Hub id")
    return Folder(hub.fetch(arguments.repository, arguments.revision), hub_cache=True)


def check(arguments: argparse.Namespace) -> int:
    options = Options(
        run_loader=arguments.run_loader,
        allow_network=arguments.allow_network_unisolated,
        loader_memory=arguments.loader_memory * 2**30,
        loader_seconds=arguments.loader_seconds,
        known_loaders=checks_decode.known_loaders(
            files("conformance").joinpath("known_loaders.json").read_text("utf-8")
        ),
        progress=sys.stderr.isatty(),
    )
    if arguments.run_loader and arguments.level != "L3":
        arguments.usage_error(f"--run-loader is for level L3, and {arguments.level} was asked for")
    folder = open_folder(arguments)
    gc.disable()  # a check makes hardly a cycle; the collector would visit millions of JSON values in vain
    try:
        subject = Subject(folder, options)
        judgement = judge(subject, arguments.level)
        code, version = exit_code(judgement), "1.0"
        tell(report.text(judgement, version))
        if arguments.json:
            document = report.as_json(judgement, subject, version, code)
            with named(str(arguments.json)):
                arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        if arguments.junit:
            with named(str(arguments.junit)):
                arguments.junit.write_text(report.as_junit(judgement, subject), encoding="utf-8")
    finally:
        gc.enable()
        folder.close()
    if arguments.card:
        update_card(folder.path / "README.md", report.verdict(judgement, version))
    return code


def update_card(card: Path, line: str) -> None:
    """Puts the verdict into a model card, in one step; a link is replaced and not followed, and no other byte changes."""
    new = card.with_name(f".{card.name}.new")
    regular = card.is_file() and not card.is_symlink()
    old = card.read_bytes().decode("utf-8", "surrogateescape") if regular else ""
    try:
        with named(str(card)):
            new.write_bytes(report.with_verdict(old, line).encode("utf-8", "surrogateescape"))
            os.replace(new, card)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        return run.run(arguments) if arguments.command == "run" else check(arguments)
    except hub.HubError as error:
        print(f"error {error}", file=sys.stderr)
    except OSError as error:  # a full disk, a directory that may not be written, a reader of our output that went away
        print(f"error: {said(error)}", file=sys.stderr)
    return NOT_CONFORMANT


if __name__ == "__main__":
    sys.exit(main())
