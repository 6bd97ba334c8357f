"""What must hold for every page of the site: it fetches nothing from another host, and it shows what the repository shows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

# Attributes that make a browser fetch something when a page opens. A link that a reader follows (a, area) is not one of them.
FETCHING = {
    "script": ("src",),
    "img": ("src", "srcset"),
    "link": ("href",),
    "iframe": ("src",),
    "frame": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
    "audio": ("src",),
    "track": ("src",),
    "input": ("src",),
    "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"),
    "form": ("action",),
    "base": ("href",),
}
REMOTE = re.compile(r"^\s*(?:https?:)?//", re.IGNORECASE)
STYLE = re.compile(r"""(?:url\(|@import)\s*["']?\s*((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)
SCRIPT = re.compile(r"https?://[^\s\"'`)<>\\]*")
# Addresses in scripts that nothing fetches: names of XML namespaces, and comments with the sources of libraries.
NAMES = (
    "http://www.w3.org/",
    "http://lunrjs.com",
    "http://tartarus.org/",
    "https://bit.ly/2s3ChXG",
    "https://clipboardjs.com/",
)
# The theme's script fetches these if a page has a diagram, if a browser has no ResizeObserver, or if a repository is named.
THEME = re.compile(r"https://(?=unpkg\.com/|api\.github\.com/|\$\{e\}/api/)")


class _Elements(HTMLParser):
    """The elements of a page, with their attributes, and the texts of its styles and scripts."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        self.inside = tag

    def handle_data(self, data: str) -> None:
        if self.inside in ("style", "script"):
            self.texts.append((self.inside, data))

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


def without_remote_scripts(script: str) -> str:
    """The theme's script with addresses that fetch nothing in place of those of other hosts."""
    return THEME.sub("about:blank#", script)


def external_loads(site: Path) -> list[str]:
    """Each place of the built site that would fetch something from another host when a page opens, one line each."""
    return [
        f"{path.relative_to(site)}: {what}"
        for path in sorted(site.rglob("*"))
        for what in _loads_of_file(path)
    ]


def _loads_of_file(path: Path) -> Iterator[str]:
    if path.suffix == ".css":
        yield from _loads_of_style(path.read_text(encoding="utf-8"))
    elif path.suffix == ".js":
        yield from _loads_of_script(path.read_text(encoding="utf-8"))
    elif path.suffix in (".html", ".svg"):
        yield from _loads_of_page(path.read_text(encoding="utf-8"))


def _loads_of_page(text: str) -> Iterator[str]:
    page = _Elements()
    page.feed(text)
    for tag, attributes in page.found:
        if tag == "link" and attributes.get("rel") == "canonical":
            continue
        for name in FETCHING.get(tag, ()):
            parts = attributes.get(name, "").split(",") if name == "srcset" else [attributes.get(name, "")]
            yield from (f"<{tag} {name}> fetches {part.strip()}" for part in parts if REMOTE.match(part))
        yield from _loads_of_style(attributes.get("style", ""))
    for kind, inner in page.texts:
        yield from _loads_of_style(inner) if kind == "style" else _loads_of_script(inner)


def _loads_of_style(text: str) -> Iterator[str]:
    yield from (f"a style fetches {target}" for target in STYLE.findall(text))


def _loads_of_script(text: str) -> Iterator[str]:
    for target in SCRIPT.findall(text):
        if not target.startswith(NAMES):
            yield f"a script contains {target[:80]}"


COMPARED = ("h1", "h2", "h3", "h4", "li", "tr", "pre", "img", "strong")


def structure_differences(markdown: str, html: str) -> list[str]:
    """How the elements of a page differ from those that CommonMark makes of its text, e.g. a list that is not shown as one."""
    from markdown_it import MarkdownIt  # a dependency of rich

    expected = _counts(MarkdownIt("commonmark").enable("table").render(markdown))
    shown = _counts(html)
    return [
        f"{shown[tag]} <{tag}> are shown, but the text has {expected[tag]}"
        for tag in COMPARED
        if shown[tag] != expected[tag]
    ]


def _counts(html: str) -> Counter[str]:
    page = _Elements()
    page.feed(html)
    return Counter(tag for tag, _ in page.found)
