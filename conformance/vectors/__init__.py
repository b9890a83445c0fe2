"""The conformance vectors: tiny repositories with a stated verdict, and `materialise`, which puts one on disk.

SPEC.md, section 21, says how they are written: the keys of `case.json`, and the operations of a recipe.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent / "v1"
MANIFEST = "quant_manifest.json"
CHUNK = 2**20
# bytes of an element [TQ-PAY-4]
SIZES = {
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"], 1),
    **dict.fromkeys(["U16", "I16", "F16", "BF16"], 2),
    **dict.fromkeys(["U32", "I32", "F32"], 4),
    **dict.fromkeys(["U64", "I64", "F64"], 8),
}


def cases(result: str = "*") -> list[Path]:
    """The directories of all cases, or of those whose result is `result` (valid, invalid or acceptable)."""
    return sorted(path.parent for path in ROOT.glob(f"{result}/*/*/case.json"))


def load_case(case_dir: str | Path) -> dict[str, Any]:
    """The content of a case's `case.json`."""
    case: dict[str, Any] = json.loads((Path(case_dir) / "case.json").read_text(encoding="utf-8"))
    return case


def materialise(case_dir: str | Path, into: str | Path) -> Path:
    """Puts the repository of a case into the new directory `into`, and returns it."""
    case_dir, into = Path(case_dir), Path(into)
    if (case_dir / "repo").is_dir():
        shutil.copytree(case_dir / "repo", into)
        return into
    case = load_case(case_dir)
    materialise(case_dir.parents[2] / case["base"], into)
    for step in case["recipe"]:
        apply(step, into)
    return into


def pointer_keys(pointer: str) -> list[str]:
    """The keys of a JSON pointer (RFC 6901)."""
    return [key.replace("~1", "/").replace("~0", "~") for key in pointer.split("/")[1:]]


def edit(document: Any, op: str, step: dict[str, Any]) -> None:
    """Applies `set`, `remove` or `rename` to a JSON document in place."""
    *parents, last = pointer_keys(step["path"])
    for key in parents:
        document = document[int(key)] if isinstance(document, list) else document[key]
    where: Any = int(last) if isinstance(document, list) else last
    if op == "set":
        if isinstance(document, list) and where == len(document):
            document.append(step["value"])
        else:
            document[where] = step["value"]
    elif op == "remove":
        del document[where]
    else:
        items = [(step["to"] if key == last else key, value) for key, value in document.items()]
        document.clear()
        document.update(items)


def dump(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode()


def split(raw: bytes) -> tuple[bytes, bytes]:
    """The header and the data of a payload file."""
    base = 8 + int.from_bytes(raw[:8], "little")
    return raw[8:base], raw[base:]


def join(header: bytes, data: bytes, alignment: int = 64) -> bytes:
    """Inverse of `split`; spaces fill the header up until the data begin at a multiple of `alignment` [TQ-PAY-8]."""
    header += b" " * (-(8 + len(header)) % alignment)
    return len(header).to_bytes(8, "little") + header + data


def content(step: dict[str, Any]) -> bytes:
    """The bytes of a step's `text` or `hex`."""
    return bytes.fromhex(step["hex"]) if "hex" in step else str(step["text"]).encode()


def splice(raw: bytes, step: dict[str, Any], new: bytes) -> bytes:
    """`raw` with the place that the step names replaced by `new`."""
    if "find" in step:
        find = str(step["find"]).encode()
        if raw.count(find) != 1:
            raise ValueError(f"{step['find']!r} occurs {raw.count(find)} times")
        return raw.replace(find, new)
    start = step["offset"] + (len(raw) if step["offset"] < 0 else 0)
    return raw[:start] + new + raw[start + step.get("remove", 0) :]


def replace_tensor(raw: bytes, step: dict[str, Any]) -> bytes:
    """A payload file with one tensor replaced or added, its data laid out in the order of the header."""
    header_bytes, data = split(raw)
    header = json.loads(header_bytes)
    bodies = {name: data[slice(*t["data_offsets"])] for name, t in header.items() if name != "__metadata__"}
    bodies[step["name"]] = content(step)
    header[step["name"]] = {"dtype": step["dtype"], "shape": step["shape"]}
    offsets = layout({name: (SIZES[header[name]["dtype"]], len(body)) for name, body in bodies.items()})
    for name, begin in offsets.items():
        header[name]["data_offsets"] = [begin, begin + len(bodies[name])]
    return join(dump(header), b"".join(bodies[name] for name in offsets))


def layout(tensors: dict[str, tuple[int, int]]) -> dict[str, int]:
    """Where the data of tensors (bytes of an element, bytes) begin, in the order in which they lie [TQ-PAY-8].

    That is the order given, or, where a tensor would be misaligned so, the largest elements first.
    """
    for names in (list(tensors), sorted(tensors, key=lambda name: -tensors[name][0])):
        offsets, end = {}, 0
        for name in names:
            offsets[name] = end
            end += tensors[name][1]
        if all(begin % tensors[name][0] == 0 for name, begin in offsets.items() if tensors[name][1]):
            break
    return offsets


def apply(step: dict[str, Any], repo: Path) -> None:
    """Applies one step of a recipe to the repository at `repo`."""
    op = step["op"]
    path = repo / step.get("file", MANIFEST)
    if op in ("set", "remove", "rename"):
        manifest = json.loads(path.read_bytes())
        edit(manifest, op, step)
        path.write_bytes(dump(manifest))
    elif op.startswith("header_") and op != "header_splice":
        header_bytes, data = split(path.read_bytes())
        header = json.loads(header_bytes)
        edit(header, op.removeprefix("header_"), step)
        path.write_bytes(join(dump(header), data))
    elif op == "splice":
        path.write_bytes(splice(path.read_bytes(), step, content(step) * step.get("count", 1)))
    elif op == "header_splice":
        header_bytes, data = split(path.read_bytes())
        path.write_bytes(join(splice(header_bytes, step, content(step)), data))
    elif op == "fill":
        new = step["find"] + "".join(step["format"] % k for k in range(step["count"]))
        path.write_bytes(splice(path.read_bytes(), step, new.encode()))
    elif op == "tensor_bytes":
        raw = bytearray(path.read_bytes())
        header_bytes, _ = split(bytes(raw))
        start = 8 + len(header_bytes) + json.loads(header_bytes)[step["name"]]["data_offsets"][0] + step["offset"]
        raw[start : start + len(content(step))] = content(step)
        path.write_bytes(raw)
    elif op == "tensor":
        path.write_bytes(replace_tensor(path.read_bytes(), step))
    elif op == "write":
        unit, count = content(step), step.get("count", 1)
        with path.open("wb") as file:
            while count > 0:
                units = min(count, max(1, CHUNK // max(1, len(unit))))
                file.write(unit * units)
                count -= units
    elif op == "truncate":
        os.truncate(path, step["size"])
    elif op == "delete":
        path.unlink()
    elif op == "move":
        path.rename(repo / step["to"])
    elif op == "copy":
        shutil.copyfile(path, repo / step["to"])
    elif op == "symlink":
        path.unlink(missing_ok=True)
        path.symlink_to(step["target"])
    elif op == "directory":
        path.unlink(missing_ok=True)
        path.mkdir()
    elif op == "fifo":
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    elif op == "refresh":
        manifest = json.loads((repo / MANIFEST).read_bytes())
        raw_file = path.read_bytes()
        manifest["files"][step["file"]].update(size=len(raw_file), sha256=hashlib.sha256(raw_file).hexdigest())
        (repo / MANIFEST).write_bytes(dump(manifest))
    else:
        raise ValueError(f"unknown operation {op!r}")
