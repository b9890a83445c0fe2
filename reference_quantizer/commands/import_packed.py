"""`import`: a low-bit checkpoint of another format as a repository with the same values."""

import argparse
from pathlib import Path
from typing import Any

from reference_quantizer.checkpoint import support
from reference_quantizer.commands.options import STYLE, add_repository_arguments
from reference_quantizer.commands.quantize import check_target
from reference_quantizer.progress import Progress, tell
from reference_quantizer.release import report

EXAMPLES = """what SRC may be, and the dtype of its weights here, in which they are the same bit for bit:
  GGUF (file, directory of one, or package:NAME)   F32    22 types of blocks: Q4_0 to Q8_0, K, IQ but IQ2_S, MXFP4, ...
{formats}
examples:
  python -m reference_quantizer import model.Q4_K_M.gguf ./model-tq
  python -m reference_quantizer import owner/name-GPTQ-Int4 ./model-tq --base-model owner/name
  python -m conformance check ./model-tq

Codes, scales and zero points are put in another order, and nothing is quantized again: the result is as good as SRC, and
about as large. To make it smaller start from the original model: `quantize`.
"""


def run_import(args: argparse.Namespace) -> int:
    """Write the repository; print what is in it, and its size beside that of the source."""
    from reference_quantizer.foreign import formats  # torch takes seconds to import
    from reference_quantizer.foreign.repository import write_repository

    check_target(args.out, Path(args.source), args.overwrite)
    with formats.opened(args.source, args.out, args.revision) as found:
        for note in found.notes:
            tell(f"note: {note}")
        base_model = {
            "id": args.base_model or found.id,
            "revision": None if args.base_model else found.provenance.get("revision"),
            "license": args.license or found.license,
        }
        kind = args.loader_kind or support.find_loader_kind(found.config)
        options = {
            "max_shard_bytes": args.max_shard_size,
            "overwrite": args.overwrite,
            "pipeline_tag": args.pipeline_tag,
        }
        progress = Progress(found.count, args.quiet, action="importing", unit="tensor")
        out = write_repository(found, args.out, base_model, kind, progress, **options)
    manifest = report.read_manifest(out)
    report.print_table(report.repo_rows(out), manifest["accounting"], f"written to {args.out}")
    totals = manifest["accounting"]
    scalars = totals["quantized_scalars"] + totals["passthrough_scalars"]
    print(
        f"bits per weight: {8 * found.stored_bytes / scalars:.3f} there ({found.format}, {found.stored_bytes:,} bytes), "
        f"{8 * totals['stored_bytes'] / scalars:.3f} here ({totals['stored_bytes']:,} bytes), headers not counted"
    )
    return 0


def add_command(commands: Any) -> None:
    """Add `import` to the command line."""
    from reference_quantizer.foreign.formats import FORMATS

    formats = "".join(f"  {name:<48} {dtype:<6} {what}\n" for name, (dtype, what) in FORMATS.items())
    help_ = "turn a low-bit checkpoint (GGUF, GPTQ, AWQ, ...) into a repository with the same values"
    epilog = EXAMPLES.format(formats=formats)
    parser = commands.add_parser("import", help=help_, epilog=epilog, formatter_class=STYLE)
    parser.add_argument("source", metavar="SRC", help="checkpoint directory, Hub id, GGUF file or package:NAME")
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to create")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit, where SRC is a Hub id")
    parser.add_argument("--base-model", metavar="ID", help="recorded id of the original model (default: what SRC says)")
    parser.add_argument("--license", metavar="ID", help="recorded licence (default: what SRC says)")
    add_repository_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.set_defaults(run=run_import)
