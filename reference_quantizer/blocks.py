"""A model, one block of layers after another: what reaches its linear layers when it reads the calibration tokens.

Only the hidden states at the entrance of the current block are kept, and only that block is on the device in float32. The
layers in front of the first block and behind the last one are run by the model itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tqformat.load_quantized import TQFormatError

BATCH = 4  # sequences that go through a block together


def has_bfloat16(device: str) -> bool:
    """Whether `device` has instructions for products of bfloat16 matrices, about twice as fast as float32."""
    if device == "cpu":
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return device.startswith("cuda")


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


class Blocks:
    """Walks through the blocks of `model` with the tokens `ids` [sequences, length]; see the module's docstring."""

    def __init__(self, model: nn.Module, ids: Tensor, device: str = "cpu", bfloat16: bool | None = None) -> None:
        self.model, self.ids, self.device = model.eval(), ids, device
        self.bfloat16 = has_bfloat16(device) if bfloat16 is None else bfloat16  # products alone; sums are float32
        self.name, self.blocks = find_blocks(model)
        self.position = 0
        self._options = self._block_options()  # of each block: what it is called with beside the hidden states
        self.hidden = self._entrance()  # [sequences, length, width] float32, on the CPU
        self._check()

    def __iter__(self) -> Iterator[nn.Module]:
        """The blocks that are left, each in float32 on the device; changed weights take effect in what follows."""
        while self.position < len(self.blocks):
            block = self.blocks[self.position]
            dtype = next(block.parameters()).dtype
            block.to(self.device, torch.float32)
            yield block
            for k in range(0, len(self.hidden), BATCH):  # in place: one copy of the hidden states is enough
                self.hidden[k : k + BATCH] = self._forward(block, self.hidden[k : k + BATCH]).float().cpu()
            block.to("cpu", dtype)
            self.position += 1

    def groups(self, block: nn.Module) -> list[Group]:
        """The linear layers of `block` that are called, those with the same input together."""
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
        for hook in hooks:
            hook.remove()
        return [Group(layers) for _, layers in inputs]

    def hessian(self, block: nn.Module, group: Group) -> Tensor:
        """The sum of x xᵗ over the inputs of `group`, float32 [cols, cols] on the device; its mean diagonal is 1."""
        layer, found = group.first, []

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.append(args[0].reshape(-1, layer.in_features).float())
            raise _Reached

        hook = layer.register_forward_pre_hook(keep)
        total = torch.zeros(layer.in_features, layer.in_features, device=self.device)
        for k in range(0, len(self.hidden), BATCH):
            try:
                self._forward(block, self.hidden[k : k + BATCH])
            except _Reached:
                x = found.pop()
                total.addmm_(x.T, x)
        hook.remove()
        mean = total.diagonal().mean()
        return total / mean if mean > 0 else total

    def save(self, path: Path) -> None:
        """Keep the place and the hidden states in `path`, which appears complete or not at all."""
        new = path.with_name(f"{path.name}.new")
        with open(new, "wb") as file:
            np.savez(file, position=self.position, hidden=self.hidden.numpy())
        new.replace(path)

    def restore(self, path: Path) -> None:
        """Inverse of save. The weights of the blocks before the place are of no more account."""
        with np.load(path, allow_pickle=False) as kept:
            self.position, self.hidden = int(kept["position"]), torch.from_numpy(kept["hidden"])

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
        last: list[Any] = []
        hook = self.blocks[-1].register_forward_hook(lambda _, args, out: last.append(out))
        with torch.inference_mode():
            self.model(input_ids=self.ids[:2], use_cache=False)
        hook.remove()
        wanted = (last[0][0] if isinstance(last[0], tuple) else last[0]).float()
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
        with torch.inference_mode():
            self.model(input_ids=self.ids[:1], use_cache=False)
        for hook in hooks:
            hook.remove()
        return options

    def _entrance(self) -> Tensor:
        found: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append((args[0] if args else kwargs["hidden_states"]).float())
            raise _Reached

        hook = self.blocks[0].register_forward_pre_hook(keep, with_kwargs=True)
        for k in range(0, len(self.ids), BATCH):
            try:
                with torch.inference_mode():
                    self.model(input_ids=self.ids[k : k + BATCH], use_cache=False)
            except _Reached:
                pass
        hook.remove()
        return torch.cat(found).clone()


def _moved(value: Any, device: str) -> Any:
    """Tensors, also in tuples, on the device and floats in float32; the rest as it is."""
    if isinstance(value, tuple):
        return tuple(_moved(v, device) for v in value)
    if isinstance(value, Tensor):
        return value.to(device, torch.float32) if value.is_floating_point() else value.to(device)
    return value
