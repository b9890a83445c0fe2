"""Writes dictionary.txt: the keys and values of the manifest, and numbers at the limits of SPEC.md."""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import target


def words(schema: Any) -> set[str]:
    """The property names and the enumerated values of a JSON schema."""
    if isinstance(schema, list):
        return set().union(*map(words, schema))
    if not isinstance(schema, dict):
        return set()
    own = set(schema.get("properties", ())) | {v for v in schema.get("enum", ()) if isinstance(v, str)}
    return own.union(*map(words, schema.values()))


def main() -> None:
    schema = json.loads((target.ROOT / "schemas" / "manifest.schema.json").read_text(encoding="utf-8"))
    texts = {
        json.dumps(word)
        for word in words(schema) | set(target.FILES) | set(target.KEYS) | {"data_offsets", "__metadata__"}
    }
    texts |= {str(number) for number in target.NUMBERS} | {token for token in target.TOKENS if 0 < len(token) < 40}
    lines = []
    for text in sorted(texts):
        escaped = "".join(c if c.isalnum() or c in "_-+. {}[]:,/" else f"\\x{ord(c):02x}" for c in text)
        lines.append(f'"{escaped}"')
    here = Path(__file__).resolve().parent
    (here / "dictionary.txt").write_text("\n".join(lines) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
