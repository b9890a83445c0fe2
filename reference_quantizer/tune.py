"""Recovery tuning: with the codes fixed, scales, column scales and norms are trained to give the base model's predictions.

A weight is W = s ⊙ Z ⊙ c with Z = T^-1(codebook[codes]) fixed, s a scale for each row and c one for each column
(SPEC sections 9 and 10). s, c and all small floating-point tensors kept as they are (norms, biases) are trained on
KL(base || quantized) over the calibration tokens, end to end, as knowledge distillation does it. The result is a new
repository with the same codes, which any reader decodes.
"""

import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from reference_quantizer import __version__
from reference_quantizer.blocks import has_bfloat16
from reference_quantizer.calibration import Calibration
from reference_quantizer.evaluate import (
    DTYPES,
    KINDS,
    SAMPLES,
    SUMMARY,
    Progress,
    check_same_model,
    load_base,
    running_models,
)
from reference_quantizer.evaluate import Settings as Arithmetic
from reference_quantizer.quantize import check_device
from reference_quantizer.source import Source, file_sha256
from tqformat.load_quantized import MANIFEST, Repo, TQFormatError, load, open_repo, parse_json, read_manifest
from tqformat.writer import RepoWriter

SAVE_SECONDS = 60.0
HELD_OUT = 8  # sequences that are not trained on: they tell whether the tuning was worth it


@dataclass(frozen=True)
class Settings:
    """How to tune; the learning rate is relative, since every parameter is a factor near 1."""

    steps: int = 100
    batch: int = 4  # sequences in a step
    learning_rate: float = 0.005
    seed: int = 0
    dtype: str | None = None  # of the products; None: bfloat16 where the device has instructions for it

    def complete(self, device: str) -> "Settings":
        """With the dtype that suits the device."""
        return replace(self, dtype=self.dtype or ("bfloat16" if has_bfloat16(device) else "float32"))


class Scaled(nn.Module):
    """s ⊙ (Z (c ⊙ x)) + b for a linear layer, s[i] Z[i] ⊙ c for an embedding; trains factors of s and c."""

    bias: nn.Parameter | None

    def __init__(self, unit: Tensor, scales: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.register_buffer("unit", unit, persistent=False)  # [rows, cols]
        self.register_buffer("scales", scales, persistent=False)  # [rows]
        self.register_buffer("columns", columns, persistent=False)  # [cols]
        self.row_factor = nn.Parameter(torch.ones_like(scales))
        self.column_factor = nn.Parameter(torch.ones_like(columns))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        x = (x * (self.columns * self.column_factor)).to(self.unit.dtype)
        y = functional.linear(x, self.unit) * (self.scales * self.row_factor)
        return y if self.bias is None else y + self.bias

    def rows(self, ids: Tensor) -> Tensor:
        """The embeddings of token ids."""
        factor = (self.scales * self.row_factor)[ids][..., None]
        return functional.embedding(ids, self.unit) * factor * (self.columns * self.column_factor)


def tune(
    source: Source,
    repo_dir: Path,
    out: Path,
    calibration: Calibration,
    settings: Settings,
    device: str = "cpu",
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Tune the repository `repo_dir`, made from the checkpoint `source`, into `out`; returns what its manifest says of it.

    Interrupted, the same call continues from what `.OUT.tuning` holds. SCHEMA.VALUE where nothing gets better: `out` is then not written.
    """
    check_device(device)
    manifest, settings = read_manifest(repo_dir), settings.complete(device)
    if manifest.loader_kind not in KINDS:
        message = f"expected a model that predicts the next token ({', '.join(KINDS)}), found {manifest.loader_kind}"
        raise TQFormatError("SCHEMA.VALUE", "loader_kind", message)
    check_same_model(source, manifest)
    dtype = DTYPES[settings.dtype or ""]
    products = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    with open_repo(repo_dir) as repo, running_models(), products:
        base = load_base(source, repo.manifest.loader_kind, Arithmetic(device=device, dtype=settings.dtype))
        model = load(repo_dir, device, torch.float32)
        scaled = replace_layers(model, repo, device, dtype)
        small = small_parameters(model, repo)
        ids = calibration.ids[
            torch.randperm(len(calibration.ids), generator=torch.Generator().manual_seed(settings.seed))
        ]
        held_out = max(1, min(HELD_OUT, len(ids) // 8))
        if len(ids) <= held_out:
            message = f"expected at least {held_out + 1} sequences of calibration text, found {len(ids)}"
            raise TQFormatError("SCHEMA.VALUE", "--calibration-tokens", message)
        before = mean_divergence(base, model, ids[:held_out].to(device))
        job = json.dumps(
            [asdict(settings), calibration.sha256, file_sha256(repo_dir / MANIFEST), source.identity, device]
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        state = State(out.with_name(f".{out.name}.tuning"), job)
        _train(base, model, scaled, small, ids[held_out:].to(device), settings, state, quiet)
        after = mean_divergence(base, model, ids[:held_out].to(device))
        record = asdict(settings) | {"tokens": settings.steps * settings.batch * ids.shape[1]}
        record |= {"held_out_sequences": held_out, "held_out_kl": [float(f"{x:.6g}") for x in (before, after)]}
        if not after < before:
            state.path.unlink(missing_ok=True)
            message = f"the divergence on held-out text went from {before:.5f} to {after:.5f}; lower --learning-rate"
            raise TQFormatError("SCHEMA.VALUE", "tuning", message)
        write_tuned(repo, repo_dir, out, scaled, small, record, calibration, overwrite)
        state.path.unlink(missing_ok=True)
    return record


def replace_layers(model: nn.Module, repo: Repo, device: str, dtype: torch.dtype = torch.float32) -> dict[str, Scaled]:
    """Puts a Scaled in the place of each linear layer whose weight has one stage and one scale a row: name -> it.

    A tied embedding and output layer share one. Everything else stays as it is, frozen.
    """
    model.requires_grad_(False)
    by_parameter: dict[int, str] = {id(p): n for n, p in model.named_parameters(remove_duplicate=True)}
    found: dict[str, Scaled] = {}
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        name = by_parameter[id(module.weight)]
        weight = repo.manifest.tensors.get(name)
        if weight is None or len(weight.stages or ()) != 1 or len(weight.shape) != 2:
            continue
        (stage,) = weight.stages or ()
        if stage.vector_length not in (None, weight.shape[1]):
            continue
        if name not in found:
            scales = repo._read(stage.scales).float().flatten().to(device)
            columns = torch.ones(weight.shape[1], device=device)
            if weight.column_scale is not None:
                columns = repo._read(weight.column_scale).float().to(device)
            unit = decode_unit(repo, name, device).to(dtype)
            found[name] = Scaled(unit, scales, columns)
        parent, _, last = path.rpartition(".")
        owner = model.get_submodule(parent)
        if isinstance(module, nn.Linear):
            found[name].bias = module.bias
            setattr(owner, last, found[name])
        else:
            _embed_with(module, found[name])
    return found


def _embed_with(module: nn.Embedding, scaled: Scaled) -> None:
    """Lets an embedding layer take its rows from `scaled`; what its class multiplies them with stays in force."""
    factor = getattr(module, "embed_scale", None)  # of Gemma's embeddings

    def forward(ids: Tensor) -> Tensor:
        rows = scaled.rows(ids)
        return rows if factor is None else rows * factor.to(rows.dtype)

    module.forward = forward  # type: ignore[method-assign]


def decode_unit(repo: Repo, name: str, device: str) -> Tensor:
    """T^-1(codebook[codes]) of a weight with one stage, as if all scales were 1; float32 [rows, cols] on the device."""
    weight = repo.manifest.tensors[name]
    (stage,) = weight.stages or ()
    rows, cols = weight.shape
    height = stage.layout(cols)[2]
    step = max(1, 2**22 // (height * cols)) * height
    ones = torch.ones(rows, 1)
    read = repo._read
    out = torch.empty(rows, cols, device=device)

    def with_unit_scales(key: str, a: int = 0, b: int | None = None, flat: bool = False) -> Tensor:
        return ones[a:b] if key == stage.scales else read(key, a, b, flat)

    repo._read = with_unit_scales  # type: ignore[method-assign]
    try:
        repo._tables.clear()
        for a in range(0, rows, step):
            b = min(rows, a + step)
            out[a:b] = repo._decode_stage(stage, a, b, cols, torch.device(device), name)
    finally:
        repo._read = read  # type: ignore[method-assign]
        repo._tables.clear()
    return out


def small_parameters(model: nn.Module, repo: Repo) -> dict[str, nn.Parameter]:
    """The vectors (norms, biases) that the repository keeps as they are, set to be trained."""
    found = {}
    for name, parameter in model.named_parameters():
        weight = repo.manifest.tensors.get(name)
        if weight is not None and weight.data is not None and parameter.dim() == 1 and parameter.is_floating_point():
            found[name] = parameter.requires_grad_(True)
    return found


# ------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class State:
    """Where an interrupted run left its parameters, and of which job they are."""

    path: Path
    job: str

    def save(self, step: int, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Keep the parameters after `step` steps; the file appears complete or not at all."""
        new = self.path.with_name(f"{self.path.name}.new")
        values = {"job": self.job, "step": step, "parameters": [p.detach().cpu() for p in parameters]}
        torch.save(values | {"optimizer": optimizer.state_dict()}, new)
        new.replace(self.path)

    def restore(self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
        """Inverse of save: the steps that are done, 0 if there is no state of this job."""
        if not self.path.is_file():
            return 0
        kept = torch.load(self.path, weights_only=True)
        if kept["job"] != self.job:
            return 0
        with torch.no_grad():
            for parameter, value in zip(parameters, kept["parameters"], strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(kept["optimizer"])
        return int(kept["step"])


def _train(
    base: nn.Module,
    model: nn.Module,
    scaled: dict[str, Scaled],
    small: dict[str, nn.Parameter],
    ids: Tensor,
    settings: Settings,
    state: State,
    quiet: bool,
) -> None:
    """Adam with a warm-up and a cosine decay; vectors take steps relative to their root mean square."""
    rate = settings.learning_rate
    groups = [{"params": [p for s in scaled.values() for p in (s.row_factor, s.column_factor)], "size": 1.0}]
    groups += [{"params": [p], "size": max(1e-3, float(p.detach().square().mean().sqrt()))} for p in small.values()]
    parameters = [p.requires_grad_(True) for group in groups for p in group["params"]]
    optimizer = torch.optim.Adam(groups, lr=rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(settings.seed)
    order = _epochs(len(ids), generator)
    progress = Progress(settings.steps, quiet, action="tuning", unit="step")
    warm = max(1, settings.steps // 20)
    first, saved = state.restore(parameters, optimizer), time.monotonic()
    progress.advance(first)
    order = itertools.islice(order, first * settings.batch, None)
    for step in range(first, settings.steps):
        share = min(1.0, (step + 1) / warm) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / settings.steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate * share * group["size"]
        for _ in range(settings.batch):
            row = ids[next(order)][None]
            loss = divergence(base, model, row).mean() / settings.batch
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.advance(1)
        if time.monotonic() - saved > SAVE_SECONDS or step + 1 == settings.steps:
            state.save(step + 1, parameters, optimizer)
            saved = time.monotonic()
    progress.close()


def _epochs(count: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def divergence(base: nn.Module, model: nn.Module, ids: Tensor) -> Tensor:
    """KL(base || model) at each position of ids [1, length], in nats; [length]."""
    with torch.no_grad():
        target = base(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    found = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    return functional.kl_div(found, target, reduction="none", log_target=True).sum(-1)


def mean_divergence(base: nn.Module, model: nn.Module, ids: Tensor) -> float:
    """The mean KL(base || model) over the tokens ids [sequences, length], in nats."""
    with torch.no_grad():
        return float(torch.stack([divergence(base, model, row[None]).mean() for row in ids]).mean())


# ------------------------------------------------------------------------------------------------ writing


def write_tuned(
    repo: Repo,
    repo_dir: Path,
    out: Path,
    scaled: dict[str, Scaled],
    small: dict[str, nn.Parameter],
    record: dict[str, Any],
    calibration: Calibration,
    overwrite: bool,
) -> None:
    """The repository with the trained scales, column scales and vectors; codes and files are copied."""
    data = parse_json((repo_dir / MANIFEST).read_bytes(), MANIFEST)
    method = dict(data["quantization"])
    method["extra"] = method.get("extra", {}) | {"tuning": record}
    method["calibration"] = method.get("calibration") or calibration.to_dict()
    with RepoWriter(
        out,
        base_model=data["base_model"],
        loader_kind=data["loader_kind"],
        pipeline_tag=data.get("pipeline_tag"),
        quantization=method,
        generator=f"reference_quantizer {__version__}",
        overwrite=overwrite,
        extra={key: value for key, value in data.get("extra", {}).items() if key != "release"},
    ) as writer:
        for id, entry in data["transforms"].items():
            keys = {k: v for k, v in entry.items() if k not in ("kind", "size")}
            keys |= {k: repo._read(entry[k]) for k in ("matrix", "pairs", "angles") if k in entry}
            writer.add_transform(id, entry["kind"], entry["size"], **keys)
        for id, entry in data["codebooks"].items():
            stored = entry.get("tensor") is not None
            levels = repo._read(entry["tensor"]) if stored else entry["values"]
            if not stored and entry["dimension"] > 1:
                levels = torch.tensor(levels, dtype=torch.float64).reshape(entry["entries"], entry["dimension"])
            writer.add_codebook(id, levels, origin=entry.get("origin"), stored=stored)
        for name, entry in data["tensors"].items():
            if entry["kind"] == "passthrough":
                kept = repo._read(entry["data"])
                tensor = small[name].detach().to("cpu", kept.dtype).reshape(kept.shape) if name in small else kept
                writer.add_passthrough(name, tensor)
                continue
            stages = []
            for stage in entry["stages"]:
                scales = repo._read(stage["scales"])
                if name in scaled:
                    trained = (scaled[name].scales * scaled[name].row_factor).detach().cpu().clamp_min(0)
                    scales = trained.reshape(scales.shape).to(scales.dtype)
                stages.append(stage | {"codes": repo._read(stage["codes"]), "scales": scales})
            columns = repo._read(entry["column_scale"]) if entry.get("column_scale") else None
            if name in scaled:
                columns = (scaled[name].columns * scaled[name].column_factor).detach().cpu().half()
            facts = {k: v for k, v in entry.get("extra", {}).items() if k in ("protected", "sensitivity")}
            writer.add_quantized(name, entry["shape"], entry["dtype"], stages, columns, extra=facts)
        for alias, original in data.get("tied_weights", {}).items():
            writer.tie(alias, original)
        for name, file in data["files"].items():
            stale = name in (SUMMARY, SAMPLES) or name.startswith("figure_")  # they speak of the repository before
            if file["role"] != "payload" and not stale:
                writer.add_file(repo_dir / name, file["role"])
        writer.finish()
