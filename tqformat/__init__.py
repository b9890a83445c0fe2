"""tqformat: an open format for low-bit model weights. `tqformat.load("repo_dir", device="cuda")` gives a ready model.

The reading order: load_quantized.py (all of reading, in the order of SPEC.md), hub.py (models by their ids), writer.py
(packing and publishing), embed.py (the loader as a file of a model repository), support.py (the other files beside the
weights), gguf_export.py with gguf_tokenizer.py (a repository for llama.cpp), packed.py, hf.py and vllm.py (weights that
stay packed, and other programs' interfaces), __main__.py (the command line).
"""

from typing import Any

from . import embed
from .hub import fetch, load, load_tokenizer
from .load_quantized import (
    Manifest,
    Repo,
    TQFormatError,
    __version__,
    load_quantized_model,
    load_state_dict,
    open_repo,
    read_manifest,
)

_WRITING = ("RepoWriter", "add_files", "export_safetensors", "pack")


def __getattr__(name: str) -> Any:
    """The writer needs torch and numpy at once; whoever only reads a manifest should not wait for them."""
    if name in _WRITING:
        from . import writer

        return getattr(writer, name)
    if name == "export_gguf":
        from .gguf_export import export_gguf

        return export_gguf
    raise AttributeError(f"module 'tqformat' has no attribute {name!r}")


__all__ = [  # noqa: RUF022 (by use)
    "load",
    "load_quantized_model",
    "load_tokenizer",
    "load_state_dict",
    "open_repo",
    "fetch",
    "read_manifest",
    "export_safetensors",
    "export_gguf",
    "RepoWriter",
    "pack",
    "add_files",
    "embed",
    "Manifest",
    "Repo",
    "TQFormatError",
    "__version__",
]
