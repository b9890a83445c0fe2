"""The documents: relative links lead somewhere, prose is wrapped, and quality.md shows the figures of its data file."""

import re
from pathlib import Path

import pytest
from conftest import ROOT, benchmark

plot_quality = benchmark("plot_quality")

FOLDERS = (".", "docs", "docs/tutorials", "benchmarks", "fuzz", "conformance", "demo", "kernels", "readers/javascript")
PAGES = [page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md"))]
CODE = re.compile(r"^```.*?^```$|^    .*?$", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text("utf-8"))):
        if ":" in link:  # another scheme, or a site
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_prose_is_wrapped() -> None:
    pages = [page for page in PAGES if page.parent.name in ("docs", "tutorials", "benchmarks")]
    assert len(pages) >= 4
    for page in pages:
        for line in CODE.sub("", page.read_text("utf-8")).splitlines():
            assert len(line) <= 120 or line.startswith("|"), (page.name, line)


def test_tables_and_figures_of_quality_show_the_data() -> None:
    models = plot_quality.read_rows()
    assert all(len(rows) >= 7 for rows in models.values())
    text = (ROOT / "docs" / "quality.md").read_text("utf-8")
    assert plot_quality.put_tables(text, models) == text, "run benchmarks/plot_quality.py"
    for model, rows in models.items():
        figure = plot_quality.FIGURES[model]
        assert f"({figure})" in text
        drawn = (ROOT / "docs" / figure).read_text("utf-8")
        assert plot_quality.digest(rows) in drawn, f"{figure} shows other rows: run benchmarks/plot_quality.py"


def test_a_figure_names_its_rows_and_repeats_byte_for_byte() -> None:
    pytest.importorskip("matplotlib")
    rows = plot_quality.read_rows()["Gemma 3 270M"]
    first, second = (plot_quality.draw(rows) for _ in range(2))
    assert first == second
    assert plot_quality.digest(rows) in first
    assert all(f">{row['candidate'].partition('+')[0]}</text>" in first for row in rows)
    assert plot_quality.digest(rows[1:]) not in first
