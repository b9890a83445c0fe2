"""tqformat: an open format for low-bit model weights. `tqformat.load("repo_dir", device="cuda")` gives a ready model.

The reading order: load_quantized.py (all of reading, in the order of SPEC.md), writer.py (packing and publishing),
embed.py (the loader as a file of a model repository), gguf_export.py and
gguf_tokenizer.py (a repository for llama.cpp), support.py (the other files beside the weights), __main__.py (the
command line).
"""

from typing import Any

from . import embed, load_quantized
from .load_quantized import (
    Manifest,
    Repo,
    TQFormatError,
    __version__,
    fetch,
    load_quantized_model,
    load_state_dict,
    load_tokenizer,
    open_repo,
    read_manifest,
)


def load(
    repo_or_hub_id: "load_quantized.PathLike",
    device: Any = None,
    dtype: "load_quantized.Dtype" = None,
    revision: str | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
    packed: bool = False,
    **options: Any,
) -> Any:
    """The ready model, in eval mode, of a repository directory or Hub id: load_quantized.load, whose options these are.

    With `packed`, the quantized weights stay packed in memory, and products are computed from them (packed.py).
    """
    build = load_quantized.load
    if packed:
        from .packed import load as build
    return build(repo_or_hub_id, device, dtype, revision, verify, trust_remote_code, **options)


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
