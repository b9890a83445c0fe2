"""The committed vectors: complete, reproducible, described by their schema, and what they say they are."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from conftest import ROOT as PROJECT

from conformance import oracle
from conformance.vectors import MANIFEST, ROOT, SIZES, cases, generate, load_case, materialise
from conformance.vectors.builder import expected

HERE = PROJECT
VALID, INVALID, ACCEPTABLE = cases("valid"), cases("invalid"), cases("acceptable")
SPEC = (PROJECT / "SPEC.md").read_text(encoding="utf-8")
# codes that no file can cause by itself
NOT_BY_FILES = {"BIND.LOADER", "LIMIT.MEMORY", "LIMIT.TIME", "BIND.MODEL", "DATA.DECODE", "INTERNAL.ERROR"}


def schema(name: str) -> Any:
    return json.loads((PROJECT / "schemas" / name).read_text(encoding="utf-8"))


CASE = jsonschema.Draft202012Validator(schema("vector.schema.json"))
EXPECTED = jsonschema.Draft202012Validator(
    schema("vector.schema.json") | {"$id": "urn:expected", "$ref": "#/$defs/Expected"}
)
MANIFEST_SCHEMA = jsonschema.Draft202012Validator(schema("manifest.schema.json"))


def name(case: Path) -> str:
    return "/".join(case.parts[-3:])


def spec_codes() -> set[str]:
    table = SPEC[SPEC.index("## 17 ") : SPEC.index("## 18 ")]
    return {
        code
        for line in table.splitlines()
        if line.startswith("| `")
        for code in re.findall(r"`([A-Z]+\.[A-Z_]+)`", line)
    }


def test_counts() -> None:
    assert len(VALID) >= 190 and len(INVALID) >= 600 and len(ACCEPTABLE) >= 4
    assert len(VALID) + len(INVALID) + len(ACCEPTABLE) == len(cases())
    assert sorted(path.name for path in (ROOT / "known").iterdir()) == [
        *("float8.json", "hadamard.json", "lloyd_max.json", "packing.json", "permutation.json"),
        *("products.json", "scales.json", "splitmix64.json", "stages.json"),
    ]


def test_generate_reproduces_the_committed_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--check"]) == 0, capsys.readouterr().err


def test_check_sees_a_changed_file(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = generate.generate()
    changed = wanted | {"RULES.md": wanted["RULES.md"] + b"\n"}
    monkeypatch.setattr(generate, "on_disk", lambda: changed)
    assert generate.main(["--check"]) == 1
    monkeypatch.setattr(generate, "on_disk", lambda: wanted | {"valid/stray": b""})
    assert generate.main(["--check"]) == 1


def test_check_sees_other_codes_in_the_specification(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "| TQ-TRAN-9 | `BIND.TENSOR`, `DATA.PERMUTATION` |" in SPEC
    other = tmp_path / "SPEC.md"
    other.write_text(
        SPEC.replace("| TQ-TRAN-9 | `BIND.TENSOR`, `DATA.PERMUTATION` |", "| TQ-TRAN-9 | `BIND.TENSOR` |"), "utf-8"
    )
    monkeypatch.setattr(generate, "SPEC", other)
    assert generate.main(["--check"]) == 1
    assert generate.main([]) == 0 and other.read_text("utf-8") == SPEC  # and puts it right


def test_tree_is_small() -> None:
    assert sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()) < 3_200_000


def test_rule_table_has_no_holes() -> None:
    table = generate.rule_table(generate.on_disk())
    assert len(table) >= 60
    assert generate.holes(table) == []


def test_holes_are_seen() -> None:
    table = generate.rule_table(generate.on_disk())
    without = {rule: vectors for rule, vectors in table.items() if rule != "TQ-CODE-5"} | {"TQ-CODE-5": {}}
    assert generate.holes(without) == ["TQ-CODE-5 has no invalid vector"]
    assert "TQ-NEW-1 has no invalid vector" in generate.holes(table | {"TQ-NEW-1": {"valid": ["a/b"]}})
    assert generate.holes(table | {"TQ-SEC-6": {"valid": ["a/b"]}}) != []
    assert generate.holes(table | {"TQ-CODE-3": {}}) != []


def test_every_code_has_a_vector() -> None:
    used = {code for case in INVALID for code in load_case(case)["codes"]}
    by_files = {code for code in spec_codes() - NOT_BY_FILES if not code.startswith(("UNSUPPORTED.", "EVAL."))}
    assert by_files <= used
    assert used <= spec_codes()
    # each of them is the only right answer somewhere
    alone = {case["codes"][0] for case in map(load_case, INVALID) if len(case["codes"]) == 1}
    assert by_files - alone <= {"JSON.DEPTH"}


@pytest.mark.parametrize("case", cases(), ids=name)
def test_case_is_described(case: Path) -> None:
    record = load_case(case)
    CASE.validate(record)
    assert name(case) == f"{record['result']}/{record['id']}"
    rules = set(generate.spec_rules())
    assert set(record["rules"]) <= rules
    if "recipe" in record:
        assert not (case / "repo").exists()
        assert (ROOT / record["base"] / "repo" / MANIFEST).is_file()
        # [one mutation] all other steps are consequences
        mutations = [s for s in record["recipe"] if s["op"] != "refresh" and not s.get("consequence")]
        assert len(mutations) == 1 or record["result"] == "valid"
    else:
        assert (case / "repo" / MANIFEST).is_file()
    assert (case / "expected.json").is_file() == (record["result"] != "invalid")


def tree(repo: Path) -> dict[str, Any]:
    """What a directory holds, without opening anything but regular files."""
    out: dict[str, Any] = {}
    for path in repo.rglob("*"):
        key = path.relative_to(repo).as_posix()
        if path.is_symlink():
            out[key] = path.readlink()
        else:
            out[key] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else path.stat().st_mode
    return out


@pytest.mark.parametrize("case", [case for case in cases() if not (case / "repo").is_dir()], ids=name)
def test_recipe_changes_its_base(case: Path, tmp_path: Path) -> None:
    base = ROOT / load_case(case)["base"] / "repo"
    assert tree(materialise(case, tmp_path / "repo")) != tree(base)


def test_materialise_copies_stored_repositories(tmp_path: Path) -> None:
    for k, case in enumerate(VALID[:3]):
        assert tree(materialise(case, tmp_path / str(k))) == tree(case / "repo")


@pytest.mark.parametrize("case", [*VALID, *ACCEPTABLE], ids=name)
def test_expected_is_the_oracles_output(case: Path, tmp_path: Path) -> None:
    record = load_case(case)
    document = json.loads((case / "expected.json").read_text())
    EXPECTED.validate(document)
    if record["codes"] == ["JSON.DEPTH"]:
        return  # Python's own parser may refuse it; the same tensors as the base
    repo = materialise(case, tmp_path / "repo")
    assert document == expected(oracle.decode_repo(repo))
    for tensor in document.values():
        for value in [float.fromhex(text) for text in tensor.get("exact", []) + tensor.get("tolerance", [])]:
            assert np.isfinite(value)


@pytest.mark.parametrize("case", [case for case in VALID if case.parent.name == "large"], ids=name)
def test_large_weights_show_a_group_of_rows_in_the_wrong_place(case: Path) -> None:
    """Rows repeat in expected.json, but never after a power of two of them."""
    (tensor,) = json.loads((case / "expected.json").read_text()).values()
    cols, count = tensor["shape"][-1], int(np.prod(tensor["shape"]))
    assert len(tensor["exact"]) == len(tensor["tolerance"]) < count / 100 and count > 2**18
    rows = np.array([float.fromhex(text) for text in tensor["exact"]]).reshape(-1, cols)
    whole = np.resize(rows, (count // cols, cols))
    assert all((whole[2**k :] != whole[: -(2**k)]).any(axis=1).all() for k in range(13))


PRODUCTS = jsonschema.Draft202012Validator(
    schema("vector.schema.json") | {"$id": "urn:products", "$ref": "#/$defs/Products"}
)


@pytest.mark.parametrize("case", [path.parent for path in sorted(ROOT.glob("valid/*/*/products.json"))], ids=name)
def test_products_are_the_oracles_output(case: Path) -> None:
    document = json.loads((case / "products.json").read_text())
    PRODUCTS.validate(document)
    manifest, payload = oracle.read_repo(case / "repo")
    for entry in document["products"]:
        x = np.array([float.fromhex(text) for text in entry["x"]])
        assert np.array_equal(x.astype(np.float32), x)
        y, bound = oracle.fused_product(manifest, payload, entry["weight"], x)
        assert (entry["y"], entry["bound"]) == ([v.hex() for v in y], [v.hex() for v in bound])


def test_acceptable_depth_expects_the_base() -> None:
    deep = [case for case in ACCEPTABLE if load_case(case)["codes"] == ["JSON.DEPTH"]]
    assert len(deep) == 3
    for case in deep:
        base = ROOT / load_case(case)["base"]
        assert (case / "expected.json").read_bytes() == (base / "expected.json").read_bytes()


@pytest.mark.parametrize("case", VALID, ids=name)
def test_valid_manifests_are_real(case: Path, tmp_path: Path) -> None:
    repo = materialise(case, tmp_path / "repo")
    manifest = json.loads((repo / MANIFEST).read_text(encoding="utf-8"))
    MANIFEST_SCHEMA.validate(manifest)
    for file, entry in manifest["files"].items():
        content = (repo / file).read_bytes()
        assert (entry["size"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    listed = set(manifest["files"]) | {MANIFEST, "README.md", "__pycache__"}
    assert all(path.name in listed or path.name.startswith(".") for path in repo.iterdir())

    _, payload = oracle.read_repo(repo)
    stages = [s for t in manifest["tensors"].values() for s in t.get("stages", [])]
    assert {s["codebook"] for s in stages} == set(manifest["codebooks"])
    assert {s["transform"] for s in stages} == set(manifest["transforms"])
    keys = ("codes", "scales", "outer_scales", "offsets", "outer_offsets")
    references = [s[key] for s in stages for key in keys if s.get(key)]
    references += [t[key] for t in manifest["tensors"].values() for key in ("data", "column_scale") if t.get(key)]
    references += [
        t[key] for t in manifest["transforms"].values() for key in ("matrix", "pairs", "angles", "index") if key in t
    ]
    references += [b["tensor"] for b in manifest["codebooks"].values() if b.get("tensor")]
    assert sorted(references) == sorted(payload)

    total = manifest["accounting"]
    scalars = {"quantized": 0, "passthrough": 0}
    original = 0
    for tensor in manifest["tensors"].values():
        count = int(np.prod(tensor["shape"], dtype=object))
        scalars[tensor["kind"]] += count
        original += count * SIZES[tensor["dtype"]]
        bits = sum(s["bits"] / manifest["codebooks"][s["codebook"]]["dimension"] for s in tensor.get("stages", []))
        assert abs(tensor.get("effective_bits", 0) - bits) <= 1e-6
    stored = sum(len(raw) for _, _, raw in payload.values())
    assert (total["original_bytes"], total["stored_bytes"]) == (original, stored)
    assert (total["quantized_scalars"], total["passthrough_scalars"]) == (scalars["quantized"], scalars["passthrough"])
    assert abs(total["ratio"] - (original / stored if stored else 0)) <= 0.001
    assert len(manifest["features"]) == len(set(manifest["features"]))
    assert set(load_case(case)["features"]) == set(manifest["features"])


def test_every_setting_is_exercised() -> None:
    """Every bit width, window, dtype, transform and feature occurs in some valid case."""
    manifests = [json.loads((case / "repo" / MANIFEST).read_text()) for case in VALID if (case / "repo").is_dir()]
    weights = [(m, t) for m in manifests for t in m["tensors"].values() if t["kind"] == "quantized"]
    stages = [(m, t, s) for m, t in weights for s in t["stages"]]
    assert {s["bits"] for _, _, s in stages} >= {1, 2, 3, 4, 5, 6, 7, 8, 16}
    assert max(s.get("window") or 0 for _, _, s in stages) == 16
    assert {m["codebooks"][s["codebook"]]["dimension"] for m, _, s in stages} >= {1, 2, 3, 4, 8, 64}
    assert {m["transforms"][s["transform"]]["kind"] for m, _, s in stages} == {
        "identity",
        "hadamard",
        "dense",
        "givens",
        "permutation",
    }
    assert {t["dtype"] for _, t in weights} == {"F32", "F16", "BF16"}
    assert {len(t["shape"]) for _, t in weights} == set(range(2, 9))
    assert {len(t["stages"]) for _, t in weights} >= {1, 2, 3, 8}
    passthrough = [t for m in manifests for t in m["tensors"].values() if t["kind"] == "passthrough"]
    assert {t["dtype"] for t in passthrough} == set(SIZES)
    assert {len(t["shape"]) for t in passthrough} >= {0, 1, 8}
    assert {feature for m in manifests for feature in m["features"]} == set(generate_features())
    assert {m["loader_kind"] for m in manifests} == set(
        MANIFEST_SCHEMA.schema["$defs"]["Manifest"]["properties"]["loader_kind"]["enum"]
    )


def generate_features() -> list[str]:
    return list(MANIFEST_SCHEMA.schema["$defs"]["Manifest"]["properties"]["features"]["items"]["enum"])


KNOWN = schema("known.schema.json")


@pytest.mark.parametrize("path", sorted((ROOT / "known").iterdir()), ids=lambda path: path.stem)
def test_known_answers_are_described(path: Path) -> None:
    document, reference = json.loads(path.read_text("utf-8")), {"$ref": f"#/$defs/{path.stem}"}
    judge = jsonschema.Draft202012Validator({"$defs": KNOWN["$defs"]} | reference)
    judge.validate(document)
    jsonschema.Draft202012Validator(KNOWN).validate(document)
    assert reference in KNOWN["anyOf"]
    assert not any(judge.is_valid({k: v for k, v in document.items() if k != key}) for key in document)
    assert not judge.is_valid(document | {"note": 1})
    assert set(document["rules"]) <= set(generate.spec_rules())


def test_starred_codes_are_those_that_only_validators_must_report() -> None:
    """[TQ-ERR-3] No case asks a reader for a code with a star; of the others each is asked of readers somewhere."""
    starred = set(re.findall(r"^\| `([A-Z]+\.[A-Z_]+)` \* \|", SPEC, re.MULTILINE))
    records = [load_case(case) for case in INVALID]
    asked = {code for record in records if record["judge"] == "reader" for code in record["codes"]}
    alone = {code for record in records if set(record["codes"]) <= starred for code in record["codes"]}
    assert all(record["judge"] == "validator" for record in records if set(record["codes"]) <= starred)
    assert {code for code in starred if not code.startswith("EVAL.")} == alone
    others = {code for code in spec_codes() - starred - NOT_BY_FILES if not code.startswith("UNSUPPORTED.")}
    assert others <= asked


def test_schema_refuses_what_is_no_case() -> None:
    record = load_case(INVALID[0])
    for wrong in (
        record | {"note": 1},
        record | {"codes": []},
        record | {"codes": ["NOT.A-CODE"]},
        record | {"base": None},
        {key: value for key, value in record.items() if key != "recipe"},
        record | {"recipe": [{"op": "explode"}]},
        record | {"limits": {}},
    ):
        assert not CASE.is_valid(wrong)
