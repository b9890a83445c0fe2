"""The uses of embeddings and output layers: against the divergence that their errors make, and in whole jobs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import ROOT  # noqa: F401  # puts the sources onto the path
from helpers import SMALL, TOKENS, correlated, gaussian, llama, make_checkpoint, make_text, make_twins, manifest_of

from reference_quantizer.__main__ import main
from reference_quantizer.calibration import curvature, embeddings
from reference_quantizer.calibration.curvature import measure_output_hessians
from reference_quantizer.calibration.embeddings import Use, measure_uses
from reference_quantizer.checkpoint.source import Info
from reference_quantizer.codes import feedback
from reference_quantizer.codes.encode import Encoder
from reference_quantizer.codes.rotation import make_rotation
from reference_quantizer.codes.trellis import trellis_levels
from reference_quantizer.job import calibrated, encoding
from reference_quantizer.planning import plan
from reference_quantizer.planning.plan import Stage, TensorPlan
from reference_quantizer.planning.settings import Settings
from tqformat import open_repo

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_GENERATOR = torch.Generator().manual_seed(1)
IDS = torch.stack([torch.randperm(96, generator=_GENERATOR)[:64] for _ in range(24)])  # no token twice in a sequence


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 alone, and rows weighted by what was seen of them."""
    for module in (curvature, embeddings):
        monkeypatch.setattr(module, "has_bfloat16", lambda device: False)
    monkeypatch.setattr(embeddings, "FLOOR", 0.0)


def make_model(tied: bool) -> Any:
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=tied).eval()
    with torch.no_grad():
        model.model.norm.weight.mul_(3)
        model.get_output_embeddings().weight.mul_(20)  # so that it has preferences
    return model


def log_probabilities(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.double().log_softmax(-1)


def test_uses_predict_the_divergence(tmp_path: Path) -> None:
    """For small errors of all rows at random; within 15 %, as labels are drawn for the gradients and rows share a matrix."""
    model = make_model(False)
    gradients = measure_output_hessians(model, [EMBEDDING, HEAD], IDS, tmp_path, quiet=True)
    assert {n: g.shape for n, g in gradients.items()} == {EMBEDDING: (32, 32)}
    uses, before = measure_uses(model, IDS, gradients), log_probabilities(model)
    assert uses.keys() == {EMBEDDING, HEAD}
    for name, use in uses.items():
        weight, generator = dict(model.named_parameters())[name], torch.Generator().manual_seed(0)
        power, measured, predicted = weight.detach().square().mean(1, keepdim=True), 0.0, 0.0
        assert power.all() == (name == HEAD)  # nothing is lost of the padding's row of zeros, whose gradient is huge
        for _ in range(8):
            d = torch.randn(weight.shape, generator=generator) * 0.01 * power.sqrt()
            weight.data += d
            after = log_probabilities(model)
            weight.data -= d
            measured += float((before.exp() * (before - after)).sum(-1).mean())
            predicted += float((use.weights * ((d @ use.hessian) * d).sum(1)).sum()) / 2
        assert predicted == pytest.approx(measured, rel=0.15), name


def test_a_tied_matrix_has_both_uses(tmp_path: Path) -> None:
    model = make_model(True)
    gradients = measure_output_hessians(model, [EMBEDDING, HEAD], IDS, tmp_path, quiet=True)
    uses, output = measure_uses(model, IDS, gradients), measure_uses(model, IDS, {})
    assert torch.equal(uses[EMBEDDING].hessian, uses[HEAD].hessian)
    assert torch.allclose(uses[HEAD].hessian, output[HEAD].hessian + gradients[EMBEDDING])
    counts = torch.bincount(IDS.flatten(), minlength=96) / IDS.numel()
    share = log_probabilities(model).exp().mean((0, 1)).float()
    assert torch.allclose(uses[HEAD].weights, (counts + share) / 2, rtol=1e-4)


def test_rows_count_by_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(False)
    uses, share = measure_uses(model, IDS, {}), log_probabilities(model).exp().mean((0, 1)).float()
    assert torch.allclose(uses[HEAD].weights, share, rtol=1e-4)
    assert torch.allclose(uses[EMBEDDING].weights, torch.bincount(IDS.flatten(), minlength=96) / IDS.numel())
    assert torch.equal(uses[EMBEDDING].hessian, torch.eye(32))  # of which nothing is known without gradients
    monkeypatch.setattr(embeddings, "FLOOR", 0.5)
    floored = measure_uses(model, IDS[:1, :8], {})[EMBEDDING].weights
    assert float(floored.min()) == pytest.approx(0.5 / 96) and float(floored.sum()) == pytest.approx(1, rel=1e-5)


def test_what_comes_behind_the_output_layer_counts() -> None:
    """Granite divides the products, Cohere multiplies them, Gemma 2 caps them: the divergence is of what follows."""
    shape = {k: v for k, v in SMALL.items() if k != "num_attention_heads"} | {"tie_word_embeddings": False}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, **TOKENS}
    for kind, tail in (
        ("Granite", {"logits_scaling": 4.0}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Gemma2", {"final_logit_softcapping": 2.0}),
    ):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**shape, **tail))
        weight = model.eval().requires_grad_(False).get_output_embeddings().weight
        weight.mul_(40)
        use, before = measure_uses(model, IDS, {}, quiet=True)[HEAD], log_probabilities(model)
        assert torch.allclose(use.weights, before.exp().mean((0, 1)).float(), rtol=1e-4), kind
        measured, predicted, generator = 0.0, 0.0, torch.Generator().manual_seed(0)
        for _ in range(8):
            d = torch.randn(weight.shape, generator=generator) * 0.01 * weight.square().mean().sqrt()
            weight += d
            after = log_probabilities(model)
            weight -= d
            measured += float((before.exp() * (before - after)).sum(-1).mean())
            predicted += float((use.weights * ((d @ use.hessian) * d).sum(1)).sum()) / 2
        assert predicted == pytest.approx(measured, rel=0.15), kind


def test_logits_are_made_where_the_output_layer_is() -> None:
    """With accelerate's hooks, as load_in_blocks leaves them, a layer takes its inputs to where the model runs: here to nowhere."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = make_model(False)
    wanted = measure_uses(model, IDS, {}, quiet=True)
    output, tail = model.get_output_embeddings(), embeddings._tail(model, model.get_output_embeddings(), IDS[:1, :8])
    hooks.add_hook_to_module(output, hook := hooks.AlignDevicesHook("cpu"))
    hook.execution_device = "meta"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, "_tail", lambda *_: tail)  # which runs the model as a whole
        found = measure_uses(model, IDS, {}, quiet=True)
    assert all(torch.equal(found[name].hessian, wanted[name].hessian) for name in (EMBEDDING, HEAD))


def test_measuring_tells_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    measure_uses(make_model(True), IDS[:5], {})
    assert "measuring the use of embeddings: 5 of 5 sequences, 100 %" in capsys.readouterr().err
    measure_uses(make_model(True), IDS[:5], {}, quiet=True)
    assert capsys.readouterr().err == ""


def test_an_embedding_may_scale_its_rows() -> None:
    module = torch.nn.Embedding(8, 4)
    module.register_forward_hook(lambda _, args, out: 3 * out)
    assert embeddings._gain(module, IDS[:1] % 8) == pytest.approx(9, rel=1e-5)


def test_a_model_without_predictions_has_no_use_for_an_output() -> None:
    model = llama().model.eval()
    assert [n for n, use in measure_uses(model, IDS, {}).items()] == ["embed_tokens.weight"]


@pytest.mark.parametrize("tile_rows", [0, 32])
def test_parts_of_rows_give_the_same_codes(tile_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = torch.tensor(trellis_levels(3, 8)) if tile_rows else torch.linspace(-2, 2, 8)
    encoder = Encoder(48, make_rotation("hadamard", 48, 42), levels, torch.float16, torch.bfloat16)
    item = TensorPlan(Info("w", (128, 48), "BF16"), 0, 3, 48, (Stage(3, "c", "t"),), tile_rows=tile_rows)
    use = Use(correlated(48), torch.linspace(1, 100, 128))
    found = []
    for scalars in (2**24, 40 * 48):  # which 32 rows of a tile divide
        monkeypatch.setattr(encoding, "PART_SCALARS", scalars)
        weight = gaussian(128, 48)
        stored = encoding.encode_embedding(item, [encoder], weight, use, Settings(window=8), "cpu")
        assert stored.stages is not None
        found.append((stored.stages[0]["codes"], stored.stages[0]["scales"], weight))
        error = (weight - gaussian(128, 48)).square().sum() / gaussian(128, 48).square().sum()
        assert stored.extra["relative_error"] == pytest.approx(float(error), rel=0.02)  # before rounding to bfloat16
        assert 0 < stored.extra["output_error"] < stored.extra["relative_error"]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_trellis_serves_the_rows_that_count() -> None:
    encoder = Encoder(
        48, make_rotation("hadamard", 48, 42), torch.tensor(trellis_levels(2, 8)), torch.float16, torch.bfloat16
    )
    w, h, heavy = gaussian(64, 48), correlated(48), torch.arange(64) % 4 == 0

    def errors(weights: torch.Tensor | None) -> torch.Tensor:
        d = feedback.encode(w, h, encoder, 2, 8, 64, True, None, weights).decoded - w
        return ((d @ h) * d).sum(1)

    plain, weighted = errors(None), errors(torch.where(heavy, 9.0, 1.0))
    assert torch.equal(plain, errors(torch.full((64,), 7.0)))
    assert weighted[heavy].sum() < 0.8 * plain[heavy].sum() and weighted[~heavy].sum() > plain[~heavy].sum()


# ------------------------------------------------------------------------------------------------ jobs


def run_job(path: Path, tied: bool, *options: str, twins: bool = False) -> Any:
    base, text, out = path / "base", path / "text.txt", path / "out"
    make_checkpoint(base)
    if twins:
        make_twins(base)
    if tied:
        make_model(True).save_pretrained(base)
    make_text(text, 3000)
    protected = ["--protect-fragment", "embed_tokens", "--protect-fragment", "lm_head", "--protected-bits", "3"]
    command = [
        "quantize",
        str(base),
        str(out),
        "--bits",
        "4",
        "--calibration",
        str(text),
        "--tune-steps",
        "0",
        "--quiet",
    ]
    assert main([*command, *protected, *options]) == 0
    return manifest_of(out)["tensors"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [["--preset", "balanced"], ["--preset", "balanced", "--dimension", "2"], ["--preset", "best", "--window", "6"]],
)
def test_protected_embeddings_of_few_bits_have_feedback(tied: bool, options: list[str], tmp_path: Path) -> None:
    tensors = run_job(tmp_path, tied, *options)
    stored = [EMBEDDING] if tied else [EMBEDDING, HEAD]
    assert [n for n in (EMBEDDING, HEAD) if tensors.get(n, {}).get("stages")] == stored
    for name in stored:
        assert tensors[name]["stages"][0]["bits"] == 3 and "output_error" in tensors[name]["extra"]
        assert ("window" in tensors[name]["stages"][0]) == ("best" in options)
    with open_repo(tmp_path / "out") as repo:
        assert all(torch.isfinite(repo.dequantize(name)).all() for name in stored)


def test_what_is_stored_once_has_both_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two matrices of a model that is not tied, but has the same bytes in both."""
    weights: list[torch.Tensor] = []

    def note(*given: Any, **named: Any) -> Any:
        uses = measure_uses(*given, **named)
        weights.extend(use.weights for use in uses.values())
        return uses

    monkeypatch.setattr(plan, "LARGE", 16)
    monkeypatch.setattr(calibrated, "measure_uses", note)
    assert HEAD not in run_job(tmp_path, False, "--preset", "balanced", twins=True)
    assert len(weights) == 2 and torch.equal(*weights)


def test_an_embedding_alone_has_feedback(tmp_path: Path) -> None:
    tensors = run_job(tmp_path, False, "--preset", "balanced", "--include", "*embed_tokens*")
    assert [name for name, entry in tensors.items() if entry["kind"] == "quantized"] == [EMBEDDING]
    assert "output_error" in tensors[EMBEDDING]["extra"]


def test_blocks_get_what_the_encoded_embedding_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shifts: list[float] = []
    plain = feedback.wanted

    def note(weight: torch.Tensor, moments: feedback.Moments) -> torch.Tensor:
        shifts.append(float(moments.shift.norm()) if moments.shift is not None else -1.0)
        return plain(weight, moments)

    monkeypatch.setattr(feedback, "wanted", note)
    run_job(tmp_path, False)
    assert (
        shifts[:2] == [-1, -1] and shifts[2] > 0
    )  # embedding and output layer; the first layer lacks something already
