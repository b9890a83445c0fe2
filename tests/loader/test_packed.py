"""Packed weights against decoded ones: values, products, gradients, models."""

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICES, ROOT, repo_from_checkpoint
from helpers import MODELS
from torch.nn import functional

import tqformat
from tqformat import TQFormatError, open_repo, packed
from tqformat.packed import PackedRepo, PackedWeight

PRODUCTS = sorted((ROOT / "conformance/vectors/v1/valid").glob("*/*/products.json"))
pytestmark = pytest.mark.filterwarnings("ignore:products of packed weights")


@pytest.fixture(scope="module", params=["torch", "kernels"], autouse=True)
def path(request: pytest.FixtureRequest) -> Any:
    """Every test runs on torch's path, and on that of the kernels where they are installed."""
    if request.param == "kernels":
        pytest.importorskip("tqformat_kernels")
        packed.kernels.cache_clear()
        yield request.param
    else:
        plain, packed.kernels = packed.kernels, lambda: None
        yield request.param
        packed.kernels = plain


def exact(weight: PackedWeight) -> torch.Tensor:
    """The weight before it is rounded to its dtype, float64 [rows, cols]."""
    return weight.like(entry=replace(weight.entry, dtype="F32"), dtype=torch.float32).decode().double().flatten(0, -2)


def quantized(repo: PackedRepo) -> list[PackedWeight]:
    weights = [repo.dequantize(name) for name, w in repo.manifest.tensors.items() if w.kind == "quantized"]
    assert weights and all(isinstance(weight, PackedWeight) for weight in weights)
    return weights  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------- every setting of the format


def test_values_are_the_loaders(settings_repo: Path) -> None:
    with PackedRepo(settings_repo) as repo, open_repo(settings_repo) as plain:
        for weight in quantized(repo):
            value = plain.dequantize(weight.title)
            assert (weight.shape, weight.dtype, weight.device) == (value.shape, value.dtype, value.device)
            assert torch.equal(weight.decode(), value) and torch.equal(weight + 0, value)
            half = plain.dequantize(weight.title, dtype=torch.float16)
            assert torch.equal(weight.to(torch.float16).decode(), half)
        assert torch.equal(repo.dequantize("norm"), plain.dequantize("norm"))
        assert repo.dequantize("plain.alias").title == "plain"


def test_parts_are_views_of_the_file(settings_repo: Path) -> None:
    """Of one mapping, at the places that the header names; what is written to them does not reach the file."""
    file = settings_repo / "turboquant_weights.safetensors"
    before = file.read_bytes()
    with PackedRepo(settings_repo) as repo:
        weight, norm = repo.dequantize("plain"), repo.dequantize("norm")
        keys = [*weight.parts.own(weight.entry)]  # type: ignore[attr-defined]
        parts = [weight.parts.tensors[key] for key in keys]  # type: ignore[attr-defined]
        parts.append(norm)
        keys.append(repo.manifest.tensors["norm"].data or "")
        starts = {part.data_ptr() - repo.spans[key].begin for key, part in zip(keys, parts, strict=True)}
        assert len(parts) > 2 and len(starts) == 1
    norm.zero_()
    assert file.read_bytes() == before


def test_rows_are_looked_up(settings_repo: Path) -> None:
    with PackedRepo(settings_repo) as repo:
        for weight in quantized(repo):
            if weight.dim() == 2 and len(weight):
                ids = torch.tensor([[0, 2, 1], [2, 0, 0]])
                assert torch.equal(functional.embedding(ids, weight), weight.decode()[ids])
                for wrong in (-1, len(weight)):
                    with pytest.raises(IndexError):
                        functional.embedding(torch.tensor([0, wrong]), weight)


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_products_of_every_setting(rows: int, settings_repo: Path) -> None:
    """Grade 14 in float32 up to FEW rows; above, and where y is rounded to bfloat16, that of a decoded weight [TQ-FUSE-2]."""
    torch.manual_seed(0)
    with PackedRepo(settings_repo) as repo:
        for weight in quantized(repo):
            if weight.dim() > 2:
                continue
            for dtype, grade in ((torch.float32, 14 if rows <= packed.FEW else 7), (torch.bfloat16, 7)):
                x, w = torch.randn(rows, weight.shape[1]).to(dtype), exact(weight)
                y, bias = functional.linear(x, weight), torch.ones(len(weight))
                assert y.dtype == dtype and y.shape == (rows, len(weight))
                bound = 2.0**-grade * x.double().norm(dim=1)[:, None] * scale_of(weight)
                assert ((y - x.double() @ w.T).abs() <= bound).all(), weight.title
                assert torch.allclose(
                    functional.linear(x, weight, bias.to(dtype)).float(), y.float() + 1, atol=0.1, rtol=0.01
                )


def scale_of(weight: PackedWeight) -> torch.Tensor:
    """An upper bound of A of [TQ-FUSE-2] over the norm of x: the norms of |scale * level| + |offset|, over the stages."""
    total = torch.zeros(len(weight), dtype=torch.float64)
    for s in weight.entry.stages or ():
        u = weight.parts._stage_decoder(s, weight.shape[1], weight.device, rotated=True)(0, len(weight))
        offsets = (
            weight.parts._scales(s, "offsets", 0, len(weight), weight.device, "")
            if s.offsets
            else torch.zeros(len(weight), 1, 1)
        )
        total += (u.abs() + 2 * offsets.abs().amax((1, 2))[:, None]).double().norm(dim=1)
    scale = weight.parts.tensors[weight.entry.column_scale].abs().max() if weight.entry.column_scale else 1.0
    return total * scale


@pytest.mark.parametrize("file", PRODUCTS, ids=lambda file: f"{file.parent.parent.name}/{file.parent.name}")
def test_products_of_the_vectors(file: Path) -> None:
    """Grade 14 [TQ-FUSE-3]."""
    products = json.loads(file.read_text())["products"]
    assert products
    with PackedRepo(file.parent / "repo") as repo:
        for p in products:
            x, y, bound = (
                torch.tensor([float.fromhex(v) for v in p[key]], dtype=torch.float64) for key in ("x", "y", "bound")
            )
            weight = repo.dequantize(p["weight"])
            if weight.dim() == 2:
                got = functional.linear(x.float()[None], weight)[0].double()
                assert ((got - y).abs() <= 2.0**-14 * bound + 2.0**-126).all(), p["weight"]


def test_products_do_not_depend_on_the_default_dtype(settings_repo: Path) -> None:
    """Which vLLM sets to that of the model while it loads and warms up."""
    found = []
    try:
        for dtype in (torch.float32, torch.bfloat16):
            torch.set_default_dtype(dtype)
            with PackedRepo(settings_repo) as repo:
                x = torch.ones(2, 48, dtype=torch.float32)
                found.append([functional.linear(x, repo.dequantize(name)) for name in ("plain", "hadamard", "stages")])
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradients_reach_the_input(settings_repo: Path) -> None:
    torch.manual_seed(0)
    with PackedRepo(settings_repo) as repo:
        for weight in quantized(repo):
            if weight.dim() == 2 and len(weight):
                x = torch.randn(3, weight.shape[1], requires_grad=True)
                y = functional.linear(x, weight)
                dy = torch.randn_like(y)
                for _ in range(2):  # another product of the same input has a graph of its own
                    (dx,) = torch.autograd.grad(functional.linear(x, weight), x, dy)
                assert torch.allclose(
                    dx.double(), dy.double() @ exact(weight), rtol=1e-4, atol=1e-4 * float(dx.abs().max())
                )


def test_what_a_packed_weight_refuses(settings_repo: Path) -> None:
    with PackedRepo(settings_repo) as repo:
        weight = repo.dequantize("hadamard")
    with pytest.raises(TQFormatError, match="cannot be changed"):
        weight.mul_(2)
    with pytest.raises(TQFormatError, match="cannot be changed"):
        weight.data += 1
    with pytest.raises(TQFormatError, match="save_pretrained"):
        pickle.dumps(weight)
    with pytest.raises(TQFormatError, match="not trained"):
        functional.linear(torch.ones(1, 48), torch.nn.Parameter(weight))
    with pytest.raises(TQFormatError, match="inputs of 48"):
        functional.linear(torch.ones(1, 47), weight)


def test_small_weights_stay_decoded(settings_repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an operation without a packed form gets is its own, also in inference mode, and is decoded once."""
    with PackedRepo(settings_repo) as repo:
        weight = repo.dequantize("hadamard")
    decoded, decode = [], PackedWeight.decode
    monkeypatch.setattr(PackedWeight, "decode", lambda w, *dtype: (decoded.append(w), decode(w, *dtype))[1])
    value = weight + 0
    with torch.inference_mode():
        weight.unsqueeze(0).squeeze(0).zero_()
    (weight.t() + 0).zero_()
    weight.view(-1).zero_()
    assert torch.equal(weight + 0, value) and len(decoded) == 1
    monkeypatch.setattr(packed, "KEPT", 0)
    assert torch.equal(weight + 0, value) and len(decoded) == 2


def test_bad_codes_are_told_when_they_are_read(settings_repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with PackedRepo(settings_repo) as repo:
        name, read = repo.manifest.tensors["ternary"].stages[0].codes, repo._read  # type: ignore[index]
        monkeypatch.setattr(repo, "_read", lambda key, *rest: read(key, *rest) | 3 if key == name else read(key, *rest))
        with pytest.raises(TQFormatError, match=r"PACK.CODE_RANGE.*ternary.*stages\[0\].codes"):
            repo.dequantize("ternary")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_numbers_that_are_not_finite_are_told(
    value: float, settings_repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the loader says of stored scales, and of the values that they give, which are decoded only where that is needed."""
    check, decoded, bad = packed.Parts._decoder, [], [""]

    def decoder(parts: Any, w: Any, device: Any) -> Any:
        decode = check(parts, w, device)
        return lambda a, b: (decoded.append(w), decode(a, b))[1]

    def told(repo: Any, name: str) -> tuple[str, str] | None:
        try:
            repo.dequantize(name)
        except TQFormatError as error:
            return error.code, error.where.split(", rows")[0]
        return None

    monkeypatch.setattr(packed.Parts, "_decoder", decoder)

    def spoil(kind: Any) -> None:
        read = kind._read

        def spoiled(repo: Any, key: str, *rest: Any, **flat: Any) -> torch.Tensor:
            part = read(repo, key, *rest, **flat)
            return torch.full_like(part, value) if key == bad[0] else part

        monkeypatch.setattr(kind, "_read", spoiled)

    with PackedRepo(settings_repo) as repo, open_repo(settings_repo) as loader:
        stages = {name: w.stages for name, w in repo.manifest.tensors.items() if w.stages and name != "empty"}
        assert all(told(repo, name) is None for name in stages)
        assert 0 < len(decoded) < len(stages)
        spoil(packed.Repo)
        spoil(PackedRepo)
        found = []
        for name, (*_, last) in stages.items():
            bad[0] = last.scales
            if repo.spans[last.scales].dtype in ("F32", "BF16"):
                found.append(told(repo, name))
                assert found[-1] == told(loader, name)
        assert ("DATA.NON_FINITE" in {code for code, _ in filter(None, found)}) and len(found) > 3


def test_a_changed_activation_is_rotated_again(settings_repo: Path) -> None:
    with PackedRepo(settings_repo) as repo:
        weight = repo.dequantize("hadamard")
    x = torch.randn(2, 48)
    first = functional.linear(x, weight)
    x.mul_(2)
    assert torch.allclose(functional.linear(input=x, weight=weight), 2 * first)


def test_no_activation_is_kept(settings_repo: Path) -> None:
    """Not even by the identity, whose result is the activation itself."""
    with PackedRepo(settings_repo) as repo:
        weights = [repo.dequantize(name) for name, w in repo.manifest.tensors.items() if w.stages and len(w.shape) == 2]
    kinds = {repo.manifest.transforms[weight.entry.stages[0].transform].kind for weight in weights if weight.rows}
    assert {"identity", "hadamard"} <= kinds
    packed._local.__dict__.clear()
    with torch.no_grad():
        for weight in weights:
            functional.linear(torch.randn(2, weight.entry.shape[-1]), weight)
    assert not packed._local.__dict__.get("recent")


# ----------------------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The repository of a model by name, in float32; made once."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def make(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            build, kind, extra = MODELS[name]
            model = build()
            if hasattr(model, "generation_config") and model.can_generate():
                model.generation_config.max_new_tokens = 7
            model.save_pretrained(root / name / "checkpoint")
            made[name] = repo_from_checkpoint(root / name / "checkpoint", root / name / "repo", kind, extra)
        return made[name]

    return make


def inputs(name: str) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, 6, 7, 8], [9, 5, 6, 7]])
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if name == "t5" else {})


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_model_computes_what_the_decoded_one_does(name: str, repos: Callable[[str], Path]) -> None:
    """To 1e-4 of the largest output: sums of float32 in another order."""
    with warnings.catch_warnings(record=True):
        model, plain = tqformat.load(repos(name), packed=True), tqformat.load(repos(name))
    weights = packed.packed_weights(model)
    assert weights and not model.training and not any(p.requires_grad for p in weights.values())
    with torch.no_grad():
        got, wanted = model(**inputs(name))[0], plain(**inputs(name))[0]
    assert torch.allclose(got, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_merged_experts_stay_packed(name: str, repos: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="decoded or left out")
        model, plain = tqformat.load(repos(name), packed=True), tqformat.load(repos(name))
    with open_repo(repos(name)) as repo:
        stored = repo.manifest.accounting["stored_bytes"]
    assert packed.resident_bytes(model) < 1.1 * stored + 8192
    experts = {n: p for n, p in packed.packed_weights(model).items() if "experts" in n}
    assert len(experts) == 4 and {len(p.sources) for p in experts.values()} == {4, 8}
    for n, p in experts.items():
        assert torch.equal(p.decode(), plain.get_parameter(n))
        assert torch.equal(p[1].decode(), plain.get_parameter(n)[1]) and p[1].parts is p[1].parts
        assert p.to(torch.bfloat16)[1].dtype == torch.bfloat16
    decoded: list[int] = []
    decode = PackedWeight.decode
    monkeypatch.setattr(PackedWeight, "decode", lambda w, *dtype: (decoded.append(w.dim()), decode(w, *dtype))[1])
    with torch.no_grad():
        model(**inputs(name))
    assert 3 not in decoded  # an expert at a time


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_run_as_the_user_asks(name: str, repos: Callable[[str], Path]) -> None:
    """Without a wish one at a time; with one as it says, which decodes all of a layer's and gives the same to 1e-4."""
    model = tqformat.load(repos(name), packed=True)
    assert model.config._experts_implementation == "eager"
    with torch.no_grad():
        wanted = model(**inputs(name))[0]
        for way in ("batched_mm", "grouped_mm"):
            model = tqformat.load(repos(name), packed=True, experts_implementation=way)
            assert model.config._experts_implementation == way and packed.packed_weights(model)
            assert torch.allclose(model(**inputs(name))[0], wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def test_experts_that_are_coded_in_different_ways_are_decoded_and_told(
    repos: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_coding", lambda weight: object())
    with pytest.warns(UserWarning, match="decoded.*experts.*and 21 more"):
        model = tqformat.load(repos("mixtral"), packed=True)
    experts = [p for name, p in model.named_parameters() if "experts" in name]
    assert experts and not any(isinstance(p, PackedWeight) for p in experts)


def test_weights_are_merged_where_that_is_possible(settings_repo: Path) -> None:
    """Every setting of the format: the merged weight is that of the decoded ones, packed or not."""
    packed_titles = set()
    with PackedRepo(settings_repo) as repo:
        for weight in quantized(repo):
            value, rank = weight.decode(), weight.dim()
            for found, wanted in (
                (torch.stack([weight, weight, weight]), torch.stack([value] * 3)),
                (torch.cat([weight, weight]), torch.cat([value] * 2)),
                (torch.cat([weight, weight], -1), torch.cat([value] * 2, -1)),
                (torch.stack([weight, weight], rank), torch.stack([value] * 2, rank)),
                (torch.cat([torch.stack([weight, weight])] * 2, 1), torch.cat([torch.stack([value, value])] * 2, 1)),
                (torch.stack([weight, weight])[1], value),
            ):
                assert found.shape == wanted.shape and torch.equal(found + 0, wanted), weight.title
            if isinstance(torch.stack([weight, weight])[1], PackedWeight):
                packed_titles.add(weight.title)
        assert {weight.title for weight in quantized(repo)} - packed_titles == {"row", "empty"}
        assert not isinstance(torch.stack([repo.dequantize("plain"), repo.dequantize("dense")]), PackedWeight)


def test_shares_of_rows_and_columns(settings_repo: Path) -> None:
    """Every setting of the format: what a rank keeps decodes to its part of the decoded weight, and multiplies as it."""
    torch.manual_seed(0)
    possible: dict[int, set[str]] = {0: set(), 1: set()}
    with PackedRepo(settings_repo) as repo:
        for weight in [weight for weight in quantized(repo) if weight.dim() == 2]:
            value = weight.decode()
            for dim, ranks in ((0, 2), (0, 3), (1, 2), (1, 3), (1, 6)):
                size, rest = divmod(weight.shape[dim], ranks)
                found = [None if rest else weight.share(dim, i * size, size) for i in range(ranks)]
                assert all(share is None for share in found) or all(share is not None for share in found)
                for i, share in enumerate(found):
                    if share is not None:
                        assert torch.equal(share.decode(), value.narrow(dim, i * size, size)), (weight.title, dim)
                        assert share.nbytes_packed < weight.nbytes_packed or not weight.numel()
                        x, bound = torch.randn(1, share.shape[1]), scale_of(share)
                        y, wanted = functional.linear(x, share), x.double() @ exact(share).T
                        assert ((y - wanted).abs() <= 2.0**-14 * x.double().norm() * bound).all(), (weight.title, dim)
                        possible[dim].add(weight.title)
            assert weight.share(0, 0, len(weight)) is weight
    assert possible[0] == {
        *("plain", "hadamard", "dense", "givens", "vector", "trellis", "stages", "offsets", "fine", "exponents"),
        *("ternary", "empty"),
    }
    assert possible[1] == {"plain", "hadamard", "dense", "givens", "vector", "stages", "offsets", "exponents"}


def test_memory_and_ties(repos: Callable[[str], Path], path: str) -> None:
    model = tqformat.load(repos("llama-tied"), packed=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with open_repo(repos("llama-tied")) as repo:
        stored = repo.manifest.accounting["stored_bytes"]
    with torch.no_grad():
        model(**inputs("llama-tied"))
    assert (
        stored <= packed.resident_bytes(model) < 1.1 * stored + 8192
    )  # what is not stored: rotary frequencies, tables
    if path == "kernels":  # one copy of the levels for all weights with the same codebook, bits and window
        weights = packed.packed_weights(model).values()
        stages = [(key, made) for w in weights for key, made in zip(w.entry.stages, w.parts.stages or (), strict=False)]
        shared = {(key.codebook, key.bits, key.window): made.levels for key, made in stages}
        assert len(stages) > len(shared) and len({id(made.levels) for _, made in stages}) == len(shared)
        tables = model.lm_head.weight.parts.tables
        before = packed.resident_bytes(model)
        for w in weights:
            w.parts.stages = None
        for key in [key for key in tables if key[0] == "kernel levels"]:
            del tables[key]
        assert before - packed.resident_bytes(model) == sum(levels.nbytes for levels in shared.values())


def test_generation(repos: Callable[[str], Path]) -> None:
    model, plain = tqformat.load(repos("llama-tied"), packed=True), tqformat.load(repos("llama-tied"))
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model.generate(input_ids=ids, do_sample=False), plain.generate(input_ids=ids, do_sample=False))


def test_torch_compile(repos: Callable[[str], Path]) -> None:
    """Graphs break where a packed weight works; in between torch's own operations give what they give without them."""
    model = tqformat.load(repos("llama-tied"), packed=True)
    torch._dynamo.reset()
    with torch.no_grad():
        plain, compiled = (
            m(**inputs("llama-tied"), use_cache=False).logits for m in (model, torch.compile(model, backend="eager"))
        )
    assert torch.equal(plain, compiled)


def test_inputs_that_are_shared_are_rotated_once(
    path: str, repos: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each layer four inputs: of attention and its output, of the two halves of the feed-forward part; and the head's.

    The kernels rotate by themselves.
    """
    model, calls = tqformat.load(repos("llama-untied"), packed=True), []
    monkeypatch.setattr(packed.Parts, "forward", lambda *a: calls.append(a) or (lambda v: v.clone()))
    with torch.no_grad():
        model(**inputs("llama-untied"))
    assert len(calls) == (2 * 4 + 1 if path == "torch" else 0)
    packed._local.__dict__.clear()


@pytest.mark.parametrize("device", DEVICES)
def test_moves_and_copies(device: str, repos: Callable[[str], Path]) -> None:
    model = tqformat.load(repos("llama-tied"), packed=True)
    wanted = model(**inputs("llama-tied")).logits
    moved = copy.deepcopy(model).to(device)
    got = moved(**{key: ids.to(device) for key, ids in inputs("llama-tied").items()}).logits
    assert got.device.type == device and torch.allclose(got.cpu(), wanted, atol=1e-4)
    half = model.to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and packed.packed_weights(half)
    assert half(**inputs("llama-tied")).logits.dtype == torch.bfloat16
    assert half.lm_head.weight is half.model.embed_tokens.weight
    state = half.state_dict()
    assert isinstance(state["lm_head.weight"], PackedWeight)
    again = tqformat.load(repos("llama-tied"), packed=True)
    again.load_state_dict(state, assign=True)


def test_save_pretrained_writes_the_repository_again(repos: Callable[[str], Path], tmp_path: Path) -> None:
    repo = repos("llama-tied")
    tqformat.load(repo, packed=True).save_pretrained(tmp_path / "saved")
    assert {p.name: p.read_bytes() for p in repo.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()
    }
    with pytest.raises(TQFormatError, match="push_to_hub"):
        tqformat.load(repo, packed=True).save_pretrained(tmp_path / "other", push_to_hub=True)


def test_lora_on_top(repos: Callable[[str], Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tqformat.load(repos("llama-tied"), packed=True)
    before = model(**inputs("llama-tied")).logits.detach()
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        loss = tuned(**inputs("llama-tied"), labels=inputs("llama-tied")["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[2] < losses[0]
    with tuned.disable_adapter():
        assert torch.allclose(tuned(**inputs("llama-tied")).logits, before, atol=1e-5)
    tuned.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "quant_manifest.json").exists()
    with pytest.raises(TQFormatError, match="cannot be changed"):
        tuned.merge_and_unload()
