"""A repository of the Hub, fetched whole, as all of it is to be judged."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from conformance.findings import brief


class HubError(Exception):
    """The repository could not be fetched."""


def is_id(text: str) -> bool:
    """Whether `text` looks like owner/name."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", text, re.ASCII) is not None


def fetch(id: str, revision: str | None = None) -> Path:
    """The directory in the Hub's local cache with all files of one commit; raises HubError.

    The Hub is always asked which commit and which files: a copy that is here may hold but the files that loading needed.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.utils import disable_progress_bars
    except ImportError as error:
        advice = f"{id} is no directory here, and to fetch it from the Hub: python -m pip install huggingface_hub"
        raise HubError(f"[UNSUPPORTED.LIBRARY] huggingface_hub: cannot be imported ({error}); {advice}") from None
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        info = HfApi().model_info(id, revision=revision)
        path = Path(snapshot_download(id, revision=info.sha))
    except Exception as error:  # whatever the Hub, the network and the disk have against it
        why = f"{type(error).__name__}: {brief(' '.join(str(error).split()), 300)[1:-1]}"
        advice = "a copy of the whole repository that is here is judged by its directory"
        raise HubError(
            f"[BIND.MISSING_FILE] {id}: no directory here, and the Hub did not give it ({why}); {advice}"
        ) from None
    missing = [file.rfilename for file in info.siblings or [] if not (path / file.rfilename).is_file()]
    if missing:  # the network went away between the two, and what the cache had was taken for all
        raise HubError(
            f"[BIND.MISSING_FILE] {id}: {len(missing)} files were not fetched, {missing[0]!a} first; try again"
        )
    return path
