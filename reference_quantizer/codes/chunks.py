"""A weight that is worked on in chunks of rows: the threads that do it, and the dtype that suits all its scales."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from reference_quantizer.codes.encode import normalise
from tqformat.load_quantized import TQFormatError

T = TypeVar("T")
F16_SCALES = (2.0**-14, 65504.0)  # the normal range of F16


class Workers:
    """A few threads that work on row chunks, each with one core, and hand back the results in order.

    One core for each chunk keeps sums and products the same on machines with other numbers of cores. A context manager.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.count = 1 if device != "cpu" else min(4, os.cpu_count() or 1)

    def __enter__(self) -> "Workers":
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)
        torch.empty(31 << 20, dtype=torch.uint8)  # makes glibc keep what is freed: new pages take as long as encoding
        self._pool = ThreadPoolExecutor(self.count)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._before)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While the workers have nothing to do: torch has its threads back, to run a model with."""
        torch.set_num_threads(self._before)
        yield
        torch.set_num_threads(1)

    def map(self, function: Callable[[Tensor], T], chunks: Iterable[Tensor]) -> Iterator[T]:
        """`function` of each chunk, converted to float32 on the device; as many chunks exist as there are threads."""
        waiting: deque[Future[T]] = deque()
        for chunk in chunks:
            rows = chunk.to(self.device, torch.float32, copy=True)  # the chunk's memory is used again for the next one
            waiting.append(self._pool.submit(function, rows))
            if len(waiting) >= self.count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def choose_scale_dtype(
    name: str, chunks: Iterable[Tensor], workers: Workers, vector_length: int, wanted: str, finest: float = 1.0
) -> str:
    """The scale dtype of the weight `name`, read in `chunks` of rows; with `auto` F16, or BF16 where a scale, or `finest` times it, would leave F16's normal range.

    Raises DATA.NON_FINITE for a value that is not finite.
    """
    smallest, largest = math.inf, 0.0
    for _, rms in workers.map(lambda rows: normalise(rows, vector_length), chunks):
        if not bool(torch.isfinite(rms).all()):
            advice = f"a value is NaN or infinite; keep the tensor as it is with --protect {name}"
            raise TQFormatError("DATA.NON_FINITE", name, advice)
        positive = rms[rms > 0]
        if len(positive):
            smallest, largest = min(smallest, positive.min().item()), max(largest, positive.max().item())
    if wanted == "auto":
        return "F16" if finest * smallest >= F16_SCALES[0] and largest <= F16_SCALES[1] else "BF16"
    if wanted == "F16" and largest > F16_SCALES[1]:
        advice = f"a scale of {largest:g} is beyond F16; use --scale-dtype auto"
        raise TQFormatError("DATA.NON_FINITE", name, advice)
    return wanted
