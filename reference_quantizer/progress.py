"""How far a long job is, on standard error. Needs no torch."""

import sys
import time


class Progress:
    """Units done: a bar on a terminal, a line now and then elsewhere, nothing when quiet."""

    def __init__(
        self, total: int, quiet: bool = False, every: float = 10.0, action: str = "quantizing", unit: str = "weight"
    ) -> None:
        self.total, self.done, self.every, self.action, self.unit = total, 0, every, action, unit
        self.quiet = quiet
        self._lines = not quiet and not sys.stderr.isatty()
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
            self._last = time.monotonic()
            share = f"{100 * self.done / max(1, self.total):.0f} %"
            line = f"{self.action}: {self.done:,} of {self.total:,} {self.unit}s, {share}"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is and go on below it."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def tell(line: str) -> None:
    """One line for people, beside what a command prints."""
    print(line, file=sys.stderr, flush=True)
