"""The invalid cases of containers, bindings, codes, data and limits, each one mutation of a valid case."""

from __future__ import annotations

import json
from typing import Any

from conformance.vectors.builder import Json, Raw, seed_signs
from conformance.vectors.recipes import (
    BOMB,
    MANIFEST,
    PAYLOAD,
    PLAIN,
    SHARD,
    SHARDS,
    TYPICAL,
    Cases,
    Step,
    put,
    refresh,
    then,
)


def container(c: Cases) -> None:
    def length(
        id: str, number: int, reason: str, code: str = "CONTAINER.HEADER_LENGTH", rule: str = "PAY-1", **keys: Any
    ) -> None:
        step = {"op": "splice", "file": PAYLOAD, "offset": 0, "remove": 8, "hex": number.to_bytes(8, "little").hex()}
        text = f"The header length becomes {number}."
        c.add(
            f"container/{id}",
            rule,
            code,
            text,
            reason,
            step,
            refresh(),
            base=PLAIN,
            pointer=PAYLOAD,
            limits=BOMB,
            **keys,
        )

    header = "CONTAINER.HEADER"
    length("length-0", 0, "A header has two bytes at least.")
    length("length-1", 1, "A header has two bytes at least.")
    length("length-file", 1000, "The header reaches beyond the file.")
    length("length-gigabyte", 2**30, "The header reaches beyond the file.", rule="PAY-1 SEC-2")
    length("length-2-62", 2**62, "The header reaches beyond the file.", rule="PAY-1 SEC-2")
    length("length-2-63", 2**63, "The length is unsigned.")
    length("length-2-64", 2**64 - 1, "8 + N overflows.", rule="PAY-1 SEC-2")
    length("length-2-64-8", 2**64 - 8, "8 + N overflows to 0.")
    length("length-cut", 100, "The header ends in mid object.", header, "PAY-1 PAY-2")
    for size in (0, 7, 9):
        step = {"op": "truncate", "file": PAYLOAD, "size": size}
        text, reason = f"The payload file is cut to {size} bytes.", "The file is too short for its header."
        c.add(
            f"container/file-{size}",
            "PAY-1",
            "CONTAINER.HEADER_LENGTH",
            text,
            reason,
            step,
            refresh(),
            base=PLAIN,
            pointer=PAYLOAD,
        )
    step = {"op": "splice", "file": PAYLOAD, "offset": 0, "remove": 8, "hex": (100_000_001).to_bytes(8, "little").hex()}
    grow = then({"op": "truncate", "file": PAYLOAD, "size": 100_000_100})
    reason = "A header has at most 100,000,000 bytes."
    code = "CONTAINER.HEADER_LENGTH LIMIT.SIZE"
    text = "The header length becomes 100,000,001, and the file is long enough for it."
    c.add(
        "container/length-limit",
        "PAY-1 LIM-1",
        code,
        text,
        reason,
        step,
        *grow,
        refresh(),
        base=PLAIN,
        pointer=PAYLOAD,
        limits=BOMB,
    )

    first = '{"w.codes"'
    tail = '"data_offsets":[24,30]}}'
    for id, find, new, reason in (
        ("leading-space", first, " " + first, "The first byte is {."),
        ("leading-line-feed", first, "\n" + first, "The first byte is {."),
        ("bom", first, "\ufeff" + first, "The first byte is {."),
        ("trailing-tab", tail, tail + "\t", "Only spaces follow the object."),
        ("trailing-line-feed", tail, tail + "\n", "Only spaces follow the object."),
        ("trailing-null", tail, tail + "\0", "Only spaces follow the object."),
        ("trailing-object", tail, tail + "{}", "Only spaces follow the object."),
        ("truncated", tail, tail[:-1], "The object is not closed."),
        ("trailing-comma", tail, tail[:-1] + ",}", "Not JSON."),
        ("array", first, "[" + first, "The header is an object."),
        ("nan", "[24,30]", "[24,NaN]", "Not JSON."),
    ):
        c.header(f"container/header-{id}", "PAY-2", header, find, new, reason)
    c.header("container/header-latin-1", "PAY-2 JSON-1", header, first, b'{"\xe9"', "Not UTF-8.")
    surrogate = '{"__metadata__":{"a":"\\ud800"},"w.codes"'
    c.header("container/header-surrogate", "PAY-2 JSON-1", header, first, surrogate, "A lone surrogate.")
    for id, metadata in (
        ("number", {"a": 1}),
        ("null", {"a": None}),
        ("nested", {"a": {}}),
        ("list", []),
        ("string", "pt"),
        ("is-null", None),
    ):
        number = f'{{"__metadata__":{json.dumps(metadata)},"w.codes"'
        c.header(f"container/metadata-{id}", "PAY-2", header, first, number, "__metadata__ is an object of strings.")
    twice = '{"__metadata__":{"a":"1"},"__metadata__":{"a":"1"},"w.codes"'
    c.header("container/metadata-twice", "PAY-2 JSON-3", header, first, twice, "A key occurs twice.")
    c.header(
        "container/metadata-key-twice",
        "PAY-2 JSON-3",
        header,
        first,
        '{"__metadata__":{"a":"1","a":"1"},"w.codes"',
        "A key occurs twice.",
    )
    codes = '"w.codes":{"dtype":"U8","shape":[3,8],"data_offsets":[0,24]}'
    name = "CONTAINER.DUPLICATE_NAME"
    c.header("container/name-twice", "PAY-3 JSON-3", name, codes, f"{codes},{codes}", "A storage name occurs twice.")
    escaped = codes.replace("w.codes", "\\u0077.codes")
    c.header(
        "container/name-twice-escaped",
        "PAY-3 JSON-3",
        name,
        codes,
        f"{codes},{escaped}",
        "The same name after unescaping.",
    )
    c.header(
        "container/key-twice",
        "PAY-2 JSON-3",
        header,
        '"dtype":"U8"',
        '"dtype":"U8","dtype":"U8"',
        "A key occurs twice.",
    )
    empty = '"":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
    reason = "A storage name has a character at least."
    c.header("container/name-empty", "MAN-4 PAY-3", f"{header} BIND.EXTRA_TENSOR", codes, empty + codes, reason)
    for id, path in (("parent", "../../x"), ("root", "/x")):
        outside = empty.replace('""', f'"{path}"')
        reason = "A storage name leads nowhere, should a tool make a path of it."
        name_codes = f"{header} BIND.EXTRA_TENSOR"
        c.header(f"container/name-{id}", "MAN-4 PAY-3", name_codes, codes, outside + codes, reason)
    copy = {"op": "tensor", "file": SHARD.format(2, 2), "name": "w.codes", "dtype": "U8", "shape": [0], "hex": ""}
    text, reason = "The second shard gets a tensor of a name in the first.", "Names are unique across shards."
    code = "CONTAINER.DUPLICATE_NAME"
    c.add(
        "container/name-in-two-shards",
        "PAY-3",
        code,
        text,
        reason,
        copy,
        refresh(SHARD.format(2, 2)),
        base=SHARDS,
        pointer=SHARD.format(2, 2),
    )

    for id, find, new, reason in (
        ("extra-key", '"dtype":"U8"', '"dtype":"U8","note":"x"', "Exactly three keys."),
        ("missing-dtype", '"dtype":"U8",', "", "Exactly three keys."),
        ("missing-shape", '"shape":[3,8],', "", "Exactly three keys."),
        ("missing-offsets", ',"data_offsets":[0,24]', "", "Exactly three keys."),
        ("entry-list", codes, '"w.codes":["U8",[3,8],[0,24]]', "An entry is an object."),
        ("entry-null", codes, '"w.codes":null', "An entry is an object."),
        ("offsets-one", "[0,24]", "[0]", "Two offsets."),
        ("offsets-three", "[0,24]", "[0,24,24]", "Two offsets."),
        ("offsets-float", "[0,24]", "[0,24.0]", "Offsets are integers."),
        ("offsets-string", "[0,24]", '["0","24"]', "Offsets are integers."),
        ("offsets-true", "[0,24]", "[false,24]", "Offsets are integers."),
        ("shape-string", "[3,8]", '"3x8"', "A shape is a list."),
        ("shape-float", "[3,8]", "[3,8.0]", "Dimensions are integers."),
        ("shape-true", "[3,1]", "[3,true]", "Dimensions are integers."),
        ("shape-null", "[3,8]", "null", "A shape is a list."),
    ):
        c.header(f"container/{id}", "PAY-3", header, find, new, reason)
    offsets = "CONTAINER.OFFSETS CONTAINER.SHAPE"
    c.header("container/shape-negative", "PAY-3", header, "[3,8]", "[-3,-8]", "Dimensions are not negative.")
    c.header("container/rank-9", "PAY-3", header, "[3,8]", "[3,8,1,1,1,1,1,1,1]", "At most eight dimensions.")
    c.header("container/offsets-negative", "PAY-3", header, "[0,24]", "[-24,0]", "Offsets are not negative.")
    c.header(
        "container/shape-integer",
        "PAY-2 JSON-4",
        header,
        "[3,8]",
        f"[0,{2**53}]",
        "An integer beyond 2^53 - 1.",
    )
    for dtype in ("u8", "F4", "F8_E8M0FNU", "F8_E4M3FN", "BF16 ", "", "object"):
        id = dtype.strip().lower().replace("_", "-") or "empty"
        c.header(f"container/dtype-{id}", "PAY-4", "CONTAINER.DTYPE", '"U8"', f'"{dtype}"', "Not a dtype.")
    c.header("container/dtype-number", "PAY-3", f"{header} CONTAINER.DTYPE", '"U8"', "8", "A dtype is a string.")
    c.header(
        "container/shape-small", "PAY-4", "CONTAINER.SHAPE", "[3,8]", "[3,7]", "The range is longer than the elements."
    )
    c.header(
        "container/shape-large", "PAY-4", "CONTAINER.SHAPE", "[3,8]", "[3,9]", "The range is shorter than the elements."
    )
    c.header(
        "container/shape-dtype", "PAY-4", "CONTAINER.SHAPE", '"U8"', '"U16"', "The range is shorter than the elements."
    )
    overflow = "The product is 24 modulo 2^64."
    c.header(
        "container/shape-overflow", "PAY-4 SEC-2", "CONTAINER.SHAPE", "[3,8]", "[8,1308659,7047956753329]", overflow
    )
    reason = "The product is 2^64, which is 0 in 64 bits."
    c.header_set(
        "container/shape-overflow-0",
        "PAY-4 SEC-2",
        "CONTAINER.SHAPE",
        "/a.data/shape",
        [2**32, 2**32],
        reason,
        base="valid/passthrough/empty",
    )
    c.header(
        "container/shape-huge",
        "PAY-4 SEC-2",
        "CONTAINER.SHAPE",
        "[3,8]",
        "[1000000000,8]",
        "A billion rows of nothing.",
    )

    keys: Json = {"base": "valid/passthrough/empty"}
    reason = "A dimension of 0 is taken as 1 where sizes overflow."
    c.header_set(
        "container/shape-overflow-empty", "PAY-4", "CONTAINER.SHAPE", "/a.data/shape", [0, 2**52], reason, **keys
    )

    push = {"op": "splice", "file": PAYLOAD, "offset": -6, "hex": "0000"}
    c.header(
        "container/gap", "PAY-5", "CONTAINER.OFFSETS", "[24,30]", "[26,32]", "Bytes that belong to no tensor.", push
    )
    start = {"op": "splice", "file": PAYLOAD, "offset": -30, "hex": "0000"}
    shift = {"op": "header_set", "file": PAYLOAD, "path": "/w.scales/data_offsets", "value": [26, 32]}
    c.header(
        "container/gap-start",
        "PAY-5",
        "CONTAINER.OFFSETS",
        "[0,24]",
        "[2,26]",
        "The data begin behind the header.",
        start,
        shift,
    )
    cut = {"op": "splice", "file": PAYLOAD, "offset": -2, "remove": 2, "hex": ""}
    c.header(
        "container/overlap",
        "PAY-5",
        "CONTAINER.OFFSETS",
        "[24,30]",
        "[22,28]",
        "Bytes that belong to two tensors.",
        cut,
    )
    c.header(
        "container/reversed", "PAY-5 PAY-4", offsets, "[24,30]", "[30,24]", "A range ends where it begins or later."
    )
    c.header("container/beyond", "PAY-5", "CONTAINER.OFFSETS", "[24,30]", "[26,32]", "A range ends beyond the file.")
    either = "CONTAINER.OFFSETS CONTAINER.ALIGNMENT"
    reason = "A range ends a byte beyond the file, and is misaligned, too."
    c.header("container/beyond-odd", "PAY-5 PAY-8", either, "[24,30]", "[25,31]", reason)
    c.header(
        "container/beyond-far",
        "PAY-5 SEC-2",
        "CONTAINER.OFFSETS",
        "[24,30]",
        f"[{2**53 - 8},{2**53 - 2}]",
        "A range far beyond the file.",
    )
    ends: list[tuple[str, Step, str]] = [
        ("tail", {"offset": -1, "remove": 0, "hex": "00"}, "A byte behind the last tensor."),
        ("short", {"offset": -1, "remove": 1, "hex": ""}, "The last tensor's last byte is missing."),
    ]
    for id, place, reason in ends:
        resize: Step = {"op": "splice", "file": PAYLOAD} | place
        text = "The payload file is a byte " + ("longer." if id == "tail" else "shorter.")
        c.add(
            f"container/{id}",
            "PAY-5",
            "CONTAINER.OFFSETS",
            text,
            reason,
            resize,
            refresh(),
            base=PLAIN,
            pointer=PAYLOAD,
        )
    reason = "An empty tensor lies where a range ends or begins."
    c.header_set("container/empty-inside", "PAY-5", "CONTAINER.OFFSETS", "/a.data/data_offsets", [1, 1], reason, **keys)
    c.header_set("container/empty-beyond", "PAY-5", "CONTAINER.OFFSETS", "/a.data/data_offsets", [4, 4], reason, **keys)

    # [TQ-PAY-8]
    keys = {"base": "valid/passthrough/sizes", "pointer": PAYLOAD}
    repo = c.repos["valid/passthrough/sizes"]
    header_length = int.from_bytes(repo.payload_file(list(repo.payload))[:8], "little")
    for id, spaces in (("1", 1), ("4", 4)):
        insert: Step = {"op": "splice", "file": PAYLOAD, "offset": 8 + header_length, "text": " " * spaces}
        longer = {"op": "splice", "file": PAYLOAD, "offset": 0, "remove": 8}
        longer["hex"] = (header_length + spaces).to_bytes(8, "little").hex()
        text = f"{spaces} spaces more follow the header."
        reason = "Data begin at a multiple of the size of their elements."
        code = "CONTAINER.ALIGNMENT"
        c.add(f"container/alignment-{id}", "PAY-8", code, text, reason, insert, *then(longer), refresh(), **keys)
    swap = [
        {"op": "header_set", "file": PAYLOAD, "path": f"/{name}.data/data_offsets", "value": value}
        for name, value in (("b", [6, 22]), ("c", [0, 6]))
    ]
    reason = "8-byte elements at byte 6 of the data."
    c.add(
        "container/alignment-order",
        "PAY-8",
        code,
        "Two tensors change their places.",
        reason,
        swap[0],
        *then(swap[1]),
        refresh(),
        **keys,
    )


def bind(c: Cases) -> None:
    missing = "BIND.MISSING_FILE"
    for id, file, judge in (
        ("payload", PAYLOAD, "reader"),
        ("support", "config.json", "validator"),
        ("document", "LICENSE", "validator"),
    ):
        reason = "A listed file is absent." + (
            " A reader that does not need it may go on." if judge == "validator" else ""
        )
        step: Step = {"op": "delete", "file": file}
        c.add(
            f"bind/missing-{id}",
            "REPO-1 REPO-4",
            missing,
            f"{file} is deleted.",
            reason,
            step,
            pointer=file,
            judge=judge,
        )
    file = SHARD.format(2, 2)
    c.add(
        "bind/missing-shard",
        "REPO-1 SHARD-1",
        missing,
        f"{file} is deleted.",
        "A shard is absent.",
        {"op": "delete", "file": file},
        base=SHARDS,
        pointer=file,
    )
    text = "The manifest is deleted."
    c.add(
        "bind/missing-manifest",
        "REPO-1",
        f"{missing} PATH.TYPE",
        text,
        "A repository has a manifest.",
        {"op": "delete", "file": MANIFEST},
    )
    for file in (
        "notes.txt",
        "model.safetensors",
        "pytorch_model.bin",
        "modeling_example.py",
        "turboquant_weights-00001-of-00002.safetensors",
        "readme.md",
    ):
        step = {"op": "write", "file": file, "text": "x"}
        reason = "Every entry is listed but README.md, hidden ones and __pycache__."
        id = file.split(".")[0].replace("_", "-")
        c.add(
            f"bind/extra-{id}",
            "REPO-5",
            "BIND.EXTRA_FILE",
            f"{file} is added.",
            reason,
            step,
            pointer=file,
            judge="validator",
        )
    step = {"op": "directory", "file": "onnx"}
    c.add(
        "bind/extra-directory",
        "REPO-5",
        "BIND.EXTRA_FILE",
        "A directory is added.",
        "Files lie in one directory.",
        step,
        pointer="onnx",
        judge="validator",
    )
    for step, id, what in (
        ({"op": "directory", "file": "README.md"}, "card-directory", "README.md is a directory."),
        ({"op": "symlink", "file": "README.md", "target": "LICENSE"}, "card-link", "README.md is a link."),
        ({"op": "write", "file": "__pycache__", "text": "x"}, "cache-file", "__pycache__ is a file."),
    ):
        reason = "README.md is a regular file, and __pycache__ a directory; a reader looks at neither."
        where = step["file"]
        c.add(f"bind/extra-{id}", "REPO-5", "BIND.EXTRA_FILE", what, reason, step, pointer=where, judge="validator")
    for file, id, judge in (
        (PAYLOAD, "payload", "reader"),
        ("config.json", "support", "validator"),
        ("LICENSE", "document", "validator"),
    ):
        entry = f"/files/{file}"
        c.set(
            f"bind/size-{id}",
            "REPO-4",
            "BIND.SIZE",
            f"{entry}/size",
            10,
            "The file has another length.",
            judge=judge,
            pointer=file,
        )
        c.set(
            f"bind/digest-{id}",
            "REPO-4",
            "BIND.DIGEST",
            f"{entry}/sha256",
            "0" * 64,
            "The file has another digest.",
            judge="validator",
            pointer=file,
        )
    step = {"op": "tensor_bytes", "file": PAYLOAD, "name": "norm.data", "offset": 0, "hex": "803f"}
    reason = "The data are not those that the manifest describes."
    c.add(
        "bind/digest-damaged",
        "REPO-4",
        "BIND.DIGEST",
        "Two bytes of the payload change.",
        reason,
        step,
        pointer=PAYLOAD,
        judge="validator",
    )
    step = {"op": "splice", "file": PAYLOAD, "offset": -20, "remove": 20, "hex": ""}
    reason = "A download that broke off."
    c.add(
        "bind/size-truncated",
        "REPO-4 SEC-2",
        "BIND.SIZE",
        "The payload file loses its last 20 bytes.",
        reason,
        step,
        pointer=PAYLOAD,
    )

    damage: Step = {"op": "tensor_bytes", "file": PAYLOAD, "name": "w.codes", "offset": 7, "hex": "ff"}
    keys: Json = {"base": PLAIN, "pointer": PAYLOAD}
    reason = "The digest and the fault of the content stand for each other: what is seen first may be said."
    code = "BIND.DIGEST PACK.PADDING"
    text = "A padding bit is set, and the digest stays."
    c.add("bind/digest-padding", "ERR-2 REPO-4 CODE-5", code, text, reason, damage, **keys)
    damage = {"op": "splice", "file": PAYLOAD, "find": '"dtype":"U8"', "text": '"dtype":"XX"'}
    code, text = "BIND.DIGEST CONTAINER.DTYPE", "A dtype in the header is damaged, and the digest stays."
    c.add("bind/digest-header", "ERR-2 REPO-4 PAY-4", code, text, reason, damage, **keys)
    damage = {"op": "tensor_bytes", "file": PAYLOAD, "name": "w.scales", "offset": 0, "hex": "007e"}
    code, text = "BIND.DIGEST DATA.NON_FINITE", "A scale becomes NaN, and the digest stays."
    c.add("bind/digest-scale", "ERR-2 REPO-4 NUM-1", code, text, reason, damage, **keys)

    move_: Step = {"op": "move", "file": "example.py", "to": "load_quantized.py"}
    reason = "The embedded loader is no known release: a validator may insist on one."
    keys = {"pointer": "load_quantized.py", "result": "acceptable"}
    c.rename(
        "bind/loader-unknown",
        "REPO-6",
        "BIND.LOADER",
        "/files/example.py",
        "load_quantized.py",
        reason,
        *then(move_),
        **keys,
    )

    loader = "load_quantized.py"
    c.add(
        "bind/loader-changed",
        "REPO-7",
        "BIND.LOADER",
        "The embedded loader is changed, its stamp is not.",
        "The stamp's digest is not that of the body.",
        {"op": "splice", "file": loader, "find": "Stands for", "text": "Stands in for"},
        refresh(loader),
        base="valid/repository/loader",
        pointer=loader,
        judge="validator",
    )

    chunk = "/files/three.txt/chunks"
    keys = {"base": "valid/repository/chunks", "pointer": "three.txt", "judge": "validator"}
    c.set("bind/chunk-first", "REPO-8", "BIND.DIGEST", f"{chunk}/0", "0" * 64, "Another digest.", **keys)
    c.set("bind/chunk-last", "REPO-8", "BIND.DIGEST", f"{chunk}/2", "0" * 64, "Another digest.", **keys)
    payload = "turboquant_weights.safetensors"
    keys["pointer"] = payload
    c.set(
        "bind/chunk-payload", "REPO-8", "BIND.DIGEST", f"/files/{payload}/chunks/0", "0" * 64, "Another digest.", **keys
    )

    # [TQ-SHARD-1, TQ-SHARD-2]
    shards = "BIND.SHARDS"
    keys = {"pointer": "/files"}
    empty_payload = {"op": "write", "file": "LICENSE", "hex": "0200000000000000" + b"{}".hex()}
    c.set(
        "bind/payload-document",
        "SHARD-1 REPO-3",
        shards,
        "/files/LICENSE/role",
        "payload",
        "Only the weights have this role.",
        *then(empty_payload),
        refresh("LICENSE"),
        **keys,
    )
    c.set(
        "bind/payload-role",
        "SHARD-1 REPO-3",
        shards,
        f"/files/{PAYLOAD}/role",
        "document",
        "The weights have the role `payload`.",
        **keys,
    )

    def moved(id: str, old: str, new: str, reason: str, base: str = TYPICAL) -> None:
        move = then({"op": "move", "file": old, "to": new})
        c.rename(f"bind/{id}", "SHARD-1", shards, f"/files/{old}", new, reason, *move, base=base, pointer="/files")

    stray = "turboquant_weights-x.safetensors"
    reason = "A name like this has the role `payload`, and then breaks the rule of names."
    moved("payload-stray", "LICENSE", stray, reason)
    moved("payload-name", PAYLOAD, "model.safetensors", "The payload has one name.")
    moved("payload-1-of-1", PAYLOAD, SHARD.format(1, 1), "A set of shards has two at least.")
    moved("shard-number", SHARD.format(2, 2), SHARD.format(3, 2), "Shards are numbered from 1 to N.", SHARDS)
    moved("shard-zero", SHARD.format(1, 2), SHARD.format(0, 2), "Shards are numbered from 1 to N.", SHARDS)
    moved("shard-total", SHARD.format(2, 2), SHARD.format(2, 3), "All shards state the same N.", SHARDS)
    moved("shard-digits", SHARD.format(2, 2), "turboquant_weights-2-of-2.safetensors", "Five digits each.", SHARDS)
    moved("shard-and-single", SHARD.format(2, 2), PAYLOAD, "Either one file or shards.", SHARDS)
    drop = then({"op": "delete", "file": SHARD.format(2, 2)})
    c.remove(
        "bind/shard-unlisted",
        "SHARD-1",
        f"{shards}",
        f"/files/{SHARD.format(2, 2)}",
        "All N shards are listed.",
        *drop,
        base=SHARDS,
        pointer="/files",
    )
    scales = c.repos[SHARDS].payload["w.scales"]
    one, two = SHARD.format(1, 2), SHARD.format(2, 2)
    empty = {"op": "write", "file": two, "hex": (2).to_bytes(8, "little").hex() + b"{}".hex()}
    move = {
        "op": "tensor",
        "file": one,
        "name": "w.scales",
        "dtype": scales.dtype,
        "shape": list(scales.shape),
        "hex": scales.data.hex(),
    }
    text, reason = "The second shard's tensors move to the first.", "No shard is without tensors."
    c.add(
        "bind/shard-empty",
        "SHARD-2",
        shards,
        text,
        reason,
        empty,
        *then(move),
        refresh(one),
        refresh(two),
        base=SHARDS,
        pointer=two,
    )

    # [TQ-PAY-6]
    lost = "BIND.MISSING_TENSOR BIND.EXTRA_TENSOR"
    for id, where in (
        ("codes", "/tensors/w/stages/0/codes"),
        ("scales", "/tensors/w/stages/0/scales"),
        ("column-scale", "/tensors/w2/column_scale"),
        ("data", "/tensors/norm/data"),
        ("matrix", "/transforms/dense/matrix"),
        ("pairs", "/transforms/givens/pairs"),
        ("angles", "/transforms/givens/angles"),
        ("levels", "/codebooks/trellis/tensor"),
        ("index", "/transforms/permutation/index"),
        ("offsets", "/tensors/w3/stages/0/offsets"),
        ("outer-scales", "/tensors/w3/stages/0/outer_scales"),
        ("outer-offsets", "/tensors/w3/stages/0/outer_offsets"),
    ):
        c.set(f"bind/missing-{id}", "PAY-6", lost, where, "nothing", "The payload has no tensor of this name.")
    c.set("bind/missing-case", "PAY-6", lost, "/tensors/norm/data", "Norm.data", "Names are case sensitive.")
    reason = "Nothing references it."
    c.tensor(
        "bind/extra-tensor", "PAY-6", "BIND.EXTRA_TENSOR", "extra", Raw("U8", (3,), b"abc"), reason, pointer=PAYLOAD
    )
    c.tensor(
        "bind/extra-empty-tensor",
        "PAY-6",
        "BIND.EXTRA_TENSOR",
        "extra",
        Raw("F32", (0, 4), b""),
        reason,
        pointer=PAYLOAD,
    )
    count = then(put("/accounting/passthrough_tensors", 2))
    empty_weight = {"kind": "passthrough", "shape": [0], "dtype": "F32", "data": "nothing"}
    reason = "An empty tensor, too, is in the payload."
    keys = {"pointer": "/tensors/empty/data"}
    c.set("bind/missing-empty", "PAY-6", "BIND.MISSING_TENSOR", "/tensors/empty", empty_weight, reason, *count, **keys)
    twice = "BIND.MULTIPLE BIND.EXTRA_TENSOR"
    c.set(
        "bind/multiple-scales",
        "PAY-6",
        twice,
        "/tensors/w2/stages/1/scales",
        "w2.scales",
        "Two stages reference one tensor.",
    )
    c.set(
        "bind/multiple-data",
        "PAY-6",
        f"{twice} BIND.TENSOR",
        "/tensors/norm/data",
        "w.scales",
        "Scales and a weight are one tensor.",
    )
    again = {"kind": "passthrough", "shape": [16], "dtype": "BF16", "data": "norm.data"}
    total = c.repos[TYPICAL].accounting()
    original, stored = total["original_bytes"] + 32, total["stored_bytes"]
    sums = then(
        put("/accounting/original_bytes", original),
        put("/accounting/ratio", round(original / stored, 6)),
        put("/accounting/passthrough_tensors", 2),
        put("/accounting/passthrough_scalars", 32),
    )
    c.set(
        "bind/multiple-weights",
        "PAY-6",
        "BIND.MULTIPLE",
        "/tensors/norm2",
        again,
        "Sharing is for `tied_weights`.",
        *sums,
        pointer="/tensors/norm2/data",
    )

    def retyped(
        id: str, rule: str, name: str, field_: str, value: Any, pointer: str, code: str = "BIND.TENSOR", **keys: Any
    ) -> None:
        reason = f"The payload tensor has another {field_} than required."
        c.header_set(
            f"bind/{id}",
            f"{rule} PAY-6",
            code,
            f"/{name}/{field_}",
            value,
            reason,
            **{"base": TYPICAL, "pointer": pointer} | keys,
        )

    stage = "/tensors/w/stages/0"
    retyped("scales-dtype", "NUM-1", "w.scales", "dtype", "I16", f"{stage}/scales")
    retyped("scales-shape", "NUM-1", "w.scales", "shape", [1, 4], f"{stage}/scales")
    retyped("scales-rank", "NUM-1", "w.scales", "shape", [4], f"{stage}/scales")
    retyped("column-scale-dtype", "NUM-2", "w2.column_scale", "dtype", "I32", "/tensors/w2/column_scale")
    retyped("column-scale-shape", "NUM-2", "w2.column_scale", "shape", [1, 8], "/tensors/w2/column_scale")
    retyped("matrix-dtype", "TRAN-7", "dense.matrix", "dtype", "U32", "/transforms/dense/matrix")
    retyped("matrix-shape", "TRAN-7", "dense.matrix", "shape", [16], "/transforms/dense/matrix")
    retyped("matrix-not-square", "TRAN-7", "dense.matrix", "shape", [2, 8], "/transforms/dense/matrix")
    retyped("pairs-dtype", "TRAN-8", "givens.pairs", "dtype", "U32", "/transforms/givens/pairs")
    retyped("pairs-shape", "TRAN-8", "givens.pairs", "shape", [2, 4], "/transforms/givens/pairs")
    retyped("pairs-rounds", "TRAN-8", "givens.pairs", "shape", [1, 4, 2], "/transforms/givens/pairs")
    retyped("angles-dtype", "TRAN-8", "givens.angles", "dtype", "I32", "/transforms/givens/angles")
    retyped("angles-shape", "TRAN-8", "givens.angles", "shape", [4], "/transforms/givens/angles")
    retyped("levels-dtype", "BOOK-3", "trellis.levels", "dtype", "I16", "/codebooks/trellis/tensor")
    retyped("levels-shape", "BOOK-3", "trellis.levels", "shape", [2, 1, 16], "/codebooks/trellis/tensor")
    retyped("levels-rank", "BOOK-3", "trellis.levels", "shape", [2, 16], "/codebooks/trellis/tensor")
    retyped("index-dtype", "TRAN-9", "permutation.index", "dtype", "U32", "/transforms/permutation/index")
    retyped("index-shape", "TRAN-9", "permutation.index", "shape", [1, 8], "/transforms/permutation/index")
    third = "/tensors/w3/stages/0"
    retyped("scales-f8-e5m2", "NUM-1", "w3.scales", "dtype", "F8_E5M2", f"{third}/scales")
    retyped("offsets-dtype", "NUM-9", "w3.offsets", "dtype", "F8_E5M2", f"{third}/offsets")
    retyped("offsets-shape", "NUM-9", "w3.offsets", "shape", [1, 4], f"{third}/offsets")
    retyped("outer-scales-dtype", "NUM-8", "w3.outer_scales", "dtype", "I16", f"{third}/outer_scales")
    retyped("outer-scales-rank", "NUM-8", "w3.outer_scales", "shape", [1], f"{third}/outer_scales")
    retyped("outer-offsets-dtype", "NUM-8", "w3.outer_offsets", "dtype", "U32", f"{third}/outer_offsets")
    retyped("outer-offsets-shape", "NUM-8", "w3.outer_offsets", "shape", [1, 4], f"{third}/outer_offsets")
    for id, outer_shape, reason in (
        ("rows", (4, 1), "4 rows of outer scales for 2 of the weight."),
        ("vectors", (1, 4), "4 outer scales for 2 vectors."),
        ("columns", (2, 3), "3 does not divide 2 vectors."),
        ("none", (0, 1), "No outer scales for 2 rows."),
        ("empty", (2, 0), "No outer scales for 2 vectors."),
    ):
        raw = Raw("F16", outer_shape, b"\x00\x3c" * (outer_shape[0] * outer_shape[1]))
        pointer = f"{third}/outer_scales"
        c.tensor(f"bind/outer-scales-{id}", "NUM-8", "BIND.TENSOR", "w3.outer_scales", raw, reason, pointer=pointer)
    wide = Raw("F16", (2, 2), b"\x00\x3c" * 4)
    reason = "F16 scales have no outer ones."
    c.tensor(
        "bind/scales-wide-with-outer", "NUM-1", "BIND.TENSOR", "w3.scales", wide, reason, pointer=f"{third}/scales"
    )
    c.tensor(
        "bind/offsets-wide-with-outer", "NUM-9", "BIND.TENSOR", "w3.offsets", wide, reason, pointer=f"{third}/offsets"
    )
    byte = Raw("U8", (4, 1), b"\x01\x02\x03\x04")
    reason = "U8 scales need outer ones."
    c.tensor("bind/scales-byte-alone", "NUM-1", "BIND.TENSOR", "w.scales", byte, reason, pointer=f"{stage}/scales")
    retyped("passthrough-dtype", "PASS-1", "norm.data", "dtype", "I16", "/tensors/norm/data")
    retyped("passthrough-shape", "PASS-1", "norm.data", "shape", [4, 4], "/tensors/norm/data")
    retyped("codes-dtype", "CODE-4", "w.codes", "dtype", "I8", f"{stage}/codes", "BIND.TENSOR PACK.LENGTH")
    none = {"op": "tensor", "file": PAYLOAD, "name": "givens.angles", "dtype": "F32", "shape": [0, 2], "hex": ""}
    less = Raw("I32", (0, 2, 2), b"")
    less_stored = stored - 48
    original = total["original_bytes"]
    zero = then(
        put("/accounting/stored_bytes", less_stored), put("/accounting/ratio", round(original / less_stored, 6))
    )
    drop_pairs = {
        "op": "tensor",
        "file": PAYLOAD,
        "name": "givens.pairs",
        "dtype": less.dtype,
        "shape": list(less.shape),
        "hex": "",
    }
    text, where = "`pairs` and `angles` have no rounds.", "/transforms/givens/pairs"
    code = "BIND.TENSOR LIMIT.SIZE"
    c.add(
        "bind/givens-rounds-0",
        "TRAN-8",
        "BIND.TENSOR",
        text,
        "One round at least.",
        drop_pairs,
        *then(none),
        *zero,
        refresh(),
        pointer=where,
    )
    round_ = b"".join(k.to_bytes(4, "little") for k in range(4))
    grow = {
        "op": "tensor",
        "file": PAYLOAD,
        "name": "givens.angles",
        "dtype": "F32",
        "shape": [65, 2],
        "hex": "00" * 65 * 8,
    }
    stored = less_stored + 65 * 24
    sums = then(grow, put("/accounting/stored_bytes", stored), put("/accounting/ratio", round(original / stored, 6)))
    many = {
        "op": "tensor",
        "file": PAYLOAD,
        "name": "givens.pairs",
        "dtype": "I32",
        "shape": [65, 2, 2],
        "hex": (round_ * 65).hex(),
    }
    text = "`pairs` and `angles` have 65 rounds."
    c.add(
        "bind/givens-rounds-65", "TRAN-8 LIM-1", code, text, "64 rounds at most.", many, *sums, refresh(), pointer=where
    )
    code = "BIND.TENSOR BIND.ACCOUNTING PACK.LENGTH"
    reason = "A billion rows that no payload holds: nothing may be allocated for them."
    c.set("bind/billion-rows", "SEC-2 PAY-6", code, "/tensors/w/shape", [10**9, 16], reason, limits=BOMB)
    c.set(
        "bind/billion-scalars",
        "SEC-2 PASS-1",
        "BIND.TENSOR BIND.ACCOUNTING",
        "/tensors/norm/shape",
        [10**9, 10**6],
        "A petabyte that no payload holds.",
        limits=BOMB,
    )

    # [TQ-TIE-1]
    tied = "BIND.TIED"
    c.rename("bind/tied-in-tensors", "TIE-1", tied, "/tied_weights/alias", "norm", "An alias is not in `tensors`.")
    c.set("bind/tied-missing", "TIE-1", tied, "/tied_weights/alias", "nothing", "No such weight.")
    c.set("bind/tied-alias", "TIE-1", tied, "/tied_weights/second", "alias", "An alias of an alias.")
    c.set("bind/tied-itself", "TIE-1", tied, "/tied_weights/alias", "alias", "An alias of itself.")
    c.set(
        "bind/tied-storage", "TIE-1", tied, "/tied_weights/alias", "norm.data", "A storage name is not a weight name."
    )

    # [TQ-ACC-1, TQ-ACC-2]
    total = c.repos[TYPICAL].accounting()
    for key, value in total.items():
        where = f"/accounting/{key}"
        c.set(
            f"bind/accounting-{key.replace('_', '-')}",
            "ACC-1 ACC-2",
            "BIND.ACCOUNTING",
            where,
            value + (0.01 if key == "ratio" else 1),
            "The total is another.",
        )
    reason = "Aliases count nowhere."
    c.set(
        "bind/accounting-alias",
        "ACC-2",
        "BIND.ACCOUNTING",
        "/accounting/quantized_scalars",
        total["quantized_scalars"] + 64,
        reason,
    )
    size = total["stored_bytes"] - len(c.repos[TYPICAL].payload["dense.matrix"].data)
    c.set(
        "bind/accounting-matrix", "ACC-2", "BIND.ACCOUNTING", "/accounting/stored_bytes", size, "Stored matrices count."
    )
    keys = {"base": "valid/passthrough/only-empty"}
    c.set(
        "bind/accounting-ratio-empty",
        "ACC-1",
        "BIND.ACCOUNTING",
        "/accounting/ratio",
        1,
        "The ratio is 0 where nothing is stored.",
        **keys,
    )


def pack(c: Cases) -> None:
    length = "PACK.LENGTH"
    where = "/tensors/w/stages/0/codes"
    codes = c.repos[TYPICAL].payload["w.codes"].data  # U8 [4, 4]
    rows = [codes[k : k + 4] for k in range(0, 16, 4)]
    long = Raw("U8", (4, 5), b"".join(row + b"\0" for row in rows))
    c.tensor("pack/long", "CODE-4", length, "w.codes", long, "A tile has a byte too many.", pointer=where)
    short = Raw("U8", (4, 3), b"".join(row[:3] for row in rows))
    c.tensor("pack/short", "CODE-4", length, "w.codes", short, "A tile has a byte too few.", pointer=where)
    c.tensor(
        "pack/tile-more",
        "CODE-4",
        length,
        "w.codes",
        Raw("U8", (5, 4), codes + codes[:4]),
        "A tile too many.",
        pointer=where,
    )
    c.tensor(
        "pack/flat",
        "CODE-4",
        length,
        "w.codes",
        Raw("U8", (16,), codes),
        "The shape is [tiles, tile_bytes].",
        pointer=where,
    )
    c.tensor(
        "pack/other-shape",
        "CODE-4",
        length,
        "w.codes",
        Raw("U8", (2, 8), codes),
        "The shape is [tiles, tile_bytes].",
        pointer=where,
    )
    base = "valid/codes/trellis-bits-3-n-7"
    wide = c.repos[base].payload["w.codes"]
    longer = Raw("U8", (4, 4), b"".join(wide.data[3 * k : 3 * k + 3] + b"\0" for k in range(4)))
    c.tensor(
        "pack/trellis-overhang",
        "CODE-4 CODE-5",
        length,
        "w.codes",
        longer,
        "A window adds no bits to the stream.",
        pointer=where,
        base=base,
    )
    for id, where_, at, bit in (
        ("first-tile", PLAIN, 7, 0x80),
        ("last-tile", PLAIN, 23, 0x80),
        ("lowest-bit", "valid/codes/bits-1", 2, 0x20),
        ("2-d-tile", "valid/tiles/2x2-3-bits", 1, 0x10),
        ("trellis", base, 11, 0x20),
        ("trellis-1-2", "valid/codes/trellis-1-2", 4, 0x80),
    ):
        new = c.repos[where_].payload["w.codes"].data[at] | bit
        c.data(
            f"pack/padding-{id}",
            "CODE-5",
            "PACK.PADDING",
            "w.codes",
            at,
            f"{new:02x}",
            "An unused bit is set.",
            base=where_,
            pointer=where,
        )
    for id, base, at, new_hex, reason in (
        ("ternary", "valid/codes/entries-3", 0, "ff", "Symbols 3 of a codebook of 3."),
        ("one-symbol", "valid/codes/entries-5", 0, "05", "The symbol 5 of a codebook of 5."),
        ("bytes", "valid/codes/entries-200", 71, "c8", "The last symbol is 200 of a codebook of 200."),
        ("16-bits", "valid/codes/bits-16-p-8", 0, "2c01", "The symbol 300 of a codebook of 300."),
        ("high-byte", "valid/codes/bits-16-p-8", 28, "0080", "The symbol 32768: 16-bit symbols are unsigned."),
        ("one-entry", "valid/codes/entries-1", 0, "01", "The symbol 1 of a codebook of one entry."),
    ):
        c.data(
            f"pack/range-{id}", "BOOK-4", "PACK.CODE_RANGE", "w.codes", at, new_hex, reason, base=base, pointer=where
        )
    keys = {"base": "valid/large/tiles", "pointer": where}
    reason = "The last symbol of many is 3 of a codebook of 3."
    c.data("pack/range-large", "BOOK-4", "PACK.CODE_RANGE", "w.codes", 8399, "c0", reason, **keys)


def data(c: Cases) -> None:
    text = (
        "The last scale of one weight becomes NaN, and the first byte of the other one's codes ff: they are neighbours."
    )
    step = {"op": "tensor_bytes", "file": PAYLOAD, "name": "a.scales", "offset": 4, "hex": "007eff"}
    reason = "Two faults in two tensors: either code will do, so that a reader can stream."
    code = "DATA.NON_FINITE PACK.CODE_RANGE"
    c.add(
        "data/two-weights",
        "ERR-2 NUM-1 BOOK-4",
        code,
        text,
        reason,
        step,
        refresh(),
        base="valid/codes/two-weights",
        pointer="/tensors",
    )
    step = {"op": "tensor_bytes", "file": PAYLOAD, "name": "b.levels", "offset": 14, "hex": "007e000000ff"}
    c.add(
        "data/table-and-codes",
        "ERR-2 BOOK-3 CODE-5",
        "DATA.NON_FINITE PACK.PADDING",
        "The codebook's last level becomes NaN, and the first padding bits of the codes are set: they are neighbours.",
        "A codebook counts as a tensor of its own: either code will do.",
        step,
        refresh(),
        base="valid/codebooks/stored-f16",
        pointer="/tensors",
    )
    keys: Json
    not_finite = "DATA.NON_FINITE"
    scales = "/tensors/w/stages/0/scales"
    for id, base, name, at, where in (
        ("last-row", "rows", "scales", 4199, scales),
        ("row-4096", "rows", "scales", 4096, scales),
        ("last-outer", "tiles", "outer_scales", 8399, "/tensors/w/stages/0/outer_scales"),
    ):
        reason = "A reader that decodes groups of rows looks at every group's."
        keys = {"base": f"valid/large/{base}", "pointer": where}
        rule = "NUM-1" if name == "scales" else "NUM-8"
        c.data(f"data/large-{id}", rule, not_finite, f"w.{name}", 2 * at, "007e", reason, **keys)
    for id, base, at, hex, what in (
        ("nan-f16", "valid/scales/f16", 0, "007e", "NaN"),
        ("signalling-f16", "valid/scales/f16", 0, "017c", "a signalling NaN"),
        ("infinity-f16", "valid/scales/f16", 10, "007c", "infinity"),
        ("minus-infinity-f16", "valid/scales/f16", 4, "00fc", "minus infinity"),
        ("nan-bf16", "valid/scales/bf16", 2, "c07f", "NaN"),
        ("infinity-bf16", "valid/scales/bf16", 0, "807f", "infinity"),
        ("nan-f32", "valid/scales/f32", 0, "0000c07f", "NaN"),
        ("infinity-f32", "valid/scales/f32", 20, "0000807f", "infinity"),
    ):
        c.data(
            f"data/scale-{id}",
            "NUM-1",
            not_finite,
            "w.scales",
            at,
            hex,
            f"A scale is {what}.",
            base=base,
            pointer=scales,
        )
    stage = "/tensors/w/stages/0"
    for id, rule, base, name, at, hex, what in (
        ("scale-nan-f8-e4m3", "NUM-8", "scales/outer-f8-e4m3", "scales", 1, "7f", "A scale is NaN"),
        ("scale-minus-nan-f8-e4m3", "NUM-8", "scales/outer-f8-e4m3", "scales", 11, "ff", "A scale is NaN"),
        ("scale-nan-f8-e8m0", "NUM-8", "scales/outer-f8-e8m0", "scales", 0, "ff", "A scale is NaN"),
        ("outer-scale-nan-f16", "NUM-8", "scales/outer-u8", "outer_scales", 2, "007e", "An outer scale is NaN"),
        (
            "outer-scale-infinity-bf16",
            "NUM-8",
            "scales/outer-i8",
            "outer_scales",
            0,
            "80ff",
            "An outer scale is minus infinity",
        ),
        (
            "outer-scale-infinity-f32",
            "NUM-8",
            "scales/outer-f8-e4m3",
            "outer_scales",
            12,
            "0000807f",
            "An outer scale is infinite",
        ),
        ("offset-nan-f16", "NUM-9", "offsets/f16", "offsets", 10, "017e", "An offset is NaN"),
        ("offset-infinity-bf16", "NUM-9", "offsets/bf16", "offsets", 0, "80ff", "An offset is minus infinity"),
        ("offset-infinity-f32", "NUM-9", "offsets/f32", "offsets", 4, "0000807f", "An offset is infinite"),
        ("offset-nan-f8-e4m3", "NUM-9", "offsets/everything", "1.offsets", 15, "7f", "An offset is NaN"),
        ("offset-nan-f8-e8m0", "NUM-9", "offsets/outer-offsets-alone", "offsets", 3, "ff", "An offset is NaN"),
        (
            "outer-offset-infinity-f32",
            "NUM-9",
            "offsets/outer-mixed",
            "outer_offsets",
            0,
            "000080ff",
            "An outer offset is infinite",
        ),
    ):
        place = f"{stage[:-1]}1/offsets" if name.startswith("1.") else f"{stage}/{name}"
        keys = {"base": f"valid/{base}", "pointer": place}
        c.data(f"data/{id}", rule, not_finite, f"w.{name}", at, hex, f"{what}.", **keys)
    keys = {"base": "valid/offsets/f32", "pointer": "/tensors/w"}
    c.data(
        "data/overflow-offset",
        "NUM-6",
        not_finite,
        "w.offsets",
        0,
        "00008847",
        "The elements are infinite in F16.",
        **keys,
    )
    for id, number in (("1e39", 1e39), ("minus", -1e300), ("rounds-up", 3.4028235677973366e38)):
        keys = {"base": "valid/codebooks/unsorted-duplicates", "pointer": "/codebooks/b/values/1"}
        reason = "The level is not finite in binary32."
        c.set(f"data/level-inline-{id}", "BOOK-2", not_finite, "/codebooks/b/values/1", number, reason, **keys)
    for id, base, at, hex in (
        ("f16", "valid/codebooks/stored-f16", 2, "007e"),
        ("f32", "valid/codebooks/stored-f32", 4, "0000807f"),
        ("row", "valid/codebooks/rows-scalar", 38, "00fc"),
        ("unused", "valid/limits/entries-p-64", 0, "007c"),
    ):
        reason = "A level is not finite" + (", even if no symbol selects it." if id == "unused" else ".")
        c.data(
            f"data/level-{id}",
            "BOOK-3",
            not_finite,
            "b.levels",
            at,
            hex,
            reason,
            base=base,
            pointer="/codebooks/b/tensor",
        )
    c.data(
        "data/matrix-nan",
        "TRAN-7",
        not_finite,
        "dense.matrix",
        0,
        "0000c07f",
        "A matrix element is NaN.",
        pointer="/transforms/dense/matrix",
    )
    for id, hex in (("nan", "0000c07f"), ("infinity", "000080ff")):
        reason = f"An angle is {id}."
        c.data(
            f"data/angle-{id}",
            "TRAN-8",
            not_finite,
            "givens.angles",
            4,
            hex,
            reason,
            pointer="/transforms/givens/angles",
        )
    for id, base, hex in (
        ("nan-f32", "f32", "0000c07f"),
        ("infinity-f16", "f16", "007c"),
        ("infinity-bf16", "bf16", "80ff"),
    ):
        keys = {"base": f"valid/scales/column-{base}", "pointer": "/tensors/w/column_scale"}
        c.data(
            f"data/column-scale-{id}",
            "NUM-2",
            not_finite,
            "w.column_scale",
            0,
            hex,
            "A column scale is not finite.",
            **keys,
        )
    for dtype, hex in (("f16", "00008047"), ("bf16", "ffff7f7f")):
        reason = f"The elements round to infinity in {dtype.upper()}."
        c.data(
            f"data/overflow-{dtype}",
            "NUM-6",
            not_finite,
            "w.scales",
            0,
            hex,
            reason,
            base=f"valid/scales/largest-{dtype}",
            pointer="/tensors/w",
        )
    keys = {"base": "valid/scales/largest-f32", "pointer": "/tensors/w"}
    values = [-2.0, 2.0]
    c.set(
        "data/overflow-f32",
        "NUM-6",
        not_finite,
        "/codebooks/b/values",
        values,
        "The elements are infinite in F32.",
        **keys,
    )

    pairs = "/transforms/givens/pairs"
    old = [int.from_bytes(c.repos[TYPICAL].payload["givens.pairs"].data[4 * k : 4 * k + 4], "little") for k in range(8)]
    for id, at, new, reason in (
        ("twice", 0, old[1], "An index occurs twice in a round, another not at all."),
        ("last-round", 7, old[4], "An index occurs twice in the last round."),
        ("beyond", 2, 4, "An index is not below the size."),
        ("far", 3, 2**31 - 1, "An index is far beyond the size."),
        ("negative", 1, -1, "An index is negative."),
    ):
        hex = (new % 2**32).to_bytes(4, "little").hex()
        c.data(f"data/pairs-{id}", "TRAN-8", "DATA.PAIRS", "givens.pairs", 4 * at, hex, reason, pointer=pairs)
    index = c.repos[TYPICAL].payload["permutation.index"].data
    for id, at, number, reason in (
        ("twice", 0, int.from_bytes(index[4:8], "little"), "An index occurs twice, another not at all."),
        ("beyond", 7, 8, "An index is not below the size."),
        ("far", 3, 2**31 - 1, "An index is far beyond the size."),
        ("negative", 1, -1, "An index is negative."),
    ):
        hex, where = (number % 2**32).to_bytes(4, "little").hex(), "/transforms/permutation/index"
        c.data(
            f"data/permutation-{id}",
            "TRAN-9",
            "DATA.PERMUTATION",
            "permutation.index",
            4 * at,
            hex,
            reason,
            pointer=where,
        )

    matrix = "/transforms/t/matrix"
    for id, dtype, at, hex, reason in (
        ("element", "f32", 0, "0000803e", "An element is changed: the columns have no unit length."),
        ("sign", "f32", 3, "bf", "An element's sign is changed: the columns are not orthogonal."),
        ("f16", "f16", 0, "003c", "Beyond 2^-6 for F16."),
        ("bf16", "bf16", 0, "803f", "Beyond 2^-6 for BF16."),
    ):
        keys = {"base": f"valid/transforms/dense-{dtype}", "pointer": matrix, "judge": "validator"}
        c.data(f"data/orthogonality-{id}", "TRAN-7", "DATA.ORTHOGONALITY", "t.matrix", at, hex, reason, **keys)
    keys = {"base": "valid/transforms/dense-f32", "pointer": matrix, "judge": "validator"}
    reason = "Zero is not orthogonal."
    c.data("data/orthogonality-zero", "TRAN-7", "DATA.ORTHOGONALITY", "t.matrix", 0, "00" * 256, reason, **keys)
    keys = {"pointer": "/transforms/t/signs", "judge": "validator"}
    signs = seed_signs(7, 16)
    flipped = f"{int(signs[0], 16) ^ 1:x}{signs[1:]}"
    c.set("data/signs-flipped", "TRAN-6", "DATA.SIGNS", "/transforms/t/signs", flipped, "One sign differs.", **keys)
    c.set("data/signs-seed", "TRAN-6", "DATA.SIGNS", "/transforms/t/seed", 8, "The signs of another seed.", **keys)
    swapped = signs[2:] + signs[:2]
    c.set(
        "data/signs-byte-order", "TRAN-6", "DATA.SIGNS", "/transforms/t/signs", swapped, "Byte 0 comes first.", **keys
    )
    last = {"base": "valid/transforms/seed-1234567"}
    tail = seed_signs(1234567, 24)
    c.set(
        "data/signs-last",
        "TRAN-6",
        "DATA.SIGNS",
        "/transforms/t/signs",
        tail[:4] + f"{int(tail[4:], 16) % 16 ^ 8:02x}",
        "The last sign differs.",
        **keys,
        **last,
    )
    keys = {"pointer": "/codebooks/b", "judge": "validator"}
    levels = c.repos[TYPICAL].codebooks["b"]["values"]
    code = "DATA.CODEBOOK"
    c.set(
        "data/codebook-level",
        "BOOK-7",
        code,
        "/codebooks/b/values/1",
        levels[1] + 2e-5,
        "A level differs by more than 10^-5.",
        **keys,
    )
    c.set("data/codebook-order", "BOOK-7", code, "/codebooks/b/values", levels[::-1], "Levels ascend.", **keys)
    c.set(
        "data/codebook-iterations",
        "BOOK-7",
        code,
        "/codebooks/b/origin/iterations",
        1,
        "The levels of more iterations.",
        **keys,
    )
    c.set(
        "data/codebook-length",
        "BOOK-7",
        code,
        "/codebooks/b/origin/vector_length",
        64,
        "The levels of another vector_length.",
        **keys,
    )
    base = "valid/codebooks/lloyd-max-stored"
    c.data(
        "data/codebook-stored", "BOOK-7", code, "b.levels", 28, "00000040", "A stored level differs.", base=base, **keys
    )
    base, reason = "valid/codebooks/byte-sum", "The last level differs by 2^-11."
    c.data("data/byte-sum-stored", "BOOK-8", code, "b.levels", 8190, "1139", reason, base=base, **keys)
    base, reason = "valid/codebooks/byte-sum-inline", "Level 1 is 95 / 128, and differs by 2^-23."
    where = "/codebooks/b/values/1"
    c.set("data/byte-sum-inline", "BOOK-8", code, where, 95 / 128 + 2**-23, reason, base=base, **keys)


def limit(c: Cases) -> None:
    size = "LIMIT.SIZE"
    step = {"op": "splice", "file": MANIFEST, "offset": 0, "text": " ", "count": 64 * 2**20}
    text, reason = "64 MiB of spaces go before the manifest.", "A manifest has at most 64 MiB."
    c.add("limit/manifest", "LIM-1", size, text, reason, step, limits=BOMB)
    step = {"op": "fill", "file": MANIFEST, "find": '"tied_weights": {', "format": '"%d":"w",', "count": 2**20}
    text, reason = "2^20 aliases are added.", "`tied_weights` has at most 1,048,576 entries."
    keys: Json = {"pointer": "/tied_weights", "limits": {"seconds": 30, "megabytes": 1000}}
    c.add("limit/aliases", "LIM-1", f"{size} SCHEMA.VALUE", text, reason, step, **keys)
