"""Audit pinned releases from the package index, one command each, and write the results to docs/findings.md.

    python benchmarks/audit_findings.py [--only TEXT] [--table-only]

Results are stored as results/audit/NAME.json. A release that has a result is not run again (delete the file
to repeat it).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import pages
from stack_data import kinds_of

from truestep.audit.postmortem.measured import FAULTY, UPSTREAM
from truestep.audit.present.words import configuration_in_words
from truestep.rundir import read_json, write_atomic, write_json

ROOT = Path(__file__).resolve().parent.parent
FOLDER, PAGE = ROOT / "results/audit", ROOT / "docs/findings.md"
WITHOUT_REMEDY = ("verl-sft", "transformers-moe", "lightning")  # known: a data set, a loader, no release
VERL = ("0.5.0", "0.6.0", "0.6.1", "0.7.0", "0.7.1", "0.8.0", "0.9.0", "0.9.1")
TARGETS: dict[str, tuple[str, ...]] = {
    # Its loop needs transformers, which accelerate does not bring, so the installed release is audited.
    "accelerate-1.15.0": ("--only", "accelerate"),
    "deepspeed-0.15.1": ("deepspeed==0.15.1",),
    "deepspeed-0.15.2": ("deepspeed==0.15.2",),
    "deepspeed-0.18.9": ("deepspeed==0.18.9",),
    "deepspeed-0.19.0": ("deepspeed==0.19.0",),
    "deepspeed-0.19.8": ("deepspeed==0.19.8",),
    "deepspeed-reused-0.19.8": ("deepspeed==0.19.8", "--only", "used twice"),
    "transformers-4.45.2": ("transformers==4.45.2",),
    "transformers-4.46.3-gpt2": ("transformers==4.46.3", "--arch", "gpt2"),
    "transformers-5.23.0": ("transformers==5.23.0",),
    "transformers-5.23.0+deepspeed-0.18.9": ("transformers==5.23.0+deepspeed==0.18.9",),
    "llamafactory-0.9.5": ("llamafactory==0.9.5",),
    "openrlhf-0.10.2": ("openrlhf==0.10.2",),
    "openrlhf-0.10.4": ("openrlhf==0.10.4",),
    "openrlhf-0.11.2": ("openrlhf==0.11.2",),
    "openrlhf-0.11.2+deepspeed-0.18.9": ("openrlhf==0.11.2+deepspeed==0.18.9",),
    "torchtune-0.6.1": ("torchtune==0.6.1",),
    "verl-0.6.0": ("verl==0.6.0",),
    "verl-0.9.1": ("verl==0.9.1",),
    **{f"verl-sft-{v}": (f"verl=={v}", "--only", "SFT") for v in VERL},
    "axolotl-0.19.0": ("axolotl==0.19.0",),
    "ms-swift-4.6.0": ("ms-swift==4.6.0",),
    "unsloth-2026.10.9": ("unsloth==2026.10.9",),
    "lightning-2.6.6": ("lightning==2.6.6",),
    "peft-0.21.2": ("peft==0.21.2",),
    "trl-1.16.0+peft-0.21.2": ("trl==1.16.0+peft==0.21.2",),
    "transformers-moe-5.23.0": ("transformers==5.23.0", "--only", "mixture"),
    "trl-1.16.0": ("trl==1.16.0",),
    "trl-1.16.0+deepspeed-0.18.9": ("trl==1.16.0+deepspeed==0.18.9",),
}


def run(name: str, words: tuple[str, ...]) -> None:
    extra = [
        *([] if name.startswith(WITHOUT_REMEDY) else ["--remedy"]),
        "--reproduce",
        "results/audit/reproducers",
        "--timeout",
        "600",
        "--json",
    ]
    command = [sys.executable, "-m", "truestep", "audit", *words, *extra]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    if not done.stdout:
        print(f"{name}: exit code {done.returncode}, nothing to keep", file=sys.stderr)
        return
    found = json.loads(portable(done.stdout))
    write_json(FOLDER / f"{name}.json", {"command": " ".join(["truestep audit", *words]), **found})


def portable(text: str) -> str:
    """Return a JSON text in which places in packages do not begin with the folder of their environment."""
    return re.sub(r'"/[^"]*/(site-packages/[^"]*)"', r'"\1"', text)


def page() -> str:
    documents: dict[str, dict[str, Any]] = {p.stem: read_json(p) for p in sorted(FOLDER.glob("*.json"))}
    lines = [
        "# Findings",
        "",
        "`python benchmarks/audit_findings.py` makes this page from results/audit/. The weights say how much the tokens of",
        "each micro-batch counted in one optimizer step. They are in the order of the micro-batches, and a semicolon",
        "separates ranks. A weight of 1 is correct: each token then counts as in the mean over all trained tokens.",
        "[audit.md](audit.md) says how weights are measured. The error is the relative error of the gradient that was",
        'used. The last column says "shows it" if the logged loss differs from the true loss by more than 2 %, and',
        '"looks right" if it does not.',
        "",
        "| subject | versions | configuration | verdict | what | weights | error | logged loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for _, document in sorted(documents.items()):
        for f in document["findings"]:
            versions = ", ".join(f"{k} {v}" for k, v in f["versions"].items() if k != "torch")
            shown = "; ".join(" ".join(f"{round(w, 4):.3g}" for w in rank) for rank in f["weights"])
            error = "" if f["relative_error"] is None else f"{f['relative_error']:.1e}"
            could = {True: "shows it", False: "looks right", None: ""}[f["logged_loss_could_show_it"]]
            what = f["fault"] or f["reason"]
            kinds = kinds_of(f, f["fault"]) if f["verdict"] in FAULTY else []
            links = [
                UPSTREAM[name, kind][0]
                for kind in kinds
                for name in f["versions"]
                if (name, kind) in UPSTREAM
            ]
            what += "".join(f" ([upstream]({link}))" for link in links)
            if f.get("remedy"):
                what += f". Remedy: {f['remedy']}"
            cells = [f["subject"], versions, configuration_in_words(f["configuration"]), f["verdict"], what]
            lines.append(pages.table_row([*cells, shown, error, could]))
    lines += pages.provenance(documents, FOLDER)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="only targets whose name contains this text")
    parser.add_argument(
        "--table-only", action="store_true", help="only write the page again, without running audits"
    )
    given = parser.parse_args()
    for name, words in TARGETS.items():
        if given.only in name and not given.table_only and not (FOLDER / f"{name}.json").exists():
            run(name, words)
    write_atomic(PAGE, page())
    print(PAGE)


if __name__ == "__main__":
    main()
