"""One answer judged: safe, precise, bounded, correct, stable, multiplied, written.

| score | applies to | is given for |
|---|---|---|
| safe | invalid input that every reader must reject | a rejection |
| precise | rejections of invalid or acceptable input | one of the codes that the case allows |
| bounded | answers, and ends for want of time or memory | staying within the case's time and memory |
| correct | valid input; acceptable input that is decoded | every weight and alias as [TQ-NUM-5] wants it |
| stable | everything | an answer that is neither a crash nor errored |
| multiplied | products of valid input, where the implementation offers them | every y as [TQ-FUSE-2] wants it, to the grade that the implementation states |
| written | valid input given to a writer | a repository that passes L2 and decodes to the same weights |
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from conformance import oracle
from conformance.oracle import Decoded, Floats
from conformance.runner.protocol import Answer, Json
from conformance.vectors import MANIFEST, SIZES

SCORES = {
    "safe": "invalid input is rejected",
    "precise": "rejections carry an allowed code",
    "bounded": "time and memory stay within the limits",
    "correct": "decoded values are right",
    "stable": "no crash, nothing errored",
    "multiplied": "products reach the stated grade",
    "written": "written repositories conform",
}
UNKNOWN_FEATURE = "SCHEMA.UNKNOWN_FEATURE"


@dataclass(frozen=True)
class Case:
    """A vector: its directory, and its case.json."""

    path: Path
    about: Json

    @property
    def id(self) -> str:
        return f"{self.about['result']}/{self.about['id']}"

    @property
    def area(self) -> str:
        return str(self.about["id"].partition("/")[0])


@dataclass
class Outcome:
    """What came of one operation on one case. A score that does not apply is absent; `notes` says why one was not given."""

    case: Case
    operation: str
    answer: Answer
    not_implemented: bool = False
    scores: dict[str, bool] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    grade: int | None = None  # of a product: the lowest of its rows [TQ-FUSE-2]

    def give(self, score: str, ok: bool, note: str) -> None:
        self.scores[score] = ok
        if not ok:
            self.notes[score] = note

    @property
    def failed(self) -> bool:
        return not all(self.scores.values())


def said(answer: Answer) -> str:
    """An answer in a few words."""
    body = answer.body
    if answer.status == "rejection":
        return f"rejected with {body['code']}: {body.get('message', '')}".rstrip(": ")
    if answer.status == "results":
        return "accepted"
    return f"{answer.status}: {body.get('reason', '') if answer.status == 'skipped' else body.get('message', '')}"


def expected_weights(case: Case) -> dict[str, Decoded]:
    """The decoded weights of expected.json; aliases are not repeated in it."""
    wanted = {}
    for name, entry in json.loads((case.path / "expected.json").read_text("utf-8")).items():
        shape = tuple(entry["shape"])
        if "bytes" in entry:
            wanted[name] = Decoded(entry["dtype"], shape, np.empty(0), np.empty(0), bytes.fromhex(entry["bytes"]))
        else:
            exact, tolerance = (
                # [TQ-VEC-2] a list that is shorter than the weight repeats to its end
                np.resize(np.array([float.fromhex(x) for x in entry[key]], np.float64), shape)
                for key in ("exact", "tolerance")
            )
            wanted[name] = Decoded(entry["dtype"], shape, exact, tolerance)
    return wanted


def tied_weights(case: Case, repo: Path) -> dict[str, str]:
    """alias -> source of a repository that is valid or acceptable."""
    try:
        manifest = json.loads((repo / MANIFEST).read_text("utf-8"))
    except RecursionError:  # an acceptable depth is a change of the base that leaves its ties alone
        base = case.path.parents[2] / case.about["base"] / "repo"
        manifest = json.loads((base / MANIFEST).read_text("utf-8"))
    return dict(manifest.get("tied_weights") or {})


def tensor_bytes(tensor: Json, size: int, out: Path) -> bytes:
    """The `size` bytes of a tensor in an answer; raises ValueError if there are others."""
    if "base64" in tensor:
        try:
            data = base64.b64decode(tensor["base64"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"not base64: {error}") from None
    elif not size:
        data = b""
    elif not out.is_file():
        raise ValueError("an offset, but the file `out` was not written")
    else:
        with out.open("rb") as file:
            file.seek(min(tensor["offset"], out.stat().st_size))
            data = file.read(size)
    if len(data) != size:
        raise ValueError(f"{len(data)} bytes instead of {size}")
    return data


def wrong_weight(tensor: Json, wanted: Decoded, out: Path) -> str | None:
    """What is wrong with one decoded weight."""
    if tensor["dtype"] != wanted.dtype:
        return f"dtype {tensor['dtype']:.20} instead of {wanted.dtype}"
    if tuple(tensor["shape"]) != wanted.shape:
        return f"shape {tensor['shape']!s:.60} instead of {list(wanted.shape)}"
    try:
        data = tensor_bytes(tensor, math.prod(wanted.shape) * SIZES[wanted.dtype], out)
    except ValueError as error:
        return str(error)
    if wanted.data is not None:
        return None if data == wanted.data else "other bytes than the stored ones"
    values = oracle.to_float64((wanted.dtype, wanted.shape, data))
    wrong = ~oracle.is_correct(values, wanted)
    if not wrong.any():
        return None
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    got, exact, tolerance = (float(array[at]) for array in (values, wanted.exact, wanted.tolerance))
    text = f"{int(wrong.sum())} of {wrong.size} elements are wrong, the first at {list(at)}: "
    text += f"{got:.9g} instead of {exact:.9g} (tolerance {tolerance:.2g})"
    return text + ("; all of them are rounded towards zero" if truncated(values[wrong], wanted, wrong) else "")


def truncated(got: Floats, wanted: Decoded, wrong: Any) -> bool:
    """Whether elements are what cutting off bits, instead of rounding, makes of the exact values."""
    exact, steps = wanted.exact[wrong], {"F16": 2.0**-10, "BF16": 2.0**-7}.get(wanted.dtype, 0.0)
    return bool(np.all((np.abs(got) <= np.abs(exact)) & (np.abs(got - exact) <= steps * np.abs(exact))))


def wrong_weights(case: Case, repo: Path, tensors: Json, out: Path) -> list[str]:
    """Everything that is wrong with the decoded tensors of an answer; aliases are expected like their sources."""
    wanted = expected_weights(case)
    wanted |= {alias: wanted[source] for alias, source in tied_weights(case, repo).items()}
    faults = [f"{name!r:.80} is missing" for name in wanted if name not in tensors]
    faults += [f"{name!r:.80} is no weight of this repository" for name in tensors if name not in wanted]
    for name, weight in wanted.items():
        found = wrong_weight(tensors[name], weight, out) if name in tensors else None
        faults += [f"{name!r:.80}: {found}"] if found else []
    return faults


def judge_common(case: Case, operation: str, answer: Answer) -> Outcome:
    """The scores that hold for every operation: stable and bounded."""
    outcome = Outcome(case, operation, answer)
    outcome.give("stable", answer.status not in ("crash", "errored"), said(answer))
    if answer.status == "crash":
        if answer.body["reason"] in ("timeout", "memory"):
            outcome.give("bounded", False, answer.body["message"])
    else:
        limit = case.about["limits"]["megabytes"]
        within = answer.megabytes is None or answer.megabytes <= limit
        outcome.give("bounded", within, f"took {answer.megabytes or 0:.0f} MiB; {limit} MiB are allowed")
    return outcome


def judge_load(case: Case, answer: Answer, features: set[str], repo: Path, out: Path) -> Outcome:
    """Judges the answer to load; `features` are those that the implementation says it has."""
    outcome = judge_common(case, "load", answer)
    result, codes, status = case.about["result"], case.about["codes"], answer.status
    if not set(case.about["features"]) <= features and (
        status == "skipped" or (status == "rejection" and answer.body["code"] == UNKNOWN_FEATURE)
    ):
        outcome.not_implemented = True
        return outcome
    # [TQ-ERR-3] what only validators judge is not held against a reader
    if result == "invalid" and case.about["judge"] == "reader":
        outcome.give("safe", status == "rejection", said(answer))
    if result != "valid" and status == "rejection":
        outcome.give("precise", answer.body["code"] in codes, f"{said(answer)}; expected {' or '.join(codes)}")
    if result == "valid" or (result == "acceptable" and status == "results"):
        faults = wrong_weights(case, repo, answer.body["tensors"], out) if status == "results" else [said(answer)]
        outcome.give("correct", not faults, "; ".join(faults[:3]) + (f"; {len(faults) - 3} more" * (len(faults) > 3)))
    return outcome


def products(case: Case) -> list[Json]:
    """The products of a case: weight, x, y and bound, as products.json has them; most cases have none."""
    path = case.path / "products.json"
    return list(json.loads(path.read_text("utf-8"))["products"]) if path.is_file() else []


def judge_product(case: Case, answer: Answer, product: Json) -> Outcome:
    """Judges the answer to product by the grade that it states; an implementation may skip what it cannot multiply."""
    outcome = judge_common(case, "product", answer)
    if answer.status == "skipped":
        outcome.not_implemented = True
        return outcome
    if answer.status != "results":
        outcome.give("multiplied", False, said(answer))
        return outcome
    y, bound = ([float.fromhex(text) for text in product[key]] for key in ("y", "bound"))
    tensor, stated = answer.body["y"], answer.body["grade"]
    if tensor["dtype"] not in ("F32", "F64") or tensor["shape"] != [len(y)]:
        shown = f"{tensor['dtype']:.20} {tensor['shape']!s:.60}"
        outcome.give("multiplied", False, f"y is {shown} instead of F32 or F64 [{len(y)}]")
        return outcome
    try:
        data = tensor_bytes(tensor, len(y) * SIZES[tensor["dtype"]], Path())
    except ValueError as error:
        outcome.give("multiplied", False, str(error))
        return outcome
    got = np.frombuffer(data, "<f4" if tensor["dtype"] == "F32" else "<f8").astype(np.float64).tolist()
    grades = [oracle.grade(*row) for row in zip(got, y, bound, strict=True)]
    outcome.grade = min(grades, default=oracle.BEST_GRADE)
    worst = grades.index(outcome.grade) if grades else 0
    note = f"row {worst}: grade {outcome.grade}, {stated} was stated" + (
        f": {got[worst]:.9g} instead of {y[worst]:.9g}" if grades else ""
    )
    outcome.give("multiplied", outcome.grade >= stated, note)
    return outcome
