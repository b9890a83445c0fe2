"""Command line of the reference quantizer: `python -m reference_quantizer COMMAND`."""

import argparse
import os
import sys
from typing import Any, NoReturn

from reference_quantizer import __version__, disk
from reference_quantizer.commands import card, evaluate, import_gguf, import_packed, plan, push, quantize, release, tune
from reference_quantizer.commands.options import EXAMPLES, STYLE
from reference_quantizer.libraries import need
from reference_quantizer.progress import MODULE, program
from tqformat.load_quantized import TQFormatError

# of each command, what it cannot do without; told before the work, and not after hours of it
LIBRARIES = {
    "plan": ("rich",),
    "quantize": ("rich",),
    "tune": ("transformers",),
    "evaluate": ("transformers",),
    "card": ("jinja2", "yaml", "matplotlib"),
    "release": ("jsonschema", "rich", "jinja2", "yaml", "matplotlib", "transformers"),
    "push": (),
    "import": ("rich",),
    "import-gguf": ("transformers", "accelerate", "gguf"),
}


RESUMED = ("quantize", "tune", "evaluate", "release")  # commands that go on where they were interrupted


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 if it worked, 1 after an error in the input, 2 for wrong usage, 130 if interrupted."""
    args = _parser().parse_args(argv)
    place = getattr(args, "out", None) or getattr(args, "repo", None) or args.source  # where it writes
    try:
        need(args.command, *LIBRARIES[args.command])
        with disk.writing(place):
            return int(args.run(args))
    except TQFormatError as error:
        print(f"error [{error.code}] {error.where}: {error.message}", file=sys.stderr)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # not about the format, so no code of SPEC.md says it
        print(f"error: {disk.describe(error, place)}", file=sys.stderr)
    except KeyboardInterrupt:
        again = "continues where it stopped" if args.command in RESUMED else "begins anew"
        print(f"\ninterrupted; the same command {again}", file=sys.stderr)
        return 130
    return 1


class Parser(argparse.ArgumentParser):
    """A parser whose errors are two lines, the error last, and whose examples name the program as it was started."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"usage: see {self.prog} --help\nerror: {message}\n")

    def format_help(self) -> str:
        return super().format_help().replace(MODULE, program())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=program(),
        description="Turn a safetensors checkpoint into a tqformat repository.",
        epilog=EXAMPLES,
        formatter_class=STYLE,
    )
    parser.add_argument("--version", action="version", version=f"reference_quantizer {__version__}")
    subparsers: Any = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for command in (quantize, import_packed, plan, tune, evaluate, release, card, push, import_gguf):
        command.add_command(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
