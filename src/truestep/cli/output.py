"""The only place where a command prints. Text from files, servers and other programs must not control the terminal
or show a secret. Held by: tests/e2e/test_terminal.py"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import typer
from rich.console import Console
from rich.segment import Segment

from truestep.pages import visible
from truestep.redaction import redact


def plain(text: object) -> str:
    """Return text without characters that control a terminal, and without secrets."""
    return visible(redact(str(text)))


def echo(text: object, *, err: bool = False) -> None:
    typer.echo(plain(text), err=err)


class PlainConsole(Console):
    """A terminal for tables and colored text. What is printed is neither markup nor a terminal's command."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, **options)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            shown = segment.text if segment.control else visible(segment.text)
            yield segment if shown == segment.text else Segment(shown, segment.style)
