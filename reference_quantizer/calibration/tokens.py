"""Tokens to measure a model with: windows of given texts, or text that the model writes itself, so that no data are needed."""

import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reference_quantizer.checkpoint.source import Source, weights_sha256
from reference_quantizer.model.base import default_dtype, find_bos, load_base, load_tokenizer, running_models
from reference_quantizer.model.machine import default_cache, libraries
from reference_quantizer.model.text import read_corpus
from tqformat.load_quantized import TQFormatError

SELF = "self"
BATCH = 16  # sequences that the model writes at once


@dataclass(frozen=True)
class Calibration:
    """Token ids int64 [sequences, length], and which texts they are from."""

    ids: Tensor
    texts: tuple[str, ...]  # "self", or names of files and of data sets on the Hub

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    @property
    def sha256(self) -> str:
        """The digest of the ids as little-endian int32, in order."""
        return hashlib.sha256(self.ids.numpy().astype("<i4").tobytes()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The manifest's `quantization.calibration` [TQ-MAN-5]."""
        own = self.texts == (SELF,)
        return {
            "source": SELF if own else "texts",
            "texts": 0 if own else len(self.texts),
            "tokens": self.tokens,
            "extra": {"names": list(self.texts), "length": self.ids.shape[1], "sha256": self.sha256},
        }


def calibration_tokens(
    model: Any, tokenizer: Any, texts: Sequence[str], tokens: int, length: int = 512, seed: int = 0
) -> Calibration:
    """`tokens` tokens, rounded up to whole sequences of `length`, or as many as the texts have.

    `texts` is ["self"], or text files and data sets of the Hub (`id:config`, split `train`). Where the tokenizer itself
    puts a BOS token in front of a text, each sequence begins with it. `model` and `seed` serve "self" alone.
    """
    bos, count = find_bos(tokenizer), -(-tokens // length)
    if SELF in texts:
        if len(texts) > 1:
            raise TQFormatError("SCHEMA.VALUE", "--calibration", "expected self alone, or texts alone")
        return Calibration(write_texts(model, tokenizer, bos, count, length, seed), (SELF,))
    windows = [cut(_token_ids(tokenizer, text), length, bos) for text in texts]
    return Calibration(draw(windows, count), tuple(Path(text).name if Path(text).is_file() else text for text in texts))


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a file's whole text, its lines as they are, or of a data set's rows."""
    if Path(text).is_file():
        try:
            content = Path(text).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TQFormatError("JSON.ENCODING", Path(text).name, f"not a UTF-8 text: {error}") from None
    else:
        content = read_corpus(text, "train").text
    return list(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"])


def cut(ids: list[int], length: int, bos: int | None) -> Tensor:
    """Successive sequences of `length` tokens, each with `bos` in front where there is one; the rest is left out."""
    step = length - (bos is not None)
    rows = torch.tensor(ids[: len(ids) // step * step], dtype=torch.int64).reshape(-1, step)
    return rows if bos is None else torch.cat([torch.full((len(rows), 1), bos), rows], 1)


def draw(windows: Sequence[Tensor], count: int) -> Tensor:
    """`count` of the sequences, evenly from all texts and evenly spaced in each; all where there are not so many."""
    shares = [0] * len(windows)
    for _ in range(min(count, sum(map(len, windows)))):  # to the text with the smallest share that has more
        shares[min((n, k) for k, n in enumerate(shares) if n < len(windows[k]))[1]] += 1
    if not sum(shares):
        raise TQFormatError(
            "SCHEMA.VALUE", "--calibration", "the texts are shorter than one sequence; give longer ones"
        )
    chosen = [
        rows[(2 * torch.arange(n) + 1) * len(rows) // (2 * n)] for rows, n in zip(windows, shares, strict=True) if n
    ]
    return torch.cat(chosen)


def write_texts(model: Any, tokenizer: Any, bos: int | None, count: int, length: int, seed: int) -> Tensor:
    """`count` sequences of `length` tokens that the model samples at temperature 1, from BOS or from random tokens.

    What follows an end-of-text token is kept: it is the beginning of another text. Int64 [count, length].
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    special = torch.tensor(tokenizer.all_special_ids, dtype=torch.int64, device=model.device)
    plain = torch.ones(len(tokenizer), device=model.device).index_fill_(0, special[special < len(tokenizer)], 0)
    groups = []
    for first in range(0, count, BATCH):
        size = min(BATCH, count - first)
        if bos is None:
            last = torch.multinomial(plain, size, replacement=True, generator=generator)[:, None]
        else:
            last = torch.full((size, 1), bos, device=model.device)
        ids, cache = [last], None
        with torch.inference_mode():
            for _ in range(length - 1):
                out = model(input_ids=last, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                share = out.logits[:, -1].float().softmax(-1)
                last = torch.multinomial(share, 1, generator=generator)
                ids.append(last)
        groups.append(torch.cat(ids, 1).cpu())
    return torch.cat(groups)


def kept_tokens(path: Path, make: Any) -> Calibration:
    """The tokens in the cache's file `path`; if it is not there or damaged, what `make()` gives, which is then kept."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return Calibration(torch.from_numpy(stored["ids"].astype(np.int64)), tuple(map(str, stored["texts"])))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        made: Calibration = make()
        new = path.with_name(f".{path.name}.{os.getpid()}.npz")
        np.savez(new, ids=made.ids.numpy().astype("<i4"), texts=np.array(made.texts))
        os.replace(new, path)
        return made


def find_tokens(
    source: Source,
    loader_kind: str,
    texts: tuple[str, ...],
    tokens: int,
    cache: Path | None,
    device: str = "cpu",
    seed: int = 0,
) -> Calibration:
    """The calibration tokens for the checkpoint `source`; those that the model writes itself, by `seed`, are kept in `cache`."""
    with running_models():
        tokenizer = load_tokenizer(source.path)
        if texts != (SELF,):
            return calibration_tokens(None, tokenizer, texts, tokens)
        dtype, cache = default_dtype(device), cache or default_cache()
        content = json.dumps([weights_sha256(source), loader_kind, tokens, dtype, device, seed, libraries()])
        cache.mkdir(parents=True, exist_ok=True)
        path = cache / f"calibration-{hashlib.sha256(content.encode()).hexdigest()[:32]}.npz"

        def write() -> Calibration:
            model = load_base(source, loader_kind, dtype, device)
            return calibration_tokens(model, tokenizer, texts, tokens, seed=seed)

        return kept_tokens(path, write)
