"""What the documentation site has and docs/ does not: MkDocs calls these functions (mkdocs.yml).

The README is the first page; docs/log.md is split by month; a file outside docs/ that a page links to is copied into the site, so
that no link needs a server of the repository. Every fault is a warning, and the build is strict: a warning fails it.
Held by: tests/unit/test_site.py
"""

from __future__ import annotations

import logging
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import checks
import sources
from mkdocs.structure.files import File

LOG = logging.getLogger("mkdocs.hooks.site")
ROOT = Path(__file__).resolve().parent.parent.parent


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, the files that pages link to, and the pages for which the navigation has a pattern."""
    log = ROOT / "docs/log.md"
    files.remove(files.src_uris["log.md"])
    for address, text in sources.log_pages(log.read_text(encoding="utf-8")).items():
        files.append(File.generated(config, address, content=text))
    for source, address in sources.MOVED.items():
        files.append(File.generated(config, address, abs_src_path=str(ROOT / source)))
    for source in sources.linked_files(ROOT):
        files.append(File.generated(config, sources.address(source), abs_src_path=str(ROOT / source)))
    named = {page for page in _pages(config.nav) if "*" not in page}
    config.nav = _expand(config.nav, sorted(set(files.src_uris) - named))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point the links of a page to addresses in the site."""
    return sources.with_site_links(markdown, page.file.src_uri, ROOT)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Compare the page's structure with that of CommonMark, which the repository's own view shows."""
    for difference in checks.structure_differences(page.markdown, html):
        LOG.warning("%s: %s", page.file.src_uri, difference)
    return html


def on_post_build(config: Any) -> None:
    """Take the addresses of other hosts out of the theme's scripts, then look for anything that a page would fetch."""
    site = Path(config.site_dir)
    shutil.rmtree(site / "assets/javascripts/lunr")  # the search's other languages
    for script in site.rglob("*.js"):
        text = script.read_text(encoding="utf-8")
        local = checks.without_remote_scripts(text)
        if local != text:
            script.write_text(local, encoding="utf-8")
    for fault in checks.external_loads(site):
        LOG.warning("%s", fault)


def _pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for item in (nav.values() if isinstance(nav, dict) else nav) for page in _pages(item)]


def _expand(nav: Any, rest: list[str]) -> Any:
    """The navigation with FOLDER/* replaced by the pages of ``rest`` in that folder."""
    if isinstance(nav, dict):
        return {title: _expand(item, rest) for title, item in nav.items()}
    if isinstance(nav, str):
        return nav
    expanded = []
    for item in nav:
        if isinstance(item, str) and "*" in item:
            expanded += [page for page in rest if fnmatch(page, item) and page.endswith(".md")]
        else:
            expanded.append(_expand(item, rest))
    return expanded
