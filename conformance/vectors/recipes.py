"""What a case that is a recipe consists of, and `Cases`, which collects them.

`judge` says who must reject an invalid case: `reader` is every reader and validator, `validator` only a validator (a
reader may look less closely, for example not compute digests).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from conformance.vectors.builder import Json, Raw, Repo
from conformance.vectors.valid import rules, valid

Step: TypeAlias = dict[str, Any]

TYPICAL = "valid/repository/typical"
PLAIN = "valid/codes/bits-3"  # w.codes U8 [3, 8], w.scales F16 [3, 1]
SHARDS = "valid/shards/2"
FULL = "valid/manifest/quantization-full"
PAYLOAD = "turboquant_weights.safetensors"
MANIFEST = "quant_manifest.json"
SHARD = "turboquant_weights-0000{}-of-0000{}.safetensors"
BOMB = {"seconds": 1}


@dataclass
class Derived:
    """A case that is a recipe; `base` is the case that it starts from."""

    id: str  # <area>/<id>
    rules: list[str]
    base: str
    mutation: str
    codes: list[str]
    pointer: str | None
    reason: str
    steps: list[Step]
    result: str = "invalid"
    judge: str = "reader"
    limits: Json = field(default_factory=dict)


def then(*steps: Step) -> list[Step]:
    """Steps that follow from the mutation and keep everything else consistent."""
    return [step if step["op"] == "refresh" else step | {"consequence": True} for step in steps]


def put(path: str, value: Any) -> Step:
    return {"op": "set", "path": path, "value": value}


def refresh(file: str = PAYLOAD) -> Step:
    return {"op": "refresh", "file": file}


def left_to_validators(case: Derived) -> bool:
    """Whether a reader may leave the violation to validators by [TQ-ERR-3]."""
    first = case.steps[0]
    keys = first.get("path", "").split("/")[1:] if first["op"] in ("set", "remove", "rename") else []
    provenance = {"generator", "base_model", "quantization", "accounting", "pipeline_tag", "origin", "extra"}
    provenance |= {"effective_bits", "chunk_size", "chunks"}
    codes = {
        "PATH.COLLISION",
        "SCHEMA.FEATURES",
        "BIND.ACCOUNTING",
        "DATA.ORTHOGONALITY",
        "DATA.SIGNS",
        "DATA.CODEBOOK",
    }
    null = "SCHEMA.AMBIGUOUS" in case.codes and first.get("value", 0) is None
    return null or bool(provenance & set(keys)) or bool(codes & set(case.codes[:1]))


class Cases:
    """Collects cases; every method adds one."""

    def __init__(self) -> None:
        self.all: list[Derived] = []
        self.repos: dict[str, Repo] = {f"{case.result}/{case.id}": case.repo for case in valid()}

    def add(
        self,
        id: str,
        rule: str,
        code: str,
        mutation: str,
        reason: str,
        *steps: Step,
        base: str = TYPICAL,
        pointer: str | None = MANIFEST,
        judge: str = "reader",
        result: str = "invalid",
        limits: Json | None = None,
    ) -> None:
        """Any recipe; `rule` and `code` hold one or more, separated by spaces."""
        case = Derived(id, rules(rule), base, mutation, code.split(), pointer, reason, list(steps), result, judge)
        case.limits = limits or {}
        if left_to_validators(case):
            case.judge = "validator"
        self.all.append(case)

    def set(self, id: str, rule: str, code: str, path: str, value: Any, reason: str, *more: Step, **keys: Any) -> None:
        """A manifest with another value at `path`."""
        shown = json.dumps(value, ensure_ascii=False)
        shown = shown if len(shown) < 80 else "another value"
        keys.setdefault("pointer", path)
        self.add(id, rule, code, f"{path} becomes {shown}.", reason, put(path, value), *more, **keys)

    def remove(self, id: str, rule: str, code: str, path: str, reason: str, *more: Step, **keys: Any) -> None:
        """A manifest without `path`."""
        keys.setdefault("pointer", path.rpartition("/")[0])
        self.add(id, rule, code, f"{path} is left out.", reason, {"op": "remove", "path": path}, *more, **keys)

    def rename(self, id: str, rule: str, code: str, path: str, to: str, reason: str, *more: Step, **keys: Any) -> None:
        """A manifest with another key."""
        mutation = f"The key {path} becomes {json.dumps(to[:60], ensure_ascii=False)}."
        escaped = to.replace("~", "~0").replace("/", "~1")
        keys.setdefault("pointer", f"{path.rpartition('/')[0]}/{escaped}")
        self.add(id, rule, code, mutation, reason, {"op": "rename", "path": path, "to": to}, *more, **keys)

    def text(self, id: str, rule: str, code: str, find: str, new: str | bytes, reason: str, **keys: Any) -> None:
        """A manifest in whose text `find` is replaced."""
        content: Step = {"hex": new.hex()} if isinstance(new, bytes) else {"text": new}
        shown = f"the bytes {new.hex()}" if isinstance(new, bytes) else new if len(new) < 80 else "a longer text"
        step = {"op": "splice", "file": MANIFEST, "find": find} | content
        self.add(id, rule, code, f"In the manifest's text {find} becomes {shown}.", reason, step, **keys)

    def header(
        self, id: str, rule: str, code: str, find: str, new: str | bytes, reason: str, *more: Step, **keys: Any
    ) -> None:
        """A payload in whose header `find` is replaced."""
        content: Step = {"hex": new.hex()} if isinstance(new, bytes) else {"text": new}
        shown = f"the bytes {new.hex()}" if isinstance(new, bytes) else new
        step = {"op": "header_splice", "file": PAYLOAD, "find": find} | content
        keys = {"base": PLAIN, "pointer": PAYLOAD} | keys
        mutation = f"In the payload's header {find} becomes {shown}."
        self.add(id, rule, code, mutation, reason, step, *then(*more), refresh(), **keys)

    def header_set(
        self, id: str, rule: str, code: str, path: str, value: Any, reason: str, *more: Step, **keys: Any
    ) -> None:
        """A payload with another value in the header."""
        keys = {"base": PLAIN, "pointer": PAYLOAD} | keys
        step = {"op": "header_set", "file": PAYLOAD, "path": path, "value": value}
        mutation = f"In the payload's header {path} becomes {json.dumps(value)}."
        self.add(id, rule, code, mutation, reason, step, *then(*more), refresh(), **keys)

    def data(self, id: str, rule: str, code: str, name: str, offset: int, hex: str, reason: str, **keys: Any) -> None:
        """A payload with other data at byte `offset` of a tensor."""
        step = {"op": "tensor_bytes", "file": PAYLOAD, "name": name, "offset": offset, "hex": hex}
        mutation = f"The data of {name} become {hex} from byte {offset} on."
        self.add(id, rule, code, mutation, reason, step, refresh(), **keys)

    def tensor(self, id: str, rule: str, code: str, name: str, raw: Raw, reason: str, *more: Step, **keys: Any) -> None:
        """A payload with a replaced or added tensor, and accounting to match."""
        repo = self.repos[keys.get("base", TYPICAL)]
        total = repo.accounting()
        old = len(repo.payload[name].data) if name in repo.payload else 0
        stored = total["stored_bytes"] + len(raw.data) - old
        step = {
            "op": "tensor",
            "file": PAYLOAD,
            "name": name,
            "dtype": raw.dtype,
            "shape": list(raw.shape),
            "hex": raw.data.hex(),
        }
        sums = []
        if len(raw.data) != old:
            ratio = round(total["original_bytes"] / stored, 6)
            sums = [put("/accounting/stored_bytes", stored), put("/accounting/ratio", ratio)]
        mutation = f"The payload tensor {name} becomes {raw.dtype} {list(raw.shape)}."
        self.add(id, rule, code, mutation, reason, step, *then(*more, *sums), refresh(), **keys)
