"""`card`: the model card of a repository."""

import argparse
from pathlib import Path
from typing import Any

from reference_quantizer.checkpoint.source import HUB_ID
from reference_quantizer.commands.options import STYLE
from reference_quantizer.release.base import record
from reference_quantizer.release.card import write_card
from tqformat.load_quantized import TQFormatError

CARD = """Write README.md, the model card, into a finished repository: figures, tables and the verdict of the check.

Every number is taken from the manifest and the evaluation files, so run it again after `evaluate`. A card that was edited,
or that another hand wrote, is replaced only with --overwrite.
"""
EXAMPLES = """examples:
  python -m reference_quantizer card ./model-4bit
  python -m reference_quantizer card ./model-4bit --repo-id owner/model-4bit
  python -m reference_quantizer card ./model-4bit --license apache-2.0 --base-model owner/model

--license and --base-model correct what the manifest records, and what the evaluation files say of it.
"""


def run_card(args: argparse.Namespace) -> int:
    """Write the card and say where it is."""
    if not args.source.is_dir():
        raise TQFormatError("BIND.MISSING_FILE", str(args.source), "expected a repository directory")
    for id in (args.repo_id, args.base_model):
        if id is not None and not HUB_ID.fullmatch(id):
            raise TQFormatError("SCHEMA.VALUE", id, "expected a Hub id such as owner/name")
    if args.base_model or args.license:
        record(args.source, args.base_model, args.license)
    print(f"written: {write_card(args.source, args.overwrite, args.repo_id)}")
    return 0


def add_command(commands: Any) -> None:
    """Add `card` to the command line."""
    help_ = "write README.md with figures and the verdict into a repository"
    parser = commands.add_parser("card", help=help_, description=CARD, epilog=EXAMPLES, formatter_class=STYLE)
    parser.add_argument("source", metavar="REPO", type=Path, help="repository directory")
    parser.add_argument("--overwrite", action="store_true", help="replace a README.md that was edited or is not ours")
    help_ = "the Hub id under which it will be published, for the card's examples (default: as in the card before)"
    parser.add_argument("--repo-id", metavar="OWNER/NAME", help=help_)
    parser.add_argument("--license", metavar="ID", help="licence of the base model, such as apache-2.0, to be recorded")
    parser.add_argument("--base-model", metavar="ID", help="Hub id of the base model, to be recorded")
    parser.set_defaults(run=run_card)
