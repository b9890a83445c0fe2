"""Models whose weights stay packed: codes and scales are in memory what they are in the file.

    model = tqformat.load("repo_dir", packed=True)

Every quantized weight is a PackedWeight, a parameter with the shape and the dtype of the weight that holds its parts. The
modules of the model stay those of transformers: torch.nn.functional.linear and embedding know such a weight, and every other
operation gets its decoded value. Decoding is the loader's own code, which reads from memory here in place of files. On a CPU
the parts are views of the mapped file, as transformers maps a plain checkpoint: to replace the file is safe while the model
lives, to write into it is not.

A product with few rows of activations follows SPEC.md, section 22, in float32: z = T(column_scale * x), and y = sum over
stages of (scale * level + offset) . z, straight from the codes: on a CPU by one call of tqformat_kernels, where that is
installed, and on a GPU by products_triton. Where gradients are wanted, where T is no Hadamard transform, and on a GPU, torch
computes z, once for all weights that share x and T; the kernels repeat it, which is as fast as finding it again. For more
rows, groups of the weight's rows are decoded, rounded to its dtype, and multiplied in the dtype of x, so that a long prompt
meets the weights that the decoded model has [TQ-FUSE-2].
"""

import copy
import functools
import math
import os
import shutil
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import load_quantized as lq
from .load_quantized import MANIFEST, Repo, Stage, TQFormatError, Transform, Weight, require

FEW = 8  # rows of an activation up to which a product is computed in float32 from the codes
FEW_ON_CPU = 64  # the same with tqformat_kernels: up to twice as many are faster than decoding, in float32 and bfloat16
KEPT = (
    1 << 16
)  # elements up to which a weight that no product takes packed, as a convolution's, stays decoded once it was
GROUP = 1 << 19  # elements of a weight that are decoded at once
ADVICE = "products of packed weights take torch's path, which is slow for single tokens; pip install tqformat-kernels"
KERNELS_ABI = 4
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
aten = torch.ops.aten


@functools.cache
def kernels() -> Any:
    """The module tqformat_kernels; None, with one warning, where it is not installed, or in another version."""
    try:
        import tqformat_kernels  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        warnings.warn(ADVICE, stacklevel=2)
        return None
    if tqformat_kernels.ABI != KERNELS_ABI:
        warnings.warn(f"{ADVICE} again: ABI {KERNELS_ABI} is wanted, not {tqformat_kernels.ABI}", stacklevel=2)
        return None
    return tqformat_kernels


@functools.cache
def triton_products() -> Any:
    """The module products_triton; None, with one warning, where there is no Triton."""
    try:
        from . import products_triton
    except ImportError:
        warnings.warn(
            "products of packed weights take torch's path, which is slow on a GPU without Triton", stacklevel=2
        )
        return None
    return products_triton


def stage_maker(device: torch.device) -> Callable[..., Any] | None:
    """What makes a stage with a fast product of its parts on `device`; None where nothing does."""
    if device.type == "cpu":
        return kernels() and kernels().Stage  # type: ignore[no-any-return]
    if device.type == "cuda":
        return triton_products() and triton_products().stage  # type: ignore[no-any-return]
    return None


# Parts of weights in memory -------------------------------------------------------------------------------------------


class Parts(Repo):
    """The parts of one weight, in memory: the loader decodes from them as it does from an open repository.

    `tensors` maps storage names to stored tensors: the weight's own, on its device, and the transforms and codebooks, on
    the CPU. What is computed of the latter stands in `tables`, which all weights of a model share.
    """

    tensors: dict[str, Tensor]
    tables: dict[Any, Any]
    stages: list[Any] | None  # those of tqformat_kernels or products_triton, made at the first product
    whole: Any  # the weight of tqformat_kernels; None before the first product, False where it has none
    selected: dict[Any, "PackedWeight"]  # of merged weights, those that were asked for
    decoded: dict[torch.dtype, Tensor]  # of a small weight, its values

    def __init__(self, repo: Repo) -> None:
        """What the weights of `repo` share; having() gives those of one weight."""
        ExitStack.__init__(self)
        self.path, self.manifest, self.spans = repo.path, repo.manifest, repo.spans
        self.tensors, self.tables, self.stages, self.whole, self.selected = {}, {}, None, None, {}
        self.decoded, self._lock = {}, threading.Lock()
        t, c = self.manifest.transforms.values(), self.manifest.codebooks.values()
        shared = [key for x in t for key in (x.matrix, x.pairs, x.angles, x.index)] + [book.tensor for book in c]
        self.tensors = {key: repo._read(key) for key in shared if key is not None}
        self.workers: ThreadPoolExecutor = self._workers  # made now, so that all copies have the same

    def having(self, tensors: dict[str, Tensor]) -> "Parts":
        parts = copy.copy(self)
        parts.tensors, parts.stages, parts.whole = self.tensors | tensors, None, None
        parts.selected, parts.decoded = {}, {}
        return parts

    def _read(self, key: str, a: int = 0, b: int | None = None, flat: bool = False) -> Tensor:
        return self.tensors[key][a:b]

    def own(self, w: Weight) -> dict[str, bool]:
        """The storage names of a weight's own parts, and whether the part is cut where rows are."""
        names = {w.column_scale: False} if w.column_scale is not None else {}
        for s in w.stages or ():
            book = self.manifest.codebooks[s.codebook]
            names |= {
                key: True
                for key in (s.codes, s.scales, s.offsets, book.tensor if book.rows is not None else None)
                if key
            }
            names |= {key: self.spans[key].shape[0] > 1 for key in (s.outer_scales, s.outer_offsets) if key is not None}
        return names

    def bound(self, w: Weight, rows: int) -> float:
        """What no decoded value exceeds, nor what it is computed from; infinity where codes must be read to know.

        TQFormatError DATA.NON_FINITE where scales, offsets or levels are not finite.
        """
        total = 0.0
        for i, s in enumerate(w.stages or ()):
            book, t, where = self.manifest.codebooks[s.codebook], self.manifest.transforms[s.transform], f"stages[{i}]."
            scales, offsets = (
                float(self._scales(s, kind, 0, rows, self.tensors[s.scales].device, where).abs().amax())
                if getattr(s, kind)
                else 0.0
                for kind in ("scales", "offsets")
            )
            if book.rows is not None or book.entries != 1 << s.layout(w.shape[-1])[0] or t.matrix is not None:
                return math.inf
            if (key := ("largest level", s.codebook)) not in self.tables:
                self.tables[key] = float(self._levels(book).abs().amax())
            total += (scales * self.tables[key] + offsets) * t.size  # sums of T^-1 included
        if w.column_scale is not None:
            total *= float(self._floats(w.column_scale, "column_scale").abs().amax())
        return total

    def kernel_stages(self, w: Weight, make: Callable[..., Any]) -> list[Any]:
        """The stages of a weight as `make` makes them; None for one that it has no kernel for."""
        if self.stages is None:
            rows, cols = math.prod(w.shape[:-1]), w.shape[-1]
            self.stages = [self._kernel_stage(s, rows, cols, make) for s in w.stages or ()]
        return self.stages

    def _kernel_stage(self, s: Stage, rows: int, cols: int, make: Callable[..., Any]) -> Any:
        book, factors = self.manifest.codebooks[s.codebook], (s.scales, s.offsets)
        if not hasattr(torch, "float8_e8m0fnu") and any(k and self.spans[k].dtype == "F8_E8M0" for k in factors):
            return None  # torch before 2.7
        levels = self._levels(book) if book.rows is None else self.tensors[book.tensor or ""]
        if book.rows is None and hasattr(make, "Levels"):  # which stages of tqformat_kernels share
            key = ("kernel levels", s.codebook, s.bits, s.window)
            levels = self.once(key, lambda: make.Levels(levels, s.bits, s.window))
        options = {k: self._float8(v) for k in ("outer_scales", "offsets", "outer_offsets") if (v := getattr(s, k))}
        shape = {
            "shape": (rows, cols),
            "bits": s.bits,
            "window": s.window,
            "vector_length": s.vector_length,
            "tile": s.tile,
        }
        return make(self.tensors[s.codes], levels, self._float8(s.scales), **shape, **options)

    def kernel_weight(self, w: Weight) -> Any:
        """The weight that computes a linear layer in one call of tqformat_kernels; False where there is none."""
        if self.whole is None:
            self.whole = self._kernel_weight(w)
        return self.whole

    def _kernel_weight(self, w: Weight) -> Any:
        if not w.stages or not all(self.tensors[s.codes].is_cpu for s in w.stages) or kernels() is None:
            return False
        kinds = [self.manifest.transforms[s.transform] for s in w.stages]
        stages = self.kernel_stages(w, kernels().Stage)
        if None in stages or any((t.matrix, t.pairs, t.index) != (None, None, None) for t in kinds):
            return False

        def transform(t: Transform) -> Any:
            if t.signs is None or t.factors is None:
                return None
            return kernels().Transform(signs_of(t.signs, t.size), [h.float() for h in lq.hadamard_matrices(t.factors)])

        transforms = [
            self.once(("kernel transform", s.transform), functools.partial(transform, t))
            for s, t in zip(w.stages, kinds, strict=True)
        ]
        scale = None if w.column_scale is None else self.tensors[w.column_scale]
        return kernels().Weight(stages, transforms, scale)

    def _float8(self, key: str) -> Tensor:
        exponents = self.spans[key].dtype == "F8_E8M0"  # which the loader reads as bytes
        return self.tensors[key].view(torch.float8_e8m0fnu) if exponents else self.tensors[key]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.tables:
            self.tables[key] = make()
        return self.tables[key]

    def _kept(self, make: Callable[[], Any], great: bool, *key: Any) -> Any:
        return self.once(key, make)

    def forward(self, s: Stage, device: torch.device) -> Callable[[Tensor], Tensor]:
        """T of a stage, on blocks float32 [m, B]."""
        t = self.manifest.transforms[s.transform]
        return self.once(("forward", s.transform, device), lambda: forward_transform(t, self._read, device))  # type: ignore[no-any-return]


def signs_of(signs: str, size: int) -> Tensor:
    """float32 [size] [TQ-TRAN-5]."""
    bits = torch.tensor(list(bytes.fromhex(signs)))[:, None] >> torch.arange(8) & 1
    return (1 - 2 * bits.flatten()[:size]).float()  # whatever torch's default dtype is: vLLM changes it


def forward_transform(t: Transform, read: Callable[[str], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    """T, a differentiable function of blocks float32 [m, B]; the inverse of what Repo._inverse gives [TQ-TRAN-2 to 9]."""
    if t.factors is not None and t.signs is not None:
        signs = (signs_of(t.signs, t.size) / math.sqrt(t.size)).to(device)
        matrices = [h.t().float().contiguous().to(device) for h in lq.hadamard_matrices(t.factors)]

        def hadamard(
            v: Tensor,
        ) -> Tensor:  # plain matrix products alone: batched ones wake threads, however small they are
            y = (v * signs).t()
            for h in matrices:  # each takes the first index of (f1, f2, ..., m) to the end
                y = y.reshape(len(h), -1).t() @ h
            return y.reshape(-1, t.size)

        return hadamard
    if t.matrix is not None:
        q = read(t.matrix).to(device).float().t()
        return lambda v: v @ q
    if t.pairs is not None and t.angles is not None:
        pairs, angles = read(t.pairs).to(device).long(), read(t.angles).to(device)
        rounds = [(p[:, 0], p[:, 1], a.cos(), a.sin()) for p, a in zip(pairs, angles, strict=True)]

        def givens(v: Tensor) -> Tensor:
            for i, j, c, s in rounds:
                a, b = v[:, i], v[:, j]
                v = v.index_copy(1, i, c * a - s * b).index_copy(1, j, s * a + c * b)
            return v

        return givens
    if t.index is not None:
        index = read(t.index).to(device).long()
        return lambda v: v.index_select(1, index)
    return lambda v: v


# The tensor that stands for a weight ----------------------------------------------------------------------------------


class PackedWeight(Tensor):
    """A weight [..., cols] that holds its parts: products and look-ups of rows work on these, everything else decodes.

    `dtype` is that of decoded values and may differ from the repository's [TQ-NUM-7]. It cannot be changed or trained;
    gradients pass through products to the other operand.
    """

    parts: Parts
    entry: Weight  # of the manifest; of a slice or of merged weights, with its shape
    title: str  # its name in the repository, or that of the first of merged weights
    sources: tuple[str, ...]  # those of all of them

    @staticmethod
    def __new__(
        cls,
        parts: Parts,
        entry: Weight,
        title: str,
        dtype: torch.dtype,
        device: torch.device,
        sources: tuple[str, ...] = (),
    ) -> "PackedWeight":
        make = Tensor._make_wrapper_subclass
        self: PackedWeight = make(cls, entry.shape, dtype=dtype, device=device)
        self.parts, self.entry, self.title, self.sources = parts, entry, title, sources or (title,)
        return self

    @property
    def rows(self) -> int:
        return math.prod(self.entry.shape[:-1])

    @property
    def height(self) -> int:
        """The parts can be cut between multiples of so many rows: those of a tile, in all stages."""
        return math.lcm(*(s.layout(self.entry.shape[-1])[2] for s in self.entry.stages or ()))

    @property
    def nbytes_packed(self) -> int:
        """Bytes of the weight's own parts."""
        return sum(self.parts.tensors[key].nbytes for key in self.parts.own(self.entry))

    def like(self, **changes: Any) -> "PackedWeight":
        """The same weight, with other parts, entry, dtype or device."""
        now = {
            "parts": self.parts,
            "entry": self.entry,
            "title": self.title,
            "dtype": self.dtype,
            "device": self.device,
            "sources": self.sources,
        }
        return PackedWeight(**{**now, **changes})

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """The value in the weight's shape, as Repo.dequantize gives it."""
        plan = self.parts.workers.submit(self.parts._plan, self.entry, self.device, dtype or self.dtype)
        value, fill, groups = plan.result()
        list(self.parts.workers.map(fill, groups))
        return value

    def value(self) -> Tensor:
        """A decoded tensor of one's own, for an operation that takes no packed weight."""
        if self.rows * self.entry.shape[-1] > KEPT:
            return self.decode()
        kept = self.parts.decoded
        if self.dtype not in kept:
            kept[self.dtype] = self.decode()
        with torch.inference_mode(False):  # where views of it may be made that others write to
            return kept[self.dtype].clone()

    def check(self) -> None:
        """Raises TQFormatError where the loader would. Rows are decoded only if a look at their factors does not tell."""
        step = self.height * max(1, GROUP // (self.height * self.entry.shape[-1]))
        try:
            decode = self.parts._decoder(self.entry, self.device)
            if (
                not self.rows
                or self.parts.bound(self.entry, self.rows) < min(lq.OVERFLOW[self.entry.dtype], 2.0**127) / 2
            ):
                return
            for _ in self.parts.workers.map(lambda a: decode(a, min(a + step, self.rows)), range(0, self.rows, step)):
                pass
        except TQFormatError as error:
            raise error.inside(f"tensors[{self.title!r}].") from None

    def cut(self, select: Callable[[Tensor], Tensor], shape: Iterable[int]) -> "PackedWeight":
        """The groups of `height` rows that `select` takes, [groups, ...] -> [wanted, ...], as a weight of this shape."""
        groups, tensors = self.rows // self.height, {}
        for key, by_rows in self.parts.own(self.entry).items():
            part = self.parts.tensors[key]
            tensors[key] = select(part.reshape(groups, -1)).reshape(-1, *part.shape[1:]) if by_rows else part
        return self.like(parts=self.parts.having(tensors), entry=replace(self.entry, shape=tuple(shape)))

    def share(self, dim: int, start: int, size: int) -> "PackedWeight | None":
        """`size` rows (`dim` 0) or columns (1) of a matrix from `start`, packed; None where the parts cannot be cut there.

        Rows are cut between tiles, columns where neither a vector, a block of the transform nor a byte of codes is divided.
        The parts are copies, so that those of the weight itself can be forgotten.
        """
        if (start, size) == (0, self.shape[dim]):
            return self
        if dim == 1:
            return self._columns(start, size)
        h = self.height
        if start % h or size % h:
            return None
        return self.cut(lambda part: part[start // h : (start + size) // h].clone(), (size, self.shape[1]))

    def _columns(self, start: int, size: int) -> "PackedWeight | None":
        parts, entry, (rows, cols) = self.parts, self.entry, self.shape
        cuts: list[tuple[str, int, int, tuple[int, ...]]] = []  # part, rows and units a row as it is cut, its shape
        if entry.column_scale is not None:
            cuts.append((entry.column_scale, 1, cols, (-1,)))
        stages = []
        for s in entry.stages or ():
            p, block = parts.manifest.codebooks[s.codebook].dimension, parts.manifest.transforms[s.transform].size
            window, g, tr, tc = s.layout(cols)
            if start % math.lcm(p, block) or size % math.lcm(p, block):
                return None
            tile_bytes = parts.tensors[s.codes].shape[1]
            if tc == cols and window == s.bits and cols // p * s.bits % 8 == 0:  # a row of symbols fills whole bytes
                cuts.append((s.codes, rows, tile_bytes // tr, (rows // tr, -1)))
            else:
                cuts.append((s.codes, rows // tr, cols // tc, (-1, tile_bytes)))
            factors = [key for key in (s.scales, s.offsets, s.outer_scales, s.outer_offsets) if key is not None]
            sizes = [(key, *parts.tensors[key].shape) for key in factors]
            cuts += [(key, n, across, (n, -1)) for key, n, across in sizes if across > 1]  # one serves all columns
            tile = (tr, size if tc == cols else tc)
            stages.append(replace(s, vector_length=None if g == cols else g, tile=tile))
        if any(across * start % cols or across * size % cols for _, _, across, _ in cuts) or not rows:
            return None
        tensors = {key: parts.tensors[key] for key in parts.own(entry)}
        for key, n, across, shape in cuts:
            first, end = across * start // cols, across * (start + size) // cols
            part = tensors[key].reshape(n, across, -1)[:, first:end]
            tensors[key] = part.clone(memory_format=torch.contiguous_format).reshape(shape)
        return self.like(parts=parts.having(tensors), entry=replace(entry, shape=(rows, size), stages=tuple(stages)))

    def moved(self, device: Any, dtype: torch.dtype | None) -> Tensor:
        """On another device, with another dtype of decoded values; an empty tensor on the meta device."""
        device, dtype = torch.device(device or self.device), dtype or self.dtype
        if device.type == "meta":
            return torch.empty(self.shape, dtype=dtype, device=device)
        if not dtype.is_floating_point:
            return self.decode().to(device, dtype)
        parts = self.parts
        if device != self.device:
            parts = parts.having({key: parts.tensors[key].to(device) for key in parts.own(self.entry)})
        return self.like(parts=parts, dtype=dtype, device=device)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        size = f"{self.nbytes_packed} bytes"
        return f"PackedWeight({self.title!r}, {tuple(self.shape)}, {self.dtype}, {self.device}, {size})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedWeight":
        memo[id(self)] = copied = self.like()  # nothing writes to the parts: copies share them
        copied.__dict__.update(self.__dict__)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        advice = "packed weights are not pickled; model.save_pretrained(dir) writes the repository"
        raise TQFormatError("UNSUPPORTED.LIBRARY", f"tensors[{self.title!r}]", advice)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        ours = OURS.get(func)
        if ours is not None:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            first = args[0] if args else kwargs.get("input")
            if isinstance(weight, PackedWeight) and len(weight.entry.shape) == 2 and type(first) is not PackedWeight:
                return ours(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if func == Tensor.data.__set__ and isinstance(args[1], PackedWeight):  # type: ignore[attr-defined]
            args[0].parts, args[0].entry = args[1].parts, args[1].entry  # so Module.to changes a parameter
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self, kwargs = (args[0] if args else None), kwargs or {}
        if func in (aten.cat.default, aten.stack.default):
            merged = merge(*args, **kwargs, new=func is aten.stack.default)
            if merged is not None:
                return merged
        if isinstance(self, PackedWeight):
            if func in (aten.detach.default, aten.alias.default, aten.clone.default):
                return self.like()
            if func is aten._to_copy.default:
                return self.moved(kwargs.get("device"), kwargs.get("dtype"))
            if func is aten.select.int and args[1] == 0 and self.dim() > 2:  # one of fused experts
                n, rest = divmod(self.rows // self.shape[0], self.height)
                i = range(self.shape[0])[args[2]] * n
                key, kept = (i, self.shape, self.dtype), self.parts.selected
                if not rest:
                    if key not in kept:  # its parts have what kernels prepare for them
                        kept[key] = self.cut(lambda part: part[i : i + n], self.shape[1:])
                    return kept[key].like()
            if func._schema.is_mutable:
                advice = "packed weights cannot be changed: load the model without packed=True, or put LoRA on top"
                raise TQFormatError("UNSUPPORTED.LIBRARY", f"tensors[{self.title!r}]", advice)

        def plain(value: Any) -> Any:
            return value.value() if isinstance(value, PackedWeight) else value

        args, kwargs = torch.utils._pytree.tree_map(plain, (args, kwargs))
        return func(*args, **kwargs)


def merge(weights: list[Tensor], dim: int = 0, *, new: bool) -> PackedWeight | None:
    """torch.cat of packed weights, or with `new` torch.stack, along `dim`, packed; None where they are not coded alike.

    transformers merges the experts of a layer so. `dim` is one of those before the last, and what a weight brings to each
    index of those before `dim` must be whole tiles.
    """
    packed = [w for w in weights if isinstance(w, PackedWeight)]
    if len(packed) < len(weights) or not 0 <= dim < packed[0].dim() - (not new):
        return None
    first, outer, tensors = packed[0], math.prod(packed[0].shape[:dim]), {}

    def fits(w: PackedWeight) -> bool:
        beside, wanted = ((x.shape if new else (*x.shape[:dim], *x.shape[dim + 1 :])) for x in (w, first))
        return beside == wanted and _coding(w) == _coding(first) and w.rows > 0 and w.rows % (outer * w.height) == 0

    if not all(map(fits, packed)):
        return None
    for keys in zip(*(w.parts.own(w.entry).items() for w in packed), strict=True):
        parts = [w.parts.tensors[key] for w, (key, _) in zip(packed, keys, strict=True)]
        (key, by_rows), dtype, shape = keys[0], parts[0].dtype, parts[0].shape[1:]
        if by_rows:
            plain = [part.view(torch.uint8) if part.itemsize == 1 else part for part in parts]  # torch joins no float8
            tensors[key] = torch.cat([part.reshape(outer, -1) for part in plain], 1).reshape(-1, *shape).view(dtype)
        elif not all(torch.equal(part, parts[0]) for part in parts):
            return None
    size = len(packed) if new else sum(w.shape[dim] for w in packed)
    entry = replace(first.entry, shape=(*first.shape[:dim], size, *first.shape[dim + (not new) :]))
    sources = tuple(dict.fromkeys(name for w in packed for name in w.sources))
    return first.like(parts=first.parts.having(tensors), entry=entry, sources=sources)


def _coding(w: PackedWeight) -> Any:
    """What must be the same of weights that are merged: everything but shapes and the names of parts."""
    stages, cols = w.entry.stages or (), w.entry.shape[-1]
    if any(w.parts.manifest.codebooks[s.codebook].rows is not None for s in stages):
        return object()
    settings = [(s.bits, s.codebook, s.transform, s.layout(cols)) for s in stages]
    spans = [(by_rows, w.parts.spans[key]) for key, by_rows in w.parts.own(w.entry).items()]
    parts = [(by_rows, span.dtype, span.shape[1:]) for by_rows, span in spans]
    return id(w.parts.tables), settings, parts, w.dtype, w.device, w.entry.dtype


# Products and look-ups ------------------------------------------------------------------------------------------------

_local = threading.local()  # in each thread, the last rotated activations


def linear(input: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear: input [..., cols] -> [..., rows], in the dtype of the input."""
    entry, graph = weight.entry, torch.is_grad_enabled()  # a tensor's attributes cost a call of __torch_function__
    cols = entry.shape[-1]
    if graph and weight.requires_grad:
        advice = "packed weights are not trained: model.requires_grad_(False), then LoRA; or load without packed=True"
        raise TQFormatError("UNSUPPORTED.LIBRARY", f"tensors[{weight.title!r}]", advice)
    if input.shape[-1] != cols:
        require(False, "BIND.MODEL", weight.title, f"inputs of {cols}", input.shape)
    many, plain = input.numel() // cols, not (graph and input.requires_grad) and input.dtype in FLOATS
    if many <= FEW_ON_CPU and plain and input.is_cpu and (whole := weight.parts.kernel_weight(entry)):
        x = input.contiguous()
        if bias is not None:
            return (whole.linear(x.float()) + bias).to(input.dtype)  # type: ignore[no-any-return]
        return whole.linear(x)  # type: ignore[no-any-return]
    total = None
    for i in range(len(entry.stages or ())) if many <= FEW else [None]:
        z = input.reshape(-1, cols) if i is None else rotated(input, weight, i)
        multiply: Any = _Product.apply if z.requires_grad else product
        y = multiply(z, weight, i)
        total = y if total is None else total + y
    assert total is not None
    total = total if bias is None else total + bias
    return Tensor.to(total, input.dtype).reshape(*input.shape[:-1], weight.rows)


def rotated(x: Tensor, weight: PackedWeight, i: int) -> Tensor:
    """z = T(column_scale * x) of stage i, float32 [m, cols], computed once for the weights that share x and T."""
    parts, s, cols = weight.parts, (weight.entry.stages or ())[i], weight.entry.shape[-1]
    column_scale, recent = weight.entry.column_scale, _local.__dict__.setdefault("recent", {})
    keep = not x.is_inference() and not (x.requires_grad and torch.is_grad_enabled())  # no version, a graph of its own
    key = (id(parts.tables), s.transform, column_scale)  # the tables are kept beside z, so that their id stays theirs
    if keep and (found := recent.get(id(x))) and found[0]() is x and found[1] == x._version and key in found[2]:
        return found[2][key][1]  # type: ignore[no-any-return]
    v = x.reshape(-1, cols).float()
    v = v if column_scale is None else v * parts.tensors[column_scale].float()
    size = parts.manifest.transforms[s.transform].size
    z = parts.forward(s, weight.device)(v.reshape(-1, size)).reshape(-1, cols)
    if keep and z.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():  # a view would keep x for ever
        if not found or found[0]() is not x or found[1] != x._version:
            place = id(x)
            recent[place] = (weakref.ref(x, lambda _: recent.pop(place, None)), x._version, {})
        recent[id(x)][2][key] = parts.tables, z
    return z


def product(z: Tensor, weight: PackedWeight, i: int | None) -> Tensor:
    """(scale * level + offset) . z of stage i, or the decoded weight times z: z [m, cols] -> [m, rows], in the dtype of z."""
    z = z.detach()
    if i is not None and (make := stage_maker(z.device)):
        stage = weight.parts.kernel_stages(weight.entry, make)[i]
        if stage is not None:
            return stage.product(z.contiguous())  # type: ignore[no-any-return]
    return torch.cat(list(by_groups(weight, i, z.dtype, lambda u: z @ u.t())), dim=1)


class _Product(torch.autograd.Function):
    """product, with the gradient to z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: PackedWeight, i: int | None) -> Tensor:
        ctx.weight, ctx.stage, ctx.dtype = weight, i, z.dtype
        return product(z, weight, i)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        parts = iter(torch.split(dy.to(ctx.dtype), group_rows(ctx.weight), dim=1))
        found = by_groups(ctx.weight, ctx.stage, ctx.dtype, lambda u, d: (d @ u).float(), parts)
        return functools.reduce(Tensor.add_, found).to(ctx.dtype), None, None


def group_rows(weight: PackedWeight) -> int:
    """How many rows are decoded at once: GROUP elements, fewer where each thread should have some, whole tiles."""
    height, cols = weight.height, weight.entry.shape[-1]
    each = min(GROUP, weight.rows * cols // weight.parts.workers._max_workers)
    return max(1, each // (height * cols)) * height


def by_groups(
    weight: PackedWeight, i: int | None, dtype: torch.dtype, use: Callable[..., Tensor], *more: Iterator[Tensor]
) -> Iterator[Tensor]:
    """use(u, ...) for each group of rows; u [group, cols] in `dtype` is scale * level + offset of stage i, or the value."""
    parts, cols, step = weight.parts, weight.entry.shape[-1], group_rows(weight)
    if i is None:
        decode, own = parts._decoder(weight.entry, weight.device), lq.torch_dtype(weight.entry.dtype)
    else:
        stage = (weight.entry.stages or ())[i]
        decode, own = parts._stage_decoder(stage, cols, weight.device, f"stages[{i}].", rotated=True), torch.float32

    def group(a: int, *given: Tensor) -> Tensor:
        with torch.no_grad():
            return use(decode(a, min(a + step, weight.rows)).to(own).to(dtype), *given)

    starts = range(0, max(weight.rows, 1), step)
    many: Any = parts.workers.map if weight.device.type == "cpu" and len(starts) > 1 else map
    return many(group, starts, *more)  # type: ignore[no-any-return]


def embedding(
    input: Tensor,
    weight: PackedWeight,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """torch.nn.functional.embedding: the rows that `input` [...] names, [..., cols]; only their tiles are decoded."""
    require(
        max_norm is None, "UNSUPPORTED.LIBRARY", weight.title, "no max_norm: packed weights cannot be changed", max_norm
    )
    with torch.no_grad():
        ids, place = input.flatten(), None
        if len(ids) > 1:
            ids, place = torch.unique(ids, return_inverse=True)
        some = chosen_rows(ids, weight)
        return (some if place is None else some[place]).reshape(*input.shape, weight.entry.shape[-1])


def chosen_rows(ids: Tensor, weight: PackedWeight) -> Tensor:
    """Rows of a weight, int [n] -> [n, cols]; IndexError for one that it does not have."""
    parts, entry, stages = weight.parts, weight.entry, weight.entry.stages or ()
    made = parts.kernel_stages(entry, kernels().Stage) if weight.device.type == "cpu" and kernels() else [None]
    if None in made:
        height = weight.height
        tiles, place = torch.unique(ids // height, return_inverse=True)
        shape = len(tiles) * height, entry.shape[-1]
        return weight.cut(lambda part: part.index_select(0, tiles), shape).decode()[place * height + ids % height]
    total: Any = 0
    for s, stage in zip(stages, made, strict=True):
        t = parts.manifest.transforms[s.transform]
        inverse = parts.once((s.transform, weight.device), functools.partial(parts._inverse, t, weight.device))
        total = total + inverse(stage.rows(ids).reshape(-1, t.size)).reshape(len(ids), -1)
    if entry.column_scale is not None:
        total = total * parts.tensors[entry.column_scale].float()
    return total.to(lq.torch_dtype(entry.dtype)).to(weight.dtype)  # type: ignore[no-any-return]


OURS: dict[Any, Callable[..., Tensor]] = {functional.linear: linear, functional.embedding: embedding}

# Models ---------------------------------------------------------------------------------------------------------------


class PackedRepo(Repo):
    """An open repository whose quantized weights come as PackedWeights, so that build_model makes a packed model."""

    def __init__(self, path: "lq.PathLike", verify: bool = True) -> None:
        super().__init__(path, verify, beside=True)
        self._mapped: dict[Any, Tensor] = {}  # the bytes of each file
        self.shared, self.packed = Parts(self), set[str]()  # names that came packed

    def _read(self, key: str, a: int = 0, b: int | None = None, flat: bool = False) -> Tensor:
        """As Repo's, but a view of the mapped file: nothing is copied, and what no product needs is not even read."""
        span = self.spans[key]
        if span.begin == span.end:
            return super()._read(key, a, b, flat)
        if span.file not in self._mapped:
            size = os.fstat(span.file.fileno()).st_size
            self._mapped[span.file] = torch.from_file(span.file.name, False, size, dtype=torch.uint8, device="cpu")
        dtype = torch.uint8 if span.dtype == "F8_E8M0" else lq.torch_dtype(span.dtype)
        data = self._mapped[span.file][span.begin : span.end].view(dtype)  # aligned, says [TQ-PAY-8]
        data = data if flat else data.view(span.shape)
        return data[a:b] if data.dim() else data

    def dequantize(self, name: str, device: Any = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        source = self.manifest.tied_weights.get(name, name)
        w, shared, place = self.manifest.tensors.get(source), self.shared, lq.find_device(device)
        if w is not None and w.data is not None:
            return self._read(w.data).view(lq.torch_dtype(w.dtype)).to(place, dtype)
        if w is None:
            return super().dequantize(name, device, dtype)
        tensors = {
            key: (shared.tensors[key] if key in shared.tensors else self._read(key)).to(place) for key in shared.own(w)
        }
        weight = PackedWeight(shared.having(tensors), w, source, dtype or lq.torch_dtype(w.dtype), place)
        weight.check()
        self.packed.add(source)
        return weight


def packed_weights(model: torch.nn.Module) -> dict[str, PackedWeight]:
    """The packed parameters of a model by their first names."""
    return {name: p for name, p in model.named_parameters() if isinstance(p, PackedWeight)}


def resident_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, packed weights by their parts, and of what these share (tables of levels)."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    packed = [t for t in tensors if isinstance(t, PackedWeight)]
    seen: dict[int, int] = {
        t.untyped_storage().data_ptr(): t.nbytes for t in tensors if not isinstance(t, PackedWeight)
    }
    for parts in [weight.parts for weight in packed]:
        seen |= {t.data_ptr(): t.nbytes for t in (*parts.tensors.values(), *parts.decoded.values())}
        tables = torch.utils._pytree.tree_leaves(list(parts.tables.values()))
        seen |= {t.data_ptr(): t.nbytes for t in tables if isinstance(t, Tensor)}
        seen |= {id(t): t.nbytes for t in tables if hasattr(t, "nbytes") and not isinstance(t, Tensor)}
        seen |= {id(stage.levels): stage.levels.nbytes for stage in parts.stages or () if stage is not None}
    return sum(seen.values())


def load(
    path: "lq.PathLike",
    device: Any = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
    **options: Any,
) -> Any:
    """The ready model as load_quantized.load gives it, its quantized weights packed; the arguments are the same."""
    experts = options.get("experts_implementation")
    with PackedRepo(path, verify) as repo, lq._building:
        model = lq.build_model(repo, device, dtype, {**options, "trust_remote_code": trust_remote_code})
        finish(model, repo, experts)
    return model


def finish(model: Any, repo: PackedRepo, experts: Any = None) -> None:
    """Says which weights could not stay packed, and makes save_pretrained write the repository.

    `experts` is what the user asked for as experts_implementation. Without a wish packed experts run one at a time (eager):
    the other ways are right, too, but decode all experts of a layer each time.
    """
    packed = packed_weights(model)
    for weight in packed.values():
        weight.requires_grad_(False)
    fused = any(weight.dim() > 2 for weight in packed.values())
    if fused and experts is None and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    left = sorted(repo.packed - {name for weight in packed.values() for name in weight.sources})
    if left:
        names = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        warnings.warn(f"decoded or left out, as the model has no such weight by itself: {names}", stacklevel=3)
    model.save_pretrained = types.MethodType(functools.partial(save_pretrained, source=repo.path), model)


def save_pretrained(model: Any, save_directory: "lq.PathLike", *, source: Path, **options: Any) -> None:
    """model.save_pretrained of a packed model: the repository that it came from, bit for bit, from `source`.

    With an adapter on the model, the adapter alone, as transformers writes it.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        return type(model).save_pretrained(model, save_directory, **options)  # type: ignore[no-any-return]
    allowed = {"is_main_process", "safe_serialization", "max_shard_size"}  # which change nothing here
    unknown = ", ".join(sorted(options.keys() - allowed))
    require(not unknown, "SCHEMA.UNKNOWN_FIELD", unknown, "no options: the repository is copied as it is")
    if not options.get("is_main_process", True):
        return
    target = Path(save_directory)
    target.mkdir(parents=True, exist_ok=True)
    with Repo(source) as repo:
        files = [(name, file.role) for name, file in repo.manifest.files.items() if (source / name).exists()]
        paths = [source / name if role == "payload" else repo.check_file(name) for name, role in files]
        for path in [*paths, source / "README.md", source / MANIFEST]:
            if path.exists() and path.resolve() != (target / path.name).resolve():
                shutil.copyfile(path, target / path.name)
