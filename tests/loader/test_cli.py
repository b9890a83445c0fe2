"""The command line: what it prints, its exit codes, and one line instead of a traceback."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import edit_manifest, run_python
from safetensors.torch import load_file

from tqformat import add_files, load_state_dict
from tqformat.__main__ import main, size_text, table_text
from tqformat.embed import LOADER, stamped_loader

PAYLOAD = "turboquant_weights.safetensors"


def cli(*arguments: object, **options: str) -> "subprocess.CompletedProcess[str]":
    return run_python("-m", "tqformat", *map(str, arguments), **options)  # type: ignore[arg-type]


def one_line(text: str) -> bool:
    return text.count("\n") == 1 and text.endswith("\n") and "Traceback" not in text


# ------------------------------------------------------------------------------------------------ inspect


def test_inspect_without_torch(settings_repo: Path) -> None:
    """In a process in which torch, numpy and safetensors cannot be imported."""
    code = (
        "import sys, runpy\n"
        "for name in ('torch', 'numpy', 'safetensors', 'transformers', 'huggingface_hub'): sys.modules[name] = None\n"
        "runpy.run_module('tqformat', run_name='__main__', alter_sys=True)"
    )
    for options in ([], ["--json"], ["--all"]):
        done = run_python("-c", code, "inspect", str(settings_repo), *options)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert "plain" in done.stdout


def test_inspect_tells_the_storage(settings_repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(settings_repo), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    manifest = json.loads((settings_repo / "quant_manifest.json").read_text())
    data = (settings_repo / PAYLOAD).read_bytes()
    stored = len(data) - 8 - int.from_bytes(data[:8], "little")
    total = report["total"]
    assert total["stored_bytes"] == stored == manifest["accounting"]["stored_bytes"]
    assert total["payload_file_bytes"] == len(data) and total["tensors"] == 15 == len(report["weights"])
    assert total["original_bytes"] == manifest["accounting"]["original_bytes"]
    assert total["bits_per_weight"] == 8 * len(data) / total["scalars"]
    assert report["quantized"]["tensors"] == 11 and report["passthrough"]["scalars"] == 48 + 1 + 3
    parts = [report[key]["stored_bytes"] for key in ("quantized", "passthrough", "tables")]
    assert sum(parts) == stored and parts[2] == 2 * 64 + 4 * 24 + 4 * 64 + 4 * 64 + 3 * 8 * 4 + 3 * 4 * 4 - 4 * 64
    assert report["features"] == manifest["features"] and report["tied_weights"] == {"plain.alias": "plain"}


def test_inspect_is_readable(settings_repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(settings_repo)]) == 0
    text = capsys.readouterr().out
    for word in (
        "org/base",
        "tests 1",
        "quantized",
        "passthrough",
        "total",
        "ratio",
        "trellis",
        "... and 3 more (--all)",
        "bits per quantized weight",
        "per weight of the whole payload",
    ):
        assert word in text
    assert main(["inspect", str(settings_repo), "--all"]) == 0
    every = capsys.readouterr().out
    assert (
        all(f"{name} " in every for name in ("plain", "conv", "empty", "norm", "none", "count")) and "more" not in every
    )


def test_tables_and_sizes() -> None:
    assert [size_text(n) for n in (0, 1023, 1024, 220_568_384, 5 * 2**40)] == [
        "0 B",
        "1,023 B",
        "1.00 KiB",
        "210.35 MiB",
        "5,120.00 GiB",
    ]
    assert table_text(("a", "n"), [("x", 1000), ("longer", 2)]).split("\n") == [
        "a           n",
        "------  -----",
        "x       1,000",
        "longer      2",
    ]


# ------------------------------------------------------------------------------------------------ verify


def test_verify(settings_repo: Path) -> None:
    add_files(settings_repo, {LOADER: ("code", stamped_loader()), "LICENSE": ("document", b"x")})
    done = cli("verify", settings_repo)
    assert (done.returncode, done.stderr) == (0, "") and one_line(done.stdout)
    assert (
        done.stdout.startswith("ok: 3 files") and "15 weights" in done.stdout and "embedded loader 1.0.0" in done.stdout
    )
    report = json.loads(cli("verify", settings_repo, "--json").stdout)
    scalars = sum(t.numel() for t in load_state_dict(settings_repo).values()) - 6 * 48  # the alias
    assert report["ok"] is True and report["files"] == 3 and report["decoded_scalars"] == scalars


@pytest.mark.parametrize("json_output", [False, True])
@pytest.mark.parametrize(
    ("file", "code"), [(PAYLOAD, "BIND.DIGEST"), ("config.json", "BIND.DIGEST"), ("LICENSE", "BIND.DIGEST")]
)
def test_verify_finds_damage(
    settings_repo: Path, file: str, code: str, json_output: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    add_files(settings_repo, {"config.json": ("support", b"{}"), "LICENSE": ("document", b"x")})
    data = bytearray((settings_repo / file).read_bytes())
    data[-1] ^= 1
    (settings_repo / file).write_bytes(data)
    assert main(["verify", str(settings_repo), *["--json"] * json_output]) == 1
    out, err = capfd.readouterr()
    if json_output:
        report = json.loads(out)
        assert (report["ok"], report["code"], report["where"], err) == (False, code, file, "")
    else:
        assert code in err and file in err and one_line(err) and out == ""


def test_verify_decodes_unless_told_not_to(settings_repo: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A scale that is not a number is found by decoding only."""
    from hashlib import sha256

    data = bytearray((settings_repo / PAYLOAD).read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    begin = 8 + int.from_bytes(data[:8], "little") + header["conv.scales"]["data_offsets"][0]
    data[begin : begin + 4] = b"\x00\x00\xc0\x7f"
    (settings_repo / PAYLOAD).write_bytes(data)
    edit_manifest(settings_repo, lambda m: m["files"][PAYLOAD].update(sha256=sha256(data).hexdigest()))
    assert main(["verify", str(settings_repo), "--no-decode"]) == 0
    assert main(["verify", str(settings_repo)]) == 1
    err = capfd.readouterr().err
    assert "DATA.NON_FINITE" in err and "tensors['conv'].stages[0].scales" in err and one_line(err)


# ------------------------------------------------------------------------------------------------ dequantize, embed


@pytest.mark.parametrize("dtype", [None, "f32", "bf16", "f16"])
def test_dequantize(settings_repo: Path, tmp_path: Path, dtype: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dtype", dtype] if dtype else []
    assert main(["dequantize", str(settings_repo), str(tmp_path / "out"), "--json", *options]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(tmp_path / "out")}
    state, want = load_file(tmp_path / "out" / "model.safetensors"), load_state_dict(settings_repo)
    to = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}.get(str(dtype))
    assert state.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(state[name], tensor.to(to) if to and tensor.is_floating_point() else tensor)


def test_dequantize_in_shards(settings_repo: Path, tmp_path: Path) -> None:
    done = cli("dequantize", settings_repo, tmp_path / "out", "--max-shard-size", "2K")
    assert (
        done.returncode == 0 and one_line(done.stdout) and (tmp_path / "out" / "model.safetensors.index.json").exists()
    )
    again = cli("dequantize", settings_repo, tmp_path / "out")
    assert again.returncode == 1 and "exists" in again.stderr and one_line(again.stderr)


def test_embed(settings_repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", str(settings_repo), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"loader": str(settings_repo / LOADER), "version": "1.0.0"}
    assert (settings_repo / LOADER).read_bytes() == stamped_loader()
    assert main(["verify", str(settings_repo)]) == 0
    done = cli("embed", "--print")
    assert done.stdout.encode() == stamped_loader()


# ------------------------------------------------------------------------------------------------ errors

COMMANDS = [["inspect"], ["verify"], ["dequantize"], ["embed"]]


def arguments(command: list[str], repo: Path, tmp_path: Path) -> list[str]:
    return [*command, str(repo), *([str(tmp_path / "out")] if command == ["dequantize"] else [])]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["missing", "empty", "file", "no JSON", "no table", "not UTF-8", "too deep"])
def test_errors_are_one_line(tmp_path: Path, command: list[str], kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    repo = tmp_path / "no-repository-here"
    if kind == "file":
        repo.write_text("x")
    elif kind != "missing":
        repo.mkdir()
        text = {"no JSON": b"{", "no table": b"{}", "not UTF-8": b"\xff", "too deep": b"[" * 10**5}.get(kind)
        if text:
            (repo / "quant_manifest.json").write_bytes(text)
    assert main(arguments(command, repo, tmp_path)) == 1
    out, err = capfd.readouterr()
    assert one_line(err) and err.startswith("error") and out == "" and not (tmp_path / "out").exists()
    assert main([*arguments(command, repo, tmp_path), "--json"]) == 1
    out, err = capfd.readouterr()
    report = json.loads(out)
    assert report["ok"] is False and report["message"]


@pytest.mark.parametrize("command", COMMANDS[:3])
def test_an_unreachable_hub_is_one_line(command: list[str], tmp_path: Path) -> None:
    """A Hub id, with nobody listening at the Hub's address."""
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    done = run_python("-m", "tqformat", *arguments(command, Path("owner/name"), tmp_path), env=env, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert one_line(done.stderr) and "owner/name" in done.stderr, done.stderr


def test_an_offline_hub_is_one_line(tmp_path: Path) -> None:
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = run_python("-m", "tqformat", "inspect", "owner/name", env=env, cwd=tmp_path)
    assert done.returncode == 1 and one_line(done.stderr) and "owner/name" in done.stderr, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there(settings_repo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for command in (["verify", str(settings_repo)], ["dequantize", str(settings_repo), str(tmp_path / "out")]):
        for device in ("cuda", "nonsense"):
            assert main([*command, "--device", device]) == 1
            err = capfd.readouterr().err
            assert "UNSUPPORTED.DEVICE" in err and one_line(err)


def test_text_of_the_repository_cannot_break_lines(settings_repo: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What a manifest says is printed without the power to move the cursor or to forge lines."""
    forged = "x\nok: all is well\x1b[2J"
    changes = (
        lambda m: m["features"].append(forged),
        lambda m: m["tensors"]["plain"].update({forged: 1}),
        lambda m: m["tensors"]["plain"]["stages"][0].update(codebook=forged),
        lambda m: m["tied_weights"].update({"a": forged}),
        lambda m: m.update(loader_kind=forged),
    )
    kept = (settings_repo / "quant_manifest.json").read_bytes()
    for change in changes:
        edit_manifest(settings_repo, change)
        assert main(["verify", str(settings_repo)]) == 1
        err = capfd.readouterr().err
        assert one_line(err) and "\x1b" not in err, repr(err)
        (settings_repo / "quant_manifest.json").write_bytes(kept)
    edit_manifest(settings_repo, lambda m: m.update(generator=forged))
    assert main(["inspect", str(settings_repo)]) == 0
    assert "\x1b" not in capfd.readouterr().out


def test_usage() -> None:
    for bad in (
        [],
        ["conjure"],
        ["inspect"],
        ["embed"],
        ["dequantize", "x"],
        ["dequantize", "x", "y", "--dtype", "f8"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(bad)
        assert caught.value.code == 2
    done = cli("--version")
    assert (done.returncode, done.stdout) == (0, "tqformat 1.0.0\n")


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_closed_pipe_is_quiet(settings_repo: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", f"'{os.sys.executable}' -m tqformat inspect --all '{settings_repo}' | head -n 1"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1
