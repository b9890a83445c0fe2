"""Publishing: a finished repository goes to the Hub in one commit, after a check of every file.

What goes up is what the manifest lists, the manifest and README.md, and nothing else. Before anything is sent, sizes, digests
and the directory itself are checked; after the commit, the Hub's own listing is compared with what was sent.
"""

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reference_quantizer.libraries import hub_errors, need, reason
from reference_quantizer.progress import tell
from reference_quantizer.release.card import CARD, is_stale
from tqformat.embed import LOADER, read_stamp
from tqformat.load_quantized import MANIFEST, TQFormatError, open_repo, parse_json


class PushError(OSError):
    """The Hub, or the way there, is at fault, not the repository."""


@dataclass(frozen=True)
class Item:
    """A file to upload: its name, size and SHA-256."""

    name: str
    size: int
    sha256: str


def check_release(path: Path) -> list[Item]:
    """The files of the repository in `path`, in order of names, once each is checked; TQFormatError for the first fault.

    Everything listed must be there with its size and digest, nothing else may lie there except what [TQ-REPO-5] allows, and
    nothing may be a link.
    """
    with open_repo(path) as repo:  # structure, binding, and the digests of the payload
        files = repo.manifest.files
        repo.check_roles("support", "code", "document")
    for entry in sorted(path.iterdir()):
        listed = entry.name in files or entry.name in (MANIFEST, CARD)
        if listed and (entry.is_symlink() or not entry.is_file()):
            raise TQFormatError("PATH.TYPE", entry.name, "expected a regular file, got a link or a directory")
        if not listed and not entry.name.startswith(".") and entry.name != "__pycache__":
            advice = "the manifest does not list it; move it away, or add it with tqformat.add_files"
            raise TQFormatError("BIND.EXTRA_FILE", entry.name, advice)
    if LOADER in files:
        read_stamp((path / LOADER).read_bytes())
    if is_stale(path):
        advice = "it was written for other evaluation files than the manifest lists; run `card` again"
        raise TQFormatError("EVAL.CARD", CARD, advice)
    items = [Item(name, file.size, file.sha256) for name, file in files.items()]
    for name in (MANIFEST, CARD):
        if (path / name).is_file():
            data = (path / name).read_bytes()
            items.append(Item(name, len(data), hashlib.sha256(data).hexdigest()))
    return sorted(items, key=lambda item: item.name)


def push(path: Path, items: list[Item], repo_id: str, branch: str, private: bool, message: str) -> str:
    """Upload `items` of `path` to `repo_id` in one commit; returns the commit's address. Repeated, it sends what is new."""
    need("push", "huggingface_hub")
    import huggingface_hub as hub

    if hub.get_token() is None:
        raise PushError("no Hub token: log in with `hf auth login`, or set HF_TOKEN to a token that may write")
    api = hub.HfApi()
    try:
        api.create_repo(repo_id, private=True if private else None, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise PushError(f"{repo_id} exists and is public; make it private on the Hub, or leave out --private")
        if branch != "main":
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        stale = _stale_files(api, repo_id, branch, {item.name for item in items})
        for name in stale:
            tell(f"removed in the same commit, of the release there before: {name}")
        operations: list[Any] = [hub.CommitOperationAdd(item.name, path / item.name) for item in items]
        operations += [hub.CommitOperationDelete(name) for name in stale]
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=branch)
        _compare(api, repo_id, commit.oid, items)
    except PushError:
        raise
    except hub_errors() as error:
        raise PushError(f"{repo_id}: {reason(error)}") from error
    return str(commit.commit_url)


def _stale_files(api: Any, repo_id: str, branch: str, names: set[str]) -> list[str]:
    """Files on the Hub that the release there lists and the new one does not have.

    A repository on the Hub that holds other files and no release is somebody's other work, and is refused.
    """
    there = set(api.list_repo_files(repo_id, revision=branch))
    others = sorted(n for n in there - names if not n.startswith(".") and n != CARD)
    if not others:
        return []
    if MANIFEST not in there:
        found = ", ".join(others[:4])
        raise PushError(f"{repo_id} holds {found} and no {MANIFEST}: it is no tqformat repository, choose another name")
    with tempfile.TemporaryDirectory() as cache:
        file = api.hf_hub_download(repo_id, MANIFEST, revision=branch, cache_dir=cache)
        listed = parse_json(Path(file).read_bytes(), MANIFEST).get("files")
    stale = [name for name in others if isinstance(listed, dict) and name in listed]
    for name in others:
        if name not in stale:
            tell(f"note: the Hub also has {name}, which neither release lists; it stays [TQ-REPO-5]")
    return stale


def _compare(api: Any, repo_id: str, commit: str, items: list[Item]) -> None:
    """Whether the Hub lists, at this commit, every file with the size and, for large ones, the digest that was sent."""
    there = {file.path: file for file in api.list_repo_tree(repo_id, revision=commit)}
    for item in items:
        file = there.get(item.name)
        size = getattr(file, "size", None)
        digest = getattr(getattr(file, "lfs", None), "sha256", None) or item.sha256
        if (size, digest) != (item.size, item.sha256):
            found = "missing" if file is None else f"{size} bytes, sha256 {digest}"
            raise PushError(f"{repo_id}: {item.name} is {found} on the Hub after the upload (is there a .gitignore?)")
