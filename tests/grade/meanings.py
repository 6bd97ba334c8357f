"""Answers by what they mean: families of meanings that all differ, each with several spellings.

Two spellings of one meaning are the same answer, and spellings of two meanings of a family are different ones.
Everything is made from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, permutations, product

ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("_", "_", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
SCRIPTS = ("٠", "۰", "०", "０", "𝟎")


@dataclass(frozen=True)
class Meaning:
    """What an answer means, and how it can be written. ``kind`` is the kind of question."""

    key: object
    spellings: tuple[str, ...]
    kind: str = "math"


def in_words(n: int) -> str:
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    if n < 1000:
        return f"{ONES[n // 100]} hundred" + (f" and {in_words(n % 100)}" if n % 100 else "")
    return f"{in_words(n // 1000)} thousand" + (f" {in_words(n % 1000)}" if n % 1000 else "")


def frac(value: Fraction) -> str:
    sign = "-" if value < 0 else ""
    return f"{sign}{abs(value).numerator}" + (f"/{value.denominator}" if value.denominator > 1 else "")


def tex(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value)
    sign = "-" if value < 0 else ""
    return rf"{sign}\frac{{{abs(value).numerator}}}{{{value.denominator}}}"


def decimal(value: Fraction) -> str | None:
    """Return the exact decimal of a value, if it has at most six places."""
    for places in range(7):
        if (scaled := value * 10**places).denominator == 1:
            text = f"{abs(int(scaled)):0{places + 1}d}"
            return ("-" if value < 0 else "") + (f"{text[:-places]}.{text[-places:]}" if places else text)
    return None


def exact(*texts: str | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for text in texts if text))


def integers(rng: random.Random) -> Iterator[Meaning]:
    for start in rng.sample(range(11, 9000), 16):
        for n in (start, start + 1, -start, 10 * start + 3):
            script = "".join(chr(ord(rng.choice(SCRIPTS)) + int(d)) for d in str(abs(n)))
            spelled = in_words(abs(n)) if abs(n) < 10_000 else None
            sign = "-" if n < 0 else ""
            yield Meaning(
                n,
                exact(
                    str(n),
                    f"{n:,}",
                    f"{n}.0",
                    rf"\text{{{n}}}",
                    f"${n}$",
                    rf"x = {n}",
                    sign + script,
                    f"{'minus ' if n < 0 else ''}{spelled}" if spelled else None,
                    f"about {n}",
                    f"{n:,}".replace(",", r"\,"),
                ),
            )


def fractions(rng: random.Random) -> Iterator[Meaning]:
    values = {Fraction(rng.randint(1, 40), rng.randint(2, 16)) * rng.choice((1, 1, -1)) for _ in range(60)}
    for value in sorted(v for v in values if v.denominator > 1):
        a, b = value.numerator, value.denominator
        mixed = rf"{a // b}\frac{{{a % b}}}{{{b}}}" if a > b else None
        yield Meaning(
            value,
            exact(
                frac(value),
                tex(value),
                tex(value).replace("frac", "dfrac"),
                decimal(value),
                mixed,
                rf"\frac{{{3 * a}}}{{{3 * b}}}",
                rf"\left({tex(value)}\right)",
            ),
        )


def percents(rng: random.Random) -> Iterator[Meaning]:
    for p in rng.sample(range(2, 99), 40):
        fraction = Fraction(p, 100)
        yield Meaning(p, exact(rf"{p}\%", f"{p}%", f"{p} percent", tex(fraction), f"{in_words(p)} percent"))


def measured(
    sizes: dict[str, Fraction], values: list[Fraction], names: dict[str, tuple[str, ...]]
) -> Iterator[Meaning]:
    """Return quantities, given in the first unit, in all units in which they have a short decimal."""
    for value in dict.fromkeys(values):
        spellings = []
        for unit, size in sizes.items():
            if (number := decimal(value / size)) and len(number) < 12:
                spellings += [
                    f"{number} {unit}",
                    rf"{number}\text{{ {unit}}}",
                    rf"{number}\,\mathrm{{{unit}}}",
                ]
                spellings += [f"{number} {name}" for name in names.get(unit, ())]
        yield Meaning(value, exact(*spellings))


def near(rng: random.Random, low: int, high: int, count: int, step: Fraction = Fraction(1)) -> list[Fraction]:
    return [
        n * step
        for start in rng.sample(range(low, high), count)
        for n in (start, start + 1, 10 * start, 100 * start)
    ]


def lengths(rng: random.Random) -> Iterator[Meaning]:
    sizes = {"m": Fraction(1), "cm": Fraction(1, 100), "mm": Fraction(1, 1000), "km": Fraction(1000)}
    names = {"m": ("meters", "metres"), "cm": ("centimeters",), "km": ("kilometers",)}
    yield from measured(sizes, near(rng, 3, 400, 14, Fraction(1, 20)), names)


def areas(rng: random.Random) -> Iterator[Meaning]:
    for value in dict.fromkeys(near(rng, 3, 400, 12, Fraction(1, 10))):
        m, cm = decimal(value), decimal(value * 10_000)
        yield Meaning(
            value,
            exact(
                rf"{m}\text{{ m}}^2", f"{m} square meters", rf"{cm}\text{{ cm}}^2", f"{cm} square centimeters"
            ),
        )


def masses(rng: random.Random) -> Iterator[Meaning]:
    sizes = {"g": Fraction(1), "kg": Fraction(1000), "mg": Fraction(1, 1000)}
    yield from measured(sizes, near(rng, 3, 900, 12, Fraction(1, 4)), {"kg": ("kilograms",), "g": ("grams",)})


def pressures(rng: random.Random) -> Iterator[Meaning]:
    yield from measured({"Pa": Fraction(1), "kPa": Fraction(1000)}, near(rng, 3, 900, 12, Fraction(10)), {})


def speeds(rng: random.Random) -> Iterator[Meaning]:
    sizes = {"m/s": Fraction(1), "km/h": Fraction(5, 18)}
    names = {"m/s": ("meters per second",), "km/h": ("kilometers per hour", "kph")}
    yield from measured(sizes, near(rng, 3, 90, 12, Fraction(5, 2)), names)


def durations(rng: random.Random) -> Iterator[Meaning]:
    for start in rng.sample(range(61, 900), 20):
        for minutes in (start, start + 1, start + 60):
            h, m = divmod(minutes, 60)
            hours = decimal(Fraction(minutes, 60))
            parts = (
                [
                    f"{h} h {m} min",
                    f"{h} hours {m} minutes",
                    f"{h} hours and {m} minutes",
                    rf"{h}\text{{ hours }}{m}\text{{ minutes}}",
                    f"{in_words(h)} hours {in_words(m)} minutes",
                    f"{h}小时{m}分钟",
                ]
                if m
                else [f"{h} hours", f"{h} h"]
            )
            yield Meaning(
                minutes,
                exact(*parts, f"{minutes} min", f"{minutes} minutes", f"{hours} hours" if hours else None),
            )


def feet(rng: random.Random) -> Iterator[Meaning]:
    for start in rng.sample(range(40, 110), 20):
        for inches in (start, start + 1):
            ft, rest = divmod(inches, 12)
            whole = decimal(Fraction(inches, 12))
            yield Meaning(
                inches,
                exact(
                    f"{ft} ft {rest} in" if rest else f"{ft} ft",
                    f"{ft}'{rest}\"" if rest else None,
                    f"{ft} feet {rest} inches" if rest else f"{ft} feet",
                    f"{inches} inches",
                    f"{whole} ft" if whole else None,
                ),
            )


def money(rng: random.Random) -> Iterator[Meaning]:
    for start in rng.sample(range(105, 9900), 16):
        for cents in (start, start + 1, 10 * start):
            dollars, rest = divmod(cents, 100)
            yield Meaning(
                cents,
                exact(
                    rf"\${dollars}.{rest:02d}",
                    f"{dollars}.{rest:02d} dollars",
                    f"{cents} cents",
                    f"{dollars} dollars {rest} cents" if rest else f"{dollars} dollars",
                ),
            )


def angles(rng: random.Random) -> Iterator[Meaning]:
    for degree, minutes in product(rng.sample(range(5, 170), 14), (0, 15, 30, 36)):
        value = decimal(degree + Fraction(minutes, 60))
        compound = (
            (rf"{degree}^\circ{minutes}'", f"{degree}°{minutes}′") if minutes else (f"{degree} degrees",)
        )
        yield Meaning((degree, minutes), exact(*compound, rf"{value}^\circ", f"{value}°"))


def temperatures(rng: random.Random) -> Iterator[Meaning]:
    for n, scale in product(rng.sample(range(3, 99), 20), "CF"):
        yield Meaning(
            (n, scale),
            exact(rf"{n}^\circ\text{{{scale}}}", f"{n} °{scale}", rf"{n}^{{\circ}} \mathrm{{{scale}}}"),
        )


def times(rng: random.Random) -> Iterator[Meaning]:
    for hour, minute in product(rng.sample(range(1, 12), 8), (0, 5, 30)):
        for half, offset in (("a", 0), ("p", 12)):
            short = f"{hour} {half}.m." if not minute else None
            yield Meaning(
                (hour, minute, half),
                exact(
                    f"{hour}:{minute:02d} {half.upper()}M",
                    f"{hour}:{minute:02d} {half}.m.",
                    short,
                    f"{hour + 12}:{minute:02d}" if offset else None,
                ),
            )


def dates(rng: random.Random) -> Iterator[Meaning]:
    for month, day, year in product(rng.sample(range(12), 6), rng.sample(range(1, 29), 4), (2023, 2024)):
        name = MONTHS[month]
        yield Meaning(
            (month, day, year),
            exact(
                f"{name} {day}, {year}",
                f"{day} {name} {year}",
                f"{name[:3]} {day}, {year}",
                f"{year}-{month + 1:02d}-{day:02d}",
            ),
        )


def ratios(rng: random.Random) -> Iterator[Meaning]:
    for a, b in rng.sample(
        [(a, b) for a, b in product(range(2, 19), repeat=2) if Fraction(a, b).numerator == a and a != b], 40
    ):
        yield Meaning((a, b), exact(f"{a}:{b}", f"{a} : {b}", rf"{a}\text{{ to }}{b}", f"{a} to {b}"))


def intervals(rng: random.Random) -> Iterator[Meaning]:
    for (low, high), left, right in product(rng.sample(list(combinations(range(-5, 9), 2)), 12), "([", ")]"):
        signs = "<" if left == "(" else r"\leq ", "<" if right == ")" else r"\leq "
        plain = tuple(s.replace(r"\leq ", "<=") for s in signs)
        french = f"{']' if left == '(' else '['}{low}, {high}{'[' if right == ')' else ']'}"
        yield Meaning(
            (low, high, left, right),
            exact(
                f"{left}{low}, {high}{right}",
                rf"\left{left}{low},{high}\right{right}",
                french,
                rf"x \in {left}{low},{high}{right}",
                f"{low} {signs[0]} x {signs[1]} {high}",
                rf"x {plain[0].replace('<', '>')} {low} \text{{ and }} x {plain[1]} {high}",
                rf"\{{x \mid {low} {signs[0]} x {signs[1]} {high}\}}",
            ),
        )


def rays(rng: random.Random) -> Iterator[Meaning]:
    for n, sign in product(rng.sample(range(-9, 20), 14), ("<", ">", r"\leq ", r"\geq ")):
        is_low, closed = sign in ("<", r"\leq "), "eq" in sign
        if is_low:
            end = (
                f"(-\\infty, {n}{']' if closed else ')'}",
                f"(-inf, {n}{']' if closed else ')'}",
                f"(-∞; {n}{']' if closed else ')'}",
            )
        else:
            end = (
                f"{'[' if closed else '('}{n}, \\infty)",
                f"{'[' if closed else '('}{n}, inf)",
                f"{'[' if closed else '('}{n}, +∞)",
            )
        yield Meaning(
            (n, sign), exact(f"x {sign} {n}", *end, f"x {'<' if is_low else '>'}{'=' if closed else ''} {n}")
        )


def complements(rng: random.Random) -> Iterator[Meaning]:
    for low, high in rng.sample(list(combinations(range(-5, 12), 2)), 20):
        for closed in (True, False):
            a, b = ("[", "]") if closed else ("(", ")")
            c, d = (")", "(") if closed else ("]", "[")
            s, t = ("<", ">") if closed else (r"\leq ", r"\geq ")
            yield Meaning(
                (low, high, closed),
                exact(
                    rf"(-\infty, {low}{c} \cup {d}{high}, \infty)",
                    rf"(-inf,{low}{c} U {d}{high},inf)",
                    rf"\mathbb{{R}} \setminus {a}{low},{high}{b}",
                    rf"x {s} {low} \text{{ or }} x {t} {high}",
                    rf"x \notin {a}{low}, {high}{b}",
                ),
            )
    for n in rng.sample(range(-9, 30), 20):
        yield Meaning(
            n,
            exact(
                rf"x \neq {n}",
                rf"\mathbb{{R}} \setminus \{{{n}\}}",
                rf"(-\infty,{n}) \cup ({n},\infty)",
                f"x != {n}",
            ),
        )


def complexes(rng: random.Random) -> Iterator[Meaning]:
    for a, b in rng.sample([(a, b) for a, b in product(range(-6, 7), repeat=2) if a and b], 40):
        sign, size = "+" if b > 0 else "-", "" if abs(b) == 1 else str(abs(b))
        yield Meaning(
            (a, b),
            exact(
                f"{a}{sign}{size}i",
                f"{'' if b > 0 else '-'}{size}i{a:+d}",
                rf"{a}{sign}{size or 1}\sqrt{{-1}}",
                rf"\frac{{{2 * a}{sign}{2 * abs(b)}i}}{{2}}",
            ),
        )


def surds(rng: random.Random) -> Iterator[Meaning]:
    for a, b, c in product((1, 2, 3, 5), (2, 3, 5, 6, 7), (0, 1)):
        front = "" if a == 1 else str(a)
        tail = " + 1" if c else ""
        yield Meaning(
            (a, b, c),
            exact(
                rf"{front}\sqrt{{{b}}}{tail}",
                rf"\sqrt{{{a * a * b}}}{tail}",
                rf"{'1 + ' if c else ''}{front}√{b}",
                rf"\frac{{{a * b}}}{{\sqrt{{{b}}}}}{tail}",
            ),
        )


def circles(rng: random.Random) -> Iterator[Meaning]:
    for n, (unit, size) in product(
        rng.sample(range(2, 60), 14), (("cm", 1), ("m", 100), ("mm", Fraction(1, 10)))
    ):
        value = n * size
        spelled = exact(
            rf"{n}\pi\text{{ {unit}}}",
            rf"{n} \pi \text{{ {unit}}}",
            rf"\frac{{{2 * n}\pi}}{{2}}\text{{ {unit}}}",
        )
        yield Meaning(("π", Fraction(value)), spelled)


def polynomials(rng: random.Random) -> Iterator[Meaning]:
    for a, b in rng.sample(list(combinations([n for n in range(-7, 8) if n], 2)), 40):
        total, times = -(a + b), a * b
        middle = "" if not total else f"{total:+d}x"
        yield Meaning(
            (a, b),
            exact(
                f"x^2{middle}{times:+d}",
                f"(x{-a:+d})(x{-b:+d})",
                f"{times}{middle}+x^2",
                f"x(x{total:+d}){times:+d}" if total else None,
            ),
        )


def rationals(rng: random.Random) -> Iterator[Meaning]:
    for a, b in rng.sample([(a, b) for a, b in product(range(1, 9), repeat=2) if a != b], 40):
        yield Meaning(
            (a, b),
            exact(
                rf"\frac{{x+{a}}}{{x+{b}}}",
                f"(x+{a})/(x+{b})",
                rf"1+\frac{{{a - b}}}{{x+{b}}}",
                rf"\frac{{2x+{2 * a}}}{{2x+{2 * b}}}",
            ),
        )


def lines(rng: random.Random) -> Iterator[Meaning]:
    for m, c in rng.sample(list(product(range(2, 9), range(1, 9))), 40):
        yield Meaning(
            (m, c),
            exact(
                f"y = {m}x + {c}",
                f"y={m}x+{c}",
                f"{m}x - y + {c} = 0",
                f"2y = {2 * m}x + {2 * c}",
                f"{m}x+{c}=y",
            ),
        )


def tuples(rng: random.Random) -> Iterator[Meaning]:
    for a, b, c in rng.sample(list(permutations(range(1, 7), 3)), 40):
        yield Meaning(
            (a, b, c),
            exact(
                f"({a}, {b}, {c})",
                rf"\left({a},{b},{c}\right)",
                rf"\langle {a}, {b}, {c} \rangle",
                f"x={a}, y={b}, z={c}",
                f"(x,y,z)=({a},{b},{c})",
            ),
        )


def sets(rng: random.Random) -> Iterator[Meaning]:
    for a, b, c in rng.sample(list(combinations(range(-6, 9), 3)), 40):
        yield Meaning(
            (a, b, c),
            exact(
                rf"\{{{a}, {b}, {c}\}}",
                f"{a}, {b}, {c}",
                f"{c}, {a}, {b}",
                rf"{a}, {b} \text{{ and }} {c}",
                f"x = {a}, x = {b}, x = {c}",
            ),
        )


def matrices(rng: random.Random) -> Iterator[Meaning]:
    for a, b, c, d in rng.sample(list(permutations(range(1, 7), 4)), 30):
        yield Meaning(
            (a, b, c, d),
            exact(
                rf"\begin{{pmatrix}} {a} & {b} \\ {c} & {d} \end{{pmatrix}}",
                rf"\pmatrix{{{a}&{b}\\{c}&{d}}}",
                rf"\begin{{bmatrix}}{a}&{b}\\{c}&{d}\end{{bmatrix}}",
                f"[[{a}, {b}], [{c}, {d}]]",
            ),
        )
        yield Meaning(
            (a, b, c, d, "column"), exact(rf"\begin{{pmatrix}} {a} \\ {b} \\ {c} \\ {d} \end{{pmatrix}}")
        )
        yield Meaning((a, b, c, d, "row"), exact(rf"\begin{{pmatrix}} {a} & {b} & {c} & {d} \end{{pmatrix}}"))


def systems(rng: random.Random) -> Iterator[Meaning]:
    for a, b in rng.sample(list(permutations(range(-4, 9), 2)), 40):
        yield Meaning(
            (a, b),
            exact(
                f"x={a}, y={b}",
                rf"\begin{{cases}} x={a} \\ y={b} \end{{cases}}",
                f"({a}, {b})",
                f"y={b}, x={a}",
                rf"\left\{{\begin{{array}}{{l}}x={a}\\y={b}\end{{array}}\right.",
            ),
        )


def scientific(rng: random.Random) -> Iterator[Meaning]:
    for digits, power in product(rng.sample(range(101, 999), 10), (-9, -4, 5, 12)):
        mantissa = f"{digits // 100}.{digits % 100:02d}"
        value = Fraction(digits, 100) * Fraction(10) ** power
        yield Meaning(
            (digits, power),
            exact(
                rf"{mantissa} \times 10^{{{power}}}",
                f"{mantissa}e{power}",
                rf"{mantissa} \cdot 10^{{{power}}}",
                f"{value}" if power > 0 else tex(value),
            ),
        )


def tiny(rng: random.Random) -> Iterator[Meaning]:
    for base, power in product((2, 3, 7), rng.sample(range(40, 130), 8)):
        yield Meaning(
            (base, power),
            exact(
                rf"\frac{{1}}{{{base}^{{{power}}}}}",
                rf"{base}^{{-{power}}}",
                rf"\frac{{{base}}}{{{base}^{{{power + 1}}}}}",
            ),
        )
        yield Meaning(
            (base, power, 1), exact(rf"1-\frac{{1}}{{{base}^{{{power}}}}}", rf"1-{base}^{{-{power}}}")
        )
    for n in range(17, 27):
        yield Meaning((n, "!"), exact(rf"\frac{{1}}{{{n}!}}", rf"\frac{{{n + 1}}}{{{n + 1}!}}"))


def bases(rng: random.Random) -> Iterator[Meaning]:
    for n, base in product(rng.sample(range(30, 200), 12), (2, 3, 5, 8)):
        digits, rest = "", n
        while rest:
            digits, rest = str(rest % base) + digits, rest // base
        yield Meaning(
            (n, base),
            exact(
                f"{digits}_{base}",
                f"{digits}_{{{base}}}",
                rf"({digits})_{{{base}}}",
                rf"{digits}_{{\text{{{in_words(base)}}}}}",
            ),
        )


def symbols(rng: random.Random) -> Iterator[Meaning]:
    letters = [
        "x",
        "X",
        "n",
        "N",
        "k",
        "K",
        r"\sigma",
        r"\Sigma",
        r"\omega",
        r"\Omega",
        r"\phi",
        r"\Phi",
        "ab",
        "AB",
        "aB",
        "st",
    ]
    for letter, n in product(letters, (1, 2, 5)):
        front = "" if n == 1 else str(n)
        yield Meaning(
            (letter, n),
            exact(
                f"{front}{letter}",
                rf"{n} \cdot {letter}",
                f"{letter} + {n - 1}{letter}" if n > 1 else f"({letter})",
            ),
        )


def words(rng: random.Random) -> Iterator[Meaning]:
    for word in [
        "red",
        "blue",
        "green",
        "odd",
        "even",
        "Monday",
        "Friday",
        "ellipse",
        "hyperbola",
        "convergent",
        "divergent",
        "increasing",
        "decreasing",
        "Amy",
        "Tom",
    ]:
        yield Meaning(word, exact(word, rf"\text{{{word}}}", word.upper(), rf"\textbf{{{word}}}", f"{word}."))
    yield Meaning("none", exact("no solution", r"\emptyset", "the empty set", "No solutions", r"\{\}", "∅"))
    yield Meaning("dne", exact("does not exist", "DNE", r"\text{does not exist}", "doesn't exist"))
    yield Meaning("inf", exact(r"\infty", "infinity", "∞"))
    yield Meaning("-inf", exact(r"-\infty", "negative infinity", "-∞", "minus infinity"))


def truths(rng: random.Random) -> Iterator[Meaning]:
    reasons = ("", ".", ", because 3 > 2.", ": 5 divides 10.", "!", " since 2 = 2.", ", it is.")
    for word in ("Yes", "No", "True", "False"):
        said = (
            [f"{word}{r}" for r in reasons]
            + [f"Answer: {word}{r}" for r in reasons]
            + [f"So, {word.lower()}."]
        )
        yield Meaning(word, exact(word, *said))


def choices(rng: random.Random) -> Iterator[Meaning]:
    for letter in "ABCDE":
        others = "ABCDE".replace(letter, "")
        yield Meaning(
            letter,
            exact(
                letter,
                f"({letter})",
                f"{letter}.",
                f"**{letter}**",
                f"The answer is {letter}.",
                f"Option {letter} is correct.",
                f"I would pick ({letter}).",
                f"{letter}, not {others[0]}.",
                f"Not {others[1]}, so {letter}.",
                f"{letter}\nBecause it fits.",
            ),
            kind="choice",
        )
    for several in ("AB", "AC", "BC", "ABC", "BD", "ABD", "CDE"):
        yield Meaning(
            several,
            exact(several, ", ".join(several), " and ".join(several), ",".join(f"({c})" for c in several)),
            kind="choice",
        )


def phrases(rng: random.Random) -> Iterator[Meaning]:
    for n in (18, 36, 7):
        yield Meaning(
            n,
            exact(
                str(n),
                f"The answer is {n}.",
                f"The answer is {n}, because it is less than 50.",
                f"exactly {n}",
            ),
        )
        for before in (
            "at least",
            "at most",
            "more than",
            "less than",
            "half of",
            "the square of",
            "minus",
            "nearly",
        ):
            yield Meaning((before, n), exact(f"The answer is {before} {n}.", f"{before} {n}"))
        for after in ("million", "hundred", "squared", "or more", "to 5", "cubed"):
            yield Meaning((n, after), exact(f"The answer is {n} {after}."))


def symmetric(rng: random.Random) -> Iterator[Meaning]:
    for a, b in rng.sample(list(product(range(1, 9), (2, 3, 5, 7))), 24):
        yield Meaning(
            (a, b),
            exact(
                rf"{a} \pm \sqrt{{{b}}}", rf"{a}+\sqrt{{{b}}}, {a}-\sqrt{{{b}}}", rf"x = {a} \pm \sqrt{{{b}}}"
            ),
        )


def logarithms(rng: random.Random) -> Iterator[Meaning]:
    for a, n in product((2, 3, 5, 7), (1, 2, 3)):
        power = "" if n == 1 else str(n)
        yield Meaning(
            (a, n), exact(rf"{power}\ln x + \ln {a}", rf"\ln({a}x^{{{n}}})", rf"\ln {a} + {power}\ln x")
        )


def sides(rng: random.Random) -> Iterator[Meaning]:
    formulas = ("x^2-1", r"\sin x", "a+b", "2^x", "3x", r"\frac{x+5}{11}")
    for n, formula in product((0, 1, 5, 6), formulas):
        yield Meaning((n, formula), exact(f"{n} = {formula}", f"{formula} = {n}"))
    for formula in formulas:
        yield Meaning(formula, exact(formula))
    for n in (0, 1, 5, 6):
        yield Meaning(n, exact(str(n)))


FAMILIES: tuple[Callable[[random.Random], Iterator[Meaning]], ...] = (
    integers,
    fractions,
    percents,
    lengths,
    areas,
    masses,
    pressures,
    speeds,
    durations,
    feet,
    money,
    angles,
    temperatures,
    times,
    dates,
    ratios,
    intervals,
    rays,
    complements,
    complexes,
    surds,
    circles,
    polynomials,
    rationals,
    lines,
    tuples,
    sets,
    matrices,
    systems,
    scientific,
    tiny,
    bases,
    symbols,
    words,
    truths,
    choices,
    phrases,
    symmetric,
    logarithms,
    sides,
)


@dataclass(frozen=True)
class Case:
    family: str
    gold: str
    text: str
    kind: str
    same: bool


def cases(seed: int, each: int) -> list[Case]:
    """Return ``each`` pairs of different meanings, and as many of one meaning, of every family. Half of the
    different ones are neighbors in their family."""
    made = []
    for family in FAMILIES:
        rng = random.Random(f"{family.__name__} {seed}")
        meanings = [m for m in {m.key: m for m in family(rng)}.values() if m.spellings]
        for index in range(each):
            place = rng.randrange(len(meanings))
            step = rng.randint(1, 3) if index % 2 else rng.randrange(1, len(meanings))
            one, other = meanings[place], meanings[(place + step) % len(meanings)]
            gold = rng.choice(one.spellings[:3] if family not in (choices, truths) else one.spellings[:1])
            for text, same in (
                (rng.choice(other.spellings), other is one),
                (rng.choice(one.spellings), True),
            ):
                bare = one.kind == "choice" or "\n" in text or "nswer" in text or family.__name__ == "truths"
                made.append(
                    Case(family.__name__, gold, text if bare else rf"\boxed{{{text}}}", one.kind, same)
                )
    return list(dict.fromkeys(made))
