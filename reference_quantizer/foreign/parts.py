"""What a weight of another format becomes: stages whose fields are those of SPEC.md, and nothing is quantized anew."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Array = Any  # a numpy array or a tensor of torch, which has the dtype BF16


@dataclass(frozen=True)
class Transform:
    """A transform [SPEC section 8] with its tensors by their keys: index, or matrix, or pairs and angles."""

    kind: str = "identity"
    size: int = 1
    tensors: dict[str, Array] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # factors and signs of a hadamard


IDENTITY = Transform()


@dataclass(frozen=True)
class Stage:
    """value = T^-1((scale * outer_scale) * levels[symbol] + offset * outer_offset); n rows, G = cols / the columns of `scales`.

    While blocks are read, n stands for blocks, and cols for the weights of one.
    """

    symbols: Array  # unsigned [n, cols/p]
    levels: Array  # float32 [entries, p], or [n, entries, p]
    scales: Array  # [n, cols/G]; 8-bit floats may be bytes
    scale_dtype: str | None = None  # of scales that come as bytes
    outer_scales: Array | None = None  # float [n or 1, a divisor of cols/G]
    offsets: Array | None = None  # [n, cols/G], float or, with outer ones, uint8
    outer_offsets: Array | None = None
    transform: Transform = IDENTITY

    @property
    def bits(self) -> int:
        """Of a symbol."""
        return max(1, (self.levels.shape[-2] - 1).bit_length())


@dataclass(frozen=True)
class Weight:
    """A weight with its values: `stages`, or the tensor `data` that is kept as it is."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    stages: tuple[Stage, ...] = ()
    column_scale: Array | None = None  # [cols]
    data: Array | None = None


def integers(low: int, high: int) -> Array:
    """The levels low, low + 1, ..., high: float32 [entries, 1]."""
    return np.arange(low, high + 1, dtype=np.float32)[:, None]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of another format: what is known of it before its weights are read."""

    format: str  # gguf, or the quant_method of its configuration
    id: str  # of the model, as far as it is known
    license: str | None
    count: int  # of the weights
    weights: Iterator[Weight]
    config: dict[str, Any]  # config.json of the plain model
    files: dict[str, tuple[str, Path | bytes]]  # the files beside the weights: name -> role and source
    stored_bytes: int  # of the tensors there
    provenance: dict[str, Any]  # for the manifest's base_model.extra.imported_from
    notes: tuple[str, ...] = ()
