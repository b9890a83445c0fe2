"""Which format a checkpoint has, by its file type or the quant_method of its config.json, and how its weights are found."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reference_quantizer.checkpoint import gguf_source, support
from reference_quantizer.checkpoint.source import Info, Reader, Source, open_source, read_json, weights_sha256
from reference_quantizer.foreign.parts import Checkpoint, Weight
from tqformat.load_quantized import FLOATS, TQFormatError, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

Read = Callable[[str, "dict[str, Tensor]", dict[str, Any]], Weight]

# what `import --help` says: the dtype of the weights, and what is known of the format
FORMATS = {
    "gptq": ("scales", "1 to 8 bits, symmetric or not, activation order; gptq and gptq_v2"),
    "awq": ("scales", "4 bits, version gemm"),
    "compressed-tensors": ("scales", "packed and plain integers, FP8, MXFP4, NVFP4"),
    "bitsandbytes": ("state's", "NF4 and FP4, nested or not"),
    "hqq": ("F32", "1, 2, 3, 4, 8 bits, axis 1"),
    "mxfp4": ("BF16", "experts of gpt-oss, transposed as transformers has them: about 6 bits"),
    "paroquant": ("F32", "pairwise rotations and channel scales; not fused experts"),
    "tq3_native (turboquant-plus-vllm)": ("F32", "2, 3, 4 bits, matrices; also layers with a learned rotation"),
    "leanquant": ("grid's", "levels of each row; with the config.json of the base model beside it"),
}


@dataclass(frozen=True)
class Layout:
    """The tensors of a quantized weight, by the endings of their names: what tells one, what else belongs to it."""

    markers: tuple[str, ...]
    parts: tuple[str, ...]
    read: Read
    weight: str = ".weight"  # the ending of the weight's own name
    dropped: tuple[str, ...] = ()  # what a plain model has no use for


def layout_of(method: str) -> Layout:
    """The layout of a quant_method; UNSUPPORTED.LIBRARY for one that is not known."""
    from reference_quantizer.foreign import bitsandbytes, compressed_tensors, gptq, hqq, mxfp4, rotated

    integer = (".qweight", ".qzeros", ".scales", ".g_idx")
    compressed = tuple(
        f".weight_{part}" for part in ("packed", "scale", "zero_point", "g_idx", "shape", "global_scale")
    )
    activations = (".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".k_scale", ".v_scale")
    turboquant = (".weight.tq_packed", ".weight.tq_norms", ".packed_weight", ".norms", ".tq_centroids", ".rotation")
    nested = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    known = {
        "gptq": Layout((".qweight",), integer, gptq.read_gptq),
        "awq": Layout((".qweight",), integer, gptq.read_awq),
        "compressed-tensors": Layout(
            (".weight_scale",), (".weight", *compressed), compressed_tensors.read_compressed, dropped=activations
        ),
        "bitsandbytes": Layout(
            bitsandbytes.STATES,
            (".weight", *bitsandbytes.STATES, *(f".weight.{part}" for part in nested)),
            bitsandbytes.read_bitsandbytes,
        ),
        "hqq": Layout((".W_q",), hqq.PARTS, hqq.read_hqq),
        "paroquant": Layout(
            (".qweight",),
            (".qweight", ".qzeros", ".scales", ".theta", ".pairs", ".channel_scales"),
            rotated.read_paroquant,
        ),
        "tq3_native": Layout((".weight.tq_packed", ".packed_weight"), turboquant, rotated.read_turboquant),
        "leanquant": Layout((".weight_codes",), (".weight_codes", ".quant_grid"), rotated.read_leanquant),
        "mxfp4": Layout(("_blocks",), ("_blocks", "_scales"), mxfp4.read_mxfp4, weight=""),
    }
    if method not in known:
        advice = f"expected one of gguf, {', '.join(known)}; start from the original model: quantize"
        raise TQFormatError(
            "UNSUPPORTED.LIBRARY", "config.json: quantization_config", f"quant_method {method!r}: {advice}"
        )
    return known[method]


@contextlib.contextmanager
def opened(src: str, out: Path, revision: str | None = None) -> Iterator[Checkpoint]:
    """The low-bit checkpoint `src`, for a repository `out`: a GGUF file, a directory or a Hub id."""
    if gguf_source.is_gguf(src):
        from reference_quantizer.foreign import gguf_file

        if revision:
            raise TQFormatError("SCHEMA.VALUE", "--revision", "a GGUF file has no revisions; leave the option out")
        with gguf_file.opened(src, out) as found:
            yield found
        return
    source = open_source(src, revision)
    settings = quantization_config(source)
    method = str(settings.get("quant_method"))
    layout = layout_of(method)
    plain = {key: value for key, value in (source.config or {}).items() if key not in CONFIG_KEYS}
    copied, notes = support.files_to_copy(source)
    files: dict[str, tuple[str, Path | bytes]] = {path.name: (role, path) for path, role in copied.items()}
    for name in ("config.json", "quantization_config.json", *CONFIG_FILES):
        files.pop(name, None)
    groups, kept, dropped = find_parts(source, layout)
    size = sum(info.nbytes for name, info in source.tensors.items() if name not in dropped)
    facts: dict[str, Any] = {
        "format": method,
        "directory": source.path.resolve().name,
        "id": source.id,
        "revision": source.revision,
    }
    facts |= {"weights_sha256": weights_sha256(source), "quantization_config": settings}
    facts |= {"quantized": True, "tensor_types": {method: len(groups), "unchanged": len(kept)}}
    facts |= {"left_out": dropped} if dropped else {}
    lines = [*source.notes, *notes]
    if dropped:
        lines.append(f"left out, since they are about activations: {len(dropped)} tensors, such as {dropped[0]}")
    yield Checkpoint(
        method,
        source.id or source.path.resolve().name,
        support.find_license(source.path),
        len(groups) + len(kept),
        read_weights(source, layout, settings, groups, kept),
        plain,
        files,
        size,
        {key: value for key, value in facts.items() if value is not None},
        tuple(lines),
    )


CONFIG_KEYS = ("quantization_config", "compression_config")
CONFIG_FILES = {"quantize_config.json": "gptq", "tq_config.json": "tq3_native"}  # of programs that write no key


def quantization_config(source: Source) -> dict[str, Any]:
    """What config.json, or a file beside it, says of the quantization; SCHEMA.VALUE where nothing does."""
    for key in CONFIG_KEYS:
        if isinstance(found := (source.config or {}).get(key), dict):
            return found
    for name, method in CONFIG_FILES.items():
        if (source.path / name).is_file():
            return {"quant_method": method} | read_json(source.path / name)
    if any(name.endswith(".weight_codes") for name in source.tensors):
        return {"quant_method": "leanquant"}
    message = (
        "it names no quantization_config: this is no low-bit checkpoint that is known here; `quantize` makes one of it"
    )
    raise TQFormatError("SCHEMA.VALUE", f"{source.path.name}: config.json", message)


def find_parts(source: Source, layout: Layout) -> tuple[dict[str, dict[str, Info]], list[Info], list[str]]:
    """The parts of each quantized weight by their endings, the tensors that are kept, and the names of those left out."""
    groups: dict[str, dict[str, Info]] = {}
    for name in source.tensors:
        if stem := next((name.removesuffix(m) for m in layout.markers if name.endswith(m)), None):
            groups.setdefault(stem, {})
    used = set()
    for stem, parts in groups.items():
        for ending in layout.parts:
            if found := source.tensors.get(stem + ending):
                parts[ending] = found
                used.add(found.name)
    dropped = [n for n in source.tensors if n not in used and n.endswith(layout.dropped)] if layout.dropped else []
    kept = [info for name, info in source.tensors.items() if name not in used and name not in dropped]
    stray = [info.name for info in kept if info.name.endswith(tuple(p for p in layout.parts if p != layout.weight))]
    if stray:
        raise TQFormatError(
            "BIND.EXTRA_TENSOR", stray[0], "a part of a quantized weight whose other parts are not there"
        )
    codes = [info for info in kept if info.name.endswith(".weight") and info.dtype not in FLOATS]
    if codes:  # such as LLM.int8's, whose product is rounded twice
        message = f"codes of {codes[0].dtype}, without the tensors that tell their values in this format"
        raise TQFormatError("UNSUPPORTED.LIBRARY", codes[0].name, f"{message}; start from the original model: quantize")
    return groups, kept, dropped


def read_weights(
    source: Source,
    layout: Layout,
    settings: dict[str, Any],
    groups: dict[str, dict[str, Info]],
    kept: list[Info],
) -> Iterator[Weight]:
    """All weights, in the order in which their first tensors stand in the files."""
    places = {name: i for i, name in enumerate(source.tensors)}
    jobs: list[tuple[int, str | Info]] = [(places[info.name], info) for info in kept]
    jobs += [(min(places[info.name] for info in parts.values()), stem) for stem, parts in groups.items()]
    with Reader(source) as reader:
        for _, job in sorted(jobs, key=lambda item: item[0]):
            if isinstance(job, Info):
                yield Weight(job.name, job.shape, job.dtype, data=read_tensor(reader, job))
            else:
                parts = {ending: read_tensor(reader, info) for ending, info in groups[job].items()}
                yield layout.read(job + layout.weight, parts, settings)


def read_tensor(reader: Reader, info: Info) -> "Tensor":
    """A tensor of the checkpoint in memory of its own."""
    import torch

    data = bytearray().join(reader.byte_chunks(info))
    dtype = torch_dtype(info.dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(info.shape) if data else torch.empty(info.shape, dtype=dtype)
