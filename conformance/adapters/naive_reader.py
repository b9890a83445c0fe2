"""A reader as one might write it in an afternoon: it decodes ordinary repositories, and trusts everything it is given.

It is here to be failed by the suite. Its faults are on purpose, each one that a real reader could have; do not copy from it.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
DTYPES = {"BOOL": "u1", "U8": "u1", "I8": "i1", "F8_E5M2": "u1", "F8_E4M3": "u1", "U16": "<u2", "I16": "<i2"}
DTYPES |= {
    "F16": "<f2",
    "BF16": "<u2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
}


def read_payload(path: str) -> dict[str, Any]:
    """Fault: the header's claims about lengths, offsets and names are believed."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        data = file.read(os.path.getsize(path))
    header.pop("__metadata__", None)
    return {name: (t["dtype"], t["shape"], data[slice(*t["data_offsets"])]) for name, t in header.items()}


def floats(tensor: Any) -> Array:
    """Fault: whatever the numbers are, finite or not, they are used."""
    dtype, shape, data = tensor
    values = np.frombuffer(data, DTYPES[dtype])
    if dtype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    result: Array = values.astype(np.float32).reshape(shape)
    return result


def unpack(codes: Array, n: int, bits: int, window: int) -> Array:
    """Faults: the stream is continued by zeros instead of its own beginning; padding bits are not looked at."""
    stream = np.unpackbits(codes, axis=1, bitorder="little")[:, : n * bits]
    stream = np.pad(stream, ((0, 0), (0, window - bits)))
    symbols = np.zeros((len(codes), n), np.int64)
    for j in range(window):
        symbols |= stream[:, j : j + n * bits : bits].astype(np.int64) << j
    return symbols


def hadamard(f: int) -> Array:
    """Fault: the two blocks of Paley II are exchanged."""
    if f & (f - 1) == 0:
        return np.array([[(-1) ** (i & j).bit_count() for j in range(f)] for i in range(f)], np.float32)
    first = all((f - 1) % k for k in range(2, f - 1))
    q = f - 1 if first else f // 2 - 1
    squares = {i * i % q for i in range(1, q)}
    chi = [0] + [1 if x in squares else -1 for x in range(1, q)]
    c = np.ones((q + 1, q + 1), np.float32)
    c[1:, 1:] = [[chi[(i - j) % q] for j in range(q)] for i in range(q)]
    if first:
        c[1:, 0] = -1
        return c + np.diag([0] + [1] * q).astype(np.float32)
    np.fill_diagonal(c, 0)
    return np.kron(c, np.array([[1, -1], [-1, -1]])) + np.kron(np.eye(q + 1), np.array([[1, 1], [1, -1]]))


def inverse(transform: dict[str, Any], payload: dict[str, Any], y: Array) -> Array:
    """T^-1 of the blocks y [m, B]."""
    if transform["kind"] == "hadamard":
        size = transform["size"]
        matrix = np.ones((1, 1), np.float32)
        for f in transform["factors"]:
            matrix = np.kron(matrix, hadamard(f))
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(transform["signs"]), np.uint8), bitorder="little")
        return (y.astype(np.float64) @ matrix) * (1.0 - 2.0 * bits[:size]) / math.sqrt(size)
    if transform["kind"] == "dense":
        return y.astype(np.float64) @ floats(payload[transform["matrix"]])
    if transform["kind"] == "givens":
        _, shape, data = payload[transform["pairs"]]
        v = y.astype(np.float64)
        angles = floats(payload[transform["angles"]]).astype(np.float64)
        for pairs, angle in zip(np.frombuffer(data, "<i4").reshape(shape)[::-1], angles[::-1], strict=False):
            i, j, c, s = pairs[:, 0], pairs[:, 1], np.cos(angle), np.sin(angle)
            v[:, i], v[:, j] = c * v[:, i] + s * v[:, j], c * v[:, j] - s * v[:, i]
        return v
    return y


def decode_stage(stage: dict[str, Any], manifest: dict[str, Any], payload: dict[str, Any], cols: int) -> Array:
    """Fault: rows and sizes come from the payload, so the manifest may say what it likes."""
    book, transform = manifest["codebooks"][stage["codebook"]], manifest["transforms"][stage["transform"]]
    p, (tr, tc) = book["dimension"], stage.get("tile") or (1, cols)
    _, shape, data = payload[stage["codes"]]
    codes = np.frombuffer(data, np.uint8).reshape(shape)
    symbols = unpack(codes, tr * tc // p, stage["bits"], stage.get("window") or stage["bits"])
    symbols = symbols.reshape(-1, cols // tc, tr, tc // p).transpose(0, 2, 1, 3).reshape(-1, cols // p)
    if book.get("tensor"):
        levels = floats(payload[book["tensor"]])
    else:
        levels = np.array(book["values"], np.float32).reshape(book["entries"], p)
    if levels.ndim == 3:
        values = levels[np.arange(len(symbols))[:, None], symbols]
    else:
        values = np.take(levels, symbols, axis=0, mode="clip")  # fault: hides codes beyond the codebook
    scales = floats(payload[stage["scales"]])
    y = values.reshape(len(symbols), cols) * np.repeat(scales, stage.get("vector_length") or cols, axis=1)
    return inverse(transform, payload, y.reshape(-1, transform["size"])).reshape(-1, cols)


def to_bytes(values: Array, dtype: str) -> bytes:
    """Fault: BF16 by cutting off the lower half of the bits."""
    if dtype == "BF16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype(DTYPES[dtype]).tobytes()


def read(directory: str) -> dict[str, tuple[str, list[int], bytes]]:
    """Weight name -> (dtype, shape, bytes). Faults: no version, feature, field, size or digest is checked."""
    with open(os.path.join(directory, "quant_manifest.json"), encoding="utf-8") as file:
        manifest = json.load(file)
    payload: dict[str, Any] = {}
    for name, listed in manifest["files"].items():
        if listed["role"] == "payload":
            payload.update(read_payload(os.path.join(directory, name)))
    weights: dict[str, tuple[str, list[int], bytes]] = {}
    for name, weight in manifest["tensors"].items():
        dtype, shape = weight["dtype"], weight["shape"]
        if weight["kind"] == "passthrough":
            weights[name] = payload[weight["data"]]
            continue
        total = sum(decode_stage(stage, manifest, payload, shape[-1]) for stage in weight["stages"])
        if weight.get("column_scale"):
            total = total * floats(payload[weight["column_scale"]])
        weights[name] = dtype, shape, to_bytes(np.asarray(total), dtype)
    for alias, source in manifest.get("tied_weights", {}).items():
        weights[alias] = weights[source]
    return weights
