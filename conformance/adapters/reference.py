"""tqformat itself behind the protocol of the suite: `python -m conformance.adapters.reference`.

The one place of the suite that imports tqformat and torch.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch

import tqformat
from conformance.adapters.serve import Json, serve
from tqformat.load_quantized import FEATURES, torch_dtype
from tqformat.writer import DTYPE_NAMES, raw_bytes

INLINE = 2**16  # bytes of a tensor that go into the answer; larger ones go to the file `out`

LONGEST = 490  # of a weight's name, as RepoWriter appends to it


def load(request: Json) -> Json:
    """Decodes a repository as a reader that builds a model would, aliases included."""
    tensors: Json = {}
    try:
        with tqformat.open_repo(request["path"]) as repo:
            repo.check_roles("support")
            for name in repo.names():
                tensors[name] = describe(repo.dequantize(name), Path(request["out"]))
            ties = repo.manifest.tied_weights
    except tqformat.TQFormatError as error:
        return {"status": "rejection", "code": error.code, "where": error.where, "message": error.message}
    return {"status": "results", "tensors": tensors | {alias: tensors[source] for alias, source in ties.items()}}


def describe(tensor: torch.Tensor, out: Path) -> Json:
    """A tensor of the answer, its bytes in place or at an offset in the file `out`."""
    described: Json = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
    if tensor.nbytes <= INLINE:
        return described | {"base64": base64.b64encode(raw_bytes(tensor)).decode()}
    with out.open("ab") as file:
        described["offset"] = file.tell()
        file.write(raw_bytes(tensor))
    return described


# decoding and multiplying: what rounding to the weight's dtype leaves [TQ-FUSE-2]
GRADES = {"F32": 14, "F16": 9, "BF16": 7}


def product(request: Json) -> Json:
    """Multiplies the decoded weight, in binary64: tqformat has no fused product."""
    try:
        with tqformat.open_repo(request["path"]) as repo:
            weight = repo.dequantize(request["weight"])
    except tqformat.TQFormatError as error:
        return {"status": "rejection", "code": error.code, "where": error.where, "message": error.message}
    rows = weight.reshape(-1, weight.shape[-1]).double()
    y = describe(rows @ tensor(request["x"]).double(), Path())
    return {"status": "results", "y": y, "grade": GRADES[DTYPE_NAMES[weight.dtype]]}


def tensor(value: Json) -> torch.Tensor:
    """A tensor of a description."""
    data = torch.frombuffer(bytearray(base64.b64decode(value["base64"])) or bytearray(1), dtype=torch.uint8)
    data = data if value["base64"] else data[:0]
    return data.view(torch_dtype(value["dtype"])).reshape(value["shape"])


def plain(value: Any) -> Any:
    return tensor(value) if isinstance(value, dict) and "base64" in value else value


def write(request: Json) -> Json:
    """Writes the repository of a description with RepoWriter."""
    described = json.loads(Path(request["description"]).read_text("utf-8"))
    if max(map(len, described["tensors"]), default=0) > LONGEST:
        return {"status": "skipped", "reason": f"RepoWriter names payload tensors after weights: {LONGEST} characters"}
    head = {key: described[key] for key in ("base_model", "loader_kind", "quantization")}
    with tqformat.RepoWriter(request["path"], **head, generator="tqformat conformance") as writer:
        for id, transform in described["transforms"].items():
            writer.add_transform(id, **{key: plain(value) for key, value in transform.items()})
        for id, book in described["codebooks"].items():
            if book.get("tensor") is not None:
                levels, stored = tensor(book["tensor"]), True
            else:
                levels = torch.tensor(book["values"], dtype=torch.float64).reshape(-1, book["dimension"])
                stored = False
            writer.add_codebook(id, levels, origin=book.get("origin"), stored=stored)
        for name, weight in described["tensors"].items():
            if weight["kind"] == "passthrough":
                writer.add_passthrough(name, tensor(weight["data"]))
                continue
            stages = []
            for stage in weight["stages"]:
                entry = {key: plain(value) for key, value in stage.items()}
                entry["codes"] = tqformat.pack(entry.pop("symbols").int(), entry["bits"], entry.get("window"))
                stages.append(entry)
            writer.add_quantized(name, weight["shape"], weight["dtype"], stages, plain(weight.get("column_scale")))
        for alias, source in described.get("tied_weights", {}).items():
            writer.tie(alias, source)
        writer.finish()
    return {"status": "results"}


if __name__ == "__main__":
    torch.set_num_threads(1)  # the vectors are tiny
    about = {"implementation": "tqformat", "version": tqformat.__version__, "features": list(FEATURES)}
    serve(about, {"load": load, "product": product, "write": write})
