"""What is told to people: how far a long job is, lines beside the results, the program's name. Needs no torch."""

import sys
import time
from pathlib import Path

from reference_quantizer.libraries import is_installed

MODULE, SCRIPT = "python -m reference_quantizer", "tqformat-quantize"


class Progress:
    """Units done: a bar on a terminal, a line now and then elsewhere, nothing when quiet."""

    def __init__(
        self, total: int, quiet: bool = False, every: float = 10.0, action: str = "quantizing", unit: str = "weight"
    ) -> None:
        self.total, self.done, self.every, self.action, self.unit = total, 0, every, action, unit
        self.quiet = quiet
        self._lines = not quiet and not (sys.stderr.isatty() and is_installed("tqdm"))
        self._last = time.monotonic()
        self._bar = None
        if not quiet and not self._lines:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=f" {unit}s", unit_scale=total > 10**6, desc=action, file=sys.stderr)

    def advance(self, units: int) -> None:
        """Count `units` more as done."""
        self.done += units
        if self._bar is not None:
            self._bar.update(units)
        elif self._lines and time.monotonic() - self._last >= self.every:
            self._tell()

    def close(self) -> None:
        """The last line, which says that all is done, and go on below it."""
        if self._bar is not None:
            self._bar.update(self.total - self.done)
            self._bar.close()
            self._bar = None
        elif self._lines:
            self.done = self.total
            self._tell()
        self._lines = False

    def _tell(self) -> None:
        self._last = time.monotonic()
        share = f"{100 * self.done / max(1, self.total):.0f} %"
        tell(f"{self.action}: {self.done:,} of {self.total:,} {self.unit}s, {share}")


def tell(line: str) -> None:
    """One line for people, beside what a command prints."""
    print(line, file=sys.stderr, flush=True)


def program() -> str:
    """How this program was started, for hints that can be copied: the console script's name, or the module's."""
    return SCRIPT if Path(sys.argv[0]).stem == SCRIPT else MODULE
