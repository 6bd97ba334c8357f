"""JSON, JUnit, SARIF and the page: the same findings in each, and nothing hostile gets through."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from truestep.audit.measure.findings import Differences, Finding, Verdict, cause
from truestep.audit.present.formats import location_of, rule_of, to_document, to_junit, to_sarif
from truestep.audit.present.page import HIGHEST, LOWEST, UNIT, draw, render_page
from truestep.audit.present.words import Row, configuration_in_words, row_of
from truestep.pages import visible

HOSTILE = (
    "<script>alert(1)</script>]]><!--\"'&\x00\x1b[2J\x1b]0;owned\x07\u202eright to left\ud800\ufffe\r"
    "</style></svg><img src=x onerror=alert(1)>{{ 7*7 }}{% raw %}[x](javascript:1) hf_abcdefghijklmnop"
)


def dropped(**more: Any) -> Row:
    values: dict[str, Any] = {
        "subject": "deepspeed==0.18.9",
        "configuration": {"zero_stage": 2, "offload": "cpu", "accumulation": 4, "world_size": 1},
        "verdict": Verdict.FAULT,
        "fault": "the intermediate micro-batches are dropped",
        "versions": {"torch": "2.13.0", "deepspeed": "0.18.9"},
        "cases": {"ragged": "the intermediate micro-batches are dropped", "unsplit": ""},
        "tokens": [[2, 27, 3, 17]],
        "weights": [[1.0, 0.0, 0.0, 1.0]],
        "relative_error": 0.69,
        "residual": 1e-6,
        "logged_loss": 4.16,
        "true_loss": 4.16,
        "logged_loss_could_show_it": False,
        "seconds": {"run": 1.5, "reference": 0.25},
    }
    return {**row_of(Finding(subject="", configuration={}, verdict=Verdict.FAULT)), **values, **more}


def every_verdict() -> list[Row]:
    return [
        dropped(verdict=v, fault="", reason=f"because of {v}")
        if v in (Verdict.NOT_RUN, Verdict.NOT_OBSERVABLE)
        else dropped(verdict=v, fault="" if v is Verdict.RIGHT else "rank-wise mean")
        for v in Verdict
    ]


def hostile() -> Row:
    words = {
        "subject": HOSTILE,
        "fault": HOSTILE,
        "versions": {HOSTILE: HOSTILE},
        "cases": {HOSTILE: HOSTILE},
    }
    return dropped(**words, configuration={HOSTILE: HOSTILE, "accumulation": 4})


# ------------------------------------------------------------------------------------------------------- JSON


def test_a_document_keeps_numbers_that_json_does_not_know() -> None:
    row = dropped(logged_loss=math.nan, condition=math.inf, weights=[[math.nan, -math.inf]])
    text = json.dumps(to_document([*every_verdict(), row], {"command": ["truestep"]}), allow_nan=False)
    back = json.loads(text)["findings"]
    assert [r["verdict"] for r in back] == [*Verdict, "FAULT"]
    assert (back[-1]["logged_loss"], back[-1]["condition"]) == ("NaN", "Infinity")
    assert back[-1]["weights"] == [["NaN", "-Infinity"]]


def test_a_finding_keeps_its_causes_as_records_beside_the_words() -> None:
    found = Differences(
        steps=((cause("kept", "dropped", dropped=[2, 3], of=5), cause("micro_mean", "micro_mean")),)
    )
    row = row_of(
        Finding(subject="x", configuration={}, verdict=Verdict.FAULT, found=found, cases={"ragged": found})
    )
    assert (
        row["fault"]
        == row["cases"]["ragged"]
        == "micro-batches are dropped (2, 3 of 5), and mean of micro-batch means"
    )
    assert row["causes"][0] == {"code": "kept", "kinds": ("dropped",), "values": {"dropped": [2, 3], "of": 5}}
    json.dumps(to_document([row], {}), allow_nan=False)


def test_a_document_has_the_fields_that_are_promised() -> None:
    document = to_document([dropped()], {"commit": "abc"})
    assert document["schema"] == 1
    assert document["provenance"] == {"commit": "abc"}
    promised = "subject versions configuration verdict fault weights relative_error residual logged_loss_could_show_it"
    assert set(promised.split()) <= set(document["findings"][0])
    assert document["findings"][0]["verdict"] == "FAULT"


def test_a_hostile_document_can_be_encoded_and_holds_no_token() -> None:
    text = json.dumps(to_document([hostile()], {HOSTILE: HOSTILE}), ensure_ascii=False)
    assert b"hf_abcdef" not in text.encode()


# ------------------------------------------------------------------------------------------------------ JUnit


def test_junit_fails_for_faults_alone_and_skips_what_gave_no_answer() -> None:
    findings = every_verdict()
    suite = ElementTree.fromstring(to_junit(findings).encode())[0]
    kinds = {f["verdict"]: case[0] for f, case in zip(findings, suite, strict=True)}
    assert {v for v, child in kinds.items() if child.tag == "failure"} == {Verdict.FAULT}
    skipped = {Verdict.NOT_RUN, Verdict.NOT_OBSERVABLE}
    assert {v for v, child in kinds.items() if child.tag == "skipped"} == skipped
    assert suite.attrib["tests"] == str(len(findings))
    assert (suite.attrib["failures"], suite.attrib["skipped"], suite.attrib["errors"]) == ("1", "2", "0")
    for verdict in skipped:
        assert f"because of {verdict}" in kinds[verdict].attrib["message"]


def test_junit_tells_the_weights_and_the_loss() -> None:
    case = ElementTree.fromstring(to_junit([dropped()]).encode())[0][0]
    text = case[0].text or ""
    assert "weights per micro-batch: 1, 0, 0, 1" in text
    assert "could not show the fault" in text
    assert case.attrib["time"] == "1.750"


def test_junit_of_hostile_names_is_xml() -> None:
    text = to_junit([hostile(), dropped(verdict=Verdict.NOT_RUN, fault="", reason=HOSTILE)])
    suite = ElementTree.fromstring(text.encode())[0]
    assert "<script>" not in text
    assert "]]>" not in text
    assert "⟨U+0000⟩" in suite[0].attrib["classname"]
    assert "<script>alert(1)</script>]]>" in suite[0].attrib["classname"]


# ------------------------------------------------------------------------------------------------------ SARIF


def test_sarif_levels() -> None:
    findings = every_verdict()
    (run,) = to_sarif(findings)["runs"]
    levels = [result["level"] for result in run["results"]]
    assert sorted(levels) == ["error", "note", "note"]
    told = run["invocations"][0]["toolExecutionNotifications"]
    assert [t["message"]["text"].partition(":")[0] for t in told] == ["NOT OBSERVABLE", "NOT RUN"]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    for result in run["results"]:
        assert rules[result["ruleIndex"]] == result["ruleId"]


def test_sarif_has_a_rule_for_a_kind_of_fault_not_for_each_finding() -> None:
    same = [dropped(fault=f"micro-batches dropped ({n} of 4)", codes=("kept",)) for n in (2, 3)]
    other = dropped(fault="mean of micro-batch means", codes=("micro_mean",))
    (run,) = to_sarif([*same, other])["runs"]
    assert [r["id"] for r in run["tool"]["driver"]["rules"]] == ["kept", "micro-mean"]
    assert [result["ruleIndex"] for result in run["results"]] == [0, 0, 1]


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        (None, None),
        ("/a b/engine.py:7", ("file:///a%20b/engine.py", 7)),
        ("runtime/engine.py:0", ("runtime/engine.py", 1)),
        ("engine.py:44", ("engine.py", 44)),
        ("engine.py", ("engine.py", 1)),
        ("engine.py:<b>", ("engine.py%3A%3Cb%3E", 1)),
    ],
)
def test_where_a_finding_is(location: Any, expected: Any) -> None:
    assert location_of({"location": location}) == expected


def test_sarif_of_hostile_names() -> None:
    document = to_sarif([hostile()])
    text = json.dumps(document, ensure_ascii=False, allow_nan=False)
    text.encode()
    (result,) = document["runs"][0]["results"]
    assert not re.search("[\x00\x1b\u202e]|]\\(javascript", result["message"]["text"])
    assert "hf_abcdef" not in text
    assert re.fullmatch(r"[a-z-]+", result["ruleId"])


def test_a_rule_is_named_by_the_main_code_of_a_fault() -> None:
    assert rule_of({"fault": "x", "codes": ["kept_first_last", "micro_mean"]}) == "kept-first-last"


def test_a_rule_always_has_a_name() -> None:
    assert rule_of({"fault": "(1)", "codes": ["(!)"], "verdict": "FAULT"}) == "unnamed"


# ------------------------------------------------------------------------------------------------------- page


class Page(HTMLParser):
    """Tags, attributes and text; a void tag may stay open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_runs_nothing_and_asks_for_nothing() -> None:
    text = render_page([*every_verdict(), hostile()], {HOSTILE: HOSTILE})
    page = Page(text)
    assert {"script", "img", "iframe", "object", "form", "link"} & set(page.tags) == set()
    assert [k for k, _ in page.attributes if k.startswith("on") or k in ("src", "action", "formaction")] == []
    assert all((v or "").startswith("#") for k, v in page.attributes if k.endswith("href"))
    policy = next(v for k, v in page.attributes if k == "content" and v and "default-src" in v)
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert "<script>alert(1)</script>" in page.text  # as text
    assert "{{ 7*7 }}" in page.text
    assert not re.search("[\x00\x1b\u202e]", text)
    assert "hf_abcdef" not in text
    text.encode()


def test_the_page_draws_every_weight() -> None:
    text = render_page([dropped(tokens=[[2, 27], [3, 17]], weights=[[1.0, 0.5], [24.0, -1.0]])], {})
    assert text.count("<rect") == 4
    assert text.count('class="cut"') == 2
    for shown in ("rank 0", "rank 1", ">0.5<", ">24<", ">-1<", ">27<"):
        assert shown in text


def test_bars_are_to_scale_and_end_where_the_drawing_ends() -> None:
    drawing = draw(
        {"verdict": "FAULT", "weights": [[1.0, 0.5, 0.0, 24.0, -7.0, math.nan]], "tokens": [[1, 2, 3]]}
    )
    assert drawing is not None
    one, half, none, much, negative, unknown = drawing.bars
    assert one.height == 2 * half.height == UNIT
    assert one.y == drawing.one
    assert none.height < 2
    assert much.height == HIGHEST * UNIT
    assert negative.y == drawing.zero
    assert negative.height == -LOWEST * UNIT
    assert [b.cut for b in drawing.bars] == [False, False, False, True, True, False]
    assert unknown.label == "nan"
    assert [b.tokens for b in drawing.bars] == ["1", "2", "3", "", "", ""]
    assert all(
        b.y >= 0 and b.y + b.height <= drawing.height and b.x + 26 <= drawing.width for b in drawing.bars
    )


def test_a_page_of_nothing() -> None:
    assert "Nothing was audited" in render_page([], {})


def test_a_logged_loss_that_hides_a_fault_is_in_the_first_sentence() -> None:
    hidden, shown = dropped(), dropped(logged_loss_could_show_it=True)
    assert "In 1 of them the logged loss is correct" in render_page([hidden, shown], {})
    assert "the logged loss is correct and does not" not in render_page([shown], {})


# ------------------------------------------------------------------------------------------------------ words


def test_a_configuration_in_words() -> None:
    words = configuration_in_words(
        {
            "zero_stage": 2,
            "offload": True,
            "processes": 2,
            "arch": None,
            "packing": False,
            "max_grad_norm": 0.5,
        }
    )
    assert words == "ZeRO-2, offload, 2 processes, no packing, max grad norm 0.5"


def test_what_xml_forbids_shows_as_a_number() -> None:
    assert visible("a\x00\ud800\ufffe\tb") == "a⟨U+0000⟩⟨U+D800⟩⟨U+FFFE⟩\tb"
