"""`push`: a repository goes to the Hub."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from reference_quantizer.checkpoint.source import HUB_ID
from reference_quantizer.checkpoint.support import card_license
from reference_quantizer.commands.options import STYLE
from reference_quantizer.progress import program, tell
from reference_quantizer.release import base, report
from reference_quantizer.release.card import is_unedited, read_state, write_card
from reference_quantizer.release.push import CARD, PushError, check_release, push
from tqformat.load_quantized import TQFormatError

PUSH = """Check a finished repository file by file, and upload it to the Hub in one commit.

What the manifest lists, the manifest and README.md go up, nothing else. A card that speaks of another evaluation than the
manifest lists is refused, and so is one without a licence, unless --license-unknown says that this is meant: a person at
the terminal is asked for the licence and for the base model's Hub id where they are not recorded. A card that this program
wrote and nobody edited is written again with OWNER/NAME in its examples.

It needs a token that may write: `hf auth login`, or HF_TOKEN.
"""
EXAMPLES = """examples:
  python -m reference_quantizer push ./model-4bit owner/model-4bit --dry-run
  python -m reference_quantizer push ./model-4bit owner/model-4bit --private
  python -m reference_quantizer push ./model-4bit owner/model-4bit --branch 4bit --message 'second try'
"""


def run_push(args: argparse.Namespace) -> int:
    """Check, list, and unless it is a dry run upload."""
    from tqformat.__main__ import size_text

    path = Path(args.source)
    if not HUB_ID.fullmatch(args.repo_id):
        raise TQFormatError("SCHEMA.VALUE", args.repo_id, "expected a Hub id such as owner/name")
    if not path.is_dir():
        raise TQFormatError("BIND.MISSING_FILE", args.source, "expected a repository directory")
    tell("checking sizes and digests of all files")
    items = check_release(path)
    if complete_card(path, args.repo_id, args.dry_run, args.license_unknown):
        items = check_release(path)
    width = max(len(item.name) for item in items)
    for item in items:
        print(f"{item.name:<{width}}  {size_text(item.size):>12}")
    total = sum(item.size for item in items)
    visibility = "a private repository" if args.private else "a repository with your default visibility"
    place = f"{args.repo_id}, branch {args.branch} ({visibility} if it is new)"
    print(f"{len(items)} files, {total:,} bytes -> {place}")
    print(f"weights: {report.size_line(path)}", flush=True)
    if args.dry_run:
        print("dry run: nothing was sent")
        return 0
    message = args.message or f"Upload a tqformat repository ({len(items)} files)"
    try:
        url = push(path, items, args.repo_id, args.branch, args.private, message)
    except PushError as error:
        tell(f"error: {error}")
        return 1
    print(f"published and compared with the Hub's listing: {url}")
    return 0


def complete_card(path: Path, repo_id: str, dry_run: bool, license_unknown: bool) -> bool:
    """Whether the card was written again, with `repo_id` and with what was asked for; a dry run changes nothing.

    SCHEMA.VALUE for a card without a licence, unless `license_unknown`.
    """
    if not (path / CARD).is_file():
        tell(f"note: there is no {CARD}, so the page on the Hub will be empty; `{_card(path)}` writes one")
        return False
    ours, named = is_unedited(path), read_state(path).get("repo_id") == repo_id
    answers: dict[str, str] = {}
    if ours and not dry_run:
        known = report.read_manifest(path)["base_model"]
        license = "unknown" if license_unknown else known.get("license")
        options = (f"`{_card(path)} {option} ID`" for option in ("--base-model", "--license"))
        id, license = base.complete(known["id"], license, *options)
        found = {"id": id, "license": license}
        answers = {key: value for key, value in found.items() if value not in (None, "unknown", known.get(key))}
    if card_license(path) is None and "license" not in answers and not license_unknown:
        advice = f"`{_card(path)} --license ID` records it; with --license-unknown it is published without"
        raise TQFormatError(
            "SCHEMA.VALUE", CARD, f"it names no licence, so nobody can know how the model may be used; {advice}"
        )
    if not ours:
        if repo_id not in (path / CARD).read_text("utf-8", "replace"):
            tell(f"warning: {CARD} does not name {repo_id}; it was edited or is not ours, so it stays as it is")
        return False
    if named and not answers:
        return False
    if dry_run:
        tell(f"note: {CARD} will be written again, with {repo_id} in its examples")
        return False
    base.record(path, **answers)
    tell(f"written again, with {repo_id} in its examples: {write_card(path, repo_id=repo_id)}")
    return True


def _card(path: Path) -> str:
    return f"{program()} card {shlex.quote(str(path))}"


def add_command(commands: Any) -> None:
    """Add `push` to the command line."""
    help_ = "check a finished repository and upload it to the Hub"
    parser = commands.add_parser("push", help=help_, description=PUSH, epilog=EXAMPLES, formatter_class=STYLE)
    parser.add_argument("source", metavar="REPO", help="repository directory")
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="where it goes on the Hub; created if it is not there")
    parser.add_argument("--private", action="store_true", help="only you can see it; a public one there is refused")
    parser.add_argument("--dry-run", action="store_true", help="list what would go up; needs no network and no token")
    help_ = "branch to commit to, created if it is not there (default: %(default)s)"
    parser.add_argument("--branch", "--revision", metavar="NAME", default="main", help=help_)
    parser.add_argument("--message", metavar="TEXT", help="commit message")
    help_ = "publish although the card names no licence of the base model"
    parser.add_argument("--license-unknown", action="store_true", help=help_)
    parser.set_defaults(run=run_push)
