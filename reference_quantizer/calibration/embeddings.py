"""What errors in embeddings and output layers cost, so that their codes can have error feedback as those of the blocks do.

An error E of an output layer with inputs x (the final hidden states) changes row v's logit by E_v x. To second order the model's
divergence is then the sum over rows of E_v H_v E_vᵗ / 2, where H_v is the mean of p_v (1 - p_v) x xᵗ, but for products of two rows,
which are left out: an error that all logits share costs nothing. One matrix serves all rows: H, the mean of (1 - sum of p_v²) x xᵗ,
and row v counts as often as p_v, the probability that the model gives its token on average. Where a model scales or caps the
products of its output layer, its logits change by the slope of that times E_v x, and the square of the slope goes into H.

An error of an embedding's row is felt as often as its token is read, f_v, and then costs E_v G E_vᵗ / 2, with G the mean of g gᵗ over the
gradients g that reach the embedding (see `curvature`). A tied matrix has both uses, and as p_v and f_v are about the same, H + G serves it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reference_quantizer.model.machine import has_bfloat16
from reference_quantizer.progress import Progress
from tqformat.load_quantized import TQFormatError

BATCH = 4  # sequences that the model reads at once
PROBE = 8  # tokens that show what the model makes of its output layer's products
# Of the weights of the rows, spread over all rows alike: tokens that calibration text hardly has occur in other text.
FLOOR = 0.5


class Use(NamedTuple):
    """What errors E of an embedding or an output layer cost: the sum over its rows v of weight_v * E_v H E_vᵗ / 2, in nats per token."""

    hessian: Tensor  # H, float32 [cols, cols]
    weights: Tensor  # float32 [rows], of sum 1


def ends(model: Any) -> dict[str, nn.Module]:
    """The modules of the input embedding and of the output layer, by the names that their weights have there."""
    paths = {module: path for path, module in model.named_modules()}
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    return {f"{paths[m]}.weight": m for m in modules if m in paths and hasattr(m, "weight")}


def measure_uses(
    model: Any, ids: Tensor, gradients: dict[str, Tensor], device: str = "cpu", quiet: bool = False
) -> dict[str, Use]:
    """The use of each of the model's `ends` that has two dimensions: weight name -> it, on the device.

    For the tokens `ids` [sequences, length], which the model reads once, if it has an output layer. `gradients` has G of the embedding's
    outputs [width, width] by its weight's name; without them the embedding alone has no preferred direction, and a tied matrix is taken
    for an output layer. DATA.NON_FINITE where hidden states are not finite.
    """
    found = {name: module for name, module in ends(model).items() if module.weight.dim() == 2}
    source, output = model.get_input_embeddings(), model.get_output_embeddings()
    uses: dict[str, Use] = {}
    if output is not None and output in found.values():
        use = _output_use(model, output, ids, device, quiet)
        uses |= {name: use for name, module in found.items() if module is output}
    for name, module in found.items():
        if module is not source:
            continue
        rows, cols = module.weight.shape
        counts = torch.bincount(ids.flatten(), minlength=rows).to(device, torch.float32)
        g = gradients.get(name)
        use = Use(torch.eye(cols, device=device), counts / counts.sum())
        if g is not None and g.any():
            use = use._replace(hessian=g.to(device) * _gain(module, ids[:1]))
        twin = next((n for n, m in found.items() if n in uses and m.weight is module.weight), None)
        if twin is not None:  # tied
            both = uses[twin].hessian + (0 if g is None else use.hessian)
            use = uses[twin] = Use(both, (uses[twin].weights + use.weights) / 2)
        uses[name] = use
    return {n: u._replace(weights=(1 - FLOOR) * u.weights + FLOOR / len(u.weights)) for n, u in uses.items()}


def _gain(embedding: nn.Module, ids: Tensor) -> float:
    """The square of the factor between the rows of an embedding and what it gives: Gemma's has one."""
    with torch.inference_mode():
        rows, out = embedding.weight[ids].float(), embedding(ids).float()  # type: ignore[index]
    norm = float(rows.square().sum())
    return float(out.square().sum()) / norm if norm else 1.0


class _Reached(Exception):
    pass


def _output_use(model: Any, output: nn.Module, ids: Tensor, device: str, quiet: bool) -> Use:
    """The use of the output layer `output` by the tokens `ids`, as if it had no other."""
    weight: Any = output.weight
    rows, cols = weight.shape
    square, share = torch.zeros(cols, cols, device=device), torch.zeros(rows, dtype=torch.float64, device=device)
    states: list[Tensor] = []
    tail = _tail(model, output, ids[:1, :PROBE])
    progress = Progress(len(ids), quiet, action="measuring the use of embeddings", unit="sequence")

    def reach(_: nn.Module, args: tuple[Any, ...]) -> None:
        states.append(args[0])
        raise _Reached

    place = weight.device
    for part in ids.split(BATCH):
        hook = output.register_forward_pre_hook(reach)
        try:
            with torch.inference_mode(), _products("cpu"):
                model(input_ids=part, use_cache=False)
        except _Reached:
            pass
        hook.remove()
        output.to(device)
        for x in (
            states.pop().to(device).float()
        ):  # [length, cols] of a sequence: logits take more memory than anything else
            with torch.inference_mode(), _products(device):
                # not output(x), which accelerate has wrapped to take x to where the model runs, away from the layer
                logits, slope = tail(type(output).forward(output, x).float())
            p = logits.softmax(-1)
            share += p.sum(0, dtype=torch.float64)
            spread = p.square().neg_().add_(p).mul_(slope**2)  # p (1 - p), in the room of one more array of logits
            square.addmm_((x * spread.sum(1, keepdim=True)).T, x)
        output.to(place)
        progress.advance(len(part))
    progress.close()
    if not torch.isfinite(square.diagonal()).all():
        raise TQFormatError("DATA.NON_FINITE", "hidden states", "what reaches the output layer is NaN or infinite")
    return Use(square / ids.numel(), (share / share.sum()).float())


def _tail(model: Any, output: nn.Module, ids: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor | float]]:
    """A function from products of the output layer to the model's logits and the slope of that.

    Most models leave the products as they are. Some scale them (Cohere, Granite), which shows for the tokens `ids`
    [sequences, length]; some cap them (Gemma 2), and all of these name the cap alike.
    """
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap:
        return lambda products: ((y := (products / cap).tanh()) * cap, 1 - y.square())
    found: list[Tensor] = []
    hook = output.register_forward_hook(lambda _, args, out: found.append(out.float().clone()))
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits.float()
    hook.remove()
    products, scale = found[0], 1.0
    if products.shape == logits.shape and products.any() and not torch.equal(products, logits):
        scale = float((logits * products).sum() / products.square().sum())
    return lambda products: (products * scale, scale)


def _products(device: str) -> torch.autocast:
    """Products of matrices in bfloat16 where `device` has instructions for it."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=has_bfloat16(device))
