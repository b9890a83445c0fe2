"""The command line: what it prints, its exit codes, and one line instead of a traceback."""

import errno
import importlib
import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, edit_manifest, run_python
from safetensors.torch import load_file

from tqformat import add_files, load_state_dict
from tqformat.__main__ import main, size_text, table_text
from tqformat.embed import LOADER, stamped_loader
from tqformat.support import role_of

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
    assert total["payload_file_bytes"] == len(data) and total["tensors"] == 19 == len(report["weights"])
    assert total["original_bytes"] == manifest["accounting"]["original_bytes"]
    assert total["bits_per_weight"] == 8 * len(data) / total["scalars"]
    assert report["quantized"]["tensors"] == 15 and report["passthrough"]["scalars"] == 48 + 1 + 3
    parts = [report[key]["stored_bytes"] for key in ("quantized", "passthrough", "tables")]
    assert sum(parts) == stored and parts[2] == 2 * 64 + 4 * 24 + 4 * 64 + 3 * 8 * 4 + 3 * 4 * 4 + 4 * 24 + 2 * 4
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
        "... and 7 more (--all)",
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
        done.stdout.startswith("ok: 3 files") and "19 weights" in done.stdout and "embedded loader 1.0.0" in done.stdout
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
    data = bytearray((settings_repo / PAYLOAD).read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    begin = 8 + int.from_bytes(data[:8], "little") + header["conv.scales"]["data_offsets"][0]
    data[begin : begin + 4] = b"\x00\x00\xc0\x7f"
    (settings_repo / PAYLOAD).write_bytes(data)
    edit_manifest(
        settings_repo,
        lambda m: m["files"][PAYLOAD].update(sha256=sha256(data).hexdigest(), chunks=None, chunk_size=None),
    )
    assert main(["verify", str(settings_repo), "--no-decode"]) == 0
    assert main(["verify", str(settings_repo)]) == 1
    err = capfd.readouterr().err
    assert "DATA.NON_FINITE" in err and "tensors['conv'].stages[0].scales" in err and one_line(err)


# ------------------------------------------------------------------------------------------------ export, embed


@pytest.mark.parametrize("dtype", [None, "f32", "bf16", "f16"])
def test_export(settings_repo: Path, tmp_path: Path, dtype: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--type", dtype] if dtype else []
    assert main(["export", str(settings_repo), str(tmp_path / "out"), "--json", *options]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(tmp_path / "out")}
    state, want = load_file(tmp_path / "out" / "model.safetensors"), load_state_dict(settings_repo)
    to = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}.get(str(dtype))
    assert state.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(state[name], tensor.to(to) if to and tensor.is_floating_point() else tensor)


def test_export_in_shards(settings_repo: Path, tmp_path: Path) -> None:
    done = cli("export", settings_repo, tmp_path / "out", "--max-shard-size", "2K")
    assert (
        done.returncode == 0 and one_line(done.stdout) and (tmp_path / "out" / "model.safetensors.index.json").exists()
    )
    again = cli("export", settings_repo, tmp_path / "out")
    assert again.returncode == 1 and "exists" in again.stderr and one_line(again.stderr)


def test_embed(settings_repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", str(settings_repo), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"loader": str(settings_repo / LOADER), "version": "1.0.0"}
    assert (settings_repo / LOADER).read_bytes() == stamped_loader()
    assert main(["verify", str(settings_repo)]) == 0
    done = cli("embed", "--print")
    assert done.stdout.encode() == stamped_loader()


# ------------------------------------------------------------------------------------------------ update


@pytest.fixture
def edited(settings_repo: Path) -> Path:
    """A repository with a file edited (its size as it was), one removed and three added."""
    files = {"config.json": ("support", b'{"a": 1}'), "LICENSE": ("document", b"x"), "vocab.json": ("support", b"{}")}
    add_files(settings_repo, {**files, LOADER: ("code", stamped_loader()), "eval_summary.json": ("document", b"{ }")})
    edit_manifest(settings_repo, lambda m: m["files"]["config.json"].update(extra={"note": "kept"}))
    (settings_repo / "config.json").write_bytes(b'{"a": 2}')
    (settings_repo / "vocab.json").unlink()
    (settings_repo / "notes.txt").write_bytes(b"notes")
    (settings_repo / "tokenizer_config.json").write_bytes(b"{}")
    (settings_repo / "modeling.py").write_bytes(b"1")
    (settings_repo / "README.md").write_bytes(b"not listed")
    return settings_repo


CHANGES = [
    "changed config.json (support), 8 bytes",
    "dropped vocab.json (support): it is gone",
    "added modeling.py (code), 1 bytes: read it before you trust it",
    "added notes.txt (document), 5 bytes",
    "added tokenizer_config.json (support), 2 bytes",
]


def test_update(edited: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = edited / "quant_manifest.json"
    before = {path.name: path.read_bytes() for path in edited.iterdir()}
    assert main(["verify", str(edited)]) == 1
    assert f"python -m tqformat update {edited}\n" in capsys.readouterr().err  # the way here
    assert main(["update", str(edited), "--dry-run"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert sorted(out[:-1]) == sorted(CHANGES) and "--dry-run" in out[-1]
    assert {path.name: path.read_bytes() for path in edited.iterdir()} == before

    assert main(["update", str(edited), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert sorted(report.pop("changes")) == sorted(CHANGES) and report == {"repo": str(edited), "written": True}
    after = {path.name: path.read_bytes() for path in edited.iterdir()}
    assert before.pop(manifest.name) != after.pop(manifest.name) and before == after
    files = json.loads(manifest.read_text())["files"]
    assert files["config.json"]["extra"] == {"note": "kept"} and "README.md" not in files
    assert {name: files[name]["role"] for name in ("notes.txt", "modeling.py", "tokenizer_config.json")} == {
        "notes.txt": "document", "modeling.py": "code", "tokenizer_config.json": "support",
    }  # fmt: skip
    assert main(["verify", str(edited)]) == 0
    stamp = manifest.stat().st_mtime_ns
    assert main(["update", str(edited)]) == 0 and "fits already" in capsys.readouterr().out
    assert manifest.stat().st_mtime_ns == stamp  # nothing to do, nothing written


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("payload", "BIND.DIGEST"), ("no payload", "BIND.MISSING_FILE"), ("loader", "BIND.LOADER"), ("weights", "BIND.EXTRA_FILE"),
        ("folder", "PATH.TYPE"), ("name", "PATH.NAME"), ("case", "PATH.COLLISION"), ("no repository", "BIND.MISSING_FILE"),
    ],
)  # fmt: skip
def test_update_refuses(edited: Path, kind: str, code: str, capfd: pytest.CaptureFixture[str]) -> None:
    if kind == "payload":
        data = bytearray((edited / PAYLOAD).read_bytes())
        data[-1] ^= 1
        (edited / PAYLOAD).write_bytes(data)
    elif kind == "no payload":
        (edited / PAYLOAD).unlink()
    elif kind == "loader":
        (edited / LOADER).write_bytes(b"import evil\n" + (edited / LOADER).read_bytes())
    elif kind == "weights":
        (edited / "model.safetensors").write_bytes(b"x")
    elif kind == "folder":
        (edited / "originals").mkdir()
    elif kind == "name":
        (edited / "my notes.txt").touch()
    elif kind == "case":
        (edited / "license").touch()
    before = (edited / "quant_manifest.json").read_bytes()
    assert main(["update", str(edited / "nowhere" if kind == "no repository" else edited)]) == 1
    out, err = capfd.readouterr()
    assert err.startswith(f"error [{code}]") and one_line(err) and out == "" and "(?" not in err
    assert (edited / "quant_manifest.json").read_bytes() == before
    if kind == "loader":  # the remedy works
        assert f"python -m tqformat embed {edited}" in err
        assert main(["embed", str(edited)]) == main(["update", str(edited)]) == main(["verify", str(edited)]) == 0


def test_update_drops_the_chunks_of_an_edited_file(edited: Path) -> None:
    chunks = {"chunk_size": 4096, "chunks": [sha256(b"as it was").hexdigest()]}
    edit_manifest(edited, lambda m: m["files"]["config.json"].update(chunks))
    assert main(["update", str(edited)]) == main(["verify", str(edited)]) == 0


def test_update_is_all_or_nothing(edited: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in edited.iterdir()}

    def full(path: object, *_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            assert main(["update", str(edited)]) == 1
        assert {path.name: path.read_bytes() for path in edited.iterdir()} == before


def test_files_by_their_names() -> None:
    names = {
        "support": [
            "config.json",
            "Tokenizer.json",
            "chat_template.jinja",
            "spiece.model",
            "preprocessor_config.json",
            "tekken.json",
        ],
        "document": ["LICENSE", "Notice.txt", "USE_POLICY.md"],
        "code": ["modeling_x.py", LOADER],
        "weights": ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "config.gguf"],
        None: ["notes.txt", "figure.svg", "requirements.txt", "eval_summary.json"],
    }
    assert {name: role_of(name) for group in names.values() for name in group} == {
        name: role for role, group in names.items() for name in group
    }


# ------------------------------------------------------------------------------------------------ errors

COMMANDS = [["inspect"], ["verify"], ["export"], ["embed"], ["update"]]


def arguments(command: list[str], repo: Path, tmp_path: Path) -> list[str]:
    return [*command, str(repo), *([str(tmp_path / "out")] if command == ["export"] else [])]


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


def failing(number: int) -> Any:
    """Any call of the system, as it fails with this error."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("command", [["export"], ["embed"]])
def test_a_target_that_cannot_be_written(
    settings_repo: Path, tmp_path: Path, command: list[str], number: int, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Full or read-only (for root, too): the place and the reason, and nothing is left."""
    there = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(os, "fsync", failing(number))
    for json_output in (False, True):
        assert main([*arguments(command, settings_repo, tmp_path), *["--json"] * json_output]) == 1
        out, err = capfd.readouterr()
        if json_output:
            report = json.loads(out)
            assert (report["ok"], report["message"]) == (False, os.strerror(number)) and str(tmp_path) in report[
                "where"
            ]
        else:
            assert one_line(err) and os.strerror(number) in err and f"error {tmp_path}" in err and "INTERNAL" not in err
    assert sorted(tmp_path.rglob("*")) == there


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
@pytest.mark.parametrize("options", ["", "--all --json"])
def test_an_output_that_is_full(settings_repo: Path, tmp_path: Path, options: str) -> None:
    """The limit of a file's size stands for a full disk."""
    command = f"ulimit -f 0; '{sys.executable}' -m tqformat inspect {options} '{settings_repo}' > '{tmp_path / 'out'}'"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and (tmp_path / "out").read_bytes() == b""
    assert done.stderr == ("" if options else f"error standard output: {os.strerror(errno.EFBIG)}\n")


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_a_library_that_is_not_there(settings_repo: Path, tmp_path: Path, library: str) -> None:
    code = f"import sys, runpy; sys.modules[{library!r}] = None; runpy.run_module('tqformat', run_name='__main__', alter_sys=True)"
    done = run_python("-c", code, "export", str(settings_repo), str(tmp_path / "out"))
    assert done.returncode == 1 and one_line(done.stderr), done.stderr
    assert done.stderr == f"error [UNSUPPORTED.LIBRARY] needs {library}, one of the packages that tqformat depends on\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there(settings_repo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for command in (["verify", str(settings_repo)], ["export", str(settings_repo), str(tmp_path / "out")]):
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
        ["export", "x"],
        ["export", "x", "y", "--type", "f8"],
        ["export", "x", "y", "--type", "q8_0"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(bad)
        assert caught.value.code == 2
    done = cli("--version")
    assert (done.returncode, done.stdout) == (0, "tqformat 1.0.0\n")


def test_the_help_names_the_command_as_it_was_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a module, and as the console script, whose file may end with .exe."""
    started = {
        "/x/tqformat/__main__.py": "python -m tqformat",
        "/x/bin/tqformat": "tqformat",
        "tqformat.exe": "tqformat",
    }
    for argv0, name in started.items():
        monkeypatch.setattr(sys, "argv", [argv0])
        with pytest.raises(SystemExit):
            main(["--help"])
        assert capsys.readouterr().out.startswith(f"usage: {name} [")


def test_the_console_scripts_are_there() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8").split("[project.scripts]\n")[1].split("\n\n")[0]
    scripts = dict(line.replace('"', "").split(" = ") for line in text.splitlines())
    assert scripts.keys() == {"tqformat", "tqformat-quantize", "tqformat-conformance"}
    for target in scripts.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_threads_wait_asleep(settings_repo: Path) -> None:
    """OpenMP reads the variable when torch is imported, which is later; a choice of the user stays."""
    code = (
        "import os, sys, tqformat.__main__ as m; m.main(['inspect', sys.argv[1]]); "
        "assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    )
    for given, wanted in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        done = run_python("-c", code, str(settings_repo), env=given)
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == wanted, done.stderr


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_closed_pipe_is_quiet(settings_repo: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", f"'{os.sys.executable}' -m tqformat inspect --all '{settings_repo}' | head -n 1"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1
