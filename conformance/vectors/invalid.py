"""All cases that are recipes: the invalid ones, and a few valid ones."""

from __future__ import annotations

import hashlib
import json

from conformance.vectors import invalid_manifest, invalid_payload
from conformance.vectors.recipes import (
    MANIFEST,
    PAYLOAD,
    PLAIN,
    Cases,
    Derived,
    Step,
    refresh,
    then,
)

AREAS = [
    invalid_manifest.path,
    invalid_manifest.json_text,
    invalid_manifest.schema_versions,
    invalid_manifest.schema_fields,
    invalid_manifest.schema_values,
    invalid_payload.container,
    invalid_payload.bind,
    invalid_payload.pack,
    invalid_payload.data,
    invalid_payload.limit,
]


def valid_recipes(c: Cases) -> None:
    steps: list[Step] = [
        {"op": "directory", "file": "__pycache__"},
        {"op": "write", "file": "__pycache__/load_quantized.cpython-311.pyc", "text": "x"},
        {"op": "directory", "file": ".cache"},
        {"op": "write", "file": ".gitattributes", "text": "*.safetensors filter=lfs\n"},
        {"op": "symlink", "file": ".link", "target": "/nowhere"},
        {"op": "write", "file": "README.md", "text": "---\nlicense: mit\n---\n"},
    ]
    text = "A card, hidden entries and __pycache__ are added."
    c.add(
        "repository/ignored-entries", "REPO-5", "", text, "Readers ignore them.", *steps, result="valid", pointer=None
    )
    loader, base = "load_quantized.py", "valid/repository/loader"
    body = b"x = 1\r\n"
    stamp = {"format": "1.0", "version": "0.0.0", "body_sha256": hashlib.sha256(body).hexdigest()}
    content = body + f"# tqformat-stamp: {json.dumps(stamp)}\n".encode()
    write: Step = {"op": "write", "file": loader, "hex": content.hex()}
    cut: Step = {"op": "splice", "file": loader, "offset": -1, "remove": 1, "text": ""}
    for id, step, text, reason in (
        ("no-line-feed", cut, "The loader's last line feed is cut off.", "The last line may lack its line feed."),
        ("carriage-return", write, "The loader's lines end in CR LF.", "A carriage return is a byte of the body."),
    ):
        id = f"repository/loader-{id}"
        c.add(id, "REPO-7", "", text, reason, step, refresh(loader), base=base, result="valid", pointer=None)
    entry = {"role": "document", "size": 0, "sha256": "0" * 64}
    copy: Step = {"op": "copy", "file": "LICENSE", "to": "__metadata__"}
    reason = "Only a file may be called so."
    c.set(
        "manifest/file-metadata",
        "MAN-4 REPO-2",
        "",
        "/files/__metadata__",
        entry,
        reason,
        *then(copy),
        refresh("__metadata__"),
        result="valid",
        pointer=None,
    )
    text = "White space of 4 MiB goes before the manifest."
    spaces = {"op": "splice", "file": MANIFEST, "offset": 0, "text": "\n", "count": 4 * 2**20}
    c.add(
        "json/white-space-4-mib",
        "JSON-2 LIM-1",
        "",
        text,
        "White space around the manifest is allowed.",
        spaces,
        result="valid",
        pointer=None,
    )
    spaces = {"op": "header_splice", "file": PAYLOAD, "find": "[24,30]}}", "text": "[24,30]}}" + " " * 70000}
    text = "70,000 spaces follow the header."
    c.add(
        "container/trailing-spaces-70000",
        "PAY-2",
        "",
        text,
        "Spaces may follow.",
        spaces,
        refresh(),
        base=PLAIN,
        result="valid",
        pointer=None,
    )


def derived() -> list[Derived]:
    """All cases that are recipes."""
    c = Cases()
    for area in [*AREAS, valid_recipes]:
        area(c)
    return c.all
