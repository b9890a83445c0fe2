"""The JavaScript reader in Node: all vectors through the runner; its sources, digests and parts of weights."""

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from ranges import RangeServer

from conformance.vectors import ROOT as VECTORS

READER = ROOT / "readers" / "javascript"
NODE = shutil.which("node")
OLDEST = 20  # of Node


def node_version() -> int:
    if NODE is None:
        return 0
    done = subprocess.run([NODE, "--version"], capture_output=True, text=True, check=True)
    return int(done.stdout.lstrip("v").partition(".")[0])


pytestmark = pytest.mark.skipif(node_version() < OLDEST, reason=f"needs Node {OLDEST} or newer")
REPO = VECTORS / "valid" / "repository" / "typical" / "repo"
PAYLOAD = "turboquant_weights.safetensors"


def script(body: str, *arguments: object, stdin: str = "") -> Any:
    """What a script of Node prints, as JSON; the reader is `tq`, and `hex` shows bytes."""
    head = f"""
        import * as tq from {json.dumps((READER / "tqformat.mjs").as_uri())};
        const hex = (bytes) => Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString("hex");
        const print = (value) => process.stdout.write(JSON.stringify(value));
        const [, ...args] = process.argv;
    """
    assert NODE is not None
    command = [NODE, "--input-type=module", "--eval", head + body, *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_all_vectors_are_green(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    entrypoint = shlex.join([str(NODE), str(READER / "adapter.mjs")])
    command = [sys.executable, "-m", "conformance", "run", "--entrypoint", entrypoint]
    done = subprocess.run([*command, "--json", str(report)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "0 crashes, 0 errored; 0 not implemented" in done.stdout


@pytest.mark.parametrize("length", [0, 1, 55, 56, 63, 64, 65, 119, 120, 128, 1000, 100_003])
def test_sha256_is_that_of_hashlib(length: int) -> None:
    data = bytes(i * i % 251 for i in range(length))
    whole, parts = script(
        """
        const data = Uint8Array.from({ length: Number(args[0]) }, (_, i) => (i * i) % 251);
        const whole = new tq.Sha256();
        whole.update(data);
        const parts = new tq.Sha256();
        for (let at = 0, n = 0; at < data.length; at += n, n = (n % 97) + 1) parts.update(data.subarray(at, at + n));
        print([whole.hex(), parts.hex()]);
        """,
        length,
    )
    assert whole == parts == hashlib.sha256(data).hexdigest()


DECODE = """
    const decode = async (source) => {
      const repository = await tq.openRepository(source);
      await repository.verify();
      const result = {};
      for (const name of repository.manifest.tensors.keys()) result[name] = hex((await repository.decode(name)).bytes);
      return result;
    };
"""


def test_a_repository_is_the_same_from_disk_from_blobs_and_by_ranges() -> None:
    with RangeServer(REPO) as server:
        disk, blobs, ranges, counted = script(
            DECODE
            + """
            import { readFile } from "node:fs/promises";
            const files = new Map();
            for (const name of args.slice(2)) files.set(name, new Blob([await readFile(`${args[0]}/${name}`)]));
            let counted = 0;
            const http = tq.address(args[1], { onBytes: (n) => (counted += n) });
            const sources = [tq.directory(args[0]), tq.blobs(files), http];
            print([...(await Promise.all(sources.map(decode))), counted]);
            """,
            REPO,
            server.url,
            "quant_manifest.json",
            PAYLOAD,
        )
    assert len(disk) >= 2 and all(disk.values())
    assert disk == blobs == ranges
    assert counted == sum(server.sent.values()) and server.sent.keys() == {"quant_manifest.json", PAYLOAD}


def test_opening_by_ranges_fetches_manifest_and_headers_and_no_more(tmp_path: Path) -> None:
    """The typical repository, with a mebibyte more of payload in one tensor, and 20 kB more of manifest."""
    repo = shutil.copytree(REPO, tmp_path / "repo")
    manifest = json.loads((repo / "quant_manifest.json").read_text("utf-8"))
    data = (repo / PAYLOAD).read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:length])
    more, held = 2**20, len(data) - length
    header["more"] = {"dtype": "U8", "shape": [more], "data_offsets": [held, held + more]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    data = len(text).to_bytes(8, "little") + text + data[length:] + bytes(more)
    (repo / PAYLOAD).write_bytes(data)
    manifest["tensors"]["more"] = {"kind": "passthrough", "shape": [more], "dtype": "U8", "data": "more"}
    manifest["files"][PAYLOAD] = {"role": "payload", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    totals = manifest["accounting"]
    for key, add in {
        "original_bytes": more,
        "stored_bytes": more,
        "passthrough_tensors": 1,
        "passthrough_scalars": more,
    }.items():
        totals[key] += add
    totals["ratio"] = totals["original_bytes"] / totals["stored_bytes"]
    manifest["extra"] = {"padding": "x" * 20_000}
    (repo / "quant_manifest.json").write_text(json.dumps(manifest))
    with RangeServer(repo) as server:
        names = script(
            "print([...(await tq.openRepository(tq.address(args[0]))).manifest.tensors.keys()]);", server.url
        )
    assert "more" in names
    probe = 2**14
    assert server.sent == {"quant_manifest.json": (repo / "quant_manifest.json").stat().st_size, PAYLOAD: probe}


def test_a_server_without_ranges_is_told_of(tmp_path: Path) -> None:
    with RangeServer(REPO, ranges=False) as server:
        found = script("print(await tq.openRepository(tq.address(args[0])).catch(String));", server.url)
    assert found == "Error: turboquant_weights.safetensors: expected status 206, an answer to a range, got status 200"


@pytest.mark.parametrize(("file", "code"), [(PAYLOAD, "BIND.DIGEST"), ("quant_manifest.json", "JSON.SYNTAX")])
def test_a_changed_byte_is_noticed(tmp_path: Path, file: str, code: str) -> None:
    repo = shutil.copytree(REPO, tmp_path / "repo")
    data = bytearray((repo / file).read_bytes())
    data[-1] ^= 1
    (repo / file).write_bytes(data)
    found = script(DECODE + "print(await decode(tq.directory(args[0])).catch((error) => error.code));", repo)
    assert found == code


@pytest.mark.parametrize("case", ["codebooks/rows-vector-tiles", "stages/tile-heights"])
def test_rows_of_a_weight_are_those_of_the_whole(case: str) -> None:
    repo = VECTORS / "valid" / case / "repo"
    whole, parts = script(
        """
        const repository = await tq.openRepository(tq.directory(args[0]));
        const [[name, { rows }]] = repository.manifest.tensors;
        const whole = hex((await repository.decode(name)).bytes);
        const parts = [];
        for (let begin = 0; begin < rows; begin += 3) {
          parts.push(hex((await repository.decode(name, { begin, end: begin + 3 })).bytes));
        }
        print([whole, parts]);
        """,
        repo,
    )
    assert len(parts) > 1 and "".join(parts) == whole


def known(name: str) -> Any:
    return json.loads((VECTORS / "known" / f"{name}.json").read_text("utf-8"))


def test_parts_of_the_decoder_give_the_known_answers() -> None:
    tiles, factors, floats = known("packing")["tiles"], known("hadamard")["factors"], known("float8")["values"]
    answers = script(
        """
        import { readFileSync } from "node:fs";
        const [tiles, orders, dtypes] = JSON.parse(readFileSync(0, "utf8"));
        const symbols = tiles.map(({ n, bits, window, hex }) => {
          const result = new Uint16Array(n);
          tq.unpack(Buffer.from(hex, "hex"), 0, bits, window, result);
          return [...result];
        });
        const rows = orders.map((f) => Array.from(tq.hadamardFactor(f), (x) => (x > 0 ? "+" : "-")).join(""));
        const bytes = Uint8Array.from({ length: 256 }, (_, i) => i);
        print([symbols, rows, dtypes.map((dtype) => [...tq.toNumbers(bytes, dtype)])]);
        """,
        stdin=json.dumps([tiles, [factor["order"] for factor in factors], list(floats)]),
    )
    assert answers[0] == [tile["symbols"] for tile in tiles]
    assert answers[1] == ["".join(factor["rows"]) for factor in factors]
    # JSON.stringify writes NaN as null, and of a float the shortest decimal that is read back as the same float
    found = [[None if x is None else float(x) for x in values] for values in answers[2]]
    assert found == [[None if x is None else float.fromhex(x) for x in values] for values in floats.values()]


def test_links_are_followed_only_where_they_are_wanted(tmp_path: Path) -> None:
    for file in REPO.iterdir():
        (tmp_path / file.name).symlink_to(file)
    refused, followed = script(
        DECODE
        + """
        const refused = await tq.openRepository(tq.directory(args[0])).catch((error) => [error.code, error.where]);
        print([refused, Object.keys(await decode(tq.directory(args[0], { links: true })))]);
        """,
        tmp_path,
    )
    assert refused == ["PATH.TYPE", "quant_manifest.json"]
    assert followed == list(json.loads((REPO / "quant_manifest.json").read_text("utf-8"))["tensors"])
