"""Calibration tokens in the cache."""

from pathlib import Path

import pytest
import torch

from reference_quantizer.calibration.tokens import Calibration, kept_tokens


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a file", b"\x93NUMPY"])
def test_a_damaged_file_is_made_again(tmp_path: Path, content: bytes) -> None:
    path, made = tmp_path / "tokens.npz", Calibration(torch.arange(6).reshape(2, 3), ("self",))
    assert kept_tokens(path, lambda: made) is made
    assert torch.equal(kept_tokens(path, pytest.fail).ids, made.ids)
    path.write_bytes(content)
    assert kept_tokens(path, lambda: made) is made
    assert torch.equal(kept_tokens(path, pytest.fail).ids, made.ids)
