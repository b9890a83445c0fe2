"""Hessians of layers' outputs: against gradients taken one by one, and what is found again after an interruption."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT  # noqa: F401  # puts the sources onto the path
from helpers import make_checkpoint

from reference_quantizer.calibration import curvature
from reference_quantizer.calibration.curvature import measure_output_hessians
from reference_quantizer.checkpoint.source import open_source
from reference_quantizer.model.base import load_base
from reference_quantizer.progress import Progress
from tqformat.load_quantized import TQFormatError

IDS = torch.randint(0, 64, (3, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(curvature, "has_bfloat16", lambda device: False)
    source = open_source(str(make_checkpoint(tmp_path / "base")))
    return load_base(source, "text-generation")


def layers(model: Any) -> dict[str, torch.nn.Linear]:
    return {
        f"{n}.weight": m
        for n, m in model.model.layers.named_modules(prefix="model.layers")
        if isinstance(m, torch.nn.Linear)
    }


def test_they_are_the_mean_products_of_gradients(model: Any, tmp_path: Path) -> None:
    found = measure_output_hessians(model, layers(model), IDS, tmp_path, quiet=True)
    assert found.keys() == layers(model).keys()
    wanted = {name: torch.zeros(layer.out_features, layer.out_features) for name, layer in layers(model).items()}
    outputs: dict[str, torch.Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, args, out, name=name: outputs.update({name: out}))
        for name, layer in layers(model).items()
    ]
    generator = torch.Generator().manual_seed(curvature.SEED)
    model.requires_grad_(True)
    for row in IDS:
        share = model(input_ids=row[None], use_cache=False).logits[0].log_softmax(-1)
        labels = torch.multinomial(share.detach().exp(), 1, generator=generator)
        total = share.gather(1, labels).sum()
        for name, gradient in zip(outputs, torch.autograd.grad(total, list(outputs.values())), strict=True):
            for g in gradient[0]:
                wanted[name] += torch.outer(g, g) / IDS.numel()
    for hook in hooks:
        hook.remove()
    for name, matrix in found.items():
        assert matrix.diagonal().min() > 0
        assert torch.allclose(matrix, wanted[name], rtol=1e-3, atol=1e-5 * float(wanted[name].abs().max())), name


def test_what_is_complete_is_not_measured_again(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {
        n: g.clone() for n, g in measure_output_hessians(model, layers(model), IDS, tmp_path / "", quiet=True).items()
    }
    cut = tmp_path / "cut"
    cut.mkdir()

    def stop(self: Progress, units: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", stop)
        with pytest.raises(KeyboardInterrupt):
            measure_output_hessians(model, layers(model), IDS, cut, quiet=True)
    again = measure_output_hessians(model, layers(model), IDS, cut, quiet=True)
    monkeypatch.setattr(model, "forward", None)  # cannot be called
    for kept in (again, measure_output_hessians(model, layers(model), IDS, cut, quiet=True)):
        assert whole.keys() == kept.keys() and all(torch.equal(whole[name], kept[name]) for name in whole)


def test_of_many_tokens_evenly_spaced_sequences_are_taken(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"][0]), with_kwargs=True)
    monkeypatch.setattr(curvature, "TOKENS", 39)
    ids = torch.arange(60).reshape(6, 10)
    measure_output_hessians(model, layers(model), ids, tmp_path, quiet=True)
    assert [int(row[0]) // 10 for row in seen] == [1, 3, 5]


def test_layers_that_no_gradient_reaches_have_none(model: Any, tmp_path: Path) -> None:
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    found = measure_output_hessians(model, layers(model), IDS, tmp_path, quiet=True)
    missing = {f"model.layers.1.mlp.{part}_proj.weight" for part in ("up", "gate")}
    assert layers(model).keys() - found.keys() == missing


def test_gradients_that_are_not_finite_are_an_error(model: Any, tmp_path: Path) -> None:
    model.lm_head.weight.data.fill_(torch.inf)
    with pytest.raises(TQFormatError, match=r"DATA\.NON_FINITE"):
        measure_output_hessians(model, layers(model), IDS, tmp_path, quiet=True)
