"""Command line of the reference quantizer: `python -m reference_quantizer COMMAND`."""

import argparse
import os
import sys

from reference_quantizer import __version__
from reference_quantizer.checkpoint import gguf_source
from reference_quantizer.commands import release
from reference_quantizer.commands import steps as commands
from reference_quantizer.release import card, push
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
        epilog=commands.EXAMPLES,
        formatter_class=commands.STYLE,
    )
    parser.add_argument("--version", action="version", version=f"reference_quantizer {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    commands.add_commands(subparsers)
    release.add_command(subparsers)
    card.add_command(subparsers)
    gguf_source.add_command(subparsers)
    push.add_command(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
