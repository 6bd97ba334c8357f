"""The page of a log: what it says and draws, hostile text, and many ranks and steps."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import logs
import pytest

from truestep.guard.page import BARS, ROWS, render_page
from truestep.guard.runs import read

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TAGS = {
    "html", "head", "meta", "title", "style", "body", "main", "header", "p", "h1", "h2", "h3", "section", "div", "span",
    "svg", "line", "text", "rect", "path", "dl", "dt", "dd", "ul", "li", "table", "thead", "tbody", "tr", "th", "td",
    "details", "summary", "footer",
}  # fmt: skip


def page(path: Path) -> str:
    return render_page(read(path))


def bars(text: str) -> list[tuple[str, str, str]]:
    """Return (class, weight, tokens) of each bar."""
    found = re.findall(
        r'<rect class="(\w+)".*?class="value"[^>]*>([^<]*)<.*?class="tokens"[^>]*>([^<]*)<',
        text,
        flags=re.DOTALL,
    )
    return [(kind, weight, tokens) for kind, weight, tokens in found]


def tags(text: str) -> set[str]:
    found = set()

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            found.add(tag)

    Reader().feed(text)
    return found


def test_a_run_that_drops_micro_batches(tmp_path: Path) -> None:
    logs.train(tmp_path / "log", "dropped")
    text = page(tmp_path / "log")
    assert bars(text) == [("good", "1", "2"), ("off", "0", "27"), ("off", "0", "3"), ("good", "1", "17")]
    assert "Step 1: the intermediate micro-batches are dropped (3 of 3 watched steps are faulty)" in text
    assert "In 3 of 3 watched steps, the update is not the one that was asked for." in text


def test_a_mean_of_means(tmp_path: Path) -> None:
    logs.train(tmp_path / "log", "mean of means")
    text = page(tmp_path / "log")
    assert [kind for kind, _, _ in bars(text)] == ["off"] * 4
    weights = [float(weight) * int(tokens) for _, weight, tokens in bars(text)]
    assert weights == pytest.approx([49 / 4] * 4, rel=1e-2)  # every micro-batch has a quarter


def test_a_right_run(tmp_path: Path) -> None:
    logs.train(tmp_path / "log")
    text = page(tmp_path / "log")
    assert [(kind, weight) for kind, weight, _ in bars(text)] == [("good", "1")] * 4
    assert "No fault was found; in 3 of 3 watched steps, every micro-batch counts once." in text
    assert "FAULT</span>" not in text


def test_a_run_that_was_off(tmp_path: Path) -> None:
    off = {"schema": 1, "kind": "off", "step": 0, "why": "no optimizer was given"}
    text = page(logs.write(tmp_path / "log", off))
    assert bars(text) == []
    assert "no optimizer was given" in text
    assert "No step was watched." in text


def test_the_first_wrong_step_is_drawn(tmp_path: Path) -> None:
    bad = {"verdict": "FAULT", "codes": ["kept"], "fault": "dropped"}
    records = [logs.step(1), logs.step(2, **bad, weights=[[1.0, 0.0, 0.0, 1.0]]), logs.step(3, **bad)]
    text = page(logs.write(tmp_path / "log", logs.header(), *records))
    assert [weight for _, weight, _ in bars(text)] == ["1", "0", "0", "1"]
    assert "Weights at step 2" in text


def test_every_rank_and_micro_batch_is_drawn(tmp_path: Path) -> None:
    text = page(logs.large(tmp_path / "log"))
    assert len(bars(text)) == 8 * 16
    assert text.count("<svg") == 8
    assert re.findall(r">(rank \d)<", text) == [f"rank {n}" for n in range(8)]
    assert [b for b in bars(text) if b[0] == "good"] == [b for b in bars(text) if b[1] == "1"]
    assert len(text) < 200_000
    assert "3 … 1983" in text


def test_ranks_share_a_line_and_long_ranks_are_split(tmp_path: Path) -> None:
    uneven = {
        "weights": [[1.0] * 3, [1.0] * 4, [1.0] * (BARS + 2)],
        "tokens": [[1] * 3, [2] * 4, [3] * (BARS + 2)],
    }
    text = page(logs.write(tmp_path / "log", logs.step(**uneven)))
    assert re.findall(r">(rank \d[^<]*)<", text) == ["rank 0", "rank 1", "rank 2", f"rank 2 from {BARS + 1}"]
    assert [tokens for _, _, tokens in bars(text)] == ["1"] * 3 + ["2"] * 4 + ["3"] * (BARS + 2)


def test_what_is_not_drawn_is_counted(tmp_path: Path) -> None:
    ranks = 1000
    text = page(logs.write(tmp_path / "log", logs.step(weights=[[1.0] * BARS] * ranks, tokens=[])))
    assert text.count("<svg") == ROWS
    assert f"{(ranks - ROWS) * BARS} more micro-batches are not drawn." in text


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    text = page(logs.hostile(tmp_path / "log"))
    assert tags(text) <= TAGS
    assert not set(text) & {"\x1b", "\u202e"}
    assert "&lt;script&gt;document.title" in text
    assert "<script" not in text
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("made", [logs.large, logs.hostile])
def test_the_page_is_not_wider_than_the_window(tmp_path: Path, made: object, width: int) -> None:
    """Measured by a script in a copy without the policy, in a frame, because Chromium has no narrow windows."""
    text = page(made(tmp_path / "log"))  # type: ignore[operator]
    start = text.index('<meta http-equiv="Content-Security-Policy"')
    text = text[:start] + text[text.index(">", start) + 1 :]
    beyond = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    script = f"<script>document.querySelectorAll('details').forEach(d => d.open = true); parent.postMessage({beyond}, '*')</script>"
    (tmp_path / "page.html").write_text(text.replace("</body>", script + "</body>"))
    frame = f'<iframe src="page.html" style="border:0;width:{width}px;height:900px"></iframe>'
    listen = "<script>onmessage = e => document.title = 'beyond ' + e.data</script>"
    (tmp_path / "frame.html").write_text(f"<!doctype html><title>-</title>{listen}{frame}")
    assert CHROMIUM is not None
    words = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--window-size=1300,900",
    ]
    words += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    words += ["--virtual-time-budget=3000", (tmp_path / "frame.html").as_uri()]
    dom = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<title>beyond 0</title>" in dom, re.findall("<title>.*?</title>", dom)
