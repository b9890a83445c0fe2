"""How much the end loss minds errors in the outputs of each linear layer: the other factor of its Hessian.

For small changes E of a weight, KL(base || quantized) is about 1/2 tr(G E H Eᵗ): H is the mean of x xᵗ over the layer's inputs,
G that of g gᵗ, where g is the gradient of log p(label) with respect to the layer's output. Labels are drawn from the model's own
prediction, so that G ⊗ H stands for the Fisher information (K-FAC, arXiv:1503.05671; for rounding YAQA, arXiv:2505.22988,
sketch A in its first iteration).
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reference_quantizer.model.machine import has_bfloat16
from reference_quantizer.progress import Progress
from tqformat.load_quantized import TQFormatError

SEED = 0
TOKENS = 32768  # that gradients are taken of, at most
DONE = "gradients.done"


def measure_output_hessians(
    model: Any,
    names: Collection[str],
    ids: Tensor,
    folder: Path,
    device: str = "cpu",
    quiet: bool = False,
) -> dict[str, Tensor]:
    """The mean of g gᵗ over the tokens `ids` [sequences, length]: weight name -> float32 [rows, rows], in files of `folder`.

    Gradients that reach the input embedding count by the power of their token's row, as its errors do, over the mean of the tokens.
    For those linear layers among `names` that the tokens reach, and the input embedding, [cols, cols]; not for the output layer. Of more than TOKENS tokens, evenly spaced sequences are taken. A
    later call with the same folder finds the matrices complete and measures nothing. DATA.NON_FINITE where gradients are not finite.
    """
    count = min(len(ids), max(1, TOKENS // ids.shape[1]))
    ids = ids[(2 * torch.arange(count) + 1) * len(ids) // (2 * count)]
    source, output = model.get_input_embeddings(), model.get_output_embeddings()
    layers = {
        f"{path}.weight": layer
        for path, layer in model.named_modules()
        if f"{path}.weight" in names and (layer is source or (isinstance(layer, nn.Linear) and layer is not output))
    }
    widths = {n: m.weight.shape[1] if m is source else m.out_features for n, m in layers.items()}  # of what they give
    known = (folder / DONE).is_file()
    found = {name: _in_file(folder / f"gradients-{k}", widths[name], not known) for k, name in enumerate(layers)}
    if known:
        return {name: g for name, g in found.items() if g.any()}
    model.to(device).requires_grad_(False)
    hooks = [source.register_forward_hook(lambda _, args, out: out.requires_grad_(True))]

    def add(total: Tensor, gradient: Tensor) -> None:
        g = gradient.reshape(-1, len(total)).float()
        total.add_((g.T @ g).to(total.device), alpha=1 / ids.numel())

    def watch(out: Tensor, total: Tensor) -> None:
        out.register_hook(lambda gradient: add(total, gradient))

    def watch_rows(read: Tensor, out: Tensor, total: Tensor) -> None:
        factors = (power[read] / power[ids.to(device)].mean()).sqrt()[..., None]
        out.register_hook(lambda gradient: add(total, gradient * factors))

    for name, layer in layers.items():
        total = found[name]
        if layer is source:
            power = source.weight.float().square().mean(1)
            hooks.append(layer.register_forward_hook(lambda _, args, out, total=total: watch_rows(args[0], out, total)))
        else:
            hooks.append(layer.register_forward_hook(lambda _, args, out, total=total: watch(out, total)))
    generator = torch.Generator(device).manual_seed(SEED)
    progress = Progress(len(ids), quiet, action="measuring gradients", unit="sequence")
    for row in ids.to(device):
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=has_bfloat16(device)):
            share = predict(model, row)
        labels = torch.multinomial(share.detach().exp(), 1, generator=generator)
        share.gather(1, labels).sum().backward()
        progress.advance(1)
    progress.close()
    for hook in hooks:
        hook.remove()
    model.to("cpu")
    for name, g in found.items():
        if not torch.isfinite(g.diagonal()).all():
            raise TQFormatError("DATA.NON_FINITE", name, "the gradients of the layer's outputs are NaN or infinite")
    (folder / DONE).touch()
    return {name: g for name, g in found.items() if g.any()}


def predict(model: Any, ids: Tensor) -> Tensor:
    """The logarithms of the probabilities [length, vocabulary] of what follows each of the tokens `ids` [length], float32.

    DATA.NON_FINITE where the model's logits are not finite.
    """
    share: Tensor = model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
    if not torch.isfinite(share).all():
        message = "the model's prediction for calibration text is NaN or infinite"
        raise TQFormatError("DATA.NON_FINITE", "logits", message)
    return share


def _in_file(path: Path, size: int, new: bool) -> Tensor:
    """A matrix [size, size] in a file, whose pages the system keeps in memory as long as there is room; zeros if `new`."""
    if new:
        path.unlink(missing_ok=True)
    return torch.from_file(str(path), shared=True, size=size * size, dtype=torch.float32).reshape(size, size)
