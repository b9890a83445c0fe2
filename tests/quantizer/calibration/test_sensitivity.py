"""Calibration tokens, and sensitivities against what they promise: the divergence that an error causes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import WORDS, make_checkpoint, make_text

from reference_quantizer.calibration import sensitivity
from reference_quantizer.calibration.sensitivity import measure_gains, measure_sensitivities
from reference_quantizer.calibration.tokens import calibration_tokens, cut, draw
from reference_quantizer.checkpoint.source import Source, open_source
from reference_quantizer.model.base import load_base, load_tokenizer
from reference_quantizer.progress import Progress
from tqformat.load_quantized import TQFormatError

KIND = "text-generation"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(str(make_checkpoint(tmp_path_factory.mktemp("sensitivity") / "base")))


def matrices(source: Source) -> list[str]:
    return [name for name, info in source.tensors.items() if len(info.shape) > 1]


def load(source: Source) -> Any:
    return load_base(source, KIND).requires_grad_(False)


# ------------------------------------------------------------------------------------------------ calibration


def test_windows_are_drawn_evenly() -> None:
    long, short = cut(list(range(1000)), 10, None), cut(list(range(2000, 2035)), 10, None)
    assert long.shape == (100, 10) and short.shape == (3, 10)
    assert draw([long, short], 4)[:, 0].tolist() == [250, 750, 2000, 2020]
    assert draw([long, short], 13)[:, 0].tolist() == [*range(50, 1000, 100), 2000, 2010, 2020]
    assert len(draw([long, short], 1000)) == 103
    assert cut(list(range(20)), 10, 77).tolist() == [[77, *range(9)], [77, *range(9, 18)]]
    with pytest.raises(TQFormatError, match="shorter than one sequence"):
        draw([cut([1, 2], 10, None)], 5)


def test_tokens_of_files(source: Source, tmp_path: Path) -> None:
    texts = [str(make_text(tmp_path / f"{k}.txt", 400, seed=k)) for k in range(2)]
    found = calibration_tokens(None, load_tokenizer(source.path), texts, 300, 50)
    assert found.ids.shape == (6, 50) and found.texts == ("0.txt", "1.txt")
    record = found.to_dict()
    assert (record["source"], record["texts"], record["tokens"]) == ("texts", 2, 300)
    words = Path(texts[0]).read_text().split()
    assert [WORDS[i] for i in found.ids[0].tolist()] == words[50:100]  # 8 windows, of which number 1, 4 and 6
    with pytest.raises(TQFormatError, match="self alone"):
        calibration_tokens(None, load_tokenizer(source.path), ["self", *texts], 300, 50)


@pytest.mark.parametrize("bos", [False, True])
def test_the_model_writes_its_own_text(tmp_path: Path, bos: bool) -> None:
    own = open_source(str(make_checkpoint(tmp_path / "base", bos=bos)))
    model, tokenizer = load(own), load_tokenizer(own.path)
    first = calibration_tokens(model, tokenizer, ["self"], 18 * 40, 40, seed=3)
    assert first.ids.shape == (18, 40) and first.to_dict()["source"] == "self"
    assert (first.ids[:, 0] == 1).all() if bos else (first.ids[:, 0] > 2).all()  # 0 to 2 are special
    assert torch.equal(first.ids, calibration_tokens(model, tokenizer, ["self"], 18 * 40, 40, seed=3).ids)
    assert first.sha256 != calibration_tokens(model, tokenizer, ["self"], 18 * 40, 40, seed=4).sha256
    # it is the model's text: more probable than the same tokens in another order
    with torch.inference_mode():
        loss = [model(input_ids=ids, labels=ids).loss.item() for ids in (first.ids, first.ids.flip(1))]
    assert loss[0] < loss[1] - 0.5


# ------------------------------------------------------------------------------------------------ sensitivity


def test_both_coefficients_are_the_divergence_of_a_small_error(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "NOISE", 1e-3)
    ids = torch.randint(3, len(WORDS), (48, 32), generator=torch.Generator().manual_seed(0))
    found = {}
    for method in ("fisher", "perturbation"):
        model = load(source)
        for layer in model.model.layers:  # so that attention attends to something
            layer.self_attn.q_proj.weight.mul_(10)
            layer.self_attn.k_proj.weight.mul_(10)
        before = {name: p.clone() for name, p in model.named_parameters()}
        weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
        found[method] = dict(sensitivity.METHODS[method](model, weights, ids, Progress(1, quiet=True)))
        assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert set(found["fisher"]) == set(matrices(source))
    for name, value in found["fisher"].items():
        assert value == pytest.approx(found["perturbation"][name], rel=0.35), name
    ratios = [found["fisher"][name] / found["perturbation"][name] for name in found["fisher"]]
    assert sum(ratios) / len(ratios) == pytest.approx(1, rel=0.1)


def test_a_tied_weight_has_both_uses(source: Source) -> None:
    """Tied, the embedding's sensitivity is that of its use as the head as well."""
    ids = torch.randint(3, len(WORDS), (16, 32), generator=torch.Generator().manual_seed(0))
    values = {}
    for tied in (False, True):
        model = load(source)
        embedding = model.model.embed_tokens.weight
        if tied:
            model.lm_head.weight = embedding
        weights = {name: p for name, p in model.named_parameters() if p is embedding}
        values[tied] = dict(sensitivity.fisher(model, weights, ids, Progress(1, quiet=True)))[
            "model.embed_tokens.weight"
        ]
    assert values[True] > 0 and values[False] > 0 and values[True] != pytest.approx(values[False], rel=0.1)


def test_logits_that_are_not_finite_are_an_error(source: Source) -> None:
    model = load_base(source, KIND, "float32", "cpu")
    model.get_output_embeddings().weight.data.fill_(torch.inf)
    with pytest.raises(TQFormatError, match=r"DATA\.NON_FINITE"):
        list(sensitivity.fisher(model, {}, torch.zeros(1, 8, dtype=torch.int64), Progress(1, quiet=True)))


def test_an_interrupted_measurement_continues(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = matrices(source)
    job = (source, KIND, names, "perturbation", ("self",), 64)
    monkeypatch.setattr(sensitivity, "LENGTH", 32)
    whole = measure_sensitivities(*job, tmp_path / "whole", quiet=True)
    assert set(whole.values) == set(names) and min(whole.values.values()) > 0

    advance, count = Progress.advance, 0

    def stop(self: Progress, units: int) -> None:
        nonlocal count
        count += units
        if count == 4:
            raise KeyboardInterrupt
        advance(self, units)

    monkeypatch.setattr(Progress, "advance", stop)
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivities(*job, tmp_path / "cut", quiet=True)
    [file] = (tmp_path / "cut").glob("sensitivity-*.jsonl")
    assert len(file.read_text().splitlines()) == 3
    with open(file, "a") as torn:
        torn.write('["model.la')
    done = []
    monkeypatch.setattr(Progress, "advance", lambda self, units: done.append(units))
    assert measure_sensitivities(*job, tmp_path / "cut", quiet=True).values == whole.values
    assert done == [3] + [1] * (len(names) - 3)  # it begins where the earlier run stopped


def test_the_gains_of_feedback(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = measure_sensitivities(source, KIND, [], "fisher", ("self",), 512, tmp_path, quiet=True).calibration
    gains = measure_gains(source, KIND, tokens, False, 128, tmp_path, quiet=True)
    layers = [name for name in matrices(source) if ".layers." in name]
    assert gains.pop("model.embed_tokens.weight") == pytest.approx(1)  # no direction of it is known without gradients
    assert set(gains) == {*layers, "lm_head.weight"} and all(0 < gain < 0.99 for gain in gains.values())
    q, k, down = (next(name for name in layers if part in name) for part in ("q_proj", "k_proj", "down_proj"))
    assert gains[q] == gains[k] != gains[down]
    both = measure_gains(source, KIND, tokens, True, 128, tmp_path, quiet=True)
    assert both.pop("model.embed_tokens.weight") < 0.99 and both.keys() == gains.keys()
    assert all(both[name] < 0.99 * gains[name] for name in layers) and both["lm_head.weight"] == gains["lm_head.weight"]
    monkeypatch.setattr(sensitivity, "load_base", None)  # cannot be called
    again = measure_gains(source, KIND, tokens, False, 128, tmp_path, quiet=True)
    assert again == gains | {"model.embed_tokens.weight": again["model.embed_tokens.weight"]}


def test_what_the_model_does_not_have_is_left_out(source: Source, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in source.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source.path / "model.safetensors")
    save_file(tensors | {"extra.weight": torch.ones(8, 8)}, tmp_path / "model.safetensors", {"format": "pt"})
    other = open_source(str(tmp_path))
    found = measure_sensitivities(
        other, KIND, matrices(other), "fisher", ("self",), 256, tmp_path / "cache", quiet=True
    )
    assert set(found.values) == set(matrices(source))
    with pytest.raises(TQFormatError, match="next token"):
        measure_sensitivities(other, "feature-extraction", [], "fisher", ("self",), 256, tmp_path / "cache")
