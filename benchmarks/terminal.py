"""Draw recorded terminal sessions as SVG pictures: docs/img/terminal-audit.svg and docs/img/terminal-demo.svg.

    python benchmarks/terminal.py [--check]

The audit's session is the README's block, from results/audit/; the demo's is results/demo/session.txt, which was recorded with
``make demo``. The pictures fetch no font and follow the reader's color scheme.
Held by: tests/unit/test_generated.py
"""

from __future__ import annotations

import re
import sys
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pages
import readme_figures

IMAGES = pages.ROOT / "docs/img"
DEMO = pages.ROOT / "results/demo/session.txt"
CELL, LINE, EDGE, BAR = 8.4, 19, 18, 30  # pixels; the width of a character of a font with 14 pixels
STYLE = """
  .window { fill: #ffffff; stroke: #d0d7de } .bar { fill: #f6f8fa } .plain { fill: #1f2328 } .muted { fill: #57606a }
  .good { fill: #1a7f37 } .bad { fill: #cf222e } .bold { font-weight: 700 }
  @media (prefers-color-scheme: dark) {
    .window { fill: #0d1117; stroke: #30363d } .bar { fill: #161b22 } .plain { fill: #e6edf3 } .muted { fill: #9da7b3 }
    .good { fill: #3fb950 } .bad { fill: #ff7b72 }
  }
  text { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 14px; white-space: pre }
"""
KINDS = (
    ("bad bold", r"\bFAULT\b"),
    ("good bold", r"\bRIGHT\b"),
    ("muted", r"[─━┏┓┗┛┃│┡┩┢┪┠┨└┘├┤┬┴┼╇╈┳┻┯┷]+"),
)


def parts(line: str) -> list[tuple[int, str, str]]:
    """Return the pieces of a line: place, class and text. Spaces between them are not drawn."""
    if line.startswith("$ "):
        return [(0, "muted", "$"), (2, "plain bold", line[2:])]
    pattern = "|".join(f"(?P<k{i}>{one})" for i, (_, one) in enumerate(KINDS))
    found, last = [], 0
    for hit in re.finditer(pattern, line):
        found.append((last, "plain", line[last : hit.start()]))
        found.append((hit.start(), KINDS[int(str(hit.lastgroup)[1:])][0], hit.group()))
        last = hit.end()
    found.append((last, "plain", line[last:]))
    return [
        (at + len(text) - len(text.lstrip()), kind, text.strip()) for at, kind, text in found if text.strip()
    ]


def picture(title: str, text: str) -> str:
    lines = text.rstrip("\n").split("\n")
    width = round(2 * EDGE + CELL * max(map(len, lines)))
    height = BAR + 2 * EDGE + LINE * len(lines)
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="window" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
        f'<path class="bar" d="M1 {BAR}V9a8 8 0 0 1 8-8H{width - 9}a8 8 0 0 1 8 8V{BAR}z"/>',
        f'<text class="muted" x="{width / 2:g}" y="20" text-anchor="middle">{escape(title)}</text>',
    ]
    for row, line in enumerate(lines):
        y = BAR + EDGE + LINE * row + 14
        for at, kind, part in parts(line):
            # The length is set, so that columns stay in line with a font of another width.
            drawn.append(
                f'<text class="{kind}" x="{EDGE + CELL * at:g}" y="{y}" textLength="{CELL * len(part):g}" '
                f'lengthAdjust="spacingAndGlyphs">{escape(part)}</text>'
            )
    return "\n".join([*drawn, "</svg>\n"])


def files() -> dict[Path, str]:
    """Return the content of every picture."""
    audit = readme_figures.README.read_text(encoding="utf-8").split("<!-- audit:")[1].split("```")[1]
    sessions = {
        "audit": ("truestep audit", audit.strip("\n")),
        "demo": ("make demo", DEMO.read_text(encoding="utf-8")),
    }
    return {IMAGES / f"terminal-{name}.svg": picture(*session) for name, session in sessions.items()}


if __name__ == "__main__":
    pages.write_or_check(__doc__, files)
