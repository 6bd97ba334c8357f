"""Prepares formulas for the algebra: the form that its parser reads, and the formulas that it must not see."""

from __future__ import annotations

import math
import re

from truestep.grade.normal import TEXT_COMMAND
from truestep.grade.numeric import MAX_DIGITS
from truestep.grade.structure import CLOSE, OPEN

MAX_DEPTH = 25  # levels of nested brackets
_LARGEST_FACTORIAL = 5_000
_LARGEST_POWER = 6  # digits of a numeric exponent

_TOWER = re.compile(r"(\d+)[\s)}]*\^[\s({]*(\d+)[\s)}!]*\^[\s({]*(\d+)")
_FACTORIAL = re.compile(r"(\d+)[\s)}]*!")


def refusal(text: str) -> str:
    """Return why algebra would take too long on a text, so that it must not be used; "" if it may be used."""
    depth = deepest = 0
    for character in text:
        depth += (character in OPEN) - (character in CLOSE)
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        return f"nested deeper than {MAX_DEPTH} brackets"
    if len(text) >= MAX_DIGITS and re.search(rf"\d{{{MAX_DIGITS}}}", text):
        return f"a number of more than {MAX_DIGITS:,} digits"
    is_large = any(len(n) > 5 or int(n) > _LARGEST_FACTORIAL for n in _FACTORIAL.findall(text))
    if is_large or re.search(r"!\s*[)}]*\s*!", text):
        return "a factorial too large to compute"
    for _, base, exponent in _TOWER.findall(text):
        if len(exponent) > 4 or int(exponent) * math.log10(max(int(base), 2)) > _LARGEST_POWER:
            return "a tower of powers too large to compute"
    if re.search(r"\^[\s({]*\d{7}", text) or len(re.findall(r"\)\s*\^[\s({]*\d{3}", text)) > 1:
        return "a power or a range too large to compute"
    return ""


def symbolic_form(text: str) -> str:
    """Return a normalized answer as one LaTeX formula for the algebra, without delimiters inside."""
    joint = rf"{TEXT_COMMAND}\{{\s*(?:and|or)\s*\}}|(?<![A-Za-z\\])(?:,\s*)?(?:and|or)(?![A-Za-z])"
    text = re.sub(joint, ", ", text.replace("$", ""))
    text = re.sub(r"(?<![A-Za-z\\])(sqrt|pi|infty|sin|cos|tan|log|ln|exp)(?![A-Za-z])", r"\\\1 ", text)
    # An angle in degrees becomes radians inside a function.
    in_degrees = r"\\(sin|cos|tan|cot|sec|csc)\s*([({])?\s*([\d.]{1,8})\s*\^\{\\circ\}(?(2)\s*[)}])"
    text = re.sub(in_degrees, r"\\\1(\\frac{\3 \\pi}{180})", text)
    text = re.sub(r"\\sqrt\s*\[\s*(\d*[13579])\s*\]\s*\{\s*-", r"-\\sqrt[\1]{", text)  # the real root
    text = re.sub(r"\\sqrt \(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\^\s*\(([^()]*)\)", r"^{\1}", text)
    text = re.sub(r"\^\s*\\infty", r"^{\\infty}", re.sub(r"\\exp\s*[({]([^(){}]*)[)}]", r"e^{\1}", text))
    if len(re.findall(r"\\pm(?![a-z])", text)) == 1 and "," not in text and r"\mp" not in text:  # both values
        text = ", ".join(re.sub(r"\\pm(?![a-z])", sign, text) for sign in "+-")
    return re.sub(r"\s*\*\s*", r" \\cdot ", text).strip(" .,;")
