"""Error feedback: the loops against plain numpy, what it gains, blocks of a model, and whole jobs."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import MODELS, Make, correlated, gaussian, keep_decoded, make_checkpoint, make_text, sample_tensors
from torch import Tensor

from reference_quantizer.__main__ import _parser, main
from reference_quantizer.calibration.blocks import Blocks, find_blocks, load_in_blocks
from reference_quantizer.checkpoint.source import open_source
from reference_quantizer.codes import feedback, trellis
from reference_quantizer.codes.codebook import lloyd_max_levels
from reference_quantizer.codes.encode import Encoder
from reference_quantizer.codes.encode import encode as encode_nearest
from reference_quantizer.codes.feedback import Moments, encode, fit_scales, inverse_factor, shrunk
from reference_quantizer.codes.rotation import make_rotation, rotate
from reference_quantizer.codes.trellis import trellis_levels
from reference_quantizer.commands.settings import find_plan
from reference_quantizer.progress import Progress
from tqformat import open_repo
from tqformat.load_quantized import MANIFEST, TQFormatError


def make_encoder(cols: int, bits: int, g: int | None = None, window: int | None = None) -> Encoder:
    levels = lloyd_max_levels(2**bits, g or cols, 8193, 96) if window is None else trellis_levels(bits, window)
    rotation = make_rotation("hadamard", g or cols, 42)
    return Encoder(g or cols, rotation, torch.tensor(levels), torch.float16, torch.bfloat16)


def test_the_inverse_factor() -> None:
    h = correlated(24)
    u = inverse_factor(h, 0.01).double()
    damped = h.double() + 0.01 * h.diagonal().mean().double() * torch.eye(24, dtype=torch.float64)
    assert torch.equal(u, u.triu())
    assert torch.allclose(u.T @ u @ damped, torch.eye(24, dtype=torch.float64), atol=1e-4)


def test_a_singular_hessian_is_damped_until_it_can_be_inverted() -> None:
    x = torch.ones(1, 16) * 1e3
    assert torch.isfinite(inverse_factor(x.T @ x, 1e-30)).all()
    assert torch.equal(inverse_factor(torch.zeros(4, 4)), torch.eye(4))


def test_a_hessian_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(TQFormatError, match=r"DATA\.NON_FINITE"):
        inverse_factor(torch.full((4, 4), torch.nan))


def plain_gptq(targets: np.ndarray, scales: np.ndarray, upper: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Symbols [rows, cols], written down from algorithm 1 of arXiv:2210.17323 in float64."""
    w, u = targets.astype(np.float64), upper.astype(np.float64)
    symbols = np.empty(w.shape, np.int64)
    for i in range(w.shape[1]):
        symbols[:, i] = np.abs(w[:, i, None] / scales - levels).argmin(1)
        error = (w[:, i] - levels[symbols[:, i]] * scales[:, 0]) / u[i, i]
        w[:, i + 1 :] -= error[:, None] * u[i, i + 1 :]
    return symbols


def test_scalar_codes_are_those_of_plain_gptq() -> None:
    encoder, y, upper = make_encoder(32, 3), gaussian(70, 32), inverse_factor(correlated(32))
    scales = y.square().mean(1, keepdim=True).sqrt()
    found = feedback._search(y, scales, torch.ones(70), upper, encoder.levels, 3, 3, 0)
    wanted = plain_gptq(y.numpy(), scales.numpy(), upper.numpy(), encoder.levels.numpy())
    assert (found.numpy() == wanted).mean() > 0.999  # float32 and float64 may differ where two levels are as near


@pytest.mark.parametrize(("bits", "window", "groups"), [(2, 12, 1), (3, 8, 4), (4, 12, 1), (6, 12, 2)])
def test_the_loops_in_c_find_what_numba_s_find(
    bits: int, window: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trellis.compiled_search(bits, window) is None:
        pytest.skip("needs tqformat-kernels, and a processor for which it has vectors")
    encoder, y, upper = make_encoder(64, bits, window=window), gaussian(96, 64), inverse_factor(correlated(64))
    scales = y.reshape(96, groups, -1).square().mean(-1).sqrt()
    arguments = (scales.repeat_interleave(64 // groups, 1), y.abs().mean(1), upper, encoder.levels, bits, window, 48)
    found = feedback._search(y, *arguments)
    monkeypatch.setattr(trellis, "compiled_search", lambda bits, window: None)
    wanted = feedback._search(y, *arguments)
    assert (found == wanted).float().mean() > 0.99  # in float32 another path may be as near


def test_without_correlation_the_nearest_levels_are_taken() -> None:
    encoder, w = make_encoder(64, 2), gaussian(32, 64)
    assert torch.equal(encode(w, torch.eye(64), encoder, 2, 2, 0).symbols, encode_nearest(w, encoder).symbols.int())


@pytest.mark.parametrize(("bits", "window"), [(2, 2), (3, 3), (2, 8), (3, 8), (4, 8)])
def test_feedback_lowers_the_output_error(bits: int, window: int) -> None:
    w, h = gaussian(64, 128), correlated(128)
    encoder = make_encoder(128, bits, window=None if window == bits else window)
    found = encode(w, h, encoder, bits, window, 64)
    without = encode(w, torch.eye(128), encoder, bits, window, 64)
    d = without.decoded - w
    assert found.output_error < 0.6 * float(((d @ h) * d).sum() / ((w @ h) * w).sum())
    d = found.decoded - w
    assert found.output_error == pytest.approx(float(((d @ h) * d).sum() / ((w @ h) * w).sum()), rel=1e-3)
    assert found.relative_error == pytest.approx(float(d.square().sum() / w.square().sum()), rel=1e-3)


@pytest.mark.parametrize("decay", [0.0, 2.0, 4.0])
def test_the_gain_is_what_feedback_then_has(decay: float) -> None:
    x = torch.randn(4000, 128, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, decay, 128).neg().exp()
    w, h, encoder = gaussian(256, 128), x.T @ x / len(x), make_encoder(128, 4)
    expected = feedback.gain(feedback.rotate_hessian(h, encoder.rotation))
    assert (expected > 0.95) == (decay == 0)
    with_, without = (encode(w, m, encoder, 4, 4, 0, False).decoded - w for m in (h, torch.eye(128)))
    found = float(((with_ @ h) * with_).sum() / ((without @ h) * without).sum())
    assert found == pytest.approx(expected, rel=0.1)


def loss(outer: Tensor, d: Tensor, h: Tensor) -> float:
    return float(((outer @ d) * (d @ h)).sum())


@pytest.mark.parametrize(("bits", "window"), [(3, 3), (2, 8), (3, 8)])
def test_feedback_between_rows_lowers_the_loss(bits: int, window: int) -> None:
    """Where errors of rows add up in what follows, and where some rows count more than others."""
    w, h, outer = gaussian(256, 96), correlated(96), correlated(256, seed=3)
    encoder = make_encoder(96, bits, window=None if window == bits else window)
    plain, rows = (encode(w, h, encoder, bits, window, 32, True, g) for g in (None, outer))
    scales = rows.scales.float()
    assert torch.allclose(encoder.levels[rows.symbols] * scales, rotate(rows.decoded, encoder.rotation), atol=1e-5)
    assert loss(outer, rows.decoded - w, h) < 0.7 * loss(outer, plain.decoded - w, h)
    assert rows.output_error > plain.output_error  # which leaves the following layers out of account

    power = torch.linspace(-3, 3, 256)[torch.randperm(256, generator=torch.Generator().manual_seed(0))].exp()
    rows = encode(w, h, encoder, bits, window, 32, True, power.diag())
    assert feedback.output_gain(power.diag(), torch.ones(256), 32) < 0.7
    share = loss(power.diag(), rows.decoded - w, h) / loss(power.diag(), plain.decoded - w, h)
    assert (
        share < 0.5 if window > bits else share == pytest.approx(1, rel=1e-4)
    )  # only a trellis can choose whom to serve


def test_the_diagonal_is_not_shrunk() -> None:
    g = correlated(8)
    assert torch.equal(shrunk(g).diagonal(), g.diagonal())
    assert torch.allclose(shrunk(g) - g.diagonal().diag(), (g - g.diagonal().diag()) * (1 - feedback.SHRINKAGE))


def test_rows_that_nothing_depends_on_are_encoded_as_without_feedback_between_rows() -> None:
    w, h, encoder = gaussian(64, 48), correlated(48), make_encoder(48, 2, window=8)
    plain, rows = (encode(w, h, encoder, 2, 8, 32, True, g) for g in (None, torch.zeros(64, 64)))
    assert torch.equal(plain.symbols, rows.symbols) and torch.equal(plain.scales, rows.scales)


def test_a_trellis_beats_scalar_codes_of_the_same_bits() -> None:
    w, h = gaussian(64, 128), correlated(128)
    scalar = encode(w, h, make_encoder(128, 2), 2, 2, 0).output_error
    assert encode(w, h, make_encoder(128, 2, window=8), 2, 8, 64).output_error < 0.85 * scalar


@pytest.mark.parametrize(("window", "g"), [(3, 64), (3, 16), (8, 64), (8, 16)])
def test_the_order_of_columns(window: int, g: int) -> None:
    """Columns of more power first is the same as a permuted problem, and better where their power is uneven."""
    w, power = gaussian(64, 64), torch.linspace(0.01, 3, 64)
    h = correlated(64) * power * power[:, None]
    encoder = replace(make_encoder(64, 3, g, None if window == 3 else window), rotation=make_rotation("identity", 1, 0))
    plain, ordered = (encode(w, h, encoder, 3, window, 64, first) for first in (False, True))
    assert ordered.output_error < 0.9 * plain.output_error
    for found in (plain, ordered):
        scales = found.scales.float().repeat_interleave(g, 1)
        assert torch.equal(encoder.levels[found.symbols] * scales, found.decoded)


@pytest.mark.parametrize("g", [16, 64])
def test_fitted_scales_are_the_best(g: int) -> None:
    y, h = gaussian(8, 64), correlated(64) + torch.eye(64)
    chosen = y * (1 + 0.2 * gaussian(8, 64, 2))
    best = fit_scales(y, chosen, h, torch.ones(8, 64 // g))

    def error(scales: Tensor) -> Tensor:  # in float64: what a step changes is lost in the last place of float32
        d = chosen.double() * scales.double().repeat_interleave(g, 1) - y.double()
        return ((d @ h.double()) * d).sum()

    least = error(best)
    for k in range(best.numel()):
        for step in (-0.01, 0.01):
            other = best.clone()
            other[divmod(k, best.shape[1])] += step
            assert error(other) > least


def test_inputs_that_never_come_do_not_delete_weights() -> None:
    w = gaussian(32, 64)
    for h in (torch.zeros(64, 64), torch.block_diag(correlated(32), torch.zeros(32, 32))):
        found = encode(w, h, make_encoder(64, 3, 32), 3, 3, 0)
        assert found.relative_error < 0.2 and bool((found.scales > 0).all())


def test_a_fit_that_is_no_better_is_not_taken() -> None:
    y, h = gaussian(8, 64), torch.eye(64)
    kept = torch.full((8, 4), 0.5)
    assert torch.equal(fit_scales(y, -y, h, kept * 0), kept * 0)  # the best scale would be negative
    assert torch.allclose(fit_scales(y, y, h, kept), kept * 2)


def test_rows_of_zeros_and_groups() -> None:
    w, h = gaussian(64, 64), correlated(64)
    w[3] = 0
    for window in (2, 8):
        encoder = make_encoder(64, 2, 16, None if window == 2 else window)
        found = encode(w, h, encoder, 2, window, 32)
        assert found.scales.shape == (64, 4) and not found.scales[3].any() and not found.decoded[3].any()
        assert found.scales.dtype == torch.float16 and 0 < found.output_error < 0.2


# ------------------------------------------------------------------------------------------------ blocks


def load_tiny(tmp_path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(make_checkpoint(tmp_path / "base"), dtype=torch.float32)


def test_blocks_give_what_the_model_gives(tmp_path: Path) -> None:
    model, ids = load_tiny(tmp_path), torch.arange(36).reshape(6, 6) % 20
    wanted: dict[str, list[Tensor]] = {}
    layers = {f"{n}.weight": m for n, m in find_blocks(model)[1].named_modules(prefix=find_blocks(model)[0])}
    linears = {n: m for n, m in layers.items() if isinstance(m, torch.nn.Linear)}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, n=n: wanted.setdefault(n, []).append(args[0].flatten(0, 1)))
        for n, m in linears.items()
    ]
    with torch.inference_mode():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    blocks, seen = Blocks(model, ids, bfloat16=False), []
    for block in blocks:
        for group in blocks.groups(block):
            x = torch.cat(wanted[next(iter(group.layers))])
            h = x.T @ x / x.square().sum() * x.shape[1]
            for moments in blocks.moments(block, group).values():
                assert torch.allclose(moments.hessian, h, rtol=1e-3, atol=1e-4)
                assert moments.shift is None and moments.drift is None
            seen += group.layers
    assert sorted(seen) == sorted(linears) and len(linears) == 7 * len(find_blocks(model)[1])


def test_layers_with_one_input_are_one_group(tmp_path: Path) -> None:
    blocks = Blocks(load_tiny(tmp_path), torch.zeros(1, 4, dtype=torch.int64))
    endings = [[n.split(".")[-2] for n in group.layers] for group in blocks.groups(next(iter(blocks)))]
    assert endings == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_a_checkpoint_without_most_weights_is_told_before_any_is_made_up(make: Make, tmp_path: Path) -> None:
    source = open_source(str(make(sample_tensors())))  # its config.json is that of a model of 7 billion weights
    with pytest.raises(TQFormatError, match="lacks weights: it has"):
        load_in_blocks(source, "text-generation", tmp_path)


def test_a_changed_weight_changes_what_follows(tmp_path: Path) -> None:
    model, ids = load_tiny(tmp_path), torch.arange(8)[None]
    blocks = Blocks(model, ids, bfloat16=False)
    last = None
    for block in blocks:
        blocks.groups(block)[0].first.weight.data.mul_(0.5)
        last = block
    assert last is find_blocks(model)[1][-1]
    with torch.inference_mode():
        wanted = model.model(input_ids=ids).last_hidden_state
        assert torch.allclose(model.model.norm(blocks.hidden), wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama-tied", "mixtral", "qwen3.5-vl"])
def test_weights_are_read_block_by_block(tmp_path: Path, kind: str) -> None:
    """The walk is that of a model in memory, changed weights included, but no block has weights before or after its turn."""
    torch.manual_seed(0)
    build, loader_kind, _ = MODELS[kind]
    whole, ids = build().eval(), torch.arange(36).reshape(6, 6) % 20
    whole.save_pretrained(tmp_path / "base")
    model = load_in_blocks(open_source(str(tmp_path / "base")), loader_kind, tmp_path)
    written = list(tmp_path.glob("*.safetensors"))  # experts, which the class has in another layout than the checkpoint
    assert bool(written) == (kind == "mixtral")
    walks = [Blocks(m, ids, bfloat16=False, paired=True) for m in (whole, model)]
    for first, block in zip(*walks, strict=True):
        present = [b for b in find_blocks(model)[1] if not all(p.is_meta for p in b.parameters())]
        assert present == [block]
        groups = zip(walks[0].groups(first), walks[1].groups(block), strict=True)
        for group, other in groups:
            moments, same = walks[0].moments(first, group), walks[1].moments(block, other)
            assert moments.keys() == same.keys()
            for name, layer in group.layers.items():
                assert torch.equal(layer.weight, other.layers[name].weight)
                assert all(torch.equal(a, b) for a, b in zip(moments[name], same[name], strict=True) if a is not None)
                layer.weight.data *= 0.9
                other.layers[name].weight.data *= 0.9
    assert torch.equal(walks[0].hidden, walks[1].hidden) and torch.equal(walks[0].base, walks[1].base)
    assert all(p.is_meta for b in find_blocks(model)[1] for p in b.parameters())


def test_pairs_with_the_base_model(tmp_path: Path) -> None:
    """Both moments of differences are those of two models that are run in one piece, the second one with changed weights."""
    model, ids = load_tiny(tmp_path), torch.arange(60).reshape(10, 6) % 20
    changed = copy.deepcopy(model)
    for layer in changed.model.layers:
        layer.self_attn.v_proj.weight.data.mul_(0.5)
        layer.mlp.up_proj.weight.data.mul_(1.5)
    before, after = see_inputs(model, ids), see_inputs(changed, ids)
    blocks, seen = Blocks(model, ids, bfloat16=False, paired=True, folder=tmp_path), []
    for k, block in enumerate(blocks):
        groups = blocks.groups(block)
        block.load_state_dict(changed.model.layers[k].state_dict())
        for group in groups:
            for name, moments in blocks.moments(block, group).items():
                x, x0 = (inputs[name.removesuffix(".weight")].flatten(0, 1) for inputs in (after, before))
                scale = x.square().sum() / x.shape[1]
                assert moments.shift is not None
                assert torch.allclose(moments.shift, (x0 - x).T @ x / scale, atol=1e-4)
                stream = {"o_proj": "input_layernorm", "down_proj": "post_attention_layernorm"}.get(name.split(".")[-2])
                assert (moments.drift is None) == (stream is None), name
                if moments.drift is not None:
                    s, s0 = (i[f"model.layers.{k}.{stream}"].flatten(0, 1) for i in (after, before))
                    assert torch.allclose(moments.drift, (s0 - s).T @ x / scale, atol=1e-4)
                seen.append(name)
    assert len(seen) == 14 and blocks.base is not None
    assert torch.allclose(blocks.base, see_inputs(model_again(tmp_path), ids)["model.norm"], atol=1e-5)


def model_again(tmp_path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)


def see_inputs(model: torch.nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """What each module of `model` is given first."""
    found: dict[str, Tensor] = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, n=n: found.update({n: args[0]}) if args else None)
        for n, m in model.named_modules()
    ]
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def test_a_norm_in_front_of_the_stream_leaves_the_drift_out() -> None:
    """Gemma 3 adds the norm of a layer's output, so that the output that puts the stream right is no least squares answer."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 20, "sliding_window": 16}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **more)).eval()
    blocks = Blocks(model, torch.arange(12).reshape(2, 6), bfloat16=False, paired=True)
    block = next(iter(blocks))
    for group in blocks.groups(block):
        for moments in blocks.moments(block, group).values():
            assert moments.drift is None and moments.shift is not None


def test_what_is_wanted_is_the_least_squares_answer() -> None:
    w, x0 = gaussian(8, 16), torch.randn(500, 16, generator=torch.Generator().manual_seed(5))
    x = x0 + 0.3 * torch.randn(500, 16, generator=torch.Generator().manual_seed(6)) @ gaussian(16, 16)
    d = torch.randn(500, 8, generator=torch.Generator().manual_seed(7))
    scale = x.square().mean() * 500
    moments = Moments(x.T @ x / scale, (x0 - x).T @ x / scale, d.T @ x / scale)

    def error(v: Tensor) -> float:
        fit = (x @ v.T - x0 @ w.T - d).square().sum() / scale
        return float(fit + 0.2 * (v - w).square().sum())

    v = feedback.wanted(w, moments, strength=1, damping=0.2)
    for seed in range(20):
        assert error(v) < error(v + 0.01 * gaussian(8, 16, seed))
    assert torch.allclose(feedback.wanted(w, moments, strength=0.25, damping=0.2), w + (v - w) / 4, atol=1e-6)
    assert feedback.wanted(w, Moments(moments.hessian)) is w
    assert torch.equal(feedback.wanted(w, Moments(moments.hessian, torch.zeros(16, 16))), w)


def test_layers_make_up_for_what_was_lost_in_front_of_them(tmp_path: Path) -> None:
    ids, distance = torch.arange(400).reshape(20, 20) * 7 % 20, []
    for correct in (False, True):
        blocks = Blocks(load_tiny(tmp_path), ids, bfloat16=False, paired=True)
        for block in blocks:
            for group in blocks.groups(block):
                moments = blocks.moments(block, group)
                for name, layer in group.layers.items():
                    if "v_proj" in name or "up_proj" in name:
                        layer.weight.data += 0.3 * gaussian(*layer.weight.shape) * layer.weight.std()
                    elif correct:
                        layer.weight.data = feedback.wanted(layer.weight.data, moments[name])
        distance.append(float((blocks.hidden - blocks.base).square().sum()))
    assert distance[1] < 0.8 * distance[0]


class Numbered(torch.nn.Module):
    """A block that needs to know which text it is working on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return x + self.layer(x) * ids[..., None]


class Telling(torch.nn.Module):
    """A model that tells its blocks the token ids, as an argument without a name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = torch.nn.Embedding(20, 8), torch.nn.ModuleList([Numbered(), Numbered()])

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, input_ids)
        return x


def test_blocks_that_need_more_than_hidden_states_are_refused() -> None:
    same = torch.arange(6).repeat(3, 1)
    assert Blocks(Telling(), same).name == "blocks"  # what they need is the same for all texts
    with pytest.raises(TQFormatError, match=r"SCHEMA\.VALUE.*--preset fast"):
        Blocks(Telling(), torch.arange(18).reshape(3, 6))


def test_a_model_without_blocks_is_an_error() -> None:
    with pytest.raises(TQFormatError, match=r"SCHEMA\.VALUE.*stack of blocks"):
        find_blocks(torch.nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------------ jobs


def job(tmp_path: Path, out: Path, *options: str) -> list[str]:
    base, text = tmp_path / "base", tmp_path / "text.txt"
    if not base.exists():
        make_checkpoint(base)
        make_text(text, 3000)
    command = ["quantize", str(base), str(out), "--bits", "2", "--calibration", str(text), "--quiet"]
    return [*command, "--tune-steps", "0", *options]


@pytest.mark.parametrize("options", [[], ["--output-feedback"], ["--preset", "best", "--window", "6"]])
def test_a_calibrated_repository_conforms(tmp_path: Path, options: list[str]) -> None:
    assert main(job(tmp_path, tmp_path / "out", *options)) == 0
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    errors = {n: t["extra"].get("output_error") for n, t in manifest["tensors"].items() if t["kind"] == "quantized"}
    assert len(errors) == 16 and None not in errors.values()  # embedding and output layer, too
    assert manifest["quantization"]["calibration"]["tokens"] > 0
    trellis = "best" in options
    assert manifest["quantization"]["method"] == ("feedback_trellis" if trellis else "feedback")
    assert manifest["quantization"]["extra"]["output_feedback"] == bool(options)
    assert set(manifest["features"]) == ({"trellis", "tiles"} if trellis else set())
    run = subprocess.run(
        [sys.executable, "-m", "conformance", "check", str(tmp_path / "out")], cwd=ROOT, text=True, stdout=-1
    )
    assert "PASS L3" in run.stdout, run.stdout


def test_computed_levels_are_one_table_for_all_bits(tmp_path: Path) -> None:
    for name, options in (("trained", []), ("computed", ["--codebook", "computed"])):
        assert main(job(tmp_path, tmp_path / name, "--preset", "best", "--window", "6", *options)) == 0
    manifests = [json.loads((tmp_path / name / MANIFEST).read_text()) for name in ("trained", "computed")]
    assert [m["quantization"]["extra"].get("codebook") for m in manifests] == [None, "computed"]
    assert manifests[1]["codebooks"]["byte-sum-w6"]["origin"] == {"method": "byte-sum"}
    assert len(manifests[1]["codebooks"]) == 1 < len(manifests[0]["codebooks"])
    trained, computed = (
        sum(t["extra"]["output_error"] for t in m["tensors"].values() if t["kind"] == "quantized") for m in manifests
    )
    assert (
        computed < 1.5 * trained
    )  # 0.117 and 0.105 of a Gaussian at 2 bits; walks part where processors round in other ways
    run = subprocess.run(
        [sys.executable, "-m", "conformance", "check", str(tmp_path / "computed")], cwd=ROOT, text=True, stdout=-1
    )
    assert "PASS L3" in run.stdout, run.stdout


def test_what_is_stored_is_what_was_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = keep_decoded(monkeypatch)
    assert main(job(tmp_path, tmp_path / "out", "--preset", "best", "--window", "6")) == 0
    assert len(kept) >= 7
    with open_repo(tmp_path / "out") as repo:
        for name, decoded in kept.items():
            found = repo.dequantize(name).float()
            assert torch.allclose(found, decoded, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("when", [2, 12])  # in the output layer, after the embedding; in the second block
def test_an_interrupted_job_continues_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    options = ["--preset", "best", "--window", "6"]
    assert main(job(tmp_path, tmp_path / "whole", *options)) == 0
    plain, calls = feedback.encode, 0

    def stop(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == when:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(feedback, "encode", stop)
    assert main(job(tmp_path, tmp_path / "out", *options)) == 130
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / "hidden.npz").is_file() == (when > 2)
    calls = 100
    assert main(job(tmp_path, tmp_path / "out", *options)) == 0
    assert calls - 100 == (16 if when == 2 else 7), "what was complete was not encoded again"
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_hidden_states_in_files_give_the_same_bytes(tmp_path: Path) -> None:
    assert main(job(tmp_path, tmp_path / "out")) == 0
    assert main(job(tmp_path, tmp_path / "spilled", "--spill")) == 0
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "spilled" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("inputs", ["original", "quantized", "paired"])
def test_which_inputs_the_layers_are_fitted_to(tmp_path: Path, inputs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shifts: list[bool] = []
    plain = feedback.wanted

    def note(weight: Tensor, moments: Moments) -> Tensor:
        shifts.append(moments.shift is not None)
        return plain(weight, moments)

    monkeypatch.setattr(feedback, "wanted", note)
    wide = ["--protect-fragment", "embed_tokens", "--protect-fragment", "lm_head", "--protected-bits", "8"]
    options = [*wide, "--calibration-inputs", inputs]
    assert main(job(tmp_path, tmp_path / inputs, *options)) == 0
    manifest = json.loads((tmp_path / inputs / MANIFEST).read_text())
    assert manifest["quantization"]["extra"]["inputs"] == inputs
    assert shifts == [inputs == "paired"] * 14
    first = manifest["tensors"]["model.layers.0.self_attn.q_proj.weight"]["extra"]  # nothing is lost in front of it
    last = manifest["tensors"]["model.layers.1.mlp.down_proj.weight"]["extra"]
    assert main(job(tmp_path, tmp_path / "other", *wide, "--calibration-inputs", "original")) == 0
    other = json.loads((tmp_path / "other" / MANIFEST).read_text())["tensors"]
    assert other["model.layers.0.self_attn.q_proj.weight"]["extra"] == first
    assert (other["model.layers.1.mlp.down_proj.weight"]["extra"] == last) == (inputs == "original")


def test_embeddings_and_heads_have_more_bits_unless_told_otherwise(tmp_path: Path) -> None:
    assert main(job(tmp_path, tmp_path / "out")) == 0
    assert main(job(tmp_path, tmp_path / "own", "--protect-fragment", "norm")) == 0
    found = []
    assert main([*job(tmp_path, tmp_path / "fast", "--preset", "fast")[:5], "--preset", "fast", "--quiet"]) == 0
    for name in ("out", "own", "fast"):
        tensors = json.loads((tmp_path / name / MANIFEST).read_text())["tensors"]
        found.append([tensors[n]["effective_bits"] for n in ("model.embed_tokens.weight", "lm_head.weight")])
    assert found == [[3, 3], [2, 2], [8, 8]]


@pytest.mark.parametrize(
    "options",
    [
        ["--preset", "fast"],
        ["--preset", "fast", "--output-feedback"],
        ["--preset", "best", "--bits", "7"],
        ["--preset", "best", "--bits", "4", "--window", "4"],
        ["--preset", "balanced", "--codebook", "computed"],
    ],
)
def test_options_that_would_be_ignored_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert main(job(tmp_path, tmp_path / "out", *options)) == 1
    assert "SCHEMA.VALUE" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_model_without_predictions_has_no_feedback_between_rows(tmp_path: Path) -> None:
    source = open_source(str(make_checkpoint(tmp_path / "base")))
    found = {}
    for kind in ("text-generation", "fill-mask"):
        for options in ([], ["--output-feedback"], ["--no-output-feedback"]):
            command = ["quantize", "a", "b", "--preset", "best", "--loader-kind", kind, *options]
            args = _parser().parse_args(command)
            if kind == "fill-mask" and options == ["--output-feedback"]:
                with pytest.raises(TQFormatError, match=r"SCHEMA\.VALUE\] --output-feedback.*next token.*fill-mask"):
                    find_plan(args, source)
            else:
                found[(kind, *options)] = find_plan(args, source).settings.output_feedback
    assert [key for key, value in found.items() if value] == [
        ("text-generation",),
        ("text-generation", "--output-feedback"),
    ]


def test_progress_ends_at_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Progress] = []
    plain = Progress.__init__

    def keep(self: Any, *args: Any, **options: Any) -> None:
        plain(self, *args, **options)
        seen.append(self)

    monkeypatch.setattr(Progress, "__init__", keep)
    assert main(job(tmp_path, tmp_path / "out")) == 0
    assert seen[0].done == seen[0].total


def test_a_window_needs_a_preset_with_a_trellis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(job(tmp_path, tmp_path / "out", "--window", "8")) == 1
    assert "--preset best" in capsys.readouterr().err
