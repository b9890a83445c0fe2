"""The inspector page: in Node on a stand-in for the DOM, and in a browser where playwright and one are there.

pip install playwright; CHROMIUM=/path/to/chromium python -m pytest tests/readers/test_inspector.py
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from ranges import RangeServer
from test_javascript import NODE, OLDEST, REPO, node_version

PAGE = ROOT / "docs" / "inspector"
SECTIONS = ["Bits by layer", "Storage", "Evaluation", "Digests", "A weight"]
MANIFEST = json.loads((REPO / "quant_manifest.json").read_text("utf-8"))
needs_node = pytest.mark.skipif(node_version() < OLDEST, reason=f"needs Node {OLDEST} or newer")


def run_page(address: str) -> Any:
    command = [str(NODE), str(ROOT / "tests" / "readers" / "page.mjs"), (PAGE / "inspector.mjs").as_uri(), address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_node
def test_the_page_shows_checks_and_decodes_a_repository() -> None:
    with RangeServer(REPO) as server:
        found = run_page(server.url)
    assert re.search(r"The manifest of .* obeys the format; .* [0-9,]+ bytes were fetched\.$", found["opened"])
    assert re.search(r" obeys the format: .* [0-9,]+ bytes were fetched\.$", found["whole"])
    assert [line.split()[1] for line in found["decoded"]] == list(MANIFEST["tensors"])
    assert found["verified"].startswith("Digests verified")
    assert all(title in found["text"] for title in [MANIFEST["base_model"]["id"], *SECTIONS])
    assert found["text"].count(" verified") == len([name for name in MANIFEST["files"] if (REPO / name).exists()])


@needs_node
@pytest.mark.parametrize("compressed", [False, True])
def test_the_page_fetches_the_manifest_alone_until_a_section_is_opened(compressed: bool) -> None:
    with RangeServer(REPO, compressed=compressed) as server:
        found = run_page(server.url)
        sizes = [
            int(re.findall(r"([0-9,]+) bytes were", found[key])[0].replace(",", "")) for key in ("opened", "whole")
        ]
    sent, whole = server.sent["quant_manifest.json"], (REPO / "quant_manifest.json").stat().st_size
    assert sizes[0] == sent < sizes[1] and (sent < whole / 2 if compressed else sent == whole)


@needs_node
def test_the_page_tells_of_a_changed_payload(tmp_path: Path) -> None:
    repo = shutil.copytree(REPO, tmp_path / "repo")
    payload = repo / "turboquant_weights.safetensors"
    data = bytearray(payload.read_bytes())
    data[-1] ^= 1
    payload.write_bytes(data)
    with RangeServer(repo) as server:
        found = run_page(server.url)
    assert found["verified"] == "1 files are not what the manifest says."
    assert "[BIND.DIGEST] turboquant_weights.safetensors" in found["text"]


@needs_node
def test_the_page_tells_of_a_manifest_that_breaks_a_rule(tmp_path: Path) -> None:
    repo = shutil.copytree(REPO, tmp_path / "repo")
    (repo / "quant_manifest.json").write_text(json.dumps(MANIFEST | {"loader_kind": "<b>image</b>"}))
    with RangeServer(repo) as server:
        found = run_page(server.url)
    assert found["opened"].startswith("[SCHEMA.VALUE] loader_kind: expected one of") and found["text"] == ""


def with_evaluation(path: Path, text: str) -> Path:
    """The typical repository with `text` as its evaluation."""
    repo = shutil.copytree(REPO, path / "repo")
    (repo / "eval_summary.json").write_text(text)
    entry = {"role": "document", "size": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    files = MANIFEST["files"] | {"eval_summary.json": entry}
    (repo / "quant_manifest.json").write_text(json.dumps(MANIFEST | {"files": files}))
    return repo


@needs_node
def test_the_page_shows_an_evaluation(tmp_path: Path) -> None:
    figures = {
        "dataset": {"id": "owner/corpus"},
        "settings": {"max_length": 512},
        "windows": 7,
        "base": {"perplexity": 12.3456},
        "quantized": {"perplexity": 13.579},
        "perplexity_ratio": 13.579 / 12.3456,
        "kl_divergence": {"mean": 0.0625},
        "top1_agreement": {"rate": 0.9375},
    }
    with RangeServer(with_evaluation(tmp_path, json.dumps(figures))) as server:
        text = run_page(server.url)["text"]
    assert all(
        shown in text for shown in ("12.346", "13.579", "1.0999", "0.06250", "93.75 %", "owner/corpus, 7 windows")
    )


@needs_node
def test_an_evaluation_that_cannot_be_read_hides_nothing_else(tmp_path: Path) -> None:
    with RangeServer(with_evaluation(tmp_path, "{}")) as server:
        found = run_page(server.url)
    assert "obeys the format:" in found["whole"] and all(title in found["text"] for title in SECTIONS)
    assert "Cannot read properties of undefined" in found["text"]


def test_the_page_refers_to_what_is_there() -> None:
    """A browser is not at hand everywhere: its files exist, and the ids that the program asks for are in the page."""
    html, program = ((PAGE / name).read_text("utf-8") for name in ("index.html", "inspector.mjs"))
    for link in re.findall(r'(?:href|src)="([^"]+)"', html) + re.findall(r'from "([^"]+)"', program):
        assert (PAGE / link).is_file(), link
    made = set(re.findall(r'\bid: "([^"]+)"', program))
    assert set(re.findall(r'getElementById\("([^"]+)"\)', program)) <= set(re.findall(r'\bid="([^"]+)"', html)) | made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright")
    with sync_api.sync_playwright() as playwright:
        try:
            # inside containers Chromium's own sandbox cannot be built
            found = playwright.chromium.launch(executable_path=os.environ.get("CHROMIUM"), args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield found
        found.close()


@pytest.mark.parametrize("way", ["address", "folder"])
def test_the_page_in_a_browser(browser: Any, tmp_path: Path, way: str) -> None:
    for folder in ("docs", "readers"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    repo = shutil.copytree(REPO, tmp_path / "repo")
    faults: list[str] = []
    with RangeServer(tmp_path) as server:
        page = browser.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.goto(f"{server.url}/docs/inspector/index.html" + ("?repo=/repo" if way == "address" else ""))
        if way == "folder":
            page.set_input_files("#folder", repo)
        page.wait_for_selector("details")
        for heading in page.locator("summary").all():
            heading.click()
        page.wait_for_selector("#weight")
        assert page.locator("h2").all_inner_texts() == [MANIFEST["base_model"]["id"], *SECTIONS]
        page.get_by_role("button", name="Decode").click()
        page.wait_for_selector("svg[role=img]")
        page.get_by_role("button", name="Verify").click()
        page.wait_for_selector("td.good")
        page.get_by_text("Digests verified").wait_for()
        page.close()
    assert not faults
