"""Models by their ids on the Hugging Face Hub: fetched into its cache, then read as directories by load_quantized.py."""

import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import load_quantized as lq
from .load_quantized import MANIFEST, read_manifest, require, translated

if TYPE_CHECKING:
    from .load_quantized import Dtype, PathLike


def load(
    repo_or_hub_id: "PathLike",
    device: Any = None,
    dtype: "Dtype" = None,
    revision: str | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
    packed: bool = False,
    **options: Any,
) -> Any:
    """The ready model, in eval mode, of a repository directory or Hub id; `dtype` defaults to the configuration's.

    It is built on `device`, the CPU by default, or as `device_map` says. With `packed`, the quantized weights stay packed in
    memory, and products are computed from them (packed.py). Other `options` are those of transformers' from_pretrained
    (max_memory, offload_folder, attn_implementation ...); they may be keys of the configuration, too.
    """
    build = lq.load
    if packed:
        from .packed import load as build
    path = fetch(repo_or_hub_id, revision, trust_remote_code)
    model = build(path, device, dtype, verify, trust_remote_code=trust_remote_code, **options)
    model.name_or_path = model.config.name_or_path = str(repo_or_hub_id)  # the base model's name, for PEFT
    return model


def load_tokenizer(repo_or_hub_id: "PathLike", revision: str | None = None, verify: bool = True) -> Any:
    """The tokenizer of a repository directory or Hub id."""
    return lq.load_tokenizer(fetch(repo_or_hub_id, revision), verify)


def fetch(repo_or_hub_id: "PathLike", revision: str | None = None, code: bool = False) -> Path:
    """The directory of a repository; of a Hub id, in the cache, with the files that loading needs [TQ-REPO-3].

    The Hub is asked once, which commit `revision` is (never, if it is a commit); what the cache lacks of it is downloaded.
    Without an answer a complete snapshot in the cache is taken, with a warning.
    """
    path, name = Path(repo_or_hub_id), str(repo_or_hub_id)
    if path.is_dir():
        return path
    ok = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and name[0] not in ".~" and not path.parent.exists()
    require(ok, "BIND.MISSING_FILE", name, "a directory or a Hub id such as owner/name, and this is neither")
    with translated(name, "BIND.MISSING_FILE"):
        from huggingface_hub import HfApi, constants, snapshot_download

        def needed(path: Path) -> list[str]:
            roles, files = ("payload", "support", *["code"] * code), read_manifest(path).files.items()
            return [MANIFEST, *(key for key, file in files if file.role in roles)]

        commit, problem = revision, "not asked (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else ""
        if not problem and not re.fullmatch("[0-9a-f]{40}", revision or ""):
            try:
                commit = HfApi().model_info(name, revision=revision, timeout=10).sha
            except Exception as error:
                problem = " ".join(str(error).split())[:300] or type(error).__name__
        with suppress(OSError):  # the cache lacks this commit
            path = Path(snapshot_download(name, revision=commit, allow_patterns=[MANIFEST], local_files_only=True))
            if (path / MANIFEST).exists() and all((path / key).exists() for key in needed(path)):
                if problem and not constants.HF_HUB_OFFLINE:
                    warnings.warn(f"{name}: commit {path.name} comes from the cache; the Hub: {problem}", stacklevel=3)
                return path
        require(not problem, "BIND.MISSING_FILE", name, f"such a directory, or all in the cache; the Hub: {problem}")
        path = Path(snapshot_download(name, revision=revision, allow_patterns=[MANIFEST]))
        return Path(snapshot_download(name, revision=path.name, allow_patterns=needed(path)))  # the same commit
