"""`check` and `run` as commands: what is missing or fails around them is said in one line, and what they say is bounded."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from test_validator import MANIFEST, PAYLOAD, ROOT, judged, repo

from conformance import folder, report
from conformance.__main__ import main, parser
from conformance.runner import run

ENTRY = f"'{sys.executable}' -m conformance.adapters.naive"
RUN = ["run", "--entrypoint", ENTRY, "--select", "valid/codes/bits-2"]


def python(*arguments: str, cwd: Path = ROOT, **env: str) -> tuple[int, str, str]:
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **env}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=variables, cwd=cwd)
    return done.returncode, done.stdout, done.stderr


# Libraries

HIDE = """
import runpy, sys
sys.modules[sys.argv[1]] = None
sys.argv[:2] = ["conformance"]
runpy.run_module("conformance", run_name="__main__")
"""


@pytest.mark.parametrize("module", ["jsonschema", "tqdm", "numpy"])
@pytest.mark.parametrize("command", ["check", "run"])
def test_a_missing_library_is_one_line(module: str, command: str) -> None:
    code, out, err = python("-c", HIDE, module, command, "--help")
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith(f"error [UNSUPPORTED.LIBRARY] {module}: ")
    assert "pip install numpy 'jsonschema>=4.18' 'tqdm>=4.60'" in err and "'.[conformance]'" in err


def test_the_libraries_are_those_of_the_extra() -> None:
    wanted = 'conformance = ["jsonschema>=4.18", "tqdm>=4.60"]'
    assert wanted in (ROOT / "pyproject.toml").read_text("utf-8")


def test_a_module_of_the_suite_that_is_missing_is_a_defect() -> None:
    code, _, err = python("-c", HIDE, "conformance.report", "check", "--help")
    assert code == 1 and "Traceback" in err


@pytest.mark.parametrize(
    ("name", "prog"),
    [
        ("/x/conformance/__main__.py", "python -m conformance"),
        ("/x/bin/tqformat-conformance", "tqformat-conformance"),
        ("tqformat-conformance.exe", "tqformat-conformance"),
        ("-c", "python -m conformance"),
    ],
)
def test_the_program_is_named_as_it_was_started(name: str, prog: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    assert parser().prog == prog
    texts = [p.format_help() for p in parser()._subparsers._group_actions[0].choices.values()]  # type: ignore[union-attr]
    assert all(f"\n  {prog} {command} " in text for command, text in zip(("check", "run"), texts, strict=True))


# Files that the system does not give or take

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def test_an_unreadable_file_is_no_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = repo().write(tmp_path / "r")
    real = os.open

    def refuse(file: Any, *arguments: Any, **options: Any) -> int:
        if file == "config.json":
            raise PermissionError(errno.EACCES, "Permission denied", file)
        return real(file, *arguments, **options)

    monkeypatch.setattr(folder.os, "open", refuse)
    assert main(["check", str(path)]) == 1
    out, err = capsys.readouterr()
    assert "L1 binding    INCOMPLETE  config.json: Permission denied\n" in out and "INTERNAL" not in out + err
    verdict = "tqformat 1.0: INCOMPLETE (L1 not judged: config.json: Permission denied; L0 passed)"
    assert out.splitlines()[-1] == verdict


@pytest.mark.parametrize("name", [MANIFEST, PAYLOAD])
def test_a_read_that_fails_names_its_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = repo().write(tmp_path / "r")
    files = {(path / name).stat().st_ino}
    real = os.pread

    def failing(file: int, *arguments: Any) -> bytes:
        if os.fstat(file).st_ino in files:
            raise OSError(errno.EIO, "Input/output error")
        return real(file, *arguments)

    monkeypatch.setattr(folder.os, "pread", failing)
    judgement = judged(path)
    assert not judgement.crashed and judgement.violations == []
    assert judgement.reason("L0") == f"{name}: Input/output error" and judgement.passed is None


def test_a_directory_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = repo().write(tmp_path / "r")

    def refuse(directory: int) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", directory)  # so does os.listdir of a descriptor

    monkeypatch.setattr(folder.os, "listdir", refuse)
    judgement = judged(path)
    assert not judgement.crashed and judgement.reason("L1") == f"{path}: Permission denied"


def test_a_directory_that_cannot_be_entered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Any, *_: Any, **__: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(folder.os, "open", refuse)
    assert main(["check", str(tmp_path)]) == 1  # the command was right
    assert capsys.readouterr() == ("", f"error: {tmp_path}: Permission denied\n")


@pytest.mark.parametrize(("option", "room"), [("--json", 1500), ("--junit", 1500), ("--html", 1500), ("stdout", 50)])
def test_a_file_that_the_system_does_not_take_in_full(option: str, room: int, tmp_path: Path) -> None:
    """No file may become longer than `room` bytes, which stands for a disk that is full."""
    file = tmp_path / "file"
    command = RUN if option == "--html" else ["check", str(repo().write(tmp_path / "r"))]
    options = [] if option == "stdout" else [option, str(file)]
    with open(file if option == "stdout" else os.devnull, "w") as output:
        done = subprocess.run(
            [sys.executable, "-B", "-m", "conformance", *command, *options],
            cwd=ROOT, text=True, stderr=subprocess.PIPE, stdout=output,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
        )  # fmt: skip
    name = "standard output" if option == "stdout" else file
    assert (done.returncode, done.stderr) == (1, f"error: {name}: File too large\n")
    assert file.stat().st_size <= room


def test_reports_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, nowhere = str(repo().write(tmp_path / "r")), str(tmp_path / "no" / "report")
    for command in (["check", path, "--json"], ["check", path, "--junit"], [*RUN, "--json"], [*RUN, "--html"]):
        assert main([*command, nowhere]) == 1
        out, err = capsys.readouterr()
        assert out and err == f"error: {nowhere}: No such file or directory\n"  # the verdict is not lost


def test_a_card_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = repo().write(tmp_path / "r")
    (path / "README.md").write_bytes(b"\xff card")
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(NO_SPACE))
    assert main(["check", str(path), "--card"]) == 1
    assert capsys.readouterr().err == f"error: {path / 'README.md'}: No space left on device\n"
    assert (path / "README.md").read_bytes() == b"\xff card" and not list(path.glob(".*"))
    monkeypatch.setattr(os, "replace", real)
    assert main(["check", str(path), "--card"]) == 0  # whatever its bytes are, they are kept
    assert (path / "README.md").read_bytes().startswith(b"\xff card\n\n<!-- tqformat verdict -->")


def test_a_loader_is_run_for_its_level_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check", str(tmp_path), "--run-loader", "--level", "L2"])
    assert ended.value.code == 2 and "--run-loader is for level L3" in capsys.readouterr().err


def test_no_room_for_the_cases(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run, "materialise", full)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert main(RUN) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "tqformat-" in err and err.endswith(": No space left on device\n")


# What is said is bounded


def test_a_missing_table_entry_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    r = repo()
    weight, stage = r.manifest["tensors"]["c"], r.manifest["tensors"]["c"]["stages"][0]
    for n in range(210):
        r.manifest["tensors"][f"w{n}"] = weight | {"stages": [stage | {"transform": "gone"}]}
    r.manifest["tensors"]["w7"]["stages"][0]["codebook"] = "lost"
    path = r.write(tmp_path / "r")
    found = [v for v in judged(path).violations if v.check == "schema.reference"]
    assert [(v.pointer, v.message) for v in found] == [
        ("/tensors/w0/stages/0/transform", "'gone' is no entry of `transforms`, and is named in 209 more places"),
        ("/tensors/w7/stages/0/codebook", "'lost' is no entry of `codebooks`"),
    ]
    assert main(["check", str(path)]) == 1
    assert capsys.readouterr().out.count("gone") == 1


def test_violations_that_repeat_are_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    r = repo()
    for n in range(300):
        r.manifest["tied_weights"][f"alias{n}"] = "nowhere"  # one cause
        r.manifest["transforms"][f"spare{n}"] = {"kind": "identity", "size": 1}
        r.manifest["tied_weights"][f"more{n}"] = f"other{n}"  # as many
    path, document = r.write(tmp_path / "r"), tmp_path / "report.json"
    assert main(["check", str(path), "--json", str(document)]) == 1
    out = capsys.readouterr().out
    assert "quant_manifest.json /tied_weights/alias0 and 299 more places  [TQ-TIE-1]" in out
    assert "quant_manifest.json /transforms/spare0 and 299 more places  [TQ-MAN-9]" in out
    assert f"and {300 - (report.SHOWN - 1)} more of this kind" in out
    assert len(out.splitlines()) < 50
    assert len(json.loads(document.read_text())["violations"]) == 900  # programs get all


def test_progress_is_for_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(repo().write(tmp_path / "r"))
    assert main(["check", path]) == 0
    assert capsys.readouterr().err == ""
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["check", path]) == 0
    assert "decode.finite" in terminal.getvalue()


# The Hub

COMMITS = ["a" * 40, "b" * 40]


class Hub(ThreadingHTTPServer):
    """A stand-in on loopback: repository directories by commit, the first of which is `main`, served as owner/name."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[str, Path] = {}
        self.lost = ""  # a file that is announced, and not given
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content_Length": str(len(body))}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[:4] == ["api", "models", "owner", "name"]
        if not api and parts[:3] != ["owner", "name", "resolve"]:
            return self.reply(404, x_error_code="RepoNotFound")
        revision = (parts + ["main"] * 6)[5 if api else 3]
        commit = next(iter(self.server.commits)) if revision == "main" else revision
        if commit not in self.server.commits:
            return self.reply(404, x_error_code="RevisionNotFound")
        directory = self.server.commits[commit]
        if api:
            files = sorted(file.name for file in directory.iterdir())
            body: Any = {"id": "owner/name", "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            if parts[4:5] == ["tree"]:
                body = [{"type": "file", "path": n, "size": (directory / n).stat().st_size, "oid": n} for n in files]
            return self.reply(200, json.dumps(body).encode(), Content_Type="application/json")
        if parts[4] == self.server.lost:
            return self.reply(404, x_error_code="EntryNotFound", X_Repo_Commit=commit)
        data = (directory / parts[4]).read_bytes()
        return self.reply(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=commit)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub() as server:
        for number, commit in enumerate(COMMITS):
            r = repo()
            r.files["LICENSE"] = b"x" * number
            server.commits[commit] = r.write(tmp_path / commit)
            (server.commits[commit] / ".gitattributes").write_text("*.safetensors filter=lfs")
        (server.commits[COMMITS[1]] / "LICENSE").write_text("changed")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(hub: Hub, tmp_path: Path, *arguments: str, **env: str) -> tuple[int, str, str]:
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    variables |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}
    return python("-m", "conformance", "check", *arguments, cwd=tmp_path, **variables, **env)


def test_a_repository_of_the_hub_is_fetched_whole(hub: Hub, tmp_path: Path) -> None:
    document = tmp_path / "report.json"
    code, out, err = ask(hub, tmp_path, "owner/name", "--json", str(document))
    assert (code, out.splitlines()[-1], err) == (0, "tqformat 1.0: PASS L3", ""), out
    (snapshot,) = (tmp_path / "hf" / "hub" / "models--owner--name" / "snapshots").iterdir()
    assert json.loads(document.read_text())["repository"] == str(snapshot) and snapshot.name == COMMITS[0]
    assert sorted(p.name for p in snapshot.iterdir()) == sorted(p.name for p in hub.commits[COMMITS[0]].iterdir())
    # the cache's links are the Hub's business there, and nobody's elsewhere
    assert (snapshot / MANIFEST).is_symlink() and main(["check", str(snapshot)]) == 1
    code, out, _ = ask(hub, tmp_path, "owner/name", "--revision", COMMITS[1])
    assert code == 1 and "BIND.DIGEST" in out and "LICENSE" in out


def test_what_the_hub_does_not_give_is_one_line(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "hide.py").write_text(HIDE)
    for arguments, env, said in (
        (["owner/other"], {}, "RepositoryNotFoundError"),
        (["owner/name", "--revision", "none"], {}, "RevisionNotFoundError"),
        (["owner/name"], {"HF_HUB_OFFLINE": "1"}, "OfflineModeIsEnabled"),
        (["owner/name"], {"HF_ENDPOINT": "http://127.0.0.1:1"}, "ConnectError"),
    ):
        variables = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "hf"),
            "NO_PROXY": "*",
        } | env
        code, out, err = python("-m", "conformance", "check", *arguments, cwd=tmp_path, **variables)
        assert (code, out, err.count("\n")) == (1, "", 1), err
        assert err.startswith(f"error [BIND.MISSING_FILE] {arguments[0]}: ") and said in err
    code, _, err = python(str(tmp_path / "hide.py"), "huggingface_hub", "check", "owner/name", cwd=tmp_path)
    assert code == 1 and err.count("\n") == 1 and err.startswith("error [UNSUPPORTED.LIBRARY] huggingface_hub: ")


def test_a_snapshot_that_lacks_files_is_not_judged(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.lost = "LICENSE"  # announced, and not given
    code, out, err = ask(hub, tmp_path, "owner/name")
    assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith("error [BIND.MISSING_FILE] owner/name: ")
    # the network goes away after the first question: the library then gives what the cache has
    info = types.SimpleNamespace(sha=COMMITS[0], siblings=[types.SimpleNamespace(rfilename=n) for n in ("a", "b\x1b")])
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "a").touch()
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "partial"))
    assert main(["check", "owner/name"]) == 1
    assert "1 files were not fetched, 'b\\x1b' first" in capsys.readouterr().err


def test_a_directory_goes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo().write(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert main(["check", "owner/name"]) == 0
