"""What surrounds the weights of a checkpoint: support files, licence, and which class builds the model."""

import json
import re
from pathlib import Path
from typing import Any

from reference_quantizer.checkpoint.source import Source
from tqformat.load_quantized import LOADER_KINDS, FileName, TQFormatError, typed
from tqformat.support import role_of

REQUIREMENTS = "accelerate>=1.1\ntorch>=2.4\ntransformers>=5.4\n"  # what the loader imports

# Of a source they are never copied: what they say is about another set of weights, or is written anew.
NEVER = ("quant_manifest.json", "readme.md", "load_quantized.py", "eval_summary.json", "sample_generations.json")
FRONT_LICENSE = r"^license:[ \t]*\n?[ \t]*(?:-[ \t]*)?[\"']?([\w.+-]+)"

KINDS = ("text-generation", "image-text-to-text")  # loader kinds that predict the next token
ARCHITECTURES = {  # ending of a class name -> loader kind
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForImageTextToText": "image-text-to-text",
    "ForSeq2SeqLM": "text2text-generation",
    "ForSpeechSeq2Seq": "automatic-speech-recognition",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "Model": "feature-extraction",
}
LICENCES = {  # words that must all occur in a licence file -> identifier on the Hub
    "apache-2.0": ["Apache License", "Version 2.0, January 2004"],
    "mit": ["Permission is hereby granted, free of charge", "THE SOFTWARE IS PROVIDED"],
    "bsd-3-clause": ["Redistribution and use in source and binary forms", "Neither the name"],
    "gpl-3.0": ["GNU GENERAL PUBLIC LICENSE", "Version 3, 29 June 2007"],
}


def files_to_copy(source: Source) -> tuple[dict[Path, str], list[str]]:
    """The files to copy beside the weights with their roles, in order of names, and lines about those left behind."""
    roles: dict[Path, str] = {}
    notes: list[str] = []
    lower: set[str] = set()
    for path in sorted(p for p in source.path.iterdir() if p.is_file()):
        role = _role(path.name, remote_code="auto_map" in (source.config or {}))
        if role is None:
            continue
        if not _is_allowed(path.name) or path.name.lower() in lower:
            notes.append(f"{path.name}: not copied, the format does not allow this file name")
            continue
        lower.add(path.name.lower())
        roles[path] = role
        if role == "code":
            notes.append(f"{path.name}: copied, since config.json names code; read it before you trust it")
    return roles, notes


def _is_allowed(name: str) -> bool:
    """Whether a repository may hold a file of this name [TQ-REPO-2]."""
    try:
        typed(FileName, name, name)
    except TQFormatError:
        return False
    return True


def marked_config(config: dict[str, Any]) -> bytes:
    """The content of config.json, with the note by which `import tqformat.hf` knows a repository.

    Without that import transformers finds no weight files, and says so: nothing in the note names any.
    """
    marked = config | {"quantization_config": {"quant_method": "tqformat"}}
    return (json.dumps(marked, indent=2, ensure_ascii=False) + "\n").encode()


def _role(name: str, remote_code: bool) -> str | None:
    role = None if name.lower() in NEVER else role_of(name)
    return role if role in ("support", "document") or (role == "code" and remote_code) else None


def find_loader_kind(config: dict[str, Any] | None) -> str:
    """The manifest's `loader_kind` that a config.json calls for; SCHEMA.VALUE where that is not clear [TQ-MAN-5]."""
    advice = f"pass --loader-kind, one of: {', '.join(LOADER_KINDS)}"
    if config is None:
        raise TQFormatError("BIND.MISSING_FILE", "config.json", f"not there, so the model class is unknown; {advice}")
    names = config.get("architectures")
    names = [n for n in names if isinstance(n, str)] if isinstance(names, list) else []
    kinds = {_architecture_kind(name, config) for name in names}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is None:
        found = ", ".join(names) or "none"
        raise TQFormatError("SCHEMA.VALUE", "config.json: architectures", f"found {found[:200]}: not clear; {advice}")
    return kind


def _architecture_kind(name: str, config: dict[str, Any]) -> str | None:
    if name.endswith("ForConditionalGeneration"):
        if "vision_config" in config:
            return "image-text-to-text"
        if "num_mel_bins" in config:
            return "automatic-speech-recognition"
        return "text2text-generation" if config.get("is_encoder_decoder") else None
    if name.endswith(("EncoderDecoderModel", "DoubleHeadsModel")):
        return None
    return next((kind for ending, kind in ARCHITECTURES.items() if name.endswith(ending)), None)


def refuse_quantized(config: dict[str, Any] | None) -> None:
    """A checkpoint that another method has already quantized is an error: its tensors are not the weights."""
    found = (config or {}).get("quantization_config") or (config or {}).get("compression_config")
    if found:
        method = found.get("quant_method", "?") if isinstance(found, dict) else "?"
        message = f"the checkpoint is already quantized ({method}); start from the model it was made from, or keep its values: import"
        raise TQFormatError("SCHEMA.VALUE", "config.json: quantization_config", message)


def card_license(path: Path) -> str | None:
    """The licence identifier in the front matter of the model card in `path`, if there is one."""
    card = path / "README.md"
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8", errors="replace").lstrip("\ufeff")
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    found = re.search(FRONT_LICENSE, front[1], re.MULTILINE) if front else None
    return found[1].lower() if found else None


def find_license(path: Path) -> str | None:
    """The licence identifier in the model card's front matter, else that of a licence file that is easily recognised."""
    if found := card_license(path):
        return found
    for candidate in sorted(
        p for p in path.iterdir() if re.match("licen[cs]e|copying", p.name.lower()) and p.is_file()
    ):
        text = " ".join(candidate.read_text(encoding="utf-8", errors="replace")[:20000].split())
        for name, words in LICENCES.items():
            if all(w in text for w in words):
                return name
    return None
