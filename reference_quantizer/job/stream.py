"""A plan becomes a stream of encoded weights: those of the blocks with error feedback, where there is text, then the rest.

The stream knows no writer. It goes from a checkpoint and a plan to codes and scales, weight by weight; who takes them decides
what becomes of them, and says at the start which it has already.
"""

from collections.abc import Iterator

from reference_quantizer.checkpoint.source import Reader
from reference_quantizer.codes.chunks import Workers
from reference_quantizer.job.calibrated import calibrated_weights
from reference_quantizer.job.encoding import (
    EncodedWeight,
    EncoderFactory,
    Job,
    encode_chunks,
    encode_unmeasured,
    read_bytes,
)
from reference_quantizer.job.tables import Tables
from reference_quantizer.model.base import running_models
from reference_quantizer.progress import Progress


def encoded_weights(job: Job, tables: Tables, known: set[str], progress: Progress) -> Iterator[EncodedWeight | None]:
    """All weights of the job's plan but the `known` ones, with the `tables` of the plan; `progress` counts scalars.

    None asks that what came before it be kept for good, before the stream goes on.
    """
    done, settings = set(known), job.plan.settings
    progress.advance(sum(item.info.scalars for item in job.plan.tensors if item.info.name in known))
    with Reader(job.source) as reader, Workers(job.device) as workers:
        make_encoders = EncoderFactory(job.plan, tables, reader, workers)
        if job.calibration is not None:
            with workers.waiting(), running_models():
                for weight in calibrated_weights(job, job.calibration, make_encoders, known, progress):
                    if weight is not None:
                        done.add(weight.info.name)
                    yield weight
        for item in job.plan.tensors:
            if item.info.name in done:
                continue
            if item.bits is None:
                yield EncodedWeight(item.info, data=read_bytes(reader, item.info, progress))
            elif item.tile_rows:
                with workers.waiting():
                    yield encode_unmeasured(reader, item, make_encoders(item), settings, job.device)
                progress.advance(item.info.scalars)
            else:
                yield encode_chunks(reader, workers, item, make_encoders(item), progress)
