"""Where each file of the repository is in the site, and the pages that the site makes from docs/log.md. Standard library only."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

# Files of the repository that are pages of the site. All other files outside docs/ are copied under repository/.
MOVED = {"README.md": "index.md", "AGENTS.md": "contributing/agents.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?<=\]\()([^)#\s]+)")
FENCE = re.compile(r"^ *(```|~~~)")
MONTH_PAGE = re.compile(r"log/\d{4}-\d{2}\.md")


def address(source: str) -> str:
    """The site's path of a file; ``source`` is its path in the repository."""
    if source == "docs/log.md":
        return "log/index.md"
    if source in MOVED:
        return MOVED[source]
    return source.removeprefix("docs/") if source.startswith("docs/") else f"repository/{source}"


def source_of(page: str) -> str:
    """The file that a page of the site comes from: the reverse of ``address``, for pages only."""
    if page.startswith("log/"):
        return "docs/log.md"
    if page.startswith("repository/"):
        return page.removeprefix("repository/")
    back = {site: source for source, site in MOVED.items()}
    return back.get(page, f"docs/{page}")


def with_site_links(text: str, page: str, root: Path) -> str:
    """The text of a page with its relative links as they are in the site. Links in code blocks are left as they are.

    A link whose file does not exist is left as it is, and MkDocs warns about it.
    """
    origin, here = posixpath.dirname(source_of(page)), posixpath.dirname(page)

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(origin, match[1]))
        if "://" in match[1] or not (root / target).is_file():
            return match[1]
        return posixpath.relpath(address(target), here or ".")

    return "\n".join(line if in_code else LINK.sub(moved, line) for line, in_code in _lines(text))


def linked_files(root: Path) -> list[str]:
    """The files outside docs/ that a page links to and that are not pages themselves, as paths in the repository."""
    pages = [*MOVED, *(str(p.relative_to(root)) for p in (root / "docs").rglob("*.md"))]
    found = set()
    for page in pages:
        for line, in_code in _lines((root / page).read_text(encoding="utf-8")):
            for target in [] if in_code else LINK.findall(line):
                path = os.path.normpath(os.path.join(os.path.dirname(page), target))
                if "://" not in target and (root / path).is_file():
                    found.add(path)
    return sorted(p for p in found if p not in MOVED and not p.startswith("docs/"))


def log_pages(text: str) -> dict[str, str]:
    """docs/log.md as one page a month, with a heading for each day, and an index. Entries of a day keep their order.

    Raises: ValueError if an entry has no date.
    """
    introduction, *entries = re.split(r"\n(?=\* )", text.strip())
    days: dict[str, list[str]] = {}
    for entry in entries:
        dated = re.match(r"\* (\d{4}-\d{2}-\d{2}):? ", entry)
        if not dated:
            raise ValueError(f"docs/log.md: an entry has no date: {entry[:80]}")
        days.setdefault(dated[1], []).append("* " + entry[dated.end() :].strip())
    months = sorted({day[:7] for day in days}, reverse=True)
    pages = {}
    for month in months:
        own = [day for day in sorted(days) if day.startswith(month)]
        pages[f"log/{month}.md"] = "\n\n".join(
            [f"# {month}", *(part for day in own for part in (f"## {day}", "\n".join(days[day])))]
        )
    counts = {m: sum(len(days[d]) for d in days if d.startswith(m)) for m in months}
    rows = [f"| [{m}]({m}.md) | {counts[m]} |" for m in months]
    pages["log/index.md"] = "\n".join(
        [introduction.strip(), "", "| month | entries |", "|---|---|", *rows, ""]
    )
    return pages


def _lines(text: str) -> list[tuple[str, bool]]:
    """The lines of a text, each with whether it is in a fenced code block."""
    inside, lines = False, []
    for line in text.split("\n"):
        fence = bool(FENCE.match(line))
        inside ^= fence
        lines.append((line, inside or fence))
    return lines
