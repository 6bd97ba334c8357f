"""The built-in tasks, and how their problems are drawn and solved. The text is short ASCII with one regular
line per step, so that a character-level model with a million parameters can learn it. In a trace, ``wN``
writes the digit N, ``cN`` carries N and ``bN`` borrows N. The last line is ``#### ANSWER``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.random import Generator


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A problem before it is assigned to a split."""

    canonical: str  # the same for equivalent exercises (12+34 and 34+12); its hash decides the split
    text: str
    answer: str
    steps: tuple[str, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    options: Mapping[str, tuple[int, int, int]]  # name → default, smallest, largest
    checker: str
    draw: Callable[[Generator, Mapping[str, int]], Drawn]


def _operand(rng: Generator, digits: int) -> int:
    """Return a number with exactly ``digits`` digits (for one digit: 0 to 9)."""
    return int(rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits))


def _numbers(rng: Generator, options: Mapping[str, int]) -> tuple[int, int]:
    """Return two operands of ``digits`` digits, or of ``min_digits`` to ``digits`` if ``min_digits`` > 0."""
    high = options["digits"]
    if not options["min_digits"]:
        return _operand(rng, high), _operand(rng, high)
    low = min(options["min_digits"], high)
    first, second = (int(d) for d in rng.integers(low, high + 1, size=2))
    return _operand(rng, first), _operand(rng, second)


def _digits(number: int, width: int) -> list[int]:
    """Return the decimal digits from the right, padded with zeros."""
    return [number // 10**i % 10 for i in range(width)]


def column_steps(a: int, b: int, sign: str) -> list[str]:
    """Return one line per column, from the right. For a + b, a line has digit + digit (+ carry) = sum, the
    digit written and the new carry. For a − b, it has borrows instead, and a must be at least b."""
    width, carry, lines = max(len(str(a)), len(str(b))), 0, []
    for i, (x, y) in enumerate(zip(_digits(a, width), _digits(b, width), strict=True)):
        total = x + y + carry if sign == "+" else x - y - carry
        terms = f"{x}{sign}{y}{sign}{carry}" if i else f"{x}{sign}{y}"
        carry = abs(total // 10)
        lines.append(f"{terms}={total} w{total % 10} {'c' if sign == '+' else 'b'}{carry}")
    return lines


def multiplication_steps(a: int, b: int) -> list[str]:
    """Return the steps that multiply a by each digit of b from the right, and add up the shifted products."""
    lines: list[str] = []
    total = 0
    for shift, y in enumerate(_digits(b, len(str(b)))):
        carry = 0
        for i, x in enumerate(_digits(a, len(str(a)))):
            product = x * y + carry
            terms = f"{x}*{y}+{carry}" if i else f"{x}*{y}"
            carry = product // 10
            lines.append(f"{terms}={product} w{product % 10} c{carry}")
        partial = a * y * 10**shift
        if shift:
            lines.append(f"{total}+{partial}")
            lines += column_steps(total, partial, "+")
        total += partial
    return lines


def draw_addition(rng: Generator, options: Mapping[str, int]) -> Drawn:
    """Draw a+b, solved column by column from the right with carries."""
    a, b = _numbers(rng, options)
    low, high = sorted((a, b))
    steps = tuple(column_steps(a, b, "+"))
    return Drawn(canonical=f"{low}+{high}", text=f"{a}+{b}=?", answer=str(a + b), steps=steps)


def draw_subtraction(rng: Generator, options: Mapping[str, int]) -> Drawn:
    """Draw a-b with a >= b, solved column by column from the right with borrows."""
    b, a = sorted(_numbers(rng, options))
    steps = tuple(column_steps(a, b, "-"))
    return Drawn(canonical=f"{a}-{b}", text=f"{a}-{b}=?", answer=str(a - b), steps=steps)


def draw_multiplication(rng: Generator, options: Mapping[str, int]) -> Drawn:
    """Draw a*b, solved digit by digit with carries; the shifted products are added up."""
    a, b = _operand(rng, options["digits_a"]), _operand(rng, options["digits_b"])
    low, high = sorted((a, b))
    steps = tuple(multiplication_steps(a, b))
    return Drawn(canonical=f"{low}*{high}", text=f"{a}*{b}=?", answer=str(a * b), steps=steps)


def draw_chain(rng: Generator, options: Mapping[str, int]) -> Drawn:
    """Draw terms joined by +, - and *. Products have only two factors, so a small times table is enough."""
    numbers = [int(n) for n in rng.integers(1, options["max_number"] + 1, size=options["terms"])]
    signs: list[str] = []
    for _ in numbers[1:]:
        allowed = "+-" if signs and signs[-1] == "*" else "+-*"
        signs.append(allowed[rng.integers(len(allowed))])
    text = str(numbers[0]) + "".join(f"{s}{n}" for s, n in zip(signs, numbers[1:], strict=True))
    values, kept, steps = numbers[:1], [], []
    for sign, number in zip(signs, numbers[1:], strict=True):  # products first
        if sign == "*":
            steps.append(f"{values[-1]}*{number}={values[-1] * number}")
            values[-1] *= number
        else:
            values.append(number)
            kept.append(sign)
    total = values[0]
    for sign, number in zip(kept, values[1:], strict=True):  # then from the left
        result = total + number if sign == "+" else total - number
        steps.append(f"{total}{sign}{number}={result}")
        total = result
    return Drawn(canonical=text, text=f"{text}=?", answer=str(total), steps=tuple(steps))


def draw_countdown(rng: Generator, options: Mapping[str, int]) -> Drawn:
    """Draw numbers, and a target that can be reached by using all of them. Each step combines two values,
    until one is left."""
    while True:
        numbers = [int(n) for n in rng.integers(1, options["max_number"] + 1, size=options["numbers"])]
        values = [(n, str(n), "") for n in numbers]  # value, expression, outermost operation
        steps: list[str] = []
        while len(values) > 1:
            first, second = (int(i) for i in rng.permutation(len(values))[:2])
            x, y = values[first], values[second]
            sign = _possible(x[0], y[0])[rng.integers(len(_possible(x[0], y[0])))]
            joined = _joined(x, sign, y)
            steps.append(f"{x[0]}{sign}{y[0]}={joined[0]}")
            values = [v for i, v in enumerate(values) if i not in (first, second)] + [joined]
        target, expression, _ = values[0]
        if target <= options["max_target"] and target not in numbers:
            break
    return Drawn(
        canonical=f"{','.join(str(n) for n in sorted(numbers))}->{target}",
        text=f"{','.join(str(n) for n in numbers)}->{target}",
        answer=expression,
        steps=tuple(steps),
        meta={"numbers": numbers, "target": target},
    )


def _possible(x: int, y: int) -> str:
    """Return the operations with a positive whole result, except multiplication and division by 1."""
    allowed = {"+": True, "-": x > y, "*": x > 1 and y > 1, "/": y > 1 and x % y == 0}
    return "".join(sign for sign in allowed if allowed[sign])


def _joined(x: tuple[int, str, str], sign: str, y: tuple[int, str, str]) -> tuple[int, str, str]:
    """Return the joined value and its expression, with brackets only if operator precedence needs them."""
    value = {"+": x[0] + y[0], "-": x[0] - y[0], "*": x[0] * y[0], "/": x[0] // y[0]}[sign]
    left = f"({x[1]})" if sign in "*/" and x[2] in ("+", "-") else x[1]
    tight = {"+": (), "-": ("+", "-"), "*": ("+", "-"), "/": ("+", "-", "*", "/")}[sign]
    right = f"({y[1]})" if y[2] in tight else y[1]
    return value, f"{left}{sign}{right}", sign


def draw_letters(rng: Generator, options: Mapping[str, int]) -> Drawn:
    """Draw letters to be sorted in ascending order. Each line shows the letters that are left, the letter
    that is taken and the letters that remain."""
    alphabet = "abcdefghij"[: options["alphabet"]]
    word = "".join(alphabet[int(i)] for i in rng.integers(len(alphabet), size=options["length"]))
    left, steps = word, []
    while left:
        taken = min(left)
        at = left.index(taken)
        steps.append(f"{left}>{taken} {left[:at]}{left[at + 1 :]}".rstrip())
        left = left[:at] + left[at + 1 :]
    return Drawn(canonical=word, text=f"sort {word}=?", answer="".join(sorted(word)), steps=tuple(steps))


TASKS: dict[str, Task] = {
    "addition": Task({"digits": (3, 1, 12), "min_digits": (0, 0, 12)}, "integer", draw_addition),
    "subtraction": Task({"digits": (3, 1, 12), "min_digits": (0, 0, 12)}, "integer", draw_subtraction),
    "multiplication": Task({"digits_a": (2, 1, 6), "digits_b": (1, 1, 6)}, "integer", draw_multiplication),
    "chain": Task({"terms": (4, 3, 12), "max_number": (9, 2, 99)}, "integer", draw_chain),
    "countdown": Task(
        {"numbers": (3, 2, 6), "max_number": (9, 3, 99), "max_target": (99, 9, 999)},
        "countdown",
        draw_countdown,
    ),
    "letters": Task({"length": (5, 2, 12), "alphabet": (10, 3, 10)}, "exact", draw_letters),
}
