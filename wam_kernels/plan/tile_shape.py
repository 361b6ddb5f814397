"""The shapes of tiles, and which one a plan gets."""

from __future__ import annotations

from dataclasses import dataclass

from ..runtime.checks import integer
from ..runtime.tuning import tuned

STEP_PART = 32


@dataclass(frozen=True)
class TileShape:
    """Query rows and key rows of a tile, and tokens of a full step of either side. Powers of two for a GPU.

    Raises:
        ValueError: a number that is not an int of at least 1.
    """

    rows: int
    step: int
    key_rows: int | None = None  # as many as rows

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None or name != "key_rows":
                object.__setattr__(self, name, integer("TileShape", name, value, 1))


# Mean visible tokens per row from which a plan gets the tile for long windows.
LONG_WINDOW = 256


@tuned("plan.tile_shape")
def tile_shape(long_window: bool) -> TileShape:
    """Tile of a plan whose rows attend to few or many tokens.

    Small windows waste most of a large tile (LIBERO ``joint``, chunk 1, window 8: 0.57 of 64 x 64 is useful, 0.79
    of 32 x 32); long ones want the 64-row tensor-core instruction (chunk 4, window 64: 0.96 of 64 x 64 is useful).
    128 query rows would read keys and values half as often, for 0.92 useful. Key tiles of long windows have 128 rows:
    the sums of dk and dv of 64 do not fit into the registers of one warpgroup, and a second one would compute the same
    scores once more. The efficiencies are counted; which tile is fastest is not yet measured on a GPU: ``wam bench
    tune`` tries them.
    """
    return TileShape(64, 64, key_rows=128) if long_window else TileShape(32, 32)
