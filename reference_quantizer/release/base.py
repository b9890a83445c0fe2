"""What a release says of its base model, id and licence: asked for where it is not known, and recorded. Needs no torch."""

import json
import sys
from pathlib import Path

from reference_quantizer.checkpoint.source import HUB_ID
from reference_quantizer.disk import add_documents, replace_text
from reference_quantizer.progress import tell
from tqformat.load_quantized import MANIFEST, parse_json

EVALUATION = ("eval_summary.json", "sample_generations.json")  # they name the base model, too [TQ-EVAL-1]


def complete(id: str, license: str | None, id_option: str, license_option: str) -> tuple[str, str | None]:
    """The base model's Hub id and licence: a person at the terminal is asked for what is missing.

    Where there is no terminal, or no answer, a line says which option gives it, and what was found stays: an `id` that is
    none of the Hub, and no licence.
    """
    if not HUB_ID.fullmatch(id):
        if answer := _ask(f"Hub id of the base model, such as owner/name [{id}]: "):
            id = answer
        else:
            tell(f"note: the base model is recorded as {id}, so the card links to none; {id_option} gives its Hub id")
    if license is None:
        license = _ask("licence of the base model, such as apache-2.0 [not known]: ")
        if license is None:
            tell(f"note: no licence of the base model was found, so the card names none; {license_option} gives it")
    return id, license


def _ask(question: str) -> str | None:
    """What a person at the terminal answers; None for nothing, and where there is no terminal."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip() or None


def record(repo: Path, id: str | None = None, license: str | None = None) -> None:
    """Puts what is given into the manifest of the finished repository, and the id into its evaluation files."""
    from tqformat.writer import manifest_text  # brings torch

    manifest = parse_json((repo / MANIFEST).read_bytes(), MANIFEST)
    given = {"id": id, "license": license}
    manifest["base_model"] |= {key: value for key, value in given.items() if value is not None}
    replace_text(repo / MANIFEST, manifest_text(manifest))
    contents = {}
    for name in EVALUATION:
        if id is not None and name in manifest["files"]:
            value = parse_json((repo / name).read_bytes(), name) | {"base_model": id}
            contents[name] = (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
    if contents:
        add_documents(repo, contents)
