"""Recovery tuning: what costs no bits is trained to give the base model's predictions, with the codes fixed.

A weight is W = s ⊙ Ŵ with Ŵ as decoded and a factor s for each row, which goes into its scales (SPEC section 9).
These factors, those of embeddings and output layers too, and all vectors kept as they are (norms, biases) are trained on
KL(base || quantized) over the calibration tokens, end to end, as knowledge distillation does it. The result is a new
repository of the same size, which any reader decodes.
"""

import contextlib
import functools
import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from reference_quantizer import __version__
from reference_quantizer.calibration.tokens import Calibration
from reference_quantizer.checkpoint.source import Source, file_sha256
from reference_quantizer.checkpoint.support import KINDS
from reference_quantizer.evaluation.evaluate import SAMPLES, SUMMARY
from reference_quantizer.evaluation.tasks import RESULTS
from reference_quantizer.job.quantize import Target, quantize, resume_key
from reference_quantizer.model.base import DTYPES, check_same_model, load_base, running_models
from reference_quantizer.model.machine import check_device, has_bfloat16, keep_freed_memory
from reference_quantizer.planning.plan import Plan
from reference_quantizer.progress import Progress
from tqformat.load_quantized import (
    MANIFEST,
    Repo,
    TQFormatError,
    load,
    open_repo,
    parse_json,
    read_manifest,
)
from tqformat.writer import RepoWriter, publish

SAVE_SECONDS = 120.0
# Sequences that are not trained on: they tell whether the tuning was worth it. None that feedback saw, if there are others.
HELD_OUT = 8
CHECK = 10  # steps from one look at these to the next; the parameters that were best there are kept
PATIENCE = 5  # looks in a row that find nothing better, after which the tuning ends
LEAST_SIZE = 0.01  # of what is trained: smaller gains make the steps of this one
LOGITS = 2**25  # that are in memory at once: 128 MiB for each float32 work array
JOB = ".job"  # in the repository that is about to be tuned: hidden, so that it is no part of it [TQ-REPO-5]


@dataclass(frozen=True)
class Settings:
    """How to tune; the learning rate is relative to what is trained, and to the root of the divergence before."""

    steps: int
    batch: int = 4  # sequences in a step
    learning_rate: float = 0.003
    seed: int = 0
    dtype: str | None = None  # of the products; None: bfloat16 where the device has instructions for it

    def complete(self, device: str) -> "Settings":
        """With the dtype that suits the device."""
        return replace(self, dtype=self.dtype or ("bfloat16" if has_bfloat16(device) else "float32"))


# ------------------------------------------------------------------------------------------------ what is trained


class Scaled(nn.Module):
    """s ⊙ (W x) + b for a linear layer."""

    weight: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, factor: nn.Parameter) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)  # [rows, cols], of the products' dtype
        self.factor = factor  # s [rows]
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x.to(self.weight.dtype), self.weight) * self.factor
        return y if self.bias is None else y + self.bias


def scale_rows(model: Any, repo: Repo, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """Puts factors, ones to begin with, on the rows of the quantized weights of linear layers and the embedding: weight name -> them [rows].

    Linear layers become Scaled, with weights of `dtype`; what the embedding gives is multiplied by the factors of the rows that it
    reads. A weight that several modules share, or that is stored once for two, has the same factors in all. Everything else stays as it is, frozen.
    """
    model.requires_grad_(False)
    embedding = model.get_input_embeddings()
    names: dict[int, str] = {id(p): n for n, p in model.named_parameters(remove_duplicate=True)}
    factors: dict[str, nn.Parameter] = {}
    weights: dict[str, Tensor] = {}
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) and module is not embedding:
            continue
        name = names[id(module.weight)]
        name = repo.manifest.tied_weights.get(name, name)  # stored once, and thus scaled alike
        if not (entry := repo.manifest.tensors.get(name)) or not entry.stages or len(entry.shape) != 2:
            continue
        if name not in factors:
            factors[name] = nn.Parameter(torch.ones(len(module.weight), device=module.weight.device))
        if module is embedding:
            module.register_forward_hook(functools.partial(_scale_read, factors[name]))
            continue
        if name not in weights:
            weights[name] = module.weight.detach().to(dtype)
        owner, _, last = path.rpartition(".")
        layer = Scaled(weights[name], factors[name])
        layer.bias = module.bias
        setattr(model.get_submodule(owner), last, layer)
    return factors


def _scale_read(factor: Tensor, _: nn.Module, args: tuple[Tensor, ...], rows: Tensor) -> Tensor:
    """The forward hook of an embedding: its `rows` [..., width] for the tokens args[0] [...], times their factors."""
    return rows * factor[args[0]][..., None]


def small_parameters(model: nn.Module, repo: Repo) -> dict[str, nn.Parameter]:
    """The vectors (norms, biases) that the repository keeps as they are."""
    found = {}
    for name, parameter in model.named_parameters():
        entry = repo.manifest.tensors.get(name)
        if entry is not None and entry.data is not None and parameter.dim() == 1 and parameter.is_floating_point():
            found[name] = parameter
    return found


# ------------------------------------------------------------------------------------------------ the divergence


class NotTuned(TQFormatError):
    """Tuning is not possible for this model or text, or gains nothing."""


class _Reached(Exception):
    pass


class Halves:
    """A model that predicts the next token, cut before its output layer, so that logits need not be there all at once."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype  # of the products
        self.body = model.get_decoder()
        self.output: Any = None  # the class of the body's result, known once it has run
        self.vocabulary: int = model.config.get_text_config().vocab_size

    def products(self) -> Any:
        """The context in which matrices are multiplied in the dtype wanted; left after each sequence, as it keeps copies of weights."""
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def hidden(self, ids: Tensor) -> Tensor:
        """The states [length, width] that the output layer gets for the tokens ids [length]."""
        forward, found = self.body.forward, []

        def reach(*args: Any, **kwargs: Any) -> None:
            found.append(forward(*args, **kwargs))
            raise _Reached

        with self._body(reach), contextlib.suppress(_Reached):
            self.model(input_ids=ids[None], use_cache=False)
        self.output = type(found[0])
        hidden: Tensor = found[0].last_hidden_state[0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [n, vocabulary] that the model makes of states [n, width]; float32."""
        with self._body(lambda *_, **__: self.output(last_hidden_state=hidden[None])):
            ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        return logits.float()

    def check(self, ids: Tensor) -> None:
        """BIND.MODEL unless the halves give what the whole gives."""
        with torch.no_grad(), self.products():
            whole, cut = (
                self.model(input_ids=ids[None], use_cache=False).logits[0].float(),
                self.logits(self.hidden(ids)),
            )
        if not torch.allclose(cut, whole, rtol=0, atol=0.02 * float(whole.abs().max())):
            message = "expected logits that follow from the last hidden states alone"
            raise NotTuned("BIND.MODEL", type(self.model).__name__, message)

    @contextlib.contextmanager
    def _body(self, forward: Callable[..., Any]) -> Iterator[None]:
        self.body.forward = forward
        try:
            yield
        finally:
            del self.body.forward


class Targets:
    """The base model's states for each sequence, [length, width], computed once and kept in a file."""

    def __init__(self, base: Halves, ids: Tensor, path: Path, done: Tensor | None = None) -> None:
        self.base, self.ids = base, ids  # [sequences, length]
        self.done = torch.zeros(len(ids), dtype=torch.bool) if done is None else done  # those that the file has
        first = self._compute(0)
        self.dtype, shape = first.dtype, (len(ids), ids.shape[1], first.shape[-1] * first.element_size())
        self.file = np.memmap(path, np.uint8, "w+" if done is None else "r+", shape=shape)

    def __getitem__(self, k: int) -> Tensor:
        if not self.done[k]:
            self.file[k] = self._compute(k).cpu().view(torch.uint8).numpy()
            self.done[k] = True
        return torch.from_numpy(self.file[k].copy()).view(self.dtype).to(self.ids.device)

    def _compute(self, k: int) -> Tensor:
        with torch.no_grad(), self.base.products():
            return self.base.hidden(self.ids[k]).contiguous()


def divergence(targets: Targets, k: int, model: Halves, weight: float | None = None) -> float:
    """The mean KL(base || model) over the tokens of sequence k, in nats; with a weight, its gradient times it is added up.

    The part above the last hidden states is gone through chunk by chunk, forwards and backwards.
    """
    wanted, total, learn = targets[k], 0.0, weight is not None
    with torch.set_grad_enabled(learn), model.products():
        hidden = model.hidden(targets.ids[k])
        cut = hidden.detach().requires_grad_(learn)
        step = max(1, LOGITS // model.vocabulary)
        for a in range(0, len(cut), step):
            with torch.no_grad():
                target = targets.base.logits(wanted[a : a + step]).log_softmax(-1)
            found = model.logits(cut[a : a + step]).log_softmax(-1)
            loss = functional.kl_div(found, target, reduction="sum", log_target=True) / len(cut)
            total += loss.item()
            if weight is not None:
                (weight * loss).backward()
    if learn:
        hidden.backward(cut.grad)
    return total


def mean_divergence(targets: Targets, count: int, model: Halves) -> float:
    """The mean KL(base || model) over the first `count` sequences, in nats."""
    return sum(divergence(targets, k, model) for k in range(count)) / count


# ------------------------------------------------------------------------------------------------ the job


def tune(
    source: Source,
    repo_dir: Path,
    out: Path,
    calibration: Calibration,
    settings: Settings,
    device: str = "cpu",
    overwrite: bool = False,
    quiet: bool = False,
    seen: Tensor | None = None,
    **head: Any,
) -> dict[str, Any]:
    """Tune the repository `repo_dir`, made from the checkpoint `source`, into `out`; returns what its manifest says of it.

    `seen` [sequences, length] are the tokens that the codes were fitted to: `repo_dir` is better on these than on other text.
    Interrupted, the same call continues from what `.OUT.tuning` holds. SCHEMA.VALUE where nothing gets better: `out` is then not written.
    `head` goes to the writer: `extra`, `max_shard_bytes`.
    """
    check_device(device)
    keep_freed_memory()
    manifest, settings = read_manifest(repo_dir), settings.complete(device)
    if manifest.loader_kind not in KINDS:
        message = f"expected a model that predicts the next token ({', '.join(KINDS)}), found {manifest.loader_kind}"
        raise TQFormatError("SCHEMA.VALUE", "loader_kind", message)
    check_same_model(source, manifest)
    dtype = DTYPES[settings.dtype or ""]
    ids, held_out = hold_out(calibration.ids, seen, settings.seed)
    if len(ids) <= held_out:
        message = f"expected at least {held_out + 1} sequences of calibration text, found {len(ids)}"
        raise NotTuned("SCHEMA.VALUE", "--calibration-tokens", message)
    order, ids = Calibration(ids, calibration.texts).sha256, ids.to(device)
    with open_repo(repo_dir) as repo, running_models():
        base = load_base(source, manifest.loader_kind, settings.dtype or "", device)
        whole = load(repo_dir, device, torch.float32)
        factors, small = scale_rows(whole, repo, dtype), small_parameters(whole, repo)
        _tell_frozen(repo, factors)
        halves, model = Halves(base.requires_grad_(False), dtype), Halves(whole, dtype)
        for half in (halves, model):
            half.check(ids[0])
        digest = file_sha256(repo_dir / MANIFEST)
        job = json.dumps([__version__, asdict(settings), order, held_out, digest, source.identity, device])
        state = State(out.with_name(f".{out.name}.tuning"), job)
        optimizer = make_optimizer(factors, small)
        kept = state.restore(optimizer)
        targets = Targets(halves, ids, state.path / "targets", kept.get("done"))
        before, best = _train(targets, held_out, model, optimizer, settings, state, kept, quiet)
        after = best.divergence
        record = asdict(settings) | {"tokens": best.step * settings.batch * ids.shape[1], "best_step": best.step}
        record |= {"held_out_sequences": held_out, "held_out_kl": [float(f"{x:.6g}") for x in (before, after)]}
        if after < before:
            write_tuned(repo, repo_dir, out, factors, small, record, calibration, overwrite, **head)
        shutil.rmtree(state.path)
    if not after < before:
        message = f"the divergence on held-out text, {before:.4g} nats, did not fall"
        message += "; the command `tune` with a lower --learning-rate may do better"
        raise NotTuned("SCHEMA.VALUE", "tuning", message)
    return record


def hold_out(ids: Tensor, seen: Tensor | None, seed: int) -> tuple[Tensor, int]:
    """The sequences `ids` [sequences, length] in an order of `seed`, those that are held out first; and how many these are.

    They are none of `seen`, unless all sequences are.
    """
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
    known = {tuple(row) for row in seen.tolist()} if seen is not None else set()
    fresh = [k for k, row in enumerate(ids.tolist()) if tuple(row) not in known]
    count = max(1, min(HELD_OUT, len(ids) // 8))
    first = (fresh or list(range(len(ids))))[:count]
    return ids[first + sorted({*range(len(ids))} - {*first})], len(first)


def quantize_tuned(
    source: Source,
    plan: Plan,
    target: Target,
    progress: Progress,
    calibration: Calibration,
    tokens: Calibration,
    settings: Settings,
    quiet: bool = False,
) -> Path:
    """Quantize, and tune on `tokens`; returns the repository's path. Interrupted, the same call continues.

    The repository before tuning lies beside the target until the other is there, and takes its place where tuning is of no use,
    which a line then says.
    """
    beside = replace(target, path=target.path.with_name(f".{target.path.name}.untuned"), overwrite=True)
    mark = beside.path / JOB
    job = json.dumps(
        [resume_key(source, plan, beside, calibration), beside.base_model, beside.pipeline_tag, beside.extra]
    )
    if not mark.is_file() or mark.read_text("utf-8") != job:
        quantize(source, plan, beside, progress, calibration)
        mark.write_text(job, "utf-8")
    head = {"extra": target.extra, "max_shard_bytes": target.max_shard_bytes}
    try:
        tune(
            source,
            beside.path,
            target.path,
            tokens,
            settings,
            target.device,
            target.overwrite,
            quiet,
            calibration.ids,
            **head,
        )
        shutil.rmtree(beside.path)
    except NotTuned as error:
        print(f"note: not tuned: {error.message}", file=sys.stderr)
        mark.unlink()
        publish(beside.path, target.path, target.overwrite)
    return target.path


def _tell_frozen(repo: Repo, factors: dict[str, Any]) -> None:
    quantized = [name for name, entry in repo.manifest.tensors.items() if entry.stages]
    frozen = [name for name in quantized if name not in factors]
    if frozen:
        more = f" and {len(frozen) - 1} more" if len(frozen) > 1 else ""
        print(f"note: as they are, for they are no linear layers: {frozen[0]}{more}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------ training


class Best(NamedTuple):
    """The parameters with the least divergence on held-out text so far."""

    step: int  # 0: as they were
    divergence: float
    parameters: list[Tensor]


@dataclass(frozen=True)
class State:
    """The directory in which an interrupted run left its parameters, and of which job they are."""

    path: Path
    job: str

    def save(self, step: int, optimizer: torch.optim.Optimizer, targets: Targets, before: float, best: Best) -> None:
        """Keep the parameters after `step` steps; the file appears complete or not at all."""
        targets.file.flush()
        new = self.path / "state.new"
        values = {"job": self.job, "step": step, "before": before, "done": targets.done, "best": best._asdict()}
        parameters = [p.detach().cpu() for p in _parameters(optimizer)]
        torch.save(values | {"parameters": parameters, "optimizer": optimizer.state_dict()}, new)
        new.replace(self.path / "state")

    def restore(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Inverse of save: `step`, `before`, `done` and `best`; without a state of this job empty, and so is then the directory."""
        file = self.path / "state"
        kept = torch.load(file, weights_only=True) if file.is_file() else {}
        if kept.get("job") != self.job:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            return {}
        with torch.no_grad():
            for parameter, value in zip(_parameters(optimizer), kept["parameters"], strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(kept["optimizer"])
        return dict(kept)


def _copies(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.detach().clone() for p in _parameters(optimizer)]


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


class RelativeAdam(torch.optim.Adam):
    """Adam with the steps of each element times its group's `size`, one for all or one for each element."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of all parameters."""
        before = [p.clone() for p in _parameters(self)]
        for parameter in _parameters(self):
            parameter.zero_()  # so that it becomes the step, unrounded
        loss = super().step(closure)
        sizes = [group["size"] for group in self.param_groups for _ in group["params"]]
        for parameter, old, size in zip(_parameters(self), before, sizes, strict=True):
            parameter.copy_(old + size * parameter)
        return loss


def make_optimizer(factors: dict[str, nn.Parameter], small: dict[str, nn.Parameter]) -> RelativeAdam:
    """Adam for all that is trained, with relative steps: of each factor and gain, and of a bias's root mean square.

    The gains of one norm may be orders of magnitude apart. Some norms multiply by 1 + p (Gemma's), so the smaller one of
    |p| and |1 + p| counts.
    """
    groups = [{"params": [factor], "size": torch.ones_like(factor)} for factor in factors.values()]
    for name, parameter in small.items():
        p = parameter.detach()
        size = p.square().mean().sqrt() if name.endswith("bias") else torch.minimum(p.abs(), (1 + p).abs())
        groups.append({"params": [parameter.requires_grad_(True)], "size": size.clamp_min(LEAST_SIZE)})
    return RelativeAdam(groups, betas=(0.9, 0.95))


def _train(
    targets: Targets,
    held_out: int,
    model: Halves,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    state: State,
    kept: dict[str, Any],
    quiet: bool,
) -> tuple[float, Best]:
    """Train on all sequences but the first `held_out`, with a warm-up and a cosine decay; the divergence on those before, and the
    best that was seen, which the model then has.
    """
    progress = Progress(settings.steps, quiet, action="tuning", unit="step")
    first, before = kept.get("step", 0), kept.get("before") or mean_divergence(targets, held_out, model)
    best = Best(**kept["best"]) if "best" in kept else Best(0, before, _copies(optimizer))
    progress.advance(first)
    order = _epochs(len(targets.ids) - held_out, torch.Generator().manual_seed(settings.seed))
    order = itertools.islice(order, first * settings.batch, None)
    warm, saved = max(1, settings.steps // 20), time.monotonic()
    rate = settings.learning_rate * math.sqrt(before)  # about as large as the errors that are to be made up for
    for step in range(first + 1, settings.steps + 1):
        share = min(1.0, step / warm) * (0.02 + 0.98 * (1 + math.cos(math.pi * (step - 1) / settings.steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        for _ in range(settings.batch):
            divergence(targets, held_out + next(order), model, 1 / settings.batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.advance(1)
        if step % CHECK == 0 or step == settings.steps:
            if (now := mean_divergence(targets, held_out, model)) < best.divergence:
                best = Best(step, now, _copies(optimizer))
            elif step - best.step >= PATIENCE * CHECK:
                break
        if time.monotonic() - saved > SAVE_SECONDS or step == settings.steps:
            state.save(step, optimizer, targets, before, best)
            saved = time.monotonic()
    progress.close()
    with torch.no_grad():
        for parameter, value in zip(_parameters(optimizer), best.parameters, strict=True):
            parameter.copy_(value)
    return before, best


def _epochs(count: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


# ------------------------------------------------------------------------------------------------ writing


def write_tuned(
    repo: Repo,
    repo_dir: Path,
    out: Path,
    factors: dict[str, nn.Parameter],
    small: dict[str, nn.Parameter],
    record: dict[str, Any],
    calibration: Calibration,
    overwrite: bool = False,
    **head: Any,
) -> None:
    """The repository with the trained scales and vectors; codes, tables and other files are copied."""
    data = parse_json((repo_dir / MANIFEST).read_bytes(), MANIFEST)
    method = dict(data["quantization"])
    method["extra"] = method.get("extra", {}) | {"tuning": record | {"calibration": calibration.to_dict()}}
    method["calibration"] = method.get("calibration") or calibration.to_dict()
    extra = {key: value for key, value in data.get("extra", {}).items() if key != "release"}
    with RepoWriter(
        out,
        base_model=data["base_model"],
        loader_kind=data["loader_kind"],
        pipeline_tag=data.get("pipeline_tag"),
        quantization=method,
        generator=f"reference_quantizer {__version__}",
        overwrite=overwrite,
        **({"extra": extra} | head),
    ) as writer:
        for id, entry in data["transforms"].items():
            keys = {k: v for k, v in entry.items() if k not in ("kind", "size")}
            keys |= {k: repo._read(entry[k]) for k in ("matrix", "pairs", "angles", "index") if k in entry}
            writer.add_transform(id, entry["kind"], entry["size"], **keys)
        for id, entry in data["codebooks"].items():
            stored = entry.get("tensor") is not None
            levels = repo._read(entry["tensor"]) if stored else entry["values"]
            if not stored and entry["dimension"] > 1:
                levels = torch.tensor(levels, dtype=torch.float64).reshape(entry["entries"], entry["dimension"])
            writer.add_codebook(id, levels, origin=entry.get("origin"), stored=stored)
        for name, entry in data["tensors"].items():
            if entry["kind"] == "passthrough":
                kept = repo.dequantize(name)
                tensor = small[name].detach().to("cpu", kept.dtype).reshape(kept.shape) if name in small else kept
                writer.add_passthrough(name, tensor)
                continue
            stages = [stage | _scaled(repo, stage, factors.get(name)) for stage in entry["stages"]]
            columns = repo._read(entry["column_scale"]) if entry.get("column_scale") else None
            facts = {k: v for k, v in entry.get("extra", {}).items() if k in ("protected", "sensitivity")}
            writer.add_quantized(name, entry["shape"], entry["dtype"], stages, columns, extra=facts)
        for alias, original in data.get("tied_weights", {}).items():
            writer.tie(alias, original)
        for name, file in data["files"].items():
            # what speaks of the repository before
            stale = name in (SUMMARY, SAMPLES, RESULTS) or name.startswith("figure_")
            if file["role"] != "payload" and not stale:
                writer.add_file(repo_dir / name, file["role"])
        writer.finish()


def _scaled(repo: Repo, stage: dict[str, Any], factor: Tensor | None) -> dict[str, Any]:
    """The parts of a stage; what multiplies its levels, and what is added to them, times the factor of the row."""
    keys = ("codes", "scales", "outer_scales", "offsets", "outer_offsets")
    found: dict[str, Any] = {key: repo._read(stage[key]) for key in keys if stage.get(key)}
    for key in ("scales", "offsets") if factor is not None else ():
        key = f"outer_{key}" if f"outer_{key}" in found else key
        if key in found:
            times = factor.detach().cpu()[:, None].clamp_min(0)
            most = torch.finfo(found[key].dtype).max
            found[key] = (found[key].float() * times).clamp(-most, most).to(found[key].dtype)
    stored = {"scale_dtype": "scales", "offset_dtype": "offsets"}
    return found | {key: repo.spans[stage[kind]].dtype for key, kind in stored.items() if kind in found}
