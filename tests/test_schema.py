"""schemas/manifest.schema.json: it says what the reader's dataclasses say, and it ships."""

import ast
import json
import re
import shutil
import zipfile
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import jsonschema
import pytest
from conftest import ROOT, run_python

from tqformat import load_quantized as reader
from tqformat.load_quantized import MANIFEST, Codebook, File, Manifest, Stage, Transform, Weight

SCHEMA: dict[str, Any] = json.loads((ROOT / "schemas" / "manifest.schema.json").read_text("utf-8"))
TABLES = {
    "Manifest": Manifest,
    "File": File,
    "Transform": Transform,
    "Codebook": Codebook,
    "Stage": Stage,
    "Tensor": Weight,
}
AREAS = "PATH|JSON|SCHEMA|CONTAINER|BIND|PACK|DATA|LIMIT|UNSUPPORTED|INTERNAL"


@pytest.mark.parametrize("name", TABLES)
def test_properties_are_the_dataclass_fields(name: str) -> None:
    table, definition = TABLES[name], SCHEMA["$defs"][name]
    assert sorted(definition["properties"]) == sorted(f.name for f in fields(table))
    needed = [f.name for f in fields(table) if f.default is MISSING and f.default_factory is MISSING]
    assert definition["required"] == needed
    assert definition["additionalProperties"] is False


@pytest.mark.parametrize("name", TABLES)
def test_ranges_are_those_of_the_dataclass_fields(name: str) -> None:
    hints, checked = get_type_hints(TABLES[name], include_extras=True), 0
    for key, rule in SCHEMA["$defs"][name]["properties"].items():
        rule = SCHEMA["$defs"][rule["$ref"].rpartition("/")[2]] if "$ref" in rule else rule
        hint = hints[key]
        if type(None) in get_args(hint):
            hint = next(a for a in get_args(hint) if a is not type(None))
        if get_origin(hint) is tuple:
            hint, rule = get_args(hint)[0], rule["items"]
            rule = SCHEMA["$defs"][rule["$ref"].rpartition("/")[2]] if "$ref" in rule else rule
        if get_origin(hint) is Annotated and get_args(hint)[0] is int:
            low = 1 if key == "factors" else get_args(hint)[1][0]  # the reader refuses a factor 1 elsewhere
            assert (rule["minimum"] - (key == "factors"), rule["maximum"]) == (low, get_args(hint)[1][1]), key
            checked += 1
    assert checked or name == "Manifest"


def test_enumerations_are_those_of_the_reader() -> None:
    definitions = SCHEMA["$defs"]
    assert definitions["Tensor"]["properties"]["dtype"]["enum"] == list(reader.DTYPES)
    assert definitions["Manifest"]["properties"]["features"]["items"]["enum"] == list(reader.FEATURES)
    assert definitions["Manifest"]["properties"]["loader_kind"]["enum"] == list(reader.LOADER_KINDS)
    for name, key in (("File", "role"), ("Transform", "kind"), ("Tensor", "kind")):
        assert tuple(definitions[name]["properties"][key]["enum"]) == get_args(get_type_hints(TABLES[name])[key])


def test_it_is_a_schema_and_accepts_what_the_writer_writes(settings_repo: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(json.loads((settings_repo / MANIFEST).read_text("utf-8")), SCHEMA)


def test_every_object_is_closed_and_has_extra() -> None:
    objects = {k: d for k, d in SCHEMA["$defs"].items() if "properties" in d}
    assert len(objects) >= 10
    for name, definition in objects.items():
        assert definition["additionalProperties"] is False and "extra" in definition["properties"], name


def _codes_in_spec() -> set[str]:
    section = (ROOT / "SPEC.md").read_text("utf-8").split("\n## 17 ")[1].split("\n## 18 ")[0]
    rows = [line.split("|")[1] for line in section.split("\n") if line.startswith("| `")]
    return set(re.findall(rf"`((?:{AREAS})\.[A-Z_]+)`", " ".join(rows)))


@pytest.mark.parametrize("file", sorted((ROOT / "tqformat").glob("*.py"), key=str), ids=lambda path: path.name)
def test_every_error_code_in_the_source_is_in_the_specification(file: Path) -> None:
    texts = [node.value for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Constant)]
    used = {text for text in texts if isinstance(text, str) and re.fullmatch(rf"({AREAS})\.[A-Z_]+", text)}
    assert used <= _codes_in_spec()
    assert file.name != "load_quantized.py" or len(used) > 30


def test_the_wheel_holds_schemas_and_type_marker(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in ("tqformat", "reference_quantizer", "schemas"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "conformance", source / "conformance", ignore=shutil.ignore_patterns("v1", "__pycache__"))
    hidden = "conformance/vectors/v1/valid/repository/unlisted"  # a case of files that begin with a dot, and others
    shutil.copytree(ROOT / hidden, source / hidden)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    built = run_python("-m", "pip", "wheel", *options, "-w", str(tmp_path / "out"), str(source))
    assert built.returncode == 0, built.stderr[-2000:]
    (wheel,) = (tmp_path / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        shipped = json.loads(archive.read("schemas/manifest.schema.json"))
        loader = archive.read("tqformat/load_quantized.py")
    assert shipped == SCHEMA and loader == (ROOT / "tqformat" / "load_quantized.py").read_bytes()
    assert {"tqformat/py.typed", *(f"schemas/{p.name}" for p in (ROOT / "schemas").glob("*.json"))} <= names
    data = ("codes/codebooks.npz", "release/templates/card.md.j2")
    assert {f"reference_quantizer/{name}" for name in data} <= names
    assert {str(p.relative_to(ROOT)) for p in (ROOT / hidden).rglob("*") if p.is_file()} <= names
    assert not [name for name in names if name.startswith("tests/")]
