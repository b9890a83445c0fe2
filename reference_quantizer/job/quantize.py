"""Executes a plan: reads each tensor in row chunks, encodes it and hands it to the writer."""

import hashlib
import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from reference_quantizer import __version__
from reference_quantizer.calibration.blocks import Blocks, Moments, load_in_blocks
from reference_quantizer.calibration.curvature import measure_output_hessians
from reference_quantizer.calibration.tokens import Calibration
from reference_quantizer.checkpoint import support
from reference_quantizer.checkpoint.source import Info, Reader, Source
from reference_quantizer.codes import codebook, feedback, trellis, vector
from reference_quantizer.codes.encode import SIGN_LEVELS, Encoded, Encoder, encode_stages, normalise
from reference_quantizer.codes.rotation import Rotation, haar_matrix, hadamard_factors, make_rotation, seed_signs
from reference_quantizer.planning.plan import EMBEDDINGS, HEADS, Plan, Settings, TensorPlan
from reference_quantizer.progress import Progress
from tqformat.embed import stamped_loader
from tqformat.load_quantized import TQFormatError, torch_dtype
from tqformat.writer import DTYPE_NAMES, RepoWriter, pack

T = TypeVar("T")
GENERATOR = f"reference_quantizer {__version__}"
F16_SCALES = (2.0**-14, 65504.0)  # the normal range of F16


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
    settings = plan.settings
    with (
        Reader(source) as reader,
        Workers(target.device) as workers,
        RepoWriter(
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
        ) as writer,
    ):
        rotations = {name: _add_transform(writer, name, plan, target.device) for name in plan.transforms}
        books = {name: _add_codebook(writer, name, plan, target.device) for name in plan.codebooks}

        def make_encoders(item: TensorPlan) -> list[Encoder]:  # one for each stage
            finest = 0.5 ** sum(stage.bits for stage in item.stages[:-1])  # what the last stage works on, about
            shape = item.info, item.vector_length
            scale_dtype = choose_scale_dtype(reader, workers, *shape, settings.scale_dtype, finest)
            dtypes = torch_dtype(scale_dtype), torch_dtype(item.info.dtype)
            return [
                Encoder(
                    *(item.vector_length, rotations[s.transform], books[s.codebook], *dtypes),
                    plan.codebooks[s.codebook].sign,
                )
                for s in item.stages
            ]

        done = writer.done
        if calibration is not None:
            with workers.waiting():
                _add_calibrated(writer, source, plan, target, calibration, make_encoders, progress)
        for item in plan.tensors:
            if item.info.name in writer.done:
                progress.advance(item.info.scalars if item.info.name in done else 0)
            elif item.bits is None:
                chunks = (_advance(bytes_, progress, item.info) for bytes_ in reader.byte_chunks(item.info))
                writer.add_passthrough(item.info.name, chunks, shape=item.info.shape, dtype=item.info.dtype)
            elif item.tile_rows:
                weight = torch.cat(
                    [rows.to(target.device, torch.float32, copy=True) for rows in reader.row_chunks(item.info)]
                )
                unit = torch.eye(item.info.cols, device=target.device)
                encoders = make_encoders(item)
                with workers.waiting():
                    found = _encode(item, encoders, weight, Moments(unit), settings)
                    _add_encoded(writer, item, encoders, weight, *found, False)
                progress.advance(item.info.scalars)
            else:
                _add_quantized(writer, reader, workers, item, make_encoders(item), progress)
        for alias, original in plan.ties.items():
            writer.tie(alias, original)
        for path, role in files.items():
            writer.add_file(path, role)
        writer.add_file(support.REQUIREMENTS.encode(), "document", "requirements.txt")
        writer.add_file(stamped_loader(), "code", "load_quantized.py")
        progress.close()
        return writer.finish()


def check_device(device: str) -> None:
    """UNSUPPORTED.DEVICE unless tensors can be made on `device`."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TQFormatError("UNSUPPORTED.DEVICE", f"--device {device}", reason) from None


def resume_key(source: Source, plan: Plan, target: Target, calibration: Calibration | None = None) -> str:
    """A digest of everything that the weights' bytes depend on: settings, bits, tokens, device, the checkpoint's files."""
    allocation = asdict(plan.allocation) if plan.allocation else None
    tokens = [calibration.sha256, target.loader_kind, source.config, torch.__version__] if calibration else None
    job = [GENERATOR, asdict(plan.settings), allocation, tokens, target.device, target.max_shard_bytes, source.identity]
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


def _add_transform(writer: RepoWriter, name: str, plan: Plan, device: str) -> Rotation:
    kind, size, seed = plan.transforms[name]
    matrix = None
    if kind == "hadamard":
        signs = seed_signs(seed, size).hex()
        writer.add_transform(name, kind, size, factors=list(hadamard_factors(size) or ()), signs=signs, seed=seed)
    elif kind == "dense":
        matrix = haar_matrix(seed, size)
        writer.add_transform(name, kind, size, matrix=torch.from_numpy(matrix), extra={"method": "haar", "seed": seed})
    else:
        writer.add_transform(name, kind, size)
    return make_rotation(kind, size, seed, matrix, device)


def _add_codebook(writer: RepoWriter, name: str, plan: Plan, device: str) -> Tensor:
    book, settings = plan.codebooks[name], plan.settings
    if book.stored:
        method = trellis.METHOD if book.window else vector.METHOD
        make = trellis.trellis_levels if book.window else vector.vector_levels
        levels = torch.tensor(make(book.bits, book.window or book.dimension)).half()
        writer.add_codebook(name, levels, origin={"method": method}, stored=True)
        return levels.float().to(device)
    if book.sign:
        writer.add_codebook(name, list(SIGN_LEVELS), origin={"method": "unbiased-sign"})
        return torch.tensor(SIGN_LEVELS, device=device)
    construction = {"vector_length": book.vector_length}
    construction |= {"grid_size": settings.grid_size, "iterations": settings.iterations}
    levels = torch.tensor(codebook.lloyd_max_levels(book.entries, **construction))
    writer.add_codebook(name, levels, origin={"method": codebook.METHOD} | construction)
    return levels.to(device)


def _add_calibrated(
    writer: RepoWriter,
    source: Source,
    plan: Plan,
    target: Target,
    calibration: Calibration,
    make_encoders: Callable[[TensorPlan], list[Encoder]],
    progress: Progress,
) -> None:
    """Encode the linear layers of the model's blocks with error feedback, each with the inputs that it will get.

    With `settings.inputs` other than "original", these are what the encoded blocks before it give, and within a block the
    layers encoded so far.
    """
    from reference_quantizer.evaluation.evaluate import Settings as Arithmetic
    from reference_quantizer.evaluation.evaluate import load_base

    items = {
        t.info.name: t for t in plan.tensors if t.bits is not None and not t.info.name.endswith(EMBEDDINGS + HEADS)
    }
    inputs, state = plan.settings.inputs, writer.scratch / "hidden.npz"
    blocks = Blocks(
        load_in_blocks(source, target.loader_kind, writer.scratch),
        calibration.ids,
        target.device,
        paired=inputs == "paired",
        folder=writer.scratch if target.spill else None,
    )
    if state.is_file():
        blocks.restore(state)
    seen = {name for name in items if name in writer.done}
    gradients: dict[str, Tensor] = {}
    if plan.settings.output_feedback:
        whole = load_base(source, target.loader_kind, Arithmetic(dtype="float32"))
        where = writer.scratch, target.device, progress.quiet
        gradients = measure_output_hessians(whole, items, calibration.ids, *where)
        del whole
    for block in blocks:
        writer.commit()
        blocks.save(state)
        for group in blocks.groups(block):
            chosen = {name: layer for name, layer in group.layers.items() if name in items}
            if not chosen:
                continue
            moments = blocks.moments(block, group)
            encoders = {name: make_encoders(items[name]) for name in chosen}
            with ThreadPoolExecutor(torch.get_num_threads() if target.device == "cpu" else 1) as pool:
                jobs = {
                    name: pool.submit(
                        _encode,
                        *(items[name], encoders[name], layer.weight.data, moments[name], plan.settings),
                        gradients.get(name),
                    )
                    for name, layer in chosen.items()
                }
            for name, layer in chosen.items():
                item, known, weight = items[name], name in writer.done, layer.weight.data
                decoded = _add_encoded(
                    None if known else writer, item, encoders[name], weight, *jobs[name].result(), True
                )
                if inputs != "original":
                    weight.copy_(decoded)
                if name not in seen:
                    progress.advance(item.info.scalars)
                seen.add(name)
    if not seen:
        advice = "none of the weights is a linear layer of the model's blocks, so nothing can be calibrated"
        raise TQFormatError("SCHEMA.VALUE", blocks.name, f"{advice}; use --preset fast")
    if rest := sorted(items.keys() - seen):
        more = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
        print(
            f"note: encoded without feedback, the blocks' linear layers do not include {rest[0]}{more}", file=sys.stderr
        )


def _encode(
    item: TensorPlan,
    encoders: list[Encoder],
    weight: Tensor,
    moments: Moments,
    settings: Settings,
    output_hessian: Tensor | None = None,
) -> tuple[list[Encoded], feedback.Encoded]:
    """Codes for `weight` [rows, cols], whose inputs have `moments`: of the stages before the last, and of the last."""
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
    )


def _add_encoded(
    writer: RepoWriter | None,
    item: TensorPlan,
    encoders: list[Encoder],
    weight: Tensor,
    earlier: list[Encoded],
    found: feedback.Encoded,
    calibrated: bool,
) -> Tensor:
    """Add what was `found` for `weight` [rows, cols], unless `writer` is None; returns the decoded weight."""
    info, rows = item.info, item.tile_rows
    decoded = found.decoded.to(torch_dtype(info.dtype)).float()
    if writer is None:
        return decoded
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
    writer.add_quantized(info.name, info.shape, info.dtype, stages, extra=extra | _facts(item))
    return decoded


def _facts(item: TensorPlan) -> dict[str, Any]:
    """What the plan says of a weight, for its entry's `extra`."""
    facts: dict[str, Any] = {"protected": True} if item.protected else {}
    return facts | ({"sensitivity": item.sensitivity} if item.sensitivity is not None else {})


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _add_quantized(
    writer: RepoWriter,
    reader: Reader,
    workers: "Workers",
    item: TensorPlan,
    encoders: list[Encoder],
    progress: Progress,
) -> None:
    """Encode one weight chunk by chunk, as the writer asks for them; what later stages are given waits in memory."""
    info, g = item.info, item.vector_length
    widths = [stage.bits * e.dimension for stage, e in zip(item.stages, encoders, strict=True)]  # of a symbol
    extra: dict[str, Any] = {"relative_error": 0.0} | _facts(item)  # the error follows below, before it is recorded
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
    writer.add_quantized(info.name, info.shape, info.dtype, stages, extra=extra)


def _drain(chunks: list[Tensor]) -> Iterator[Tensor]:
    """What is in the list when the first chunk is asked for: the writer takes the scales after the codes."""
    yield from chunks


def choose_scale_dtype(
    reader: Reader, workers: "Workers", info: Info, vector_length: int, wanted: str, finest: float = 1.0
) -> str:
    """The scale dtype of a weight; with `auto` F16, or BF16 where a scale, or `finest` times it, would leave F16's normal range.

    Reads the weight once, and raises DATA.NON_FINITE for a value that is not finite.
    """
    smallest, largest = math.inf, 0.0
    for _, rms in workers.map(lambda rows: normalise(rows, vector_length), reader.row_chunks(info)):
        if not bool(torch.isfinite(rms).all()):
            advice = f"a value is NaN or infinite; keep the tensor as it is with --protect {info.name}"
            raise TQFormatError("DATA.NON_FINITE", info.name, advice)
        positive = rms[rms > 0]
        if len(positive):
            smallest, largest = min(smallest, positive.min().item()), max(largest, positive.max().item())
    if wanted == "auto":
        return "F16" if finest * smallest >= F16_SCALES[0] and largest <= F16_SCALES[1] else "BF16"
    if wanted == "F16" and largest > F16_SCALES[1]:
        advice = f"a scale of {largest:g} is beyond F16; use --scale-dtype auto"
        raise TQFormatError("DATA.NON_FINITE", info.name, advice)
    return wanted


def _advance(chunk: memoryview, progress: Progress, info: Info) -> Tensor:
    progress.advance(len(chunk) * info.scalars // max(1, info.nbytes))
    return torch.frombuffer(chunk, dtype=torch.uint8)


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
        self._pool = ThreadPoolExecutor(self.count)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._before)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While the workers have nothing to do: torch has its threads back, to run a model with."""
        from reference_quantizer.evaluation.evaluate import running_models

        torch.set_num_threads(self._before)
        with running_models():
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
