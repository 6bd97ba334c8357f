"""Finds the answer in a completion, in time linear in the length of the text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from truestep.grade.normal import normalise, typographic
from truestep.grade.phrase import PIECEWISE, SENTENCE_END, is_changed, num_words, run_of
from truestep.grade.units import SCALES

How = Literal["boxed", "marker", "answer_is", "whole", "last_choice", "last_formula", "last_number", "none"]
STRICT: tuple[How, ...] = ("boxed", "marker", "answer_is")

MAX_BARE = 200  # most characters of a completion that may consist only of an answer
MAX_FORMULA = 1_000
MAX_ANSWER = 20_000  # characters of a marked answer that are kept
MAX_TAIL = 10_000  # characters at the end of a completion that are searched for a last number or formula
MAX_GOLD_WORDS = 8  # a gold text with more words is a whole solution
MAX_WORDS = 2  # text with more words next to an answer is prose

_BRACES = re.compile(r"\\{1,4}(?:(?:begin)?boxed|fbox)\s{0,9}\{|\\.|[{}]", re.DOTALL)
# Between two boxes that are one answer: closing and opening delimiters, a connective, "x =".
_JOINT = re.compile(
    r"[\s$,;.&]*(?:\\[\])])?[\s$,;]*(?:\\q?quad\s*)?(?:(?!(?:and|or|but|so|thus)\b)[a-z]{1,15} )?"
    r"(?:\\text\{\s*)?(?:and|or|or else|or,? alternatively,?|otherwise,?|,|;|&|/|\\lor|\\land)(?:\s*\})?"
    r"(?:\s*\\q?quad)?[\s$,;]*(?:\\[\[(])?\s*(?:[A-Za-z](?:_\{?\w{1,4}\}?)?\s*=\s*)?"
)
_GAP = re.compile(r"[ $]*(?:\\q?quad|\n)?[ $]*")  # two boxes in one formula, or on adjacent lines
_END_TOKENS = re.compile(r"(?:\s{0,9}(?:<[|｜][^<>|｜]{1,40}[|｜]>|</?s>|<eos>|<pad>|<end_of_turn>))+\s*$")
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|\\,|,\\!|(?<!\d{4}) )(?=\d{3}(?!\d))")
_NO_END = re.compile(
    r"[`\"'“‘#\\(\[{=+\-/^<~]$|\S\s*[-+*/^<>~]\s+$"
)  # a quotation or an operator before a marker
ANSWER_IS = re.compile(
    r"\banswers?\b[*_]{0,3}(?:\s{1,3}\w{1,15}){0,6}?"
    r"(?:\s{1,3}(?:is|are)\b(?:\s{1,3}(?:therefore|thus))?|\s{0,3}[:=])\s{0,3}[*_]{0,3}:?|"
    r"\b(?:réponse|reponse|respuesta|resposta|risposta|antwort|lösung|ответ|odpowiedź|cevap|svar|antwoord|"
    r"đáp án)\b[*_]{0,3}"
    r"(?:(?:\s{1,3}\w{1,15}){0,4}?\s{1,3}(?:est|es|é|è|ist|lautet|jest|är|is|là)\b|"
    r"\s{0,3}[:：=])\s{0,3}[*_]{0,3}[:：]?|"
    r"(?:答案|答え|答|정답|उत्तर|الجواب|الإجابة)\s{0,3}(?:应该|應該)?(?:是|为|為|は|은|는|है|هي|هو|[:：])\s{0,3}[*_]{0,3}[:：]?",
    re.IGNORECASE,
)
_FINAL_ANSWER = re.compile(  # with a number
    r"\bfinal answer\b[*_]{0,3}(?:\s{1,3}(?:is|=))?[\s:*_$\\(\[{-]{0,8}(?:(?:frac|sqrt)\s?\{|"
    r"[A-Za-z]\s?=\s?-?)?\d",
    re.IGNORECASE,
)
_LETTER = re.compile(
    r"\W{0,3}(?:(?:[Cc]hoice|[Oo]ption|[Ll]etter)\s\W{0,2})?([A-J])(?:\)|(?=[.,:;*'\"。、，]|$|"
    r"\s?[\u0370-\u1fff\u3040-\uffef]|\s(?:because|since|as|not|non|nicht|no|pas)\b))"
    r"(?!\W{0,3}\s*(?:and|or|,)?\s*(?:possibly |maybe |perhaps |also |even )?\W{0,3}[A-J]\b)(?!\s*[=+*/^-])"
    r"(?![^.\n]*\b[A-J]\b\)? is (?:also|possible|another))"  # one choice, not two of them, and no variable
)
_BOLD = re.compile(r"(\*{1,3})([^\s*](?:[^*]|\*(?!\*))*)\1(\.?)")
_REASON = re.compile(
    r"\s*(?:[,;(—]\s*|\s-{1,2}\s)?\b(?:because|since|as|so|which|when|where|if|given|thus|in base (?:10|ten)|"
    r"for(?! every| each))\b|\s*(?:\(mod \d+\)|\[\^\w{1,9}\])|,?\s(?:not|rather than|"
    r"instead of)\s\$?-?[\d.,]+\W*$"
)
_WHO = re.compile(r",\s(?:who|whose)\b")
_QUOTED = re.compile(r"[\"'“‘]([^\"'“”‘’]+)[\"'”’]")
_ASIDE = re.compile(  # 18 (dollars), but not 18 (thousand) or (1, 2)
    rf"(.*\d.*\S)\s\((?!mod|base|{SCALES})[^()]*[A-Za-z]{{2}}[^()]*\)"
)
_BUT = re.compile(r"not \S{1,20} but (.+)")
_ALTERNATIVE = re.compile(r"\W{0,4}(?:or|and|nor)\b")
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
# Signs and words outside of a box that change what is in it; most of them only inside of $…$, \(…\) or \[…\].
_BOX_BEFORE = re.compile(
    r"(?:(?<=\S)\s-(?=$)|=\s?-|\bminus|\\(?:neq?|[lg]eq?|sqrt|not\s*=|frac\{[^{}]{0,9}\}\{)|"
    r"(?<=[\w)}] )[<>≠]|"
    r"\b(?:not|never)(?: equal to)?|n't(?: be)?)\s*$"
)
_BOX_BEFORE_IN_MATH = re.compile(
    r"(?:(?:^|[=$(\[{])\s*-|[\d)}A-Za-z]\s?(?:[-+*/^<>≠]|\\(?:times|cdot)(?![a-z])))\s*$"
)
_BOX_AFTER = re.compile(
    rf"\$?\s{SCALES}|\$?\s?\\?%|"
    r"\$?\s(?:or|and) (?:more\b|less\b|fewer\b|\$?\d\S*)|\s?(?:\\sqrt|\\pi|/\s?\d|_\{?\d)\S{0,8}"
)
_BOX_AFTER_IN_MATH = re.compile(r"\s?(?:\^\S{1,8}|!)")
_MINUS = re.compile(r"\b(?:negative|minus)\s$", re.IGNORECASE)
_SCALED = re.compile(rf"\s{SCALES}", re.IGNORECASE)
_BOLD_MARKS = re.compile(r"(?<!\d)\*\*()|\*\*(?!\d)()|(?<![\w*])\*([^*\s][^*\n]{0,40})\*(?![\w*])")
_WRONG = re.compile(
    r"\b(?:wrong|incorrect|false|bad)\s+$|\b(?:doubt|not|unlikely|never|deny|if|suppose|assum(?:e|ing)|"
    r"whether)\b[^.\n,;:]{0,24}$|n't\b[^.\n,;:]{0,24}$",
    re.IGNORECASE,
)
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|non|nicht|never|cannot|isn't)|n't|, no|不是)\s{0,3}(?:(?:be|equal|exactly|"
    r"equal to)\s)?[$(]?$|"
    r"\b(?:doubt|(?:not|n't|never) (?:think|believe|say|claim|agree)|(?:if|suppose|"
    r"whether) the answer)\b[^,;:]*$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"[*_$]{0,3}\s(?:is|was|are|would be|seems) (?:[a-z]+ )?(?:not|wrong|incorrect|false)\b|\sisn't\b"
)


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """An answer in normalized spelling ("" if none was given), and the rule that found it."""

    answer: str
    how: How


NOTHING = Extraction(answer="", how="none")


def extract_answer(text: str, *, strict: bool = False, thinks: bool = False) -> Extraction:
    r"""Return the answer in a completion, which is its last ``\boxed{…}``, <answer> tag, "#### …" (up
    to the end of the line) or "answer is …". Unless ``strict`` is True, the answer may also be the whole of a
    short text, or the last formula or number. Only the text after the last </think> counts. There is no answer
    if a <think> is never closed, or if the model ``thinks`` and </think> is missing."""
    if thinks and "</think>" not in text:
        return NOTHING
    text = after_thought(text)
    rules = (_boxed, _marker, _answer_is) if strict else (_boxed, _marker, _answer_is, _whole, _last)
    for rule in rules:
        found = rule(text)
        if found is not None and found[1] == "none":
            return NOTHING
        if found is not None and (answer := normalise(found[0][:MAX_ANSWER])):
            return Extraction(answer=answer, how=found[1])
    return NOTHING


def after_thought(text: str) -> str:
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
    if later is not None:  # a final answer after the last box replaces it
        return later
    parts = [found[-1]]
    for box in reversed(found[-32:-1]):
        between = text[box[1] : parts[0][0]]
        if len(between) > 60 or not (_GAP.fullmatch(between) or _JOINT.fullmatch(between)):
            break
        parts.insert(0, box)
    contents = [re.sub(r"\\{1,4}(?:boxed|fbox)\s*(?=\{)", "", content) for _, _, content in parts]
    left, right = _around(text, parts[0][0], parts[-1][1])
    return left + ", ".join(dict.fromkeys(contents)) + right, "boxed"


def _around(text: str, start: int, end: int) -> tuple[str, str]:
    """Return the signs and words directly before and after a box that change what is in it."""
    before, after = text[max(0, start - 200) : start].split("\n")[-1].replace("$$", "$"), text[end : end + 30]
    is_math = before.count("$") % 2 == 1 or any(
        before.rfind(a) > before.rfind(b) for a, b in ((r"\(", r"\)"), (r"\[", r"\]"))
    )
    left, right = None, _BOX_AFTER.match(after)
    if "box" not in before[-30:]:
        left = _BOX_BEFORE.search(before) or (_BOX_BEFORE_IN_MATH.search(before) if is_math else None)
    if is_math and right is None:
        right = _BOX_AFTER_IN_MATH.match(after)
    return left[0].lstrip("$=([{ ") if left else "", right[0] if right else ""


@lru_cache(maxsize=1024)  # many completions are compared with the same gold text
def gold_answer(text: str) -> str:
    """Return the answer in a gold text, which is the content of its boxes, even if a box is never closed.
    Without a box, it is the answer at the end of a whole solution, or the text itself."""
    found, unclosed = scan_boxes(text)
    if found:
        return extract_answer(text, strict=True).answer
    if unclosed:
        return normalise(re.split(r"\\{1,4}(?:boxed|fbox)\s*\{", text)[-1])
    is_marked = "####" in text or "</answer>" in text or ANSWER_IS.search(text)
    if is_marked or num_words(text) > MAX_GOLD_WORDS:
        return extract_answer(text).answer or normalise(text)
    return normalise(text)


def _marker(text: str) -> tuple[str, How] | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        return text[start + len("<answer>") : end], "marker"
    found, in_code = "", False
    for line in text.split("\n") if "####" in text else ():
        in_code ^= line.lstrip().startswith("```")
        if "####" in line and (answer := _marked(line, in_code)):
            found = answer
    return (found, "marker") if found else None


def _marked(line: str, in_code: bool) -> str:
    """Return what follows the last #### in a line, or "" if it is no marker. Markers with different answers are one
    answer, which is not right. Text in front of the marker must not be code, quote the marker or change its number;
    then the marker must be followed by an answer, because it could also be a comment."""
    before, *given = line.split("####")
    answers = list(dict.fromkeys(part.strip() for part in given if part.strip()))
    answer = answers[0] if len(answers) == 1 else line[len(before) + 4 :].strip()
    if not before.strip() or not answer:
        return answer
    said = SENTENCE_END.split(before[-MAX_BARE:])[-1].replace("**", "").lstrip(" \t>*-")
    if in_code or _NO_END.search(said) or is_changed(said, "") or _WRONG.search(said[-40:]):
        return ""
    if any(num_words(a) > MAX_WORDS or a.startswith("#") for a in answers):
        return ""
    return answer.removesuffix("**") if before.endswith("**") else answer


def _answer_is(text: str) -> tuple[str, How] | None:
    """Return what follows the last "answer is" or "answer:", up to the end of its formula, bold span or
    sentence. If other words in the sentence change it, return the sentence."""
    said = reversed(list(ANSWER_IS.finditer(text)))
    end = next((m.end() for m in said if not _WRONG.search(text[max(0, m.start() - 40) : m.start()])), None)
    if end is None:
        return None
    tail = text[end : end + MAX_FORMULA]
    bare = tail.lstrip(" \t\r\n*_:")
    opening = re.search(r"[*_]*$", text[max(0, end - 3) : end] + tail[: len(tail) - len(bare)])
    marks = opening[0] if opening else ""
    line = text.rfind("\n", 0, end) + 1
    is_bold = not marks and text.count("**", line, end) % 2  # since before "answer"
    tail = bare.replace("**", "", 1) if is_bold else bare
    if formula := _MATH.match(tail):
        rest = SENTENCE_END.split(tail[formula.end() :], maxsplit=1)[0]
        if not is_changed("", rest, is_marked=True):
            return _content(formula), "answer_is"
        return _MATH.sub(_content, formula[0] + _without_bold(rest)), "answer_is"
    sentence = SENTENCE_END.split(tail, maxsplit=1)[0].strip()
    if tail[len(sentence) : len(sentence) + 1] == "?":
        return None
    if letter := _LETTER.match(sentence):
        return letter[1], "answer_is"
    if marks[:2] == "**" and "**" in sentence:
        inside, _, rest = sentence.partition("**")
        is_number = re.search(r"\d", inside)
        changed = is_changed("", rest, is_marked=True) if is_number else _ALTERNATIVE.match(rest)
        sentence, marks = (sentence.replace("**", "") if changed else inside), ""
    sentence = _without_bold(marks + sentence)
    for pattern in (_QUOTED, _ASIDE, _BUT):
        if found := pattern.fullmatch(sentence):
            sentence = found[1]
    head = typographic(sentence)
    head = head if PIECEWISE.search(head) else _REASON.split(head, maxsplit=1)[0]
    named = _WHO.split(sentence, maxsplit=1)[0]
    if named != sentence and num_words(named) <= MAX_WORDS and not re.search(r"\d", named):
        sentence = named  # Evelyn, who ran 5 km
    elif re.search(r"\d", head):
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


def _last(text: str) -> tuple[str, How] | None:
    """Return the last number that is not denied, with the operators and brackets that it stands between, or the
    formula that contains it; the whole sentence if its words make another number of it."""
    text = _BOLD_MARKS.sub(lambda m: f" {m[3] or ''}", _THOUSANDS.sub(",", typographic(text[-MAX_TAIL:])))
    formulas = list(_MATH.finditer(text))
    numbers = list(_NUMBER.finditer(text))
    if formulas and not numbers:
        return _content(formulas[-1]), "last_formula"
    for number in reversed(numbers[-50:]):
        formula = next((f for f in reversed(formulas) if f.start() <= number.start() < f.end()), None)
        start, end = formula.span() if formula else run_of(text, number)
        before = SENTENCE_END.split(text[max(0, start - 80) : start])[-1]
        after = SENTENCE_END.split(text[end : end + 200], maxsplit=1)[0]
        is_asked = text[end + len(after) : end + len(after) + 1] == "?"
        if is_asked or _DENIED_BEFORE.search(before) or _DENIED_AFTER.match(after):
            continue
        if (minus := _MINUS.search(before)) and not re.search(r"\d\s*$", before[: minus.start()]):
            start, before = start - len(minus[0]), before[: minus.start()]
        if scaled := _SCALED.match(after):  # 18 million
            end, after = end + scaled.end(), after[scaled.end() :]
        if is_changed(before, after):
            return (before + text[start:end] + after).strip(), "last_number"
        return (_content(formula), "last_formula") if formula else (text[start:end], "last_number")
    return None
