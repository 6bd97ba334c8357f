"""The report of a whole run in a real browser: hostile text is text, nothing runs, nothing is asked for."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from truestep.evaluate.compare import compare
from truestep.evaluate.estimate import estimate
from truestep.report.evaluation import write_evaluation_report
from truestep.report.html import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "</pre></details></style><svg onload=document.title='owned'><h1 id=injected>injected</h1>"
    "<iframe src=javascript:alert(1)></iframe><meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'>"
    "{{ 7*7 }}{% raw %} \x1b[2J\x1b]0;owned\x07 \u202eright to left\u202c \x00 \ud800 $\\alpha$ & <b>"
)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_object(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def sum_text(rng: np.random.Generator, correct: bool) -> dict[str, Any]:
    a, b = (int(x) for x in rng.integers(100, 999, 2))
    found = a + b if correct else a + b - 10
    units = a % 10 + b % 10
    completion = f"units: {a % 10} + {b % 10} = {units}, carry {units // 10}\ntens and hundreds follow\n\\boxed{{{found}}}"
    return {
        "prompt": f"What is {a} + {b}? Show your working and put the answer in \\boxed{{}}.",
        "completion": completion,
        "extracted": str(found),
        "gold": str(a + b),
        "verdict": "correct" if correct else "incorrect",
        "reason": "equal" if correct else "not equal",
        "stop": "stop",
        "num_tokens": len(completion),
    }


def make_run(run: Path, hostile: str = "") -> Path:
    """A run of SFT then RL with three checkpoints on two data sets, as the pipeline would leave it."""
    rng = np.random.default_rng(0)
    name = "sum3-sft-rl" + hostile
    stages = [write_sft(run, rng), write_rl(run, rng, hostile)]
    scores, comparisons = [], []
    for data, n, k, shares in (
        ("test", 200, 4, (0.02, 0.48, 0.71)),
        ("longer" + hostile, 100, 4, (0.0, 0.11, 0.34)),
    ):
        before: list[dict[str, Any]] = []
        for checkpoint, share in zip(("base", "sft", "rl"), shares, strict=True):
            rows = evaluation_rows(rng, n, k, share)
            if hostile:
                own = {"completion": hostile, "extracted": hostile, "gold": hostile, "reason": hostile}
                rows = [{**row, **own, "problem_id": row["problem_id"] + hostile} for row in rows]
            file = run / f"evaluations/{checkpoint}/{data.removesuffix(hostile or ' ')}.samples.jsonl"
            write_lines(file, [{"header": True, "identity": "a"}, *rows])
            found = estimate(rows, (1, 4)).to_json()
            scores.append({"checkpoint": checkpoint, "data": data, **found})
            if before:
                comparisons.append(
                    {
                        "from": scores[-2]["checkpoint"],
                        "to": checkpoint,
                        "data": data,
                        **compare(before, rows).to_json(),
                    }
                )
            before = rows
    overlap = {
        "train": "train",
        "evaluation": "test" + hostile,
        "num_train": 4000,
        "num_evaluation": 200,
        "exact": {"num_evaluation": 3, "examples": []},
        "ngram": {"num_evaluation": 5, "num_train": 7, "num_short": 12, "examples": []},
    }
    summary = {
        "name": name,
        "seed": 1,
        "scores": scores,
        "comparisons": comparisons,
        "stages": stages,
        "model": {"path": "tiny", "num_parameters": 1_052_800},
        "overlap": {"ngram_words": 13, "pairs": [overlap]},
        "status": "done",
    }
    write_object(run / "summary.json", summary)
    (run / "resolved.toml").write_text(
        f'name = "sum3"\nseed = 1\n\n[model]\npath = "tiny"\n# {hostile!r}\n' * 6
    )
    stamp = {
        "commit": "4f0c2f9d6e7a",
        "uncommitted_changes": False,
        "command": ["truestep", "run", "recipes/sum3.toml", hostile],
        "versions": {"torch": "2.10.0", "numpy": "2.4.6"},
        "hardware": {"cpu": "Generic x86-64", "cores": 2, "memory_gib": 15.6},
    }
    write_object(run / "provenance.json", {**stamp, "seed": 1, "python": "3.11.2"})
    return run


def evaluation_rows(rng: np.random.Generator, n: int, k: int, share: float) -> list[dict[str, Any]]:
    chances = rng.beta(2 * share + 1e-3, 2 * (1 - share) + 1e-3, n)
    rows = []
    for problem, chance in enumerate(chances):
        for sample in range(k):
            row = {
                "problem_id": f"sum-{problem:04d}",
                "sample_index": sample,
                **sum_text(rng, rng.random() < chance),
            }
            if rng.random() < 0.006:
                row |= {"verdict": "unscored", "reason": "timeout after 5 s", "extracted": ""}
            elif row["verdict"] == "incorrect" and rng.random() < 0.1:
                row |= {"stop": "length", "extracted": "", "reason": "no answer"}
            rows.append(row)
    return rows


def write_sft(run: Path, rng: np.random.Generator) -> dict[str, Any]:
    rows = []
    for step in range(1, 201):
        values = {
            "loss": 0.12 + 2.6 * math.exp(-step / 35) + rng.normal(0, 0.03),
            "grad_norm": 0.4 + 3 * math.exp(-step / 30) + abs(rng.normal(0, 0.2)),
            "learning_rate": 1e-3 * min(step / 20, 1) * (0.55 + 0.45 * math.cos(math.pi * step / 200)),
            "entropy": 0.2 + 2 * math.exp(-step / 40),
            "flops_paper": 2.1e10 * step,
            "flops_full": 3.3e10 * step,
        }
        if step % 40 == 0:
            values["dev/score"] = 0.48 * (1 - math.exp(-step / 70))
        rows.append({"step": step, **{f"sft/{key}": value for key, value in values.items()}})
    write_lines(run / "stages/01-sft/metrics.jsonl", rows)
    tokens = {
        "demonstration_tokens": 668_200,
        "prompt_tokens": 310_400,
        "trained_pairs": 99,
        "rollout_tokens": 0,
    }
    cost = {"flops_paper": 4.2e12, "flops_full": 6.6e12, "seconds": 96.2}
    return {"name": "sft", "kind": "sft", "steps": 200, **cost, "tokens": tokens}


def write_rl(run: Path, rng: np.random.Generator, hostile: str) -> dict[str, Any]:
    rows, rollouts = [], []
    for step in range(1, 151):
        reward = 0.48 + 0.26 * (1 - math.exp(-step / 50))
        values = {
            "loss": rng.normal(0, 0.01),
            "grad_norm": 0.3 + abs(rng.normal(0, 0.06)),
            "learning_rate": 1e-4,
            "entropy": 0.22 - 0.0006 * step + rng.normal(0, 0.006),
            "reward": reward + rng.normal(0, 0.03),
            "reward_std": 0.34 + rng.normal(0, 0.01),
            "mixed_groups": 0.6 - 0.001 * step + rng.normal(0, 0.03),
            "unscored": float(rng.poisson(0.3)),
            "completions/mean_length": 58 + 0.05 * step + rng.normal(0, 1),
            "completions/truncated": abs(rng.normal(0.01, 0.005)),
            "clip_ratio/low": abs(rng.normal(0.001, 0.0004)),
            "clip_ratio/high": abs(rng.normal(0.002, 0.0006)),
            "sampling/logprob_difference_mean": 2e-7 * (1 + abs(rng.normal(0, 0.2))),
            "sampling/logprob_difference_max": 3e-6 * (1 + abs(rng.normal(0, 0.6))),
            "sampling/kl": 1e-9 * (1 + abs(rng.normal(0, 1))),
            "flops_paper": 4.2e12 + 6.1e10 * step,
            "flops_full": 6.6e12 + 9.4e10 * step,
        }
        if step % 25 == 0:
            values["dev/score"] = reward - 0.02
        rows.append({"step": step, **{f"rl/{key}": value for key, value in values.items()}})
        for sample in range(3):
            row = sum_text(rng, sample == 0)
            if hostile and step == 150:
                row |= {"completion": hostile + "A" * 200_000, "gold": hostile, "verdict": hostile}
            reward_of = float(row["verdict"] == "correct")
            rollouts.append(
                {"step": step, "problem_id": f"sum-{17 * step % 997}", "reward": reward_of, **row}
            )
    write_lines(run / "stages/02-rl/metrics.jsonl", rows)
    write_lines(run / "stages/02-rl/rollouts.jsonl", rollouts)
    tokens = {"rollout_tokens": 1_142_000, "rollout_trained_tokens": 1_142_000, "prompt_tokens": 402_000}
    cost = {"flops_paper": 9.15e12, "flops_full": 1.41e13, "seconds": 1264.0}
    return {"name": "rl", "kind": "rl", "steps": 150, **cost, "tokens": tokens}


def browse(page: Path, profile: Path, *words: str) -> str:
    assert CHROMIUM is not None
    quiet = [
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", *quiet]
    command += [f"--user-data-dir={profile}", *words, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
def test_hostile_text_stays_text_in_a_real_browser(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "run", HOSTILE))
    dom = browse(page, tmp_path / "profile", "--dump-dom")
    assert dom.rstrip().endswith("</html>")
    assert "</footer>" in dom, "the page ended before its end"
    title = dom.partition("<title>")[2].partition("</title>")[0]
    assert title.startswith("sum3-sft-rl&lt;script&gt;")
    for injected in ("<script", "<iframe", "<img", "<h1 id", 'id="injected"', "<svg onload"):
        assert injected not in dom, injected
    assert "&lt;script&gt;document.title" in dom
    assert dom.count("<svg role=") >= 20
    assert "⟨U+001B⟩[2J" in dom
    assert "⟨U+202E⟩" in dom
    assert not set(dom) & {"\x1b", "\x00", "\u202e", "\ud800"}


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
def test_the_policy_would_stop_what_escaping_had_missed(tmp_path: Path) -> None:
    """The same browser runs the same script where the policy is taken out: the test above can fail."""
    page = write_report(make_run(tmp_path / "run"))
    broken = page.read_text().replace("</main>", "<script>document.title='owned'</script></main>")
    start = broken.index('<meta http-equiv="Content-Security-Policy"')
    without = broken[:start] + broken[broken.index(">", start) + 1 :]
    titles = []
    for text in (broken, without):
        page.write_text(text)
        dom = browse(page, tmp_path / "profile", "--dump-dom")
        titles.append(dom.partition("<title>")[2].partition("</title>")[0])
    assert titles == ["sum3-sft-rl · truestep", "owned"]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
def test_a_wide_window_needs_no_sideways_scrolling(tmp_path: Path) -> None:
    """Measured by a script that is put into a copy of the page in the place of its policy."""
    page = write_report(make_run(tmp_path / "run", HOSTILE))
    text = page.read_text()
    start = text.index('<meta http-equiv="Content-Security-Policy"')
    text = text[:start] + text[text.index(">", start) + 1 :]
    measure = (
        "<script>document.querySelectorAll('details').forEach(d => d.open = true);"
        "const hidden = [document.documentElement, ...document.querySelectorAll('.card')];"
        "document.title = Math.max(...hidden.map(e => e.scrollWidth - e.clientWidth)) + '/' + innerWidth</script>"
    )
    page.write_text(text.replace("</body>", measure + "</body>"))
    dom = browse(page, tmp_path / "profile", "--window-size=1280,900", "--dump-dom")
    beyond, window = dom.partition("<title>")[2].partition("</title>")[0].split("/")
    assert int(beyond) <= 0
    assert int(window) <= 1280


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
def test_the_filters_of_an_evaluation_show_what_they_say(tmp_path: Path) -> None:
    """Every label is clicked by a script that is put into a copy of the page in the place of its policy."""
    run = tmp_path / "run"
    kinds = [
        ("correct", "stop", "1"),
        ("incorrect", "stop", "2"),
        ("incorrect", "length", ""),
        ("unscored", "stop", "3"),
    ]
    rows = [
        {"problem_id": f"p{i}", "sample_index": k, "prompt": "p", "completion": "c", "gold": "1", "num_tokens": 3,
         "verdict": "correct" if i == 4 and k else verdict, "strict": verdict, "stop": stop, "extracted": found}
        for i, (verdict, stop, found) in enumerate([*kinds, kinds[1]])
        for k in range(2)
    ]  # fmt: skip
    write_lines(run / "evaluations/plain/sums.samples.jsonl", rows)
    score = {
        "benchmark": "sums", "prompt": "plain", "score": 0.4, "low": 0.1, "high": 0.8, "n": 10, "num_problems": 5,
        "unscored": 2, "truncated_rate": 0.2, "extracted_rate": 0.8, "mean_tokens": 3, "strict_score": 0.4,
    }  # fmt: skip
    summary = {"kind": "evaluation", "name": "clicks", "scores": [score], "seeds": {}, "spread": []}
    write_object(run / "summary.json", summary)
    page = write_evaluation_report(run)
    text = page.read_text()
    start = text.index('<meta http-equiv="Content-Security-Policy"')
    text = text[:start] + text[text.index(">", start) + 1 :]
    click = (
        "<script>document.title = [...document.querySelectorAll('.filter > label')].map(label => { label.click();"
        "const shown = [...document.querySelectorAll('.rows > details')].filter(d => d.checkVisibility());"
        "return label.textContent + ':' + shown.map(d => d.querySelector('.id').textContent.slice(0, 2)).join(' ');"
        "}).join('|')</script>"
    )
    page.write_text(text.replace("</body>", click + "</body>"))
    dom = browse(page, tmp_path / "profile", "--dump-dom")
    assert dom.partition("<title>")[2].partition("</title>")[0].split("|") == [
        "All5:p3 p1 p2 p4 p0",
        "Incorrect2:p1 p2",
        "Sometimes correct1:p4",
        "Correct1:p0",
        "Unscored1:p3",
        "Cut off1:p2",
        "No answer found1:p2",
    ]
