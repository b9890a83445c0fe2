"""`plan`: the storage table of what `quantize` would write."""

import argparse
import json
from typing import Any

from reference_quantizer.checkpoint import gguf_source
from reference_quantizer.checkpoint.source import Source, open_source
from reference_quantizer.commands.options import EXAMPLES, STYLE, add_plan_arguments
from reference_quantizer.commands.quantize import print_notes, refuse_revision
from reference_quantizer.commands.settings import find_plan
from reference_quantizer.planning.plan import Plan
from reference_quantizer.release import report


def run_plan(args: argparse.Namespace) -> int:
    """Print what `quantize` would write."""
    plan = find_plan(args, open_checkpoint(args))
    rows, accounting = report.plan_rows(plan), plan.accounting()
    if args.json:
        print(json.dumps(plan.to_dict() | {"figures": report.figures(rows, accounting)}, indent=1))
        return 0
    print_notes(plan)
    report.print_table(rows, accounting, f"plan for {args.source} at {_width(plan)}")
    return 0


def open_checkpoint(args: argparse.Namespace) -> Source:
    """The source to plan: of a GGUF file its headers, of everything else what `open_source` gives."""
    if gguf_source.is_gguf(args.source):
        refuse_revision(args)
        return gguf_source.plan_source(args.source)
    return open_source(args.source, args.revision)


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


def add_command(commands: Any) -> None:
    """Add `plan` to the command line."""
    plan = commands.add_parser("plan", help="print the storage table", epilog=EXAMPLES, formatter_class=STYLE)
    help_ = 'checkpoint directory, Hub id, GGUF file, or a JSON file {name: {"shape": [...], "dtype": "BF16"}}'
    plan.add_argument("source", metavar="SRC", help=help_)
    add_plan_arguments(plan)
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=run_plan)
