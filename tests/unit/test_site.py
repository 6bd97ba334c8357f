"""The documentation site: where links lead, how the log is split, and that no page fetches anything from another host."""

from __future__ import annotations

import re
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks/site"))

import checks  # noqa: E402
import sources  # noqa: E402

# ---------------------------------------------------------------------------------------------- nothing from elsewhere

HARMLESS = """<html><head><link rel="stylesheet" href="a.css"><link rel="canonical" href="https://example.org/a.html">
<script>var a = "http://www.w3.org/2000/svg"</script><style>p { background: url(a.png) }</style></head>
<body><a href="https://arxiv.org/abs/2604.23747">a link</a><img src="a.svg"><pre>curl https://example.org</pre></body></html>"""


def test_a_page_that_fetches_only_its_files_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(HARMLESS)
    (tmp_path / "a.css").write_text("@import 'b.css'; p { background: url('data:image/png;base64,AAAA') }")
    assert checks.external_loads(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.html", '<link rel="stylesheet" href="https://fonts.example.org/css?family=Roboto">'),
        ("a.html", '<link rel="preconnect" href="//fonts.example.org">'),
        ("a.html", '<SCRIPT SRC="HTTPS://cdn.example.org/a.js"></SCRIPT>'),
        ("a.html", '<img src="a.png" srcset="b.png 1x, https://example.org/c.png 2x">'),
        ("a.html", "<svg><image xlink:href='http://example.org/a.png'/></svg>"),
        ("a.html", '<iframe src="https://example.org"></iframe>'),
        ("a.html", '<form action="https://example.org/search"></form>'),
        ("a.html", '<p style="background: url(//example.org/a.png)">'),
        ("a.html", "<style>@font-face { src: url('https://example.org/a.woff2') }</style>"),
        ("a.html", '<script>fetch("https://example.org/track")</script>'),
        ("a.css", '@import "https://example.org/a.css";'),
        ("a.css", "@font-face { src: local(A), url( https://example.org/a.woff2 ) }"),
        ("a.js", "fetch(`https://${host}/api`)"),
        ("a.svg", '<svg><image href="https://example.org/a.png"/></svg>'),
    ],
)
def test_whatever_fetches_from_another_host_is_found(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / name).write_text(text)
    [fault] = checks.external_loads(tmp_path)
    assert fault.startswith(f"sub/{name}: ")


def test_the_themes_script_is_left_without_hosts(tmp_path: Path) -> None:
    script = 'load("https://unpkg.com/mermaid@11/m.js"); get(`https://api.github.com/repos/${e}`); ns("http://www.w3.org/2000/svg")'
    (tmp_path / "before.js").write_text(script)
    (tmp_path / "after.js").write_text(checks.without_remote_scripts(script))
    assert {fault.split(":")[0] for fault in checks.external_loads(tmp_path)} == {"before.js"}


# ---------------------------------------------------------------------------------------------- the same in both views


@pytest.mark.parametrize(
    ("text", "html"),
    [
        (
            "A line\n1. one\n2. two",
            "<p>A line\n1. one\n2. two</p>",
        ),  # Python-Markdown needs an empty line here
        ("| a |\n|---|\n| b |", "<p>| a | |---| | b |</p>"),
        ("# A", "<p># A</p>"),
        ("**a**b", "<p>**a**b</p>"),
        ("```\na\n```", "<p><code>a</code></p>"),
    ],
)
def test_a_page_that_shows_something_else_than_the_repository_is_found(text: str, html: str) -> None:
    assert checks.structure_differences(text, html)


def test_the_same_structure_is_accepted() -> None:
    html = "<h1>A <a>link</a></h1><ul><li>one</li><li>two</li></ul><table><tr><th>a</th></tr><tr><td>b</td></tr></table>"
    assert checks.structure_differences("# A\n\n* one\n* two\n\n| a |\n|---|\n| b |", html) == []


# ---------------------------------------------------------------------------------------------- links


def test_links_are_moved_with_their_pages(tmp_path: Path) -> None:
    for name in (
        "README.md",
        "docs/audit.md",
        "docs/how-to/a.md",
        "docs/log.md",
        "results/a.json",
        "docs/img/a.svg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("[back](../log.md)" if name == "docs/how-to/a.md" else "")
    (tmp_path / "docs/audit.md").write_text("[r](../results/a.json)\n```\n[code](../README.md)\n```")
    (tmp_path / "AGENTS.md").write_text("")
    (tmp_path / "CHANGELOG.md").write_text("")
    (tmp_path / "SECURITY.md").write_text("")

    def moved(text: str, page: str) -> str:
        return sources.with_site_links(text, page, tmp_path)

    assert moved("![p](docs/img/a.svg) [a](docs/audit.md#b)", "index.md") == "![p](img/a.svg) [a](audit.md#b)"
    assert moved("[r](../../results/a.json)", "how-to/a.md") == "[r](../repository/results/a.json)"
    assert moved("[r](../README.md)", "audit.md") == "[r](index.md)"
    assert moved("[b](../log.md)", "how-to/a.md") == "[b](../log/index.md)"
    assert moved("[a](audit.md)", "log/2026-11.md") == "[a](../audit.md)"
    assert moved("[a](docs/audit.md)", "contributing/agents.md") == "[a](../audit.md)"
    assert (
        moved("[m](missing.md) [w](https://a.org/b) [s](#here)", "audit.md")
        == "[m](missing.md) [w](https://a.org/b) [s](#here)"
    )
    assert moved("```\n[a](docs/audit.md)\n```", "index.md") == "```\n[a](docs/audit.md)\n```"
    assert sources.linked_files(tmp_path) == ["results/a.json"]


def test_addresses_and_sources_agree() -> None:
    for page in (*sources.MOVED, "docs/audit.md", "docs/how-to/own-data.md", "results/eval-smollm2/table.md"):
        assert sources.source_of(sources.address(page)) == page


# ---------------------------------------------------------------------------------------------- the log

LOG = """# Log

Introduction.

* 2026-11-30 last
  continued
* 2026-10-02: first, `a * b`
* 2026-11-29 second
* 2026-11-30 very last
"""


def test_the_log_is_split_by_month_and_day() -> None:
    pages = sources.log_pages(LOG)
    assert list(pages) == ["log/2026-11.md", "log/2026-10.md", "log/index.md"]
    assert pages["log/2026-11.md"] == (
        "# 2026-11\n\n## 2026-11-29\n\n* second\n\n## 2026-11-30\n\n* last\n  continued\n* very last"
    )
    assert "Introduction." in pages["log/index.md"]
    assert "[2026-11](2026-11.md) | 3 |" in pages["log/index.md"]


def test_no_word_of_the_log_is_lost() -> None:
    log = (ROOT / "docs/log.md").read_text(encoding="utf-8")
    pages = sources.log_pages(log)
    entries = [re.sub(r"^\* \S+ ", "* ", entry) for entry in re.split(r"\n(?=\* )", log.strip())[1:]]
    shown = [
        e
        for page in pages.values()
        for e in re.split(r"\n+(?=[*#] )", re.sub(r"\n+#.*", "", page))
        if e.startswith("* ")
    ]
    assert sorted(shown) == sorted(entries)


def test_an_entry_without_a_date_is_refused() -> None:
    with pytest.raises(ValueError, match="no date: \\* second"):
        sources.log_pages("# Log\n\n* 2026-11-29 first\n* second")


# ---------------------------------------------------------------------------------------------- the pages


def test_every_page_has_a_place_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    places = re.findall(r"[\w/*-]+(?:\.md|/\*)", navigation)
    pages = [str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")] + list(sources.MOVED)
    lost = [p for p in pages if not any(fnmatch(sources.address(p), place) for place in places)]
    assert lost == []


def test_the_index_of_decisions_is_complete() -> None:
    folder = ROOT / "docs/decisions"
    index = (folder / "README.md").read_text(encoding="utf-8")
    titles = {p.name: p.read_text(encoding="utf-8").split("\n")[0] for p in folder.glob("[0-9]*.md")}
    rows = dict(re.findall(r"^\| \[\d{3}\]\(([^)]+)\) \| (.+) \|$", index, flags=re.MULTILINE))
    assert rows == {name: re.sub(r"^# \d{3}:? ", "", title) for name, title in titles.items()}
    numbers = {int(name[:3]) for name in titles}
    assert len(numbers) == len(titles)
    assert set(range(1, max(numbers))) - numbers == {6, 7, 8, 9}, (
        "say in docs/decisions/README.md why a number is missing"
    )
