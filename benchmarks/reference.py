"""Write docs/reference/ from the code: settings, rows and files, methods, commands and the Python interface.

    python benchmarks/reference.py [--check]

With ``--check``, no file is written, and the exit code is 1 if a page is out of date. A key, an option or a field
without a meaning or an example is an error, and so is an example that truestep does not accept.
Held by: tests/unit/test_reference_pages.py
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer

sys.path.insert(0, str(Path(__file__).parent))

import pages
import reference_rows
from reference_rows import Incomplete, page, prose, table
from reference_settings import settings_page

from truestep import api
from truestep.cli.evaluation import with_default
from truestep.cli.main import _app
from truestep.explained import texts, toml
from truestep.objective import advantage, coefficients, gate
from truestep.objective.methods import METHODS, fits_older_samples, mixed
from truestep.objective.methods.row import EXPERT, POLICY, STORED, Extras, Method, Term
from truestep.objective.normalise import Normaliser

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs/reference"
USAGE_ERROR = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def sentence(text: str | None) -> str:
    """Return the first sentence of a docstring."""
    return re.split(r"(?<=[^.][.])\s+(?=[A-Z])", prose(text), maxsplit=1)[0]


# ---------------------------------------------------------------------------------------------------------- methods

NORMALISERS = {
    Normaliser.TOKENS: "the number of tokens",
    Normaliser.SEQUENCES: "each sequence's length, and the number of sequences",
    Normaliser.SEQUENCE_SUMS: "the number of sequences",
    Normaliser.MAX_LENGTH: "the number of sequences times the length limit",
}
SELECTED = {POLICY: "the policy's samples", EXPERT: "demonstrations", STORED: "stored samples"}
PARTS = {
    "Refill": "dropped groups are replaced by groups of other prompts",
    "Overlong": "a penalty on samples close to the length limit",
    "Stream": "further demonstrations beside the groups",
    "DemonstrationBuffer": "a buffer of demonstrations with a separate optimizer",
    "Replay": "a store of solved samples",
    "Refresh": "several updates of a step share one proximal policy",
    "Controller": "a controller that sets values of each step",
}


def function_of(made: Any, module: Any) -> tuple[str, str]:
    """Return the name and the docstring of the module's function that made a value."""
    named = {id(value): name for name, value in vars(module).items() if callable(value)}
    if id(made) in named:
        return named[id(made)], getattr(made, "__doc__", "") or ""
    outer = getattr(module, made.__qualname__.partition(".")[0], None)
    inside = [cell.cell_contents for cell in made.__closure__ or () if callable(cell.cell_contents)]
    for inner in inside:
        if inner.__module__ == module.__name__ and inner.__qualname__ in vars(module):
            return inner.__qualname__, inner.__doc__ or ""
    for inner in reversed(inside):
        name, text = function_of(inner, module)
        if text:
            return name, text
    return (outer.__name__, outer.__doc__ or "") if outer is not None else ("", "")


def _term(term: Term) -> list[str]:
    if term.coefficient is None:
        formula = "a function of log π and the entropy"
    else:
        formula = _formula(term.coefficient)
    first, last = term.weight(0), term.weight(10**6)
    weight = f"{first:g}" if first == last else f"{first:g}, later {last:g}"
    total = NORMALISERS[term.normaliser] + (", of all trained sequences" if term.counted else "")
    weight = f"{weight}, times a value of the controller" if term.control else weight
    return [f"`{term.name}`", SELECTED[term.select], formula, weight, total]


def _formula(coefficient: Any) -> str:
    name, text = function_of(coefficient, coefficients)
    if name == "where_uncertain":
        options = [
            cell.cell_contents for cell in coefficient.__closure__ if isinstance(cell.cell_contents, tuple)
        ]
        inner = next(given for several in options for given in several if callable(given))
        return f"{_formula(inner)}; 0 if the token's entropy is below a statistic of the step"
    return sentence(text).removeprefix("Return ").rstrip(".")


def _advantage(method: Method) -> str:
    name, text = function_of(method.advantage, advantage)
    if name == "own_mean_std" or name == "own_mean":
        inner = advantage.group_mean if name == "own_mean" else advantage.group_mean_std
        text = f"{sentence(inner.__doc__).partition(' over all members')[0].rstrip('.')}, over only the policy's samples"
    return f"`{name}`: {sentence(text).removeprefix('Return ').rstrip('.')}"


def _method(name: str, make: Callable[..., Method]) -> list[str]:
    method, options = make(), inspect.signature(make).parameters.values()
    lines = [f"* Source: {prose(method.source)}"]
    if method.plan is not None:
        gate_name, gate_text = function_of(method.gate, gate)
        kept = prose(gate_text.partition("Source:")[0]).removeprefix("Return a gate that ")
        lines += [
            f"* Plan: {method.plan.words}",
            f"* Gate: `{gate_name}`: {kept[0].lower()}{kept[1:].rstrip('.')}",
        ]
        lines += [f"* Advantage: {_advantage(method)}"]
    lines += [f"* Also: {PARTS[type(part).__name__]}" for part in method.parts]
    changed = [
        f"`{key} = {toml(value)}`"
        for key, value in vars(method.extras).items()
        if value != getattr(Extras(), key)
    ]
    lines += [f"* Options of every sampling method with other defaults: {', '.join(changed)}"] * bool(changed)
    said = [f"`{option.name} = {toml(option.default)}`" for option in options]
    lines += [f"* Options: {', '.join(said) or 'none'}"]
    if not (make.__doc__ and method.source and (method.plan is None or method.plan.words)):
        raise Incomplete(f"method {name}: write its docstring, its source and the words of its plan")
    terms = table(
        ("term", "trained on", "coefficient C", "weight", "divided by"),
        [_term(term) for term in method.terms],
    )
    return [f"### `{name}`", prose(make.__doc__), "\n".join(lines), terms]


def methods_page() -> str:
    made = {name: make() for name, make in METHODS.items()}
    kinds = {name: "sft" if one.plan is None else "rl" for name, one in made.items()}
    rows = [
        (f"`{name}`", kinds[name], "yes" if one.plan is None or one.needs_demonstrations else "no",
         "yes" if fits_older_samples(name) else "no", prose(one.source))
        for name, one in made.items()
    ]  # fmt: skip
    extra = [(f"`{key}`", f"`{toml(getattr(Extras(), key))}`", texts(Extras)[key]) for key in vars(Extras())]
    parts = [
        'A stage names its method as `method = "NAME"` and sets options as `method_options = { KEY = VALUE }`. The loss of '
        "a term is its weight times −C·log π, summed over the tokens that it is trained on and divided once, by a total of "
        "the whole step. "
        "r is the ratio of the policy's probability to the proximal one, p the policy's probability, A the advantage and R "
        "the reward. [methods.md](../methods.md) explains how to write one, and [objective.md](../objective.md) the loss.",
        "The letters in brackets say where a constant comes from: [C] read in the official code, [P] in the paper, [S] in "
        "a secondary source, [U] not verified.",
        table(("method", "kind", "needs demonstrations", "rollout_ahead", "source"), rows),
        "`rollout_ahead`: whether the method, with a correction, can train on samples of older weights.",
        f"`legacy_scale` and `legacy_microbatches`: {prose(str(mixed.__doc__).split(chr(10) * 2)[1])}",
        "## Options of every method that samples",
        table(("option", "default", "meaning"), extra),
    ]
    for kind, title in (("sft", "Methods that train on demonstrations"), ("rl", "Methods that sample")):
        parts += [
            f"## {title}",
            *(p for name in METHODS if kinds[name] == kind for p in _method(name, METHODS[name])),
        ]
    return page("Methods", *parts)


# --------------------------------------------------------------------------------------------------------- commands


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every command with its words."""
    group = group or typer.main.get_command(_app())
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def check_command(path: Sequence[str], command: Any) -> str:
    """Return a command's example. Raises Incomplete if there is none, or if the command does not accept it."""
    example = (command.epilog or "").removeprefix("Example: ")
    words = with_default(example.split()[1:])
    if words[: len(path)] != list(path):
        raise Incomplete(f"truestep {' '.join(path)}: write an example in EXAMPLES, got {example!r}")
    try:
        command.make_context(path[-1], words[len(path) :])
    except USAGE_ERROR as error:
        raise Incomplete(f"{example}: {error}") from None
    return example


def _parameter(one: Any, hint: Any) -> list[str]:
    """Return a row of the table: names, type with default, meaning. ``hint`` is the annotation of the function."""
    kinds = {bool: "flag", int: "integer", float: "number", Path: "path"}
    parts = [
        part
        for inner in get_args(hint)
        for part in (inner, *get_args(inner), *map(get_args, get_args(inner)))
    ]
    word = next((kinds[k] for k in kinds if k in parts or (k,) in parts), "text")
    limits = [f"{sign} {edge}" for sign in ("≥", "≤") for info in get_args(hint)
              if (edge := getattr(info, "min" if sign == "≥" else "max", None)) is not None]  # fmt: skip
    shown, default = one.show_default, one.default
    if one.required:
        said = "**required**"
    elif isinstance(shown, str):
        said = f"default: {shown}"
    elif default in (None, "", False, [], ()):
        said = "" if word == "flag" else "optional"
    else:
        said = f"default `{one.opts[0] if default is True else default}`"
    names = [*one.opts, *one.secondary_opts] if one.param_type_name == "option" else [argument(one)]
    kind = " ".join([word, " and ".join(limits)]).strip()
    return [", ".join(f"`{name}`" for name in names), "; ".join(filter(None, [kind, said])), prose(one.help)]


def argument(one: Any) -> str:
    name = str(one.metavar or one.name.upper()).removesuffix("...") + ("..." if one.nargs == -1 else "")
    return name if one.required else f"[{name}]"


def commands_page() -> str:
    root = typer.main.get_command(_app())
    parts = [
        prose(root.help),
        prose(inspect.unwrap(root.callback).__doc__),
        "`truestep COMMAND --help` prints the same. Every command with `--json` prints one JSON document to stdout; "
        "progress goes to stderr.",
    ]
    for path, command in commands():
        example, shown = (
            check_command(path, command),
            "eval MODEL" if path == ("eval", "model") else " ".join(path),
        )
        params = [p for p in command.params if p.name != "help" and not getattr(p, "hidden", False)]
        usage = " ".join(argument(p) for p in params if p.param_type_name == "argument")
        hints = get_type_hints(inspect.unwrap(command.callback), include_extras=True)
        lines = ["truestep", shown.removesuffix(" MODEL"), "[OPTIONS]", usage]
        rows = [_parameter(p, hints[p.name]) for p in params]
        if gaps := [row[0] for row in rows if not row[2]]:
            raise Incomplete(f"truestep {shown}: no help for {gaps[0]}")
        paragraphs = [prose(text) for text in (command.help or "").split("\n\n")]
        parts += [f"## truestep {shown}", *paragraphs, f"```\n{' '.join(lines).strip()}\n{example}\n```"]
        parts += [table(("argument or option", "type and default", "meaning"), rows)]
    return page("Commands", *parts)


# ----------------------------------------------------------------------------------------------------------- Python


def _member(of: str, name: str, member: Any) -> tuple[str, str]:
    if isinstance(member, property):
        return f"`{of}.{name}`", prose(member.__doc__)
    given = ", ".join(p for p in inspect.signature(member).parameters if p != "self")
    return f"`{of}.{name}({given})`", prose(member.__doc__)


def python_page() -> str:
    parts = ["`import truestep` gives these names. Examples are in [how-to/python.md](../how-to/python.md)."]
    for name in api.NAMES:
        one = getattr(api, name)
        text, _, example = inspect.getdoc(one).partition(">>> ")
        signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(one)))
        parts += [f"## truestep.{name}", f"```python\ntruestep.{name}{signature}\n```"]
        parts += [prose(paragraph) for paragraph in text.split("\n\n") if paragraph.strip()]
        parts += [f"```python\n>>> {example}\n```"]
        if not (text.strip() and example):
            raise Incomplete(f"truestep.{name}: write a docstring with an example")
        if inspect.isclass(one):
            members = [
                (k, v)
                for k, v in vars(one).items()
                if not k.startswith("_") and (callable(v) or isinstance(v, property))
            ]
            rows = [_member(name.lower(), *member) for member in members]
            if gaps := [row[0] for row in rows if not row[1]]:
                raise Incomplete(f"{gaps[0]}: write a docstring")
            parts += [table(("member", "meaning"), rows)]
    return page("Python", *parts)


# ------------------------------------------------------------------------------------------------------------ files

INDEX = """| page | what it lists |
|---|---|
| [settings.md](settings.md) | every key of recipes and studies: type, default, meaning, example |
| [rows.md](rows.md) | the rows that are read (data, benchmarks), and the files that a run writes |
| [methods.md](methods.md) | the built-in methods: what is sampled, the advantage, the loss, the options |
| [commands.md](commands.md) | every command and option, with exit codes |
| [python.md](python.md) | the Python interface |
| [metrics](../metrics.md) | the keys of `metrics.jsonl` |
| [architectures.md](architectures.md) | kinds of models that were trained, on one and two ranks |

The how-to guides are in [docs/how-to](../how-to/training.md), and [docs/map.md](../map.md) lists the names and files."""


def files() -> dict[Path, str]:
    """Return every page with its content."""
    return {
        PAGES / "README.md": page("Reference", INDEX),
        PAGES / "settings.md": settings_page(),
        PAGES / "rows.md": page("Rows and files", *reference_rows.parts()),
        PAGES / "methods.md": methods_page(),
        PAGES / "commands.md": commands_page(),
        PAGES / "python.md": python_page(),
    }


if __name__ == "__main__":
    pages.write_or_check(__doc__, files)
