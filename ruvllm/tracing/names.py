"""Names: the named arrays of a model as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ruvllm.display import Table
from ruvllm.model.names import Point, Points, matching


@dataclass(frozen=True)
class Names(Table):
    """The named arrays of a model: print() it, iterate over it, look one up by its name, alias or glob."""

    points: Points

    def __iter__(self) -> Iterator[str]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def __contains__(self, name: object) -> bool:
        return any(name == point.name or name in point.aliases for point in self.points.values())

    def __getitem__(self, name: str) -> Point:
        return self.points[matching(self.points, name)[0]]

    def matching(self, pattern: str) -> list[str]:
        """The names that a glob or an alias means. Raises KeyError if there is none."""
        return matching(self.points, pattern)

    def rows(self) -> list[tuple[str, ...]]:
        """Name, shape, meaning and other names of each array; the first row has the headings."""
        found = [("name", "shape", "meaning", "also")]
        return [*found, *((p.name, p.shape, p.meaning, ", ".join(p.aliases)) for p in self.points.values())]

    def heading(self) -> str:
        """One line: how many there are, and what the letters mean."""
        return f"{len(self)} arrays; T: tokens, S: positions so far"

    def __repr__(self) -> str:
        return f"Names({len(self)} arrays)"
