"""A plan becomes a stream of encoded weights: those of the blocks with error feedback, where there is text, then the rest.

The stream knows no writer. It goes from a checkpoint and a plan to codes and scales, weight by weight; who takes them decides
what becomes of them, and says at the start which it has already.
"""

from collections.abc import Iterator
from pathlib import Path

from reference_quantizer.calibration.tokens import Calibration
from reference_quantizer.checkpoint.source import Reader, Source
from reference_quantizer.codes.chunks import Workers
from reference_quantizer.job.calibrated import calibrated_weights
from reference_quantizer.job.encoding import EncodedWeight, EncoderFactory, encode_chunks, encode_unmeasured, read_bytes
from reference_quantizer.job.tables import Tables
from reference_quantizer.model.base import running_models
from reference_quantizer.planning.plan import Plan
from reference_quantizer.progress import Progress


def encoded_weights(
    source: Source,
    plan: Plan,
    tables: Tables,
    calibration: Calibration | None,
    loader_kind: str,
    known: set[str],
    folder: Path,
    progress: Progress,
    device: str = "cpu",
    spill: bool = False,
) -> Iterator[EncodedWeight | None]:
    """All weights of `plan` but the `known` ones; None asks that what came before it be kept for good, before the stream goes on.

    `folder` holds what an interrupted stream finds again. With `calibration`, the weights that its tokens reach are encoded with
    error feedback; with `spill` the hidden states are in `folder`, not in memory. `progress` counts scalars.
    """
    progress.advance(sum(item.info.scalars for item in plan.tensors if item.info.name in known))
    done = set(known)
    with Reader(source) as reader, Workers(device) as workers:
        make_encoders = EncoderFactory(plan, tables, reader, workers)
        if calibration is not None:
            with workers.waiting(), running_models():
                where = folder, progress, device, spill
                for weight in calibrated_weights(source, plan, make_encoders, calibration, loader_kind, known, *where):
                    if weight is not None:
                        done.add(weight.info.name)
                    yield weight
        for item in plan.tensors:
            if item.info.name in done:
                continue
            if item.bits is None:
                yield EncodedWeight(item.info, data=read_bytes(reader, item.info, progress))
            elif item.tile_rows:
                with workers.waiting():
                    yield encode_unmeasured(reader, item, make_encoders(item), plan.settings, device)
                progress.advance(item.info.scalars)
            else:
                yield encode_chunks(reader, workers, item, make_encoders(item), progress)
