"""Scalar codebooks: the Lloyd-Max levels of SPEC section 7 (arXiv:2504.19874, Lemma 1 and section 3.1).

Also where trained codebooks of other kinds are kept between runs.
"""

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

METHOD = "lloyd-max-sphere"


@functools.cache
def lloyd_max_levels(entries: int, vector_length: int, grid_size: int, iterations: int) -> np.ndarray:
    """The `entries` levels for vectors of `vector_length`, ascending, in units of the vector's root mean square.

    Float32 [entries], read-only. The steps are those of [TQ-BOOK-7], in binary64 on `grid_size` points.
    """
    dimension = max(3, vector_length)
    reach = min(np.sqrt(dimension), 8.0)
    grid = reach * (2 * np.arange(grid_size) / (grid_size - 1) - 1)  # step 1
    density = np.maximum(1 - grid * grid / dimension, 0) ** ((dimension - 3) / 2)
    mass, moment = _running_integral(grid, density), _running_integral(grid, grid * density)  # step 2
    spread = _running_integral(grid, np.cbrt(density))  # step 3: Panter and Dite's point density
    levels = np.interp((np.arange(entries) + 0.5) / entries * spread[-1], spread, grid)
    for _ in range(iterations):  # step 4
        borders = np.concatenate([[-reach], (levels[1:] + levels[:-1]) / 2, [reach]])
        cell_mass = np.diff(np.interp(borders, grid, mass))
        cell_moment = np.diff(np.interp(borders, grid, moment))
        levels = np.divide(cell_moment, cell_mass, out=levels.copy(), where=cell_mass > 0)
    result: np.ndarray = levels.astype(np.float32)  # step 5
    result.flags.writeable = False
    return result


def _running_integral(grid: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The trapezoid integral of `values` from the first point of the even `grid` to each point; [grid] float64."""
    step = (grid[-1] - grid[0]) / (len(grid) - 1)
    return np.concatenate([[0.0], np.cumsum((values[1:] + values[:-1]) * (step / 2))])


def kept_levels(name: str, shape: tuple[int, ...], train: Callable[[], np.ndarray]) -> np.ndarray:
    """The levels of `shape` in the user's cache under `name`; where they are missing or damaged, what `train` gives. Float32, read-only.

    What is kept is rounded to float16.
    """
    path = _cache() / f"{name}.npy"
    try:
        levels = np.load(path).astype(np.float32)
        if levels.shape != shape or not np.isfinite(levels).all():
            raise ValueError(path)
    except (OSError, ValueError, EOFError):
        levels = train()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            np.save(file, levels.astype(np.float16))
        os.replace(file.name, path)
    levels.flags.writeable = False
    return levels


def _cache() -> Path:
    """Where evaluate keeps its results, too."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tqformat"
