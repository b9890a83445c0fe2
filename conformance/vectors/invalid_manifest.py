"""The invalid cases of names, of JSON and of the manifest, each one mutation of a valid case."""

from __future__ import annotations

from typing import Any

from conformance.vectors.builder import FEATURES, Json
from conformance.vectors.recipes import (
    BOMB,
    FULL,
    MANIFEST,
    PAYLOAD,
    PLAIN,
    TYPICAL,
    Cases,
    Step,
    put,
    refresh,
    then,
)

END = f"/features/{len(FEATURES)}"  # behind the features of the case TYPICAL, which has all of them


def path(c: Cases) -> None:
    names = [
        ("traversal", "../LICENSE", "SEC-1", "A name must not leave the directory."),
        ("absolute", "/etc/hostname", "SEC-1", "A name is no absolute path."),
        ("subdirectory", "sub/LICENSE", "", "A name is no path."),
        ("backslash", "sub\\LICENSE", "", "A backslash separates paths on some systems."),
        ("drive", "C:LICENSE", "", "A colon is not allowed."),
        ("dot-dot", "..", "SEC-1", "A name does not begin with a dot."),
        ("hidden", ".LICENSE", "", "A name does not begin with a dot."),
        ("hyphen", "-LICENSE", "", "A name does not begin with a hyphen."),
        ("space", "LICENSE 1", "", "A space is not allowed."),
        (
            "line-feed",
            "LICENSE\n",
            "",
            "A line feed behind the name is not allowed (beware of $ in regular expressions).",
        ),
        ("unicode", "LICENSÉ", "", "Only ASCII is allowed."),
        ("null", "LICENSE\0", "", "A null character is not allowed."),
        ("empty", "", "", "A name has a character at least."),
        ("long", "L" * 129, "", "A name has at most 128 characters."),
        ("dot-at-end", "LICENSE.", "", "Some file systems drop a dot at the end."),
    ]
    for id, name, more, reason in names:
        drop = then({"op": "delete", "file": "LICENSE"})
        c.rename(f"path/name-{id}", f"REPO-2 {more}", "PATH.NAME", "/files/LICENSE", name, reason, *drop)
    for id, name in (
        ("device", "nul"),
        ("device-case", "CON"),
        ("device-suffix", "aux.txt"),
        ("device-suffixes", "Com9.tar.gz"),
        ("device-printer", "LPT1"),
    ):
        there = then({"op": "move", "file": "LICENSE", "to": name})
        c.rename(f"path/name-{id}", "REPO-2", "PATH.NAME", "/files/LICENSE", name, "The name of a device.", *there)
    for id, name in (
        ("manifest", MANIFEST),
        ("card", "README.md"),
        ("manifest-case", "Quant_Manifest.json"),
        ("card-case", "readme.md"),
        ("cache", "__pycache__"),
        ("cache-case", "__PyCache__"),
    ):
        move = (
            {"op": "delete", "file": "LICENSE"} if name == MANIFEST else {"op": "move", "file": "LICENSE", "to": name}
        )
        c.rename(
            f"path/name-{id}", "REPO-2", "PATH.NAME", "/files/LICENSE", name, f"{name} must not be listed.", *then(move)
        )
    entry = {"role": "document", "size": 0, "sha256": "0" * 64}
    copy: Step = {"op": "copy", "file": "LICENSE", "to": "license"}
    reason = "On some file systems the two names are one."
    c.set(
        "path/collision", "REPO-2", "PATH.COLLISION", "/files/license", entry, reason, *then(copy), refresh("license")
    )

    hide: Step = {"op": "move", "to": ".blob"}
    for file, kind in ((PAYLOAD, "payload"), ("config.json", "support"), (MANIFEST, "manifest")):
        link: Step = {"op": "symlink", "file": file, "target": ".blob"}
        text = f"{file} is a link to a file beside it."
        reason = "A validator rejects links; a reader may accept one that the storage makes."
        c.add(
            f"path/link-{kind}",
            "REPO-1",
            "PATH.TYPE",
            text,
            reason,
            *then(hide | {"file": file}),
            link,
            pointer=file,
            judge="validator",
        )
    links = [
        ("dangling", PAYLOAD, ".nothing", "REPO-1", "PATH.TYPE BIND.MISSING_FILE", "The link leads nowhere."),
        ("directory", PAYLOAD, ".", "REPO-1", "PATH.TYPE", "The link leads to a directory."),
        ("device", PAYLOAD, "/dev/zero", "REPO-1 SEC-1", "PATH.TYPE", "The link leads to an endless device."),
        (
            "outside",
            PAYLOAD,
            "/etc/passwd",
            "REPO-1 SEC-1",
            "PATH.TYPE BIND.SIZE",
            "The link leads out of the repository.",
        ),
        ("loop", PAYLOAD, PAYLOAD, "REPO-1", "PATH.TYPE BIND.MISSING_FILE", "The link leads to itself."),
    ]
    for id, file, target, rule, code, reason in links:
        step = {"op": "symlink", "file": file, "target": target}
        c.add(f"path/link-{id}", rule, code, f"{file} is a link to {target}.", reason, step, pointer=file)
    for op, text in (("fifo", "a FIFO: opening it would wait forever"), ("directory", "a directory")):
        for file, judge in ((PAYLOAD, "reader"), ("config.json", "validator"), (MANIFEST, "reader")):
            id = f"path/{op}-{'manifest' if file == MANIFEST else 'payload' if file == PAYLOAD else 'support'}"
            code = "PATH.TYPE BIND.MISSING_FILE" if file == MANIFEST else "PATH.TYPE"
            reason = "Listed files and the manifest are regular files."
            c.add(id, "REPO-1", code, f"{file} is {text}.", reason, {"op": op, "file": file}, pointer=file, judge=judge)


def json_text(c: Cases) -> None:
    generator = '"generator": "tqformat conformance vectors"'
    add = '"extra": '
    kind = '"format": "tqformat"'
    encoding = [
        ("bom", kind, None, "A byte order mark is not allowed."),
        ("latin-1", generator, b'"generator": "\xe9"', "The byte e9 alone is not UTF-8."),
        ("overlong", generator, b'"generator": "\xc0\xaf"', "An overlong form is not UTF-8."),
        ("encoded-surrogate", generator, b'"generator": "\xed\xa0\x80"', "An encoded surrogate is not UTF-8."),
        ("beyond-unicode", generator, b'"generator": "\xf4\x90\x80\x80"', "U+110000 is not a character."),
        ("surrogate", generator, '"generator": "\\ud800"', "A lone surrogate is not a character."),
        (
            "surrogates-reversed",
            generator,
            '"generator": "\\ude00\\ud83d"',
            "Two surrogates in the wrong order are no pair.",
        ),
        ("surrogate-in-key", kind, kind + ', "extra": {"\\udfff": 0}', "A lone surrogate in a key."),
    ]
    for id, find, new, reason in encoding:
        if new is None:
            step = {"op": "splice", "file": MANIFEST, "offset": 0, "hex": "efbbbf"}
            c.add(f"json/{id}", "JSON-1", "JSON.ENCODING", "A byte order mark begins the manifest.", reason, step)
        else:
            c.text(f"json/{id}", "JSON-1", "JSON.ENCODING", find, new, reason)
    duplicates = [
        ("top", kind, f"{kind}, {kind}", "A key occurs twice, with the same value."),
        (
            "first-wins",
            kind,
            '"format": "gguf", "format": "tqformat"',
            "A key occurs twice: parsers disagree which one counts.",
        ),
        ("escaped", kind, kind + ', "\\u0066ormat": "tqformat"', "The two keys are the same after unescaping."),
        ("nested", '"tied_weights": {', '"tied_weights": {"alias": "norm", ', "A key occurs twice in a nested object."),
        ("extra", kind, kind + ', "extra": {"a": [{"b": 1, "b": 1}]}', "`extra` is JSON by the same rules."),
    ]
    for id, find, new, reason in duplicates:
        c.text(f"json/duplicate-{id}", "JSON-3", "JSON.DUPLICATE_KEY", find, new, reason)
    syntax = [
        ("trailing-comma", generator, f"{generator},,", "Two commas."),
        ("comment", generator, f"{generator} /* note */", "JSON has no comments."),
        ("single-quotes", generator, "\"generator\": 'x'", "Strings stand in double quotes."),
        ("control-character", generator, '"generator": "a\tb"', "A tab in a string must be escaped."),
        ("escape", generator, '"generator": "\\x41"', "There is no escape x."),
        ("short-escape", generator, '"generator": "\\u12"', "The escape u has four digits."),
        ("leading-zero", '"bits": 2}', '"bits": 02}', "A number does not begin with 0."),
        ("plus", '"bits": 2}', '"bits": +2}', "A number has no plus sign."),
        ("point", '"bits": 2}', '"bits": 2.}', "A digit follows the point."),
        ("hexadecimal", '"bits": 2}', '"bits": 0x2}', "Numbers are decimal."),
        ("full-width-digit", '"bits": 2}', '"bits": \uff12}', "Digits are ASCII."),
        ("form-feed", kind, "\f" + kind, "A form feed is not white space in JSON."),
        ("no-break-space", kind, "\u00a0" + kind, "A no-break space is not white space in JSON."),
    ]
    for id, find, new, reason in syntax:
        c.text(f"json/{id}", "JSON-2", "JSON.SYNTAX", find, new, reason)
    for value in ("NaN", "Infinity", "-Infinity"):
        text = f'{kind}, {add}{{"a": {value}}}'
        c.text(f"json/{value.lower()}", "JSON-4", "JSON.SYNTAX", kind, text, f"{value} is not JSON.")
    at_end = [
        ("truncated", {"offset": -3, "remove": 3, "text": ""}, "The manifest ends early."),
        ("two-values", {"offset": -1, "remove": 0, "text": "{}"}, "A second value follows."),
        ("null-byte", {"offset": -1, "remove": 0, "hex": "00"}, "A null character follows."),
        ("array", {"offset": 0, "text": "["}, "A bracket goes before the object."),
    ]
    for id, splice, reason in at_end:
        step = {"op": "splice", "file": MANIFEST} | splice
        c.add(f"json/{id}", "JSON-2", "JSON.SYNTAX", "The manifest's beginning or end is changed.", reason, step)
    whole = [
        ("empty", "", "An empty file holds no value."),
        ("white", " \n", "White space is no value."),
        ("list", '[{"format": "tqformat"}]', "The value is not an object."),
        ("string", '"tqformat"', "The value is not an object."),
        ("null", "null", "The value is not an object."),
        ("number", "1", "The value is not an object."),
    ]
    for id, text, reason in whole:
        step = {"op": "write", "file": MANIFEST, "text": text}
        c.add(f"json/whole-{id}", "JSON-2", "JSON.SYNTAX", f"The manifest is {text!r}.", reason, step)
    numbers = [
        ("integer", str(2**53), "An integer beyond 2^53 - 1."),
        ("negative", str(-(2**53)), "An integer beyond 2^53 - 1 in magnitude."),
        ("64-bit", str(2**64 - 1), "An integer beyond 2^53 - 1."),
        ("400-digits", "1" + "0" * 400, "An integer beyond 2^53 - 1, and beyond binary64."),
        ("5000-digits", "7" * 5000, "An integer beyond 2^53 - 1, and too long for some libraries."),
        ("1e999", "1e999", "Not finite in binary64."),
        ("negative-1e999", "-1.5E+999", "Not finite in binary64."),
        ("rounds-up", "1.7976931348623159e308", "Rounds to infinity in binary64."),
    ]
    for id, number, reason in numbers:
        c.text(f"json/number-{id}", "JSON-4", "JSON.NUMBER", kind, f'{kind}, {add}{{"a": {number}}}', reason)
    c.text(
        "json/number-level",
        "JSON-4",
        "JSON.NUMBER",
        "-1.4688262939453125",
        "-1e400",
        "A level that is not finite in binary64.",
    )
    typed = [
        (
            "2.0",
            '"stages": [{"bits": 2, "codebook": "b"',
            '"stages": [{"bits": 2.0, "codebook": "b"',
            "/tensors/w/stages/0/bits",
        ),
        (
            "2e0",
            '"stages": [{"bits": 2, "codebook": "b"',
            '"stages": [{"bits": 2e0, "codebook": "b"',
            "/tensors/w/stages/0/bits",
        ),
        ("shape", '"shape": [4, 16]', '"shape": [4, 16.0]', "/tensors/w/shape/1"),
        ("entries", '"entries": 4', '"entries": 4.0', "/codebooks/b/entries"),
        ("seed", '"seed": 7', '"seed": 7.0', "/transforms/t/seed"),
        ("size", '"size": 26', '"size": 26.0', "/files/config.json/size"),
    ]
    for id, find, new, pointer in typed:
        reason = "An integer is written without fraction and exponent."
        c.text(f"json/not-integer-{id}", "JSON-4", "SCHEMA.TYPE", find, new, reason, pointer=pointer)

    for count, unit, id in ((60 * 2**20, "[", "brackets"), (10 * 2**20, '{"a":', "braces")):
        step = {"op": "write", "file": MANIFEST, "text": unit, "count": count}
        code = "JSON.DEPTH JSON.SYNTAX LIMIT.SIZE"
        text = f"The manifest is {unit} repeated {count} times."
        c.add(f"json/bomb-{id}", "JSON-5 JSON-2", code, text, "Nested too deep, and never closed.", step, limits=BOMB)
    for depth in (65, 1000, 100000):
        left, right = "[" * (depth - 2), "]" * (depth - 2)
        text = f'{kind}, "extra": {{"a": {left}{right}}}'
        reason = f"{depth} levels of nesting in `extra`: a reader may refuse more than 64."
        c.text(f"json/depth-{depth}", "JSON-5", "JSON.DEPTH", kind, text, reason, result="acceptable")


def schema_versions(c: Cases) -> None:
    version = "SCHEMA.VERSION"
    for id, value in (("other", "gguf"), ("case", "TQFormat"), ("empty", ""), ("space", "tqformat ")):
        c.set(f"schema/format-{id}", "MAN-3", version, "/format", value, "Not this format.")
    c.set("schema/version-2", "VER-4 MAN-3", version, "/format_version", "2.0", "Another major version.")
    c.set("schema/version-0", "VER-4", version, "/format_version", "0.9", "0.x was never published.")
    c.set("schema/version-10", "VER-4", version, "/format_version", "10.0", "Another major version that begins with 1.")
    wrong = [
        ("one", "1"),
        ("three", "1.0.0"),
        ("zero-major", "01.0"),
        ("zero-minor", "1.00"),
        ("space", " 1.0"),
        ("line-feed", "1.0\n"),
        ("digits", "1.\u0660"),
        ("sign", "1.-1"),
        ("empty", ""),
    ]
    for id, value in wrong:
        c.set(f"schema/version-{id}", "MAN-3", version, "/format_version", value, "Not of the form major.minor.")
    c.set(
        "schema/version-number",
        "MAN-3",
        version,
        "/format_version",
        1.5,
        "format_version is a string.",
    )
    c.remove("schema/missing-format", "MAN-3", version, "/format", "`format` is required.")
    c.remove(
        "schema/missing-version",
        "MAN-3",
        version,
        "/format_version",
        "`format_version` is required.",
    )
    step = put(END, "sparse")
    new = then(step, put("/sparsity", {"layout": "2:4"}))
    reason = "The version is judged before the unknown feature and key are seen."
    c.set("schema/version-first", "MAN-3 VER-4", version, "/format_version", "2.0", reason, *new)
    name: Step = {"op": "rename", "path": "/files/LICENSE", "to": "../LICENSE"}
    reason = "The version is judged before the names of files, which another version may write otherwise."
    c.set("schema/version-before-names", "MAN-3 VER-4", version, "/format_version", "2.0", reason, *then(name))

    unknown = "SCHEMA.UNKNOWN_FEATURE"
    c.set("schema/unknown-feature", "VER-2 VER-1", unknown, END, "sparse", "A feature that nobody knows.")
    c.set("schema/unknown-feature-case", "VER-2", unknown, "/features/0", "Trellis", "Feature names are lower case.")
    new = then(put("/format_version", "1.7"), put("/sparsity", {"layout": "2:4"}))
    text = "A file of version 1.7 with an unknown feature and the key that it announces."
    reason = "The feature is refused before the unknown key is seen."
    c.add("schema/unknown-feature-first", "VER-2 VER-3 MAN-3", unknown, text, reason, step, *new, pointer=END)
    reason = "Features are judged before the names of files."
    c.set("schema/unknown-feature-before-names", "VER-2 MAN-3", unknown, END, "sparse", reason, *then(name))
    reason = "A key of a later version needs a feature that announces it."
    c.set(
        "schema/version-1.7-unknown-field",
        "VER-3 MAN-1",
        "SCHEMA.UNKNOWN_FIELD",
        "/sparsity",
        {},
        reason,
        base="valid/versions/minor-7",
    )
    c.set(
        "schema/feature-twice",
        "VER-1",
        "SCHEMA.VALUE",
        END,
        "tiles",
        "Each feature is listed once.",
        pointer="/features",
    )
    c.set("schema/feature-type", "MAN-2", "SCHEMA.TYPE", END, 1, "Features are strings.")
    c.set("schema/features-null", "MAN-2", "SCHEMA.TYPE", "/features", None, "`features` is a list.")
    c.set("schema/features-object", "MAN-2", "SCHEMA.TYPE", "/features", {}, "`features` is a list.")
    c.set("schema/features-string", "MAN-2", "SCHEMA.TYPE", "/features", "tiles", "`features` is a list.")
    for k, feature in enumerate(FEATURES):
        keys = {"pointer": "/features"}
        c.remove(
            f"schema/feature-{feature}-unlisted",
            "VER-1",
            "SCHEMA.FEATURES",
            f"/features/{k}",
            f"`{feature}` is in use.",
            **keys,
        )
        reason = f"`{feature}` is not in use."
        c.set(
            f"schema/feature-{feature}-unused",
            "VER-1",
            "SCHEMA.FEATURES",
            "/features/0",
            feature,
            reason,
            base=PLAIN,
            **keys,
        )


def schema_fields(c: Cases) -> None:
    objects = [
        ("top", TYPICAL, ""),
        ("base-model", TYPICAL, "/base_model"),
        ("quantization", TYPICAL, "/quantization"),
        ("allocation", FULL, "/quantization/allocation"),
        ("calibration", FULL, "/quantization/calibration"),
        ("file", TYPICAL, "/files/LICENSE"),
        ("identity", PLAIN, "/transforms/t"),
        ("hadamard", TYPICAL, "/transforms/t"),
        ("dense", TYPICAL, "/transforms/dense"),
        ("givens", TYPICAL, "/transforms/givens"),
        ("permutation", TYPICAL, "/transforms/permutation"),
        ("codebook", TYPICAL, "/codebooks/b"),
        ("origin", TYPICAL, "/codebooks/b/origin"),
        ("quantized", TYPICAL, "/tensors/w"),
        ("passthrough", TYPICAL, "/tensors/norm"),
        ("stage", TYPICAL, "/tensors/w/stages/0"),
        ("accounting", TYPICAL, "/accounting"),
    ]
    for id, base, where in objects:
        c.set(
            f"schema/unknown-{id}",
            "MAN-1",
            "SCHEMA.UNKNOWN_FIELD",
            f"{where}/note",
            1,
            "Objects are closed.",
            base=base,
        )
        c.set(
            f"schema/extra-type-{id}", "MAN-2", "SCHEMA.TYPE", f"{where}/extra", [], "`extra` is an object.", base=base
        )
    c.set("schema/unknown-case", "MAN-1", "SCHEMA.UNKNOWN_FIELD", "/Extra", {}, "Keys are case sensitive.")
    required = {
        "": "features generator base_model loader_kind quantization files transforms codebooks tensors accounting",
        "/base_model": "id",
        "/quantization": "method bits",
        "/files/LICENSE": "role size sha256",
        "/transforms/t": "kind size factors signs",
        "/transforms/dense": "matrix",
        "/transforms/givens": "pairs angles",
        "/transforms/permutation": "index",
        "/codebooks/b": "entries dimension",
        "/codebooks/b/origin": "method vector_length grid_size iterations",
        "/tensors/w": "kind shape dtype effective_bits stages",
        "/tensors/norm": "data",
        "/tensors/w/stages/0": "bits codebook transform codes scales",
        "/accounting": "original_bytes stored_bytes ratio quantized_tensors passthrough_tensors quantized_scalars passthrough_scalars",
    }
    for where, fields in required.items():
        for name in fields.split():
            rule = (
                "BOOK-7"
                if where.endswith("origin") and name != "method"
                else "ACC-1"
                if where == "/accounting"
                else "MAN-2"
            )
            id = f"schema/missing-{where.replace('/', '-').strip('-') or 'top'}-{name}"
            c.remove(id, rule, "SCHEMA.MISSING_FIELD", f"{where}/{name}", f"`{name}` is required.")
    for base, id in ((FULL, "allocation/allocator"), (FULL, "calibration/source")):
        where = f"/quantization/{id}"
        c.remove(
            f"schema/missing-{id.replace('/', '-')}",
            "MAN-2",
            "SCHEMA.MISSING_FIELD",
            where,
            "A required key.",
            base=base,
        )
    c.remove(
        "schema/codebook-neither",
        "BOOK-1",
        "SCHEMA.MISSING_FIELD",
        "/codebooks/pairs/values",
        "One of `values` and `tensor` is required.",
    )

    types = [
        ("generator", "/generator", 1),
        ("base-model", "/base_model", "example/model"),
        ("base-model-id", "/base_model/id", None),
        ("revision", "/base_model/revision", 1),
        ("pipeline-tag", "/pipeline_tag", 1),
        ("loader-kind", "/loader_kind", None),
        ("quantization", "/quantization", []),
        ("method", "/quantization/method", None),
        ("bits-true", "/quantization/bits", True),
        ("bits-string", "/quantization/bits", "2"),
        ("quantization-seed", "/quantization/seed", "7"),
        ("include", "/quantization/include", "*.weight"),
        ("include-null", "/quantization/include", None),
        ("exclude-item", "/quantization/exclude", [1]),
        ("allocation", "/quantization/allocation", "greedy"),
        ("files", "/files", []),
        ("file", "/files/LICENSE", 1),
        ("file-null", "/files/LICENSE", None),
        ("payload-null", f"/files/{PAYLOAD}", None),
        ("file-size", "/files/LICENSE/size", "15"),
        ("file-size-true", "/files/LICENSE/size", True),
        ("file-sha256", "/files/LICENSE/sha256", 0),
        ("chunk-size", "/files/LICENSE/chunk_size", "4096"),
        ("chunks", "/files/LICENSE/chunks", "0"),
        ("role", "/files/LICENSE/role", None),
        ("transforms", "/transforms", None),
        ("transform", "/transforms/t", "hadamard"),
        ("transform-null", "/transforms/t", None),
        ("transform-new-null", "/transforms/none", None),
        ("transform-kind", "/transforms/t/kind", 1),
        ("transform-size", "/transforms/t/size", None),
        ("factors", "/transforms/t/factors", 16),
        ("factor", "/transforms/t/factors/0", "16"),
        ("signs", "/transforms/t/signs", 0),
        ("signs-null", "/transforms/t/signs", None),
        ("seed", "/transforms/t/seed", "7"),
        ("matrix", "/transforms/dense/matrix", None),
        ("index", "/transforms/permutation/index", [0, 1]),
        ("codebook", "/codebooks/b", []),
        ("codebook-null", "/codebooks/b", None),
        ("dimension-true", "/codebooks/b/dimension", True),
        ("values", "/codebooks/b/values", {}),
        ("values-item", "/codebooks/b/values/0", "1"),
        ("values-null-item", "/codebooks/b/values/0", None),
        ("origin", "/codebooks/b/origin", "lloyd-max-sphere"),
        ("grid-size", "/codebooks/b/origin/grid_size", "8193"),
        ("tensors", "/tensors", []),
        ("tensor", "/tensors/w", None),
        ("tensor-kind", "/tensors/w/kind", None),
        ("shape", "/tensors/w/shape", 64),
        ("shape-item", "/tensors/w/shape/0", "4"),
        ("stage-bits-true", "/tensors/w2/stages/0/bits", True),
        ("dtype", "/tensors/w/dtype", 1),
        ("effective-bits", "/tensors/w/effective_bits", "2"),
        ("stages", "/tensors/w/stages", {}),
        ("stage", "/tensors/w/stages/0", 1),
        ("stage-null", "/tensors/w/stages/0", None),
        ("window", "/tensors/w/stages/0/window", "2"),
        ("tile", "/tensors/w/stages/0/tile", 16),
        ("tile-item", "/tensors/w2/stages/1/tile/0", None),
        ("codes", "/tensors/w/stages/0/codes", ["w.codes"]),
        ("scales-null", "/tensors/w/stages/0/scales", None),
        ("outer-scales", "/tensors/w3/stages/0/outer_scales", 1.0),
        ("offsets", "/tensors/w3/stages/0/offsets", []),
        ("outer-offsets", "/tensors/w3/stages/0/outer_offsets", True),
        ("column-scale", "/tensors/w/column_scale", 1.0),
        ("data", "/tensors/norm/data", 1),
        ("tied", "/tied_weights", []),
        ("tied-null", "/tied_weights", None),
        ("alias", "/tied_weights/alias", 1),
        ("alias-null", "/tied_weights/alias", None),
        ("accounting", "/accounting", []),
        ("total", "/accounting/stored_bytes", "280"),
        ("ratio", "/accounting/ratio", "0.8"),
    ]
    for id, where, value in types:
        c.set(
            f"schema/type-{id}",
            "MAN-2",
            "SCHEMA.TYPE",
            where,
            value,
            "A value of another JSON type than the table says.",
        )


def schema_values(c: Cases) -> None:
    def value(
        id: str, rule: str, where: str, new: Any, reason: str, *more: Step, code: str = "SCHEMA.VALUE", **keys: Any
    ) -> None:
        c.set(f"schema/{id}", rule, code, where, new, reason, *more, **keys)

    limit = "SCHEMA.VALUE LIMIT.SIZE"
    # [TQ-MAN-4, TQ-MAN-5, TQ-REPO-3, TQ-REPO-4, TQ-REPO-6]
    free: Json = {"judge": "validator"}  # [TQ-ERR-3]
    for id, name in (
        ("control", "a\u001fb"),
        ("null", "a\0"),
        ("delete", "a\u007f"),
        ("line-feed", "a\n"),
        ("empty", ""),
        ("513", "a" * 513),
    ):
        reason = "Names have 1 to 512 characters from U+0020 on, without U+007F."
        c.rename(f"schema/name-{id}", "MAN-4", "SCHEMA.VALUE", "/tensors/norm", name, reason, **free)
    for id, name in (
        ("root", "/norm"),
        ("root-backslash", "\\norm"),
        ("parent", "../../x"),
        ("parent-inside", "a/../x"),
        ("parent-end", "a\\.."),
        ("parent-alone", ".."),
    ):
        c.rename(f"schema/name-{id}", "MAN-4", "SCHEMA.VALUE", "/tensors/norm", name, "A name leads nowhere.", **free)
    c.rename(
        "schema/name-alias",
        "MAN-4",
        "SCHEMA.VALUE",
        "/tied_weights/alias",
        "a\u0001",
        "An alias is a weight name.",
        **free,
    )
    value("name-storage", "MAN-4", "/tensors/norm/data", "a\tb", "A storage name without control characters.", **free)
    value("name-storage-empty", "MAN-4", "/tensors/norm/data", "", "A storage name has a character at least.", **free)
    value("name-metadata", "MAN-4", "/tensors/norm/data", "__metadata__", "`__metadata__` is not a storage name.")
    reason = "No weight may be called so."
    c.rename("schema/name-metadata-weight", "MAN-4", "SCHEMA.VALUE", "/tensors/norm", "__metadata__", reason, **free)
    rename = then(put("/tensors/w/stages/0/transform", "a\n"))
    c.rename(
        "schema/name-identifier",
        "MAN-4",
        "SCHEMA.VALUE",
        "/transforms/t",
        "a\n",
        "An identifier without control characters.",
        *rename,
        **free,
    )
    value("loader-kind", "MAN-5", "/loader_kind", "text-to-video", "Not one of the eight kinds.")
    value("loader-kind-class", "MAN-5", "/loader_kind", "AutoModelForCausalLM", "The kind, not the class.")
    value("role", "REPO-3", "/files/LICENSE/role", "licence", "Not one of the four roles.")
    rename = then(
        {"op": "rename", "path": "/files/example.py", "to": "load_quantized.py"},
        {"op": "move", "file": "example.py", "to": "load_quantized.py"},
    )
    reason = "A file of this name has the role `code`."
    value(
        "role-loader",
        "REPO-6",
        "/files/example.py/role",
        "support",
        reason,
        *rename,
        pointer="/files/load_quantized.py/role",
        **free,
    )
    value("sha256-upper", "REPO-4", "/files/LICENSE/sha256", "ABCDEF" + "0" * 58, "Digits are lower case.")
    value("sha256-short", "REPO-4", "/files/LICENSE/sha256", "0" * 63, "A digest has 64 digits.")
    value("sha256-prefix", "REPO-4", "/files/LICENSE/sha256", "sha256:" + "0" * 57, "A digest has 64 hex digits.")
    value("file-size-negative", "REPO-4", "/files/LICENSE/size", -1, "A size is not negative.")
    # [TQ-REPO-8]
    three = "/files/three.txt"
    keys: Json = {"base": "valid/repository/chunks"}
    missing = "SCHEMA.MISSING_FIELD"
    for key, other in (("chunk_size", "chunks"), ("chunks", "chunk_size")):
        reason = f"`{key}` and `{other}` stand together."
        id = key.replace("_", "-")
        c.remove(f"schema/missing-{id}", "REPO-8", missing, f"{three}/{key}", reason, pointer=f"{three}/{key}", **keys)
        value(f"null-{id}", "REPO-8", f"{three}/{key}", None, reason, code=missing, **keys)
    digests = c.repos[keys["base"]].file_entry("support", c.repos[keys["base"]].others["three.txt"][1])["chunks"]
    for id, chunks, reason in (
        ("few", digests[:2], "8,193 bytes are three chunks."),
        ("many", [*digests, "0" * 64], "8,193 bytes are three chunks."),
        ("none", [], "8,193 bytes are three chunks."),
        ("short", [*digests[:2], digests[2][:63]], "A digest has 64 digits."),
        ("upper", [*digests[:2], digests[2].upper()], "Digits are lower case."),
    ):
        value(f"chunks-{id}", "REPO-8", f"{three}/chunks", chunks, reason, **keys)
    value("chunks-empty-file", "REPO-8", "/files/empty.txt/chunks", ["0" * 64], "No byte is in no chunk.", **keys)
    value("chunk-size-4095", "REPO-8", f"{three}/chunk_size", 4095, "A chunk has 4,096 bytes at least.", **keys)
    value("chunk-size-other", "REPO-8", f"{three}/chunk_size", 8192, "8,193 bytes are two chunks then.", **keys)
    # [TQ-MAN-6]
    ambiguous = [
        ("passthrough-stages", "/tensors/norm/stages", []),
        ("passthrough-bits", "/tensors/norm/effective_bits", 16),
        ("passthrough-column-scale", "/tensors/norm/column_scale", None),
        ("quantized-data", "/tensors/w/data", "norm.data"),
        ("hadamard-matrix", "/transforms/t/matrix", "dense.matrix"),
        ("hadamard-angles", "/transforms/t/angles", "givens.angles"),
        ("dense-signs", "/transforms/dense/signs", "0f"),
        ("dense-seed", "/transforms/dense/seed", None),
        ("givens-factors", "/transforms/givens/factors", [4]),
        ("givens-matrix", "/transforms/givens/matrix", "dense.matrix"),
        ("dense-index", "/transforms/dense/index", "permutation.index"),
        ("permutation-seed", "/transforms/permutation/seed", None),
        ("permutation-pairs", "/transforms/permutation/pairs", "givens.pairs"),
    ]
    for id, where, new in ambiguous:
        value(f"ambiguous-{id}", "MAN-6", where, new, "A key of another kind.", code="SCHEMA.AMBIGUOUS")
    for id, where in (("hadamard-index", "/transforms/t/index"), ("quantized-data", "/tensors/w/data")):
        reason, code = "A key of another kind, and of a type that null is none of.", "SCHEMA.AMBIGUOUS SCHEMA.TYPE"
        value(f"ambiguous-{id}-null", "MAN-6 MAN-2", where, None, reason, code=code)
    value(
        "ambiguous-identity-seed",
        "MAN-6",
        "/transforms/t/seed",
        1,
        "A key of another kind.",
        code="SCHEMA.AMBIGUOUS",
        base=PLAIN,
    )
    keys = {"code": "SCHEMA.AMBIGUOUS", "pointer": "/codebooks/trellis"}
    value(
        "ambiguous-codebook",
        "MAN-6 BOOK-1",
        "/codebooks/trellis/values",
        [0.0] * 16,
        "`values` and `tensor` exclude each other.",
        **keys,
    )
    # [TQ-MAN-7]
    for dtype in ("F64", "U8", "I32", "F8_E4M3"):
        value(
            f"quantized-{dtype.lower()}", "MAN-7", "/tensors/w/dtype", dtype, "A quantized weight is F32, F16 or BF16."
        )
    for dtype in ("float32", "f32", "F4", "C64"):
        value(f"dtype-{dtype.lower()}", "PASS-1 PAY-4", "/tensors/norm/dtype", dtype, "Not a dtype.")
    value("rank-1", "MAN-7", "/tensors/w/shape", [64], "A quantized weight has rank 2 at least.")
    value("rank-0", "MAN-7", "/tensors/w/shape", [], "A quantized weight has rank 2 at least.")
    value("rank-9", "MAN-7", "/tensors/w/shape", [4, 1, 1, 1, 1, 1, 1, 1, 16], "A weight has rank 8 at most.")
    value("rank-9-passthrough", "PASS-1", "/tensors/norm/shape", [1] * 8 + [16], "A weight has rank 8 at most.")
    value("no-columns", "MAN-7", "/tensors/w/shape", [4, 0], "A quantized weight has a column at least.")
    value("negative-rows", "MAN-7", "/tensors/w/shape", [-4, 16], "A dimension is not negative.")
    value(
        "two-negative",
        "MAN-7",
        "/tensors/w/shape",
        [-4, -1, 16],
        "Dimensions are not negative, even where their product is not.",
    )
    value(
        "columns",
        "MAN-7 LIM-1",
        "/tensors/w/shape/1",
        2**20 + 1,
        "At most 2^20 columns.",
        code=limit,
        base="valid/shapes/widest",
    )
    value(
        "scalars", "LIM-1 SEC-2", "/tensors/w/shape", [2**50, 16], "At most 2^53 - 1 scalars in a tensor.", code=limit
    )
    keys = {"code": limit, "pointer": "/tensors/norm/shape"}
    value(
        "scalars-passthrough",
        "LIM-1 SEC-2",
        "/tensors/norm/shape",
        [2**32, 2**32],
        "2^64 scalars are 0 in 64 bits.",
        **keys,
    )
    value(
        "scalars-empty",
        "MAN-7 LIM-1",
        "/tensors/w/shape",
        [0, 2**50, 16],
        "A dimension of 0 is taken as 1.",
        code=limit,
    )
    reason = "2^53 - 2 scalars have more bytes than that."
    value("bytes-passthrough", "PASS-1 MAN-7", "/tensors/norm/shape", [2**52 - 1, 2], reason, **keys)
    # [TQ-MAN-8, TQ-MAN-9]
    value("effective-bits", "MAN-8", "/tensors/w/effective_bits", 2.00001, "Not the sum of bits / p.")
    value(
        "effective-bits-vector", "MAN-8", "/tensors/w2/effective_bits", 5, "3 bits for two elements are 1.5 bits each."
    )
    reference = "SCHEMA.REFERENCE"
    value("no-codebook", "MAN-9", "/tensors/w/stages/0/codebook", "c", "No such codebook.", code=reference)
    other = "/tensors/C:\\w\\0/stages/0"  # where another stage still names the entry
    keys = {"code": reference, "base": "valid/json/odd-names"}
    value("no-codebook-second", "MAN-9", f"{other}/codebook", "c", "No such codebook.", **keys)
    value("no-transform-second", "MAN-9", f"{other}/transform", "w", "No such transform.", **keys)
    value("no-transform", "MAN-9", "/tensors/w/stages/0/transform", "w", "No such transform.", code=reference)
    value(
        "unused-transform",
        "MAN-9",
        "/transforms/u",
        {"kind": "identity", "size": 1},
        "No stage names it.",
        code=reference,
        **free,
    )
    value(
        "unused-codebook",
        "MAN-9",
        "/codebooks/u",
        {"entries": 1, "dimension": 1, "values": [0]},
        "No stage names it.",
        code=reference,
        **free,
    )
    # [TQ-CODE-1, TQ-CODE-2]
    stage = "/tensors/w/stages/0"
    value("bits-0", "CODE-1", f"{stage}/bits", 0, "A symbol has a bit at least.", base=PLAIN)
    value("bits-negative", "CODE-1", f"{stage}/bits", -1, "A symbol has a bit at least.", base=PLAIN)
    nine = then(put("/tensors/w/effective_bits", 9.0))
    value(
        "bits-9",
        "CODE-1",
        f"{stage}/bits",
        9,
        "A scalar codebook has at most 8 bits.",
        *nine,
        base="valid/codes/bits-8",
    )
    value(
        "bits-17", "CODE-1 LIM-1", f"{stage}/bits", 17, "At most 16 bits.", code=limit, base="valid/codes/bits-16-p-8"
    )
    value("window-narrow", "CODE-1", f"{stage}/window", 2, "The window is no narrower than the new bits.", base=PLAIN)
    value("window-0", "CODE-1", f"{stage}/window", 0, "0 does not stand for the default.", base=PLAIN)
    value(
        "window-17",
        "CODE-1 LIM-1",
        f"{stage}/window",
        17,
        "At most 16 bits.",
        code=limit,
        base="valid/codes/trellis-2-16",
    )
    short = then(put("/codebooks/b/entries", 512))
    reason = "A tile of 4 symbols of 2 bits has no 9 stream bits."
    keys = {"base": "valid/codes/trellis-whole-stream"}
    value("window-stream", "CODE-2", f"{stage}/window", 9, reason, *short, **keys)
    for id, tile, reason in (
        ("zero-rows", [0, 21], "A tile has a row at least."),
        ("zero-columns", [1, 0], "A tile has a column at least."),
        ("rows", [2, 21], "2 does not divide 3 rows."),
        ("columns", [1, 5], "5 does not divide 21 columns."),
        ("too-high", [6, 21], "6 does not divide 3 rows."),
        ("negative", [-1, -21], "A tile has a row at least."),
    ):
        value(f"tile-{id}", "CODE-2", f"{stage}/tile", tile, reason, *then(put("/features", ["tiles"])), base=PLAIN)
    for id, tile in (("one", [21]), ("three", [1, 21, 1]), ("none", [])):
        value(
            f"tile-{id}-items",
            "CODE-2",
            f"{stage}/tile",
            tile,
            "A tile has two sides.",
            base=PLAIN,
        )
    value("tile-p", "CODE-2", f"{stage}/tile", [2, 2], "p = 3 does not divide 2.", base="valid/tiles/vector")
    value(
        "tile-area",
        "CODE-2 LIM-1",
        f"{stage}/tile/0",
        8,
        "tr * cols is at most 2^22.",
        code=limit,
        pointer=f"{stage}/tile",
        base="valid/shapes/widest",
    )
    reason = "The least common multiple of 4 and 5 rows, times cols, is beyond 2^22."
    value(
        "tile-lcm",
        "CODE-2 LIM-1",
        "/tensors/w/stages/1/tile/0",
        5,
        reason,
        code=limit,
        pointer="/tensors/w/stages",
        base="valid/limits/tile-lcm",
    )
    value(
        "vector-length-p", "CODE-2", f"{stage}/vector_length", 2, "p = 3 does not divide 2.", base="valid/tiles/vector"
    )
    value("vector-length-0", "NUM-1", f"{stage}/vector_length", 0, "A vector has an element at least.", base=PLAIN)
    value("vector-length-5", "NUM-1", f"{stage}/vector_length", 5, "5 does not divide 21.", base=PLAIN)
    value("vector-length-42", "NUM-1", f"{stage}/vector_length", 42, "42 does not divide 21.", base=PLAIN)
    value(
        "vector-length-limit",
        "LIM-1",
        f"{stage}/vector_length",
        2**21,
        "At most 2^20.",
        code=limit,
        base="valid/shapes/widest",
    )
    value(
        "columns-p", "CODE-2", "/tensors/w/shape", [3, 10], "p = 3 does not divide 10.", base="valid/codebooks/vector-3"
    )
    # [TQ-BOOK-*]
    book = "/codebooks/b"
    value("entries-0", "BOOK-4", f"{book}/entries", 0, "A codebook has an entry at least.")
    value(
        "entries-many",
        "BOOK-4",
        f"{book}/entries",
        9,
        "3 bits reach 8 entries.",
        *then(put(f"{book}/values/8", 0.5)),
        base=PLAIN,
        pointer=book,
    )
    keys = {"base": "valid/codes/trellis-2-8", "pointer": f"{book}/entries"}
    value("entries-trellis", "BOOK-4", f"{book}/entries", 255, "A trellis needs 2^window entries.", **keys)
    value(
        "entries-trellis-bits", "BOOK-4", f"{book}/entries", 4, "A trellis needs 2^window entries, not 2^bits.", **keys
    )
    value(
        "entries-limit",
        "BOOK-5 LIM-1",
        f"{book}/entries",
        2**15,
        "entries * p is at most 2^20.",
        code=limit,
        base="valid/limits/entries-p-64",
    )
    value("dimension-0", "BOOK-1", f"{book}/dimension", 0, "p is 1 at least.")
    value(
        "dimension-65",
        "BOOK-5",
        f"{book}/dimension",
        65,
        "p is 64 at most.",
        code=limit,
        base="valid/limits/entries-p-64",
    )
    value(
        "values-few",
        "BOOK-1",
        f"{book}/values",
        [0.0, 1.0, 2.0],
        "entries * p values are needed.",
        base="valid/codebooks/unsorted-duplicates",
    )
    value(
        "values-none",
        "BOOK-1",
        f"{book}/values",
        [],
        "entries * p values are needed.",
        base="valid/codebooks/unsorted-duplicates",
    )
    value(
        "values-many",
        "BOOK-1",
        f"{book}/values/3",
        1,
        "entries * p values are needed.",
        base="valid/codebooks/inline-integers",
        pointer=f"{book}/values",
    )
    more = [0.5] * 4098
    keys = {"base": "valid/limits/values-4096", "code": limit, "pointer": f"{book}/values"}
    value(
        "values-4098",
        "BOOK-1 LIM-1",
        f"{book}/values",
        more,
        "At most 4,096 inline values.",
        *then(put(f"{book}/entries", 2049)),
        **keys,
    )
    keys = {
        "base": "valid/codebooks/unsorted-duplicates",
        "code": "SCHEMA.VALUE",
        "pointer": book,
    }
    value(
        "rows-inline",
        "BOOK-3",
        f"{book}/rows",
        3,
        "`rows` requires `tensor`.",
        *then(put("/features", ["row_codebook"])),
        **keys,
    )
    value("rows-other", "BOOK-3", "/codebooks/trellis/rows", 3, "`rows` equals the rows of the weight.")
    value("rows-negative", "BOOK-3", "/codebooks/trellis/rows", -2, "`rows` is not negative.")
    origin = f"{book}/origin"
    for id, where, new, reason in (
        ("grid", f"{origin}/grid_size", 2, "The grid has three points at least."),
        ("grid-large", f"{origin}/grid_size", 2**20 + 2, "The grid has 1,048,577 points at most."),
        ("iterations", f"{origin}/iterations", 0, "One iteration at least."),
        ("iterations-many", f"{origin}/iterations", 4097, "4,096 iterations at most."),
        ("vector-length", f"{origin}/vector_length", 0, "A vector has an element at least."),
    ):
        value(f"origin-{id}", "BOOK-7", where, new, reason, code=limit)
    value(
        "origin-null",
        "BOOK-7",
        f"{origin}/grid_size",
        None,
        "Lloyd-Max needs the three integers.",
        code="SCHEMA.MISSING_FIELD",
    )
    lloyd = {"method": "lloyd-max-sphere", "vector_length": 16, "grid_size": 8193, "iterations": 96}
    value(
        "origin-vector",
        "BOOK-7",
        "/codebooks/pairs/origin",
        lloyd,
        "Lloyd-Max codebooks are scalar.",
        pointer="/codebooks/pairs",
    )
    value(
        "origin-rows",
        "BOOK-7",
        "/codebooks/trellis/origin",
        lloyd,
        "Lloyd-Max codebooks have no `rows`.",
        pointer="/codebooks/trellis",
    )
    keys = {"pointer": book, "base": "valid/codes/trellis-8-9"}
    value("origin-entries", "BOOK-7", f"{book}/origin", lloyd, "Lloyd-Max codebooks have at most 256 entries.", **keys)
    for id, where, reason in (
        ("vector", "pairs", "Codebooks of sums of bytes are scalar."),
        ("rows", "trellis", "Codebooks of sums of bytes have no `rows`."),
    ):
        path, method = f"/codebooks/{where}", {"method": "byte-sum"}
        value(f"byte-sum-{id}", "BOOK-8", f"{path}/origin", method, reason, pointer=path)
    # [TQ-TRAN-*]
    t = "/transforms/t"
    value("transform-kind", "TRAN-1", f"{t}/kind", "fourier", "Not one of the five kinds.")
    value("size-0", "TRAN-1", f"{t}/size", 0, "A block has an element at least.", base=PLAIN)
    value("size-not-dividing", "TRAN-1", f"{t}/size", 4, "4 does not divide the row of 21.", base=PLAIN)
    value("size-larger", "TRAN-1", f"{t}/size", 42, "42 does not divide the row of 21.", base=PLAIN)
    value("size-limit", "LIM-1", f"{t}/size", 2**20 + 1, "At most 2^20.", code=limit, base="valid/shapes/widest")
    keys = {"base": "valid/transforms/blocks-in-vectors"}
    value(
        "size-not-dividing-vector",
        "TRAN-1",
        f"{stage}/vector_length",
        12,
        "8 divides the row, but not the vector of 12.",
        pointer=stage,
        **keys,
    )
    reason = "8 and 12 do not divide one another."
    value(
        "size-not-dividing-fine",
        "TRAN-1",
        f"{stage}/vector_length",
        6,
        "8 and 6 do not divide one another.",
        pointer=stage,
        **keys,
    )
    fine = {"base": "valid/transforms/fine-hadamard", "pointer": stage}
    reason = "24 columns are no multiple of a block of 48, though vectors of 6 divide it."
    value(
        "size-beyond-columns",
        "TRAN-1",
        "/tensors/w/shape",
        [6, 24],
        reason,
        *then(put(f"{t}/size", 48), put(f"{t}/factors", [12, 4]), put(f"{t}/signs", "00" * 6)),
        **fine,
    )
    alone = {"base": "valid/offsets/outer-offsets-alone", "pointer": f"{stage}/offsets"}
    reason = "Outer offsets multiply offsets."
    c.remove(
        "schema/outer-offsets-alone",
        "NUM-9",
        missing,
        f"{stage}/offsets",
        reason,
        *then(put("/features", ["outer_scales"])),
        **alone,
    )
    twelve = "valid/transforms/hadamard-12"
    for id, factors, reason in (
        ("none", [], "One factor at least."),
        ("one", [1, 12], "A factor is 2 at least."),
        ("six", [6, 2], "There is no construction of order 6."),
        ("three", [3, 4], "There is no construction of order 3."),
        ("product", [4], "The product of the factors is the size."),
        ("product-large", [12, 2], "The product of the factors is the size."),
        ("negative", [-12, -1], "A factor is 2 at least."),
    ):
        value(f"factors-{id}", "TRAN-4", f"{t}/factors", factors, reason, base=twelve)
    value(
        "factors-40",
        "TRAN-4",
        f"{t}/factors",
        [40],
        "There is no construction of order 40.",
        *forty(),
        base="valid/transforms/hadamard-20",
    )
    value(
        "factors-21",
        "TRAN-4",
        f"{t}/factors",
        [2] * 21,
        "At most 20 factors.",
        base="valid/transforms/hadamard-2x2x2x2x2x2",
    )
    keys = {"base": "valid/limits/paley-2040", "code": limit}
    larger = then(put(f"{t}/size", 2064), put(f"{t}/signs", "00" * 258), put("/tensors/w/shape/1", 2064))
    value("factors-2064", "TRAN-4 LIM-1", f"{t}/factors", [2064], "A Paley factor is at most 2,048.", *larger, **keys)
    for id, signs, reason in (
        ("short", "00", "12 signs are two bytes."),
        ("long", "000000", "12 signs are two bytes."),
        ("odd", "000", "A byte has two digits."),
        ("upper", "AB0C", "Digits are lower case."),
        ("prefix", "0x0c", "Hex digits only."),
        ("space", "ab 0", "Hex digits only."),
        ("line-feed", "ab0c\n", "Hex digits only (beware of $ in regular expressions)."),
        ("empty", "", "12 signs are two bytes."),
    ):
        value(f"signs-{id}", "TRAN-5", f"{t}/signs", signs, reason, base=twelve)
    value(
        "signs-unused",
        "TRAN-5",
        f"{t}/signs",
        "0010",
        "The unused bits are zero.",
        base=twelve,
    )
    value("seed-negative", "TRAN-6", f"{t}/seed", -1, "A seed is not negative.")
    value("dense-limit", "TRAN-7 LIM-1", "/transforms/dense/size", 4097, "At most 4,096.", code=limit)
    value("givens-odd", "TRAN-8", "/transforms/givens/size", 1, "Pairs need an even size.")
    nine_stages = {"bits": 1, "codebook": "b", "transform": "t", "codes": "w.8.codes", "scales": "w.8.scales"}
    more_bits = then(put("/tensors/w/effective_bits", 9.0))
    keys = {"code": limit, "pointer": "/tensors/w/stages", "base": "valid/stages/eight"}
    value("stages-9", "LIM-1", "/tensors/w/stages/8", nine_stages, "At most eight stages.", *more_bits, **keys)
    value("stages-0", "LIM-1", "/tensors/w/stages", [], "One stage at least.", base=PLAIN)
    value(
        "total-negative",
        "ACC-1",
        "/accounting/passthrough_tensors",
        -1,
        "A count is not negative.",
        code="SCHEMA.VALUE BIND.ACCOUNTING",
    )


def forty() -> list[Step]:
    """What else must change so that only the factor 40 is wrong."""
    return then(put("/transforms/t/size", 40), put("/transforms/t/signs", "00" * 5), put("/tensors/w/shape/1", 40))
