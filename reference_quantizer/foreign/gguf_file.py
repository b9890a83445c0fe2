"""A GGUF file: blocks become codes, scales and offsets row by row, and nothing is decoded.

transformers knows what its classes call the tensors, and how it reorders them; so that it need not decode them, it is given
the numbers of their rows instead of their values. What it does to the rows is then done to those of the file. Tensors that
the file has in F32, such as norms, go through it as they are.

Weights have the dtype F32, since GGUF's own arithmetic is in float32. Memory: a few bytes for each element of the largest
tensor.
"""

import contextlib
import io
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from reference_quantizer.checkpoint import gguf_source
from reference_quantizer.checkpoint.source import read_json
from reference_quantizer.foreign.gguf_blocks import TYPES, read_blocks
from reference_quantizer.foreign.parts import Checkpoint, Stage, Weight
from tqformat.load_quantized import TQFormatError

HALVES = {"F16", "BF16"}  # kept in their dtype
CHUNK_BYTES = 4 << 20  # of blocks that are put in order at once
PER_ROW = ("symbols", "scales", "outer_scales", "offsets", "outer_offsets")


@contextlib.contextmanager
def opened(src: str, out: Path) -> Iterator[Checkpoint]:
    """The checkpoint in the GGUF file that `src` means; a package that holds it in parts joins them beside `out`."""
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.") as work:
        file = gguf_source.find_file(src, Path(work))
        with gguf_source.opened(file) as reader:
            refuse_types(file, reader)
            config = gguf_source.read_config(file, reader)
            config.dtype = "float32"
            facts = gguf_source.provenance(file, reader)
            rows, plain = layout(file, reader, config)
            saved = Path(work) / "saved"
            model = gguf_source.empty_model(config, "float32")
            check_names(file, reader, model, rows, plain)
            config.architectures = [type(model).__name__]
            config.save_pretrained(saved)
            if model.can_generate():
                model.generation_config.save_pretrained(saved)
            gguf_source.read_tokenizer(file).save_pretrained(saved)
            files: dict[str, tuple[str, Path | bytes]] = {}
            files |= {p.name: ("support", p.read_bytes()) for p in sorted(saved.iterdir()) if p.name != "config.json"}
            written = read_json(saved / "config.json")
            shutil.rmtree(saved)
            size = sum(int(t.n_bytes) for t in reader.tensors)
            order = [name for name in model.state_dict() if name in rows or name in plain]
            base = gguf_source.base_model(facts)
            read = weights(reader, rows, plain, order)
            yield Checkpoint(
                "gguf", base["id"], base["license"], len(order), read, written, files, size, facts, notes(facts)
            )


def notes(facts: dict[str, Any]) -> tuple[str, ...]:
    """What a user should know of the import, a line each."""
    kinds = ", ".join(f"{name} {count}" for name, count in facts["tensor_types"].items())
    lines = [
        f"{facts['file']} ({kinds}): weights are F32, as GGUF defines them; config.json asks for float32, too, and "
    ]
    lines[0] += "tqformat.load(..., dtype=torch.bfloat16) rounds them once"
    return (*lines, *gguf_source.describe_left_out(facts))


def refuse_types(file: Path, reader: Any) -> None:
    """UNSUPPORTED.LIBRARY for a file with tensors whose type the format cannot express."""
    known = TYPES.keys() | HALVES | {"F32"}
    wrong = [t for t in reader.tensors if t.tensor_type.name not in known]
    if wrong:
        kinds = ", ".join(sorted({t.tensor_type.name for t in wrong}))
        advice = f"{len(wrong)} tensors have the type {kinds}, which a tqformat stage cannot hold, the first is "
        advice += f"{wrong[0].name}; requantize: import-gguf makes a plain checkpoint of the file"
        raise TQFormatError("UNSUPPORTED.LIBRARY", file.name, advice)


# ------------------------------------------------------------------------------------------------ names and rows

Rows = dict[str, np.ndarray[Any, Any]]  # weight name -> numbers of rows [...], those of all tensors counted on


def layout(file: Path, reader: Any, config: Any) -> tuple[Rows, dict[str, Any]]:
    """Of each weight the rows of the file that it consists of; and the weights that are no matrices, with their values.

    Each row of a tensor is shown to transformers as two columns, 2 k and 2 k + 1 for row number k.
    """
    import gguf
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    first, shown = 0, {}
    for tensor in reader.tensors:
        if is_matrix(tensor):
            shown[id(tensor.data)] = first
            first += tensor.data.size // tensor.data.shape[-1]

    def show(data: Any, kind: Any) -> Any:
        if id(data) not in shown:
            return original(data, kind)
        shape = (*data.shape[:-1], 1)
        number = shown[id(data)] + np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
        return 2 * number + np.arange(2)

    original = gguf.dequantize
    gguf.dequantize = show
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a bar, for work that is none
            found = load_gguf_checkpoint(file, return_tensors=True, model_to_load=gguf_source.empty_model(config))
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
        message = f"transformers cannot map its tensors: {str(error)[:300]}"
        raise TQFormatError("UNSUPPORTED.LIBRARY", file.name, message) from None
    finally:
        gguf.dequantize = original
    rows, plain = {}, {}
    for name, tensor in found["tensors"].items():
        values = tensor.numpy()
        if values.dtype != np.float64:
            plain[name] = values
            continue
        number = values[..., 0].astype(np.int64) // 2
        if values.shape[-1] != 2 or not np.array_equal(values, 2 * number[..., None] + np.arange(2)):
            message = "transformers does more than put rows in another order, so scales do not fit them; "
            message += "requantize: import-gguf makes a plain checkpoint of the file"
            raise TQFormatError("UNSUPPORTED.LIBRARY", f"{file.name}: {name}", message)
        rows[name] = number
    return rows, plain


def is_matrix(tensor: Any) -> bool:
    """Whether a tensor goes by rows of bytes; others go through transformers."""
    return len(tensor.shape) > 1 and tensor.tensor_type.name != "F32"


def check_names(file: Path, reader: Any, model: Any, rows: Rows, plain: dict[str, Any]) -> None:
    """BIND.MODEL where the tensors of the file and the weights of the model are not the same ones."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [name for name in wanted if name not in rows and name not in plain and name not in tied]
    if missing:
        raise TQFormatError("BIND.MODEL", file.name, f"missing_keys: {', '.join(missing[:4])[:300]}")
    for name, found in [*rows.items(), *plain.items()]:
        shape = (*found.shape, wanted[name][-1]) if name in rows else found.shape
        if shape != wanted[name]:
            raise TQFormatError("BIND.MODEL", f"{file.name}: {name}", f"shape {list(shape)}, not {list(wanted[name])}")
    here = sum(np.prod(wanted[name], dtype=np.int64) for name in [*rows, *plain])
    there = sum(int(t.n_elements) for t in reader.tensors if not t.name.startswith(gguf_source.ROPE_TABLES))
    if here != there:
        message = f"the file holds {there:,} scalars and the model class {here:,}: they do not fit"
        raise TQFormatError("BIND.MODEL", file.name, message)


# ------------------------------------------------------------------------------------------------ weights


def weights(reader: Any, rows: Rows, plain: dict[str, Any], order: list[str]) -> Iterator[Weight]:
    """The weights in `order`."""
    tensors = [t for t in reader.tensors if is_matrix(t)]
    starts = np.cumsum([0, *(t.data.size // t.data.shape[-1] for t in tensors)])
    for name in order:
        if name in plain:
            yield Weight(name, plain[name].shape, "F32", data=plain[name])
            continue
        numbers = rows[name].reshape(-1)
        owners = np.searchsorted(starts, numbers, side="right") - 1
        used = {int(i): tensors[i] for i in np.unique(owners)}
        kinds, widths = {t.tensor_type.name for t in used.values()}, {int(t.shape[0]) for t in used.values()}
        if len(kinds) > 1 or len(widths) > 1:
            message = f"it is made of tensors of the types {', '.join(sorted(kinds))}; requantize: import-gguf makes a "
            raise TQFormatError("UNSUPPORTED.LIBRARY", name, f"{message}plain checkpoint of the file")
        kind, shape = kinds.pop(), (*rows[name].shape, widths.pop())  # GGUF names the columns first
        data = np.empty((len(numbers), row_bytes(next(iter(used.values()))).shape[1]), np.uint8)
        for i, tensor in used.items():
            data[owners == i] = row_bytes(tensor)[numbers[owners == i] - starts[i]]
        if kind in HALVES:
            import torch

            values = torch.from_numpy(data).view(torch.bfloat16 if kind == "BF16" else torch.float16)
            yield Weight(name, shape, kind, data=values.reshape(shape))
        else:
            yield Weight(name, shape, "F32", (read_rows(kind, data),))


def row_bytes(tensor: Any) -> Any:
    """The bytes of a tensor, uint8 [rows, bytes of a row]."""
    return tensor.data.reshape(-1, tensor.data.shape[-1]).view(np.uint8)


def read_rows(kind: str, data: Any) -> Stage:
    """The stage of rows of blocks, uint8 [rows, bytes of a row]; some rows at a time, since this takes several copies."""
    step = max(1, CHUNK_BYTES // data.shape[1])
    found = [read_blocks(kind, data[i : i + step]) for i in range(0, max(1, len(data)), step)]
    first = found[0]
    parts = {key: getattr(first, key) for key in PER_ROW}
    joined = {
        key: np.concatenate([getattr(stage, key) for stage in found])
        for key, part in parts.items()
        if part is not None and not (key == "outer_scales" and part.shape == (1, 1))
    }
    return replace(first, **joined)
