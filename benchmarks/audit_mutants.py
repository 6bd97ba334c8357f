"""Count which of the audit's mutants are found and named in a precision, and which clean runs are accused.

    python benchmarks/audit_mutants.py [--dtype bfloat16] [--clean 200] [--out results/audit-mutants/bfloat16.json]

In bfloat16, the model computes in bfloat16 and the optimizer has float32 parameters, which the audit reads. A
mutant is found if its verdict is FAULT or DEFAULT, and named if the first cause is one of its names. Clean runs are
the right trainer with other seeds, numbers of micro-batches and ranks.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from truestep.audit.measure.findings import Finding, Verdict
from truestep.audit.measure.verdict import judge
from truestep.audit.present.words import row_of
from truestep.rundir import provenance, write_json
from truestep.testing.mutants import CLEAN, MUTANTS, Mutant, observe

ROOT = Path(__file__).resolve().parent.parent


def clean(number: int) -> Iterator[Mutant]:
    """Yield right trainers with other sizes and seeds."""
    plain = next(m for m in CLEAN if m.arch == "plain")
    for seed in range(number):
        accumulation, ranks = 3 + seed % 4, 1 + seed % 3
        yield replace(
            plain, id=f"clean-{seed}", accumulation=accumulation, world_size=ranks, seed=1000 + seed
        )


def judged(mutant: Mutant, dtype: str) -> Finding:
    with tempfile.TemporaryDirectory() as folder:
        return judge(
            mutant.id, {"dtype": dtype}, observe(replace(mutant, dtype=dtype), Path(folder) / "runs")
        )


def row(mutant: Mutant, finding: Finding) -> dict[str, Any]:
    return {
        "id": mutant.id,
        "what": mutant.description,
        "verdict": str(finding.verdict),
        "codes": list(finding.codes),
        "named": bool(finding.codes) and finding.codes[0] in mutant.names,
        "said": row_of(finding)["fault"],
    }


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "float64", "bfloat16"))
    parser.add_argument("--clean", type=int, default=200, metavar="N", help="how many clean runs")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows, accused = [], []
    for mutant in MUTANTS:
        rows.append(row(mutant, judged(mutant, given.dtype)))
        if not rows[-1]["named"]:
            print(*rows[-1].values(), sep=" | ", flush=True)
    for mutant in clean(given.clean):
        finding = judged(mutant, given.dtype)
        if finding.verdict is not Verdict.RIGHT:
            accused.append(row(mutant, finding))
            print(*accused[-1].values(), sep=" | ", flush=True)
    found = [r for r in rows if r["verdict"] in (Verdict.FAULT, Verdict.DEFAULT)]
    named = [r for r in found if r["named"]]
    counts = {"mutants": len(rows), "found": len(found), "named": len(named)}
    counts |= {"clean": given.clean, "accused": len(accused)}
    print(f"{given.dtype}: {len(found)} of {len(rows)} found, {len(named)} named, "
          f"{len(accused)} of {given.clean} clean runs not RIGHT")  # fmt: skip
    command = " ".join(["python", "benchmarks/audit_mutants.py", *sys.argv[1:]])
    about = {"command": command, "provenance": provenance(0), "dtype": given.dtype, **counts}
    path = given.out or ROOT / f"results/audit-mutants/{given.dtype}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**about, "not_named": [r for r in rows if not r["named"]], "accused": accused})


if __name__ == "__main__":
    main()
