"""How a tensor is split over ranks: by rows, into parts that follow each other in the order of the ranks.

A checkpoint records the shape of every tensor and the first row of each rank's part. Any number of ranks can
therefore read it, each only the rows that it needs. Reading this needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from torch import Tensor

Rows = tuple[int, int]  # first row, and the row after the last one
RowsOf = Callable[
    [str, str, tuple[int, ...]], Rows
]  # (group, name, shape of the whole tensor) → rows to read
Size = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class Share:
    """Says that a rank has only the rows from ``start`` on of a tensor with the shape ``shape``."""

    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The whole state of a stage between two optimizer steps, as named groups of tensors and JSON values.
    ``shares`` has an entry for every tensor of which this rank has only some rows; all other tensors are the
    same on every rank. A loaded checkpoint has the rows that the rank needs, and no shares."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    shares: Mapping[str, Mapping[str, Share]] = field(default_factory=dict)


class Entry(BaseModel):
    """A whole tensor, by its safetensors dtype and shape. ``starts`` has the first row of each rank's part, or
    is empty if rank 0 has saved the whole tensor. Such parts cannot overlap or leave a row out."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    dtype: str
    shape: list[Size]
    starts: list[Size] = []

    @model_validator(mode="after")
    def _covers(self) -> Self:
        if self.starts:
            bounds = [*self.starts, self.shape[0]] if self.shape else [1]
            if bounds[0] != 0 or any(a > b for a, b in pairwise(bounds)):
                raise ValueError("starts are not the first rows of parts that follow each other")
        return self

    def pieces(self, rows: Rows) -> Iterator[tuple[int, int, Rows]]:
        """Yield (rank, number of rows in its part, rows of that part) for all parts that contain any of
        ``rows``, in order. A tensor without dimensions counts as one row."""
        bounds = [*(self.starts or [0]), self.shape[0] if self.shape else 1]
        for rank, (first, stop) in enumerate(pairwise(bounds)):
            low, high = max(first, rows[0]), min(stop, rows[1])
            if low < high:
                yield rank, stop - first, (low - first, high - first)


def every_row(group: str, name: str, shape: tuple[int, ...]) -> Rows:
    """Return the rows of a rank that needs the whole tensor."""
    return 0, shape[0] if shape else 1


Claim = tuple[int, int]  # first row and number of rows of a rank's part


def joined(
    whole: Mapping[str, Mapping[str, dict[str, Any]]], claims: list[Mapping[str, Mapping[str, Claim]]]
) -> dict[str, Any]:
    """Return the entries of a manifest from rank 0's entries and all ranks' claims (by group and name).

    Raises ValueError if the parts of a tensor overlap, or leave out a row."""
    found: dict[str, Any] = {group: dict(entries) for group, entries in whole.items()}
    for group, own in claims[0].items():
        for name in own:
            parts, num_rows = [claim[group][name] for claim in claims], found[group][name]["shape"][0]
            starts, stops = [start for start, _ in parts], [start + num for start, num in parts]
            if starts != [0, *stops[:-1]] or stops[-1] != num_rows:
                raise ValueError(
                    f"{group}: the ranks' parts of {name!r} are not its {num_rows} rows: {parts}"
                )
            found[group][name] = {**found[group][name], "starts": starts}
    return found
