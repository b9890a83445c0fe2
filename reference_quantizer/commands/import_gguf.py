"""`import-gguf`: a GGUF file as a plain checkpoint."""

import argparse
import sys
from pathlib import Path
from typing import Any

from reference_quantizer.checkpoint.gguf_source import describe_import, import_gguf, is_gguf
from reference_quantizer.checkpoint.source import open_source
from reference_quantizer.progress import tell
from tqformat.load_quantized import TQFormatError


def run_import(args: argparse.Namespace) -> int:
    """Write the checkpoint and print what it was made from."""
    if not is_gguf(args.source):
        raise TQFormatError(
            "CONTAINER.HEADER", args.source, "neither a GGUF file, nor a directory of one, nor package:NAME"
        )
    facts = import_gguf(args.source, args.out, args.overwrite, args.quiet)
    for note in describe_import(facts):
        tell(f"note: {note}")
    source = open_source(str(args.out))
    scalars = sum(info.scalars for info in source.tensors.values())
    print(f"{facts['file']}, {facts['architecture']}: {len(source.tensors)} tensors, {scalars:,} scalars -> {args.out}")
    if peak := _peak_bytes():
        print(f"peak memory {peak / 1e9:.2f} GB")
    return 0


def _peak_bytes() -> int:
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def add_command(commands: Any) -> None:
    """Add `import-gguf` to the command line."""
    parser = commands.add_parser("import-gguf", help="turn a GGUF file into a plain bf16 checkpoint")
    help_ = "GGUF file, directory that holds one, or package:NAME for an installed Python package with one"
    parser.add_argument("source", metavar="FILE", help=help_)
    parser.add_argument("out", metavar="OUT", type=Path, help="checkpoint directory to create")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.set_defaults(run=run_import)
