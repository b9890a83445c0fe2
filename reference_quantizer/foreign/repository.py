"""Writes a repository from the stages of another format: each codebook and each transform once."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reference_quantizer import __version__
from reference_quantizer.checkpoint import support
from reference_quantizer.foreign.parts import Array, Checkpoint, Stage, Transform
from reference_quantizer.progress import Progress
from tqformat.embed import stamped_loader
from tqformat.writer import RepoWriter, pack

GENERATOR = f"reference_quantizer {__version__}"
CHUNK_SYMBOLS = 1 << 20  # that are packed at once


def write_repository(
    source: Checkpoint,
    out: Path,
    base_model: dict[str, Any],
    loader_kind: str,
    progress: Progress | None = None,
    **options: Any,
) -> Path:
    """Writes the checkpoint's weights with their values; returns the path. `options` are those of RepoWriter."""
    progress = progress or Progress(0, quiet=True)
    quantization = {"method": f"import_{source.format.replace('-', '_')}", "bits": 0}
    with RepoWriter(
        out,
        base_model=base_model | {"extra": {"imported_from": source.provenance}},
        loader_kind=loader_kind,
        quantization=quantization,
        generator=GENERATOR,
        **options,
    ) as writer:
        tables = Tables(writer)
        bits: dict[float, int] = {}  # bits of a weight -> scalars that have them
        for weight in source.weights:
            if weight.data is not None:
                writer.add_passthrough(weight.name, weight.data, shape=weight.shape, dtype=weight.dtype)
            else:
                stages = [tables.stage(stage, weight.shape[-1]) for stage in weight.stages]
                writer.add_quantized(weight.name, weight.shape, weight.dtype, stages, weight.column_scale)
                width = sum(stage.bits / stage.levels.shape[-1] for stage in weight.stages)
                bits[width] = bits.get(width, 0) + int(np.prod(weight.shape, dtype=np.int64))
            progress.advance(1)
        quantization["bits"] = max(bits, key=lambda width: bits[width], default=0)  # those of most scalars
        for name, (role, content) in source.files.items():
            writer.add_file(content, role, name)
        writer.add_file(support.marked_config(source.config), "support", "config.json")
        writer.add_file(support.REQUIREMENTS.encode(), "document", "requirements.txt")
        writer.add_file(stamped_loader(), "code", "load_quantized.py")
        progress.close()
        return writer.finish()


class Tables:
    """The codebooks and transforms of a writer, under names that follow their content."""

    def __init__(self, writer: RepoWriter) -> None:
        self.writer = writer
        self.known: set[str] = set()

    def stage(self, stage: Stage, cols: int) -> dict[str, Any]:
        """What add_quantized takes for the stage of a weight with so many columns."""
        codebook, transform = self.codebook(stage.levels), self.transform(stage.transform)
        length = cols // stage.scales.shape[1]
        found: dict[str, Any] = {"bits": stage.bits, "codebook": codebook, "transform": transform}
        found |= {"vector_length": None if length == cols else length, "codes": packed(stage), "scales": stage.scales}
        for key in ("scale_dtype", "outer_scales", "offsets", "outer_offsets"):
            if getattr(stage, key) is not None:
                found[key] = getattr(stage, key)
        return found

    def codebook(self, levels: Array) -> str:
        id = f"levels-{digest(levels)}"
        if id not in self.known:
            self.writer.add_codebook(id, levels)
            self.known.add(id)
        return id

    def transform(self, transform: Transform) -> str:
        content = [digest(tensor) for tensor in transform.tensors.values()]
        if transform.settings:
            content.append(hashlib.sha256(json.dumps(transform.settings).encode()).hexdigest()[:12])
        id = "-".join([transform.kind, str(transform.size), *content]) if content else transform.kind
        if id not in self.known:
            self.writer.add_transform(id, transform.kind, transform.size, **transform.tensors, **transform.settings)
            self.known.add(id)
        return id


def digest(data: Array) -> str:
    """A short name for the content and the shape of an array or tensor."""
    tensor = torch.as_tensor(data).contiguous()
    content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(content + str((tensor.dtype, list(tensor.shape))).encode()).hexdigest()[:12]


def packed(stage: Stage) -> Iterator[torch.Tensor]:
    """The codes of a stage in tiles of one row."""
    symbols = stage.symbols
    if isinstance(symbols, np.ndarray):  # torch does little with its unsigned 16 bits
        symbols = torch.from_numpy(symbols.astype(np.int32) if symbols.dtype == np.uint16 else symbols)
    step = max(1, CHUNK_SYMBOLS // symbols.shape[1])
    for i in range(0, len(symbols), step):
        yield pack(symbols[i : i + step].int(), stage.bits)
