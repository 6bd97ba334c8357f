"""Write the generated documents: the README's picture, audit output and table of stacks from results/, and
docs/metrics.md from the table of metrics.

    python benchmarks/readme_figures.py [--check]

With ``--check``, no file is written, and the exit code is 1 if a file is out of date.
Held by: tests/unit/test_generated.py
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import pages
from rich.console import Console

from truestep.audit.present.table import findings_table
from truestep.audit.present.words import number
from truestep.rundir import read_json
from truestep.train import metrics

ROOT = Path(__file__).resolve().parent.parent
AUDIT, README, PICTURE = ROOT / "results/audit", ROOT / "README.md", ROOT / "docs/img/weights.svg"
METRICS = ROOT / "docs/metrics.md"
Finding = Mapping[str, Any]
OFFLOAD = {"stage": 2, "offload": True, "processes": 1}

# ---------------------------------------------------------------------------------------------- the table of stacks


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One row of the table. ``subjects`` and ``having`` (settings of the configuration) select its findings;
    ``package`` is the package whose releases the row compares."""

    name: str
    package: str
    subjects: tuple[str, ...]
    having: Mapping[str, Any] = field(default_factory=dict)

    def holds(self, finding: Finding) -> bool:
        configuration = {"manual": False, "optimizer": "sgd", **finding["configuration"]}
        wanted = {"manual": False, "optimizer": "sgd", "processes": 1, **self.having}
        return finding["subject"] in self.subjects and all(
            configuration.get(k) == v for k, v in wanted.items()
        )


STACKS = (
    Stack(
        name="DeepSpeed: ZeRO-2, offloaded optimizer",
        package="deepspeed",
        subjects=("DeepSpeed",),
        having=OFFLOAD,
    ),
    Stack(
        name="transformers or TRL on that DeepSpeed",
        package="deepspeed",
        subjects=("transformers Trainer + DeepSpeed", "TRL SFTTrainer + DeepSpeed"),
        having={"zero_stage": 2, "offload": True},
    ),
    Stack(name="transformers Trainer", package="transformers", subjects=("transformers Trainer",)),
    Stack(
        name="OpenRLHF SFT", package="openrlhf", subjects=("OpenRLHF SFTTrainer",), having={"offload": False}
    ),
    Stack(name="verl: its loss function", package="verl", subjects=("verl agg_loss (function level)",)),
    Stack(name="torchtune SFT", package="torchtune", subjects=("torchtune SFT recipe",)),
    Stack(name="TRL SFTTrainer", package="trl", subjects=("TRL SFTTrainer",)),
    Stack(name="LLaMA-Factory SFT", package="llamafactory", subjects=("LLaMA-Factory",)),
)


def stacks_table(findings: Sequence[Finding]) -> str:
    lines = ["| stack | faulty in | what happens | weights | right in |", "|---|---|---|---|---|"]
    for stack in STACKS:
        found = sorted((f for f in findings if stack.holds(f)), key=lambda f: _release(f, stack.package))
        bad = [f for f in found if f["verdict"] == "FAULT"]
        right = [f for f in found if f["verdict"] == "RIGHT"]
        right = right or [f for f in found if f["verdict"] == "DEFAULT"]  # another objective is not a fault
        assert bad or right, stack.name
        shown = (bad or right)[0]
        parts = shown["fault"].split("; ")
        what = next((part for part in parts if part.startswith("data is lost")), parts[0])
        weights = _weights(shown)
        if shown["verdict"] == "DEFAULT":
            what = f"default: {what.split(', ')[0]}"
        faulty, sound = _releases(bad, stack.package) or "–", _releases(right, stack.package) or "not tested"
        cells = [stack.name, faulty, what or "–", weights, sound]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _release(finding: Finding, package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in finding["versions"][package].split(".")) if finding["versions"] else ()


def _releases(findings: Sequence[Finding], package: str) -> str:
    return ", ".join(dict.fromkeys(f["versions"][package] for f in findings))


def _weights(finding: Finding) -> str:
    return " ".join(number(float(f"{weight:.2g}")) for weight in finding["weights"][0])


# ---------------------------------------------------------------------------------------------- the audit's output


def audit_output(finding: Finding) -> str:
    """Return the output of ``truestep audit deepspeed==0.18.9`` for one finding, 72 columns wide."""
    shown = {**finding, "remedy": "", "reproducer": ""}  # the results were made with --remedy and --reproduce
    file = io.StringIO()
    Console(file=file, width=72, highlight=False).print(findings_table([shown], width=72))
    lines = [line.rstrip()[1:] for line in file.getvalue().splitlines()]
    return "\n".join(["```", "$ truestep audit deepspeed==0.18.9", *lines[:-1], "```"])


# ---------------------------------------------------------------------------------------------------- the picture

WIDTH, HEIGHT, BASE, UNIT = 800, 370, 270, 130
STYLE = """
  .card { fill: #ffffff; stroke: #d0d7de } .ink { fill: #1f2328 } .muted { fill: #57606a }
  .good { fill: #1a7f37 } .bad { fill: #cf222e } .rule { stroke: #8c959f } .gone { fill: none; stroke: #cf222e }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0d1117; stroke: #30363d } .ink { fill: #e6edf3 } .muted { fill: #9da7b3 }
    .good { fill: #3fb950 } .bad { fill: #ff7b72 } .rule { stroke: #6e7681 } .gone { stroke: #ff7b72 }
  }
  text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; font-size: 26px }
  .weight { font-size: 40px; font-weight: 700 }
"""


def picture(bad: Finding, right: Finding) -> str:
    """Draw the recovered weights of two releases, side by side."""
    title = (
        f"Weights of the four micro-batches of one optimizer step: {_weights(bad)} in DeepSpeed "
        f"{bad['versions']['deepspeed']}, {_weights(right)} in {right['versions']['deepspeed']}"
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="{HEIGHT * 640 // WIDTH}" '
            f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="card" x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="12"/>',
            *_panel(bad, 40),
            *_panel(right, 440),
            "</svg>\n",
        ]
    )


def _panel(finding: Finding, left: int) -> list[str]:
    middle = left + 160
    lines = [
        f'<text class="ink" x="{middle}" y="50" text-anchor="middle" font-weight="700">DeepSpeed '
        f"{finding['versions']['deepspeed']}</text>",
        f'<line class="rule" x1="{left}" y1="{BASE}" x2="{left + 320}" y2="{BASE}" stroke-width="2"/>',
    ]
    for index, weight in enumerate(finding["weights"][0]):
        x, good = left + 12 + 80 * index, abs(weight - 1) < 0.02
        height = UNIT * max(0.0, weight) if abs(weight) >= 0.02 else UNIT
        shape = "good" if good else "bad" if abs(weight) >= 0.02 else "gone"
        dashed = ' stroke-width="2" stroke-dasharray="6 6"' if shape == "gone" else ""
        lines += [
            f'<rect class="{shape}" x="{x}" y="{BASE - height:.0f}" width="56" height="{height:.0f}"{dashed}/>',
            f'<text class="{"good" if good else "bad"} weight" x="{x + 28}" y="{BASE - height - 14:.0f}" '
            f'text-anchor="middle">{number(weight)}</text>',
        ]
    lines += [
        f'<text class="muted" x="{middle}" y="{BASE + 38}" text-anchor="middle">weight by micro-batch</text>',
        f'<text class="muted" x="{middle}" y="{BASE + 76}" text-anchor="middle">logged loss '
        f"{finding['logged_loss']:.3f}</text>",
    ]
    return lines


# ---------------------------------------------------------------------------------------------------------- files


METRICS_HEAD = """# Metrics

A stage writes one line per step to `metrics.jsonl`, with the keys `STAGE/KEY`. `python benchmarks/readme_figures.py`
generates this page from the table in `src/truestep/train/metrics.py`; a key that is not in the table is an error.
"Within an update" says how values are combined over micro-batches and ranks. "Across updates" says how the values of
the updates of one step are combined.

"""


def marked(text: str, name: str, content: str) -> str:
    """Return the text with ``content`` between the markers of ``name``."""
    begin, end = f"<!-- {name}: benchmarks/readme_figures.py -->", f"<!-- /{name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"README.md has no part {name!r}; put {begin} and {end} around it")
    return f"{before}{begin}\n{content}\n{end}{after}"


def files() -> dict[Path, str]:
    """Return every file that this script writes, with its content."""
    documents = {path.stem: read_json(path)["findings"] for path in sorted(AUDIT.glob("*.json"))}

    def offload(name: str) -> Finding:
        return next(f for f in documents[name] if f["configuration"] == OFFLOAD)

    text = README.read_text(encoding="utf-8")
    text = marked(text, "audit", audit_output(offload("deepspeed-0.18.9")))
    text = marked(text, "stacks", stacks_table([f for found in documents.values() for f in found]))
    drawn = picture(offload("deepspeed-0.18.9"), offload("deepspeed-0.19.0"))
    return {README: text, PICTURE: drawn, METRICS: METRICS_HEAD + metrics.markdown()}


if __name__ == "__main__":
    pages.write_or_check(__doc__, files)
