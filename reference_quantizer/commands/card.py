"""`card`: the model card of a repository."""

import argparse
from pathlib import Path
from typing import Any

from reference_quantizer.checkpoint.source import HUB_ID
from reference_quantizer.release.card import write_card
from tqformat.load_quantized import TQFormatError


def run_card(args: argparse.Namespace) -> int:
    """Write the card and say where it is."""
    if not args.source.is_dir():
        raise TQFormatError("BIND.MISSING_FILE", str(args.source), "expected a repository directory")
    if args.repo_id is not None and not HUB_ID.fullmatch(args.repo_id):
        raise TQFormatError("SCHEMA.VALUE", args.repo_id, "expected a Hub id such as owner/name")
    print(f"written: {write_card(args.source, args.overwrite, args.repo_id)}")
    return 0


def add_command(commands: Any) -> None:
    """Add `card` to the command line."""
    parser = commands.add_parser("card", help="write README.md with figures and the verdict into a repository")
    parser.add_argument("source", metavar="REPO", type=Path, help="repository directory")
    parser.add_argument("--overwrite", action="store_true", help="replace a README.md that this program did not write")
    help_ = "the Hub id under which it will be published, for the card's examples"
    parser.add_argument("--repo-id", metavar="OWNER/NAME", help=help_)
    parser.set_defaults(run=run_card)
