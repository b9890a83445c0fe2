"""Level L1, binding: every file, tensor, digest, total and tie (SPEC.md sections 2, 5, 12 to 14)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from conformance.check import check
from conformance.checks_structure import NAMED, OPENED, READ, SHAPED
from conformance.container import DTYPES
from conformance.findings import MANIFEST, Finding, brief, join
from conformance.subject import Reference, Subject

STORED = (*OPENED, "container.")  # and so can the payload headers
REFERENCED = (*STORED, *READ, "schema.")  # and the storage names of the manifest

# 2 Repository


@check(
    "bind.missing_file", "L1", "BIND.MISSING_FILE", "TQ-REPO-1", "Add the file, or remove it from `files`.", needs=NAMED
)
def bind_missing_file(repo: Subject) -> Iterator[Finding]:
    for name, kind in repo.file_kinds.items():
        if kind == "missing" and name not in repo.payload_files:  # those are the business of container.absent
            yield Finding(f"expected a file {name}, found none", join("files", name), name)


@check("bind.extra_file", "L1", "BIND.EXTRA_FILE", "TQ-REPO-5", "List the file in `files`, or remove it.", needs=NAMED)
def bind_extra_file(repo: Subject) -> Iterator[Finding]:
    listed, unlisted = {*repo.file_names, MANIFEST}, {"README.md": "file", "__pycache__": "directory"}
    for name in repo.folder.names():
        if name in listed or name.startswith(".") or repo.folder.kind(name) == unlisted.get(name):
            continue
        yield Finding(f"the {repo.folder.kind(name)} {brief(name)} is not listed in `files`", None, brief(name)[1:-1])


@check("bind.size", "L1", "BIND.SIZE", "TQ-REPO-4", "Fetch the file again, or write the manifest again.", needs=NAMED)
def bind_size(repo: Subject) -> Iterator[Finding]:
    for name, kind in repo.file_kinds.items():
        if kind == "file":
            wanted, size = repo.manifest["files"][name]["size"], repo.folder.size(name)
            if size != wanted:
                yield Finding(f"expected {wanted} bytes, found {size}", join("files", name, "size"), name)


@check(
    "bind.digest", "L1", "BIND.DIGEST", "TQ-REPO-4", "Fetch the file again, or write the manifest again.", needs=NAMED
)
def bind_digest(repo: Subject) -> Iterator[Finding]:
    for name, (digest, _) in repo.digests.items():
        wanted = repo.manifest["files"][name]["sha256"]
        if digest != wanted:
            yield Finding(f"expected {wanted}, found {digest}", join("files", name, "sha256"), name)


@check(
    "bind.chunks",
    "L1",
    "BIND.DIGEST",
    "TQ-REPO-8",
    "Fetch the file again, or write the manifest again.",
    needs=(*NAMED, "schema.chunks_alone"),
)
def bind_chunks(repo: Subject) -> Iterator[Finding]:
    for name, (_, digests) in repo.digests.items():
        wanted, size = repo.manifest["files"][name].get("chunks"), repo.manifest["files"][name].get("chunk_size")
        # how many there are is the business of schema.chunks_count, the file's length that of bind.size
        for number, (digest, chunk) in enumerate(zip(digests, wanted or [], strict=False)):
            if digest != chunk:
                message = f"expected chunk {number} with the digest {chunk}, found {digest}"
                yield Finding(message, join("files", name, "chunks", number), name, number * size)


# 13 Sharding; bind.shards stands in checks_structure.py, for the headers need it


@check(
    "bind.empty_shard", "L1", "BIND.SHARDS", "TQ-SHARD-2", "Remove the shard and number the others anew.", needs=STORED
)
def bind_empty_shard(repo: Subject) -> Iterator[Finding]:
    for name, header in repo.headers.items():
        if not header.tensors and len(repo.headers) > 1:
            yield Finding("expected at least one tensor in each shard, found none", join("files", name), name)


# 5 Payload: each tensor is referenced once, and is what the reference makes of it [TQ-PAY-6]


@check(
    "bind.missing_tensor",
    "L1",
    "BIND.MISSING_TENSOR",
    "TQ-PAY-6",
    "Store the tensor, or correct its name.",
    needs=REFERENCED,
)
def bind_missing_tensor(repo: Subject) -> Iterator[Finding]:
    for reference in repo.references:
        if reference.name not in repo.payload:
            yield Finding(f"the payload has no tensor {brief(reference.name, 200)}", reference.pointer)


@check(
    "bind.extra_tensor",
    "L1",
    "BIND.EXTRA_TENSOR",
    "TQ-PAY-6",
    "Remove the tensor, or name it in the manifest.",
    needs=REFERENCED,
)
def bind_extra_tensor(repo: Subject) -> Iterator[Finding]:
    named = {reference.name for reference in repo.references}
    for name, stored in repo.payload.items():
        if name not in named:
            yield Finding(f"nothing in the manifest names {brief(name, 200)}", join(name), stored.file, stored.offset)


@check(
    "bind.multiple", "L1", "BIND.MULTIPLE", "TQ-PAY-6", "Store the tensor twice, or use tied_weights.", needs=REFERENCED
)
def bind_multiple(repo: Subject) -> Iterator[Finding]:
    first: dict[str, Reference] = {}
    for reference in repo.references:
        if first.setdefault(reference.name, reference) is not reference:
            message = f"{brief(reference.name, 200)} is also named at {brief(first[reference.name].pointer, 200)}"
            yield Finding(message, reference.pointer)


@check("bind.dtype", "L1", "BIND.TENSOR", "TQ-PAY-6", "Store the tensor as the rule says.", needs=REFERENCED)
def bind_dtype(repo: Subject) -> Iterator[Finding]:
    for reference in repo.references:
        stored = repo.payload.get(reference.name)
        if stored and stored.dtype not in reference.dtypes:
            message = f"expected {brief(reference.name, 200)} as {' or '.join(reference.dtypes)}, found {stored.dtype}"
            yield Finding(message, reference.pointer, rule=reference.rule)


@check(
    "bind.shape",
    "L1",
    "BIND.TENSOR",
    "TQ-PAY-6",
    "Store the tensor with the shape that the rule gives it.",
    needs=REFERENCED,
)
def bind_shape(repo: Subject) -> Iterator[Finding]:
    for reference in repo.references:
        stored = repo.payload.get(reference.name)
        if stored and reference.role != "codes" and not _fits(stored.shape, reference.shape):  # for codes: pack.length
            wanted = [size if size is not None else "any" for size in reference.shape]
            message = f"expected {brief(reference.name, 200)} of shape {wanted}, found {list(stored.shape)}"
            yield Finding(message.replace("'", ""), reference.pointer, rule=reference.rule)


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(w is None or s == w for s, w in zip(shape, wanted, strict=True))


@check(
    "bind.rounds",
    "L1",
    "BIND.TENSOR",
    "TQ-TRAN-8",
    "Store 1 to 64 rounds of pairs and as many of angles.",
    needs=REFERENCED,
)
def bind_rounds(repo: Subject) -> Iterator[Finding]:
    for id, transform in repo.manifest["transforms"].items():
        if transform["kind"] == "givens" and {transform["pairs"], transform["angles"]} <= repo.payload.keys():
            pairs, angles = repo.payload[transform["pairs"]].shape, repo.payload[transform["angles"]].shape
            rounds = [shape[0] for shape in (pairs, angles) if shape]
            if len(set(rounds)) > 1 or any(not 1 <= count <= 64 for count in rounds):
                yield Finding(
                    f"expected 1 to 64 rounds in pairs and angles alike, found {rounds}", join("transforms", id)
                )


@check(
    "bind.outer",
    "L1",
    "BIND.TENSOR",
    "TQ-NUM-8",
    "Store [rows or 1, b], b a divisor of the vectors of a row.",
    needs=REFERENCED,
)
def bind_outer(repo: Subject) -> Iterator[Finding]:
    for stage in repo.stages:
        for key, _, outer in stage.factors:
            shape = repo.payload[outer].shape if outer in repo.payload else ()
            vectors = stage.cols // stage.vector_length
            if len(shape) == 2 and (shape[0] not in (1, stage.rows) or not shape[1] or vectors % shape[1]):
                message = f"expected [{stage.rows} or 1, a divisor of {vectors}], found {list(shape)}"
                yield Finding(message, f"{stage.pointer}/outer_{key}")


# 12 Tied weights


@check("bind.tied_alias", "L1", "BIND.TIED", "TQ-TIE-1", "Remove the alias, or the entry of `tensors`.", needs=SHAPED)
def bind_tied_alias(repo: Subject) -> Iterator[Finding]:
    for alias in repo.manifest.get("tied_weights", {}):
        if alias in repo.manifest["tensors"]:
            yield Finding("the alias is also an entry of `tensors`", join("tied_weights", alias))


@check("bind.tied_target", "L1", "BIND.TIED", "TQ-TIE-1", "Name an entry of `tensors`.", needs=SHAPED)
def bind_tied_target(repo: Subject) -> Iterator[Finding]:
    ties = repo.manifest.get("tied_weights", {})
    for alias, target in ties.items():
        if target not in repo.manifest["tensors"]:
            what = "an alias" if target in ties else "no entry of `tensors`"
            yield Finding(f"{brief(target, 200)} is {what}", join("tied_weights", alias))


# 14 Accounting


@check("bind.accounting", "L1", "BIND.ACCOUNTING", "TQ-ACC-1", "Write the recomputed total.", needs=STORED)
def bind_accounting(repo: Subject) -> Iterator[Finding]:
    for key, wanted in _totals(repo).items():
        if repo.manifest["accounting"][key] != wanted:
            yield Finding(
                f"expected {wanted}, found {repo.manifest['accounting'][key]}", join("accounting", key), rule="TQ-ACC-2"
            )


@check("bind.ratio", "L1", "BIND.ACCOUNTING", "TQ-ACC-1", "Write original_bytes / stored_bytes.", needs=STORED)
def bind_ratio(repo: Subject) -> Iterator[Finding]:
    totals, ratio = _totals(repo), repo.manifest["accounting"]["ratio"]
    wanted = totals["original_bytes"] / totals["stored_bytes"] if totals["stored_bytes"] else 0.0
    if not abs(ratio - wanted) <= 0.001 + 1e-9:
        yield Finding(f"expected {wanted:.4f} within 0.001, found {ratio}", "/accounting/ratio")


def _totals(repo: Subject) -> dict[str, int]:
    """The totals of `accounting` [TQ-ACC-2]."""
    totals = {"original_bytes": 0, "stored_bytes": sum(stored.size for stored in repo.payload.values())}
    for kind in ("quantized", "passthrough"):
        entries = [entry for entry in repo.manifest["tensors"].values() if entry["kind"] == kind]
        scalars = [math.prod(entry["shape"]) for entry in entries]
        totals[f"{kind}_tensors"] = len(entries)
        totals[f"{kind}_scalars"] = sum(scalars)
        totals["original_bytes"] += sum(n * DTYPES[e["dtype"]] for n, e in zip(scalars, entries, strict=True))
    return totals
