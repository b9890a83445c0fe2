"""Executes a plan: the stream of encoded weights goes to the writer, and the files beside them."""

import hashlib
import json
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from reference_quantizer import __version__
from reference_quantizer.calibration.tokens import Calibration
from reference_quantizer.checkpoint import support
from reference_quantizer.checkpoint.source import Source
from reference_quantizer.job.encoding import Job
from reference_quantizer.job.stream import encoded_weights
from reference_quantizer.job.tables import make_tables
from reference_quantizer.planning.plan import Plan
from reference_quantizer.progress import Progress
from tqformat.embed import stamped_loader
from tqformat.writer import RepoWriter

GENERATOR = f"reference_quantizer {__version__}"


@dataclass(frozen=True)
class Target:
    """Where the repository goes, and what its manifest says about the model."""

    path: Path
    base_model: dict[str, Any]
    loader_kind: str
    pipeline_tag: str | None = None
    device: str = "cpu"
    max_shard_bytes: int = 5_000_000_000
    overwrite: bool = False
    spill: bool = False  # hidden states of the calibration go to files
    extra: dict[str, Any] | None = None  # of the manifest


def quantize(
    source: Source,
    plan: Plan,
    target: Target,
    progress: Progress | None = None,
    calibration: Calibration | None = None,
) -> Path:
    """Write the repository that `plan` describes; returns its path. Interrupted, the same call continues.

    With `calibration`, the weights that its tokens reach are encoded with error feedback, block by block.
    """
    progress = progress or Progress(0, quiet=True)
    files, _ = support.files_to_copy(source)
    with RepoWriter(
        target.path,
        base_model=target.base_model,
        loader_kind=target.loader_kind,
        pipeline_tag=target.pipeline_tag,
        quantization=plan.to_quantization() | ({"calibration": calibration.to_dict()} if calibration else {}),
        generator=GENERATOR,
        max_shard_bytes=target.max_shard_bytes,
        overwrite=target.overwrite,
        resume_key=resume_key(source, plan, target, calibration),
        extra=target.extra,
    ) as writer:
        tables = make_tables(plan, target.device)
        for id, entry in tables.transforms.items():
            writer.add_transform(id, **entry)
        for id, entry in tables.codebooks.items():
            writer.add_codebook(id, **entry)
        job = Job(source, plan, target.loader_kind, writer.scratch, calibration, target.device, target.spill)
        with closing(encoded_weights(job, tables, writer.done, progress)) as stream:
            for weight in stream:
                if weight is None:
                    writer.commit()
                    continue
                info = weight.info
                if weight.stages is None:
                    writer.add_passthrough(info.name, weight.data, shape=info.shape, dtype=info.dtype)
                else:
                    writer.add_quantized(info.name, info.shape, info.dtype, weight.stages, extra=weight.extra)
        for alias, original in plan.ties.items():
            writer.tie(alias, original)
        for path, role in files.items():
            writer.add_file(
                support.marked_config(json.loads(path.read_bytes())) if path.name == "config.json" else path,
                role,
                path.name,
            )
        writer.add_file(support.REQUIREMENTS.encode(), "document", "requirements.txt")
        writer.add_file(stamped_loader(), "code", "load_quantized.py")
        progress.close()
        return writer.finish(plan.model_order)


def resume_key(source: Source, plan: Plan, target: Target, calibration: Calibration | None = None) -> str:
    """A digest of everything that the weights' bytes depend on: settings, bits, tokens, device, the checkpoint's files."""
    allocation = asdict(plan.allocation) if plan.allocation else None
    tokens = [calibration.sha256, target.loader_kind, source.config, torch.__version__] if calibration else None
    job = [GENERATOR, asdict(plan.settings), allocation, tokens, target.device, target.max_shard_bytes, source.identity]
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()
