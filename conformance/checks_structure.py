"""Level L0, structure: paths, JSON, the manifest's schema, payload headers (SPEC.md sections 2 to 5, 15)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from conformance import jsonio, subject
from conformance.check import check
from conformance.container import DTYPES
from conformance.findings import MANIFEST, Finding, brief, join
from conformance.formulas import has_hadamard
from conformance.subject import Subject

KNOWN_FEATURES = (
    *("trellis", "vector_codebook", "row_codebook", "stages", "column_scale", "tiles"),
    *("offsets", "outer_scales", "fine_scales", "dense", "givens", "permutation"),
)

# What a check needs before it makes sense. READ: there is a manifest of a version that we know.
READ = ("manifest.", "json.", "version.")
SHAPED = (*READ, "schema.shape.")
MEANT = (*READ, "schema.")

# The manifest as a file [TQ-REPO-1]


@check(
    "manifest.missing", "L0", "BIND.MISSING_FILE", "TQ-REPO-1", "Add the manifest, or give the directory that holds it."
)
def manifest_missing(repo: Subject) -> Iterator[Finding]:
    if repo.folder.kind(MANIFEST) == "missing":
        yield Finding(f"expected a file {MANIFEST}, found none")


@check(
    "manifest.type",
    "L0",
    "PATH.TYPE",
    "TQ-REPO-1",
    "Put a regular file there; for a copy in the Hub's cache use --hub-cache.",
    needs=("manifest.missing",),
)
def manifest_type(repo: Subject) -> Iterator[Finding]:
    if (kind := repo.folder.kind(MANIFEST)) not in ("file", "missing"):
        yield Finding(f"expected a regular file, found a {kind}")


@check(
    "manifest.size",
    "L0",
    "LIMIT.SIZE",
    "TQ-LIM-1",
    "Move inline values into payload tensors and drop provenance.",
    needs=("manifest.missing", "manifest.type"),
)
def manifest_size(repo: Subject) -> Iterator[Finding]:
    if (size := repo.folder.size(MANIFEST)) > subject.MAX_MANIFEST:
        yield Finding(f"expected at most {subject.MAX_MANIFEST} bytes, found {size}")


# 3 JSON: jsonio reads, each check owns one kind of breach


def _json(kind: str, code: str, rule: str, advice: str) -> None:
    @check(f"json.{kind}", "L0", code, rule, advice, needs=("manifest.",))
    def _(repo: Subject) -> Iterator[Finding]:
        yield from (finding for finding in repo.parsed.findings if finding.kind == kind)


_json("encoding", "JSON.ENCODING", "TQ-JSON-1", "Write the text as UTF-8 without a byte order mark.")
_json("surrogate", "JSON.ENCODING", "TQ-JSON-1", "Write the character itself, or a whole surrogate pair.")
_json("syntax", "JSON.SYNTAX", "TQ-JSON-2", "Write the text with a JSON library, not by hand.")
_json("constant", "JSON.SYNTAX", "TQ-JSON-4", "Write a finite number (json.dumps(..., allow_nan=False)).")
_json("object", "JSON.SYNTAX", "TQ-JSON-2", "The text must be one JSON object.")
_json("duplicate_key", "JSON.DUPLICATE_KEY", "TQ-JSON-3", "Keep one of the two.")
_json("integer", "JSON.NUMBER", "TQ-JSON-4", "No integer of the format needs more; correct the value.")
_json("number", "JSON.NUMBER", "TQ-JSON-4", "Correct the value: it is infinite as binary64.")
_json("depth", "JSON.DEPTH", "TQ-JSON-5", f"Nest at most {jsonio.MAX_DEPTH} levels.")
_json("values", "LIMIT.MEMORY", "TQ-LIM-1", "This judge reads no more; move values into payload tensors.")

# 15 Versions and features, before anything else [TQ-MAN-3]

PARSED = ("manifest.", "json.")


@check("version.format", "L0", "SCHEMA.VERSION", "TQ-MAN-3", "This validator judges tqformat alone.", needs=PARSED)
def version_format(repo: Subject) -> Iterator[Finding]:
    value = repo.manifest.get("format")
    if value != "tqformat":
        yield Finding(f"expected tqformat, found {brief(value)}", "/format")


@check(
    "version.number",
    "L0",
    "SCHEMA.VERSION",
    "TQ-VER-4",
    "Use a validator of that version, or write version 1.0.",
    needs=PARSED,
)
def version_number(repo: Subject) -> Iterator[Finding]:
    value = repo.manifest.get("format_version")
    # [TQ-VER-3] any minor version of 1
    if not isinstance(value, str) or not re.fullmatch(r"1\.(0|[1-9][0-9]*)", value, re.ASCII):
        yield Finding(f"expected 1.0 or a later 1.x, found {brief(value)}", "/format_version")


@check(
    "version.features",
    "L0",
    "SCHEMA.UNKNOWN_FEATURE",
    "TQ-VER-2",
    "Use a validator that knows the feature, or correct its name.",
    needs=(*PARSED, "version.format", "version.number"),
)
def version_features(repo: Subject) -> Iterator[Finding]:
    features = repo.manifest.get("features")
    for index, feature in enumerate(features if isinstance(features, list) else []):
        if isinstance(feature, str) and feature not in KNOWN_FEATURES:
            yield Finding(
                f"expected one of {', '.join(KNOWN_FEATURES)}, found {brief(feature)}", join("features", index)
            )


# 2 Repository: the names and what they name


def _listed(repo: Subject) -> list[str]:
    """The names in `files`, before the schema has seen it."""
    files = repo.manifest.get("files")
    return list(files) if isinstance(files, dict) else []


@check("path.name", "L0", "PATH.NAME", "TQ-REPO-2", "Use a plain base name such as tokenizer.json.", needs=READ)
def path_name(repo: Subject) -> Iterator[Finding]:
    for name in _listed(repo):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}(?<!\.)", name):
            yield Finding(
                f"expected letters, digits and ._- after a letter, digit or _, no dot at the end, found {brief(name)}",
                join("files", name),
            )


@check("path.reserved", "L0", "PATH.NAME", "TQ-REPO-2", "Leave it out of `files`: it is never listed.", needs=READ)
def path_reserved(repo: Subject) -> Iterator[Finding]:
    for name in _listed(repo):
        if name.lower() in (MANIFEST, "readme.md", "__pycache__"):
            yield Finding(f"{name} must not be listed", join("files", name))


DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{k}" for port in ("com", "lpt") for k in range(1, 10))}


@check("path.device", "L0", "PATH.NAME", "TQ-REPO-2", "Rename it: some systems cannot make such a file.", needs=READ)
def path_device(repo: Subject) -> Iterator[Finding]:
    for name in _listed(repo):
        if name.partition(".")[0].lower() in DEVICES:
            yield Finding(f"{brief(name)} is the name of a device", join("files", name))


@check(
    "path.collision", "L0", "PATH.COLLISION", "TQ-REPO-2", "Rename one: some file systems cannot hold both.", needs=READ
)
def path_collision(repo: Subject) -> Iterator[Finding]:
    seen: dict[str, str] = {}
    for name in _listed(repo):
        if other := seen.get(name.casefold()):
            yield Finding(f"{brief(name)} and {brief(other)} differ only in case", join("files", name))
        seen.setdefault(name.casefold(), name)


@check(
    "path.type",
    "L0",
    "PATH.TYPE",
    "TQ-REPO-1",
    "Put a regular file there; for a copy in the Hub's cache use --hub-cache.",
    needs=(*READ, "path.name"),
)
def path_type(repo: Subject) -> Iterator[Finding]:
    for name in _listed(repo):
        if (kind := repo.folder.kind(name)) not in ("file", "missing"):
            yield Finding(f"expected a regular file, found a {kind}", join("files", name), name)


# 4 Manifest: the shape, by the schema


def _shape(kind: str, code: str, rule: str, advice: str) -> None:
    @check(f"schema.shape.{kind}", "L0", code, rule, advice, needs=READ)
    def _(repo: Subject) -> Iterator[Finding]:
        yield from (finding for finding in repo.shape if finding.kind == kind)


_shape("unknown_field", "SCHEMA.UNKNOWN_FIELD", "TQ-MAN-1", "Objects are closed; only `extra` is free.")
_shape("missing_field", "SCHEMA.MISSING_FIELD", "TQ-MAN-2", "A key without a default must be written.")
_shape("type", "SCHEMA.TYPE", "TQ-MAN-2", "Write the JSON type of the table in section 4.")
_shape("value", "SCHEMA.VALUE", "TQ-MAN-2", "Write a value that the rule allows.")
_shape("ambiguous", "SCHEMA.AMBIGUOUS", "TQ-MAN-6", "Decide for one of the two.")
_shape("entries", "LIMIT.SIZE", "TQ-LIM-1", "Divide the model into repositories of fewer entries.")

# 4 Manifest: the meaning


@check("schema.reference", "L0", "SCHEMA.REFERENCE", "TQ-MAN-9", "Add the entry, or name another.", needs=SHAPED)
def schema_reference(repo: Subject) -> Iterator[Finding]:
    uses: dict[tuple[str, str], list[str]] = {}  # (kind of the table, id) -> where it is named
    for weight, entry in repo.quantized.items():
        for index, stage in enumerate(entry["stages"]):
            for key in ("codebook", "transform"):
                if stage[key] not in repo.manifest[key + "s"]:
                    uses.setdefault((key, stage[key]), []).append(join("tensors", weight, "stages", index, key))
    for (key, id), places in uses.items():
        more = f", and is named in {len(places) - 1} more places" if len(places) > 1 else ""
        yield Finding(f"{brief(id)} is no entry of `{key}s`{more}", places[0])


@check("schema.unused", "L0", "SCHEMA.REFERENCE", "TQ-MAN-9", "Remove the entry.", needs=SHAPED)
def schema_unused(repo: Subject) -> Iterator[Finding]:
    for key in ("codebook", "transform"):
        named = {stage[key] for entry in repo.quantized.values() for stage in entry["stages"]}
        for id in repo.manifest[key + "s"]:
            if id not in named:
                yield Finding("no stage names this entry", join(key + "s", id))


@check("schema.loader_role", "L0", "SCHEMA.VALUE", "TQ-REPO-6", "Write the role `code`.", needs=SHAPED)
def schema_loader_role(repo: Subject) -> Iterator[Finding]:
    role = repo.manifest["files"].get("load_quantized.py", {}).get("role", "code")
    if role != "code":
        yield Finding(f"expected the role code for the embedded loader, found {role}", "/files/load_quantized.py/role")


@check(
    "schema.chunks_alone",
    "L0",
    "SCHEMA.MISSING_FIELD",
    "TQ-REPO-8",
    "Write chunk_size and chunks, or neither.",
    needs=SHAPED,
)
def schema_chunks_alone(repo: Subject) -> Iterator[Finding]:
    for name, file in repo.manifest["files"].items():
        for key, other in (("chunk_size", "chunks"), ("chunks", "chunk_size")):
            if file.get(key) is None and file.get(other) is not None:
                yield Finding(f"the key {key} is required beside {other}", join("files", name, key))


@check(
    "schema.chunks_count", "L0", "SCHEMA.VALUE", "TQ-REPO-8", "Write a digest for each chunk of the file.", needs=SHAPED
)
def schema_chunks_count(repo: Subject) -> Iterator[Finding]:
    for name, file in repo.manifest["files"].items():
        if file.get("chunk_size") is not None and file.get("chunks") is not None:
            count = -(-file["size"] // file["chunk_size"])
            if len(file["chunks"]) != count:
                message = f"expected {count} chunks of {file['chunk_size']} bytes, found {len(file['chunks'])}"
                yield Finding(message, join("files", name, "chunks"))


@check("schema.columns", "L0", "SCHEMA.VALUE", "TQ-MAN-7", "Store such a weight as passthrough.", needs=SHAPED)
def schema_columns(repo: Subject) -> Iterator[Finding]:
    for name, entry in repo.quantized.items():
        if not 1 <= entry["shape"][-1] <= 2**20:
            pointer = join("tensors", name, "shape", len(entry["shape"]) - 1)
            yield Finding(f"expected 1 to 2^20 columns, found {entry['shape'][-1]}", pointer)


@check(
    "schema.scalars",
    "L0",
    "LIMIT.SIZE",
    "TQ-LIM-1",
    "No tensor can have so many bytes; correct the shape.",
    needs=SHAPED,
)
def schema_scalars(repo: Subject) -> Iterator[Finding]:
    for name, entry in repo.manifest["tensors"].items():
        # [TQ-SEC-3] Python's integers do not overflow; the strides of an empty tensor must not, either
        size = math.prod(length or 1 for length in entry["shape"]) * DTYPES[entry["dtype"]]
        if size > jsonio.MAX_INTEGER:
            yield Finding(f"expected at most 2^53 - 1 bytes, found {size}", join("tensors", name, "shape"))


@check(
    "schema.effective_bits",
    "L0",
    "SCHEMA.VALUE",
    "TQ-MAN-8",
    "Write the sum over the stages of bits / p.",
    needs=SHAPED,
)
def schema_effective_bits(repo: Subject) -> Iterator[Finding]:
    for name, entry in repo.quantized.items():
        books = [repo.manifest["codebooks"].get(stage["codebook"]) for stage in entry["stages"]]
        if None in books:
            continue
        bits = sum(stage["bits"] / book["dimension"] for stage, book in zip(entry["stages"], books, strict=True))
        if not abs(entry["effective_bits"] - bits) <= 1e-6 + 1e-12:
            message = f"expected {bits:.7g} within 10^-6, found {entry['effective_bits']}"
            yield Finding(message, join("tensors", name, "effective_bits"))


# 6 Codes


@check(
    "schema.bits",
    "L0",
    "SCHEMA.VALUE",
    "TQ-CODE-1",
    "Use fewer bits or a codebook of a greater dimension.",
    needs=SHAPED,
)
def schema_bits(repo: Subject) -> Iterator[Finding]:
    for stage in repo.stages:
        if stage.bits > 8 * stage.dimension:
            yield Finding(
                f"expected at most 8 p = {8 * stage.dimension} bits, found {stage.bits}", stage.pointer + "/bits"
            )


@check("schema.window", "L0", "SCHEMA.VALUE", "TQ-CODE-1", "A symbol reads at least its own new bits.", needs=SHAPED)
def schema_window(repo: Subject) -> Iterator[Finding]:
    for stage in repo.stages:
        if stage.window < stage.bits:
            yield Finding(
                f"expected a window from bits = {stage.bits} to 16, found {stage.window}", stage.pointer + "/window"
            )


@check(
    "schema.tile_rows",
    "L0",
    "SCHEMA.VALUE",
    "TQ-CODE-2",
    "Choose tile rows that divide the weight's rows.",
    needs=SHAPED,
)
def schema_tile_rows(repo: Subject) -> Iterator[Finding]:
    for stage in repo.stages:
        if stage.rows % stage.tile[0]:
            yield Finding(f"expected a divisor of {stage.rows} rows, found {stage.tile[0]}", stage.pointer + "/tile/0")


@check(
    "schema.tile_columns",
    "L0",
    "SCHEMA.VALUE",
    "TQ-CODE-2",
    "Choose tile columns that divide the weight's columns.",
    needs=SHAPED,
)
def schema_tile_columns(repo: Subject) -> Iterator[Finding]:
    for stage in repo.stages:
        if stage.cols % stage.tile[1]:
            yield Finding(
                f"expected a divisor of {stage.cols} columns, found {stage.tile[1]}", stage.pointer + "/tile/1"
            )


@check(
    "schema.tile_dimension",
    "L0",
    "SCHEMA.VALUE",
    "TQ-CODE-2",
    "A symbol must not cross the border of a tile.",
    needs=SHAPED,
)
def schema_tile_dimension(repo: Subject) -> Iterator[Finding]:
    for stage in repo.stages:
        if stage.tile[1] % stage.dimension:
            message = f"expected tile columns divisible by p = {stage.dimension}, found {stage.tile[1]}"
            yield Finding(message, stage.pointer + "/tile")


@check(
    "schema.vector_dimension",
    "L0",
    "SCHEMA.VALUE",
    "TQ-CODE-2",
    "A symbol must not cross the border of a vector.",
    needs=SHAPED,
)
def schema_vector_dimension(repo: Subject) -> Iterator[Finding]:
    for stage in repo.stages:
        if stage.vector_length % stage.dimension:
            message = f"expected a vector_length divisible by p = {stage.dimension}, found {stage.vector_length}"
            yield Finding(message, stage.pointer + "/vector_length")


@check("schema.tile_window", "L0", "SCHEMA.VALUE", "TQ-CODE-2", "Use a bigger tile or a smaller window.", needs=SHAPED)
def schema_tile_window(repo: Subject) -> Iterator[Finding]:
    for stage in repo.stages:
        if stage.symbols * stage.bits < stage.window:
            message = f"expected a tile of at least window = {stage.window} bits, found {stage.symbols * stage.bits}"
            yield Finding(message, stage.pointer + "/tile")


@check("schema.tile_size", "L0", "LIMIT.SIZE", "TQ-LIM-1", "Use tiles of fewer rows.", needs=SHAPED)
def schema_tile_size(repo: Subject) -> Iterator[Finding]:
    heights: dict[str, int] = {}
    for stage in repo.stages:
        heights[stage.weight] = height = math.lcm(heights.get(stage.weight, 1), stage.tile[0])
        if height * stage.cols > 2**22:
            message = f"expected lcm(tr) * cols of at most 2^22, found {height} * {stage.cols}"
            yield Finding(message, stage.pointer + "/tile/0")


# 7 Codebooks


@check("schema.levels_twice", "L0", "SCHEMA.AMBIGUOUS", "TQ-BOOK-1", "Keep `values` or `tensor`.", needs=SHAPED)
def schema_levels_twice(repo: Subject) -> Iterator[Finding]:
    for id, book in repo.manifest["codebooks"].items():
        if book.get("values") is not None and book.get("tensor") is not None:
            yield Finding("expected one of values and tensor, found both", join("codebooks", id))


@check(
    "schema.levels_missing",
    "L0",
    "SCHEMA.MISSING_FIELD",
    "TQ-BOOK-1",
    "Store the levels in `values` or `tensor`.",
    needs=SHAPED,
)
def schema_levels_missing(repo: Subject) -> Iterator[Finding]:
    for id, book in repo.manifest["codebooks"].items():
        if book.get("values") is None and book.get("tensor") is None:
            yield Finding("expected one of values and tensor, found neither", join("codebooks", id))


@check(
    "schema.values_count", "L0", "SCHEMA.VALUE", "TQ-BOOK-1", "Write entries * p numbers, entry by entry.", needs=SHAPED
)
def schema_values_count(repo: Subject) -> Iterator[Finding]:
    for id, book in repo.manifest["codebooks"].items():
        wanted, values = book["entries"] * book["dimension"], book.get("values")
        if values is not None and len(values) != wanted:
            yield Finding(f"expected {wanted} numbers, found {len(values)}", join("codebooks", id, "values"))


@check("schema.rows_inline", "L0", "SCHEMA.VALUE", "TQ-BOOK-3", "Store a codebook per row as a tensor.", needs=SHAPED)
def schema_rows_inline(repo: Subject) -> Iterator[Finding]:
    for id, book in repo.manifest["codebooks"].items():
        if book.get("rows") is not None and book.get("tensor") is None:
            yield Finding("rows requires tensor", join("codebooks", id, "rows"))


@check(
    "schema.rows_weight", "L0", "SCHEMA.VALUE", "TQ-BOOK-3", "Give each number of rows its own codebook.", needs=SHAPED
)
def schema_rows_weight(repo: Subject) -> Iterator[Finding]:
    for stage in repo.stages:
        rows = repo.manifest["codebooks"][stage.codebook].get("rows")
        if rows is not None and rows != stage.rows:
            message = f"the codebook {brief(stage.codebook)} has {rows} rows, the weight {stage.rows}"
            yield Finding(message, stage.pointer + "/codebook")


@check(
    "schema.entries_trellis",
    "L0",
    "SCHEMA.VALUE",
    "TQ-BOOK-4",
    "A trellis needs an entry for each window.",
    needs=SHAPED,
)
def schema_entries_trellis(repo: Subject) -> Iterator[Finding]:
    for stage in repo.stages:
        if stage.window > stage.bits and stage.entries != 2**stage.window:
            message = f"expected a codebook of 2^window = {2**stage.window} entries, found {stage.entries}"
            yield Finding(message, stage.pointer + "/codebook")


@check(
    "schema.entries_plain",
    "L0",
    "SCHEMA.VALUE",
    "TQ-BOOK-4",
    "Remove the entries that no code can select.",
    needs=SHAPED,
)
def schema_entries_plain(repo: Subject) -> Iterator[Finding]:
    for stage in repo.stages:
        if stage.window == stage.bits and stage.entries > 2**stage.bits:
            message = f"expected a codebook of at most 2^bits = {2**stage.bits} entries, found {stage.entries}"
            yield Finding(message, stage.pointer + "/codebook")


@check("schema.book_size", "L0", "LIMIT.SIZE", "TQ-BOOK-5", "Use fewer entries or a smaller dimension.", needs=SHAPED)
def schema_book_size(repo: Subject) -> Iterator[Finding]:
    for id, book in repo.manifest["codebooks"].items():
        if book["entries"] * book["dimension"] > 2**20:
            message = f"expected entries * p of at most 2^20, found {book['entries']} * {book['dimension']}"
            yield Finding(message, join("codebooks", id))


@check("schema.origin", "L0", "SCHEMA.VALUE", "TQ-BOOK-7", "Correct the origin, or name another method.", needs=SHAPED)
def schema_origin(repo: Subject) -> Iterator[Finding]:
    for id, book in repo.manifest["codebooks"].items():
        if (book.get("origin") or {}).get("method") != "lloyd-max-sphere":
            continue
        if book["dimension"] != 1:
            yield Finding(
                f"expected dimension 1 for lloyd-max-sphere, found {book['dimension']}",
                join("codebooks", id, "dimension"),
            )
        if book["entries"] > 256:
            message = f"expected at most 256 entries for lloyd-max-sphere, found {book['entries']}"
            yield Finding(message, join("codebooks", id, "entries"))
        if book.get("rows") is not None:
            yield Finding("expected no rows for lloyd-max-sphere", join("codebooks", id, "rows"))


@check(
    "schema.byte_sum", "L0", "SCHEMA.VALUE", "TQ-BOOK-8", "Correct the origin, or name another method.", needs=SHAPED
)
def schema_byte_sum(repo: Subject) -> Iterator[Finding]:
    for id, book in repo.manifest["codebooks"].items():
        if (book.get("origin") or {}).get("method") != "byte-sum":
            continue
        if book["dimension"] != 1:
            message = f"expected dimension 1 for byte-sum, found {book['dimension']}"
            yield Finding(message, join("codebooks", id, "dimension"))
        if book.get("rows") is not None:
            yield Finding("expected no rows for byte-sum", join("codebooks", id, "rows"))


# 8 Transforms


@check(
    "schema.vector_columns",
    "L0",
    "SCHEMA.VALUE",
    "TQ-NUM-1",
    "Choose a vector_length that divides the columns.",
    needs=SHAPED,
)
def schema_vector_columns(repo: Subject) -> Iterator[Finding]:
    for stage in repo.stages:
        if stage.cols % stage.vector_length:
            message = f"expected a divisor of {stage.cols} columns, found {stage.vector_length}"
            yield Finding(message, stage.pointer + "/vector_length")


@check(
    "schema.block",
    "L0",
    "SCHEMA.VALUE",
    "TQ-TRAN-1",
    "Choose a transform whose size divides vector_length, or a vector_length that divides it.",
    needs=SHAPED,
)
def schema_block(repo: Subject) -> Iterator[Finding]:
    for stage in repo.stages:
        if stage.vector_length % stage.size and stage.size % stage.vector_length:
            message = (
                f"expected size and vector_length to divide one another, found {stage.size} and {stage.vector_length}"
            )
            yield Finding(message, stage.pointer + "/transform")


@check(
    "schema.block_columns",
    "L0",
    "SCHEMA.VALUE",
    "TQ-TRAN-1",
    "Choose a transform whose size divides the columns.",
    needs=SHAPED,
)
def schema_block_columns(repo: Subject) -> Iterator[Finding]:
    for stage in repo.stages:
        if stage.cols % stage.size:
            message = f"expected a transform whose size divides {stage.cols} columns, found size {stage.size}"
            yield Finding(message, stage.pointer + "/transform")


@check(
    "schema.outer_alone",
    "L0",
    "SCHEMA.MISSING_FIELD",
    "TQ-NUM-9",
    "Add `offsets`, or leave `outer_offsets` out.",
    needs=SHAPED,
)
def schema_outer_alone(repo: Subject) -> Iterator[Finding]:
    for stage in repo.stages:
        if stage.outer_offsets is not None and stage.offsets is None:
            yield Finding("the key offsets is required beside outer_offsets", stage.pointer + "/offsets")


@check(
    "schema.factors",
    "L0",
    "SCHEMA.VALUE",
    "TQ-TRAN-4",
    "Use powers of two and the Paley orders of the rule.",
    needs=SHAPED,
)
def schema_factors(repo: Subject) -> Iterator[Finding]:
    for id, transform in repo.manifest["transforms"].items():
        for index, factor in enumerate(transform.get("factors", [])):
            if not has_hadamard(factor):
                message = f"no Hadamard factor of order {factor} is defined"
                yield Finding(message, join("transforms", id, "factors", index))


@check(
    "schema.factors_product",
    "L0",
    "SCHEMA.VALUE",
    "TQ-TRAN-4",
    "Make the product of the factors the size.",
    needs=SHAPED,
)
def schema_factors_product(repo: Subject) -> Iterator[Finding]:
    for id, transform in repo.manifest["transforms"].items():
        product = math.prod(transform.get("factors", [transform["size"]]))
        if product != transform["size"]:
            message = f"expected factors with the product {transform['size']}, found {product}"
            yield Finding(message, join("transforms", id, "factors"))


@check("schema.signs_length", "L0", "SCHEMA.VALUE", "TQ-TRAN-5", "Write 2 ceil(B / 8) hex digits.", needs=SHAPED)
def schema_signs_length(repo: Subject) -> Iterator[Finding]:
    for id, transform in repo.manifest["transforms"].items():
        digits = 2 * -(-transform["size"] // 8)
        if "signs" in transform and len(transform["signs"]) != digits:
            message = f"expected {digits} hex digits, found {len(transform['signs'])}"
            yield Finding(message, join("transforms", id, "signs"))


@check("schema.signs_padding", "L0", "SCHEMA.VALUE", "TQ-TRAN-5", "Clear the high bits of the last byte.", needs=SHAPED)
def schema_signs_padding(repo: Subject) -> Iterator[Finding]:
    for id, transform in repo.manifest["transforms"].items():
        used = transform["size"] % 8 or 8
        if int(transform.get("signs", "00")[-2:], 16) >> used:
            yield Finding(f"expected the bits from {used} on of the last byte to be 0", join("transforms", id, "signs"))


# 15 Features in use


@check("schema.features_missing", "L0", "SCHEMA.FEATURES", "TQ-VER-1", "Add the feature to `features`.", needs=SHAPED)
def schema_features_missing(repo: Subject) -> Iterator[Finding]:
    for feature, place in sorted(_in_use(repo).items()):
        if feature not in repo.manifest["features"]:
            yield Finding(f"{feature} is in use ({brief(place, 200)}) and not listed", "/features")


@check(
    "schema.features_unused", "L0", "SCHEMA.FEATURES", "TQ-VER-1", "Remove the feature from `features`.", needs=SHAPED
)
def schema_features_unused(repo: Subject) -> Iterator[Finding]:
    in_use = _in_use(repo)
    for index, feature in enumerate(repo.manifest["features"]):
        if feature not in in_use:
            yield Finding(f"{feature} is listed and not in use", join("features", index))


def _in_use(repo: Subject) -> dict[str, str]:
    """Each feature in use, with one place that uses it [TQ-VER-1]."""
    in_use: dict[str, str] = {}
    for id, book in repo.manifest["codebooks"].items():
        if book["dimension"] > 1:
            in_use["vector_codebook"] = join("codebooks", id)
        if book.get("rows") is not None:
            in_use["row_codebook"] = join("codebooks", id)
    for id, transform in repo.manifest["transforms"].items():
        if transform["kind"] in ("dense", "givens", "permutation"):
            in_use[transform["kind"]] = join("transforms", id)
    for name, entry in repo.quantized.items():
        if len(entry["stages"]) > 1:
            in_use["stages"] = join("tensors", name)
        if entry.get("column_scale") is not None:
            in_use["column_scale"] = join("tensors", name)
    for stage in repo.stages:
        if stage.window > stage.bits:
            in_use["trellis"] = stage.pointer
        if stage.tile != (1, stage.cols):
            in_use["tiles"] = stage.pointer
        if stage.offsets is not None:
            in_use["offsets"] = stage.pointer
        if stage.outer_scales is not None or stage.outer_offsets is not None:
            in_use["outer_scales"] = stage.pointer
        if stage.vector_length < stage.size:
            in_use["fine_scales"] = stage.pointer
    return in_use


# 5 Payload container: read_header reads, each check owns one kind of breach

NAMED = (*SHAPED, "path.name", "path.reserved", "path.device", "path.collision")  # the table of files can be trusted
OPENED = (*SHAPED, "path.", "bind.shards", "container.absent")  # and the payload files are there


@check("bind.shards", "L1", "BIND.SHARDS", "TQ-SHARD-1", "Name the payload files as the rule says.", needs=NAMED)
def bind_shards(repo: Subject) -> Iterator[Finding]:
    count = len(repo.payload_files)
    wanted = {f"turboquant_weights-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)}
    if count <= 1:
        wanted = {"turboquant_weights.safetensors"}
    for name in sorted(wanted - set(repo.payload_files)):
        yield Finding(f"expected a payload file {name} among {count}, found none", "/files", name)
    for name in sorted(set(repo.payload_files) - wanted):
        yield Finding(f"{name} is no name of a payload file among {count}", join("files", name), name)
    for name, file in repo.manifest["files"].items():
        if name.startswith("turboquant_weights") and name.endswith(".safetensors") and file["role"] != "payload":
            yield Finding(f"expected the role payload, found {file['role']}", join("files", name, "role"), name)


@check(
    "container.absent",
    "L0",
    "BIND.MISSING_FILE",
    "TQ-REPO-1",
    "Add the payload file: its header cannot be judged.",
    needs=NAMED,
)
def container_absent(repo: Subject) -> Iterator[Finding]:
    for name in repo.payload_files:
        if repo.file_kinds[name] == "missing":
            yield Finding(f"expected a file {name}, found none", join("files", name), name)


def _container(kind: str, code: str, rule: str, advice: str) -> None:
    @check(f"container.{kind}", "L0", code, rule, advice, needs=OPENED)
    def _(repo: Subject) -> Iterator[Finding]:
        for header in repo.headers.values():
            yield from (finding for finding in header.findings if finding.kind == kind)


_container("header_length", "CONTAINER.HEADER_LENGTH", "TQ-PAY-1", "Write the file again: its first 8 bytes are wrong.")
_container("header", "CONTAINER.HEADER", "TQ-PAY-2", "Write the header by section 5.")
_container("entry", "CONTAINER.HEADER", "TQ-PAY-3", "Give each tensor exactly dtype, shape and data_offsets.")
_container("metadata", "CONTAINER.HEADER", "TQ-PAY-2", "Write strings, or leave `__metadata__` out.")
_container("name", "CONTAINER.HEADER", "TQ-MAN-4", "Rename the tensor.")
_container("duplicate_name", "CONTAINER.DUPLICATE_NAME", "TQ-PAY-3", "Keep one of the two.")
_container("dtype", "CONTAINER.DTYPE", "TQ-PAY-4", "Store the tensor as one of the dtypes of the rule.")
_container("shape", "CONTAINER.SHAPE", "TQ-PAY-4", "Make shape, dtype and range agree.")
_container("offsets", "CONTAINER.OFFSETS", "TQ-PAY-5", "Lay the tensors one after another, up to the end of the file.")
_container("alignment", "CONTAINER.ALIGNMENT", "TQ-PAY-8", "Pad the header, and lay tensors of wide elements first.")
_container("values", "LIMIT.MEMORY", "TQ-LIM-1", "This judge reads no more: use more shards.")


@check(
    "container.name_in_shards",
    "L0",
    "CONTAINER.DUPLICATE_NAME",
    "TQ-PAY-3",
    "Keep the tensor in one shard.",
    needs=OPENED,
)
def container_name_in_shards(repo: Subject) -> Iterator[Finding]:
    seen: dict[str, str] = {}
    for file, header in repo.headers.items():
        for name in header.tensors:
            if other := seen.get(name):
                yield Finding(f"{brief(name)} also stands in {other}", join(name), file, 8)
            seen[name] = file
