"""Packed weights against decoded ones: values, products, gradients, for every setting of the format."""

import pytest
import torch
from pathlib import Path

from tqformat import open_repo
from tqformat.packed import PackedRepo, PackedWeight


def test_values(settings_repo: Path) -> None:
    with PackedRepo(settings_repo) as repo, open_repo(settings_repo) as plain:
        for name in plain.names():
            weight, value = repo.dequantize(name), plain.dequantize(name)
            assert isinstance(weight, PackedWeight) == (plain.manifest.tensors[name].kind == "quantized")
            if not isinstance(weight, PackedWeight):
                continue
            assert weight.shape == value.shape and weight.dtype == value.dtype
            assert torch.equal(weight.decode(), value)
            assert torch.equal(weight + 0, value + 0)
            if weight.dim() == 2 and len(weight):
                for m in (1, 3, 20):
                    x = torch.randn(m, weight.shape[1])
                    y = torch.nn.functional.linear(x, weight)
                    assert torch.allclose(y, x @ value.float().T, atol=1e-2, rtol=1e-2), (name, m)
                ids = torch.tensor([[0, 2, 1], [2, 0, 0]])
                assert torch.equal(torch.nn.functional.embedding(ids, weight), value[ids])
