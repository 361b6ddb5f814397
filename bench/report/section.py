"""What the report shows of one suite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.rows import Row

from .tables import plain_table


@dataclass(frozen=True)
class Section:
    """A heading, a table, and figures.

    ``columns`` are the keys that the table reads; a ``table`` of its own lays them out in another way than a column
    each. A figure is a function of the rows and the name of one machine, None where there is nothing to draw.
    """

    title: str
    columns: tuple[str, ...]
    table: Callable[[Sequence[Row]], str] | None = None
    figures: Mapping[str, Callable[[Sequence[Row], str], Any]] = field(default_factory=dict)

    def render(self, rows: Sequence[Row]) -> str:
        return self.table(rows) if self.table else plain_table(self.columns, rows)
