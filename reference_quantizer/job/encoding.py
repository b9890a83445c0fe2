"""One weight becomes codes and scales: as a whole, for inputs that were measured, or in chunks of rows."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference_quantizer.calibration.embeddings import Use
from reference_quantizer.calibration.tokens import Calibration
from reference_quantizer.checkpoint.source import Info, Reader, Source
from reference_quantizer.codes import feedback, trellis
from reference_quantizer.codes.chunks import Workers, choose_scale_dtype
from reference_quantizer.codes.encode import Encoded, Encoder, encode_stages
from reference_quantizer.codes.feedback import Moments
from reference_quantizer.job.tables import Tables
from reference_quantizer.planning.plan import Plan, TensorPlan
from reference_quantizer.planning.settings import Settings
from reference_quantizer.progress import Progress
from tqformat.load_quantized import torch_dtype
from tqformat.writer import DTYPE_NAMES, pack

PART_SCALARS = 2**24  # of an embedding that are encoded at once: 64 MiB for each float32 work array


@dataclass(frozen=True)
class Job:
    """What is encoded, and how: everything that a stream of encoded weights depends on."""

    source: Source
    plan: Plan
    loader_kind: str
    folder: Path  # holds what an interrupted stream finds again
    calibration: Calibration | None = None  # with it, the weights that its tokens reach have error feedback
    device: str = "cpu"
    spill: bool = False  # hidden states are in the folder, not in memory


@dataclass(frozen=True)
class EncodedWeight:
    """One weight as RepoWriter takes it: the `stages` of a quantized one, or the bytes of a passthrough tensor.

    Codes, scales and `data` may come in chunks. `extra` is complete when the last of them was taken.
    """

    info: Info
    stages: list[dict[str, Any]] | None = None
    data: Iterable[Tensor] = ()
    extra: dict[str, Any] = field(default_factory=dict)


class EncoderFactory:
    """Makes the encoders of a weight, one for each stage; reads the weight for the dtype of its scales."""

    def __init__(self, plan: Plan, tables: Tables, reader: Reader, workers: Workers) -> None:
        self.plan, self.tables, self.reader, self.workers = plan, tables, reader, workers

    def __call__(self, item: TensorPlan) -> list[Encoder]:
        """The encoders of `item`; DATA.NON_FINITE for a weight that is not finite, or scales beyond their dtype."""
        info, wanted = item.info, self.plan.settings.scale_dtype
        finest = 0.5 ** sum(stage.bits for stage in item.stages[:-1])  # what the last stage works on, about
        chunks = self.reader.row_chunks(info)
        scale_dtype = choose_scale_dtype(info.name, chunks, self.workers, item.vector_length, wanted, finest)
        dtypes = torch_dtype(scale_dtype), torch_dtype(info.dtype)
        rotations, levels, books = self.tables.rotations, self.tables.levels, self.plan.codebooks
        return [
            Encoder(
                *(item.vector_length, rotations[s.transform], levels[s.codebook], *dtypes, books[s.codebook].sign),
                trellis.computed_scale(s.bits) if books[s.codebook].computed else 1.0,
            )
            for s in item.stages
        ]


def read_bytes(reader: Reader, info: Info, progress: Progress) -> Iterator[Tensor]:
    """The bytes of a passthrough tensor, chunk by chunk."""
    for chunk in reader.byte_chunks(info):
        progress.advance(len(chunk) * info.scalars // max(1, info.nbytes))
        yield torch.frombuffer(chunk, dtype=torch.uint8)


# ------------------------------------------------------------------------------------------------ whole weights


def encode_unmeasured(
    reader: Reader, item: TensorPlan, encoders: list[Encoder], settings: Settings, device: str
) -> EncodedWeight:
    """A weight with trellis codes whose inputs are unknown: all count alike."""
    rows = [chunk.to(device, torch.float32, copy=True) for chunk in reader.row_chunks(item.info)]
    weight = torch.cat(rows)
    moments = Moments(torch.eye(item.info.cols, device=device))
    found = encode_weight(item, encoders, weight, moments, settings)
    return as_stored(item, encoders, weight, *found, calibrated=False)


def encode_weight(
    item: TensorPlan,
    encoders: list[Encoder],
    weight: Tensor,
    moments: Moments,
    settings: Settings,
    output_hessian: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> tuple[list[Encoded], feedback.Encoded]:
    """Codes for `weight` [rows, cols], whose inputs have `moments`: of the stages before the last, and of the last.

    `output_hessian` and `row_weights` are those of feedback.encode.
    """
    bits = item.stages[-1].bits
    window = (settings.window or 0) if item.tile_rows else bits
    if output_hessian is not None:
        output_hessian = output_hessian.to(weight.device)
    return feedback.encode_stages(
        feedback.wanted(weight, moments),
        moments.hessian,
        encoders,
        *(bits, window, item.tile_rows, settings.ordered),
        output_hessian,
        row_weights,
    )


def as_stored(
    item: TensorPlan,
    encoders: list[Encoder],
    weight: Tensor,
    earlier: list[Encoded],
    found: feedback.Encoded,
    calibrated: bool,
) -> EncodedWeight:
    """What was `found` for `weight` [rows, cols], packed."""
    info, rows = item.info, item.tile_rows
    norm = float(weight.square().sum())
    error = float((found.decoded - weight).square().sum())  # from what is wanted, it is found.relative_error
    extra: dict[str, Any] = {"relative_error": _rounded(error / norm if norm else 0.0)}
    extra |= {"output_error": _rounded(found.output_error)} if calibrated else {}
    g, stages = encoders[0].vector_length, []
    for plan, encoder, codes in zip(item.stages, encoders, [*earlier, found], strict=True):
        symbols, width = codes.symbols.cpu(), plan.bits * encoder.dimension  # of a symbol
        if rows:  # [TQ-CODE-3]: tiles of one column, row-major over the grid
            symbols = symbols.reshape(-1, rows, info.cols).transpose(1, 2).reshape(-1, rows)
        window = len(encoder.levels).bit_length() - 1 if rows else None
        stage: dict[str, Any] = {"bits": width, "codebook": plan.codebook, "transform": plan.transform}
        stage |= {"window": window, "tile": [rows, 1]} if rows else {}
        stage |= {"codes": pack(symbols, width, window), "scales": codes.scales.cpu()}
        stages.append(stage | {"vector_length": None if g == info.cols else g})
    return EncodedWeight(info, stages, extra=extra | _facts(item))


def encode_embedding(
    item: TensorPlan, encoders: list[Encoder], weight: Tensor, use: Use, settings: Settings, device: str
) -> EncodedWeight:
    """Codes for an embedding or output layer `weight` [rows, cols] of this `use`; `weight` becomes what they decode to.

    A part of the rows at a time: there may be more of them than memory has room for the work on.
    """
    tile, dtype = item.tile_rows or 1, torch_dtype(item.info.dtype)
    step = max(1, PART_SCALARS // item.info.cols // tile) * tile
    hessian, parts = use.hessian.to(device), []
    sums = torch.zeros(
        2, 2, dtype=torch.float64
    )  # of the error and of the weight; squared, and in the norm of the Hessian
    for a in range(0, len(weight), step):
        rows = weight[a : a + step].to(device, torch.float32, copy=True)
        part = replace(item, info=replace(item.info, shape=tuple(rows.shape)))
        weights = use.weights[a : a + step].to(device)
        earlier, found = encode_weight(part, encoders, rows, Moments(hessian), settings, row_weights=weights)
        parts.append(as_stored(part, encoders, rows, earlier, found, calibrated=True))
        for k, d in enumerate((found.decoded - rows, rows)):
            sums[k] += torch.stack([d.square().sum(), ((d @ hessian) * d).sum()]).cpu()
        weight[a : a + step] = found.decoded.to(dtype).to(weight)
    errors = [_rounded(float(error / norm) if norm else 0.0) for error, norm in sums.T]
    stages = [
        stage | {key: torch.cat([part.stages[k][key] for part in parts if part.stages]) for key in ("codes", "scales")}
        for k, stage in enumerate(parts[0].stages or [])
    ]
    extra = parts[0].extra | dict(zip(("relative_error", "output_error"), errors, strict=True))
    return EncodedWeight(item.info, stages, extra=extra)


# ------------------------------------------------------------------------------------------------ chunks of rows


def encode_chunks(
    reader: Reader, workers: Workers, item: TensorPlan, encoders: list[Encoder], progress: Progress
) -> EncodedWeight:
    """A weight that is encoded chunk by chunk, as its codes are asked for; what later stages are given waits in memory."""
    info, g = item.info, item.vector_length
    widths = [stage.bits * e.dimension for stage, e in zip(item.stages, encoders, strict=True)]  # of a symbol
    extra: dict[str, Any] = {"relative_error": 0.0} | _facts(item)  # the error follows below
    codes: list[list[Tensor]] = [[] for _ in encoders]
    scales: list[list[Tensor]] = [[] for _ in encoders]

    def first_codes() -> Iterator[Tensor]:
        def encode_rows(rows: Tensor) -> tuple[list[Tensor], list[Encoded]]:
            found = encode_stages(rows, encoders)
            return [pack(s.symbols, width).cpu() for s, width in zip(found, widths, strict=True)], found

        error = norm = 0.0
        for packed, found in workers.map(encode_rows, reader.row_chunks(info)):
            error, norm = error + found[-1].squared_error, norm + found[-1].squared_norm
            for k, result in enumerate(found):
                codes[k].append(packed[k])
                scales[k].append(result.scales.cpu())
            yield codes[0].pop()
            progress.advance(found[0].symbols.numel() * encoders[0].dimension)
        extra["relative_error"] = _rounded(error / norm if norm else 0.0)

    stages = []
    for k, (plan, width) in enumerate(zip(item.stages, widths, strict=True)):
        stage: dict[str, Any] = {"bits": width, "codebook": plan.codebook, "transform": plan.transform}
        stage |= {"codes": _drain(codes[k]) if k else first_codes(), "scales": _drain(scales[k])}
        stage |= {"scale_dtype": DTYPE_NAMES[encoders[k].scale_dtype]}
        stages.append(stage | {"vector_length": None if g == info.cols else g})
    return EncodedWeight(info, stages, extra=extra)


def _drain(chunks: list[Tensor]) -> Iterator[Tensor]:
    """What is in the list when the first chunk is asked for: the scales are taken after the codes."""
    yield from chunks


def _facts(item: TensorPlan) -> dict[str, Any]:
    """What the plan says of a weight, for its entry's `extra`."""
    facts: dict[str, Any] = {"protected": True} if item.protected else {}
    return facts | ({"sensitivity": item.sensitivity} if item.sensitivity is not None else {})


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
