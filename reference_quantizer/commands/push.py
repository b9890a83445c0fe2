"""`push`: a repository goes to the Hub."""

import argparse
from pathlib import Path
from typing import Any

from reference_quantizer.checkpoint.source import HUB_ID
from reference_quantizer.progress import tell
from reference_quantizer.release import report
from reference_quantizer.release.push import CARD, PushError, check_release, push
from tqformat.load_quantized import TQFormatError


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
    width = max(len(item.name) for item in items)
    for item in items:
        print(f"{item.name:<{width}}  {size_text(item.size):>12}")
    total = sum(item.size for item in items)
    visibility = "a private repository" if args.private else "a repository with your default visibility"
    place = f"{args.repo_id}, branch {args.branch} ({visibility} if it is new)"
    print(f"{len(items)} files, {total:,} bytes -> {place}")
    print(f"weights: {report.size_line(path)}", flush=True)
    if CARD not in {item.name for item in items}:
        tell(f"note: there is no {CARD}, so the page on the Hub will be empty")
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


def add_command(commands: Any) -> None:
    """Add `push` to the command line."""
    parser = commands.add_parser("push", help="check a finished repository and upload it to the Hub")
    parser.add_argument("source", metavar="REPO", help="repository directory")
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="where it goes on the Hub; created if it is not there")
    parser.add_argument("--private", action="store_true", help="only you can see it; a public one there is refused")
    parser.add_argument("--dry-run", action="store_true", help="list what would go up; needs no network and no token")
    help_ = "branch to commit to, created if it is not there (default: %(default)s)"
    parser.add_argument("--branch", "--revision", metavar="NAME", default="main", help=help_)
    parser.add_argument("--message", metavar="TEXT", help="commit message")
    parser.set_defaults(run=run_push)
