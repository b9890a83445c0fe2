"""The linear layers of a model's blocks, encoded with error feedback, each with the inputs that it will get."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from reference_quantizer.calibration.blocks import Blocks, load_in_blocks
from reference_quantizer.calibration.curvature import measure_output_hessians
from reference_quantizer.calibration.embeddings import ends, measure_uses
from reference_quantizer.calibration.tokens import Calibration
from reference_quantizer.codes.encode import Encoder
from reference_quantizer.job.encoding import EncodedWeight, Job, as_stored, encode_embedding, encode_weight
from reference_quantizer.model.base import load_base
from reference_quantizer.planning.plan import EMBEDDING_BITS, TensorPlan, is_embedding
from reference_quantizer.progress import Progress
from tqformat.load_quantized import TQFormatError, torch_dtype


def calibrated_weights(
    job: Job,
    calibration: Calibration,
    make_encoders: Callable[[TensorPlan], list[Encoder]],
    known: set[str],
    progress: Progress,
) -> Iterator[EncodedWeight | None]:
    """The weights that the tokens of `calibration` reach, but the `known` ones: embeddings, then block by block; None before each block (see stream).

    Embeddings and output layers of fewer than EMBEDDING_BITS come first, for the uses that they have in the base model, so that the blocks
    make up for some of what the former miss.
    With `settings.inputs` other than "original", a layer's inputs are what the encoded blocks before it give, and within a block
    the layers encoded so far. SCHEMA.VALUE where none of the weights is a layer of the blocks, unless all are embeddings.
    """
    source, plan, device, folder = job.source, job.plan, job.device, job.folder
    settings = plan.settings
    chosen_items = {t.info.name: t for t in plan.tensors if t.bits is not None}
    items = {name: item for name, item in chosen_items.items() if not is_embedding(name)}
    embeddings = {n: item for n, item in chosen_items.items() if is_embedding(n) and (item.bits or 0) < EMBEDDING_BITS}
    blocks = Blocks(
        load_in_blocks(source, job.loader_kind, folder),
        calibration.ids,
        device,
        paired=settings.inputs == "paired",
        folder=folder if job.spill else None,
    )
    asked = items.keys() | embeddings.keys()
    state = folder / "hidden.npz"
    gradients: dict[str, Tensor] = {}
    if settings.output_feedback:
        whole = load_base(source, job.loader_kind)
        gradients = measure_output_hessians(
            whole, [*items, *embeddings], calibration.ids, folder, device, progress.quiet
        )
        del whole
    if state.is_file():  # which is not written before the embeddings are done
        blocks.restore(state)
    elif embeddings:
        modules = ends(blocks.model)
        for alias, original in plan.ties.items():  # of the same bytes, which the configuration may not say
            if alias in modules and original in modules:
                modules[alias].weight = modules[original].weight
        uses = measure_uses(blocks.model, calibration.ids, gradients, device, progress.quiet)
        for name, module in modules.items():
            if (item := embeddings.get(name)) is None or name not in uses:
                continue
            found = encode_embedding(item, make_encoders(item), module.weight.data, uses[name], settings, device)
            embeddings.pop(name)  # what is left in the end no token reached
            if name not in known:
                yield found
                progress.advance(item.info.scalars)
        if settings.inputs != "original":
            blocks.enter_again()
    seen = items.keys() & known
    for block in blocks:
        yield None  # the state says that the blocks before it are done, and must not be kept before they are
        blocks.save(state)
        for group in blocks.groups(block):
            chosen = {name: layer for name, layer in group.layers.items() if name in items}
            if not chosen:
                continue
            moments = blocks.moments(block, group)
            encoders = {name: make_encoders(items[name]) for name in chosen}
            with ThreadPoolExecutor(torch.get_num_threads() if device == "cpu" else 1) as pool:
                jobs = {
                    name: pool.submit(
                        encode_weight,
                        *(items[name], encoders[name], layer.weight.data, moments[name], settings),
                        gradients.get(name),
                    )
                    for name, layer in chosen.items()
                }
            for name, layer in chosen.items():
                item, weight, found = items[name], layer.weight.data, jobs[name].result()
                if name not in known:
                    yield as_stored(item, encoders[name], weight, *found, calibrated=True)
                    progress.advance(item.info.scalars)
                if settings.inputs != "original":
                    weight.copy_(found[1].decoded.to(torch_dtype(item.info.dtype)).float())
                seen.add(name)
    rest = sorted((items.keys() - seen) | (embeddings.keys() - known))
    if not seen and (items or len(rest) == len(asked)):
        advice = "none of the weights is a linear layer of the model's blocks, so nothing can be calibrated"
        raise TQFormatError("SCHEMA.VALUE", blocks.name, f"{advice}; use --preset fast")
    if rest:
        more = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
        print(
            f"note: encoded without feedback, no embedding, output layer or linear layer of the blocks: {rest[0]}{more}",
            file=sys.stderr,
        )
