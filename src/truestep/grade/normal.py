"""Rewrites Unicode look-alikes and LaTeX decoration in a uniform spelling, without changing the meaning.

All functions take time linear in the length of the text and look only at the text; nothing is evaluated."""

from __future__ import annotations

import re
import unicodedata

_WIDE = {0xFF01 + i: 0x21 + i for i in range(94)}  # full-width forms of the printable ASCII characters
_SPACES = dict.fromkeys([*range(0x2000, 0x200B), 0x00A0, 0x1680, 0x202F, 0x205F, 0x3000], " ")
_INVISIBLE = dict.fromkeys(
    [0x00AD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x206A), 0xFEFF]
)
_INVISIBLE_END = re.compile(rf"(\\[A-Za-z]+)[{''.join(map(chr, _INVISIBLE))}]+(?=[A-Za-z])")
_BROKEN = dict.fromkeys(range(0xD800, 0xE000), "\ufffd")  # a lone surrogate cannot be written to a UTF-8 file
_SIGNS = {ord(a): b for a, b in zip("−‐‑–—﹣’‘“”′″。，", "------''\"\"'\".,", strict=True)}
# Digits of all scripts, among them mathematical bold ones.
_DIGITS = {i: str(unicodedata.decimal(chr(i))) for i in (*range(0x0660, 0xAC00), *range(0x1D7CE, 0x1D800))
           if unicodedata.category(chr(i)) == "Nd"}  # fmt: skip
_TYPOGRAPHY = {**_WIDE, **_SPACES, **_INVISIBLE, **_BROKEN, **_SIGNS, **_DIGITS, 0x066B: ".", 0x066C: ","}

_SYMBOLS = {
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "≤": r"\leq ", "≥": r"\geq ",
    "≠": r"\neq ", "π": r"\pi ", "∞": r"\infty ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ",
    "∈": r"\in ", "°": r"^{\circ}", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ",
    "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "…": r"\ldots ",
    "∅": r"\emptyset ", "✕": r"\times ", "•": r"\cdot ", "∙": r"\cdot ", "≈": r"\approx ", "∑": r"\sum ",
    "⊥": r"\perp ", "∶": ":", "ℝ": r"\mathbb{R}", "∖": r"\setminus ", "⟨": r"\langle ", "⟩": r"\rangle ", "Ω": r"\Omega ",
    "∉": r"\notin ", "∧": r"\land ", "∨": r"\lor ",
} | {c: r"\frac{" + unicodedata.normalize("NFKC", c).replace("⁄", "}{") + "}" for c in "⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}  # fmt: skip

_SMALL = {"^": "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ", "_": "₀₁₂₃₄₅₆₇₈₉₊₋ₙᵢ"}
_SMALL_NAMES = {sign: str.maketrans(small, "0123456789+-ni") for sign, small in _SMALL.items()}
_SMALL_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉", "01234567890123456789")
_SMALL_FRACTION = re.compile("(?<![⁰¹²³⁴-⁹])([⁰¹²³⁴-⁹]+)⁄([₀-₉]+)")
_WRAPPERS = ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"), ("__", "__")
TEXT_COMMAND = r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|mathrm|mathbf|mathit|mathsf|mbox|operatorname|rm)\s*"
_TEXT = re.compile(TEXT_COMMAND + r"\{([^{}]*)\}")
_LOOSE_SPACE = re.compile(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])")
_BRACED = re.compile(r"([\^_])\{([A-Za-z0-9])\}")
_COMMAND_SPACE = re.compile(r"(\\[A-Za-z]+) (?=[^A-Za-z])")
_HEDGE = re.compile(  # in front of a number or a formula
    r"^(?:\\text\s*\{\s*)?(?:approximately|approx\.?|about|around|roughly|exactly|\\approx|\\sim(?![a-z])|"
    r"=)\s*\}?\s*"
    r"(?=[-\d.\\$])", re.IGNORECASE,
)  # fmt: skip
_THEREFORE = re.compile(r"^(?:therefore|thus|hence|so|finally),?[ \t]+", re.IGNORECASE)
_MINUS = re.compile(
    r"^(?:(?:\\text\s*\{\s*)?(?:minus|negative)\s*\}?\s+(?=[\\\d.A-Za-z$])|负)", re.IGNORECASE
)
_SYSTEM = re.compile(
    r"(?:\\\{)?\s*\\begin\{(cases|array|aligned?|gathered|split)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}\s*\.?",
    re.DOTALL,
)
_EQUATION = re.compile(r"[^=<>,]+=[^=<>,]+")
_TAGGED = re.compile(r"<(b|strong|i|em|u|span|p)>([^<>]*)</\1>([.!]?)")
_LABEL_WORDS = r"(?:the\s+)?(?:final\s+)?(?:answer|result|solution)\s*(?::|=|is\b:?)\s*"
_LABEL = re.compile(  # "Answer: 18" in a box or after a marker
    rf"^(?:\\text(?:bf|rm|it)?\s*\{{\s*{_LABEL_WORDS}\}}|\*\*{_LABEL_WORDS}\*\*|{_LABEL_WORDS})\s*(?=\S)",
    re.IGNORECASE,
)
_EMPHASIS = re.compile(r"(\*{1,3}|_{1,3})(?=[^\s*_])([^*_]*[^\s*_])\1([.!]?)")
# Signs for "done" after an answer.
_DONE = " \t\r\n\u220e\ufe0f" + "".join(
    map(chr, (*range(0x25A0, 0x2600), *range(0x2600, 0x27C0), *range(0x2B00, 0x2C00)))
)
_DONE += "".join(map(chr, range(0x1F300, 0x1FB00)))
_DONE_COMMAND = re.compile(r"\\(?:blacksquare|square|Box|qed|checkmark|hfill)\s?$")
_IN_DOLLARS = re.compile(r"\$([^$]*[^$\s])\$(\s?(?:\\?%|[A-Za-z][^$\d]*)?)")
_STYLES = "boldsymbol|bm|underline|mathtt|ensuremath|framebox|emph|textsc|mathsf|pmb"
_SWITCHES = "bf|it|sf|tt|tiny|small|large|Large|LARGE|huge|Huge|textstyle|scriptstyle|therefore|hfill|checkmark|noindent"
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.ASCII), replacement)
    for pattern, replacement in (
        (r"\\(?:[dtc]|nice|s)frac(?![a-zA-Z])", r"\\frac"),
        (rf"\\(?:{_STYLES})\s*\{{([^{{}}]*)\}}", r"\1"),
        (rf"\\(?:{_SWITCHES})(?![a-zA-Z])\s*|\\tag\*?\s*\{{[^{{}}]*\}}", ""),
        (r"\\begin\{array\}\{[lcr|]\}([^&\\]*)\\end\{array\}", r"\1"),
        (
            r"\\(?:text(?:bf|rm|it)?|mathrm)\s*\{\s*([-$]{0,2}\d[\d,./]*)(?:\\ |\s)+([A-Za-z][^{}]*)\}",
            r"\1 \\text{\2}",
        ),
        (r"\\var(epsilon|phi|theta|rho|sigma|kappa)(?![a-zA-Z])", r"\\\1"),
        (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|limits|nolimits)(?![a-zA-Z])", ""),
        (r"\{,\}|,\\!\s*(?=\d{3})", ","),  # the separators of thousands
        (r"(?<![\d_])(\d{1,3})_(\d{3})(?![\d_])", r"\1\2"),
        (r"\\[hv]?phantom\s*\{[^{}]*\}", ""),
        (r"(?<=\d)(?:\{\s*\\[,;: ]\s*\}|\\thinspace(?![a-zA-Z]))\s*(?=\d{3})", " "),
        (r"\\textcolor\s*\{[^{}]*\}\s*(?=\{)|\\color\s*\{[^{}]*\}", ""),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        (
            r"(?<![A-Za-z\\])(?:\\(?:text|mathrm)\s*\{\s*)?(?:[Ii]nfinity|inf)(?![A-Za-z])(?:\s*\})?",
            r"\\infty ",
        ),
        (r"√\s*(\d+(?:\.\d+)?|[A-Za-z])", r"\\sqrt{\1}"),
        (r"∛\s*(\d+(?:\.\d+)?|[A-Za-z])", r"\\sqrt[3]{\1}"),
        (r"∜\s*(\d+(?:\.\d+)?|[A-Za-z])", r"\\sqrt[4]{\1}"),
        (r"√\s*\(([^()]*)\)|\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1\2}"),
        (r"(?<!\\)\\!|\\hspace\{[^{}]*\}", ""),
        (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-zA-Z])", " "),
        (r"(?<!\\)\\([%$])", r"\1"),
        (r"\\(?:le|leqslant)(?![a-zA-Z])|<=", r"\\leq "),
        (r"\\(?:ge|geqslant)(?![a-zA-Z])|>=", r"\\geq "),
        (r"\\ne(?![a-zA-Z])|!=", r"\\neq "),
        (r"\\(?:dots[bcmio]?|hdots)(?![a-zA-Z])", r"\\ldots"),
        (r"\\(?:gt)(?![a-zA-Z])", ">"),
        (r"\\(?:lt)(?![a-zA-Z])", "<"),
        (r"\\degree(?![a-zA-Z])|\^\s*\\circ(?![a-zA-Z])|\^\s*\{\s*\\circ\s*\}", r"^{\\circ}"),
        (r"\*\*", "^"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\{[^{}]*\})\s*(\d)", r"\1{\2}"),
        (r"\\(frac|sqrt)\s+(?=[{\[])", r"\\\1"),
        (r"(\\frac\{[^{}]*\})\s+\{", r"\1{"),
        (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
        (r"(?<![\d}.])(?<![\d}.] )\\(?:mathrm|mathit|mathbf|text)\s*\{\s*([dei])\s*\}", r" \1"),
        (r"(?<![\w}.)])(?<![\w}.)] )\\(?:mathrm|mathit|mathbf|text)\s*\{\s*([A-Za-z])\s*\}", r"\1"),
        (r"(\\(?:mathrm|text)\{\s*[A-Za-z]+)\s+([A-Za-z]+)\^\{?-1\}?\s*\}", r"\1/\2}"),
        (r"\\(?:text|mathrm|mathbf|textbf)\s*\{\s*(-?\d[\d.,]*)\s*\}", r"\1"),
        (r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"(?<![\w.^_])1i(?![A-Za-z])", "i"),
        (r"\s+", " "),
    )
)

_WITHOUT_BACKSLASH = [  # those that can change a text without a backslash
    (pattern, new)
    for pattern, new in _REWRITES
    if not all(r"\\" in part for part in pattern.pattern.split("|"))
]
_NUMBER = re.compile(r"-?\d{1,15}(?:\.\d{1,15})?", re.ASCII)


def typographic(text: str) -> str:
    """Replace Unicode look-alikes of minus signs, digits and spaces with ASCII; drop invisible characters."""
    if text.isascii():
        return text
    if "\\" in text:  # the end of a command stays where it is
        text = _INVISIBLE_END.sub(r"\1 ", text)
    return text.translate(_TYPOGRAPHY)


def normalise(text: str) -> str:
    r"""Return an answer in a uniform spelling (Unicode look-alikes, LaTeX spacing, fractions), with any
    surrounding ``$…$`` and any final period removed. ``\text{…}`` is kept, to tell units from variables."""
    text = typographic(text).strip()
    if _NUMBER.fullmatch(text):
        return text
    if tagged := _TAGGED.fullmatch(text):
        text = tagged[2] + tagged[3]
    text = _finished(_LABEL.sub("", _THEREFORE.sub("", text))) or text
    if emphasis := _EMPHASIS.fullmatch(text):
        text = emphasis[2] + emphasis[3]
    if text.count("$") == 2 and (formula := _IN_DOLLARS.fullmatch(text)):
        text = formula[1] + formula[2]
    if "\\\\" in text and r"\begin" not in text:  # commands whose backslash was escaped once too often
        text = re.sub(r"\\{2,4}(?=[A-Za-z]{2})", r"\\", text)
    if not text.isascii():
        text = _ascii(text)
    for pattern, replacement in _REWRITES if "\\" in text else _WITHOUT_BACKSLASH:
        text = pattern.sub(replacement, text)
    return _MINUS.sub("-", _listed(_HEDGE.sub("", strip_wrappers(text))))


def _ascii(text: str) -> str:
    """Return a text with LaTeX for raised and lowered characters, fractions and symbols."""
    text = _SMALL_FRACTION.sub(_small_fraction, text).replace("⁄", "/")
    for sign, small in _SMALL.items():  # adjacent digits are one exponent: x²³ is x^{23}
        text = re.sub(f"[{small}]+", sign + r"{\g<0>}", text).translate(_SMALL_NAMES[sign])
    for symbol, command in _SYMBOLS.items():
        if symbol in text:
            text = text.replace(symbol, command)
    return text


def _finished(text: str) -> str:
    """Remove signs such as ✓ and \\blacksquare at the end."""
    text = text.rstrip(_DONE)
    if command := _DONE_COMMAND.search(text, max(0, len(text) - 20)):
        text = text[: command.start()].rstrip(_DONE)
    return text


def _small_fraction(match: re.Match[str]) -> str:
    above, below = (part.translate(_SMALL_DIGITS) for part in match.groups())
    return rf"\frac{{{above}}}{{{below}}}"


def _listed(text: str) -> str:
    r"""Return the equations of a system in ``cases``, ``array`` or ``aligned`` as a list: x=1, y=2; and ``\pmatrix{…}``
    as an environment."""
    text = re.sub(r"\\([pbvBV]?matrix)\s*\{(.*)\}", r"\\begin{\1}\2\\end{\1}", text)
    system = _SYSTEM.fullmatch(text)
    rows = (
        [row.replace("&", "").strip(" ,;") for row in re.split(r"\\\\|\\cr(?![a-z])", system[2])]
        if system
        else []
    )
    rows = [row for row in rows if row]
    return ", ".join(rows) if rows and all(_EQUATION.fullmatch(row) for row in rows) else text


def strip_wrappers(text: str) -> str:
    """Remove the delimiters that only mean "this is mathematics" or "this is bold"."""
    for _ in range(8):
        before = text
        text = text.strip()
        text = text.rstrip(" .") if text.endswith(".") and not text.endswith("...") else text
        for left, right in _WRAPPERS:
            inner = text[len(left) : -len(right)]
            if len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right):
                text = inner if left not in inner and right not in inner else text
        if text == before:
            break
    return text


def plain(text: str) -> str:
    r"""Unwrap the contents of ``\text{…}`` in a normalized answer, and remove every ``$``."""
    text = _TEXT.sub(r" \1 ", text) if "\\" in text else text
    text = " ".join(text.replace("$", "").split())
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text


def canonical(text: str) -> str:
    """Return a form that is the same string for two answers that differ only in spacing and braces."""
    text = _LOOSE_SPACE.sub("", plain(text))
    text = _BRACED.sub(r"\1\2", text) if "{" in text else text
    return _COMMAND_SPACE.sub(r"\1", text) if "\\" in text else text
