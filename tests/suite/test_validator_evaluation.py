"""What the validator says of evaluations and of cards that state other ones, on files made by hand (SPEC.md section 20)."""

from __future__ import annotations

import json
import math
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
        "perplexity_delta": 0.0, "perplexity_ratio": 1.0, "kl_divergence": None,
        "top1_agreement": {"agreeing": positions, "rate": 1.0},
        "window_results": {
            "base_nll": [1.0] * len(windows), "quantized_nll": [1.0] * len(windows), "kl": None,
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
