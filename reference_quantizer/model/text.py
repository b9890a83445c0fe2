"""Texts that a model reads: local files, and data sets of the Hub. Needs no torch."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reference_quantizer.libraries import hub_errors, need, reason
from tqformat.load_quantized import TQFormatError

SEPARATOR = "\n\n"
DATASET_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?")


@dataclass(frozen=True)
class Corpus:
    """The text of an evaluation, with where it came from. `id` is a Hub id or the plain name of a local file."""

    text: str
    rows: int
    source: str  # "file" or "hub"
    id: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    @property
    def sha256(self) -> str:
        """The digest of the text, in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """What the summary says about it, but for the tokens."""
        return {
            "source": self.source,
            "id": self.id,
            "config": self.config,
            "split": self.split,
            "revision": self.revision,
            "rows": self.rows,
            "sha256": self.sha256,
        }


def join_rows(rows: Iterable[str]) -> tuple[str, int]:
    """The rows that hold more than white space, without their line ends, joined by two newlines; and how many they are."""
    kept = [row.rstrip("\r\n") for row in rows if row.strip()]
    return SEPARATOR.join(kept), len(kept)


def read_corpus(dataset: str, split: str = "test", revision: str | None = None) -> Corpus:
    """The corpus that `dataset` names: a local text file, one row a line, or a data set of the Hub as `id:config`."""
    path = Path(dataset)
    if path.is_file():
        try:
            text, rows = join_rows(path.read_text(encoding="utf-8").split("\n"))
        except UnicodeDecodeError as error:
            raise TQFormatError("JSON.ENCODING", path.name, f"not a UTF-8 text: {error}") from None
        return Corpus(text, rows, "file", path.name)
    if not (found := DATASET_ID.fullmatch(dataset)):
        raise TQFormatError(
            "BIND.MISSING_FILE", dataset, "neither a text file nor a data set such as owner/name:config"
        )
    return _from_hub(found[1], found[2], split, revision)


def read_corpora(datasets: Sequence[str], split: str = "test", revision: str | None = None) -> list[Corpus]:
    """The corpora that `datasets` name, of which no two are the same text (SCHEMA.VALUE)."""
    corpora = [read_corpus(dataset, split, revision) for dataset in datasets]
    for i, corpus in enumerate(corpora):
        if corpus.text in [other.text for other in corpora[:i]]:
            raise TQFormatError("SCHEMA.VALUE", corpus.id, "the same text a second time; leave one --dataset out")
    return corpora


def same_data(entry: dict[str, Any], dataset: str, split: str = "test", revision: str | None = None) -> bool:
    """Whether a summary's `entry` is about the corpus that `read_corpus` gives, as far as can be told without fetching it."""
    if Path(dataset).is_file():
        return read_corpus(dataset).to_dict().items() <= entry.items()
    found = DATASET_ID.fullmatch(dataset)
    wanted = {"source": "hub", "id": found[1], "config": found[2], "split": split} if found else {"source": None}
    return (wanted | ({"revision": revision} if revision else {})).items() <= entry.items()


def _from_hub(id: str, config: str | None, split: str, revision: str | None) -> Corpus:
    """The rows of a data set on the Hub, from its files `[config/|data/]split*.parquet|jsonl|txt`, at one commit."""
    need(id, "huggingface_hub")
    from huggingface_hub import HfApi, hf_hub_download

    try:
        info = HfApi().dataset_info(id, revision=revision)
        names = sorted(sibling.rfilename for sibling in info.siblings or ())
        folder = f"{re.escape(config)}/" if config else "(?:data/)?"
        pattern = rf"{folder}{re.escape(split)}(?:-[0-9]+-of-[0-9]+)?\.(parquet|jsonl|txt)"
        chosen = [name for name in names if re.fullmatch(pattern, name)]
        files = [Path(hf_hub_download(id, name, repo_type="dataset", revision=info.sha)) for name in chosen]
    except hub_errors() as error:
        message = f"the data set cannot be fetched ({reason(error)}); a local text file will do as well"
        raise TQFormatError("BIND.MISSING_FILE", id, f"{message}: --dataset FILE, or --calibration FILE") from None
    if len({path.suffix for path in files}) != 1:
        message = (
            f"expected parquet, jsonl or txt files of the split {split!r}, found {len(files)}; give a local text file"
        )
        raise TQFormatError("BIND.MISSING_FILE", id, message)
    text, rows = join_rows(row for path in files for row in _rows(path, id))
    return Corpus(text, rows, "hub", id, config, split, info.sha)


def _rows(path: Path, id: str) -> Iterator[str]:
    """The rows in one file of a data set: its column `text`."""
    if path.suffix == ".parquet":
        need(f"{id}, which is stored as parquet", "pyarrow")
        from pyarrow import parquet

        yield from (row or "" for row in parquet.read_table(path, columns=["text"])["text"].to_pylist())
        return
    for line in path.read_text(encoding="utf-8").split("\n"):
        if path.suffix == ".txt":
            yield line
        elif line.strip():
            yield json.loads(line)["text"]
