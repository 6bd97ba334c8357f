"""The style sheet that all pages share, and a function that makes every character of a text visible."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import jinja2

# control, format (bidi overrides, zero width), surrogate, private and unassigned characters
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn")


def loader(templates: Path) -> jinja2.BaseLoader:
    """Return a loader for the templates of one package and for style.css."""
    return jinja2.FileSystemLoader([templates, Path(__file__).parent])


def visible(text: object) -> str:
    """Return the text with some characters replaced by their code points. These are the characters that move
    the cursor, change the text direction, are hidden or break XML."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in _INVISIBLE else f"⟨U+{ord(c):04X}⟩"
        for c in str(text)
    )
