"""How much the error of each weight costs: a coefficient per weight, for the allocator.

The linearity theorem of HIGGS (arXiv:2411.17525): for small errors, loss increase = sum over weights of a * t^2, where
t^2 = ||W^ - W||^2 / ||W||^2 is the relative squared error that a quantizer leaves. The loss here is KL(base || quantized)
in nats per token. The two ways to measure `a` need tokens alone, and the model can write these itself.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from reference_quantizer.calibration.blocks import Blocks, load_in_blocks
from reference_quantizer.calibration.curvature import measure_output_hessians, predict
from reference_quantizer.calibration.embeddings import measure_uses
from reference_quantizer.calibration.tokens import SELF, Calibration, calibration_tokens, kept_tokens
from reference_quantizer.checkpoint.source import Source, weights_sha256
from reference_quantizer.checkpoint.support import KINDS
from reference_quantizer.codes import feedback
from reference_quantizer.codes.rotation import make_rotation, rotation_size
from reference_quantizer.evaluation.metrics import compare
from reference_quantizer.model.base import default_dtype, load_base, load_tokenizer, running_models
from reference_quantizer.model.machine import libraries, locked
from reference_quantizer.progress import Progress
from tqformat.load_quantized import TQFormatError

VERSION = 3  # of the arithmetic here: another one measures again
LENGTH = 256  # tokens of a sequence: many short sequences say more about Fisher traces than a few long ones
TOKENS = {"fisher": 8192, "perturbation": 1024}  # the former costs two passes over its tokens, the latter one a weight
# t^2 of the noise: that of a 3-bit Lloyd-Max quantizer. It lies among the errors that are chosen between, so that what is
# not linear any more enters at its size there, and the divergence stands far above the rounding of the logits.
NOISE = 0.0345
SEED = 0


@dataclass(frozen=True)
class Sensitivities:
    """Coefficients in nats per token for t^2 = 1, by the checkpoint's names; and the tokens they were measured on."""

    values: dict[str, float]
    calibration: Calibration


def measure_sensitivities(
    source: Source,
    loader_kind: str,
    names: list[str],
    method: str,
    texts: tuple[str, ...],
    tokens: int | None,
    cache: Path,
    device: str = "cpu",
    quiet: bool = False,
) -> Sensitivities:
    """The coefficients of `names`, without those that the model does not have under this name and with this shape.

    `method` is fisher or perturbation; `texts` and `tokens` (None: TOKENS) are those of `calibration_tokens`. What was
    measured stays in `cache`, under a name made from content: another target measures nothing again, and an interrupted
    perturbation continues. The whole model is in memory, in float32 on a CPU.
    """
    if loader_kind not in KINDS:
        message = f"expected a model that predicts the next token ({', '.join(KINDS)}), found {loader_kind}"
        raise TQFormatError("SCHEMA.VALUE", "loader_kind", f"{message}; give --bits instead of a target")
    dtype, tokens = default_dtype(device), tokens or TOKENS[method]
    loaded: list[Any] = []

    def model() -> Any:
        """Loaded when it is first asked for: with everything in the cache, never."""
        if not loaded:
            loaded.append(load_base(source, loader_kind, dtype, device).requires_grad_(False))
        return loaded[0]

    content = [VERSION, weights_sha256(source), loader_kind, LENGTH, SEED, dtype, device, libraries()]
    cache.mkdir(parents=True, exist_ok=True)
    with running_models():
        tokenizer = load_tokenizer(source.path)
        if texts == (SELF,):
            kept = cache / f"calibration-{_digest([content, tokens])}.npz"
            found = kept_tokens(kept, lambda: calibration_tokens(model(), tokenizer, texts, tokens, LENGTH, SEED))
        else:
            found = calibration_tokens(None, tokenizer, texts, tokens, LENGTH)
        path = cache / f"sensitivity-{_digest([content, method, NOISE, found.sha256])}.jsonl"
        with locked(path.with_suffix(".lock")):
            known = _read(path)
            # one run of fisher gives all, so that another selection of weights needs no second one
            matrices = [name for name, info in source.tensors.items() if len(info.shape) > 1]
            missing = [name for name in (matrices if method == "fisher" else names) if name not in known]
            if missing:
                before = len(names) - len(missing) if method == "perturbation" else 0  # measured by an earlier run
                known |= _measure(model(), source, missing, method, found.ids, path, quiet, before)
    return Sensitivities({name: value for name in names if (value := known[name]) is not None}, found)


def measure_gains(
    source: Source,
    loader_kind: str,
    tokens: Calibration,
    output_feedback: bool,
    tile_rows: int,
    cache: Path,
    device: str = "cpu",
    quiet: bool = False,
) -> dict[str, float]:
    """What error feedback leaves of the loss that rounding would cause, for the linear layers of the model's blocks, embedding and output layer.

    See `feedback.gain` and, with `output_feedback`, `feedback.output_gain` of tiles of `tile_rows` rows; for the inputs that `tokens` give the layers of the
    original model. Kept in `cache`, as sensitivities are.
    """
    content = [
        VERSION,
        weights_sha256(source),
        loader_kind,
        "gains",
        output_feedback,
        [feedback.DAMPING, feedback.OUTPUT_DAMPING, feedback.SHRINKAGE, tile_rows],
        tokens.sha256,
        device,
        libraries(),
    ]
    path = cache / f"sensitivity-{_digest(content)}.jsonl"
    with locked(path.with_suffix(".lock")), running_models(), TemporaryDirectory(dir=cache) as folder:
        if not path.is_file():
            blocks = Blocks(load_in_blocks(source, loader_kind, Path(folder)), tokens.ids, device)
            outputs: dict[str, Tensor] = {}
            if output_feedback:
                whole = load_base(source, loader_kind)
                outputs = measure_output_hessians(whole, source.tensors, tokens.ids, Path(folder), device, quiet)
                del whole
            uses = measure_uses(blocks.model, tokens.ids, outputs, device, quiet)
            found = {name: _gain(use.hessian, device) for name, use in uses.items()}
            progress = Progress(len(blocks.blocks), quiet, action="measuring what feedback gains", unit="block")
            for block in blocks:
                for group in blocks.groups(block):
                    hessian = next(iter(blocks.moments(block, group).values())).hessian
                    gain = _gain(hessian, device)
                    for name, layer in group.layers.items():
                        found[name] = gain
                        if name in outputs:
                            power = layer.weight.square().mean(1)
                            found[name] *= feedback.output_gain(outputs[name].to(device), power, tile_rows)
                progress.advance(1)
            progress.close()
            new = path.with_suffix(".new")
            new.write_text("".join(json.dumps(entry) + "\n" for entry in found.items()), encoding="utf-8")
            new.replace(path)
        return {name: value for name, value in _read(path).items() if value is not None}


def _gain(hessian: Tensor, device: str) -> float:
    """The gain of feedback between columns, after a rotation such as the columns will have."""
    rotation = make_rotation("hadamard", rotation_size("hadamard", len(hessian)), SEED, None, device)
    return feedback.gain(feedback.rotate_hessian(hessian, rotation))


def _measure(
    model: Any, source: Source, names: list[str], method: str, ids: Tensor, path: Path, quiet: bool, before: int
) -> dict[str, float | None]:
    """The coefficients of `names`, each appended to the file `path` as soon as it is known; None for no such weight.

    The progress begins at `before`, the weights that an earlier run measured.
    """
    parameters = {name: p for name, p in model.named_parameters() if name in names}
    weights = {name: p for name, p in parameters.items() if tuple(p.shape) == source.tensors[name].shape}
    total, unit = (before + len(weights), "weight") if method == "perturbation" else (len(ids), "sequence")
    progress = Progress(total, quiet, action=f"measuring sensitivity ({method})", unit=unit)
    progress.advance(before)
    known: dict[str, float | None] = {}
    with open(path, "a", encoding="utf-8") as file:
        for name, value in METHODS[method](model, weights, ids.to(model.device), progress):
            known[name] = value
            file.write(json.dumps([name, value]) + "\n")
            file.flush()
        progress.close()
        for name in names:
            if name not in weights:
                known[name] = None
                file.write(json.dumps([name, None]) + "\n")
    return known


def perturbation(
    model: Any, weights: dict[str, Tensor], ids: Tensor, progress: Progress
) -> Iterator[tuple[str, float]]:
    """(KL with noise in one weight alone) / NOISE, by name, one after the other.

    The noise is Gaussian, and its power in a row is proportional to the row's, as a rotated quantizer with a scale for
    each row leaves it. The base's logits of all tokens are kept: ids is [sequences, length], so the memory is
    sequences * length * vocabulary.
    """
    with torch.inference_mode():
        base = [model(input_ids=row[None], use_cache=False).logits[0] for row in ids]
        for name, weight in weights.items():
            generator = torch.Generator(weight.device).manual_seed(SEED)
            kept, rows = weight.clone(), weight.reshape(-1, weight.shape[-1])
            spread = rows.float().square().mean(1, keepdim=True).mul(NOISE).sqrt()  # [rows, 1]
            noise = torch.randn(rows.shape, generator=generator, device=weight.device) * spread
            weight.copy_((rows.float() + noise).reshape(weight.shape))
            total = 0.0
            for row, before in zip(ids, base, strict=True):
                after = model(input_ids=row[None], use_cache=False).logits[0]
                total += float(compare(before, after, row, kl=True)["kl"].sum(dtype="float64"))
            weight.copy_(kept)
            progress.advance(1)
            yield name, total / ids.numel() / NOISE


def fisher(model: Any, weights: dict[str, Tensor], ids: Tensor, progress: Progress) -> Iterator[tuple[str, float]]:
    """1/2 * sum over rows r of tr(F_r) * ||w_r||^2 / cols, by name; F is the Fisher information of a token.

    KL = 1/2 d^T F d for a small change d of the weights (Amari 1998), and a rotated quantizer's d in row r is isotropic
    with the power t^2 ||w_r||^2. tr(F_r) is the mean square norm of the row's gradient of log p(label), with labels drawn
    from the model's own prediction; the gradients of a sequence's tokens are uncorrelated, so that the square of
    their sum will do. Gradients exist for one weight at a time, and a weight that is used twice has both uses in its own.
    """
    generator = torch.Generator(ids.device).manual_seed(SEED)
    totals = {name: torch.zeros((), dtype=torch.float64) for name in weights}
    powers = {n: w.reshape(-1, w.shape[-1]).float().square().mean(1).double() for n, w in weights.items()}  # [rows]

    def add(name: str, weight: Tensor) -> None:
        gradient = weight.grad.reshape(-1, weight.shape[-1])  # type: ignore[union-attr]
        totals[name] += (gradient.float().square().sum(1).double() * powers[name]).sum().cpu()
        weight.grad = None

    hooks = []
    for name, weight in weights.items():
        weight.requires_grad_(True)
        hooks.append(weight.register_post_accumulate_grad_hook(lambda w, name=name: add(name, w)))
    for row in ids:
        share = predict(model, row)
        labels = torch.multinomial(share.detach().exp(), 1, generator=generator)
        share.gather(1, labels).sum().backward()
        progress.advance(1)
    for hook, weight in zip(hooks, weights.values(), strict=True):
        hook.remove()
        weight.requires_grad_(False)
    yield from ((name, total.item() / 2 / ids.numel()) for name, total in totals.items())


METHODS = {"fisher": fisher, "perturbation": perturbation}


def _read(path: Path) -> dict[str, float | None]:
    """The coefficients in the file of an earlier run; a torn last line is cut off."""
    known: dict[str, float | None] = {}
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        known = dict(json.loads(line) for line in whole.splitlines())
    return known


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
