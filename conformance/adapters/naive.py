"""The deliberately naive reader behind the protocol of the suite: `python -m conformance.adapters.naive`."""

from __future__ import annotations

import base64
import json
import warnings
from typing import Any

from conformance.adapters.naive_reader import read
from conformance.adapters.serve import serve

FEATURES = ["trellis", "vector_codebook", "row_codebook", "stages", "column_scale", "tiles", "dense", "givens"]
CODES: dict[type[Exception], str] = {  # what an exception of Python says about the input, with some good will
    FileNotFoundError: "BIND.MISSING_FILE",
    IsADirectoryError: "PATH.TYPE",
    UnicodeDecodeError: "JSON.ENCODING",
    json.JSONDecodeError: "JSON.SYNTAX",
    KeyError: "SCHEMA.MISSING_FIELD",
}


def load(request: dict[str, Any]) -> dict[str, Any]:
    try:
        weights = read(request["path"])
    except tuple(CODES) as error:
        return {"status": "rejection", "code": CODES[type(error)], "message": f"{type(error).__name__}: {error}"[:200]}
    tensors = {
        name: {"dtype": dtype, "shape": shape, "base64": base64.b64encode(data).decode()}
        for name, (dtype, shape, data) in weights.items()
    }
    return {"status": "results", "tensors": tensors}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    serve({"implementation": "naive", "version": "0", "features": FEATURES}, {"load": load})
