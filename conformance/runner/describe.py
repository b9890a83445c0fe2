"""What is given to a writer, and what it wrote judged.

The description of a repository is its manifest without what a writer has to work out itself (`format`, `format_version`,
`features`, `generator`, `files`, `accounting`, `effective_bits`, storage names), and with the tensors in the places of
their storage names; `codes` becomes `symbols`, unpacked. PROTOCOL.md shows one.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np

from conformance import (
    checks_binding,  # noqa: F401 (importing the checks lists them)
    checks_data,  # noqa: F401
    checks_structure,  # noqa: F401
    oracle,
)
from conformance.check import judge
from conformance.folder import Folder
from conformance.oracle import Payload
from conformance.runner.protocol import Answer, Json
from conformance.runner.score import Case, Outcome, expected_weights, judge_common, said, tied_weights
from conformance.subject import Options, Subject

OMITTED = ("format", "format_version", "features", "generator", "files", "accounting", "extra")


def tensor(dtype: str, shape: tuple[int, ...], data: bytes) -> Json:
    return {"dtype": dtype, "shape": list(shape), "base64": base64.b64encode(data).decode()}


def without_extra(entry: Json) -> Json:
    return {key: value for key, value in entry.items() if key != "extra"}


def with_tensors(entry: Json, keys: tuple[str, ...], payload: Payload) -> Json:
    """`entry` with the tensors in the places of their storage names."""
    return {
        key: tensor(*payload[value]) if key in keys and value is not None else value
        for key, value in without_extra(entry).items()
    }


def describe_stage(stage: Json, shape: list[int], dimension: int, payload: Payload) -> Json:
    """A stage with `symbols` U16 [tiles, n] in the place of `codes`, and its scales and offsets."""
    tr, tc = stage.get("tile") or (1, shape[-1])
    n, bits = tr * tc // dimension, stage["bits"]
    _, dims, raw = payload[stage["codes"]]
    symbols = oracle.unpack(np.frombuffer(raw, np.uint8).reshape(dims), n, bits, stage.get("window") or bits)
    described = with_tensors(stage, ("scales", "outer_scales", "offsets", "outer_offsets"), payload)
    del described["codes"]
    return described | {"symbols": tensor("U16", symbols.shape, symbols.astype("<u2").tobytes())}


def describe(repo: Path) -> Json:
    """The description of a valid repository."""
    manifest, payload = oracle.read_repo(repo)
    described: dict[str, Any] = {key: value for key, value in manifest.items() if key not in OMITTED}
    for table, keys in (("transforms", ("matrix", "pairs", "angles", "index")), ("codebooks", ("tensor",))):
        described[table] = {id: with_tensors(entry, keys, payload) for id, entry in manifest[table].items()}
    tensors = described["tensors"] = {}
    for name, weight in manifest["tensors"].items():
        entry = tensors[name] = with_tensors(weight, ("data", "column_scale"), payload)
        entry.pop("effective_bits", None)
        if "stages" in weight:
            dimensions = [manifest["codebooks"][stage["codebook"]]["dimension"] for stage in weight["stages"]]
            entry["stages"] = [
                describe_stage(stage, weight["shape"], dimension, payload)
                for stage, dimension in zip(weight["stages"], dimensions, strict=True)
            ]
    return described


def violations(repo: Path) -> list[str]:
    """What the validator finds in a repository, up to L2."""
    folder = Folder(repo)
    try:
        judgement = judge(Subject(folder, Options()), "L2")
    finally:
        folder.close()
    found = [f"{v.code} {v.pointer or v.file}: {v.message}" for v in judgement.violations]
    return found or ([] if judgement.state("L2") == "PASS" else ["the validator did not reach L2"])


def wrong_repository(case: Case, original: Path, written: Path) -> list[str]:
    """Everything that is wrong with what a writer made of the description of `original`."""
    if not written.is_dir():
        return ["nothing was written"]
    faults = violations(written)
    if faults:
        return faults
    wanted, found = expected_weights(case), oracle.decode_repo(written)
    faults = [f"{name!r:.80} is missing or was added" for name in sorted(wanted.keys() ^ found.keys())]
    for name in wanted.keys() & found.keys():
        want, got = wanted[name], found[name]
        if (got.dtype, got.shape, got.data) != (want.dtype, want.shape, want.data):
            faults.append(f"{name!r:.80}: another dtype, shape or passthrough data")
        elif want.data is None and want.exact.size and (abs(got.exact - want.exact) > want.tolerance).any():
            faults.append(f"{name!r:.80}: other values")
    return faults + (["other ties"] if tied_weights(case, written) != tied_weights(case, original) else [])


def judge_write(case: Case, answer: Answer, original: Path, written: Path) -> Outcome:
    """Judges the answer to write; a writer may skip what it cannot write."""
    outcome = judge_common(case, "write", answer)
    if answer.status == "skipped":
        outcome.not_implemented = True
    else:
        faults = wrong_repository(case, original, written) if answer.status == "results" else [said(answer)]
        outcome.give("written", not faults, "; ".join(faults[:3]))
    return outcome
