"""What every page shares: one style sheet, and text whose every character shows."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import jinja2

# control, format (bidi overrides, zero width), surrogate, private and unassigned characters
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn")


def loader(templates: Path) -> jinja2.BaseLoader:
    """A room's own templates, and style.css."""
    return jinja2.FileSystemLoader([templates, Path(__file__).parent])


def visible(text: object) -> str:
    """Text in which characters that move a cursor, turn the direction, hide or break XML are numbers."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in _INVISIBLE else f"⟨U+{ord(c):04X}⟩"
        for c in str(text)
    )
