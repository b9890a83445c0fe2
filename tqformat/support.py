"""The files beside the weights: which role a name has, and how a manifest takes in files that somebody edited."""

import hashlib
import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .embed import LOADER, read_stamp
from .load_quantized import MANIFEST, FileName, TQFormatError, parse_json, read_manifest, require, typed

ROLES = {  # role -> names, compared in lower case; the first that fits counts
    "weights": ["*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack"],
    "code": ["*.py"],
    "support": [
        *("*config*.json", "*token*.json", "vocab*", "merges*.txt", "*chat_template*", "*.jinja", "normalizer.json"),
        *("tokenizer*", "*.model", "*.spm", "*.tiktoken", "tekken.json"),
    ],
    "document": ["licen[cs]e*", "notice*", "copying*", "copyright*", "use_policy*", "*_license*", "*_licence*"],
}


def role_of(name: str) -> str | None:
    """What a file of a checkpoint or repository is by its name: support, code, document [TQ-REPO-3] or weights; else None."""
    fits = (role for role, patterns in ROLES.items() if any(fnmatchcase(name.lower(), each) for each in patterns))
    return next(fits, None)


def update_files(repo: str | os.PathLike[str], dry_run: bool = False) -> list[str]:
    """Makes the manifest of a finished repository fit the files that were edited, added or removed; one line for each.

    The content of the files stays as it is. A payload that was changed is an error (BIND.DIGEST), and so are a loader that
    is none of a release (BIND.LOADER) and an added file that holds weights or may not be listed.
    """
    path = Path(repo)
    read_manifest(path)
    manifest = parse_json((path / MANIFEST).read_bytes(), MANIFEST)
    files: dict[str, Any] = manifest["files"]
    lines = []
    for name, entry in list(files.items()):
        if entry["role"] != "payload" and not (path / name).exists():
            del files[name]
            lines.append(f"dropped {name} ({entry['role']}): it is gone")
            continue
        found = _measure(path / name)
        if found.items() <= entry.items():
            continue
        message = "the weights were changed, and only a quantizer can write them: restore this file"
        require(entry["role"] != "payload", "BIND.DIGEST", name, "the payload as it was", None, f"; {message}")
        files[name] = {key: value for key, value in entry.items() if key not in ("chunk_size", "chunks")} | found
        lines.append(f"changed {name} ({entry['role']}), {found['size']:,} bytes")
    known = {MANIFEST, "README.md", "__pycache__", *files}
    for name in sorted(entry for entry in os.listdir(path) if entry[0] != "." and entry not in known):
        typed(FileName, name, f"files[{name!r}]")
        same = [other for other in files if other.lower() == name.lower()]
        require(not same, "PATH.COLLISION", f"files[{name!r}]", "a name that differs in more than case", same)
        role = role_of(name) or "document"
        away = "; move it away" if role == "weights" else ""
        require(not away, "BIND.EXTRA_FILE", name, "no weights beside the payload", None, away)
        files[name] = {"role": role, **_measure(path / name)}
        warning = ": read it before you trust it" if role == "code" else ""
        lines.append(f"added {name} ({role}), {files[name]['size']:,} bytes{warning}")
    if any(f" {LOADER} " in line for line in lines) and LOADER in files:
        try:
            read_stamp((path / LOADER).read_bytes())
        except TQFormatError as error:
            remedy = f"python -m tqformat embed {path} puts the loader of this release there"
            raise TQFormatError(error.code, LOADER, f"{error.message}; {remedy}") from None
    if lines and not dry_run:
        from .writer import replace_files

        replace_files(path, manifest, {})
    return lines


def _measure(path: Path) -> dict[str, Any]:
    """Size and digest of a file as `files` lists them."""
    require(path.exists(), "BIND.MISSING_FILE", path.name, f"this file in {path.parent}")
    require(path.is_file(), "PATH.TYPE", path.name, "a regular file")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}
