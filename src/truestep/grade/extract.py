"""Finds the answer in a completion, in time linear in the length of the text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from truestep.grade.normal import normalise, plain, typographic
from truestep.grade.units import FUNCTIONS, WORDS
from truestep.grade.words import VALUES

How = Literal["boxed", "marker", "answer_is", "whole", "last_choice", "last_formula", "last_number", "none"]
STRICT: tuple[How, ...] = ("boxed", "marker", "answer_is")

MAX_BARE = 200  # most characters of a completion that may consist only of an answer
MAX_FORMULA = 1_000
MAX_TAIL = 10_000  # characters at the end of a completion that are searched for a last number or formula
MAX_GOLD_WORDS = 8  # a gold text with more words is a whole solution
MAX_CHOICE = 400  # most characters of an answer that may name a choice
MAX_WORDS = 2  # text with more words next to an answer is prose

_BRACES = re.compile(r"\\{1,4}(?:(?:begin)?boxed|fbox)\s{0,9}\{|\\.|[{}]", re.DOTALL)
_JOINT = re.compile(  # between two boxes that are one answer: closing and opening delimiters, a connective, "x ="
    r"[\s$,;.&]*(?:\\[\])])?[\s$,;]*(?:\\q?quad\s*)?(?:(?!(?:and|or|but|so|thus)\b)[a-z]{1,15} )?(?:\\text\{\s*)?"
    r"(?:and|or|or else|or,? alternatively,?|otherwise,?|,|;|&|/|\\lor|\\land)(?:\s*\})?(?:\s*\\q?quad)?[\s$,;]*"
    r"(?:\\[\[(])?\s*(?:[A-Za-z](?:_\{?\w{1,4}\}?)?\s*=\s*)?"
)
_GAP = re.compile(r"[ $]*(?:\\q?quad|\n)?[ $]*")  # two boxes in one formula, or on adjacent lines
_END_TOKENS = re.compile(r"(?:\s{0,9}(?:<[|｜][^<>|｜]{1,40}[|｜]>|</?s>|<eos>|<pad>|<end_of_turn>))+\s*$")
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|\\,|,\\!|(?<!\d{4}) )(?=\d{3}(?!\d))")
_HASHES = re.compile(r"^[ \t]*####[ \t]*(\S.*)$", re.MULTILINE)
_ANSWER_IS = re.compile(
    r"\banswers?\b[*_]{0,3}(?:\s{1,3}\w{1,15}){0,6}?(?:\s{1,3}(?:is|are)\b(?:\s{1,3}(?:therefore|thus))?|\s{0,3}[:=])"
    r"\s{0,3}[*_]{0,3}:?|"
    r"\b(?:réponse|reponse|respuesta|resposta|risposta|antwort|lösung|ответ|odpowiedź|cevap|svar|antwoord|đáp án)\b[*_]{0,3}"
    r"(?:(?:\s{1,3}\w{1,15}){0,4}?\s{1,3}(?:est|es|é|è|ist|lautet|jest|är|is|là)\b|\s{0,3}[:：=])\s{0,3}[*_]{0,3}[:：]?|"
    r"(?:答案|答え|答|정답|उत्तर|الجواب|الإجابة)\s{0,3}(?:应该|應該)?(?:是|为|為|は|은|는|है|هي|هو|[:：])\s{0,3}[*_]{0,3}[:：]?",
    re.IGNORECASE,
)
_FINAL_ANSWER = re.compile(r"\bfinal answer\b", re.IGNORECASE)
_LETTER = re.compile(
    r"\W{0,3}(?:(?:[Cc]hoice|[Oo]ption|[Ll]etter)\s\W{0,2})?([A-J])(?:\)|(?=[.,:;*'\"。、，]|$|\s?[\u0370-\u1fff\u3040-\uffef]|\s(?:because|since|as|not|non|nicht|no|pas)\b))"
    r"(?!\W{0,3}\s*(?:and|or|,)?\s*(?:possibly |maybe |perhaps |also |even )?\W{0,3}[A-J]\b)(?!\s*[=+*/^-])"
    r"(?![^.\n]*\b[A-J]\b\)? is (?:also|possible|another))"  # one choice, not two of them, and no variable
)
_SAID_CHOICE = re.compile(  # (B), **B**, **B. copper**, option B; not P(A), **A word**, the choice I made
    r"(?<!\w)\(([A-J])\)|\*\*\(?([A-J])(?=[).:,]|\*\*|$)|"
    r"\b(?:[Oo]ption|[Cc]hoice|[Ll]etter)\s{1,3}\*{0,2}[(\"']?([A-HJ](?![\w'])|I(?![\w']|\s[a-z]))|"
    r"\b(?:pick|choose|select|is|be|leaving|leaves|so|thus|therefore|hence)\s{1,3}([B-HJ](?![\w'(])|[AI](?![\w'(]|\s[a-z]))|"
    r"(?<![\w'])([A-J]) (?:is (?:the )?(?:correct|right|best|better|true)|remains)\b|は([A-J])(?=です|。|$)"
)
_NEGATED = re.compile(
    r"(?:\b(?:[Nn]ot|[Nn]either|non|nicht|no|pas|nor|isn't|[Cc]an't be|cannot be|[Ee]xcept|(?:anything|everything|all|any) but|"
    r"[Rr]ul(?:e|es|ed|ing) out|[Ee]xclud(?:e|es|ed|ing)|[Ee]liminat(?:e|es|ed|ing)|[Rr]eject(?:s|ed|ing)?|[Dd]oubt|"
    r"[Ii]gnor(?:e|ed|ing))\b|不是|而非|不选|ليس)\s*(?:\w{2,9}\s){0,2}\(?[A-J]\)?(?![A-Za-z'])(?:,?\s(?:and|or|nor)\s\(?[A-J]\b\)?|"
    r",\s\(?[A-J]\)?(?=,|\s(?:and|or|nor)))*|"
    r"\(?(?<![A-Za-z0-9])[A-J]\)? (?:(?:is|was|seems|looks|(?:must|would|could|can|may|has to) be) (?:[a-z]{2,9} )?"
    r"(?:incorrect|wrong|false|not|impossible|excluded|eliminated|rejected|ruled out|unlikely|out)\b|"
    r"(?:contradicts|fails|cannot|can't|doesn't|does not|isn't)\b)"
)
_CHOICE = re.compile(
    r"(?<![A-Za-z0-9\\'=+*/^_|-])(?<![=+*/^-] )(?<![A-Za-z]\()\(?([A-J])\)?(?![A-Za-z0-9'_^(|]|\s*[=+*/^<>]|\s*-\s*\d)"
)
_SPEAKER = re.compile(r"\bI(?= (?:choose|pick|select|think|believe|guess|say|would|will|can|am|go)\b)")
_ARTICLE = re.compile(r"\b[AI](?= (?!or\b|and\b)[a-z])")
_TRUTH = re.compile(
    r"\W{0,4}(?:(?:so|thus|therefore|hence)\b,?\s{0,3}|answer:\s{0,3}){0,2}\W{0,4}(yes|no|true|false)\b"
    r"(?=[*\"')]{0,3}\s{0,3}(?:$|[.,;:!—–\n-]|(?:because|since|as|it|this|that)\b))(?!,?\s{0,3}(?:or|and)\b)"
    r"(?!\W{1,8}(?:yes|no|true|false)\b\W{0,4}$)(?!\W{1,8}(?:yes|no|true|false)\b[.,;*])",
    re.IGNORECASE,
)
_IS_TRUTH = re.compile(r"\bis (?:therefore |thus |indeed )?(true|false)\W{0,4}$", re.IGNORECASE)
_DENIALS = "not|no|nor|neither|except|incorrect|wrong|false|cannot|eliminated?"
_DENIAL = re.compile(rf"\b(?:{_DENIALS})\b|n't\b", re.IGNORECASE)
_BOLD = re.compile(r"(\*{1,3})([^\s*](?:[^*]|\*(?!\*))*)\1(\.?)")
_REASON = re.compile(
    r"\s*(?:[,;(—]\s*|\s-{1,2}\s)?\b(?:because|since|as|so|which|who|whose|when|where|if(?!.*\b(?:otherwise|else)\b)|given|"
    r"thus|in base (?:10|ten)|for(?! every| each))\b|\s*(?:\(mod \d+\)|\[\^\w{1,9}\])"
)
# A word in front of a number that makes another number of it (the sum of, greater than, never), unless it only says
# what the number is (equal to, a total of). English has few words of these classes, so that the list is whole.
_BEFORE_END = re.compile(
    r"(?:\b(?:of|than|to|from|except|but|or|and|nor|not|never|no|without|until|till|through|least|most|up|above|below|"
    r"under|over|beyond|between|within|exceeds?|exceeding|almost|nearly|hardly|barely|twice|thrice|double|triple|half|"
    r"minus|negative|plus|times|base|log|ln|mod|modulo|factorial|versus|vs|against|(?:divided|multiplied) by|"
    r"(?:more|less|fewer|greater|larger|smaller|higher|lower) than or equal to)|n't|[<>≤≥≠^_√∛∜*/×·⋅÷+±~]|"
    r"\\(?:neq?|[lg]eq?|sqrt|times|cdot|div|pm|log|ln)|[A-Za-z]\(|\d(?:,\s|[/-])|\d\s(?:to|and|or))\s*[$(]{0,2}$",
    re.IGNORECASE,
)
_SAYS = re.compile(
    r"(?:(?<!\bor )\b(?:equals?|equal|equivalent|comes?|adds? up|sums?|amounts?|evaluates?|reduces?|"
    r"simplif(?:y|ies)|rounds?|rounded|"
    r"converges?|leads?|boils? down|works? out|close) to|"
    r"\b(?:total|sum|average|mean|median|mode|value|amount|area|volume|length|distance|perimeter|probability|chance|cost|"
    r"price|profit|speed|rate|height|width|weight|mass|radius|age|score|maximum|minimum|count|time|ratio) of|"
    r"\bfrom \S{1,12} to)\s*[$(]{0,2}$",
    re.IGNORECASE,
)
_CLAUSE = re.compile(r"[,;:]\s|=|\b(?:which|that|but|so)\b")
_NOT = re.compile(
    r"\b(?:not|never|cannot|nor|neither|except|unless|anything but|other than|different from|rather than|instead of|"
    r"(?:wrong|incorrect|false) (?:answer|value|result)|multiples?|powers?|factors?|"
    r"divisors?|reciprocal|opposite|inverse|remainder|non|nicht|pas)\b|n't\b|不是",
    re.IGNORECASE,
)
# What follows a number and makes another number of it; a reason, a time, a place or a noun does not.
_OPERATION = re.compile(
    r"(?:squared|cubed|doubled|tripled|halved|factorial|choose|remainder|otherwise|else|repeating|recurring|point|or|"
    r"mod|modulo|power|dozens?|hundreds?|thousands?|millions?|billions?|trillions?|quadrillions?|lakhs?|crores?|"
    r"gross|googol|halves|half|thirds|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|hundredths?|"
    r"thousandths?|than)$",
    re.IGNORECASE,
)
_HARMLESS = re.compile(
    r"(?:because|since|as|so|which|who|that|when|where|while|after|before|for|with|in|on|at|given|thus|if|assuming|and|of|"
    r"to|the|by|but|not|is|are|was|were|will|would|can|has|have)$",
    re.IGNORECASE,
)
_CONTINUES = re.compile(  # a harmless word with these words behind it is not harmless
    r"\s*(?:in base (?!10\b|ten\b)|if .*\b(?:otherwise|else|if)\b|and (?:(?:an?|one|two|three|four|five|seven|nine) [a-z]+|"
    r"[$*\\(]{0,3}[\d$]|[a-z]\s?=)|"
    r"of \S*\d|for (?:every|each)\b|"
    r"to (?:the|\S*\d)|by \S*\d|at (?:least|most)\b|with (?:a )?remainder|(?:is|was|are) (?:[a-z]+ )?(?:not|wrong|incorrect|"
    r"false)\b|isn't|but not)",
    re.IGNORECASE,
)
_STUCK = re.compile(
    r"(?!\s?[ck]?m[²³])(?:[\^!_²³¹⁰-⁹π√∛(]|\\(?!%|\)|\]|,|;|text|mathrm|\s)|[A-Za-z]{1,20}(?=[^A-Za-z]|$))"
)
_OPERATOR = re.compile(
    r"\s*(?:[+*/×·⋅÷<>≤≥≠±^]|\\(?:times|cdot|div|pm|neq?|[lg]eq?)(?![a-z])|[-−–]\s?\d|:\s?\d)"
)
_LEADING = re.compile(r"([$€£]?-?(?:\d[\d,./]*)?\d%?)\s+(?!and\b|or\b)([A-Za-z].*)", re.ASCII)
_MATH = re.compile(  # a lone dollar is money: a formula after it has no space at either end, or one at both
    r"(?<!\\)\$\$([^$]{1,1000})\$\$|(?<![\\$])\$(?![\s$])((?:[^$\n\\]|\\.){0,999}(?<!\s))\$(?!\d)|"
    r"(?<![\\$])\$ ((?:[^$\n\\]|\\.){1,999}) \$|\\\(([^\n]{1,1000}?)\\\)|\\\[(.{1,1000}?)\\\]",
    re.DOTALL,
)
_NUMBER = re.compile(
    r"(?<![A-Za-z_.\d^])(?:(?<![\w)\]}])-)?[$€£]?(?:\d{1,3}(?:,\d{3})+|\d+(?:,\d{1,2}(?![\d,]))?)?"
    r"(?:(?<=\d)|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d{1,3}\b|\s?/\s?\d+(?:\.\d+)?)?\s?%?",
    re.ASCII,
)
_WORDS = re.compile(
    r"[A-Za-z]{3,}|\b(?:so|is|he|it|we|of|to|be|by|at|us|if|no)\b|[^\W\d_\u0000-\u024f\u0370-\u03ff\u2070-\u209f]|^[A-Z]:\s"
)
_SENTENCE_END = re.compile(r"\n|[.?](?=\s|$)|!(?=\s|$)")
# Signs and words outside of a box that change what is in it.
_BOX_BEFORE = re.compile(
    r"(?:(?<=[=$(\[{])\s*-|[\d)}]\s*(?:[-+*/^]|\\(?:times|cdot))|\\(?:neq?|[lg]eq?|sqrt|not\s*=|frac\{[^{}]{0,9}\}\{)|"
    r"(?<=[\w\s)}$])[<>≠]|"
    r"\b(?:not|never)(?: equal to)?|n't be)\s*$"
)
_BOX_AFTER = re.compile(
    r"\s?(?:[\^!](?=[\d{$ ])\S{0,8}|\$?\s(?:dozen|hundred|thousand|million|billion|trillion)s?\b|\$?\s?\\?%|"
    r"\$?\s(?:or|and) (?:more|less|fewer)\b)"
)
_SCALED = re.compile(r"\s(?:dozen|hundred|thousand|million|billion|trillion)s?\b")
_BOLD_MARKS = re.compile(r"(?<!\d)\*\*|\*\*(?!\d)")
_WRONG = re.compile(r"\b(?:wrong|incorrect|false|bad)\s+$", re.IGNORECASE)
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|non|nicht|never|cannot|isn't)|n't|, no|不是)\s{0,3}(?:(?:be|equal|exactly|equal to)\s)?[$(]?$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"[*_$]{0,3}\s(?:is|was|are|would be|seems) (?:[a-z]+ )?(?:not|wrong|incorrect|false)\b|\sisn't\b"
)
_GROUP = re.compile(r"[(\[][^()\[\]A-Za-z\n]{1,40},[^()\[\]A-Za-z\n]{1,60}[)\]]")
# The pieces of a formula without delimiters.
_PIECE = re.compile(r"\d[\d.,]*\d|\d|\\[A-Za-z]+|[A-Za-z]+|\s|.", re.ASCII)
_SIGN = re.compile(r"[+*/×·⋅÷<>≤≥≠^±√∛∜π(){}⁰¹²³⁴-⁹₀-₉-]|\\(?:times|cdot|div|pm|neq?|[lg]eq?|sqrt|pi)")
_INFIX = re.compile(r"[+*/×·⋅÷<>≤≥≠±-]|\\(?:times|cdot|div|pm|neq?|[lg]eq?)")
_OPERAND = re.compile(r"\d[\d.,]*|[B-HJ-Zb-z]|log|ln|sin|cos|tan|sqrt|\\(?:log|ln|sin|cos|tan|frac)")
_NO_WORDS = WORDS | FUNCTIONS | {"and"}


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """An answer in normalized spelling ("" if none was given), and the rule that found it."""

    answer: str
    how: How


NOTHING = Extraction(answer="", how="none")


def extract_answer(text: str, *, strict: bool = False, thinks: bool = False) -> Extraction:
    r"""Return the answer in a completion, which is its last ``\boxed{…}``, <answer> tag, "#### …" line or
    "answer is …". Unless ``strict`` is True, the answer may also be the whole of a short text, or the last
    formula or number. Only the text after the last </think> counts. There is no answer if a <think> is never
    closed, or if the model ``thinks`` and </think> is missing."""
    if thinks and "</think>" not in text:
        return NOTHING
    text = _after_thought(text)
    rules = (_boxed, _marker, _answer_is) if strict else (_boxed, _marker, _answer_is, _whole, _last)
    for rule in rules:
        found = rule(text)
        if found is not None and found[1] == "none":
            return NOTHING
        if found is not None and (answer := normalise(found[0])):
            return Extraction(answer=answer, how=found[1])
    return NOTHING


def extract_choice(text: str, choices: Sequence[str] = (), *, strict: bool = False) -> Extraction:
    """Return the answer to a question with lettered choices, found by ``extract_answer``. If nothing marks an
    answer and ``strict`` is False, the answer is the choice that the last line names by its letter ("(B)",
    "**B**", "option B", "B is correct") or, in a sentence, by its text; otherwise the letter that the first line
    consists of. A last line that denies a choice or names several choices is not used for this."""
    found = extract_answer(text, strict=strict)
    if strict or found.how in STRICT or choice_letter(found.answer) or "boxed" in text:
        return found
    lines = _after_thought(text)[-MAX_TAIL:].strip().split("\n")
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
        or re.search(r"(?:\b[A-J]\)? is (?:also|possible)|\bor (?:possibly|maybe)\b)", last)
    ):
        return found
    return Extraction(answer=named.pop(), how="last_choice")


def extract_truth(text: str) -> Extraction:
    """Return the answer to a question whose gold answer is yes, no, true or false, even if a reason follows it:
    "No, because 3 > 2." The answer is looked for in the marked answer if there is one, otherwise at the start of
    the text ("whole") and in a last sentence such as "The statement is false." ("last_choice")."""
    found = extract_answer(text)
    after = _after_thought(text)
    marks = [match.end() for match in _ANSWER_IS.finditer(after)]
    if found.how == "boxed" or found.how == "marker":
        said = _TRUTH.match(plain(found.answer))
    elif marks:
        said, found = _TRUTH.match(after, marks[-1]), Extraction(answer=found.answer, how="answer_is")
    elif said := _TRUTH.match(after):
        found = Extraction(answer="", how="whole")
    elif said := _IS_TRUTH.search(after[-MAX_BARE:]):
        found = Extraction(answer="", how="last_choice")
    return Extraction(answer=said[1], how=found.how) if said else found


def _after_thought(text: str) -> str:
    """Return the text after the last </think> (or </reasoning>, </thought>), or "" if a <think> is never closed."""
    text = text[:-400] + _END_TOKENS.sub("", text[-400:])
    text = re.split(r"</(?:reasoning|thought|thinking)>", text)[-1]
    text = text[text.rfind("</think>") + len("</think>") :] if "</think>" in text else text
    return "" if "<think>" in text else text


def scan_boxes(text: str) -> tuple[list[tuple[int, int, str]], bool]:
    r"""Return (start, end, content) of each balanced, outermost, non-blank ``\boxed{…}``, and whether any box
    is never closed."""
    stack: list[tuple[int, int]] = []  # starts of the token and of the content; -1 for a plain brace
    found: list[tuple[int, int, str]] = []
    for token in _BRACES.finditer(text):
        if token[0] == "{":
            stack.append((token.start(), -1))
        elif token[0] == "}":
            start, inside = stack.pop() if stack else (0, -1)
            if inside >= 0:
                while found and found[-1][0] > start:
                    found.pop()  # it was inside this box
                found.append((start, token.end(), text[inside : token.start()]))
        elif token[0].endswith("{") and len(token[0]) > 2:
            stack.append((token.start(), token.end()))
    return [box for box in found if box[2].strip()], any(inside >= 0 for _, inside in stack)


def _boxed(text: str) -> tuple[str, How] | None:
    """Return the last box, together with earlier boxes that "and", "or" or a comma joins to it. Return an
    empty answer if the only box is never closed, because the answer was cut off."""
    if "boxed" not in text and "fbox" not in text:
        return None
    found, unclosed = scan_boxes(text)
    if not found:
        return ("", "none") if unclosed else None
    later = _answer_is(text[found[-1][1] :]) if _FINAL_ANSWER.search(text, found[-1][1]) else None
    if later is not None and re.search(r"\d", later[0]):  # a final answer after the last box replaces it
        return later
    parts = [found[-1]]
    for box in reversed(found[-32:-1]):
        between = text[box[1] : parts[0][0]]
        if len(between) > 60 or not (_GAP.fullmatch(between) or _JOINT.fullmatch(between)):
            break
        parts.insert(0, box)
    contents = [re.sub(r"\\{1,4}(?:boxed|fbox)\s*(?=\{)", "", content) for _, _, content in parts]
    before, after = text[max(0, parts[0][0] - 30) : parts[0][0]], text[parts[-1][1] : parts[-1][1] + 30]
    left, right = None if "box" in before else _BOX_BEFORE.search(before), _BOX_AFTER.match(after)
    joined = ", ".join(dict.fromkeys(contents))
    return (left[0].lstrip("$=( ") if left else "") + joined + (right[0] if right else ""), "boxed"


@lru_cache(maxsize=1024)  # many completions are compared with the same gold text
def gold_answer(text: str) -> str:
    """Return the answer in a gold text, which is the content of its boxes, even if a box is never closed.
    Without a box, it is the answer at the end of a whole solution, or the text itself."""
    found, unclosed = scan_boxes(text)
    if found:
        return extract_answer(text, strict=True).answer
    if unclosed:
        return normalise(re.split(r"\\{1,4}(?:boxed|fbox)\s*\{", text)[-1])
    is_marked = "####" in text or "</answer>" in text or _ANSWER_IS.search(text)
    if is_marked or num_words(text) > MAX_GOLD_WORDS:
        return extract_answer(text).answer or normalise(text)
    return normalise(text)


def _marker(text: str) -> tuple[str, How] | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        return text[start + len("<answer>") : end], "marker"
    found = _HASHES.findall(text) if "####" in text else []
    return (found[-1], "marker") if found else None


def _answer_is(text: str) -> tuple[str, How] | None:
    """Return what follows the last "answer is" or "answer:", up to the end of its formula, bold span or
    sentence. If other words in the sentence change it, return the sentence."""
    ends = [
        match.end() for match in _ANSWER_IS.finditer(text) if not _WRONG.search(text[: match.start()][-20:])
    ]
    if not ends:
        return None
    tail = text[ends[-1] : ends[-1] + MAX_FORMULA]
    bare = tail.lstrip(" \t\r\n*_:")
    opening = re.search(r"[*_]*$", text[max(0, ends[-1] - 3) : ends[-1]] + tail[: len(tail) - len(bare)])
    marks = opening[0] if opening else ""
    tail = bare
    if formula := _MATH.match(tail):
        rest = _SENTENCE_END.split(tail[formula.end() :], maxsplit=1)[0]
        return (
            formula[0] + _without_bold(rest) if is_changed("", rest, is_marked=True) else _content(formula)
        ), "answer_is"
    sentence = _SENTENCE_END.split(tail, maxsplit=1)[0].strip()
    if letter := _LETTER.match(sentence):
        return letter[1], "answer_is"
    if marks[:2] == "**" and "**" in sentence:
        inside, _, rest = sentence.partition("**")
        sentence, marks = (
            (inside if not is_changed("", rest, is_marked=True) else sentence.replace("**", "")),
            "",
        )
    sentence = _without_bold(marks + sentence)
    head = _REASON.split(typographic(sentence), maxsplit=1)[0]
    if re.search(r"\d", head) or (head and num_words(head) <= MAX_WORDS and re.search(r"\d", sentence)):
        sentence = head
    if (leading := _LEADING.match(typographic(sentence))) and num_words(leading[2]):
        return (sentence if is_changed("", sentence[leading.end(1) :]) else leading[1]), "answer_is"
    if num_words(sentence) == 0 or (num_words(sentence) <= MAX_WORDS and not re.search(r"\d", sentence)):
        return sentence, "answer_is"
    inside_sentence = _last(sentence)
    return (inside_sentence[0], "answer_is") if inside_sentence else None


def _without_bold(text: str) -> str:
    """Remove the marks of bold and italic text."""
    return re.sub(r"(\*{1,2}|__?)(?=\S)([^*_]+)(?<=\S)\1", r"\2", text)


def is_changed(before: str, after: str, *, is_marked: bool = False) -> bool:
    """Return whether the words around a number make another number of it: half of 18, 18 million, not 18, 18 or 20.
    ``before`` and ``after`` are the other parts of its sentence. A number ``is_marked`` as a formula or in bold is
    the answer even if it is a share or a rate: **18** out of 20."""
    if _NOT.search(_CLAUSE.split(before)[-1]) or (_BEFORE_END.search(before) and not _SAYS.search(before)):
        return True
    after = after.lstrip("*_$`\"'")
    if is_marked and re.match(r"(?:\s[a-z]{1,20})?\s(?:out of|per) \d", after):
        return False
    stuck = _STUCK.match(after)
    if stuck and stuck[0].lower() not in WORDS and stuck[0] not in ("st", "nd", "rd", "th"):
        return True
    after = re.sub(r"^\s?(?:\\?%|percent\b)", "", after[stuck.end() if stuck else 0 :])
    if _OPERATOR.match(after) or re.match(r"\s*\((?:mod|base|not)\b", after):
        return True
    for word in re.finditer(r"\s*(?:([A-Za-z][A-Za-z'-]*)|(\$?\d)|(.))", after[:200]):
        if word[2] or (word[1] and (_OPERATION.match(word[1]) or word[1].lower() in VALUES)):
            return True
        if _CONTINUES.match(after, word.start()):
            return True
        if word[3] == "," and re.match(r"\s*[*(]*\$?-?\d", after[word.end() :]):
            return True  # a list
        if not word[1] or _HARMLESS.match(word[1]):
            return False
    return False


def _content(formula: re.Match[str]) -> str:
    """Return the content of a formula, with the percent sign that may follow it."""
    percent = re.match(r"\s?(?:\\?%|percent|pct)", formula.string[formula.end() : formula.end() + 12])
    return next(group for group in formula.groups() if group is not None) + ("%" if percent else "")


def _whole(text: str) -> tuple[str, How] | None:
    """Return the text if it is short and only an answer, in one line without words next to its numbers."""
    bare = text.strip()
    if len(bare) <= MAX_BARE and (bold := _BOLD.fullmatch(bare)):
        bare = bold[2] + bold[3]
    if re.match(r"not\b", bare, re.IGNORECASE):
        return None
    if not bare or len(bare) > MAX_BARE or "\n" in bare or bare.count("$") > 2 or "boxed{" in bare:
        return None
    return None if num_words(bare) > (0 if re.search(r"\d", bare) else 3) else (bare, "whole")


def num_words(text: str) -> int:
    """Return the number of words in a text that are neither mathematics nor units."""
    text = re.sub(r"\\[A-Za-z]+(?:\s*\{[A-Za-z ]{0,100}\})?|(?<=\d)(?:or|and)(?=[A-Z(])", " ", text)
    return sum(word.lower() not in _NO_WORDS for word in _WORDS.findall(text))


def _last(text: str) -> tuple[str, How] | None:
    """Return the last number that is not denied, with the operators and brackets that it stands between, or the
    formula that contains it; the whole sentence if its words make another number of it."""
    text = _BOLD_MARKS.sub(" ", _THOUSANDS.sub(",", typographic(text[-MAX_TAIL:])))
    formulas = list(_MATH.finditer(text))
    numbers = list(_NUMBER.finditer(text))
    if formulas and not numbers:
        return _content(formulas[-1]), "last_formula"
    for number in reversed(numbers[-50:]):
        formula = next((f for f in reversed(formulas) if f.start() <= number.start() < f.end()), None)
        start, end = formula.span() if formula else _run(text, number)
        before = _SENTENCE_END.split(text[max(0, start - 80) : start])[-1]
        after = _SENTENCE_END.split(text[end : end + 200], maxsplit=1)[0]
        if _DENIED_BEFORE.search(before) or _DENIED_AFTER.match(after):
            continue
        if scaled := _SCALED.match(after):  # 18 million
            end, after = end + scaled.end(), after[scaled.end() :]
        if is_changed(before, after):
            return (before + text[start:end] + after).strip(), "last_number"
        return (_content(formula), "last_formula") if formula else (text[start:end], "last_number")
    return None


def _run(text: str, number: re.Match[str]) -> tuple[int, int]:
    """Return the start and end of the pair, interval or formula without delimiters that contains a number:
    (3, 18), 2^18, 3 × 10⁸, x < 18. A formula starts after its last "="."""
    start, end = number.start(), number.start() + len(number[0].rstrip())
    for group in _GROUP.finditer(text, max(0, start - 60), end + 60):
        if group.start() < start < group.end():
            return group.span()
    first = start - _reach(_PIECE.findall(text[max(0, start - 60) : start])[::-1])
    last = end + _reach(_PIECE.findall(re.split(r"\b(?:st|nd|rd|th)\b|[ck]?m[²³]", text[end : end + 60])[0]))
    run = text[first:last]
    is_whole = all(run.count(a) == run.count(b) for a, b in ("()", "{}")) and not num_words(run)
    return (first, last) if is_whole else (start, end)


def _reach(pieces: Sequence[str]) -> int:
    """Return how many characters next to a number belong to its formula: operands that a sign joins to it."""
    length = taken = 0
    is_joined = True  # a letter directly next to the number is a factor
    for place, piece in enumerate(pieces):
        length += len(piece)
        spaced = (
            piece == "-" and pieces[place - 1 : place] == [" "] and pieces[place + 1 : place + 2] == [" "]
        )
        if piece == " ":
            is_joined = is_joined and place > 0
        elif _SIGN.fullmatch(piece) and not spaced:
            taken, is_joined = (taken if _INFIX.fullmatch(piece) else length), True
        elif is_joined and _OPERAND.fullmatch(piece):
            taken, is_joined = length, False
        else:
            break
    return taken


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
    if "\\" in text:  # in a formula, a letter is a variable; a label may stand in front of it
        label = re.match(r"\(([A-J])\)(?!.*\([A-J]\))", text)
        return label[1] if label else ""
    text = _NEGATED.sub(" ", _SPEAKER.sub(" ", text))
    letters = set(_CHOICE.findall(text))
    if len(letters) > 1:
        letters = set(_CHOICE.findall(_ARTICLE.sub(" ", text)))
    return letters.pop() if len(letters) == 1 else ""
