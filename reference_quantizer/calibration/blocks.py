"""A model, one block of layers after another: what reaches its linear layers when it reads the calibration tokens.

Only the hidden states at the entrance of the current block are kept, in memory or in a file, and only that block is on the
device in float32; with `load_in_blocks`, only its weights are in memory. The layers in front of the first block and behind the last
one are run by the model itself.

What reaches a layer behind encoded ones is not what reached it in the base model. With `paired` the walk has both: the
base model's hidden states go through each block before its weights are changed, and what its layers are given then is
kept until the block is done. From the pairs follow the weights that a layer should rather have; see `Moments`.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from reference_quantizer.checkpoint.source import Source
from reference_quantizer.codes.feedback import Moments
from reference_quantizer.model.base import load_base, load_tokenizer, running_models
from reference_quantizer.model.machine import has_bfloat16
from tqformat.load_quantized import LOADER_KINDS, TQFormatError, translated

BATCH = 4  # sequences that go through a block together


class _Reached(Exception):
    pass


@dataclass(frozen=True)
class Group:
    """Linear layers of a block that read the same input: weight name -> layer, in the order in which they are called."""

    layers: dict[str, nn.Linear]

    @property
    def first(self) -> nn.Linear:
        return next(iter(self.layers.values()))


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of blocks with the most parameters, the outer one of nested ones; SCHEMA.VALUE where there is none."""
    stacks = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    if not stacks:
        advice = "expected a model with a stack of blocks; use --preset fast"
        raise TQFormatError("SCHEMA.VALUE", type(model).__name__, advice)
    return max(stacks, key=lambda stack: sum(p.numel() for p in stack[1].parameters()))


def load_in_blocks(source: Source, loader_kind: str, folder: Path) -> Any:
    """The checkpoint's model in float32, but the weights of its blocks stay in the checkpoint's files.

    A layer of a block reads its weights whenever it runs, and has none in between, until `Blocks` comes to the block. Weights that the
    model class arranges in another way than the checkpoint, such as experts, are written to `folder`. Errors as those of `find_blocks`
    and `load_base`.
    """
    import transformers

    with translated(source.path.name), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(source.path, local_files_only=True)
        model = getattr(transformers, LOADER_KINDS[loader_kind]).from_config(config)
    held, needed = sum(i.scalars for i in source.tensors.values()), sum(p.numel() for p in model.parameters())
    if needed > 2 * held:  # told here, since transformers would first make up what is missing
        message = f"the checkpoint lacks weights: it has {held:,} scalars, its model class {needed:,}"
        raise TQFormatError("BIND.MODEL", source.path.name, message)
    stack, blocks = find_blocks(model)
    parts = stack.split(".")
    around = {".".join(parts[:k]) for k in range(len(parts))}  # the modules that hold the stack, among other things
    places = {f"{stack}.{k}": "disk" for k in range(len(blocks))}
    for name, _ in itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers()):
        if not name.startswith(f"{stack}."):
            owner = name.rpartition(".")[0]
            places[name if owner in around else owner] = "cpu"
    placement = {"device_map": places, "offload_folder": str(folder)}
    return load_base(source, loader_kind, **placement).requires_grad_(False)


def why_not_walked(source: Source, loader_kind: str, cache: Path, device: str = "cpu") -> str | None:
    """Why `Blocks` cannot walk through the checkpoint's model and feed it its own text; None where it can.

    The model reads a few tokens to find out. `cache` holds what does not fit into memory meanwhile.
    """
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with running_models(), TemporaryDirectory(dir=cache) as folder:
            load_tokenizer(source.path)
            walk = Blocks(load_in_blocks(source, loader_kind, Path(folder)), torch.arange(8)[None], device)
            if not any(isinstance(module, nn.Linear) for block in walk.blocks for module in block.modules()):
                return "the blocks of the model have no linear layers"
    except TQFormatError as error:
        return f"{error.where}: {error.message}"
    return None


def _read_weights(block: nn.Module) -> bool:
    """Bring what `load_in_blocks` left in files into memory, for good; whether there was anything."""
    if not any(p.is_meta for p in block.parameters()):
        return False
    from accelerate.hooks import remove_hook_from_module

    for module in block.modules():
        if hook := getattr(module, "_hf_hook", None):
            hook.pre_forward(module)
            remove_hook_from_module(module)
    return True


class Blocks:
    """Walks through the blocks of `model` with the tokens `ids` [sequences, length]; see the module's docstring.

    Hidden states and kept inputs go to files in `folder`, where one is given; they are of no use after the walk.
    """

    def __init__(
        self,
        model: nn.Module,
        ids: Tensor,
        device: str = "cpu",
        bfloat16: bool | None = None,
        paired: bool = False,
        folder: Path | None = None,
    ) -> None:
        self.model, self.ids, self.device, self.folder = model.eval(), ids, device, folder
        self.bfloat16 = has_bfloat16(device) if bfloat16 is None else bfloat16  # products alone; sums are float32
        self.name, self.blocks = find_blocks(model)
        self.position = 0
        self._options = self._block_options()  # of each block: what it is called with beside the hidden states
        self.hidden = self._entrance()  # [sequences, length, width] float32, on the CPU
        self._check()
        self.base = self._room("base", self.hidden.shape).copy_(self.hidden) if paired else None  # of the base model
        # of the current block: what modules are given in the base model [sequences, length, n]; and for linear layers whose
        # output is added to the stream, a module that is given the stream as it was before
        self._kept: dict[nn.Module, Tensor] = {}
        self._places: dict[nn.Module, nn.Module] = {}

    def __iter__(self) -> Iterator[nn.Module]:
        """The blocks that are left, each in float32 on the device; changed weights take effect in what follows."""
        while self.position < len(self.blocks):
            block = self.blocks[self.position]
            dtype, read = next(block.parameters()).dtype, _read_weights(block)
            block.to(self.device, torch.float32)
            yield block
            for k in range(0, len(self.hidden), BATCH):  # in place: one copy of the hidden states is enough
                self.hidden[k : k + BATCH] = self._forward(block, self.hidden[k : k + BATCH]).float().cpu()
            block.to("meta" if read else "cpu", dtype)
            self.position += 1

    def groups(self, block: nn.Module) -> list[Group]:
        """The linear layers of `block` that are called, those with the same input together.

        With `paired` it is asked once for each block, before the weights change: the base model reads the block here.
        """
        names = {module: f"{self.name}.{self.position}.{n}.weight" for n, module in block.named_modules()}
        inputs: list[tuple[Tensor, dict[str, nn.Linear]]] = []
        seen: set[nn.Module] = set()

        def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert isinstance(layer, nn.Linear)
            if layer in seen:
                return
            seen.add(layer)
            same = next((layers for x, layers in inputs if x is args[0]), None)
            if same is None:
                inputs.append((args[0], same := {}))
            same[names[layer]] = layer

        hooks = [m.register_forward_pre_hook(note) for m in block.modules() if isinstance(m, nn.Linear)]
        self._forward(block, self.hidden[:1])
        _remove(hooks)
        groups = [Group(layers) for _, layers in inputs]
        if self.base is not None:
            self._read_base(block, {group.first for group in groups})
        return groups

    def moments(self, block: nn.Module, group: Group) -> dict[str, Moments]:
        """The moments of each layer of `group`, with what its inputs are now; without `paired`, the Hessian alone."""
        layer, found = group.first, []
        places = {name: self._places[m] for name, m in group.layers.items() if m in self._places}
        streams: dict[nn.Module, Tensor] = {}

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.append(args[0].reshape(-1, layer.in_features).float())
            raise _Reached

        hooks = [layer.register_forward_pre_hook(keep)]
        for module in set(places.values()):
            hooks.append(module.register_forward_pre_hook(lambda m, args: streams.update({m: args[0].float()})))
        square = torch.zeros(layer.in_features, layer.in_features, device=self.device)
        shift = torch.zeros_like(square) if layer in self._kept else None
        drifts = {n: torch.zeros(group.layers[n].weight.shape, device=self.device) for n in places}
        for k in range(0, len(self.hidden), BATCH):
            try:
                self._forward(block, self.hidden[k : k + BATCH])
            except _Reached:
                x = found.pop()
                square.addmm_(x.T, x)
                if shift is not None:
                    before = self._kept[layer][k : k + BATCH].to(self.device).reshape(x.shape)
                    shift.addmm_((before.float() - x.to(before.dtype).float()).T, x)  # both rounded, if at all
                for name, module in places.items():
                    lack = self._kept[module][k : k + BATCH].to(self.device) - streams[module]
                    drifts[name].addmm_(lack.reshape(len(x), -1).T, x)
        _remove(hooks)
        mean = square.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        shared = square / mean, None if shift is None else shift / mean
        return {n: Moments(*shared, drifts[n] / mean if n in drifts else None) for n in group.layers}

    def _read_base(self, block: nn.Module, layers: set[nn.Linear]) -> None:
        """Let the base model's hidden states through the block, and keep what they give `layers`.

        Layers whose inputs are not [sequences, length, n], such as experts with tokens of their own, have no pairs.
        """
        assert self.base is not None
        shape, low = self.hidden.shape[:2], torch.bfloat16 if self.bfloat16 else torch.float32
        self._places = self._find_places(block)
        self._kept, k = {}, 0

        def keep(module: nn.Module, value: Tensor, dtype: torch.dtype) -> None:
            if value.dim() != 3 or value.shape[1] != shape[1]:
                return
            if module not in self._kept:
                self._kept[module] = self._room(f"{len(self._kept)}", (*shape, value.shape[2]), dtype)
            self._kept[module][k : k + BATCH] = value.cpu()

        hooks = [m.register_forward_pre_hook(lambda m, args: keep(m, args[0], low)) for m in layers]
        for module in set(self._places.values()):
            hooks.append(module.register_forward_pre_hook(lambda m, args: keep(m, args[0], torch.float32)))
        for k in range(0, len(self.base), BATCH):
            self.base[k : k + BATCH] = self._forward(block, self.base[k : k + BATCH]).float().cpu()
        _remove(hooks)

    def _find_places(self, block: nn.Module) -> dict[nn.Module, nn.Module]:
        """The linear layers of the block whose outputs are added to the stream, found by looking at the sums; see _places.

        Not those with a norm between them and the stream, as Gemma has it: what they lack there is no matter of least squares.
        """
        hidden = self.hidden[:1]
        entered: list[tuple[nn.Module, Tensor]] = []
        left: list[tuple[nn.Module, Tensor, int]] = []  # linear layers, with the number of modules entered before

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].shape == hidden.shape:
                entered.append((module, args[0]))

        def leave(layer: nn.Module, _: tuple[Any, ...], out: Tensor) -> None:
            if out.shape == hidden.shape:
                left.append((layer, out, len(entered)))

        modules = [m for m in block.modules() if m is not block]
        hooks = [m.register_forward_pre_hook(enter) for m in modules]
        hooks += [m.register_forward_hook(leave) for m in modules if isinstance(m, nn.Linear)]
        end = self._call(block, hidden, self.device)
        _remove(hooks)
        places: dict[nn.Module, nn.Module] = {}
        for layer, out, count in left:
            sums = [t for _, t in entered[count:]] + [end]
            for (module, s), t in itertools.product(entered[:count], sums):
                if (t - s - out).norm() <= 1e-4 * out.norm():
                    places.setdefault(layer, module)
        return places

    def _room(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """A large tensor to write to, on the CPU: in memory, or in a file, whose pages the system moves as it has to."""
        with torch.inference_mode(False):  # hooks ask for it, too, and what they get is written to later
            if self.folder is None:
                return torch.empty(shape, dtype=dtype)
            path = str(self.folder / f"spilled-{name}")
            return torch.from_file(path, shared=True, size=math.prod(shape), dtype=dtype).reshape(shape)

    def enter_again(self) -> None:
        """Let the tokens enter the first block once more, behind an embedding that is another now; the base's states stay."""
        self.hidden = self._entrance()

    def save(self, path: Path) -> None:
        """Keep the place and the hidden states in `path`, which appears complete or not at all."""
        new = path.with_name(f"{path.name}.new")
        base = {} if self.base is None else {"base": self.base.numpy()}
        with open(new, "wb") as file:
            np.savez(file, position=self.position, hidden=self.hidden.numpy(), **base)
        new.replace(path)

    def restore(self, path: Path) -> None:
        """Inverse of save. The weights of the blocks before the place are of no more account."""
        with np.load(path, allow_pickle=False) as kept:
            self.position = int(kept["position"])
            self.hidden.copy_(torch.from_numpy(kept["hidden"]))
            if self.base is not None:
                self.base.copy_(torch.from_numpy(kept["base"]))

    def _forward(self, block: nn.Module, hidden: Tensor) -> Tensor:
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bfloat16):
            return self._call(block, hidden, self.device)

    def _call(self, block: nn.Module, hidden: Tensor, device: str) -> Tensor:
        args, kwargs = next(o for b, o in zip(self.blocks, self._options, strict=True) if b is block)
        with torch.inference_mode():
            out = block(hidden.to(device), *_moved(args, device), **{k: _moved(v, device) for k, v in kwargs.items()})
        return out[0] if isinstance(out, tuple) else out

    def _check(self) -> None:
        """SCHEMA.VALUE unless the blocks alone, one after another, give what the model gives in one piece.

        They do not where a block needs something that differs from text to text, or state beside the hidden states.
        """
        wanted = self._run_blocks(self.ids[:2]).float()
        hidden = self.hidden[:2]
        try:
            for block in self.blocks:
                hidden = self._call(block, hidden.to(next(block.parameters()).dtype), "cpu").float()
            close = hidden.shape == wanted.shape and bool((hidden - wanted).norm() <= 0.01 * wanted.norm())
        except (RuntimeError, TypeError, ValueError, IndexError):
            close = False
        if not close:
            advice = "its blocks cannot be run one by one; expected a plain decoder, or use --preset fast"
            raise TQFormatError("SCHEMA.VALUE", type(self.model).__name__, advice)

    def _block_options(self) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        options: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept = {k: v for k, v in kwargs.items() if k not in ("hidden_states", "past_key_values", "use_cache")}
            options.append((args[1:], kept))

        hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in self.blocks]
        self._run_blocks(self.ids[:1])
        _remove(hooks)
        return options

    def _run_blocks(self, ids: Tensor) -> Tensor:
        """What the last block gives; the model is not run further, since logits would take more memory than a block."""
        found: list[Any] = []

        def leave(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            found.append(out[0] if isinstance(out, tuple) else out)
            raise _Reached

        hook = self.blocks[-1].register_forward_hook(leave)
        try:
            with torch.inference_mode():
                self.model(input_ids=ids, use_cache=False)
        except _Reached:
            pass
        hook.remove()
        result: Tensor = found[0]
        return result

    def _entrance(self) -> Tensor:
        hidden, k = torch.empty(0), 0

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal hidden
            found = args[0] if args else kwargs["hidden_states"]
            if not len(hidden):
                hidden = self._room("hidden", (len(self.ids), *found.shape[1:]))
            hidden[k : k + BATCH] = found
            raise _Reached

        hook = self.blocks[0].register_forward_pre_hook(keep, with_kwargs=True)
        for k in range(0, len(self.ids), BATCH):
            try:
                with torch.inference_mode():
                    self.model(input_ids=self.ids[k : k + BATCH], use_cache=False)
            except _Reached:
                pass
        hook.remove()
        return hidden


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


def _moved(value: Any, device: str) -> Any:
    """Tensors, also in tuples, on the device and floats in float32; the rest as it is."""
    if isinstance(value, tuple):
        return tuple(_moved(v, device) for v in value)
    if isinstance(value, Tensor):
        return value.to(device, torch.float32) if value.is_floating_point() else value.to(device)
    return value
