"""Reads answers to questions with lettered choices, and to questions of yes or no."""

from __future__ import annotations

import re
from collections.abc import Sequence

from truestep.grade.extract import (
    ANSWER_IS,
    MAX_BARE,
    MAX_TAIL,
    STRICT,
    Extraction,
    after_thought,
    extract_answer,
)
from truestep.grade.normal import plain

MAX_CHOICE = 400  # most characters of an answer that may name a choice
_SAID_CHOICE = re.compile(  # (B), **B**, **B. copper**, option B; not P(A), **A word**, the choice I made
    r"(?<!\w)\(([A-J])\)|\*\*\(?([A-J])(?=[).:,]|\*\*|$)|"
    r"\b(?:[Oo]ption|[Cc]hoice|[Ll]etter)\s{1,3}\*{0,2}[(\"']?([A-HJ](?![\w'])|I(?![\w']|\s[a-z]))|"
    r"\b(?:pick|choose|select|is|be|leaving|leaves|so|thus|therefore|hence)\s{1,3}([B-HJ](?![\w'(])|"
    r"[AI](?![\w'(]|\s[a-z]))|"
    r"(?<![\w'])([A-J]) (?:is (?:the )?(?:correct|right|best|better|true)|remains)\b|は([A-J])(?=です|。|$)"
)
_NEGATED = re.compile(
    r"(?:\b(?:[Nn]ot|[Nn]either|non|nicht|no|pas|nor|isn't|[Cc]an't be|cannot be|[Ee]xcept|(?:anything|"
    r"everything|all|any) but|"
    r"[Rr]ul(?:e|es|ed|ing) out|[Ee]xclud(?:e|es|ed|ing)|[Ee]liminat(?:e|es|ed|ing)|[Rr]eject(?:s|ed|ing)?|"
    r"[Dd]oubt|"
    r"[Ii]gnor(?:e|ed|ing)|[Bb]esides|other than|rather than|instead of|"
    r"worst (?:choice|option|answer) is|unlikely to be|(?:discard|avoid|drop|cross off|strike)(?:s|ed|ing)?|"
    r"[Nn]ever(?: choose| pick)?)\b|n't|"
    r"不是|而非|不选|ليس)\s*(?:\w{2,9}\s){0,2}\(?[A-J]\)?(?![A-Za-z'])(?:,?\s(?:and|or|nor)\s\(?[A-J]\b\)?|"
    r",\s\(?[A-J]\)?(?=,|\s(?:and|or|nor)))*|"
    r"\(?(?<![A-Za-z0-9])[A-J]\)? (?:(?:is|was|seems|looks|(?:must|would|could|can|may|"
    r"has to) be) (?:[a-z]{2,9} )?"
    r"(?:incorrect|wrong|false|not|impossible|excluded|eliminated|rejected|ruled out|unlikely|out)\b|"
    r"(?:contradicts|fails|cannot|can't|doesn't|does not|isn't)\b)"
)
_CHOICE = re.compile(
    r"(?<![A-Za-z0-9\\'=+*/^_|-])(?<![=+*/^-] )(?<![A-Za-z]\()\(?([A-J])\)?(?![A-Za-z0-9'_^(|]|"
    r"\s*[=+*/^<>]|\s*-\s*\d)"
)
_SPEAKER = re.compile(r"\bI(?= (?:choose|pick|select|think|believe|guess|say|would|will|can|am|go)\b)")
_ARTICLE = re.compile(r"\b[AI](?= (?!or\b|and\b)[a-z])")
_TRUTH = re.compile(
    r"\W{0,4}(?:(?:so|thus|therefore|hence)\b,?\s{0,3}|answer:\s{0,3}){0,2}\W{0,4}(yes|no|true|false)\b"
    r"(?=[*\"')]{0,3}\s{0,3}(?:$|[.,;:!—–\n-]|(?:because|since|as|it|this|that)\b))(?!,?\s{0,3}(?:or|and)\b)"
    r"(?!\W{1,8}(?:yes|no|true|false)\b\W{0,4}$)(?!\W{1,8}(?:yes|no|true|false)\b[.,;*])",
    re.IGNORECASE,
)
_IS_TRUTH = re.compile(
    r"\bis (?:therefore |thus |indeed |always |never the less |then ){0,2}[*_\"']{0,2}(true|false)\b"
    r"(?:\W{0,4}$|,? (?:because|since|as)\b[^\n]*$)",
    re.IGNORECASE,
)
_OPPOSITE = {
    word: re.compile(
        rf"\b{other}\b(?=[.,;:!*]|\s*$|\s(?:if|otherwise|when|for)\b)|\botherwise {other}\b", re.IGNORECASE
    )
    for word, other in (("yes", "no"), ("no", "yes"), ("true", "false"), ("false", "true"))
}
_UNSURE = re.compile(r"\b(?:not|nobody|no one|opposite|contrary|whether|doubt|if)\b|n't\b", re.IGNORECASE)
_DENIALS = "not|no|nor|neither|except|incorrect|wrong|false|cannot|eliminated?"
_DENIAL = re.compile(rf"\b(?:{_DENIALS})\b|n't\b", re.IGNORECASE)


def extract_choice(text: str, choices: Sequence[str] = (), *, strict: bool = False) -> Extraction:
    """Return the answer to a question with lettered choices, found by ``extract_answer``. If nothing marks an
    answer and ``strict`` is False, the answer is the choice that the last line names by its letter ("(B)",
    "**B**", "option B", "B is correct") or, in a sentence, by its text; otherwise the letter that the first line
    consists of. A last line that denies a choice or names several choices is not used for this."""
    found = extract_answer(text, strict=strict)
    if strict or found.how in STRICT or choice_letter(found.answer) or "boxed" in text:
        return found
    lines = after_thought(text)[-MAX_TAIL:].strip().split("\n")
    last = _NEGATED.sub(" ", lines[-1])
    named = {next(filter(None, groups)) for groups in _SAID_CHOICE.findall(last)}
    if not named and (first := re.fullmatch(r"\W{0,3}([A-J])\W{0,3}", lines[0])):
        named = {first[1]}
    elif not named and found.how not in ("whole", "none"):
        return found
    if not named and found.how != "whole":
        named = {
            c for c in choices[:26] if c and re.search(rf"(?<!\w){re.escape(c)}(?!\w)", last, re.IGNORECASE)
        }
    if (
        len(named) != 1
        or _DENIAL.search(last)
        or re.search(
            r"(?:\b[A-J]\)? is (?:also|possible)|\bor (?:possibly|maybe)\b|\b[A-J] (?:if|"
            r"when)\b.*\b[A-J]\b|\botherwise [A-J]\b)",
            last,
        )
    ):
        return found
    return Extraction(answer=named.pop(), how="last_choice")


def extract_truth(text: str) -> Extraction:
    """Return the answer to a question whose gold answer is yes, no, true or false, even if a reason follows it:
    "No, because 3 > 2." The answer is looked for in the marked answer if there is one, otherwise at the start of
    the text ("whole") and in a last sentence such as "The statement is false." ("last_choice")."""
    found = extract_answer(text)
    after = after_thought(text)
    marks = [match.end() for match in ANSWER_IS.finditer(after)]
    if found.how in ("boxed", "marker"):
        said, rest = _TRUTH.match(plain(found.answer)), plain(found.answer)
    elif marks:
        said, rest = _TRUTH.match(after, marks[-1]), after[marks[-1] :]
        found = Extraction(answer=found.answer, how="answer_is")
    elif said := _TRUTH.match(after):
        found, rest = Extraction(answer="", how="whole"), after
    elif said := _IS_TRUTH.search(after[-MAX_BARE:]):
        found, rest = Extraction(answer="", how="last_choice"), ""
        if _UNSURE.search(re.split(r"[.?!\n]\s", after[-MAX_BARE:][: said.start()])[-1]):
            said = None
    if said and _OPPOSITE[said[1].lower()].search(
        rest[said.end() - (marks[-1] if found.how == "answer_is" else 0) :][:80]
    ):
        return found  # both
    return Extraction(answer=said[1], how=found.how) if said else found


def choice_letters(text: str) -> str:
    """Return the letters, in order, if an answer is nothing but several choices: "A, C", "AC", "(A) and (C)"."""
    if not re.fullmatch(
        r"[(\[{]?[A-J][)\]]?(?:(?:\s?(?:,|;|/|&|and)){0,2}\s?[(\[]?[A-J][)\]}]?){1,9}", text := plain(text)
    ):
        return ""
    return "".join(sorted({*re.findall("[A-J]", text)}))


def choice_letter(text: str) -> str:
    """Return the letter that an answer names: "C", "(C) Cecile", "C, not A", "B不是 A"; "" if it names none or
    several."""
    text = plain(text[:MAX_CHOICE])
    if text.endswith("?"):
        return ""
    if "\\" in text:  # in a formula, a letter is a variable; a label may stand in front of it
        label = re.match(r"\(([A-J])\)(?!.*\([A-J]\))", text)
        return label[1] if label else ""
    text = _NEGATED.sub(" ", _SPEAKER.sub(" ", text))
    letters = set(_CHOICE.findall(text))
    if len(letters) > 1:
        letters = set(_CHOICE.findall(_ARTICLE.sub(" ", text)))
    return letters.pop() if len(letters) == 1 else ""
