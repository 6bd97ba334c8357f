"""Finds the answer in a completion, in time linear in the length of the text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from truestep.grade.normal import normalise, plain, typographic
from truestep.grade.units import FUNCTIONS, WORDS

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
    r"(?:and|or|,|;|&)(?:\s*\})?(?:\s*\\q?quad)?[\s$,;]*"
    r"(?:\\[\[(])?\s*(?:[A-Za-z](?:_\{?\w{1,4}\}?)?\s*=\s*)?"
)
_GAP = re.compile(r"[ $]*(?:\\q?quad|\n)?[ $]*")  # two boxes in one formula, or on adjacent lines
_END_TOKENS = re.compile(r"(?:\s{0,9}(?:<[|｜][^<>|｜]{1,40}[|｜]>|</?s>|<eos>|<pad>|<end_of_turn>))+\s*$")
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|\\,|,\\!|(?<![\d.,]\d{4}) )(?=\d{3}(?!\d))")
_HASHES = re.compile(r"^[ \t]*####[ \t]*(\S.*)$", re.MULTILINE)
_ANSWER_IS = re.compile(
    r"\banswer\b[*_]{0,3}(?:\s{1,3}\w{1,15}){0,6}?(?:\s{1,3}is\b(?:\s{1,3}(?:therefore|thus))?|\s{0,3}[:=])"
    r"\s{0,3}[*_]{0,3}:?|"
    r"\b(?:réponse|reponse|respuesta|resposta|risposta|antwort|lösung|ответ|odpowiedź|cevap|svar|antwoord|đáp án)\b[*_]{0,3}"
    r"(?:(?:\s{1,3}\w{1,15}){0,4}?\s{1,3}(?:est|es|é|è|ist|lautet|jest|är|is|là)\b|\s{0,3}[:：=])\s{0,3}[*_]{0,3}[:：]?|"
    r"(?:答案|答え|答|정답|उत्तर|الجواب|الإجابة)\s{0,3}(?:应该|應該)?(?:是|为|為|は|은|는|है|هي|هو|[:：])\s{0,3}[*_]{0,3}[:：]?",
    re.IGNORECASE,
)
_FINAL_ANSWER = re.compile(r"\bfinal answer\b", re.IGNORECASE)
_NEGATION = re.compile(r"(?:\b(?:not|non|nicht|isn't)|, no|不是)\s{0,3}[$(]?$", re.IGNORECASE)
_LETTER = re.compile(
    r"\W{0,3}([A-J])(?:\)|(?=[.,:;*。、，]|$|\s?[\u0370-\u1fff\u3040-\uffef]|\s(?:because|since|as|not|non|nicht|no|pas)\b))"
    r"(?!,?\s*(?:and|or|,)?\s*\(?[A-J]\b)(?!\s*[=+*/^-])"  # one choice, not two of them, and no variable
)
_SAID_CHOICE = re.compile(  # (B), **B**, **B. copper**, option B; not P(A), **A word**, the choice I made
    r"(?<!\w)\(([A-J])\)|\*\*\(?([A-J])(?=[).:,]|\*\*|$)|"
    r"\b(?:[Oo]ption|[Cc]hoice|[Ll]etter)\s{1,3}\*{0,2}[(\"']?([A-HJ](?![\w'])|I(?![\w']|\s[a-z]))|"
    r"\b(?:pick|choose|select|is|so|thus|therefore|hence)\s{1,3}([B-HJ](?![\w'(])|[AI](?![\w'(]|\s[a-z]))|"
    r"(?<![\w'])([A-J]) (?:is (?:the )?(?:correct|right|best|better|true)|remains)\b|は([A-J])(?=です|。|$)"
)
_NEGATED = re.compile(
    r"(?:\b(?:[Nn]ot|non|nicht|no|pas|nor|isn't)\b|不是|而非|不选|ليس)\s*(?:\w{2,9}\s){0,2}\(?[A-J]\)?(?![A-Za-z'])|"
    r"\(?(?<![A-Za-z0-9])[A-J]\)? (?:is|was|seems|looks|(?:must|would|could|can|may) be) (?:[a-z]{2,9} )?"
    r"(?:incorrect|wrong|false|not)\b"
)
_CHOICE = re.compile(
    r"(?<![A-Za-z0-9\\'=+*/^_|-])(?<![=+*/^-] )(?<![A-Za-z]\()\(?([A-J])\)?(?![A-Za-z0-9'_^(|]|\s*[=+*/^<>]|\s*-\s*\d)"
)
_SPEAKER = re.compile(r"\bI(?= (?:choose|pick|select|think|believe|guess|say|would|will|can|am|go)\b)")
_ARTICLE = re.compile(r"\b[AI](?= (?!or\b|and\b)[a-z])")
_TRUTH = re.compile(
    r"\W{0,4}(?:(?:so|thus|therefore|hence)\b,?\s{0,3}|answer:\s{0,3}){0,2}\W{0,4}(yes|no|true|false)\b"
    r"(?=[*\"')]{0,3}\s{0,3}(?:$|[.,;:!—–\n-]|(?:because|since|as|it|this|that)\b))(?!,?\s{0,3}(?:or|and)\b)",
    re.IGNORECASE,
)
_IS_TRUTH = re.compile(r"\bis (?:therefore |thus |indeed )?(true|false)\W{0,4}$", re.IGNORECASE)
_DENIALS = "not|no|nor|neither|except|incorrect|wrong|false|cannot|eliminated?"
_DENIAL = re.compile(rf"\b(?:{_DENIALS})\b|n't\b", re.IGNORECASE)
_BOLD = re.compile(r"(\*{1,3})([^\s*](?:[^*]|\*(?!\*))*)\1(\.?)")
# What gives a number before or after it a different value, in prose: not "18 because it is more than 5".
_REASON = re.compile(
    r"\s*(?:[,;(—]\s*|\s-{1,2}\s)?\b(?:because|since|as|so|which|for|when|where|if|given|thus|in base (?:10|ten))\b|"
    r"\s*(?:\(mod \d+\)|\[\^\w{1,9}\])"
)
_BEFORE = (
    r"(?:at (?:least|most)|(?:more|less|fewer|greater|larger|smaller|higher|lower|bigger) than|up to|no (?:more|less|"
    r"fewer)|above|below|under|over|beyond|between|within|exceeds?|exceeding|almost|nearly|hardly|half of|quarter of|"
    r"third of|twice|thrice|double|triple|(?:square|cube)s? (?:root )?of|factorial of|minus|negative)"
)
_AFTER = (
    r"(?:\s*(?:[kKMB]|(?:dozen|hundred|thousand|million|billion|trillion)s?)|\s+(?:or (?:more|less|fewer|greater|"
    r"higher|lower|above|below|over|under|so)|at (?:least|most)|squared|cubed|factorial|to the power|(?:over|to|by|out "
    r"of) \d+|(?:times|plus|minus|divided by|multiplied by|modulo) \S+))\b"
)
_CHANGED = re.compile(rf"\b{_BEFORE} (?=[\d$-]|zero)|\d{_AFTER}", re.IGNORECASE)
_BEFORE_END, _AFTER_START = re.compile(rf"\b{_BEFORE} $", re.IGNORECASE), re.compile(_AFTER, re.IGNORECASE)
_LEADING = re.compile(r"([$€£]?-?(?:\d[\d,./]*)?\d%?)\s+(?!and\b|or\b)([A-Za-z].*)", re.ASCII)
_MATH = re.compile(  # a lone dollar is money: a formula after it has no space at either end, or one at both
    r"(?<!\\)\$\$([^$]{1,1000})\$\$|(?<![\\$])\$(?![\s$])((?:[^$\n\\]|\\.){0,999}(?<!\s))\$(?!\d)|"
    r"(?<![\\$])\$ ((?:[^$\n\\]|\\.){1,999}) \$|\\\(([^\n]{1,1000}?)\\\)|\\\[(.{1,1000}?)\\\]",
    re.DOTALL,
)
_NUMBER = re.compile(
    r"(?<![A-Za-z_.\d])(?:(?<![\w)\]}])-)?[$€£]?(?:\d{1,3}(?:,\d{3})+|\d+(?:,\d{1,2}(?![\d,]))?)?"
    r"(?:(?<=\d)|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d{1,3}\b|\s?/\s?\d+(?:\.\d+)?)?\s?%?",
    re.ASCII,
)
_WORDS = re.compile(
    r"[A-Za-z]{3,}|\b(?:so|is|he|it|we|of|to|be|by|at|us|if|no)\b|[^\W\d_\u0000-\u024f\u0370-\u03ff]|^[A-Z]:\s"
)
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
    if len(named) != 1 or _DENIAL.search(last):
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
    return ", ".join(dict.fromkeys(contents)), "boxed"


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
    sentence."""
    ends = [match.end() for match in _ANSWER_IS.finditer(text)]
    if not ends:
        return None
    tail = text[ends[-1] : ends[-1] + MAX_FORMULA].lstrip(" \t\r\n*_:")
    if formula := _MATH.match(tail):
        return _content(formula), "answer_is"
    sentence = re.split(r"\n|\.(?=\s|$)|\*\*", tail, maxsplit=1)[0].strip()
    if letter := _LETTER.match(sentence):
        return letter[1], "answer_is"
    head = _REASON.split(typographic(sentence), maxsplit=1)[0]
    if re.search(r"\d", head):
        if _CHANGED.search(head):
            return head, "answer_is"  # as a whole: the number in it is not the answer
        sentence = head
    if (leading := _LEADING.match(typographic(sentence))) and num_words(leading[2]):
        return leading[1], "answer_is"
    if num_words(sentence) == 0 or (num_words(sentence) <= MAX_WORDS and not re.search(r"\d", sentence)):
        return sentence, "answer_is"
    inside = _last(sentence)
    return (inside[0], "answer_is") if inside else None


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
    """Return the last number, or the formula that contains it."""
    text = _THOUSANDS.sub(",", typographic(text[-MAX_TAIL:]))
    numbers = reversed(list(_NUMBER.finditer(text)))
    number = next((m for m in numbers if not _NEGATION.search(text, max(0, m.start() - 12), m.start())), None)
    *_, formula = None, *_MATH.finditer(text)
    if formula and (number is None or formula.start() < number.start() < formula.end()):
        return _content(formula), "last_formula"
    if number is None:
        return None
    before = _BEFORE_END.search(text, max(0, number.start() - 30), number.start())
    end = number.start() + len(number[0].rstrip())
    after = _AFTER_START.match(text, end)  # 18 million is not 18
    phrase = text[before.start() if before else number.start() : after.end() if after else end]
    return phrase, "last_number"


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
    if "\\" in text:
        return ""  # in a formula, a letter is a variable
    text = _NEGATED.sub(" ", _SPEAKER.sub(" ", text))
    letters = set(_CHOICE.findall(text))
    if len(letters) > 1:
        letters = set(_CHOICE.findall(_ARTICLE.sub(" ", text)))
    return letters.pop() if len(letters) == 1 else ""
