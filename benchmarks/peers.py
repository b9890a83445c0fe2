"""tqformat repositories beside other quantizers: the same base, text, windows and evaluation code for all.

    python benchmarks/peers.py BASE TEXT [--repo REPO ...] [--peer NAME ...] [--packed NAME=DIR ...]
        [--calibration TEXT ...] [--max-windows N]

Each peer turns the checkpoint into weights as it would decode them, and the bytes that it stores. All then go through
`reference_quantizer.evaluation.evaluate`. OUT.json, OUT.md and OUT.svg are written after each group of candidates; what OUT.json holds of
the same base, text and settings is not computed again, so an interrupted run continues and later runs add candidates.

Policy: decoder linear layers at the stated bits, embedding and output layer at 8 bit (one float16 scale per row), the rest
bf16, all in one safetensors file. The `gguf-*` peers are files as llama-quantize mixes them by its own policy, which gives wider
types to rows that 256 does not divide. The `ggml-*` peers are the same block types under the common policy, with such rows
joined: what the codec can do, though no file of llama.cpp can hold it. `iqk-*` are ik_llama.cpp's own types in the same way,
trellis types (KT) among them. A name with + has a type for the embedding, too: "IQ3_KT+IQ4_NL" is a mix or a type of the layers,
and what the embedding has. The tokenizer counts for none, a tqformat repository's manifest does. With --calibration all of these
see an importance matrix (mean square of each input), as llama-imatrix measures it, that of the output layer with it.

A peer of --packed is a low-bit checkpoint that another program has written, such as `pack_peers.py` makes with GPTQ and
AutoRound, in a layout that `reference_quantizer import` reads: NAME follows the policy where DIR leaves the embedding as it
is, and NAME+4 has 4 bits for it, rounded in groups, as these programs do it, where they do.

Weights are compared as they decode, with activations in float32; llama.cpp itself rounds activations, too.

The peers' packages, each with --no-deps: gguf, ik-llama-cpp-python (llama-quantize, and libggml for its own types),
libggml-python (block types), bitsandbytes, and hqq with termcolor (DISABLE_CUDA=1). What is not there is listed as not made.
"""

import argparse
import copy
import ctypes
import functools
import importlib.metadata
import json
import math
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tqformat
from reference_quantizer.calibration.tokens import calibration_tokens
from reference_quantizer.checkpoint.source import open_source, weights_sha256
from reference_quantizer.evaluation.evaluate import Base, Runner, Settings, file_digests, to_text
from reference_quantizer.evaluation.metrics import Result, summarize
from reference_quantizer.evaluation.windows import batches, sliding_windows
from reference_quantizer.foreign import formats
from reference_quantizer.foreign.repository import write_repository
from reference_quantizer.model.base import (
    DTYPES,
    check_length,
    check_same_model,
    find_base,
    find_bos,
    load_base,
    load_tokenizer,
    running_models,
)
from reference_quantizer.model.machine import default_cache, hardware, libraries
from reference_quantizer.model.text import read_corpus
from reference_quantizer.progress import Progress
from tqformat.load_quantized import MANIFEST, TQFormatError, read_manifest
from tqformat.writer import pack

VERSION = 3  # of the entries in the JSON file
CALIBRATION_TOKENS = 24576
GROUP = 64  # weights that share a scale, in HQQ, NF4 and rounding
BLOCK = 256  # weights in a block of the K and IQ types
IK_TYPES = 160  # numbers of ik_llama.cpp's types; beyond are those types in other orders
MIXES = ("IQ2_XXS", "IQ2_M", "Q2_K", "IQ3_XXS", "IQ3_M", "Q3_K_M", "IQ4_XS", "Q4_K_M")
BLOCK_TYPES = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K", "Q4_0", "Q5_0")
# mix or type of the layers + type of the embedding, near 2.5, 3, 3.35, 4.15 and 5 bits per weight of a whole file
SMALL_EMBEDDING = {
    "gguf": (
        "IQ2_KL+IQ4_NL",
        "IQ3_KT+IQ4_NL",
        "IQ3_K+IQ4_NL",
        "IQ4_KSS+IQ4_NL",
        "IQ4_KS+Q6_0",
        "IQ4_NL+Q6_0",
        "Q4_K_M+IQ4_NL",
    ),
    "ggml": ("IQ3_XXS+IQ4_XS", "IQ4_XS+IQ3_S", "Q4_K+Q6_K"),
    "iqk": (
        "IQ2_KT+IQ4_KSS",
        "IQ2_KL+IQ4_KSS",
        "IQ3_KT+IQ4_KT",
        "IQ3_KS+IQ4_KSS",
        "IQ4_KSS+IQ4_K",
        "IQ4_KT+IQ4_K",
        "IQ4_K+IQ6_K",
        "IQ5_KS+IQ4_KSS",
        "IQ2_KL+IQ2_KS",  # from here on where the embedding is most of the model, as Gemma's is
        "IQ3_K+IQ2_KL",
        "IQ3_KS+IQ3_KS",
        "IQ4_KS+IQ4_KSS",
        "IQ5_K+IQ4_K",
    ),
}

Stored = dict[str, Tensor]
Codec = Callable[[Tensor, Tensor | None], tuple[Tensor, Stored]]  # weight, importance [cols] -> decoded, what is stored


@dataclass(frozen=True)
class Checkpoint:
    """The base's weights by name, float32: linear layers [rows, cols], embeddings [rows, cols], and what is left."""

    config: dict[str, Any]
    linear: Stored
    embedding: Stored
    rest: Stored
    importance: Stored | None = None  # of the layers, the output layer with them: mean square of each input, [cols]

    @property
    def weights(self) -> int:
        return sum(w.numel() for part in (self.linear, self.embedding, self.rest) for w in part.values())


def open_checkpoint(model: Any, ids: Tensor | None = None) -> Checkpoint:
    """The parts of `model`; `ids` [sequences, length] are the tokens that the importance is measured on."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    state = {name: w.detach().float() for name, w in model.state_dict().items() if name not in tied}
    output = model.get_output_embeddings()
    layers = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not output}
    embedding = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Embedding) or m is output}
    parts: tuple[Stored, Stored, Stored] = ({}, {}, {})
    for name, w in state.items():
        parts[0 if name in layers else 1 if name in embedding else 2][name] = w
    head = next(name for name, w in model.named_parameters() if w is output.weight)  # tied: the embedding's name
    importance = None if ids is None else measure_importance(model, layers, head, ids)
    return Checkpoint(model.config.to_dict(), *parts, importance)


def measure_importance(model: Any, layers: dict[str, nn.Linear], head: str, ids: Tensor) -> Stored:
    """The mean square of each input of each layer, [cols] float32; `head` names the output layer, whose inputs the body gives."""
    total = {name: torch.zeros(layer.in_features, dtype=torch.float64) for name, layer in layers.items()}
    total[head] = torch.zeros(model.get_output_embeddings().in_features, dtype=torch.float64)

    def note(name: str, _: nn.Module | None, args: tuple[Tensor, ...]) -> None:
        total[name] += args[0].reshape(-1, args[0].shape[-1]).square().sum(0).double().cpu()

    hooks = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in layers.items()]
    with torch.inference_mode():
        for row in ids:
            out = model.base_model(input_ids=row[None].to(model.device), use_cache=False)
            note(head, None, (out.last_hidden_state,))
    for hook in hooks:
        hook.remove()
    return {name: (sums / ids.numel()).float() for name, sums in total.items()}


# ------------------------------------------------------------------------------------------------ codecs


def int8_rows(weight: Tensor, _: Tensor | None = None) -> tuple[Tensor, Stored]:
    """Rounding to 8 bit with one float16 scale per row."""
    scales = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=2.0**-24).half()
    codes = (weight / scales.float()).round().clamp(-127, 127).to(torch.int8)
    return codes * scales.float(), {"codes": codes, "scales": scales}


def rounded(weight: Tensor, _: Tensor | None = None, *, bits: int) -> tuple[Tensor, Stored]:
    """Rounding in groups between their extremes: a bfloat16 scale and a zero point of as many bits for each."""
    groups, top = weight.reshape(len(weight), -1, GROUP), 2**bits - 1
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / top).clamp(min=2.0**-126).bfloat16()
    zeros = (-low / scales.float()).round().clamp(0, top)
    codes = (groups / scales.float()[:, :, None] + zeros[:, :, None]).round().clamp(0, top)
    decoded = (codes - zeros[:, :, None]) * scales.float()[:, :, None]
    parts = {"codes": pack(codes.flatten(1).int(), bits), "zeros": pack(zeros.t().int(), bits), "scales": scales}
    return decoded.reshape(weight.shape), parts


def hqq(weight: Tensor, _: Tensor | None, *, bits: int) -> tuple[Tensor, Stored]:
    """Half-quadratic quantization (Badri and Shaji 2023): float16 scale and zero per group. Three bits are packed as 3.2."""
    with imported("hqq"):
        from hqq.core.quantize import Quantizer

    codes, meta = Quantizer.quantize(
        weight, nbits=bits, group_size=GROUP, axis=1, device="cpu", compute_dtype=torch.float16
    )
    stored = {"codes": codes, "scale": meta["scale"].half(), "zero": meta["zero"].half()}
    meta |= {"scale": stored["scale"].float(), "zero": stored["zero"].float(), "compute_dtype": torch.float32}
    return Quantizer.dequantize(codes, meta).reshape(weight.shape), stored


def nf4(weight: Tensor, _: Tensor | None = None) -> tuple[Tensor, Stored]:
    """4-bit NormalFloat with quantized absolute maxima (QLoRA, arXiv:2305.14314), as bitsandbytes saves it."""
    with imported("bitsandbytes"):
        from bitsandbytes import functional

    codes, state = functional.quantize_4bit(weight, blocksize=GROUP, quant_type="nf4", compress_statistics=True)
    return functional.dequantize_4bit(codes, state), {"codes": codes, **state.as_dict(packed=True)}


def ggml(weight: Tensor, importance: Tensor | None, *, kind: str) -> tuple[Tensor, Stored]:
    """A block type of ggml, decoded by the gguf package, which encodes the types of 32 weights itself."""
    with imported("gguf"):
        import gguf

    qtype = gguf.GGMLQuantizationType[kind]
    size = gguf.GGML_QUANT_SIZES[qtype][0]
    matrix, importances = join_rows(weight, importance, kind, size)
    data = quantize_chunk(matrix, qtype, importances) if size == BLOCK else gguf.quantize(matrix, qtype)
    decoded = torch.from_numpy(gguf.dequantize(data, qtype).reshape(weight.shape))
    return decoded, {"blocks": torch.from_numpy(data)}


def iqk(weight: Tensor, importance: Tensor | None, *, kind: str) -> tuple[Tensor, Stored]:
    """A block type of ik_llama.cpp, trellis types among them, which its own library encodes and decodes."""
    qtype = ik_types()[kind]
    matrix, importances = join_rows(weight, importance, kind, BLOCK)
    rows, cols = matrix.shape
    data = np.zeros((rows, ik_library().ggml_row_size(qtype, cols)), np.uint8)
    pointers = [None if a is None else a.ctypes.data for a in (matrix, data, importances)]
    written = ik_library().ggml_quantize_chunk(qtype, *pointers[:2], 0, rows, cols, pointers[2])
    assert written == data.nbytes
    return torch.from_numpy(ik_decode(data, qtype, cols).reshape(weight.shape)), {"blocks": torch.from_numpy(data)}


def join_rows(weight: Tensor, importance: Tensor | None, kind: str, size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """As many rows behind each other as fill whole blocks of `size` weights together, and the importance of those."""
    joined = size // math.gcd(size, weight.shape[1])
    if weight.shape[0] % joined:
        message = f"{list(weight.shape)} does not fill blocks of {size} weights"
        raise TQFormatError("SCHEMA.VALUE", kind, message)
    matrix = np.ascontiguousarray(weight.reshape(-1, joined * weight.shape[1]).numpy())
    return matrix, None if importance is None else importance.repeat(joined).numpy()


def by_policy(codec: Codec, checkpoint: Checkpoint, embedding: Codec = int8_rows) -> tuple[Stored, int]:
    """The decoded weights and the bytes of the safetensors file, with `codec` for the linear layers."""
    from safetensors.torch import save

    decoded, stored = {}, {}
    for name, w in checkpoint.rest.items():
        stored[name] = w.bfloat16()
        decoded[name] = stored[name].float()
    chosen = [(codec, checkpoint.linear), (embedding, checkpoint.embedding)]
    for encode, weights in chosen:
        for name, w in weights.items():
            decoded[name], parts = encode(w, (checkpoint.importance or {}).get(name))
            stored |= {f"{name}.{part}": value.contiguous() for part, value in parts.items()}
    return decoded, len(save(stored))


def packed(checkpoint: Checkpoint, *, path: Path, embedding: Codec = int8_rows) -> tuple[Stored, int]:
    """The weights in the low-bit checkpoint `path`, and the bytes of its tensors as one safetensors file.

    What it has of an embedding or of a separate output layer without codes is encoded with `embedding`; a tied output layer is not
    counted. UNSUPPORTED.LIBRARY for a layout that is not read.
    """
    from safetensors.torch import load_file, save

    with tempfile.TemporaryDirectory() as work, formats.opened(str(path), Path(work, "repo")) as found:
        base_model = {"id": found.id, "revision": None, "license": None}
        repo = write_repository(found, Path(work, "repo"), base_model, "text-generation")
        values = tqformat.load_state_dict(repo, dtype=torch.float32)
    weights = checkpoint.linear | checkpoint.embedding | checkpoint.rest
    files = sorted({path / info.file for info in open_source(str(path)).tensors.values()})
    stored = {name: value for file in files for name, value in load_file(file).items()}
    for name in values.keys() & stored.keys():
        if name not in weights:
            del stored[name]
        elif name in checkpoint.embedding:
            del stored[name]
            values[name], parts = embedding(checkpoint.embedding[name], (checkpoint.importance or {}).get(name))
            stored |= {f"{name}.{part}": value.contiguous() for part, value in parts.items()}
    return {name: values[name] for name in values if name in weights}, len(save(stored))


# ------------------------------------------------------------------------------------------------ llama.cpp


def packaged_file(package: str, name: str) -> Path:
    """A file of an installed package, which need not be importable."""
    with imported(package):
        files = [Path(str(f.locate())) for f in importlib.metadata.files(package) or [] if f.name == name]
        return next(path for path in files if path.is_file())


def quantize_chunk(matrix: np.ndarray, qtype: Any, importance: np.ndarray | None) -> np.ndarray:
    """The blocks of `matrix` [rows, cols] float32 as ggml encodes them, [rows, bytes] uint8."""
    import gguf

    path = packaged_file("libggml-python", "libggml-base.so")
    with imported("libggml-python"):
        library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    if importance is None and library.ggml_quantize_requires_imatrix(ctypes.c_int(qtype)):
        raise TQFormatError("SCHEMA.VALUE", qtype.name, "expected an importance matrix: give --calibration")
    rows, cols = matrix.shape
    size, nbytes = gguf.GGML_QUANT_SIZES[qtype]
    out = np.zeros((rows, cols // size * nbytes), np.uint8)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (matrix, out)]
    counts = [ctypes.c_int64(n) for n in (0, rows, cols)]
    weights = ctypes.c_void_p(None if importance is None else importance.ctypes.data)
    written = library.ggml_quantize_chunk(ctypes.c_int(qtype), *pointers, *counts, weights)
    assert written == out.nbytes
    return out


class Traits(ctypes.Structure):
    """ggml_type_traits_t of ik_llama.cpp's ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_sizes", ctypes.c_int64 * 2),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("other_functions", ctypes.c_void_p * 4),
        ("vec_dot_type", ctypes.c_int),
        ("at_once", ctypes.c_int64 * 2),
        ("products", ctypes.c_void_p * 2),
        ("row_meta_size", ctypes.c_int64),
    )


class InitParams(ctypes.Structure):
    """ggml_init_params and, by its first two members, gguf_init_params."""

    _fields_ = (("first", ctypes.c_size_t), ("second", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@functools.cache
def ik_library() -> ctypes.CDLL:
    """ik_llama.cpp's libggml with the types of what is called here; its tables are made."""
    path = packaged_file("ik-llama-cpp-python", "libggml.so")
    with imported("ik-llama-cpp-python"):
        library = ctypes.CDLL(str(path))
    size, pointer, count = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("ggml_init", pointer, [InitParams]),
        ("ggml_free", None, [pointer]),
        ("ggml_type_name", ctypes.c_char_p, [ctypes.c_int]),
        ("ggml_row_size", size, [ctypes.c_int, count]),
        ("ggml_internal_get_type_traits", Traits, [ctypes.c_int]),
        ("ggml_quantize_chunk", size, [ctypes.c_int, pointer, pointer, count, count, count, pointer]),
        ("gguf_init_from_file", pointer, [ctypes.c_char_p, InitParams]),
        ("gguf_free", None, [pointer]),
        ("gguf_get_data_offset", size, [pointer]),
        ("gguf_get_n_tensors", ctypes.c_int, [pointer]),
        ("gguf_get_tensor_name", ctypes.c_char_p, [pointer, ctypes.c_int]),
        ("gguf_get_tensor_type", ctypes.c_int, [pointer, ctypes.c_int]),
        ("gguf_get_tensor_offset", size, [pointer, ctypes.c_int]),
    ):
        getattr(library, name).restype, getattr(library, name).argtypes = result, arguments
    library.ggml_free(library.ggml_init(InitParams(1 << 16, None, False)))
    return library


@functools.cache
def ik_types() -> dict[str, int]:
    """Name of each type -> its number in ik_llama.cpp."""
    names = ((i, ik_library().ggml_type_name(i)) for i in range(IK_TYPES))
    return {name.decode().upper(): i for i, name in names if name}


def ik_decode(data: np.ndarray, qtype: int, cols: int) -> np.ndarray:
    """The weights in blocks [rows, bytes] uint8 of a type of ik_llama.cpp, [rows, cols] float32."""
    if qtype == ik_types()["F32"]:
        return data.view(np.float32).copy()
    to_float, out = ik_library().ggml_internal_get_type_traits(qtype).to_float, np.empty((len(data), cols), np.float32)
    for i in range(len(data)):  # not all rows at once, since some types have a scale in front of each
        to_float(data[i].ctypes.data, out[i].ctypes.data, cols)
    return out


def read_gguf(path: Path, shapes: dict[str, torch.Size]) -> Stored:
    """The decoded tensors of a GGUF file with types of ik_llama.cpp, whose names and shapes are known."""
    library, data, found = ik_library(), np.memmap(path, np.uint8, "r"), {}
    file = library.gguf_init_from_file(bytes(path), InitParams(1, None, False))  # no_alloc, no ggml_context
    if not file:
        raise TQFormatError("UNSUPPORTED.LIBRARY", f"gguf {path.name}", "ik_llama.cpp cannot read its own file")
    for i in range(library.gguf_get_n_tensors(file)):
        name, qtype = library.gguf_get_tensor_name(file, i).decode(), library.gguf_get_tensor_type(file, i)
        *rows, cols = shapes[name]
        size, count = library.ggml_row_size(qtype, cols), math.prod(rows)
        blocks = data[library.gguf_get_data_offset(file) + library.gguf_get_tensor_offset(file, i) :][: count * size]
        found[name] = torch.from_numpy(ik_decode(blocks.reshape(count, size), qtype, cols).reshape(shapes[name]))
    library.gguf_free(file)
    return found


def gguf_file(checkpoint: Checkpoint, *, mix: str, embedding: str | None = None) -> tuple[Stored, int]:
    """The weights and the size of the file that llama-quantize makes with its own mix of types; it has no tokenizer.

    `embedding` is the type of the embedding and of the output layer, where it is not left to the mix. Rows stay in the checkpoint's order, where llama.cpp wants those of some models permuted: each row is quantized by itself.
    """
    narrow = next((name for name, w in (checkpoint.linear | checkpoint.embedding).items() if w.shape[1] % 32), None)
    if narrow is not None:  # llama-quantize would write a file that nobody can read
        raise TQFormatError("SCHEMA.VALUE", narrow, "expected rows of a multiple of 32 weights")
    tool = packaged_file("ik-llama-cpp-python", "llama-quantize")
    with tempfile.TemporaryDirectory() as work:
        plain, mixed, matrix = (Path(work, name) for name in ("plain.gguf", "mixed.gguf", "imatrix.dat"))
        names = write_gguf(checkpoint, plain)
        options: list[str | Path] = []
        if checkpoint.importance is not None:
            known = {name: checkpoint.importance[own] for name, own in names.items() if own in checkpoint.importance}
            matrix.write_bytes(imatrix_file(known))
            options = ["--imatrix", matrix, "--hide-imatrix"]
        if embedding is not None:
            options += ["--token-embedding-type", embedding.lower(), "--output-tensor-type", embedding.lower()]
        with imported("ik-llama-cpp-python"):
            command = [tool, *options, plain, mixed, mix, str(torch.get_num_threads())]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            )
        if done.returncode:
            last = " ".join(done.stdout.splitlines()[-1:])[:200]
            raise TQFormatError("UNSUPPORTED.LIBRARY", f"llama-quantize {mix}", f"it failed: {last}")
        weights = checkpoint.linear | checkpoint.embedding | checkpoint.rest
        stored = read_gguf(mixed, {name: weights[own].shape for name, own in names.items()})
        return {names[name]: w for name, w in stored.items()}, mixed.stat().st_size


def imatrix_file(importance: Stored) -> bytes:
    """An importance matrix as llama-quantize reads it: count, then name, calls and values of each tensor."""
    parts = [struct.pack("<i", len(importance))]
    for name, values in importance.items():
        text = name.encode()
        parts += [struct.pack("<i", len(text)), text, struct.pack("<ii", 1, len(values)), values.numpy().tobytes()]
    return b"".join(parts)


def write_gguf(checkpoint: Checkpoint, path: Path) -> dict[str, str]:
    """The checkpoint as a float32 GGUF file with what llama.cpp's quantizer reads; its names -> the checkpoint's."""
    with imported("gguf"):
        import gguf

    config = checkpoint.config
    arch = {"gemma3_text": "gemma3"}.get(config["model_type"], config["model_type"])
    known = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), None)
    if known is None:
        raise TQFormatError("BIND.MODEL", arch, "gguf does not know this architecture")
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    mapping, names = gguf.get_tensor_name_map(known, config["num_hidden_layers"]), {}
    for name, w in (checkpoint.linear | checkpoint.embedding | checkpoint.rest).items():
        stored = mapping.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise TQFormatError("BIND.TENSOR", name, f"gguf has no name for it in {arch}")
        names[stored] = name
        writer.add_tensor(stored, np.ascontiguousarray(w.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return names


@contextmanager
def imported(package: str) -> Iterator[None]:
    """UNSUPPORTED.LIBRARY where a peer's package is missing or does not run here."""
    try:
        yield
    except (ImportError, OSError, StopIteration) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}" if str(error) else type(error).__name__
        raise TQFormatError("UNSUPPORTED.LIBRARY", package, f"cannot be used: {reason}") from None


@dataclass(frozen=True)
class Peer:
    """`make` gives the decoded weights and the bytes stored; `packages` are those whose versions the result depends on."""

    make: Callable[[Checkpoint], tuple[Stored, int]]
    packages: tuple[str, ...]
    made_from: dict[str, str] = field(default_factory=dict)  # digests of the files that it reads


def small_embedding(family: str, layers: str, embedding: str) -> Peer:
    """Like other peers of the family, but with `embedding` as the type of the embedding, not 8 bits or what the mix has."""
    if family == "gguf":
        return Peer(partial(gguf_file, mix=layers, embedding=embedding), ("gguf", "ik-llama-cpp-python"))
    codec, packages = {"ggml": (ggml, ("gguf", "libggml-python")), "iqk": (iqk, ("ik-llama-cpp-python",))}[family]
    codecs = partial(codec, kind=layers), partial(codec, kind=embedding)
    return Peer(partial(by_policy, codecs[0], embedding=codecs[1]), packages)


def packed_peers(name: str, path: Path) -> dict[str, Peer]:
    """The low-bit checkpoint `path` as `name`, and with 4 bits for an embedding that it leaves as it is."""
    made_from = {"weights_sha256": weights_sha256(open_source(str(path)))}
    makes = {
        name: partial(packed, path=path),
        f"{name}+4": partial(packed, path=path, embedding=partial(rounded, bits=4)),
    }
    return {key: Peer(make, (), made_from) for key, make in makes.items()}


PEERS = {
    **{f"gguf-{mix}": Peer(partial(gguf_file, mix=mix), ("gguf", "ik-llama-cpp-python")) for mix in MIXES},
    **{
        f"ggml-{kind}": Peer(partial(by_policy, partial(ggml, kind=kind)), ("gguf", "libggml-python"))
        for kind in BLOCK_TYPES
    },
    **{
        f"{family}-{pair}": small_embedding(family, *pair.split("+"))
        for family in SMALL_EMBEDDING
        for pair in SMALL_EMBEDDING[family]
    },
    **{f"hqq-{bits}": Peer(partial(by_policy, partial(hqq, bits=bits)), ("hqq",)) for bits in (2, 3, 4)},
    "nf4": Peer(partial(by_policy, nf4), ("bitsandbytes",)),
}


# ------------------------------------------------------------------------------------------------ comparison


class Shared:
    """The base, run once for each batch however many models are compared with it."""

    def __init__(self, model: Any) -> None:
        self.model, self.forward, self.ids, self.out = model, model.forward, None, None

    def __call__(self, input_ids: Tensor, **options: Any) -> Any:
        if self.ids is None or not torch.equal(self.ids, input_ids):
            self.ids, self.out = input_ids, self.model(input_ids=input_ids, **options)
        return self.out


def compare_all(
    base: Any, models: dict[str, Any], tokens: np.ndarray, bos: int | None, settings: Settings
) -> dict[str, dict[str, Any] | str]:
    """Summary of each model as `evaluate` has it, or the error that it gave; all see a window before the next comes."""
    windows = sliding_windows(len(tokens), settings.max_length, settings.stride, settings.max_windows)
    shared, none = Shared(base), Base("", "")
    runners = {name: Runner(shared, model, none, tokens, windows, bos, settings) for name, model in models.items()}
    results: dict[str, list[Result]] = {name: [] for name in models}
    errors: dict[str, dict[str, Any] | str] = {}
    progress = Progress(len(windows), action="evaluating", unit="window")
    for group in batches(windows, settings.batch or 1):
        for name in [name for name in models if name not in errors]:
            try:
                results[name] += runners[name].score(group)
            except TQFormatError as error:
                errors[name] = str(error)
        progress.advance(len(group))
    progress.close()
    return errors | {name: summarize(windows, found) for name, found in results.items() if name not in errors}


def decoded_model(base: Any, decoded: Stored) -> Any:
    """A copy of `base` with other weights; each of its own must be replaced."""
    model = copy.deepcopy(base)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing, unexpected = model.load_state_dict(decoded, strict=False)
    if wrong := [*(set(missing) - tied), *unexpected]:
        raise TQFormatError(
            "BIND.MODEL", wrong[0], "the peer lacks this weight, or made one that the model does not have"
        )
    return model


def repo_bytes(repo: Path) -> int:
    """The payload files and the manifest, without which they cannot be decoded."""
    files = read_manifest(repo).files.values()
    return sum(f.size for f in files if f.role == "payload") + (repo / MANIFEST).stat().st_size


def find_series(repo: Path) -> str:
    """What a repository's point in the figure is joined with: those of the same preset, tuned or not."""
    quantization = read_manifest(repo).quantization or {}
    extra = quantization.get("extra", {})
    words = [
        "tqformat",
        extra.get("preset", ""),
        "mixed" * ("allocation" in quantization),
        "tuned" * ("tuning" in extra),
    ]
    return " ".join(filter(None, words))


def entry(
    name: str, kind: str, series: str, made_from: Any, size: int, weights: int, summary: dict[str, Any]
) -> dict[str, Any]:
    """A candidate as it stands in the JSON file."""
    return {
        "name": name,
        "kind": kind,
        "series": series,
        "made_from": made_from,
        "bytes": size,
        "bits_per_weight": 8 * size / weights,
        "base_perplexity": summary["base"]["perplexity"],
        "perplexity": summary["quantized"]["perplexity"],
        "perplexity_ratio": summary["perplexity_ratio"],
        "perplexity_ratio_standard_error": summary["perplexity_ratio_standard_error"],
        "kl_mean": summary["kl_divergence"]["mean"],
        "top1_agreement": summary["top1_agreement"]["rate"],
    }


def better_peers(candidate: dict[str, Any], candidates: list[dict[str, Any]]) -> list[str]:
    """The peers that are no larger than `candidate` and better in perplexity or in KL."""
    return [
        c["name"]
        for c in candidates
        if c["kind"] == "peer"
        and c["bytes"] <= candidate["bytes"]
        and (c["perplexity"] < candidate["perplexity"] or c["kl_mean"] < candidate["kl_mean"])
    ]


def to_markdown(report: dict[str, Any]) -> str:
    """The candidates by size, who beats whom, and what could not be made."""
    run, candidates = report["run"], sorted(report["candidates"], key=lambda c: c["bytes"])
    windows, calibration = run["windows"], run["calibration"]
    told = f"importance from {calibration['tokens']:,} tokens" if calibration else "no importance matrix"
    lines = [
        f"{run['dataset']['id']}, {windows:,} windows, base perplexity {candidates[0]['base_perplexity']:.4f}; {told}.",
        "",
        "| candidate | kind | bytes | bits per weight | perplexity | ratio | KL (nats) | top-1 |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for c in candidates:
        lines.append(
            f"| {c['name']} | {c['kind']} | {c['bytes']:,} | {c['bits_per_weight']:.3f} | {c['perplexity']:,.2f} | "
            f"{c['perplexity_ratio']:.4g} | {c['kl_mean']:.4f} | {c['top1_agreement']:.1%} |"
        )
    lines.append("")
    for c in candidates:
        if c["kind"] == "tqformat":
            better = ", ".join(better_peers(c, candidates)) or "none"
            lines.append(f"- {c['name']}: peers no larger and better in perplexity or KL: {better}.")
    lines += [f"- {name} was not made: {reason}" for name, reason in report["not_made"].items()]
    return "\n".join(lines) + "\n"


def draw(report: dict[str, Any], path: Path) -> None:
    """Perplexity ratio and KL, both logarithmic, against whole-file bits per weight."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    from reference_quantizer.release.figures import STYLE

    measures = {"perplexity_ratio": "perplexity ratio to the base", "kl_mean": "mean KL divergence (nats)"}
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        for axes, (key, title) in zip(figure.subplots(1, 2), measures.items(), strict=True):
            series = {c["series"]: c["kind"] for c in report["candidates"]}
            for name in sorted(series):
                chosen = sorted((c for c in report["candidates"] if c["series"] == name), key=lambda c: c["bytes"])
                x, y = ([c[k] for c in chosen] for k in ("bits_per_weight", key))
                marker, line = ("D", "-") if series[name] == "tqformat" else ("o", "none")
                axes.plot(x, y, marker, linestyle=line, label=name)
                for c in chosen:
                    place = (c["bits_per_weight"], c[key])
                    axes.annotate(c["name"], place, (4, 3), textcoords="offset points", fontsize=6.5)
            axes.set(yscale="log", title=title, xlabel="whole-file bits per weight")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        figure.axes[0].legend(frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


# ------------------------------------------------------------------------------------------------ command


def read_earlier(path: Path, run: dict[str, Any]) -> list[dict[str, Any]]:
    """The candidates in the JSON file of an earlier run that was the same but for its candidates."""
    if not path.is_file():
        return []
    report = json.loads(path.read_bytes())
    return report["candidates"] if report["run"] == run else []


def versions(packages: tuple[str, ...]) -> dict[str, str | None]:
    """Of the packages that are installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def run_comparison(
    base: str,
    text: str,
    repos: list[Path],
    peers: dict[str, Peer],
    out: Path,
    settings: Settings | None = None,
    calibration: tuple[str, ...] = (),
    at_once: int = 3,
) -> dict[str, Any]:
    """Compares all candidates, `at_once` models beside the base in memory, and writes OUT.json, OUT.md and OUT.svg."""
    settings = (settings or Settings()).complete()
    source, corpus = find_base(base, None, default_cache()), read_corpus(text)
    if any(Path(c).is_file() and read_corpus(c).sha256 == corpus.sha256 for c in calibration):
        raise TQFormatError("SCHEMA.VALUE", "--calibration", "expected another text than the one that is evaluated")
    with running_models():
        tokenizer = load_tokenizer(source.path)
        tokens = np.array(tokenizer(corpus.text, add_special_tokens=False, verbose=False)["input_ids"], dtype="<i4")
        bos = find_bos(tokenizer)
        windows = sliding_windows(len(tokens), settings.max_length, settings.stride, settings.max_windows)
        sample = calibration_tokens(None, tokenizer, calibration, CALIBRATION_TOKENS) if calibration else None
        base_model = load_base(source, "text-generation", settings.dtype or "", settings.device)
        check_length(base_model, settings.max_length + (bos is not None))
        checkpoint = open_checkpoint(base_model, None if sample is None else sample.ids)
        run = {
            "version": VERSION,
            "base_weights_sha256": weights_sha256(source),
            "dataset": corpus.to_dict() | {"tokens": len(tokens)},
            "settings": asdict(settings) | {"bos_token_id": bos},
            "windows": len(windows),
            "calibration": None if sample is None else sample.to_dict(),
            "libraries": libraries(),
            "hardware": hardware(settings.device),
        }
        kept = read_earlier(out.with_suffix(".json"), run)
        report: dict[str, Any] = {"run": run, "candidates": kept, "not_made": {}}
        waiting: list[tuple[str, str, Any]] = [
            (r.name, "tqformat", file_digests(read_manifest(r), "payload")) for r in repos
        ]
        waiting += [(name, "peer", versions(peer.packages) | peer.made_from) for name, peer in peers.items()]
        places = {r.name: r for r in repos}
        done = [(c["name"], c["kind"], c["made_from"]) for c in kept]
        waiting = [candidate for candidate in waiting if candidate not in done]
        report["candidates"] = [c for c in kept if c["name"] not in {name for name, _, _ in waiting}]
        while waiting:
            models, sizes, group = {}, {}, []
            while waiting and len(models) < at_once:
                name, kind, made_from = waiting.pop(0)
                print(f"making {name}", file=sys.stderr, flush=True)
                try:
                    if kind == "tqformat":
                        check_same_model(source, read_manifest(places[name]))
                        models[name] = tqformat.load(places[name], settings.device, DTYPES[settings.dtype or ""])
                        sizes[name] = repo_bytes(places[name])
                    else:
                        decoded, sizes[name] = peers[name].make(checkpoint)
                        models[name] = decoded_model(base_model, decoded)
                        del decoded
                except TQFormatError as error:
                    report["not_made"][name] = str(error)
                    continue
                series = find_series(places[name]) if kind == "tqformat" else name.split("-")[0]
                group.append((name, kind, series, made_from))
            found = compare_all(base_model, models, tokens, bos, settings)
            for name, kind, series, made_from in group:
                summary = found[name]
                if isinstance(summary, str):
                    report["not_made"][name] = summary
                    continue
                facts = name, kind, series, made_from, sizes[name]
                report["candidates"].append(entry(*facts, checkpoint.weights, summary))
            if report["candidates"]:
                write(report, out)
    if not report["candidates"]:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in report["not_made"].items()) or "none was named"
        raise TQFormatError("SCHEMA.VALUE", "--repo, --peer", f"expected candidates that can be made; {reasons}")
    return report


def write(report: dict[str, Any], out: Path) -> None:
    """OUT.json, OUT.md and OUT.svg."""
    out.with_suffix(".json").write_bytes(to_text(report))
    out.with_suffix(".md").write_text(to_markdown(report), "utf-8")
    draw(report, out.with_suffix(".svg"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="checkpoint directory, Hub id or GGUF file")
    parser.add_argument("text", help="text file or data set of the Hub to evaluate on")
    parser.add_argument("--repo", type=Path, nargs="+", default=[], help="tqformat repositories made from the base")
    parser.add_argument("--peer", nargs="*", choices=PEERS, metavar="NAME", help=f"all if left out: {', '.join(PEERS)}")
    parser.add_argument(
        "--packed", nargs="+", default=[], metavar="NAME=DIR", help="low-bit checkpoints made from the base"
    )
    parser.add_argument("--calibration", nargs="+", default=[], help="texts for the importance matrix of GGUF types")
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--at-once", type=int, default=3, help="models in memory beside the base")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("peers"), help="names OUT.json, OUT.md and OUT.svg")
    args = parser.parse_args()
    peers = PEERS if args.peer is None else {name: PEERS[name] for name in args.peer}
    settings = Settings(max_windows=args.max_windows, device=args.device)
    try:
        for name, _, path in (given.partition("=") for given in args.packed):
            peers = peers | packed_peers(name, Path(path))
        report = run_comparison(
            args.base, args.text, args.repo, peers, args.out, settings, tuple(args.calibration), args.at_once
        )
    except TQFormatError as error:
        sys.exit(f"error: {error}")
    print(to_markdown(report), end="")


if __name__ == "__main__":
    main()
