"""Imports run one way: load_quantized <- writer <- reference_quantizer, there from room to room, and nowhere in a circle;
conformance shares no code with tqformat.
"""

import ast
import hashlib
import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_python

from tqformat import __version__

OURS = ("tqformat", "reference_quantizer", "conformance", "schemas", "tests", "benchmarks")


def imports(file: Path) -> dict[str, bool]:
    """Absolute module name -> whether it is imported when the file is; relative imports and names are resolved."""
    package = list(file.relative_to(ROOT).with_suffix("").parts[:-1])
    found: dict[str, bool] = {}

    def visit(node: ast.AST, top: bool) -> None:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            argument = node.args[0]
            names = [argument.value if isinstance(argument, ast.Constant) else "?"]
        for name in names:
            found[name] = found.get(name, False) or top
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child, top)
            return
        inside = top and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(file.read_text("utf-8")), True)
    return found


def roots(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(file)}


def sources(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, package
    return files


def ids(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_the_loader_stands_alone() -> None:
    found = roots(ROOT / "tqformat" / "load_quantized.py")
    assert not found & set(OURS)
    third = {name for name in found if name not in sys.stdlib_module_names}
    assert third <= {"torch", "safetensors", "transformers", "accelerate", "huggingface_hub"}
    at_once = {name.partition(".")[0] for name, top in imports(ROOT / "tqformat" / "load_quantized.py").items() if top}
    assert at_once <= set(sys.stdlib_module_names)
    assert "__future__" not in found  # with @dataclass it fails in a module that is not in sys.modules


@pytest.mark.parametrize("file", sources("tqformat"), ids=ids)
def test_tqformat_imports_no_other_package_of_ours(file: Path) -> None:
    assert roots(file) & set(OURS) <= {"tqformat"}


def test_reading_does_not_import_writing() -> None:
    assert not [
        name
        for name in imports(ROOT / "tqformat" / "embed.py")
        if "writer" in name and imports_at_once("embed.py", name)
    ]
    writer = imports(ROOT / "tqformat" / "writer.py")
    assert not [name for name in writer if name.startswith(("tqformat.embed", "tqformat.__main__"))]


def imports_at_once(file: str, name: str) -> bool:
    return imports(ROOT / "tqformat" / file)[name]


@pytest.mark.parametrize("file", sources("reference_quantizer"), ids=ids)
def test_the_quantizer_does_not_import_conformance(file: Path) -> None:
    assert roots(file) & set(OURS) <= {"reference_quantizer", "tqformat", "schemas"}


@pytest.mark.parametrize("file", sources("conformance"), ids=ids)
def test_conformance_shares_no_code_with_tqformat(file: Path) -> None:
    allowed = {"conformance", "schemas"}
    if (
        ROOT / "conformance" / "adapters"
    ) in file.parents:  # these run tqformat as one of the implementations under test
        allowed |= {"tqformat", "torch"}
    if file.name == "loader_driver.py":  # it runs a loader, and imports what that will need
        allowed |= {"torch"}
    assert not roots(file) & {"tqformat", "torch", "safetensors", "reference_quantizer", "transformers"} - allowed
    assert roots(file) & set(OURS) <= allowed


# The rooms of the reference quantizer, from the ground up: each may use those before it.
ROOMS = (
    "checkpoint",
    "foreign",
    "codes",
    "model",
    "evaluation",
    "calibration",
    "planning",
    "job",
    "release",
    "commands",
)


def test_rooms_use_those_below_them() -> None:
    files = sources("reference_quantizer")
    assert {file.parent.name for file in files} == {"reference_quantizer", *ROOMS}
    for file in files:
        if file.parent.name not in ROOMS:
            continue
        used = {name.split(".")[1] for name in imports(file) if name.startswith("reference_quantizer.")} & set(ROOMS)
        assert used <= set(ROOMS[: ROOMS.index(file.parent.name) + 1]), file


def import_graph(files: list[Path]) -> dict[Path, set[Path]]:
    """Which of `files` each of them imports, at once or later; a package stands for its __init__."""
    known = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}
    return {file: {known[name] for name in imports(file) if name in known} - {file} for file in files}


def find_circle(graph: dict[Path, set[Path]]) -> list[Path]:
    """Files that import each other in a circle; empty where there are none."""
    while free := [file for file, used in graph.items() if not used & graph.keys()]:
        graph = {file: used for file, used in graph.items() if file not in free}
    return sorted(graph)


@pytest.mark.parametrize("package", ["tqformat", "reference_quantizer", "conformance", "benchmarks", "fuzz"])
def test_no_circle_of_imports(package: str) -> None:
    graph = import_graph(sources(package))
    faces = {file for file in graph if file.name == "__init__.py"}  # they show what is inside, or nothing
    assert not find_circle({file: used - faces for file, used in graph.items() if file not in faces})


def test_this_test_can_see_a_circle() -> None:
    a, b, c = (Path(name) for name in "abc")
    assert find_circle({a: {b}, b: {c}, c: {b}}) == [a, b, c] and find_circle({a: {b, c}, b: {c}, c: set()}) == []


def test_this_test_can_see_an_import(tmp_path: Path) -> None:
    inner = ROOT / "tqformat" / "__main__.py"
    assert {"tqformat.load_quantized", "tqformat.load_quantized.Repo"} <= imports(inner).keys()
    assert imports(inner)["tqformat.writer"] is False and imports(inner)["tqformat.load_quantized"] is True


def test_importing_tqformat_imports_no_torch() -> None:
    code = (
        "import sys, tqformat; tqformat.read_manifest, tqformat.load;"
        "print(sorted({'torch', 'numpy', 'safetensors', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = run_python("-c", code)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_the_loader_is_a_release_that_the_suite_knows() -> None:
    digest = hashlib.sha256((ROOT / "tqformat" / "load_quantized.py").read_bytes()).hexdigest()
    known = json.loads((ROOT / "conformance" / "known_loaders.json").read_text())
    assert digest in known[__version__], f"the loader changed: list {digest} in conformance/known_loaders.json"
