"""The verdict in a model card: written once, replaced in place, and nothing else of the card is touched."""

from pathlib import Path

from conformance.__main__ import main
from conformance.report import with_verdict
from conformance.vectors import ROOT, materialise

CARD = "---\nlicense: mit\n---\n# A model\n"


def test_a_verdict_is_added_and_replaced() -> None:
    once = with_verdict(CARD, "tqformat 1.0: FAIL L1")
    assert once.startswith(CARD) and once.count("FAIL L1") == 1
    twice = with_verdict(once + "\nMore text.\n", "tqformat 1.0: PASS L2")
    assert "FAIL" not in twice and twice.count("PASS L2") == 1 and twice.endswith("\nMore text.\n")
    assert with_verdict("", "tqformat 1.0: PASS L2").startswith("<!--")


def test_the_card_states_the_level_reached(tmp_path: Path) -> None:
    repo = materialise(ROOT / "valid" / "repository" / "typical", tmp_path / "repo")
    (repo / "README.md").write_text(CARD)
    assert main(["check", str(repo), "--level", "L2", "--card"]) == 0
    card = (repo / "README.md").read_text()
    assert card.startswith(CARD) and "**tqformat 1.0: PASS L2**" in card
    (repo / "LICENSE").write_text("changed")
    assert main(["check", str(repo), "--level", "L2", "--card"]) == 1
    assert "FAIL" in (repo / "README.md").read_text() and "PASS" not in (repo / "README.md").read_text()
    assert sorted(p.name for p in repo.iterdir() if p.name.startswith(".")) == []


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    repo = materialise(ROOT / "valid" / "repository" / "typical", tmp_path / "repo")
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (repo / "README.md").symlink_to(outside)
    main(["check", str(repo), "--level", "L2", "--card"])
    assert outside.read_text() == "mine" and not (repo / "README.md").is_symlink()
