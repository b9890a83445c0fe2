"""The shape of the manifest, by schemas/manifest.schema.json.

`jsonschema` judges. It needs a millisecond for an entry, so a big manifest is first rid of the entries without fault, by
predicates compiled from the same schema (`compile_schema`); a test holds the two against each other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

import jsonschema
from jsonschema.protocols import Validator

from conformance.findings import Finding, brief, join

MAX_FINDINGS = 1000  # entries with faults that are judged one by one

Predicate = Callable[[Any], bool]


def load_schema() -> dict[str, Any]:
    """The manifest's schema, with `{"not": {}}` for `false`: jsonschema gives the place of that, but not of `false`."""
    schema: dict[str, Any] = json.loads(
        files("schemas").joinpath("manifest.schema.json").read_text(encoding="utf-8"),
        object_hook=lambda entry: {
            key: {"not": {}} if value is False and key != "additionalProperties" else value
            for key, value in entry.items()
        },
    )
    return schema


def shape_findings(manifest: dict[str, Any]) -> list[Finding]:
    """Every place where `manifest` breaks the schema; the kinds of the findings are the `schema.*` checks."""
    schema = load_schema()
    suspects, findings = _suspects(manifest, schema)
    seen = set()
    for error in validator(schema).iter_errors(suspects):
        for finding in _explain(error, suspects):
            if (finding.kind, finding.pointer) not in seen:
                seen.add((finding.kind, finding.pointer))
                findings.append(finding)
    # what a key of another kind holds does not matter
    stray = tuple(f"{finding.pointer}/" for finding in findings if finding.kind == "ambiguous")
    findings = [f for f in findings if f.kind == "ambiguous" or not f"{f.pointer}/".startswith(stray)]
    return [f for f in findings if f.pointer not in ("/format", "/format_version")]  # judged before all else


# jsonschema, made strict


def _pattern(_: Validator, pattern: str, instance: object, __: object) -> Iterator[jsonschema.ValidationError]:
    """`pattern` as ECMA-262 has it: `$` is the end, where Python's also stands before a last line feed."""
    if isinstance(instance, str) and not _expression(pattern).search(instance):
        yield jsonschema.ValidationError(f"does not match {pattern}")


def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern[:-1] + r"\Z" if pattern.endswith("$") else pattern)


def _is_integer(_: object, value: object) -> bool:
    return type(value) is int  # [TQ-JSON-4] neither 2.0 nor true


def validator(schema: dict[str, Any]) -> Validator:
    """A jsonschema validator for which 2.0 is no integer and `$` is the end."""
    draft = jsonschema.Draft202012Validator
    types = draft.TYPE_CHECKER.redefine("integer", _is_integer)
    strict: type[Validator] = jsonschema.validators.extend(draft, {"pattern": _pattern}, type_checker=types)
    return strict(schema)


def _is_consequence(error: jsonschema.ValidationError, manifest: dict[str, Any]) -> bool:
    """Whether an error follows from a `kind` or `method` that has its own: then no branch of the schema applies."""
    path = list(error.absolute_path)
    if not {"then", "else"} & set(map(str, error.absolute_schema_path)) or len(path) < 2:
        return False
    entry = manifest[path[0]][path[1]]
    if path[0] == "codebooks":
        return "method" not in entry["origin"]
    kinds = {
        "tensors": ("quantized", "passthrough"),
        "transforms": ("identity", "hadamard", "dense", "givens", "permutation"),
    }
    return entry.get("kind") not in kinds[str(path[0])]


def _explain(error: jsonschema.ValidationError, manifest: dict[str, Any]) -> Iterator[Finding]:
    """An error of jsonschema in the terms of SPEC.md section 17."""
    if _is_consequence(error, manifest):
        return
    path, value = list(error.absolute_path), error.instance

    def finding(kind: str, message: str, *below: str) -> Finding:
        return Finding(message, join(*path, *below), kind=kind, rule=rule_of(kind, [*map(str, path), *below]))

    if error.validator == "not" and not error.validator_value:  # a key of the other kind [TQ-MAN-6]
        yield finding("ambiguous", "this key belongs to another kind of entry; leave it out or change the kind")
    elif error.validator == "additionalProperties":
        for key in sorted(value.keys() - error.schema["properties"].keys()):
            message = f"the key {brief(key)} has no meaning here; leave it out, or move it into `extra`"
            yield finding("unknown_field", message, key)
    elif error.validator == "required":
        for key in error.validator_value:
            if key not in value:
                yield finding("missing_field", f"the key {key} is required; add it", key)
    elif "propertyNames" in error.absolute_schema_path:
        if path[0] != "files":  # PATH.NAME has its own check
            message = f"expected a key of 1 to 512 characters, no control characters, no path out, found {brief(value)}"
            yield Finding(message, join(*path, value), kind="value", rule="TQ-MAN-4")
    elif error.validator == "anyOf":
        # something or null: what keeps it from being something
        for cause in error.context or []:
            if cause.schema_path[0] == 0:
                yield from _explain(cause, manifest)
    elif error.validator == "type" and value is None and "then" in error.absolute_schema_path:
        # null is as good as absent [TQ-MAN-2, TQ-BOOK-7]
        yield finding("missing_field", f"the key {path[-1]} is required; give it a value")
    elif error.validator == "type" or (error.validator in ("enum", "const") and not isinstance(value, str)):
        wanted = error.validator_value if error.validator == "type" else "string"
        types = " or ".join([wanted] if isinstance(wanted, str) else wanted)
        types += " or null" if error.parent is not None and not error.relative_path else ""
        hint = ", written without fraction and exponent" if "integer" in types and isinstance(value, float) else ""
        yield finding("type", f"expected {types}{hint}, found {brief(value)}")
    elif error.validator == "maxProperties":
        yield finding("entries", f"expected at most {error.validator_value} entries, found {len(value)}")
    else:
        wanted = _LIMITS.get(str(error.validator), "{}").format(_listed(error.validator_value))
        yield finding("value", f"expected {wanted}, found {brief(value)}")


_LIMITS = {
    "minimum": "at least {}",
    "maximum": "at most {}",
    "multipleOf": "a multiple of {}",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "uniqueItems": "each item once",
    "enum": "one of {}",
    "const": "{}",
    "pattern": "text that matches {}",
    "not": "another name",
}


def _listed(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# the rule that stands behind a key, for the message
_RULES: list[tuple[str, str]] = [
    (r"/format(_version)?", "TQ-MAN-3"),
    (r"/features.*", "TQ-VER-1"),
    (r"/loader_kind", "TQ-MAN-5"),
    (r"/files/[^/]*/(size|sha256)", "TQ-REPO-4"),
    (r"/files/[^/]*/chunk.*", "TQ-REPO-8"),
    (r"/files.*", "TQ-REPO-3"),
    (r"/transforms/[^/]*/(matrix|size)", "TQ-TRAN-7"),
    (r"/transforms/[^/]*/(pairs|angles)", "TQ-TRAN-8"),
    (r"/transforms/[^/]*/index", "TQ-TRAN-9"),
    (r"/transforms/[^/]*/signs", "TQ-TRAN-5"),
    (r"/transforms/[^/]*/seed", "TQ-TRAN-6"),
    (r"/transforms/[^/]*/factors.*", "TQ-TRAN-4"),
    (r"/codebooks/[^/]*/origin.*", "TQ-BOOK-7"),
    (r"/codebooks/[^/]*/values.*", "TQ-BOOK-2"),
    (r"/codebooks/[^/]*/(tensor|rows)", "TQ-BOOK-3"),
    (r"/tensors/[^/]*/stages/[0-9]*/(bits|window)", "TQ-CODE-1"),
    (r"/tensors/[^/]*/stages/[0-9]*/tile.*", "TQ-CODE-2"),
    (r"/tensors/[^/]*/stages/[0-9]*/vector_length", "TQ-NUM-1"),
    (r"/tensors/[^/]*/(shape|dtype).*", "TQ-MAN-7"),
    (r"/tensors/[^/]*/kind", "TQ-MAN-6"),
    (r"/accounting.*", "TQ-ACC-1"),
    (r"/tied_weights.*|.*/(codes|(outer_)?(scales|offsets)|codebook|transform|data|column_scale)", "TQ-MAN-4"),
]


def rule_of(kind: str, path: list[str]) -> str | None:
    """The rule that a finding at `path` breaks; None leaves it to the check."""
    if kind not in ("value", "type"):
        return None
    place = "".join("/" + part.replace("/", " ") for part in path)
    return next((rule for pattern, rule in _RULES if re.fullmatch(pattern, place, re.DOTALL)), "TQ-MAN-2")


# the sieve


def _suspects(manifest: dict[str, Any], schema: dict[str, Any]) -> tuple[dict[str, Any], list[Finding]]:
    """`manifest` without the entries of its maps that the schema has nothing against; and what that alone shows."""
    reduced, findings = dict(manifest), []
    for key, rule in schema["$defs"]["Manifest"]["properties"].items():
        entries = manifest.get(key)
        if "propertyNames" not in rule or not isinstance(entries, dict):
            continue
        if len(entries) > rule["maxProperties"]:
            message = f"expected at most {rule['maxProperties']} entries, found {len(entries)}"
            findings.append(Finding(message, join(key), kind="entries"))
        name_ok = compile_schema(rule["propertyNames"], schema)
        entry_ok = compile_schema(rule["additionalProperties"], schema)
        bad = [name for name, entry in entries.items() if not (name_ok(name) and entry_ok(entry))]
        if len(bad) > MAX_FINDINGS:
            message = f"{len(bad) - MAX_FINDINGS} more entries of `{key}` break the schema; repair the first {MAX_FINDINGS} first"
            findings.append(Finding(message, join(key), kind="value"))
        reduced[key] = {name: entries[name] for name in bad[:MAX_FINDINGS]}
    return reduced, findings


def compile_schema(schema: Any, root: dict[str, Any]) -> Predicate:
    """A predicate that says whether a value satisfies `schema`; it knows the keywords that our schema uses, and no other."""
    if isinstance(schema, bool):
        return lambda value: schema
    unknown = schema.keys() - _ANNOTATIONS - _KEYWORDS.keys() - {"then", "else"}
    if unknown:
        raise ValueError(f"this compiler does not know the schema keywords {sorted(unknown)}")
    parts = [_KEYWORDS[key](schema, root) for key in schema if key in _KEYWORDS]
    if len(parts) == 1:
        return parts[0]
    return lambda value: all(part(value) for part in parts)


_ANNOTATIONS = {"$schema", "$id", "title", "description", "$defs"}
_TYPES: dict[str, Predicate] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "integer": lambda v: type(v) is int,
    "number": lambda v: type(v) is int or type(v) is float,
    "null": lambda v: v is None,
}


def _ref(schema: dict[str, Any], root: dict[str, Any]) -> Predicate:
    return compile_schema(root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)


def _type(schema: dict[str, Any], _: dict[str, Any]) -> Predicate:
    names = schema["type"]
    if isinstance(names, str):
        return _TYPES[names]
    tests = [_TYPES[name] for name in names]
    return lambda v: any(test(v) for test in tests)


def _enum(schema: dict[str, Any], _: dict[str, Any]) -> Predicate:
    allowed = frozenset(schema["enum"] if "enum" in schema else [schema["const"]])
    assert all(isinstance(item, str) for item in allowed), "true equals 1 in Python"
    return lambda v: isinstance(v, str) and v in allowed


def _search(schema: dict[str, Any], _: dict[str, Any]) -> Predicate:
    search = _expression(schema["pattern"]).search
    return lambda v: not isinstance(v, str) or search(v) is not None


def _bound(
    key: str, kind: Predicate, within: Callable[[Any, Any], bool]
) -> Callable[[dict[str, Any], dict[str, Any]], Predicate]:
    def compiled(schema: dict[str, Any], _: dict[str, Any]) -> Predicate:
        limit = schema[key]
        return lambda v: not kind(v) or within(v, limit)

    return compiled


def _properties(schema: dict[str, Any], root: dict[str, Any]) -> Predicate:
    tests = {key: compile_schema(rule, root) for key, rule in schema["properties"].items()}

    def satisfied(value: Any) -> bool:
        if not isinstance(value, dict):
            return True
        for key, item in value.items():
            test = tests.get(key)
            if test is not None and not test(item):
                return False
        return True

    return satisfied


def _closed(schema: dict[str, Any], _: dict[str, Any]) -> Predicate:
    assert schema["additionalProperties"] is False, "maps are the business of _suspects"
    known = schema["properties"].keys()
    return lambda v: not isinstance(v, dict) or v.keys() <= known


def _required(schema: dict[str, Any], _: dict[str, Any]) -> Predicate:
    keys = frozenset(schema["required"])
    return lambda v: not isinstance(v, dict) or keys <= v.keys()


def _items(schema: dict[str, Any], root: dict[str, Any]) -> Predicate:
    test = compile_schema(schema["items"], root)
    return lambda v: not isinstance(v, list) or all(map(test, v))


def _not(schema: dict[str, Any], root: dict[str, Any]) -> Predicate:
    test = compile_schema(schema["not"], root)
    return lambda v: not test(v)


def _any_of(schema: dict[str, Any], root: dict[str, Any]) -> Predicate:
    tests = [compile_schema(rule, root) for rule in schema["anyOf"]]
    return lambda v: any(test(v) for test in tests)


def _all_of(schema: dict[str, Any], root: dict[str, Any]) -> Predicate:
    tests = [compile_schema(rule, root) for rule in schema["allOf"]]
    return lambda v: all(test(v) for test in tests)


def _if(schema: dict[str, Any], root: dict[str, Any]) -> Predicate:
    condition, then = compile_schema(schema["if"], root), compile_schema(schema["then"], root)
    otherwise = compile_schema(schema.get("else", True), root)
    return lambda v: then(v) if condition(v) else otherwise(v)


_KEYWORDS: dict[str, Callable[[dict[str, Any], dict[str, Any]], Predicate]] = {
    "$ref": _ref,
    "type": _type,
    "enum": _enum,
    "const": _enum,
    "pattern": _search,
    "minLength": _bound("minLength", _TYPES["string"], lambda v, limit: len(v) >= limit),
    "maxLength": _bound("maxLength", _TYPES["string"], lambda v, limit: len(v) <= limit),
    "minItems": _bound("minItems", _TYPES["array"], lambda v, limit: len(v) >= limit),
    "maxItems": _bound("maxItems", _TYPES["array"], lambda v, limit: len(v) <= limit),
    "minimum": _bound("minimum", _TYPES["number"], lambda v, limit: bool(v >= limit)),
    "maximum": _bound("maximum", _TYPES["number"], lambda v, limit: bool(v <= limit)),
    "multipleOf": _bound("multipleOf", _TYPES["integer"], lambda v, limit: bool(v % limit == 0)),
    "properties": _properties,
    "additionalProperties": _closed,
    "required": _required,
    "items": _items,
    "not": _not,
    "anyOf": _any_of,
    "allOf": _all_of,
    "if": _if,
}
