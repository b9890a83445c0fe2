"""What the validator says of evaluations and of cards that state other ones, on files made by hand (SPEC.md section 20)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_validator import PAYLOAD, Repo, judged, repo

from conformance import checks_evaluation

SUMMARY, MARKER = "eval_summary.json", "<!-- tqformat-card:"


def summary(tokens: int, max_length: int = 8, stride: int = 4) -> dict[str, Any]:
    """An evaluation of a model that equals its base, without the digests of the payload."""
    windows, seen = [], 0  # (new tokens less one, positions) of each, as SPEC.md's own loop has it
    for begin in range(0, tokens, stride):
        if seen == tokens:
            break
        end = min(begin + max_length, tokens)
        windows.append((end - seen - 1, min(end - seen, end - begin - 1)))
        seen = end
    scored, positions = (sum(column) for column in zip(*windows, strict=True))
    model = {"average_nll": 1.0, "perplexity": math.e}
    hardware = {"device": "cpu", "description": "none"}
    return {
        "schema_version": "1.0", "role": "sanity-test", "base_model": "none/none", "base_weights_sha256": "0" * 64,
        "dataset": {
            "source": "file", "id": "text.txt", "config": None, "split": None, "revision": None, "rows": 1,
            "sha256": "0" * 64, "tokens": tokens, "tokens_sha256": "0" * 64,
        },
        "settings": {
            "max_length": max_length, "stride": stride, "max_windows": None, "bos": "never", "bos_token_id": None,
            "batch": 1, "device": "cpu", "dtype": "float32",
        },
        "windows": len(windows), "scored_tokens": scored, "positions": positions, "base": model, "quantized": model,
        "perplexity_delta": 0.0, "perplexity_ratio": 1.0, "perplexity_ratio_standard_error": 0.0,
        "kl_divergence": None, "p_delta": {"mean": 0.0, "rms": 0.0},
        "top1_agreement": {"agreeing": positions, "rate": 1.0},
        "window_results": {
            "base_nll": [1.0] * len(windows), "quantized_nll": [1.0] * len(windows), "kl": None,
            **{key: [0.0] * len(windows) for key in ("nll_delta_squared", "p_delta", "p_delta_squared")},
            "agreeing": [each for _, each in windows],
        },
        "logit_cosine": {"prompts": list("abcd"), "values": [1.0] * 4, "mean": 1.0},
        "hardware": hardware, "libraries": {}, "seconds": 1.0,
    }  # fmt: skip


def evaluated(path: Path, tokens: int = 40) -> Path:
    """The repository of test_validator.py with an evaluation of so many tokens."""
    r, listed = repo(), {}

    def complete(files: dict[str, Any]) -> None:
        text = json.dumps(summary(tokens) | {"payload": {PAYLOAD: files[PAYLOAD]["sha256"]}}).encode()
        listed[SUMMARY] = text
        files[SUMMARY] = Repo.entry(SUMMARY, text) | {"role": "document"}

    r.listed = complete
    r.after = lambda repository: (repository / SUMMARY).write_bytes(listed[SUMMARY])
    return r.write(path)


def found(path: Path) -> list[tuple[str, str, str | None, int | None]]:
    judgement = judged(path, "L1")
    assert not judgement.crashed
    assert {v.level for v in judgement.violations} <= {"L1"}
    return [(v.code, v.file, v.pointer, v.offset) for v in judgement.violations]


def test_fewer_than_two_windows_are_no_evaluation(tmp_path: Path) -> None:
    assert summary(9)["windows"] == 2 and summary(8)["windows"] == summary(2)["windows"] == 1
    assert found(evaluated(tmp_path / "nine", 9)) == []
    for tokens in (8, 2):  # every count is right but the number of windows
        assert found(evaluated(tmp_path / str(tokens), tokens)) == [("EVAL.WINDOWS", SUMMARY, "/windows", None)]


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> list[tuple[str, str | None]]:
    """Code and pointer of what is found in an evaluation of 11 positions after a change to it."""

    def text(payload: str) -> dict[str, Any]:
        value = summary(12) | {"payload": {PAYLOAD: payload}}
        kl = {"mean": 0.5, "median": 0.25, "p99": 2.775, "p999": 2.9775, "max": 3.0}
        value["kl_divergence"] = kl | {"histogram": [*[0] * 89, 10, *[0] * 13, 1]}  # from 0.25 and from 3 nats on
        value["window_results"]["kl"] = [0.5] * value["windows"]
        change(value)
        return value

    r, listed = repo(), {}

    def complete(files: dict[str, Any]) -> None:
        listed[SUMMARY] = json.dumps(text(files[PAYLOAD]["sha256"])).encode()
        files[SUMMARY] = Repo.entry(SUMMARY, listed[SUMMARY]) | {"role": "document"}

    r.listed = complete
    r.after = lambda repository: (repository / SUMMARY).write_bytes(listed[SUMMARY])
    return [(code, pointer) for code, _, pointer, _ in found(r.write(path))]


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda summary: summary["kl_divergence"].update({key: value})


def test_edges_of_the_bins() -> None:
    """As SPEC.md has them: four for each octave, of the same width."""
    edges = [checks_evaluation._edge(i) for i in range(129)]
    assert edges[:2] == [0.0, 2**-24] and edges[97:101] == [1.0, 1.25, 1.5, 1.75] and edges[128] == 224.0
    assert edges == sorted(edges)


def test_quantiles_lie_where_the_histogram_has_them(tmp_path: Path) -> None:
    """Of 11 positions ten are from 0.25 to 0.3125 nats, one is 3; 0.99 * 10 and 0.999 * 10 lie between the last two."""
    assert changed(tmp_path / "sound", lambda _: None) == []
    fine = {"median": 0.3125, "p99": 0.25, "p999": 3.0, "mean": 0.5}
    beyond = {"median": 0.32, "p99": 0.2, "p999": 3.1, "mean": 0.6, "max": 3.6}
    for key, value in fine.items():
        if key != "p99":  # which may not be below the median
            assert changed(tmp_path / f"fine-{key}", put(key, value)) == [], key
    for key, value in beyond.items():
        pointers = changed(tmp_path / f"beyond-{key}", put(key, value))
        assert ("EVAL.METRIC", f"/kl_divergence/{key}") in pointers, (key, pointers)
    order = changed(tmp_path / "order", lambda s: s["kl_divergence"].update({"p99": 2.9, "p999": 2.8}))
    assert order == [("EVAL.METRIC", "/kl_divergence")]


@pytest.mark.parametrize("name", ["fewer", "empty end"])
def test_a_histogram_holds_all_positions(name: str, tmp_path: Path) -> None:
    def fewer(summary: dict[str, Any]) -> None:
        summary["kl_divergence"]["histogram"][89] -= 1

    def end(summary: dict[str, Any]) -> None:
        summary["kl_divergence"]["histogram"].append(0)

    pointers = changed(tmp_path / "r", fewer if name == "fewer" else end)
    assert pointers == [("EVAL.METRIC", "/kl_divergence/histogram")]


def digest(path: Path, name: str = SUMMARY) -> str:
    return str(json.loads((path / "quant_manifest.json").read_text())["files"][name]["sha256"])


def test_a_card_states_the_figures_that_are_there(tmp_path: Path) -> None:
    path = evaluated(tmp_path / "r")
    card, right = path / "README.md", {SUMMARY: digest(path), PAYLOAD: digest(path, PAYLOAD)}
    for text in (
        "",
        "# A card without figures\n",
        f"# Card\n{MARKER} {json.dumps(right)} -->\nmore\n",
        f"\r\n \t{MARKER}{json.dumps(right)}--> \r\n{MARKER} {{}} -->",
        f"the line `{MARKER} nonsense -->` in the middle of another is none",
    ):
        card.write_text(text, newline="")
        assert found(path) == [], text
    card.write_bytes(b"\xff\xfe\n" + f"{MARKER} {json.dumps(right)} -->".encode() + b"\n\x80")
    assert found(path) == []


def test_a_card_of_another_evaluation_is_found(tmp_path: Path) -> None:
    path = evaluated(tmp_path / "r")
    card = f"{MARKER} {json.dumps({SUMMARY: digest(path)})} -->\n"
    newer = evaluated(tmp_path / "newer", 80)
    (newer / "README.md").write_text("# Card\n" + card)
    assert found(newer) == [("EVAL.CARD", "README.md", None, 7)]
    (finding,) = judged(newer, "L1").violations
    assert digest(path) in finding.message and digest(newer) in finding.message and finding.rule == "TQ-EVAL-5"
    # each line counts, and each file in it
    (newer / "README.md").write_text(card + f"{MARKER} {json.dumps({'a': '0' * 64, 'config.json': 1})} -->\n")
    assert [code for code, *_ in found(newer)] == ["EVAL.CARD"] * 3
    (newer / SUMMARY).unlink()  # a file that is gone, and is not listed any more
    without = evaluated(tmp_path / "without")
    manifest = json.loads((without / "quant_manifest.json").read_text())
    del manifest["files"][SUMMARY]
    (without / "quant_manifest.json").write_text(json.dumps(manifest))
    (without / SUMMARY).unlink()
    (without / "README.md").write_text(card)
    assert [code for code, *_ in found(without)] == ["EVAL.CARD"]


@pytest.mark.parametrize(
    "line",
    [
        f"{MARKER} -->",
        f"{MARKER} {{}}",
        f"{MARKER} [] -->",
        f'{MARKER} {{"a": "b", "a": "b"}} -->',
        f"{MARKER} {{}} --> more",
        f"{MARKER} {'[' * 10000} -->",
        f"{MARKER} \x1b[2J -->",
        f"{MARKER}:",
        f'{MARKER} {{"__proto__": {{"sha256": null}}}} -->',
    ],
)
def test_a_line_that_begins_so_and_has_another_form_is_a_breach(line: str, tmp_path: Path) -> None:
    path = evaluated(tmp_path / "r")
    (path / "README.md").write_text(f"# Card\n{line}\n{MARKER} {{}} -->\n")
    assert found(path) == [("EVAL.CARD", "README.md", None, 7)]
    assert judged(path, "L1").violations[0].message.isascii()


def test_a_card_is_read_in_a_bounded_way(tmp_path: Path) -> None:
    path = evaluated(tmp_path / "r")
    wrong = f"{MARKER} {{}}\n"
    with (path / "README.md").open("w") as card:
        card.write("x" * (checks_evaluation.MAX_SIZE - 10) + "\n" + wrong)  # begins before the limit, ends after it
    assert found(path) == []
    with (path / "README.md").open("w") as card:
        card.write("x" * (checks_evaluation.MAX_SIZE - len(wrong) - 1) + "\n" + wrong + "more")
    assert [code for code, *_ in found(path)] == ["EVAL.CARD"]
    (path / "README.md").unlink()
    (path / "README.md").symlink_to(tmp_path / "outside")  # not followed: a link is no card, but an entry not listed
    (tmp_path / "outside").write_text(wrong)
    assert [code for code, *_ in found(path)] == ["BIND.EXTRA_FILE"]
