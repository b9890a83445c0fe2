"""Allocation: the knapsack against brute force, targets, what the manifest says, and what overrides it."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import make_checkpoint, make_text

from reference_quantizer import __main__ as command_line
from reference_quantizer.calibration import sensitivity
from reference_quantizer.checkpoint.source import Reader, open_source
from reference_quantizer.planning import allocate as module
from reference_quantizer.planning.allocate import (
    Request,
    allocate,
    fill_in,
    make_allocation,
    relative_errors,
    sample_rows,
)
from reference_quantizer.planning.plan import make_plan
from reference_quantizer.planning.settings import Settings
from tqformat.load_quantized import MANIFEST, TQFormatError

LAYER = "model.layers.0.mlp.up_proj.weight"


def total(table: np.ndarray, choice: np.ndarray) -> Any:
    return table[np.arange(len(table)), choice].sum()


# ------------------------------------------------------------------------------------------------ the knapsack


@pytest.mark.parametrize("seed", range(40))
def test_allocation_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights, candidates = int(rng.integers(1, 6)), int(rng.integers(1, 5))
    sizes = rng.integers(1, 50, (weights, candidates))
    costs = rng.random((weights, candidates)) * 10.0 ** rng.integers(-6, 2, (weights, 1))
    if seed % 2:  # as with weights: more bytes cost less
        sizes, costs = np.sort(sizes, 1), -np.sort(-costs, 1)
    budget = int(rng.integers(sizes.min(1).sum(), sizes.max(1).sum() + 1))
    choice, optimal = allocate(costs, sizes, budget)
    every = map(np.array, itertools.product(range(candidates), repeat=weights))
    best = min(total(costs, c) for c in every if total(sizes, c) <= budget)
    assert optimal and total(sizes, choice) <= budget
    assert total(costs, choice) == pytest.approx(best, rel=1e-12)


def large_instance(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Costs and sizes of 500 weights at 2 to 8 bits."""
    rng, bits = np.random.default_rng(seed), np.arange(2, 9)
    rows, cols = rng.integers(64, 9000, (2, 500, 1)) if seed % 2 else rng.choice([192, 576, 1536], (2, 500, 1))
    costs = np.exp(rng.normal(0, 2, (500, 1))) * 2.7 * 4.0**-bits * np.exp(rng.normal(0, 0.01, (500, 7)))
    return costs, rows * (-(-cols * bits // 8) + 2)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("uniform", [0, 1, 3, 6])
def test_a_large_allocation_is_optimal_and_not_worse_than_uniform(seed: int, uniform: int) -> None:
    costs, sizes = large_instance(seed)
    budget = int(sizes[:, uniform].sum())
    choice, optimal = allocate(costs, sizes, budget)
    assert optimal and total(sizes, choice) <= budget
    assert total(costs, choice) <= costs[:, uniform].sum() * (1 if uniform in (0, 6) else 0.5)
    # no exchange of two weights' steps improves it
    step = costs[np.arange(500), np.minimum(choice + 1, 6)] - costs[np.arange(500), choice]
    room = budget - total(sizes, choice)
    more = sizes[np.arange(500), np.minimum(choice + 1, 6)] - sizes[np.arange(500), choice]
    assert not ((step < 0) & (more <= room)).any()


def test_without_room_the_result_is_not_worse_than_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    costs, sizes = large_instance(1)
    budget = int(sizes[:, 2].sum())
    monkeypatch.setattr(module, "ROOM", 2)
    choice, optimal = allocate(costs, sizes, budget)
    assert not optimal and total(sizes, choice) <= budget
    assert total(costs, choice) <= costs[:, 2].sum()


def test_too_small_a_budget() -> None:
    with pytest.raises(TQFormatError, match="at least 5 bytes"):
        allocate(np.ones((2, 2)), np.array([[2, 3], [3, 4]]), 4)


# ------------------------------------------------------------------------------------------------ a model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("allocation") / "base")


def request(**options: Any) -> Request:
    return Request(**{"target_bits": 4.0, "tokens": 512, **options})


@pytest.mark.parametrize("target", [{"target_bits": 3.3}, {"target_bits": None, "target_bytes": 12_000}])
def test_a_target_is_an_upper_bound(checkpoint: Path, tmp_path: Path, target: dict[str, Any]) -> None:
    source = open_source(str(checkpoint))
    settings, allocation = make_allocation(
        source, Settings(), request(**target), "text-generation", tmp_path, quiet=True
    )
    plan = make_plan(source, settings, allocation)
    accounting, extra = plan.accounting(), allocation.record["extra"]
    scalars = accounting["quantized_scalars"] + accounting["passthrough_scalars"]
    budget = target.get("target_bytes") or int(3.3 * scalars / 8)
    assert extra["stored_bytes"] == accounting["stored_bytes"] <= budget == extra["target_bytes"]
    assert budget - accounting["stored_bytes"] < 400  # less than a step of the smallest weight
    uniform = make_plan(source, Settings(bits=extra["uniform_bits"])).accounting()["stored_bytes"]
    assert uniform == extra["uniform_bytes"] <= budget
    assert make_plan(source, Settings(bits=extra["uniform_bits"] + 1)).accounting()["stored_bytes"] > budget
    assert extra["objective"] < extra["uniform_objective"] and settings.bits == extra["uniform_bits"]
    bits = {t.info.name: t.bits for t in plan.tensors if t.bits}
    assert extra["promoted"] == [name for name in bits if bits[name] > settings.bits] != []
    assert extra["demoted"] == [name for name in bits if bits[name] < settings.bits]


def test_protection_and_exclusion_override(checkpoint: Path, tmp_path: Path) -> None:
    source = open_source(str(checkpoint))
    chosen = Settings(protect=(LAYER,), protected_bits=7, exclude=("lm_head.weight",))
    options = request(target_bits=12.0), "text-generation", tmp_path
    settings, allocation = make_allocation(source, chosen, *options, quiet=True)
    tensors = {t.info.name: t for t in make_plan(source, settings, allocation).tensors}
    assert tensors[LAYER].bits == 7 and tensors[LAYER].sensitivity is None and LAYER not in allocation.bits
    assert tensors["lm_head.weight"].bits is None
    assert max(allocation.bits.values()) <= 8


def test_embeddings_compete_with_what_feedback_gains_them(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, found = open_source(str(checkpoint)), []
    for gain in (1.0, 0.2, 0.001):
        monkeypatch.setattr(sensitivity, "measure_gains", lambda *_, gain=gain: {"lm_head.weight": gain})
        chosen = Settings(preset="balanced"), request(target_bits=4.5), "text-generation", tmp_path
        found.append(make_allocation(source, *chosen, quiet=True)[1].bits["lm_head.weight"])
    assert found == sorted(found, reverse=True) and found[0] > found[-1]
    monkeypatch.setattr(sensitivity, "measure_gains", lambda *_: {"lm_head.weight": 0.5})
    wide = request(target_bits=40.0)
    costs = [
        make_allocation(source, Settings(preset=preset), wide, "text-generation", tmp_path, quiet=True)[1]
        for preset in ("fast", "balanced")  # at 8 bits there is no feedback for an output layer
    ]
    assert costs[0].record["extra"]["objective"] == pytest.approx(costs[1].record["extra"]["objective"])


def test_targets_that_cannot_be_met_or_leave_room(checkpoint: Path, tmp_path: Path) -> None:
    source = open_source(str(checkpoint))
    for wrong in (request(target_bits=1.0), request(target_bits=None, target_bytes=10)):
        with pytest.raises(TQFormatError, match=r"expected at least [\d,]+ bytes") as caught:
            make_allocation(source, Settings(), wrong, "text-generation", tmp_path, quiet=True)
        assert caught.value.code == "SCHEMA.VALUE"
    with pytest.raises(TQFormatError, match="no weight is left"):
        make_allocation(source, Settings(exclude=("*",)), request(), "text-generation", tmp_path, quiet=True)
    _, allocation = make_allocation(
        source, Settings(), request(target_bits=40.0), "text-generation", tmp_path, quiet=True
    )
    assert set(allocation.bits.values()) == {8} and "leaves room" in allocation.notes[0]
    inventory = tmp_path / "inventory.json"
    inventory.write_text(json.dumps({"a": {"shape": [64, 64], "dtype": "BF16"}}))
    with pytest.raises(TQFormatError, match="headers alone"):
        make_allocation(open_source(str(inventory)), Settings(), request(), "text-generation", tmp_path)


def test_another_target_measures_nothing_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(checkpoint))
    first = make_allocation(source, Settings(), request(), "text-generation", tmp_path, quiet=True)[1]
    monkeypatch.setattr(sensitivity, "load_base", None)  # cannot be called
    again = make_allocation(source, Settings(), request(), "text-generation", tmp_path, quiet=True)[1]
    other = make_allocation(source, Settings(), request(target_bits=6.0), "text-generation", tmp_path, quiet=True)[1]
    assert again == first
    assert other.sensitivities == first.sensitivities and other.bits != first.bits


def test_what_is_not_measured_takes_the_median_and_is_told() -> None:
    notes: list[str] = []
    scalars = {"a": 10, "b": 10, "c": 20, "d": 5, "e": 2}
    found = fill_in({"a": 1.0, "b": 3.0, "c": 4.0, "d": 0.0}, scalars, notes)
    assert found == {"a": 1.0, "b": 3.0, "c": 4.0, "d": 1.0, "e": 0.4}
    assert len(notes) == 1 and notes[0].startswith("d and others: not measured") and "(2 of 5 weights)" in notes[0]
    with pytest.raises(TQFormatError, match="none of the weights"):
        fill_in({"a": 0.0}, {"a": 10}, notes)


def test_relative_errors_are_those_of_the_finished_repository(checkpoint: Path, tmp_path: Path) -> None:
    source = open_source(str(checkpoint))
    plans = [make_plan(source, Settings(bits=bits)) for bits in (2, 5)]
    names = [t.info.name for t in plans[0].tensors if t.bits]
    errors = relative_errors(source, plans, names)
    for k, bits in enumerate((2, 5)):
        out = tmp_path / str(bits)
        assert (
            command_line.main(["quantize", str(checkpoint), str(out), "--bits", str(bits), "--uniform", "--quiet"]) == 0
        )
        tensors = json.loads((out / MANIFEST).read_text())["tensors"]
        assert errors[:, k] == pytest.approx([tensors[name]["extra"]["relative_error"] for name in names], rel=1e-4)


def test_sampled_rows_are_evenly_spaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.arange(1000.0)[:, None].repeat(1, 4)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(module, "SAMPLE", 40)
    source = open_source(str(tmp_path))
    with Reader(source) as reader:
        chunks = reader.row_chunks
        slow = SimpleNamespace(row_chunks=lambda info: chunks(info, 28))  # 7 rows at a time
        assert sample_rows(slow, source.tensors["w"])[:, 0].tolist() == list(range(0, 1000, 100))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ the command line


def test_quantize_to_a_target(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = make_text(tmp_path / "some.txt", 2000)
    options = ["--preset", "fast", "--target-bpw", "4", "--candidate-bits", "2,4,6"]
    options += ["--calibration", str(text), "--calibration-tokens", "600"]
    assert command_line.main(["plan", str(checkpoint), *options, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert command_line.main(["plan", str(checkpoint), *options]) == 0
    assert "mixed precision in at most" in capsys.readouterr().out
    out = tmp_path / "out"
    assert command_line.main(["quantize", str(checkpoint), str(out), *options, "--quiet"]) == 0
    manifest = json.loads((out / MANIFEST).read_text())
    jsonschema.validate(manifest, json.loads((ROOT / "schemas/manifest.schema.json").read_text()))
    assert manifest["quantization"]["allocation"] == plan["allocation"]
    assert manifest["quantization"]["calibration"] == plan["calibration"]
    assert plan["calibration"]["source"] == "texts" and plan["calibration"]["extra"]["names"] == ["some.txt"]
    assert manifest["accounting"] == plan["accounting"] | {"ratio": manifest["accounting"]["ratio"]}
    assert manifest["accounting"]["stored_bytes"] == plan["allocation"]["extra"]["stored_bytes"]
    for name, entry in manifest["tensors"].items():
        if entry["kind"] == "quantized":
            assert entry["stages"][0]["bits"] == plan["tensors"][name]["bits"] in (2, 4, 6)
            assert entry["extra"]["sensitivity"] > 0


@pytest.mark.parametrize(
    "options",
    [
        ["--bits", "2", "--target-bpw", "3"],
        ["--target-bpw", "3", "--target-bytes", "1000"],
        ["--target-bpw", "0"],
        ["--target-bpw", "nan"],
        ["--target-bpw", "3", "--candidate-bits", "2,9"],
        ["--target-bpw", "3", "--candidate-bits", "two"],
    ],
)
def test_wrong_usage(checkpoint: Path, options: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main(["plan", str(checkpoint), *options])
    assert caught.value.code == 2
    assert "error: argument" in capsys.readouterr().err


def test_a_resumed_run_depends_on_the_allocation(checkpoint: Path, tmp_path: Path) -> None:
    from reference_quantizer.job.quantize import Target, resume_key

    source, target = open_source(str(checkpoint)), Target(tmp_path / "out", {"id": "a"}, "text-generation")
    keys = set()
    for bits in (3.3, 3.4, None):
        if bits is None:
            plan = make_plan(source, Settings(bits=3))
        else:
            chosen = make_allocation(
                source, Settings(), request(target_bits=bits), "text-generation", tmp_path, quiet=True
            )
            plan = make_plan(source, *chosen)
        keys.add(resume_key(source, plan, target))
    assert len(keys) == 3


def test_the_gain_of_a_trellis_is_that_of_the_literature() -> None:
    assert 0.6 < module.trellis_gain(2, 8) < 0.7  # 0.0745 against 0.1175, see docs/encoders.md


def test_a_trellis_counts_with_its_smaller_error(tmp_path: Path) -> None:
    source = open_source(str(make_checkpoint(tmp_path / "base")))
    plain, windowed = (make_plan(source, Settings(bits=2, window=w)) for w in (None, 8))
    names = [t.info.name for t in windowed.tensors if t.tile_rows]
    assert names
    errors = relative_errors(source, [plain, windowed], names)
    assert np.allclose(errors[:, 1] / errors[:, 0], module.trellis_gain(2, 8))


def test_what_feedback_gains_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose errors feedback takes away is given fewer bits than without it; the others have them."""
    source, cache = open_source(str(make_checkpoint(tmp_path / "base"))), tmp_path / "cache"
    chosen, found = Settings(preset="balanced", exclude=("*embed*", "lm_head*")), {}
    for gain in (1.0, 1e-6):
        monkeypatch.setattr(sensitivity, "measure_gains", lambda *_, gain=gain: {LAYER: gain})
        found[gain] = make_allocation(source, chosen, request(target_bits=10.0), "text-generation", cache, quiet=True)[
            1
        ]
    assert found[1e-6].bits[LAYER] == 2 < found[1.0].bits[LAYER]
    assert sum(found[1e-6].bits.values()) > sum(found[1.0].bits.values()) - found[1.0].bits[LAYER] + 2
    assert found[1e-6].sensitivities == found[1.0].sensitivities
    assert found[1e-6].record["extra"]["objective"] < found[1.0].record["extra"]["objective"]


def test_the_tables_of_a_mixture_of_trellises_are_within_the_target(tmp_path: Path) -> None:
    source, cache = open_source(str(make_checkpoint(tmp_path / "base"))), tmp_path / "cache"
    plain = Settings(window=8, preset="best")
    sizes = [make_plan(source, replace(plain, bits=bits)).accounting()["stored_bytes"] for bits in (2, 3, 4)]
    for target in (
        sizes[0],
        sizes[0] + 600,
        (sizes[0] + sizes[1]) // 2,
        sizes[1],
        (sizes[1] + sizes[2]) // 2,
        sizes[2],
    ):
        request = Request(target_bytes=int(target), candidates=(2, 3, 4), tokens=64)
        settings, allocation = make_allocation(source, plain, request, "text-generation", cache, quiet=True)
        stored = make_plan(source, settings, allocation).accounting()["stored_bytes"]
        facts = allocation.record["extra"]
        assert stored == facts["stored_bytes"] <= target and facts["uniform_bytes"] <= target
        assert facts["objective"] <= facts["uniform_objective"] * (1 + 1e-6)
