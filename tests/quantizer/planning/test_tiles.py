"""How high the tiles of a trellis are."""

from pathlib import Path

import pytest

from reference_quantizer.checkpoint.source import Info, Source
from reference_quantizer.planning.plan import choose_tile_rows, make_plan
from reference_quantizer.planning.settings import Settings


@pytest.mark.parametrize(
    "rows, alone, short",
    [
        (576, 288, 96),
        (640, 128, 128),
        (768, 128, 128),
        (1536, 256, 128),
        (5120, 256, 128),
        (11008, 256, 128),
        (7, 0, 0),
    ],
)
def test_heights_are_multiples_of_128_where_rows_allow(rows: int, alone: int, short: int) -> None:
    info = Info("w", (rows, 64), "BF16")
    for bits in (2, 3):
        assert choose_tile_rows(info, bits, 12) == alone
        assert choose_tile_rows(info, bits, 12, output_feedback=True) == short
    assert choose_tile_rows(info, 8, 12) == choose_tile_rows(info, 4, None) == 0


def test_all_rows_that_128_divides_have_such_tiles() -> None:
    for tiles in range(1, 200):
        height = choose_tile_rows(Info("w", (128 * tiles, 64), "BF16"), 3, 12)
        assert height in (128, 256) and 128 * tiles % height == 0
        assert 128 * tiles // height % 2 == 0 or tiles > 32 or height == 128  # threads take tiles side by side


def test_it_is_told_where_no_height_suits() -> None:
    shapes = {"prime": (32003, 64), "single": (1, 64), "even": (128, 64)}
    source = Source(Path("model"), {name: Info(name, shape, "BF16") for name, shape in shapes.items()})
    told = "scalar codes, since no divisor of them suits a trellis (1 tensor)"
    assert make_plan(source, Settings(bits=3, preset="best", window=12)).notes == [
        f"32003 rows: {told}",
        f"1 row: {told}",
    ]
    assert make_plan(source, Settings(bits=8, preset="best", window=12)).notes == []  # where no trellis is expected
    assert make_plan(source, Settings(bits=3)).notes == []
