"""Loading from a Hub id, against a stand-in Hub on this machine's loopback: what is asked for, and of which commit."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
import transformers
from conftest import repo_from_checkpoint, run_python

from tqformat import add_files, load, load_state_dict
from tqformat.embed import embed

COMMITS = ["a" * 40, "b" * 40]
NEEDED = {"quant_manifest.json", "turboquant_weights.safetensors", "config.json", "generation_config.json"}
LIMIT = 200  # requests per test


class Hub:
    """Repository directories by commit, served as owner/name; `main` is the newest and moves on after `moves_after` requests."""

    def __init__(self) -> None:
        self.commits: dict[str, Path] = {}
        self.head, self.moves_to = COMMITS[0], ""
        self.requests: list[tuple[str, str]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key.replace("_", "-"), value)
                self.send_header("Content-Length", headers.get("length", str(len(body))))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.requests.append((self.command, path))
                if len(hub.requests) > LIMIT:
                    return self.reply(429)
                parts = path.strip("/").split("/")
                if parts[:4] == ["api", "models", "owner", "name"] and len(parts) in (4, 6, 7):
                    return self.info(parts)
                if parts[:3] == ["owner", "name", "resolve"] and len(parts) == 5:
                    return self.resolve(parts[3], parts[4])
                return self.reply(404, x_error_code="RepoNotFound")

            do_HEAD = do_GET

            def commit(self, revision: str) -> str | None:
                commit = hub.head if revision == "main" else revision
                return commit if commit in hub.commits else None

            def info(self, parts: list[str]) -> None:
                commit = self.commit(parts[5] if len(parts) > 5 else "main")
                if commit is None:
                    return self.reply(404, x_error_code="RevisionNotFound")
                files = sorted(file.name for file in hub.commits[commit].iterdir())
                if parts[4:5] == ["tree"]:
                    sizes = {name: (hub.commits[commit] / name).stat().st_size for name in files}
                    body: Any = [{"type": "file", "path": n, "size": s, "oid": n} for n, s in sizes.items()]
                else:
                    body = {"id": "owner/name", "sha": commit, "siblings": [{"rfilename": name} for name in files]}
                self.reply(200, json.dumps(body).encode(), Content_Type="application/json")
                return None

            def resolve(self, revision: str, name: str) -> None:
                commit = self.commit(revision)
                if commit is None:
                    return self.reply(404, x_error_code="RevisionNotFound")
                file = hub.commits[commit] / name
                if not file.is_file():
                    return self.reply(404, x_error_code="EntryNotFound", X_Repo_Commit=commit)
                body = file.read_bytes()
                etag = hashlib.sha1(body).hexdigest()
                if self.command == "GET" and hub.moves_to:
                    hub.head = hub.moves_to  # somebody pushes while we download
                return self.reply(200, body, ETag=f'"{etag}"', X_Repo_Commit=commit, Accept_Ranges="bytes")

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def fetched(self) -> set[str]:
        """The names of the files that were downloaded."""
        return {path.split("/")[-1] for command, path in self.requests if command == "GET" and "/resolve/" in path}

    def touched(self) -> set[tuple[str, str]]:
        """(revision, file) of everything that was asked for by name."""
        return {(path.split("/")[4], path.split("/")[5]) for _, path in self.requests if "/resolve/" in path}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository as it lies on the Hub: with a card, a loader, a licence and git's own file."""
    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(root / "checkpoint")
    repo = repo_from_checkpoint(root / "checkpoint", root / "repo", "text-generation")
    add_files(
        repo,
        {"LICENSE": ("document", b"x"), "report.json": ("document", b"{}"), "extra.py": ("code", b"raise SystemExit")},
    )
    embed(repo)
    (repo / "README.md").write_text("card")
    (repo / ".gitattributes").write_text("*.safetensors filter=lfs")
    return repo


@pytest.fixture
def hub(published: Path) -> Iterator[Hub]:
    stand_in = Hub()
    stand_in.commits[COMMITS[0]] = published
    thread = threading.Thread(target=stand_in.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield stand_in
    stand_in.server.shutdown()
    thread.join()
    stand_in.server.server_close()
    assert len(stand_in.requests) <= LIMIT


def ask(hub: Hub, tmp_path: Path, code: str, online: bool = True, url: str = "") -> tuple[int, str, str]:
    """Runs code in a process whose Hub is the stand-in (or `url`); exit code, output and errors."""
    env = {
        "HF_ENDPOINT": url or hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0" if online else "1", "NO_PROXY": "*",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_TOKEN": "",
    }  # fmt: skip
    done = run_python("-c", "import tqformat\n" + code, env=env, cwd=tmp_path)
    return done.returncode, done.stdout.strip(), done.stderr


LOAD = """
import torch
model = tqformat.load("owner/name")
torch.save(dict(model.state_dict()), "out.pt")
assert model.name_or_path == model.config.name_or_path == "owner/name"
print(tqformat.fetch("owner/name"))
"""


def test_load_asks_for_what_it_needs_and_no_more(hub: Hub, published: Path, tmp_path: Path) -> None:
    code, out, err = ask(hub, tmp_path, LOAD)
    assert code == 0, err
    assert hub.fetched() == NEEDED
    assert {name for _, name in hub.touched()} == NEEDED
    assert sorted(p.name for p in Path(out).iterdir()) == sorted(NEEDED) and Path(out).name == COMMITS[0]
    got, want = torch.load(tmp_path / "out.pt", weights_only=True), load(published).state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)

    # from the cache: one question, none if told to be offline or if the revision is a commit
    for online, revision, questions in ((True, None, 1), (False, None, 0), (True, COMMITS[0], 0)):
        count = len(hub.requests)
        code, again, err = ask(hub, tmp_path, f"print(tqformat.fetch('owner/name', {revision!r}))", online)
        assert (code, again, err) == (0, out, "")
        assert len(hub.requests[count:]) == questions


DEAD = "http://127.0.0.1:9"


def test_without_a_network_the_cache_is_enough(hub: Hub, tmp_path: Path) -> None:
    assert ask(hub, tmp_path, "tqformat.fetch('owner/name')")[0] == 0
    code, _, err = ask(hub, tmp_path, LOAD, url=DEAD)
    assert code == 0, err
    assert "UserWarning: owner/name: commit " + COMMITS[0] in err and "comes from the cache" in err
    assert "Retrying" not in err  # huggingface_hub waits between attempts, which it announces
    code, _, err = ask(hub, tmp_path, f"tqformat.load('owner/name', revision={COMMITS[0]!r})", url=DEAD)
    assert (code, "Warning" in err, "Retrying" in err) == (0, False, False), err


def test_what_comes_from_the_cache_is_checked_too(hub: Hub, tmp_path: Path) -> None:
    _, out, _ = ask(hub, tmp_path, "print(tqformat.fetch('owner/name'))")
    payload = (Path(out) / "turboquant_weights.safetensors").resolve()
    data = payload.read_bytes()
    payload.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for url in (DEAD, hub.url):
        code, out, err = ask(hub, tmp_path, CAUGHT % "", url=url)
        assert code == 0 and out.startswith("BIND.DIGEST"), err


def test_a_snapshot_in_the_cache_that_lacks_a_file(hub: Hub, tmp_path: Path) -> None:
    """Without the Hub it is no repository; with it, the file is fetched again."""
    _, folder, _ = ask(hub, tmp_path, "print(tqformat.fetch('owner/name'))")
    for name in ("config.json", "quant_manifest.json"):
        (Path(folder) / name).resolve().unlink()
        (Path(folder) / name).unlink()
        for options in ({"url": DEAD}, {"online": False}):
            code, out, err = ask(hub, tmp_path, CAUGHT % "", **options)  # type: ignore[arg-type]
            assert code == 0 and out.startswith("BIND.MISSING_FILE owner/name"), (out, err)
        code, out, err = ask(hub, tmp_path, "print(tqformat.fetch('owner/name'))")
        assert (code, out) == (0, folder) and (Path(folder) / name).is_file(), err


def test_an_unknown_name_says_what_is_not_there_and_what_the_hub_said(hub: Hub, tmp_path: Path) -> None:
    hub.commits = {}
    code, out, err = ask(
        hub, tmp_path, "try: tqformat.load('owner/name')\nexcept tqformat.TQFormatError as e: print(e)"
    )
    assert code == 0 and "expected such a directory" in out and "404" in out, (out, err)


def test_both_downloads_are_of_one_commit(hub: Hub, published: Path, tmp_path: Path) -> None:
    """Somebody pushes another version between the manifest and the weights."""
    newer = Path(shutil.copytree(published, tmp_path / "newer"))
    add_files(newer, {"config.json": ("support", b'{"model_type": "bert"}')})
    hub.commits[COMMITS[1]] = newer
    hub.moves_to = COMMITS[1]
    code, out, err = ask(hub, tmp_path, "print(tqformat.fetch('owner/name'))")
    assert code == 0, err
    assert Path(out).name == COMMITS[0] and hub.head == COMMITS[1]
    assert {revision for revision, _ in hub.touched()} == {COMMITS[0]}


def test_a_revision_is_respected(hub: Hub, published: Path, tmp_path: Path) -> None:
    hub.commits[COMMITS[1]] = published
    code, out, err = ask(hub, tmp_path, f"print(tqformat.fetch('owner/name', revision={COMMITS[1]!r}))")
    assert code == 0, err
    assert Path(out).name == COMMITS[1] and {revision for revision, _ in hub.touched()} == {COMMITS[1]}
    values = load_state_dict(Path(out))
    assert values.keys() == load_state_dict(published).keys()


def test_code_is_fetched_only_on_request(hub: Hub, tmp_path: Path) -> None:
    code, _, err = ask(hub, tmp_path, "tqformat.fetch('owner/name', code=True)")
    assert code == 0, err
    assert hub.fetched() == NEEDED | {"load_quantized.py", "extra.py"}


CAUGHT = """
try:
    tqformat.open_repo(tqformat.fetch("owner/name"%s))
except tqformat.TQFormatError as error:
    print(error.code, error.where, "|", str(error).count(chr(10)))
"""


@pytest.mark.parametrize("kind", ["no manifest", "no repository", "no revision", "no weights", "damaged"])
def test_errors(hub: Hub, published: Path, tmp_path: Path, kind: str) -> None:
    broken = Path(shutil.copytree(published, tmp_path / "broken"))
    hub.commits = {COMMITS[0]: broken} if kind != "no repository" else {}
    wanted = "BIND.MISSING_FILE"
    if kind == "no manifest":
        (broken / "quant_manifest.json").unlink()
    elif kind == "no weights":
        (broken / "turboquant_weights.safetensors").unlink()
    elif kind == "damaged":
        with open(broken / "turboquant_weights.safetensors", "r+b") as file:
            file.seek(-1, 2)
            file.write(b"\xff")
        wanted = "BIND.DIGEST"
    arguments = ", revision='none'" if kind == "no revision" else ""
    code, out, err = ask(hub, tmp_path, CAUGHT % arguments)
    assert code == 0, err
    assert out.startswith(wanted) and out.endswith("| 0"), out
    if kind == "no manifest":
        assert "manifest" in out and not hub.fetched()


@pytest.mark.parametrize(
    "name", ["no/such/path", "name", "./missing", "/missing", "../a", "own er/name", "~/name", "there/name"]
)
def test_what_is_neither_a_directory_nor_an_id_asks_nobody(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from tqformat import TQFormatError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda *_, **__: pytest.fail("the Hub was asked"))
    (tmp_path / "there").mkdir()
    with pytest.raises(TQFormatError, match=r"BIND\.MISSING_FILE.*and this is neither"):
        load(name)
