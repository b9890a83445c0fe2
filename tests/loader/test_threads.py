"""Decoding in threads, digests beside it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import new_writer

from tqformat import TQFormatError, add_files, load_state_dict, open_repo
from tqformat.load_quantized import HASHING, Repo


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    with new_writer(tmp_path / "repo", chunk_size=4096) as writer:
        writer.add_transform("i", "identity", 1)
        writer.add_codebook("c", [-1.5, -0.5, 0.5])
        for name in ("a", "b", "c"):
            symbols = rng.integers(0, 3, (1024, 512))
            codes = (symbols.reshape(1024, 128, 4) << np.arange(0, 8, 2)).sum(2).astype(np.uint8)
            scales = np.ones((1024, 1), np.float16)
            writer.add_quantized(name, [1024, 512], "F32", [stage(codes, scales)])
        return writer.finish()


def stage(codes: np.ndarray, scales: np.ndarray) -> dict[str, Any]:
    return {"bits": 2, "codebook": "c", "transform": "i", "codes": codes, "scales": scales}


def damage(repo: Path, value: int) -> None:
    """One byte in the middle of the last weight's codes."""
    path = repo / "turboquant_weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] = value
    path.write_bytes(data)


def test_a_wrong_digest_is_told_before_what_it_breaks(repo: Path) -> None:
    """The byte holds a code without a level, which decoding finds; the digest is the cause."""
    damage(repo, 0xFF)
    with pytest.raises(TQFormatError) as told, Repo(repo, verify=False) as opened:
        [opened.dequantize(name) for name in opened.names()]
    assert told.value.code in ("PACK.CODE_RANGE", "DATA.NON_FINITE")
    for read in (lambda: load_state_dict(repo), lambda: open_repo(repo)):
        with pytest.raises(TQFormatError) as told:
            read()
        assert told.value.code == "BIND.DIGEST"


def test_nothing_is_returned_from_a_file_whose_digest_is_wrong(repo: Path) -> None:
    """The byte holds codes like any other: only the digest tells."""
    damage(repo, 0x00)
    load_state_dict(repo, verify=False)
    with pytest.raises(TQFormatError) as told:
        load_state_dict(repo)
    assert told.value.code == "BIND.DIGEST"


def test_an_error_of_the_caller_does_not_wait_for_digests(repo: Path) -> None:
    damage(repo, 0x00)
    with pytest.raises(KeyError), Repo(repo, beside=True):
        raise KeyError


def test_a_support_file_does_not_wait_for_the_payload(repo: Path) -> None:
    add_files(repo, {"config.json": ("support", b"{}")})
    go_on = threading.Event()
    with Repo(repo, beside=True) as opened, ThreadPoolExecutor(1) as other:
        for _ in range(HASHING):
            opened._hashing.submit(go_on.wait)
        try:
            assert other.submit(opened.check_file, "config.json").result(60).read_bytes() == b"{}"
        finally:
            go_on.set()


def test_the_number_of_torch_threads_is_left_alone(repo: Path) -> None:
    """Each decoding thread works alone, which does not spin; other threads, new ones too, have what they had."""
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        with open_repo(repo) as opened:
            opened.dequantize("a")
            assert opened._workers.submit(torch.get_num_threads).result() == 1
        new = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        new.start()
        new.join()
        assert [torch.get_num_threads(), *found] == [3, 3]
    finally:
        torch.set_num_threads(before)


def test_weights_come_in_the_order_of_the_file(repo: Path) -> None:
    with open_repo(repo) as opened:
        assert opened.names() == ["a", "b", "c"]
