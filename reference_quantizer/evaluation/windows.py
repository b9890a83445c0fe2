"""How the tokens of an evaluation are cut into sliding windows. Needs no torch."""

from collections.abc import Iterator
from dataclasses import dataclass

from tqformat.load_quantized import TQFormatError

LOOP = 0.5  # the repetition of a sample beyond which it is told: of three times the same, two thirds are repetition
ROUGH_WINDOWS = 20  # below which the figures would be others on a little more text


@dataclass(frozen=True)
class Window:
    """Tokens `begin` to `end` of the corpus, the last `new` of which no window before has seen."""

    begin: int
    end: int
    new: int

    @property
    def length(self) -> int:
        return self.end - self.begin

    @property
    def scored(self) -> int:
        """The window's weight in the mean: its new tokens less one."""
        return self.new - 1

    @property
    def predicted(self) -> int:
        """How many new tokens have a token before them in the window, so that the model gives them a probability."""
        return min(self.new, self.length - 1)


def sliding_windows(tokens: int, max_length: int, stride: int, max_windows: int | None = None) -> list[Window]:
    """The windows over a corpus of `tokens` tokens; they begin at 0, stride, 2 stride ... until one reaches the end.

    This is the procedure of the transformers documentation ("Perplexity of fixed-length models"), and of most published
    figures: the loss of a window is the mean over its new tokens that have a predecessor in the window (all but the very
    first token of the corpus, where stride < max_length), and its weight is (new tokens - 1).

    With n > max_length there are 1 + ceil((n - max_length) / stride) windows. Their new tokens add up to n, so their weights
    add up to n - windows: n = 297,053, 512 and 256 give 1,160 windows and 295,893 scored tokens.
    """
    if max_length < 2 or not 1 <= stride <= max_length:
        message = f"expected a length of at least 2 and a stride from 1 to it, got {max_length} and {stride}"
        raise TQFormatError("SCHEMA.VALUE", "--max-length, --stride", message)
    windows: list[Window] = []
    seen = 0
    for begin in range(0, tokens, stride):
        if seen == tokens or len(windows) == max_windows:
            break
        end = min(begin + max_length, tokens)
        windows.append(Window(begin, end, end - seen))
        seen = end
    return windows


def batches(windows: list[Window], size: int) -> Iterator[list[int]]:
    """Indices of successive windows of one form, at most `size` together: no window is ever padded."""
    group: list[int] = []
    for index, window in enumerate(windows):
        form = (window.length, window.new)
        if group and (len(group) == size or form != (windows[group[0]].length, windows[group[0]].new)):
            yield group
            group = []
        group.append(index)
    if group:
        yield group
