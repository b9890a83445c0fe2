"""Command line of the reference quantizer: `python -m reference_quantizer COMMAND`."""

import argparse
import os
import sys

from reference_quantizer import __version__
from reference_quantizer.commands import card, evaluate, import_gguf, plan, push, quantize, release, tune
from reference_quantizer.commands.options import EXAMPLES, STYLE
from tqformat.load_quantized import TQFormatError


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 if it worked, 1 after an error in the input, 2 for wrong usage, 130 if interrupted."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except TQFormatError as error:
        print(f"error [{error.code}] {error.where}: {error.message}", file=sys.stderr)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = error.filename or args.source
        print(f"error [INTERNAL.ERROR] {where}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reference_quantizer",
        description="Turn a safetensors checkpoint into a tqformat repository.",
        epilog=EXAMPLES,
        formatter_class=STYLE,
    )
    parser.add_argument("--version", action="version", version=f"reference_quantizer {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (quantize, plan, tune, evaluate, release, card, push, import_gguf):
        command.add_command(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
