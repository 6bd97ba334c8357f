"""What a cell's process uses (ranks and GPUs), and how the cells of one machine share it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from truestep.errors import UserError
from truestep.frozen import Frozen


@dataclass(frozen=True)
class Share:
    """What one child process uses: ``ranks`` processes, with ``gpus`` GPUs together."""

    ranks: int = 1
    gpus: int = 0


class StageResources(Frozen):
    """What the cells that run this stage use, if it is not the same as for other stages."""

    ranks: Annotated[int, Field(ge=1)] | None = None
    """Processes of a cell that runs this stage. Not set: as for other stages. Example: ``ranks = 1``"""
    gpus: Annotated[int, Field(ge=0)] | None = None
    """GPUs of a cell that runs this stage. Not set: as for other stages. Example: ``gpus = 1``"""


class Resources(Frozen):
    """What each cell uses. A stage that several arms start from runs once, so resources depend on the stage
    and not on the arm."""

    ranks: int = Field(1, ge=1)
    """Processes of a cell (torchrun). Each uses one GPU if the cell has GPUs. Example: ``ranks = 2``"""
    gpus: int = Field(0, ge=0)
    """GPUs of all ranks of a cell together. 0: the cell runs on the CPU. Example: ``gpus = 2``"""
    stages: dict[str, StageResources] = Field(default_factory=dict)
    """What cells that run a stage use instead, by the name of the stage.
    Example: ``stages.sft = { ranks = 1, gpus = 1 }``"""

    @model_validator(mode="after")
    def _one_gpu_each(self) -> Self:
        places = {"resources": self.of("")}
        places |= {f"resources.stages.{name}": self.of(name) for name in self.stages}
        places["resources"] = Share(self.ranks, self.gpus)
        for where, share in places.items():
            if 0 < share.gpus < share.ranks:
                raise ValueError(
                    f"{where}: {share.ranks} ranks cannot share {share.gpus} GPUs, because each rank uses one; set "
                    f"gpus = {share.ranks}, or gpus = 0 to run on the CPU"
                )
        return self

    def of(self, stage: str) -> Share:
        """Return what a cell uses that runs ``stage``. Without a stage ("") a cell only evaluates the base
        model, which is done by a single rank."""
        if not stage:
            return Share(1, min(1, self.gpus))
        own = self.stages.get(stage, StageResources())
        return Share(
            self.ranks if own.ranks is None else own.ranks, self.gpus if own.gpus is None else own.gpus
        )

    def kinds(self, stages: Sequence[str]) -> list[Any]:
        """Return what a cell's numbers depend on: ranks, and CPU or GPU, for the base and for each stage. The
        list is empty if every part runs as one process on the CPU, so that such cells keep their names."""
        shares = [self.of(name) for name in ("", *stages)]
        plain = all(share == Share() for share in shares)
        return [] if plain else [(share.ranks, share.gpus > 0) for share in shares]


class Places:
    """Limits what runs at once to ``workers`` cells, which use different GPUs. ``gpus`` are the names of the
    GPUs, or None if another program (Ray) assigns them."""

    def __init__(self, workers: int, gpus: Sequence[str] | None) -> None:
        self._workers = workers
        self._order = list(gpus or ())
        self._gpus = None if gpus is None else list(gpus)
        self._queue: list[
            object
        ] = []  # of the cells that need GPUs, so that one that needs many is not passed over
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, gpus: int) -> Iterator[tuple[str, ...] | None]:
        """Wait for a place and yield the names of its GPUs, or None if they are not assigned here. Raises
        UserError if there are fewer GPUs."""
        if self._gpus is None:
            gpus = 0
        elif gpus > len(self._order):
            raise UserError(
                f"a cell needs {gpus} GPUs, but there are {len(self._order)}; reduce resources.gpus"
            )
        ticket = object()
        with self._changed:
            if gpus:
                self._queue.append(ticket)
            self._changed.wait_for(lambda: self._is_free(gpus, ticket))
            self._workers -= 1
            names = self._taken(gpus)
            if gpus:
                self._queue.remove(ticket)
            self._changed.notify_all()
        try:
            yield names
        finally:
            with self._changed:
                self._workers += 1
                if self._gpus is not None:
                    self._gpus = sorted({*self._gpus, *(names or ())}, key=self._order.index)
                self._changed.notify_all()

    def _is_free(self, gpus: int, ticket: object) -> bool:
        if self._workers < 1:
            return False
        return not gpus or (self._queue[0] is ticket and len(self._gpus or ()) >= gpus)

    def _taken(self, gpus: int) -> tuple[str, ...] | None:
        if self._gpus is None:
            return None
        names, self._gpus = tuple(self._gpus[:gpus]), self._gpus[gpus:]
        return names
