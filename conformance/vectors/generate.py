"""Writes the committed conformance vectors, byte for byte reproducibly, and the codes of each rule into SPEC.md.

python -m conformance.vectors.generate            write conformance/vectors/v1, and the table in section 17 of SPEC.md
python -m conformance.vectors.generate --check    exit 1 if the files differ from what would be written
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from conformance import checks_binding, checks_data, checks_decode, checks_structure  # noqa: F401 (lists the checks)
from conformance.check import CHECKS
from conformance.vectors import MANIFEST, ROOT
from conformance.vectors.builder import Json, compact
from conformance.vectors.invalid import derived
from conformance.vectors.known import KNOWN
from conformance.vectors.recipes import Derived
from conformance.vectors.valid import valid

SPEC = Path(__file__).parents[2] / "SPEC.md"
LIMITS = {"seconds": 5, "megabytes": 200}

# Rules that no repository can violate or show, with the reason.
WITHOUT_VECTOR = {
    "TQ-PAY-9": "advice to writers",
    "TQ-CODE-7": "advice to writers",
    "TQ-TRAN-10": "advice to writers",
    "TQ-NUM-7": "concerns a reader's interface: conversion to another dtype on request",
    "TQ-TIE-2": "concerns model building",
    "TQ-VER-5": "advice to writers",
    "TQ-ERR-1": "concerns the form of reports; every case states codes and pointer",
    "TQ-ERR-3": "concerns what readers may leave to validators; every invalid case names its judge",
    "TQ-SEC-3": "no file shows how a product is computed; TQ-PAY-4 has shapes whose product overflows 64 bits",
    "TQ-SEC-4": "concerns model building (BIND.MODEL)",
    "TQ-SEC-5": "a statement about trust",
    "TQ-SEC-6": "a statement about other libraries",
    "TQ-VEC-1": "says how vectors are written",
    "TQ-VEC-2": "says how vectors are written",
} | {
    f"TQ-EVAL-{k}": "concerns evaluation files, which no reader reads; the validator's own tests have them tampered with"
    for k in range(1, 6)
}
# Rules that say how to decode and that no single file can break: a wrong decoder is caught by the values of valid cases.
ONLY_VALID = {
    "TQ-CODE-3": "order of tiles and symbols",
    "TQ-CODE-6": "symbols of a stream",
    "TQ-BOOK-6": "order of the elements of an entry",
    "TQ-TRAN-2": "identity",
    "TQ-TRAN-3": "Hadamard transform",
    "TQ-NUM-3": "the exact value",
    "TQ-NUM-4": "the tolerance",
    "TQ-NUM-5": "rounding",
    "TQ-STAGE-1": "decoding of a stage",
    "TQ-STAGE-2": "sum of the stages",
    "TQ-PAY-7": "order of elements and bytes",
    "TQ-LIM-2": "decoding in groups of rows; every case has a limit of memory, and runners measure it",
    "TQ-FUSE-1": "products without decoding",
    "TQ-FUSE-2": "grades of products",
    "TQ-FUSE-3": "products in vectors",
}


def dump(document: Json) -> bytes:
    """JSON text with one line for each key of the document, and of each object directly in it."""
    lines = []
    for key, value in document.items():
        if isinstance(value, dict) and value:
            inner = ",\n".join(f"  {compact(k)}: {compact(v)}" for k, v in value.items())
            lines.append(f" {compact(key)}: {{\n{inner}\n }}")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            inner = ",\n".join(f"  {compact(v)}" for v in value)
            lines.append(f" {compact(key)}: [\n{inner}\n ]")
        else:
            lines.append(f" {compact(key)}: {compact(value)}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def valid_files() -> dict[str, bytes]:
    """The files of all valid cases that store a repository, by path below v1."""
    out: dict[str, bytes] = {}
    for case in valid():
        where = f"{case.result}/{case.id}"
        manifest, files, expected, products = case.repo.build()
        record = {
            "id": case.id,
            "rules": case.rules,
            "features": manifest["features"],
            "base": None,
            "mutation": None,
            "result": case.result,
            "judge": "reader",
            "codes": case.codes,
            "pointer": None,
            "reason": case.reason,
            "limits": LIMITS,
        }
        if f"{where}/case.json" in out:
            raise ValueError(f"two cases {case.id}")
        out[f"{where}/case.json"] = dump(record)
        out[f"{where}/expected.json"] = dump(expected)
        if products:
            out[f"{where}/products.json"] = dump({"products": products})
        out[f"{where}/repo/{MANIFEST}"] = case.manifest_text(manifest).encode()
        for name, content in files.items():
            out[f"{where}/repo/{name}"] = content
    return out


def derived_files(stored: dict[str, bytes]) -> dict[str, bytes]:
    """The files of all cases that are recipes, by path below v1; `stored` holds the cases they start from."""
    out: dict[str, bytes] = {}
    for case in derived():
        base = json.loads(stored[f"{case.base}/case.json"])
        where = f"{case.result}/{case.id}"
        if f"{where}/case.json" in out | stored:
            raise ValueError(f"two cases {case.id}")
        out[f"{where}/case.json"] = dump(derived_record(case, base["features"]))
        if case.result != "invalid":
            out[f"{where}/expected.json"] = stored[f"{case.base}/expected.json"]
    return out


def derived_record(case: Derived, features: list[str]) -> Json:
    """The content of `case.json` of a case that is a recipe."""
    return {
        "id": case.id,
        "rules": case.rules,
        "features": features,
        "base": case.base,
        "mutation": case.mutation,
        "result": case.result,
        "judge": case.judge,
        "codes": case.codes,
        "pointer": case.pointer,
        "reason": case.reason,
        "limits": LIMITS | case.limits,
        "recipe": case.steps,
    }


def spec_rules() -> list[str]:
    """The numbers of all rules in SPEC.md, in its order."""
    return re.findall(r"^- \*\*\[(TQ-[A-Z]+-\d+)\]\*\*", SPEC.read_text(encoding="utf-8"), flags=re.MULTILINE)


def rule_table(files: dict[str, bytes]) -> dict[str, dict[str, list[str]]]:
    """Rule -> result (or `known`) -> ids of the cases that name the rule."""
    table: dict[str, dict[str, list[str]]] = {rule: {} for rule in spec_rules()}
    for path, content in sorted(files.items()):
        result = path.split("/")[0]
        if path.endswith("/case.json") or result == "known":
            for rule in json.loads(content)["rules"]:
                table[rule].setdefault(result, []).append(path.split("/", 1)[1].removesuffix("/case.json"))
    return table


def holes(table: dict[str, dict[str, list[str]]]) -> list[str]:
    """What is wrong with the table: rules without the vectors that they need, and exceptions that are none."""
    problems = []
    for rule, vectors in table.items():
        if rule in WITHOUT_VECTOR:
            if vectors:
                problems.append(f"{rule} has vectors, but stands among the rules without")
        elif rule in ONLY_VALID:
            if "valid" not in vectors or "invalid" in vectors:
                problems.append(f"{rule} should have valid vectors only")
        elif "invalid" not in vectors:
            problems.append(f"{rule} has no invalid vector")
    problems += [f"{rule} is not in SPEC.md" for rule in [*WITHOUT_VECTOR, *ONLY_VALID] if rule not in table]
    return problems


def rules_document(table: dict[str, dict[str, list[str]]]) -> bytes:
    """The Markdown table rule -> vectors."""

    def cell(ids: list[str]) -> str:
        more = f" and {len(ids) - 6} more" if len(ids) > 6 else ""
        return ", ".join(ids[:6]) + more

    lines = [
        "# Rules and their vectors",
        "",
        "Written by `python -m conformance.vectors.generate`; do not edit.",
        "",
        "| rule | valid | invalid | acceptable | known |",
        "|---|---|---|---|---|",
    ]
    for rule, vectors in table.items():
        if rule in WITHOUT_VECTOR:
            lines.append(f"| {rule} | none: {WITHOUT_VECTOR[rule]} | | | |")
        else:
            invalid = cell(vectors.get("invalid", [])) or f"none: {ONLY_VALID.get(rule, '')}"
            others = [cell(vectors.get(column, [])) for column in ("acceptable", "known")]
            lines.append(f"| {rule} | {cell(vectors.get('valid', []))} | {invalid} | {' | '.join(others)} |")
    return ("\n".join(lines) + "\n").encode()


TABLE = "| rule | codes |\n|---|---|\n"


def code_table(files: dict[str, bytes]) -> str:
    """The lines of section 17 of SPEC.md that say which codes may be given for a breach of each rule.

    They are those that the invalid cases allow whose first rule it is, and those of the validator's checks. The rules of
    section 20 name theirs.
    """
    spec = SPEC.read_text(encoding="utf-8")
    order = re.findall(r"`([A-Z]+\.[A-Z_]+)`", spec[spec.index("| code | cause |") :])
    codes: dict[str, set[str]] = {rule: set() for rule in spec_rules()}
    for path, content in files.items():
        if path.startswith("invalid/") and path.endswith("/case.json"):
            case = json.loads(content)
            codes[case["rules"][0]].update(case["codes"])
    for each in CHECKS.values():
        codes[each.rule].add(each.code)
    rows = {
        rule: found - {"LIMIT.MEMORY"} for rule, found in codes.items() if not rule.startswith(("TQ-ERR", "TQ-EVAL"))
    }
    return "".join(
        f"| {rule} | {', '.join(f'`{code}`' for code in sorted(found, key=order.index))} |\n"
        for rule, found in rows.items()
        if found
    )


def spec_with_table(files: dict[str, bytes]) -> str:
    """SPEC.md with the table of `code_table` in its place."""
    before, _, rest = SPEC.read_text(encoding="utf-8").partition(TABLE)
    return before + TABLE + code_table(files) + rest[rest.index("\n## ") :]


def generate() -> dict[str, bytes]:
    """All files below v1: path -> content."""
    files = valid_files()
    files |= derived_files(files)
    files |= {f"known/{name}.json": dump(known()) for name, known in KNOWN.items()}
    files["RULES.md"] = rules_document(rule_table(files))
    return files


def on_disk() -> dict[str, bytes]:
    """The files that lie below v1 now."""
    return {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in ROOT.rglob("*") if path.is_file()}


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks the vectors; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m conformance.vectors.generate", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the files on disk differ")
    options: Any = parser.parse_args(arguments)
    wanted, found = generate(), on_disk()
    problems = holes(rule_table(wanted))
    for problem in problems:
        print(f"rule table: {problem}", file=sys.stderr)
    differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    spec = spec_with_table(wanted)
    if spec != SPEC.read_text(encoding="utf-8"):
        problems.append("section 17 of SPEC.md has other codes")
        if not options.check:
            SPEC.write_text(spec, encoding="utf-8")
    if options.check:
        for name in differing:
            print(f"differs: {name}", file=sys.stderr)
        return 1 if differing or problems else 0
    for name in differing:
        path = ROOT / name
        if name in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(wanted[name])
        else:
            path.unlink()
    print(f"{len(wanted)} files, {len(differing)} written or removed")
    return 1 if holes(rule_table(wanted)) else 0


if __name__ == "__main__":
    sys.exit(main())
