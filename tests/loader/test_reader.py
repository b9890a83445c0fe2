"""The reader: every conformance vector, every kind of damage, and decoding that nothing around it can change."""

import copy
import json
import math
import os
import random
import re
import shutil
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICES, edit_manifest, every_setting, new_writer, random_signs, random_stage

from conformance import oracle
from conformance.vectors import cases, load_case, materialise
from tqformat import TQFormatError, add_files, load, load_quantized, load_state_dict, open_repo, pack, read_manifest
from tqformat.load_quantized import MANIFEST, Repo, parse_json, torch_dtype

PAYLOAD = "turboquant_weights.safetensors"
VALID, INVALID, ACCEPTABLE = cases("valid"), cases("invalid"), cases("acceptable")
LEFT_TO_VALIDATORS = {  # [TQ-ERR-3]; the last three concern files that a reader has no need of
    "BIND.ACCOUNTING", "DATA.ORTHOGONALITY", "DATA.SIGNS", "DATA.CODEBOOK", "PATH.COLLISION", "PATH.TYPE",
    "SCHEMA.FEATURES", "SCHEMA.AMBIGUOUS", "SCHEMA.VALUE", "SCHEMA.TYPE", "SCHEMA.MISSING_FIELD", "SCHEMA.UNKNOWN_FIELD",
    "SCHEMA.REFERENCE", "BIND.DIGEST", "BIND.EXTRA_FILE", "BIND.LOADER", "BIND.MISSING_FILE", "BIND.SIZE", "LIMIT.SIZE",
}  # fmt: skip
MUST_REJECT = {
    "BIND.DIGEST",
    "BIND.EXTRA_FILE",
    "BIND.SIZE",
    "BIND.MISSING_FILE",
}  # this reader does, unless of a document
F32 = torch.float32


def read(path: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """All that a model's reader does with a directory, up to the model."""
    with open_repo(path) as repo:
        repo.check_roles("support")
        return {name: repo.dequantize(name, device).cpu() for name in repo.names()}


def expected(case: Path) -> dict[str, Any]:
    return json.loads((case / "expected.json").read_text("utf-8"))


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def decoded(entry: dict[str, Any]) -> oracle.Decoded:
    shape = tuple(entry["shape"])
    exact, tolerance = (
        np.resize(np.array([float.fromhex(x) for x in entry[key]]), shape) for key in ("exact", "tolerance")
    )
    return oracle.Decoded(entry["dtype"], shape, exact, tolerance)


def compare(values: dict[str, torch.Tensor], case: Path) -> float:
    """Asserts that values are correct by [TQ-NUM-5]; returns the worst |error| / tolerance among F32 weights."""
    wanted, worst = expected(case), 0.0
    assert values.keys() == wanted.keys()
    for name, entry in wanted.items():
        got = values[name]
        assert list(got.shape) == entry["shape"] and got.dtype == torch_dtype(entry["dtype"]), name
        if "bytes" in entry:
            assert raw(got).hex() == entry["bytes"], name
            continue
        truth, found = decoded(entry), got.double().numpy()
        assert oracle.is_correct(found, truth).all(), name
        if entry["dtype"] == "F32" and found.size:
            error = np.abs(found - truth.exact)
            assert not error[truth.tolerance == 0].any()
            # half a unit in the last place is rounding, not error: subnormal results have only that
            error = np.maximum(error - 2.0**-150, 0)[truth.tolerance > 0] / truth.tolerance[truth.tolerance > 0]
            worst = max(worst, float(error.max(initial=0)))
    return worst


def name(case: Path) -> str:
    return "/".join(case.parts[-2:])


# ------------------------------------------------------------------------------------------------ vectors


def test_there_are_vectors() -> None:
    assert len(VALID) > 150 and len(INVALID) > 400 and ACCEPTABLE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", VALID, ids=name)
def test_valid(case: Path, device: str, tmp_path: Path) -> None:
    if name(case) == "passthrough/every-dtype" and not hasattr(torch, "float8_e8m0fnu"):
        pytest.skip("this torch has no F8_E8M0")
    assert compare(read(materialise(case, tmp_path / "repo"), device), case) < 1


@pytest.mark.parametrize("case", INVALID, ids=name)
def test_invalid(case: Path, tmp_path: Path) -> None:
    about = load_case(case)
    repo = materialise(case, tmp_path / "repo")
    optional = about["judge"] == "validator"
    if optional:
        assert set(about["codes"]) <= LEFT_TO_VALIDATORS
        unread = str(about["pointer"]).startswith(("LICENSE", "README.md", "__pycache__"))
        optional = unread or not set(about["codes"]) <= MUST_REJECT
    try:
        read(repo)
    except TQFormatError as error:
        assert error.code in about["codes"], error
        assert error.where and error.message and str(error).startswith(f"[{error.code}] {error.where}: ")
        return
    assert optional, about["reason"]


@pytest.mark.parametrize("case", ACCEPTABLE, ids=name)
def test_acceptable(case: Path, tmp_path: Path) -> None:
    about = load_case(case)
    try:
        values = read(materialise(case, tmp_path / "repo"))
    except TQFormatError as error:
        assert error.code in about["codes"]
    else:
        if (case / "expected.json").exists():
            compare(values, case)


@pytest.mark.parametrize("device", DEVICES)
def test_worst_error(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ratios = {}
    for i, case in enumerate(VALID):
        if any(entry["dtype"] == "F32" and "exact" in entry for entry in expected(case).values()):
            ratios[name(case)] = compare(read(materialise(case, tmp_path / str(i)), device), case)
    worst = max(ratios, key=lambda key: ratios[key])
    with capsys.disabled():
        print(f"\n{device}: worst |error| / tolerance over {len(ratios)} F32 cases: {ratios[worst]:.4f} ({worst})")
    assert len(ratios) > 50 and 0 < ratios[worst] < 1


# ------------------------------------------------------------------------------------------------ surroundings


@pytest.fixture(scope="module")
def repo_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with new_writer(tmp_path_factory.mktemp("reader") / "repo") as writer:
        every_setting(writer)
        writer.add_file(b"{}", "support", "config.json")
        writer.add_file(b"text", "document", "LICENSE")
        return writer.finish()


@pytest.fixture(scope="module")
def values(repo_path: Path) -> dict[str, torch.Tensor]:
    return read(repo_path)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and raw(a[k]) == raw(b[k]) for k in a)


def test_every_setting_agrees_with_the_oracle(repo_path: Path, values: dict[str, torch.Tensor]) -> None:
    for key, truth in oracle.decode_repo(repo_path).items():
        if truth.data is not None:
            assert raw(values[key]) == truth.data
        else:
            assert oracle.is_correct(values[key].double().numpy(), truth).all(), key


@pytest.fixture
def _restored() -> Iterator[None]:
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    load_quantized.hadamard_factor.cache_clear()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.set_default_dtype(dtype)
    load_quantized.hadamard_factor.cache_clear()


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("device", DEVICES)
def test_reduced_precision_outside_changes_nothing(repo_path: Path, device: str) -> None:
    before = read(repo_path, device)
    torch.set_float32_matmul_precision("medium")
    with torch.autocast(device, dtype=torch.bfloat16):
        assert same(read(repo_path, device), before)
        assert torch.is_autocast_enabled(device)
        x = torch.ones(4, 4, device=device)
        assert (x @ x).dtype == torch.bfloat16
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_outside_changes_nothing(
    repo_path: Path, values: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    torch.set_default_dtype(dtype)
    assert same(read(repo_path), values)
    torch.set_default_dtype(F32)
    assert same(read(repo_path), values)  # nothing of the other dtype stayed in a cache


@pytest.mark.skipif(torch.__version__.startswith("2.4."), reason="torch 2.4 cannot take a default device back")
@pytest.mark.usefixtures("_restored")
def test_the_default_device_outside_changes_nothing(repo_path: Path, values: dict[str, torch.Tensor]) -> None:
    torch.set_default_device("meta")
    try:
        assert same(read(repo_path), values)
    finally:
        torch.set_default_device(None)
    with torch.device("meta"):
        assert same(read(repo_path), values)


def test_inference_mode_leaves_no_trace(repo_path: Path, values: dict[str, torch.Tensor]) -> None:
    load_quantized.hadamard_factor.cache_clear()
    with open_repo(repo_path) as repo:
        with torch.inference_mode():
            inside = {key: repo.dequantize(key) for key in repo.names()}
        assert same(inside, values)
        again = repo.dequantize("hadamard", dtype=F32)
    assert same(read(repo_path), values) and not again.requires_grad
    again.requires_grad_().sum().backward()  # a normal tensor, fit for training


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_converts_the_result(repo_path: Path, dtype: torch.dtype, device: str) -> None:
    with open_repo(repo_path) as repo:
        for key in repo.names():
            want, got = repo.dequantize(key, device).to(dtype), repo.dequantize(key, device, dtype)
            assert got.dtype == dtype and got.device.type == device and raw(got.cpu()) == raw(want.cpu()), key


def test_a_codebook_and_a_transform_may_share_an_identifier(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with new_writer(tmp_path / "repo") as writer:
        writer.add_transform("x", "hadamard", 8, factors=[8], signs="a5")
        writer.add_codebook("x", [-1.0, 1.0])
        writer.add_quantized("w", [2, 8], "F32", [random_stage(rng, [2, 8], bits=1, codebook="x", transform="x")])
        path = writer.finish()
    truth = oracle.decode_repo(path)["w"]
    assert oracle.is_correct(read(path)["w"].double().numpy(), truth).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("transform", ["h", "q", "i"])
def test_groups_of_rows_equal_one_group(tmp_path: Path, transform: str, device: str) -> None:
    """More than 2^18 elements (CUDA: 2^21) are decoded in several groups, the last one of odd size."""
    rng, shape = np.random.default_rng(5), [4098 + 1029, 1024] if device == "cuda" else [2 * 1029, 1024]
    with new_writer(tmp_path / "repo") as writer:
        if transform == "h":
            writer.add_transform("h", "hadamard", 256, factors=[256], signs=random_signs(rng, 256))
        elif transform == "q":
            q = torch.linalg.qr(torch.from_numpy(rng.normal(size=(64, 64))).float())[0]
            writer.add_transform("q", "dense", 64, matrix=q)
        else:
            writer.add_transform("i", "identity", 1)
        writer.add_codebook("c", [-1.5, -0.5, 0.5, 1.5])
        stage = random_stage(rng, shape, bits=2, codebook="c", transform=transform, tile=[3, 1024])
        writer.add_quantized("w", shape, "F32", [stage])
        path = writer.finish()
    with open_repo(path) as repo:
        got = repo.dequantize("w", device)
        assert len(repo._plan(repo.manifest.tensors["w"], torch.device(device), None)[2]) > 2
    manifest, payload = oracle.read_repo(path)
    assert oracle.is_correct(got.double().cpu().numpy(), oracle.decode_weight(manifest, payload, "w")).all()


def test_the_longest_sums_stay_within_the_tolerance() -> None:
    """Blocks that concentrate in one element, and many rounds, are the worst that valid input can ask of the arithmetic."""
    rng = np.random.default_rng(6)
    for f in (20, 108, 504, 2020):
        h = torch.from_numpy(oracle.hadamard_factor(f)).float()
        transform = {"size": f, "signs": "00" * -(-f // 8), "factors": [f]}
        inverse = load_quantized.inverse_hadamard((f,), transform["signs"], torch.device("cpu"))
        for y in (1.1 * h.t()[:8], 1.7 * h.t()[-8:]):
            assert worst_of(inverse, oracle.inverse_hadamard(transform), y.contiguous()) < 0.5, f
    for size in (2, 8, 64):
        pairs = np.stack([rng.permutation(size).reshape(-1, 2) for _ in range(64)]).astype(np.int32)
        angles = rng.normal(size=(64, size // 2)).astype(np.float32)
        payload = {"p": ("I32", pairs.shape, pairs.tobytes()), "a": ("F32", angles.shape, angles.tobytes())}
        inverse = load_quantized.inverse_givens(torch.from_numpy(pairs), torch.from_numpy(angles))
        y = torch.from_numpy(rng.normal(size=(20000 // size, size))).float()
        assert worst_of(inverse, oracle.inverse_givens({"pairs": "p", "angles": "a"}, payload), y) < 0.5, size


def worst_of(inverse: Callable[..., torch.Tensor], truth: Callable[..., Any], y: torch.Tensor) -> float:
    """The largest |error| / tolerance of [TQ-NUM-4] over the blocks y."""
    exact, got = truth(y.double().numpy()), inverse(y).double().numpy()
    m = np.maximum(np.abs(y.numpy()).max(1), np.abs(exact).max(1))
    m = np.maximum(m, np.linalg.norm(y.double().numpy(), axis=1) / 4)
    return float((np.abs(got - exact).max(1) / (m * 2.0**-20)).max())


# ------------------------------------------------------------------------------------------------ names, ties, threads


def test_load_state_dict_shares_tied_tensors(repo_path: Path, values: dict[str, torch.Tensor]) -> None:
    state = load_state_dict(repo_path)
    assert state.keys() == {*values, "plain.alias"}
    assert state["plain.alias"] is state["plain"]
    assert same({key: state[key] for key in values}, values)
    half = load_state_dict(repo_path, dtype=torch.float16)
    assert all(half[key].dtype == (torch.float16 if t.is_floating_point() else t.dtype) for key, t in state.items())
    assert len({t.dtype for t in half.values()}) > 1  # integers keep theirs, and their values


def test_iteration_names_and_aliases(repo_path: Path, values: dict[str, torch.Tensor]) -> None:
    with open_repo(repo_path) as repo:
        assert repo.names() == list(repo.manifest.tensors) and "plain.alias" not in repo.names()
        assert same({name: repo.dequantize(name) for name in repo.names()}, values)
        assert torch.equal(repo.dequantize("plain.alias"), values["plain"])
        with pytest.raises(TQFormatError, match=r"BIND\.MISSING_TENSOR"):
            repo.dequantize("nothing")


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("shared", [True, False])
def test_threads(repo_path: Path, values: dict[str, torch.Tensor], shared: bool) -> None:
    torch.set_float32_matmul_precision("medium")
    results: dict[int, list[bool]] = {}
    one = open_repo(repo_path)
    start = threading.Barrier(4)

    def work(k: int) -> None:
        repo = one if shared else open_repo(repo_path)
        names = repo.names()
        random.Random(k).shuffle(names)
        start.wait()
        results[k] = [raw(repo.dequantize(key)) == raw(values[key]) for key in names * 8]
        if not shared:
            repo.close()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(before)
    one.close()
    assert len(results) == 4 and all(all(r) for r in results.values())
    assert torch.get_float32_matmul_precision() == "medium"


# ------------------------------------------------------------------------------------------------ damage


def damage(path: Path, change: Callable[[Path], object], verify: bool = True) -> str | None:
    """The error code of reading a repository after a change of its directory; None if it is accepted."""
    change(path)
    try:
        with open_repo(path, verify) as repo:
            repo.check_roles("support")
            for key in repo.names():
                repo.dequantize(key)
    except TQFormatError as error:
        return error.code
    return None


@pytest.fixture
def fresh(repo_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(repo_path, tmp_path / "copy"))


def flip(file: str, offset: int, bit: int = 0) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray((path / file).read_bytes())
        data[offset] ^= 1 << bit
        (path / file).write_bytes(data)

    return change


def truncate(file: str, by: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / file, (path / file).stat().st_size - by)


DAMAGE: dict[str, tuple[Callable[[Path], object], str | None, str | None]] = {  # change, code, code with verify=False
    "nothing": (lambda p: None, None, None),
    "payload bit": (flip(PAYLOAD, -1, 6), "BIND.DIGEST", None),
    "support bit": (flip("config.json", 0), "BIND.DIGEST", None),
    "document bit": (flip("LICENSE", 0), None, None),
    "document absent": (lambda p: (p / "LICENSE").unlink(), None, None),
    "payload truncated": (truncate(PAYLOAD, 1), "BIND.SIZE", "BIND.SIZE"),
    "payload empty": (lambda p: (p / PAYLOAD).write_bytes(b""), "BIND.SIZE", "BIND.SIZE"),
    "payload longer": (lambda p: (p / PAYLOAD).open("ab").write(b"\0"), "BIND.SIZE", "BIND.SIZE"),
    "support truncated": (truncate("config.json", 1), "BIND.SIZE", "BIND.SIZE"),
    "payload absent": (lambda p: (p / PAYLOAD).unlink(), "BIND.MISSING_FILE", "BIND.MISSING_FILE"),
    "support absent": (lambda p: (p / "config.json").unlink(), "BIND.MISSING_FILE", "BIND.MISSING_FILE"),
    "manifest absent": (lambda p: (p / MANIFEST).unlink(), "BIND.MISSING_FILE", "BIND.MISSING_FILE"),
    "manifest truncated": (truncate(MANIFEST, 3), "JSON.SYNTAX", "JSON.SYNTAX"),
    "payload a directory": (
        lambda p: ((p / PAYLOAD).unlink(), (p / PAYLOAD).mkdir()),
        "PATH.TYPE",
        "PATH.TYPE",
    ),
    "extra file": (lambda p: (p / "pytorch_model.bin").touch(), "BIND.EXTRA_FILE", "BIND.EXTRA_FILE"),
    "extra directory": (lambda p: (p / "sub").mkdir(), "BIND.EXTRA_FILE", "BIND.EXTRA_FILE"),
    "allowed entries": (
        lambda p: ((p / "README.md").touch(), (p / ".git").mkdir(), (p / "__pycache__").mkdir(), (p / ".x").touch()),
        None,
        None,
    ),
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage(kind: str, verify: bool, fresh: Path) -> None:
    change, code, unverified = DAMAGE[kind]
    assert damage(fresh, change, verify) == (code if verify else unverified)


def test_missing_shard(tmp_path: Path) -> None:
    with new_writer(tmp_path / "repo", max_shard_bytes=500) as writer:
        every_setting(writer)
        path = writer.finish()
    shards = sorted(path.glob("turboquant_weights-*.safetensors"))
    assert len(shards) > 2 and damage(path, lambda p: None) is None
    kept = shards[1].read_bytes()
    assert damage(path, lambda p: shards[1].unlink()) == "BIND.MISSING_FILE"
    shards[1].write_bytes(kept)
    unlisted = damage(path, lambda p: edit_manifest(p, lambda m: m["files"].pop(shards[1].name)))
    assert unlisted in ("BIND.EXTRA_FILE", "BIND.SHARDS")


def test_links_of_a_hub_cache_are_followed(fresh: Path, tmp_path: Path, values: dict[str, torch.Tensor]) -> None:
    (tmp_path / "blobs").mkdir()
    for i, file in enumerate(sorted(fresh.iterdir())):
        file.rename(tmp_path / "blobs" / str(i))
        file.symlink_to(tmp_path / "blobs" / str(i))
    assert same(read(fresh), values)


def test_an_error_says_where(fresh: Path) -> None:
    edit_manifest(fresh, lambda m: m["tensors"]["plain"]["stages"][0].update(bits=9))
    with pytest.raises(TQFormatError) as caught:
        open_repo(fresh)
    assert caught.value.where == "tensors['plain'].stages[0].bits" and "9" in caught.value.message
    assert isinstance(caught.value, ValueError)


def test_an_error_in_the_data_says_which_rows(tmp_path: Path) -> None:
    scales = torch.ones(2048, 1)
    with new_writer(tmp_path / "repo") as writer:
        writer.add_transform("i", "identity", 1)
        writer.add_codebook("c", [-1.0, 1.0])
        codes = torch.zeros(2048, 128, dtype=torch.uint8)
        stage = {"bits": 1, "codebook": "c", "transform": "i", "codes": codes, "scales": scales}
        writer.add_quantized("w", [2048, 1024], "F32", [stage])
        path = writer.finish()
    with open_repo(path) as repo:
        end = repo.spans["w.scales"].end
    with open(path / "turboquant_weights.safetensors", "r+b") as file:
        file.seek(end - 4)
        file.write(struct.pack("<f", math.inf))
    with open_repo(path, verify=False) as repo, pytest.raises(TQFormatError) as caught:
        repo.dequantize("w")
    where = re.fullmatch(r"tensors\['w'\]\.stages\[0\]\.scales, rows (\d+) to 2047", caught.value.where)
    assert caught.value.code == "DATA.NON_FINITE" and where and 0 < int(where[1]) < 2047


@pytest.mark.parametrize("flipped", [0, 4096, -1])
def test_chunks_are_verified_in_place_of_the_file(tmp_path: Path, flipped: int) -> None:
    """Every chunk counts, and the error says which one is wrong [TQ-REPO-8]."""
    with new_writer(tmp_path / "repo", chunk_size=4096) as writer:
        writer.add_passthrough("a", torch.arange(20000.0))
        path = writer.finish()
    size = (path / PAYLOAD).stat().st_size
    edit_manifest(path, lambda m: m["files"][PAYLOAD].update(sha256="0" * 64))
    with open_repo(path) as repo:  # the chunks are right, and were verified
        assert repo.dequantize("a")[-1] == 19999
    place = flipped % size
    flip(PAYLOAD, place, 3)(path)
    with pytest.raises(TQFormatError) as caught:
        open_repo(path)
    assert caught.value.code == "BIND.DIGEST" and f"of the bytes from {place // 4096 * 4096}," in caught.value.message
    edit_manifest(path, lambda m: [m["files"][PAYLOAD].pop(key) for key in ("chunk_size", "chunks")])
    with pytest.raises(TQFormatError, match=r"BIND\.DIGEST.* expected sha256 0{64}"):
        open_repo(path)


def test_exponents_need_no_new_torch_but_tensors_of_them_do(
    repo_path: Path, values: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F8_E8M0 scales are decoded from their bytes; a passthrough tensor has the dtype itself."""
    with new_writer(tmp_path / "repo") as writer:
        writer.add_passthrough("e", torch.tensor([0, 127, 254], dtype=torch.uint8), dtype="F8_E8M0")
        path = writer.finish()
    if hasattr(torch, "float8_e8m0fnu"):
        assert read(path)["e"].float().tolist() == [2.0**-127, 1.0, 2.0**127]
        monkeypatch.delattr(torch, "float8_e8m0fnu")
    with open_repo(repo_path) as repo:
        assert repo.spans["exponents.scales"].dtype == "F8_E8M0"
        assert raw(repo.dequantize("exponents")) == raw(values["exponents"])
    with open_repo(path) as repo, pytest.raises(TQFormatError, match=r"UNSUPPORTED\.LIBRARY.* a torch that has"):
        repo.dequantize("e")


@pytest.mark.parametrize("device", DEVICES)
def test_the_ends_of_the_exponents(tmp_path: Path, device: str) -> None:
    """2^-127, which is subnormal in binary32, and 2^127 are exact; 255 is an error [TQ-NUM-8]."""
    with new_writer(tmp_path / "repo") as writer:
        writer.add_transform("i", "identity", 1)
        writer.add_codebook("c", [1.0, 0.75])
        codes = pack(torch.tensor([[0, 1]] * 4).int(), 1)
        stage = {"bits": 1, "codebook": "c", "transform": "i", "codes": codes, "outer_scales": torch.ones(1, 1)}
        stage |= {"scales": torch.tensor([[0], [1], [127], [254]], dtype=torch.uint8), "scale_dtype": "F8_E8M0"}
        writer.add_quantized("w", [4, 2], "F32", [stage])
        path = writer.finish()
    want = [[2.0**k, 0.75 * 2.0**k] for k in (-127, -126, 0, 127)]
    with open_repo(path) as repo:
        assert repo.dequantize("w", device).tolist() == want
        place = repo.spans["w.scales"].begin
    with open(path / PAYLOAD, "r+b") as file:
        file.seek(place)
        file.write(b"\xff")
    with open_repo(path, verify=False) as repo, pytest.raises(TQFormatError, match=r"DATA\.NON_FINITE.*scales"):
        repo.dequantize("w", device)


def test_a_manifest_is_bound_in_size(tmp_path: Path) -> None:
    with open(tmp_path / MANIFEST, "wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(TQFormatError, match=r"LIMIT\.SIZE"):
        read_manifest(tmp_path)


def test_a_column_scale_of_a_scalar_is_an_error(fresh: Path) -> None:
    edit_manifest(fresh, lambda m: m["tensors"]["count"].update(column_scale="s"))
    assert damage(fresh, lambda p: None) == "SCHEMA.AMBIGUOUS"


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps", "nonsense"])
def test_a_device_that_is_not_there(repo_path: Path, device: str) -> None:
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with open_repo(repo_path) as repo, pytest.raises(TQFormatError, match=r"UNSUPPORTED\.DEVICE"):
        repo.dequantize("plain", device)


# ------------------------------------------------------------------------------------------------ JSON and mutations


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b'{"a": 1, "a": 1}', "JSON.DUPLICATE_KEY"),
        (b'{"a": 1, "\\u0061": 1}', "JSON.DUPLICATE_KEY"),
        (b'{"a": {"b": 1, "b": 2}}', "JSON.DUPLICATE_KEY"),
        (b'{"a": 9007199254740992}', "JSON.NUMBER"),
        (b'{"a": -9007199254740992}', "JSON.NUMBER"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "JSON.NUMBER"),
        (b'{"a": 1e999}', "JSON.NUMBER"),
        (b'{"a": NaN}', "JSON.SYNTAX"),
        (b'{"a": -Infinity}', "JSON.SYNTAX"),
        (b'{"a": "\\ud800"}', "JSON.ENCODING"),
        (b'{"\\udfff": 1}', "JSON.ENCODING"),
        (b'{"a": "\xff"}', "JSON.ENCODING"),
        (b'{"a": "\xed\xa0\x80"}', "JSON.ENCODING"),
        (b'\xef\xbb\xbf{"a": 1}', "JSON.ENCODING"),
        ('{"a": 1}'.encode("utf-16-le"), "JSON.SYNTAX"),
        (b'{"a": 1} {}', "JSON.SYNTAX"),
        (b'{"a": 01}', "JSON.SYNTAX"),
        (b'{"a": 1,}', "JSON.SYNTAX"),
        (b'{"a": "\x01"}', "JSON.SYNTAX"),
        (b"{'a': 1}", "JSON.SYNTAX"),
        (b"[]", "JSON.SYNTAX"),
        (b"1", "JSON.SYNTAX"),
        (b"", "JSON.SYNTAX"),
        (b"[" * 100_000 + b"]" * 100_000, "JSON.DEPTH"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "JSON.DEPTH"),
    ],
)
def test_json_rejects(text: bytes, code: str) -> None:
    with pytest.raises(TQFormatError) as caught:
        parse_json(text, "x")
    assert caught.value.code == code


def test_json_accepts() -> None:
    text = b' \t\r\n{"a": 9007199254740991, "b": -9007199254740991, "c": 2e0, "\\ud83d\\ude00": [null, true]} \n'
    assert parse_json(text, "x") == {"a": 2**53 - 1, "b": 1 - 2**53, "c": 2.0, "\U0001f600": [None, True]}
    assert parse_json(b'{"a":' + b"[" * 63 + b"]" * 63 + b"}", "x")


WRONG: list[Any] = [None, True, 0, -1, 1, 7, 2**53 - 1, 0.5, "", "x", "givens", [], [0], [1, 2, 3], {}, {"a": 1}]


def places(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values of a JSON document; of long lists only the first three elements."""
    if at:
        yield at
    if isinstance(document, dict):
        for key, value in document.items():
            yield from places(value, (*at, key))
    elif isinstance(document, list):
        for i, value in enumerate(document[:3]):
            yield from places(value, (*at, i))


def replaced(document: Any, at: tuple[Any, ...], value: Any) -> Any:
    document = copy.deepcopy(document)
    inner = document
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return document


def mutations(document: Any, count: int, seed: int) -> Iterator[tuple[str, Any]]:
    every = [(at, value) for at in places(document) for value in WRONG]
    for at, value in random.Random(seed).sample(every, min(count, len(every))):
        yield f"{at} = {value!r}", replaced(document, at, value)


def survives(path: Path) -> str | None:
    """Reads; every outcome but success and TQFormatError is a failure of the test."""
    return damage(path, lambda p: None, verify=False)


def test_no_mutation_of_a_manifest_crashes_the_reader(fresh: Path) -> None:
    """One value of the manifest becomes another: it is refused or harmless, never a different exception."""
    manifest = json.loads((fresh / MANIFEST).read_text("utf-8"))
    codes = set()
    for what, mutation in mutations(manifest, 500, seed=11):
        (fresh / MANIFEST).write_text(json.dumps(mutation), "utf-8")
        try:
            codes.add(survives(fresh))
        except Exception as error:
            raise AssertionError(what) from error
    assert {None, "SCHEMA.TYPE", "SCHEMA.VALUE", "SCHEMA.REFERENCE", "BIND.TENSOR", "BIND.MISSING_TENSOR"} <= codes


def test_no_mutation_of_a_header_crashes_the_reader(fresh: Path) -> None:
    data = (fresh / PAYLOAD).read_bytes()
    length = int.from_bytes(data[:8], "little")
    codes = set()
    for what, mutation in mutations(json.loads(data[8 : 8 + length]), 200, seed=12):
        header = json.dumps(mutation).encode()
        (fresh / PAYLOAD).write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
        size = (fresh / PAYLOAD).stat().st_size
        edit_manifest(fresh, lambda m, size=size: m["files"][PAYLOAD].update(size=size))
        try:
            codes.add(survives(fresh))
        except Exception as error:
            raise AssertionError(what) from error
    assert {"CONTAINER.HEADER", "CONTAINER.DTYPE", "CONTAINER.SHAPE"} <= codes


def test_no_damaged_byte_crashes_the_reader(fresh: Path) -> None:
    """Random bytes anywhere: with verification the payload's digest differs, without it nothing but values may change."""
    generator = random.Random(13)
    for file in (MANIFEST, PAYLOAD):
        data = (fresh / file).read_bytes()
        for _ in range(60):
            broken = bytearray(data)
            for _ in range(generator.choice((1, 1, 1, 4))):
                broken[generator.randrange(len(data))] = generator.randrange(256)
            (fresh / file).write_bytes(broken)
            survives(fresh)
            if file == PAYLOAD and bytes(broken) != data:
                with pytest.raises(TQFormatError):
                    open_repo(fresh)
        (fresh / file).write_bytes(data)
    assert survives(fresh) is None


def test_a_claim_of_a_huge_weight_allocates_nothing(fresh: Path) -> None:
    """Shapes are checked against the payload's real size before memory is taken [TQ-SEC-2]."""
    for shape in ([2**40, 48], [2**52, 1], [0, 2**52], [1] * 9, [2**30, 2**30]):
        edit_manifest(fresh, lambda m, shape=shape: m["tensors"]["plain"].update(shape=shape))
        assert damage(fresh, lambda p: None, verify=False) is not None, shape


def test_pack_is_not_needed_to_read() -> None:
    assert not hasattr(load_quantized, "pack") and callable(pack) and issubclass(Repo, object)
    assert math.isclose(float(load_quantized.__version__[0]), 1)


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("config.json", b"{} ", "BIND.SIZE"),
        ("config.json", b"[]", "BIND.DIGEST"),
        ("notes.txt", b"", "BIND.EXTRA_FILE"),
        ("turboquant_weights.safetensors", b"", "BIND.SIZE"),
    ],
)
def test_who_changed_a_file_learns_the_remedy(settings_repo: Path, name: str, content: bytes, code: str) -> None:
    """But weights are not to be changed."""
    add_files(settings_repo, {"config.json": ("support", b"{}")})
    (settings_repo / name).write_bytes(content)
    with pytest.raises(TQFormatError) as caught:
        load(settings_repo)
    remedy = f"; if you changed it yourself: python -m tqformat update {settings_repo}"
    assert caught.value.code == code and str(caught.value).endswith(remedy) is (name[0] != "t")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["files"].update({"a b.json": m["files"]["turboquant_weights.safetensors"]}), "1 to 128 of A-Z"),
        (lambda m: m["files"]["turboquant_weights.safetensors"].update(sha256="x"), "64 lower-case hexadecimal digits"),
        (lambda m: m["transforms"]["h"].update(signs="xyz"), "expected lower-case hexadecimal digits"),
        (lambda m: m["tensors"].update({"../w": m["tensors"]["plain"]}), "no path"),
    ],
)
def test_rules_for_text_are_told_in_words(settings_repo: Path, change: Any, words: str) -> None:
    edit_manifest(settings_repo, change)
    with pytest.raises(TQFormatError) as caught:
        open_repo(settings_repo)
    assert words in caught.value.message and not set("()[]{}\\") & set(caught.value.message.split(", got")[0])
