"""Pushing to a stand-in Hub on this machine's loopback: what is asked of it, what arrives, and what is refused before."""

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from conftest import edit_manifest, every_setting, new_writer
from test_card import evaluation, layered

from reference_quantizer.release import base, card
from reference_quantizer.release.push import check_release
from tqformat import TQFormatError
from tqformat.embed import embed
from tqformat.load_quantized import MANIFEST

PAYLOAD = "turboquant_weights.safetensors"
TOKEN = "hf_stand_in"
API = ["api", "models", "owner", "name"]


class Hub:
    """One model repository, owner/name: files by branch. Large files come by LFS, the others inside the commit."""

    def __init__(self) -> None:
        self.branches: dict[str, dict[str, bytes]] = {}
        self.private = False
        self.objects: dict[str, bytes] = {}  # LFS, by SHA-256
        self.requests: list[str] = []
        self.ignored: set[str] = set()  # names that a .gitignore would leave out
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def reply(self, status: int, body: Any = None, **headers: str) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for key, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(key.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = unquote(urlsplit(self.path).path).strip("/").split("/")
                hub.requests.append(f"{self.command} {'/'.join(parts)}")
                if self.command != "PUT" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.reply(401, {"error": "Invalid username or password."})
                if self.command == "PUT":
                    hub.objects[parts[-1]] = data
                    return self.reply(200, {})
                if self.command != "POST":
                    return self.read(parts)
                if parts[-1] == "batch":
                    return self.reply(
                        200, {"transfer": "basic", "objects": [upload(o) for o in json.loads(data)["objects"]]}
                    )
                if parts[:3] == ["api", "repos", "create"]:
                    return self.create(json.loads(data))
                if parts[:4] == API and parts[4] == "preupload":
                    files = [preupload(f) for f in json.loads(data)["files"]]
                    return self.reply(200, {"files": files})
                if parts[:4] == API and parts[4] == "branch":
                    hub.branches.setdefault(parts[5], dict(hub.branches["main"]))
                    return self.reply(200, {})
                if parts[:4] == API and parts[4] == "commit":
                    commit(hub.branches[parts[5]], data)
                    hub.branches["c" * 40] = hub.branches[parts[5]]
                    return self.reply(
                        200, {"commitUrl": f"{hub.url}/owner/name/commit/{'c' * 40}", "commitOid": "c" * 40}
                    )
                return self.reply(200, {})  # validate-yaml

            do_PUT = do_GET = do_HEAD = do_POST

            def create(self, body: dict[str, Any]) -> None:
                if "main" in hub.branches:
                    return self.reply(409, {"error": "exists", "url": f"{hub.url}/owner/name"})
                hub.branches["main"] = {".gitattributes": b"*.safetensors filter=lfs"}
                hub.private = bool(body.get("private")) or body.get("visibility") == "private"
                return self.reply(200, {"url": f"{hub.url}/{body['organization']}/{body['name']}"})

            def read(self, parts: list[str]) -> None:
                if parts[:4] == API and "main" in hub.branches:
                    files = hub.branches.get(parts[5] if len(parts) > 5 else "main", {})
                    if parts[4:5] == ["tree"]:
                        return self.reply(200, [entry(*item) for item in files.items()])
                    body = {"id": "owner/name", "private": hub.private, "sha": "c" * 40, "siblings": []}
                    return self.reply(200, body)
                if parts[:3] == ["owner", "name", "resolve"] and parts[4] in hub.branches.get(parts[3], {}):
                    data = hub.branches[parts[3]][parts[4]]
                    etag = f'"{hashlib.sha1(data).hexdigest()}"'
                    return self.reply(200, data, ETag=etag, X_Repo_Commit="c" * 40, Accept_Ranges="bytes")
                return self.reply(404, {"error": "not found"}, X_Error_Code="RepoNotFound")

        def preupload(file: dict[str, Any]) -> dict[str, Any]:
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            return {"path": file["path"], "uploadMode": mode, "shouldIgnore": file["path"] in hub.ignored}

        def upload(item: dict[str, Any]) -> dict[str, Any]:
            there = item["oid"] in hub.objects
            return item if there else item | {"actions": {"upload": {"href": f"{hub.url}/upload/{item['oid']}"}}}

        def entry(name: str, data: bytes) -> dict[str, Any]:
            digest = hashlib.sha256(data).hexdigest()
            lfs = {"size": len(data), "oid": digest, "pointerSize": 134} if digest in hub.objects else None
            return {"type": "file", "path": name, "size": len(data), "oid": digest[:40]} | ({"lfs": lfs} if lfs else {})

        def commit(files: dict[str, bytes], data: bytes) -> None:
            for line in data.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
                elif item["key"] == "deletedFile":
                    del files[value["path"]]

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def commits(self) -> list[str]:
        return [line for line in self.requests if "/commit/" in line]


@pytest.fixture
def hub() -> Iterator[Hub]:
    stand_in = Hub()
    thread = threading.Thread(target=stand_in.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield stand_in
    stand_in.server.shutdown()
    thread.join()
    stand_in.server.server_close()


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A finished repository with a card, an embedded loader, and entries that stay at home."""
    with new_writer(tmp_path / "release") as writer:
        every_setting(writer)
        writer.add_file(b"{}", "support", "config.json")
        writer.add_file(b"x", "document", "LICENSE")
        repo = writer.finish()
    embed(repo)
    (repo / "README.md").write_text("---\nlicense: mit\n---\ncard")
    (repo / ".cache").mkdir()
    (repo / ".cache" / "secret").write_text("stays at home")
    (repo / "__pycache__").mkdir()
    return repo


NAMES = {MANIFEST, "README.md", "load_quantized.py", "config.json", "LICENSE", PAYLOAD}


Push = Callable[..., "Outcome"]


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def push(hub: Hub, release: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Push:
    """Runs the command in this process, in which huggingface_hub then knows the stand-in alone."""
    from huggingface_hub import constants

    from reference_quantizer.__main__ import main

    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(release.parent / "token"))

    def run(repo: Path, *options: str, token: str = TOKEN) -> Outcome:
        monkeypatch.setenv("HF_TOKEN", token)
        code = main(["push", str(repo), "owner/name", *options])
        return Outcome(code, *capsys.readouterr())

    return run


def test_what_arrives_is_the_release_and_no_more(hub: Hub, push: Push, release: Path) -> None:
    done = push(release, "--private", "--message", "first")
    assert done.code == 0, done.err
    there = {name: data for name, data in hub.branches["main"].items() if name != ".gitattributes"}
    assert there == {name: (release / name).read_bytes() for name in NAMES}
    assert hub.private and len(hub.commits()) == 1 and len(hub.objects) == 1
    assert f"{hub.url}/owner/name/commit/" in done.out

    # a second release with other files: the old ones go, the weights that are there are not sent again
    with new_writer(release.parent / "second") as writer:
        every_setting(writer)
        writer.add_file(b"y", "document", "NOTICE")
        second = writer.finish()
    done = push(second, "--private")
    assert done.code == 0, done.err
    assert set(hub.branches["main"]) == {".gitattributes", "README.md", MANIFEST, PAYLOAD, "NOTICE"}
    assert hub.branches["main"][MANIFEST] == (second / MANIFEST).read_bytes()
    assert sum(line.startswith("PUT") for line in hub.requests) == len(hub.objects) == 1
    assert "LICENSE" in done.err and "no README.md" in done.err


def test_a_branch(hub: Hub, push: Push, release: Path) -> None:
    done = push(release, "--branch", "4bit")
    assert done.code == 0, done.err
    assert set(hub.branches["main"]) == {".gitattributes"} and set(hub.branches["4bit"]) > NAMES


def test_a_dry_run_sends_nothing(hub: Hub, push: Push, release: Path) -> None:
    done = push(release, "--dry-run", token="")
    assert done.code == 0, done.err
    assert hub.requests == []
    listed = {line.split()[0] for line in done.out.splitlines() if line.endswith(("B", "KiB", "MiB"))}
    total = sum((release / name).stat().st_size for name in NAMES)
    assert listed == NAMES and f"{len(NAMES)} files, {total:,} bytes" in done.out and "nothing was sent" in done.out


def test_without_a_token(hub: Hub, push: Push, release: Path) -> None:
    done = push(release, token="")
    assert done.code == 1 and hub.requests == []
    assert "hf auth login" in done.err and "Traceback" not in done.err


@pytest.mark.parametrize("kind", ["refused token", "public", "other work", "gitignore"])
def test_what_the_hub_may_object(hub: Hub, push: Push, release: Path, kind: str) -> None:
    options, token, words = (), TOKEN, "401"
    if kind == "refused token":
        token = "hf_other"
    elif kind == "public":
        hub.branches["main"] = {}
        options, words = ("--private",), "is public"
    elif kind == "other work":
        hub.branches["main"] = {"model.safetensors": b"x"}
        words = "no tqformat repository"
    else:
        hub.ignored, words = {"config.json"}, "config.json is missing"
    done = push(release, *options, token=token)
    assert done.code == 1 and words in done.err and "Traceback" not in done.err, done.err
    assert len(hub.commits()) == (kind == "gitignore")


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        ("missing", "BIND.MISSING_FILE"),
        ("extra", "BIND.EXTRA_FILE"),
        ("folder", "BIND.EXTRA_FILE"),
        ("changed", "BIND.DIGEST"),
        ("weights", "BIND.DIGEST"),
        ("link", "PATH.TYPE"),
        ("card", "PATH.TYPE"),
    ],
)
def test_a_faulty_release_is_refused(release: Path, damage: str, code: str) -> None:
    assert {item.name for item in check_release(release)} == NAMES
    if damage == "missing":
        (release / "LICENSE").unlink()
    elif damage == "extra":
        (release / "notes.txt").write_text("")
    elif damage == "folder":
        (release / "onnx").mkdir()
    elif damage == "changed":
        (release / "LICENSE").write_text("y")
    elif damage == "weights":
        data = bytearray((release / PAYLOAD).read_bytes())
        data[-1] ^= 1
        (release / PAYLOAD).write_bytes(data)
    elif damage == "link":
        shutil.move(release / "LICENSE", release.parent / "LICENSE")
        (release / "LICENSE").symlink_to(release.parent / "LICENSE")
    else:
        (release / "README.md").unlink()
        (release / "README.md").symlink_to(release / "config.json")
    with pytest.raises(TQFormatError) as caught:
        check_release(release)
    assert caught.value.code == code


def test_an_id_without_an_owner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from reference_quantizer.__main__ import main

    assert main(["push", str(tmp_path), "name", "--dry-run"]) == 1
    assert main(["push", str(tmp_path / "none"), "owner/name", "--dry-run"]) == 1
    assert "SCHEMA.VALUE" in (text := capsys.readouterr().err) and "BIND.MISSING_FILE" in text


# ------------------------------------------------------------------------------------------------ the card


@pytest.fixture
def carded(tmp_path: Path) -> Path:
    """A finished repository with an evaluation and a card of ours."""
    repo = layered(tmp_path / "carded", (4,), layers=1)
    evaluation(repo, 1.1)
    card.write_card(repo)
    return repo


def test_a_card_of_another_evaluation_is_refused(hub: Hub, push: Push, carded: Path) -> None:
    evaluation(carded, 1.2)
    for options in ([], ["--dry-run"]):
        done = push(carded, *options)
        assert done.code == 1 and "error [EVAL.CARD] README.md" in done.err and "run `card` again" in done.err
    assert hub.requests == []
    card.write_card(carded)
    assert push(carded, "--dry-run").code == 0


def test_evaluate_says_that_the_card_is_out_of_date(carded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    from reference_quantizer.commands import evaluate as command
    from reference_quantizer.evaluation import evaluate

    for ratio in (1.1, 1.3):  # the figures that the card states, and others
        args = argparse.Namespace(source="base", repo=carded)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(command, "evaluation_options", lambda _: {})
            patch.setattr(command, "evaluation_settings", lambda _, ratio=ratio: ratio)
            args.revision = args.dataset = args.tasks = args.tasks_dir = args.tasks_limit = None
            patch.setattr(evaluate, "evaluate", lambda *given, **_: evaluation(carded, given[3]))
            patch.setattr(evaluate, "describe", lambda *_: "figures")
            assert command.run_evaluate(args) == 0
        err = capsys.readouterr().err
        wanted = f"note: README.md is out of date now; write it again: python -m reference_quantizer card {carded}\n"
        assert err == ("" if ratio == 1.1 else wanted)


def test_the_card_gets_the_id(hub: Hub, push: Push, carded: Path) -> None:
    before = (carded / "README.md").read_bytes()
    done = push(carded, "--dry-run")
    assert done.code == 0 and "note: README.md will be written again, with owner/name" in done.err
    assert (carded / "README.md").read_bytes() == before
    done = push(carded)
    assert done.code == 0, done.err
    after = (carded / "README.md").read_text("utf-8")
    assert "written again, with owner/name" in done.err and 'tqformat.load("owner/name"' in after
    assert hub.branches["main"]["README.md"] == after.encode()
    done = push(carded)
    assert done.code == 0 and "again" not in done.err


def test_a_card_that_was_edited_stays(hub: Hub, push: Push, carded: Path) -> None:
    page = carded / "README.md"
    page.write_text(edited := page.read_text("utf-8").replace("owner/name", "OWNER/NAME") + "\nOurs.\n", "utf-8")
    done = push(carded)
    assert done.code == 0 and "warning: README.md does not name owner/name; it was edited" in done.err
    assert hub.branches["main"]["README.md"] == edited.encode()


@pytest.mark.parametrize("answer", ["mit", None])
def test_a_card_without_a_licence(
    hub: Hub, push: Push, carded: Path, answer: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_manifest(carded, lambda m: m["base_model"].update(license=None))
    card.write_card(carded)
    done = push(carded, "--dry-run")
    assert done.code == 1 and "error [SCHEMA.VALUE] README.md: it names no licence" in done.err
    assert "--license-unknown" in done.err and f"card {carded} --license ID" in done.err
    assert push(carded, "--dry-run", "--license-unknown").code == 0
    monkeypatch.setattr(base, "_ask", lambda question: answer)
    done = push(carded)
    if answer is None:
        assert done.code == 1 and hub.requests == [] and push(carded, "--license-unknown").code == 0
    else:
        assert done.code == 0 and b"\nlicense: mit\n" in hub.branches["main"]["README.md"]
        assert json.loads(hub.branches["main"][MANIFEST])["base_model"]["license"] == "mit"


def test_what_is_recorded_of_the_base_can_be_corrected(carded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from reference_quantizer.__main__ import main

    assert main(["card", str(carded), "--base-model", "org/other", "--license", "mit"]) == 0
    assert main(["card", str(carded), "--base-model", "no id"]) == 1
    assert "expected a Hub id" in capsys.readouterr().err
    facts = [json.loads((carded / name).read_bytes()) for name in (MANIFEST, *base.EVALUATION)]
    assert facts[0]["base_model"] == {"id": "org/other", "revision": "0123abc", "license": "mit"}
    assert [value["base_model"] for value in facts[1:]] == ["org/other"] * 2
    text = (carded / "README.md").read_text("utf-8")
    assert "base_model: org/other" in text and "license: mit" in text and not card.is_stale(carded)
    check_release(carded)
    verdict = card.conformance(carded)
    assert verdict["level_passed"] == "L3", verdict["violations"]
