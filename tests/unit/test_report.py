"""The report from the files of a run directory: complete, partial and hostile."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from truestep.errors import UserError
from truestep.report import figures, tables
from truestep.report.html import pick_rollouts, pick_samples, points, write_report
from truestep.report.tables import ScoreRow, clip, score_table, terminal_table, visible

VOID = {"meta", "br", "link", "path", "use", "rect"}


def write(path: Path, value: Any) -> None:
    """A list as JSON lines, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(v) + "\n" for v in value) if isinstance(value, list) else json.dumps(value)
    )


def score(checkpoint: str, value: float, data: str = "test", **more: Any) -> dict[str, Any]:
    counts = {"n": 200, "correct": round(200 * value), "incorrect": 200 - round(200 * value), "unscored": 0}
    rates = {"truncated_rate": 0.015, "extracted_rate": 0.97, "mean_tokens": 61.4}
    interval = {"score": value, "low": value - 0.05, "high": value + 0.05}
    return {"checkpoint": checkpoint, "data": data, **interval, **counts, **rates, "pass_at": {}, **more}


def metrics(stage: str, **values: list[float]) -> list[dict[str, float]]:
    length = len(next(iter(values.values())))
    return [
        {"step": i + 1, **{f"{stage}/{key.replace('__', '/')}": v[i] for key, v in values.items()}}
        for i in range(length)
    ]


def sample(step: int, verdict: str, text: str = "so \\boxed{4}", problem: str = "p1") -> dict[str, Any]:
    return {
        "step": step,
        "problem_id": problem,
        "completion": text,
        "gold": "4",
        "verdict": verdict,
        "num_tokens": 5,
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    summary = {
        "name": "demo",
        "seed": 3,
        "status": "done",
        "model": {"path": "tiny", "num_parameters": 1000000},
    }
    summary["scores"] = [
        score("base", 0.125),
        score("rl", 0.714, pass_at={"4": {"value": 0.9, "low": 0.86, "high": 0.93}}),
    ]
    stage = {
        "name": "rl",
        "kind": "rl",
        "steps": 3,
        "flops_paper": 3.2e15,
        "flops_full": 4.75e15,
        "seconds": 4332,
    }
    summary["stages"] = [{**stage, "tokens": {"rollout_tokens": 123456, "trained_pairs": 7}}]
    write(tmp_path / "summary.json", summary)
    write(
        tmp_path / "stages/01-rl/metrics.jsonl",
        metrics("rl", loss=[0.3, 0.2, 0.1], reward=[0.1, 0.4, 0.7], flops_paper=[1e15, 2e15, 3.2e15]),
    )
    write(
        tmp_path / "stages/01-rl/rollouts.jsonl",
        [sample(1, "correct"), sample(3, "incorrect", "wrong at last")],
    )
    samples = [{"header": True, "identity": "x"}, sample(0, "incorrect", "a readable wrong answer")]
    write(tmp_path / "evaluations/rl/test.samples.jsonl", samples)
    (tmp_path / "resolved.toml").write_text('name = "demo"\ntoken = "hf_abcdefghijklmnop"\n')
    write(
        tmp_path / "provenance.json",
        {"commit": "abc", "versions": {"torch": "2.10"}, "command": ["truestep", "run"]},
    )
    return tmp_path


class Page(HTMLParser):
    """Checks nesting, and collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for key, value in attrs if key == "id"]
        assert not [key for key, _ in attrs if key.startswith("on") or key in ("src", "srcset", "action")]
        assert all((value or "").startswith("#") for key, value in attrs if key.endswith("href"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


# -------------------------------------------------------------------------------------------- the page


def test_the_page_says_what_the_files_say(run: Path) -> None:
    page = page_of(run)
    assert "On test, base scored 12.5 % [7.5, 17.5]; rl 71.4 % [66.4, 76.4]." in page.text
    for text in (
        "90.0 % [86.0, 93.0]",
        "3.20 × 10¹⁵",
        "4.75 × 10¹⁵",
        "123,456 rollout",
        "1 h 12 min",
        "1,000,000",
    ):
        assert text in page.text, text
    for text in (
        "a readable wrong answer",
        "wrong at last",
        'name = "demo"',
        "versions · torch",
        "truestep run",
    ):
        assert text in page.text, text
    assert "hf_abcdefghijklmnop" not in page.text
    assert "trained pairs" not in page.text
    assert page.tags.count("svg") == 1 + 2 + 2  # scores, score and reward by FLOPs, loss and reward by step
    assert len(page.ids) == len(set(page.ids))


def test_the_page_is_complete_in_itself_and_always_the_same(run: Path) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    text = first.decode()
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in text
    assert not set(Page(text).tags) & {"script", "link", "img", "iframe", "object", "form", "base"}
    assert "url(http" not in text
    assert "@import" not in text
    assert set(re.findall(r"https?://[^\s\"<]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert re.search(r"Date|\d\d:\d\d:\d\d", text) is None


HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></dd></dl></details></style></svg><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "{{ 7*7 }} {% for x in y %} ${7*7}",
    "\x1b[2J\x1b]0;owned\x07\x00\x7f\x9b",
    "\u202eabc\u200b\ufeff\ud800\U000e0041",
    "$\\frac{1}$ [bold red]markup[/] <b>&amp;",
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_is_text_wherever_it_comes_from(run: Path, hostile: str) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary |= {
        "name": hostile,
        "status": hostile,
        "overlap": {"pairs": [{"train": hostile, "evaluation": hostile}]},
    }
    summary["scores"] += [score(hostile, 0.5, data=hostile)]
    summary["stages"][0] |= {"kind": hostile, "tokens": {hostile + "_tokens": 3}}
    summary["model"] = {"path": hostile}
    summary["comparisons"] = [{"from": hostile, "to": hostile, "data": hostile, "difference": 0.1}]
    write(run / "summary.json", summary)
    row = dict.fromkeys(
        ("problem_id", "prompt", "completion", "gold", "extracted", "reason", "verdict", "stop"), hostile
    )
    write(run / "stages/01-rl/rollouts.jsonl", [{"step": 1, **row}])
    write(run / "evaluations/rl/test.samples.jsonl", [row])
    (run / "resolved.toml").write_bytes(hostile.encode("utf-8", "surrogatepass"))
    write(run / "provenance.json", {hostile: hostile})
    page = page_of(run)
    assert not set(page.tags) & {"script", "img", "b"}
    assert visible(hostile) in page.text
    assert visible(page.text) == page.text


def test_huge_texts_are_clipped_in_the_middle(run: Path) -> None:
    write(run / "stages/01-rl/rollouts.jsonl", [sample(1, "correct", "BEGIN" + "x" * 3_000_000 + "END")])
    page = write_report(run).read_text()
    assert len(page) < 500_000
    assert re.search(r"BEGINx+\n\[… 2,99\d,\d\d\d characters left out …\]\nx+END", page)


@pytest.mark.parametrize(
    "missing",
    [
        ["summary.json"],
        ["stages"],
        ["evaluations"],
        ["summary.json", "stages"],
        ["summary.json", "evaluations", "provenance.json", "resolved.toml"],
        ["stages/01-rl/metrics.jsonl"],
        ["stages/01-rl/rollouts.jsonl", "stages/01-rl/metrics.jsonl", "summary.json"],
    ],
)
def test_a_run_that_lacks_files_still_has_a_report(run: Path, missing: list[str]) -> None:
    for name in missing:
        path = run / name
        for file in [path] if path.is_file() else list(path.rglob("*.json*")):
            file.unlink()
    assert "truestep run" in page_of(run).text


def test_an_interrupted_run_says_so_and_shows_what_it_has(run: Path) -> None:
    write(run / "summary.json", {"name": "demo", "status": "interrupted", "scores": [], "stages": []})
    with (run / "stages/01-rl/metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rl/lo')
    page = page_of(run)
    assert "This run was interrupted. None of the run's checkpoints has been evaluated." in page.text
    assert "loss" in page.text.lower()
    assert page.tags.count("svg") == 3


def test_what_is_not_a_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a run directory \(no resolved.toml\)"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary.json is not valid JSON"):
        write_report(tmp_path)


def test_without_matplotlib_the_numbers_are_there_and_the_page_says_what_is_missing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "can_draw", lambda: False)
    page = page_of(run)
    assert "svg" not in page.tags
    assert "71.4 % [66.4, 76.4]" in page.text
    assert 'pip install "truestep[train]"' in page.text


def test_the_report_is_written_without_torch_and_imported_without_matplotlib(run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import truestep.report.html as h; import truestep.evaluate.compare;"
        "assert 'matplotlib' not in sys.modules; h.write_report(Path(sys.argv[1]));"
        "assert not {'torch', 'transformers', 'scipy', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(run)], check=True, timeout=120)


# --------------------------------------------------------------------------------------------- choices


def test_rollouts_are_of_the_first_middle_and_last_step_one_of_each_verdict() -> None:
    rows = [
        sample(step, verdict) for step in range(1, 8) for verdict in ("correct", "incorrect", "incorrect")
    ]
    picked = pick_rollouts(rows)
    assert [(row["step"], row["verdict"]) for row in picked] == [
        (step, verdict) for step in (1, 4, 7) for verdict in ("correct", "incorrect")
    ]
    assert pick_rollouts([]) == []


def test_evaluation_samples_start_with_wrong_ones_of_different_problems() -> None:
    rows = [sample(0, "correct", problem=f"p{i}") for i in range(5)]
    rows += [sample(0, "incorrect", problem=f"q{i // 4}") for i in range(40)] + [
        sample(0, "unscored", problem="r")
    ]
    picked = pick_samples(rows)
    assert [(row["verdict"], row["problem_id"]) for row in picked] == [
        ("incorrect", "q0"),
        ("incorrect", "q1"),
        ("incorrect", "q2"),
        ("correct", "p0"),
        ("unscored", "r"),
    ]


def test_points_leave_out_what_is_not_a_finite_number() -> None:
    rows = [
        {"step": 1, "a/x": 2},
        {"step": 2},
        {"step": 3, "a/x": float("nan")},
        {"step": 4, "a/x": None, "b/x": 9},
    ]
    assert points(rows, "a", "x") == [(1.0, 2.0)]


def test_thinning_keeps_every_extreme() -> None:
    series = [(float(i), 0.0) for i in range(20_000)]
    series[12_345], series[777] = (12_345.0, 9.0), (777.0, -9.0)
    kept = figures.thin(series)
    assert len(kept) <= figures.MAX_POINTS + 4
    assert {(12_345.0, 9.0), (777.0, -9.0), series[0], series[-1]} <= set(kept)
    assert kept == sorted(kept)


def test_a_score_of_100_percent_ends_inside_the_figure() -> None:
    svg = figures.scores(
        [
            ScoreRow(checkpoint=n, data="t", score=s, low=s - 0.01, high=s)
            for n, s in (("a", 1.0), ("b", 0.01))
        ]
    )
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])  # type: ignore[index]
    (x,) = re.findall(r'font-size: 9px[^>]* x="([\d.]+)"[^>]*>100.0 %', svg)
    assert float(x) + 7 * 0.65 * 9 < width, "0.65 em is more than the mean width of a digit or sign"
    assert "101 %" not in svg


def test_curves_have_a_description_and_the_colours_of_the_page() -> None:
    svg = figures.curve("Loss", {"a": [(1, 2.0), (2, 1.0)], "b": [(1, 3.0)], "nothing": []})
    assert svg.startswith('<svg role="img" aria-label="Loss against step: a from 2 to 1; b from 3 to 3"')
    assert "var(--blue)" in svg
    assert "var(--orange)" in svg
    assert "var(--green)" not in svg
    assert re.search(r"#0102\d\d|#000000", svg) is None
    assert figures.curve("Loss", {"a": []}) == ""


# ---------------------------------------------------------------------------------------------- tables


def test_score_rows_come_from_the_summary_or_else_from_the_results(run: Path) -> None:
    assert [(r.checkpoint, r.score) for r in score_table(run)] == [("base", 0.125), ("rl", 0.714)]
    (run / "summary.json").unlink()
    assert score_table(run) == []
    for checkpoint in ("rl", "base"):
        write(
            run / f"evaluations/{checkpoint}/test.results.json",
            {"estimate": {"score": 0.5, "num_problems": 3}},
        )
    assert [(r.checkpoint, r.data, r.score, r.n) for r in score_table(run)] == [
        ("base", "test", 0.5, None),
        ("rl", "test", 0.5, None),
    ]


def test_the_terminal_shows_plain_text_and_breaks_no_interval() -> None:
    rows = [
        ScoreRow(
            checkpoint="[red]a|b[/]\x1b[31m",
            data="<i>*x*",
            score=0.714,
            low=0.68,
            high=0.746,
            n=200,
            unscored=2,
        ),
        ScoreRow(checkpoint="base", data="t", pass_at={"8": {"value": 1.0, "low": 0.9, "high": 1.0}}),
    ]
    written = io.StringIO()
    Console(file=written, width=300, force_terminal=False).print(terminal_table(rows, "[b]scores", width=300))
    for text in ("71.4 %", "[68.0, 74.6]", "100.0 %", "[90.0, 100.0]", "pass@8"):
        assert text in written.getvalue()
    assert "[red]a|b[/]⟨U+001B⟩[31m" in written.getvalue()
    assert "[b]scores" in written.getvalue()


@pytest.mark.parametrize("ks", [("4",), ("2", "4", "8", "16")])
@pytest.mark.parametrize("name", ["rl", "a-long-name-of-a-checkpoint"])
def test_no_interval_is_broken_at_80_columns(name: str, ks: tuple[str, ...]) -> None:
    full = {"value": 1.0, "low": 0.986, "high": 1.0}
    row = ScoreRow(
        checkpoint=name, data=f"data-of-{name}", score=0.893, low=0.863, high=0.918, n=4000, correct=3574,
        incorrect=420, unscored=6, truncated_rate=0.015, pass_at=dict.fromkeys(ks, full),
    )  # fmt: skip
    written = io.StringIO()
    Console(file=written, width=80, force_terminal=False).print(terminal_table([row], width=80))
    text = written.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for whole in ("89.3 %", "[86.3, 91.8]", "100.0 %", "[98.6, 100.0]", "3,574/420/6", f"pass@{ks[-1]}"):
        assert whole in text, whole
    assert "…" not in text
    assert all(f"pass@{k}" in text for k in ks), "what has no room is named"


@pytest.mark.parametrize("prompt", ["", "paper"])
def test_the_terminal_shows_unreadable_answers_if_there_are_any(prompt: str) -> None:
    def shown(rate: float | None) -> str:
        row = ScoreRow(checkpoint="rl", data="t", prompt=prompt, score=0.5, n=8, unreadable_rate=rate)
        written = io.StringIO()
        Console(file=written, width=80, force_terminal=False).print(terminal_table([row], width=80))
        return " ".join(written.getvalue().split())

    assert "12.5 %" in shown(0.125)
    assert "unreadable answers" in shown(0.125)
    assert "unreadable" not in shown(0.0) + shown(None)


def test_numbers_are_written_for_people() -> None:
    assert (
        tables.percent(None) == tables.whole(None) == tables.duration(None) == tables.scientific(None) == "–"
    )
    assert (tables.percent(0.0), tables.scientific(0)) == ("0.0 %", "0")
    assert tables.with_interval(0.5, None, None) == "50.0 %"
    assert [tables.duration(s) for s in (0.25, 59.9, 61, 3599.7, 7322)] == [
        "0.2 s",
        "59.9 s",
        "1 min 1 s",
        "1 h 0 min",
        "2 h 2 min",
    ]
    assert clip("abc", 3) == "abc"


def test_visible_text_keeps_letters_of_every_script() -> None:
    text = "naïve 数学 Привет مرحبا √2 ≤ π 🙂\n\tindented"
    assert visible(text) == text
    assert visible("a\rb\x85\u2066") == "a⟨U+000D⟩b⟨U+0085⟩⟨U+2066⟩"
