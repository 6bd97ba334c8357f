"""Find the small changes of Python source from which ``benchmarks/mutate.py`` draws its mutants.

A change replaces an operator, a constant, a function name (one of a few), a condition, a returned value, a
keyword argument or a whole statement. Annotations, imports, docstrings, prose, the text of errors,
decorators, and keyword arguments that only guard against wrong calls (``strict``, ``encoding``) are not
changed.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any

GUARDS = ("strict", "encoding")
SWAPS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is": "is not", "is not": "is", "in": "not in",
    "not in": "in", "+": "-", "-": "+", "*": "/", "/": "*", "//": "/", "%": "*", "**": "*", "|": "&", "&": "|",
    "and": "or", "or": "and",
}  # fmt: skip
NAMES = {
    "min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list", "abs": "float", "sum": "mean", "mean": "sum",
    "ceil": "floor", "floor": "ceil", "amax": "amin", "append": "extend", "prod": "sum", "cumsum": "cumprod",
}  # fmt: skip
SYMBOLS = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.Is: "is",
    ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in", ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/",
    ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**", ast.BitOr: "|", ast.BitAnd: "&", ast.And: "and", ast.Or: "or",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """The bytes ``start … end`` of a file become ``now``. ``reach`` has the lines that run if the mutant runs."""

    file: str
    line: int
    start: int
    end: int
    was: str
    now: str
    operator: str
    reach: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line}:{self.start}:{self.operator}:{self.now}"


class Sites(ast.NodeVisitor):
    """Collects all mutants of one file in ``found``."""

    def __init__(self, file: str, source: bytes) -> None:
        self.file, self.source = file, source
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.found: list[Mutant] = []
        self.reach = (1, 1)
        self.generic_visit(ast.parse(source))

    def span(self, node: Any) -> tuple[int, int]:
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[
            node.end_lineno - 1
        ] + node.end_col_offset

    def add(self, operator: str, start: int, end: int, now: str) -> None:
        was = self.source[start:end].decode()
        now += "\n" * (was.count("\n") - now.count("\n"))  # later lines keep their numbers
        line = self.source[:start].count(b"\n") + 1
        self.found.append(
            Mutant(
                file=self.file,
                line=line,
                start=start,
                end=end,
                was=was,
                now=now,
                operator=operator,
                reach=self.reach,
            )
        )

    def between(self, kind: Any, left: Any, right: Any) -> None:
        """Add a mutant that swaps the operator between two operands."""
        symbol = SYMBOLS.get(type(kind), "")
        first, last = self.span(left)[1], self.span(right)[0]
        match = re.search(re.escape(symbol).replace(r"\ ", r"\s+"), self.source[first:last].decode())
        if symbol and match:
            self.add("operator", first + match.start(), first + match.end(), SWAPS[symbol])

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Raise | ast.JoinedStr | ast.Assert):
            return
        if isinstance(node, ast.keyword) and node.arg in GUARDS:
            return
        before = self.reach
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            self.reach = (node.lineno, body[0].lineno - 1 if body else node.end_lineno or node.lineno)
            self.reach = (self.reach[0], max(self.reach))
        mutate = getattr(self, f"on_{type(node).__name__}", None)
        if mutate:
            mutate(node)
        if isinstance(node, ast.FunctionDef):  # a default value matters when the body runs
            self.reach = (node.body[0].lineno, node.end_lineno or node.lineno)
        for field, value in ast.iter_fields(node):
            if field not in ("annotation", "returns", "decorator_list"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        self.visit(child)
        self.reach = before

    def on_Compare(self, node: ast.Compare) -> None:
        sides = [node.left, *node.comparators]
        for kind, left, right in zip(node.ops, sides, sides[1:], strict=False):
            self.between(kind, left, right)

    def on_BinOp(self, node: ast.BinOp) -> None:
        self.between(node.op, node.left, node.right)

    def on_BoolOp(self, node: ast.BoolOp) -> None:
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.between(node.op, left, right)

    def on_UnaryOp(self, node: ast.UnaryOp) -> None:
        self.add("unary", self.span(node)[0], self.span(node.operand)[0], "")

    def on_Constant(self, node: ast.Constant) -> None:
        value, (start, end) = node.value, self.span(node)
        if isinstance(value, bool):
            self.add("constant", start, end, str(not value))
        elif isinstance(value, int | float):
            self.add("constant", start, end, str(value + 1 if isinstance(value, int) else 2 * value or 1.0))
        elif isinstance(value, str) and value and " " not in value:
            self.add("string", start, end, repr("XX" + value))

    def on_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in NAMES:
            end = self.span(node.func)[1]
            self.add("name", end - len(name), end, NAMES[name])
        for keyword in (k for k in node.keywords if k.arg not in GUARDS):
            start, end = self.span(keyword)
            comma = re.match(rb"\s*,[ ]*", self.source[end:])
            self.add("keyword", start, end + (comma.end() if comma else 0), "")

    def on_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self.add("statement", *self.span(node), "pass")

    def on_AugAssign(self, node: ast.AugAssign) -> None:
        self.between(node.op, node.target, node.value)
        self.add("statement", *self.span(node), "pass")

    def on_Return(self, node: ast.Return) -> None:
        if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self.add("return", *self.span(node), "return None")

    def condition(self, test: ast.expr) -> None:
        start, end = self.span(test)
        self.add("condition", start, end, f"not ({self.source[start:end].decode()})")

    def on_If(self, node: Any) -> None:
        self.condition(node.test)

    on_IfExp = on_While = on_If

    def on_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self.condition(test)

    def on_Break(self, node: ast.Break) -> None:
        self.add("loop", *self.span(node), "continue")

    def on_Continue(self, node: ast.Continue) -> None:
        self.add("loop", *self.span(node), "break")


def mutated(source: bytes, mutant: Mutant) -> bytes:
    return source[: mutant.start] + mutant.now.encode() + source[mutant.end :]


def is_another_program(source: bytes, mutant: Mutant) -> bool:
    try:
        return ast.dump(ast.parse(mutated(source, mutant))) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False
