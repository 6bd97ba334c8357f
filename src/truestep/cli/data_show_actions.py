"""The action of ``truestep data show``, imported only if it runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truestep.cli.data_actions import of_file, require_no_columns
from truestep.cli.output import PlainConsole, echo
from truestep.cli.progress import announce
from truestep.data.describe import TRAINED_ON, describe, needs_of, not_used, read_as, use_of
from truestep.data.problems import load_problems
from truestep.errors import UserError, verb
from truestep.errors import count as counted
from truestep.records import Message, Problem
from truestep.settings import Settings, load_settings, parse

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase


def show(
    source: str, overrides: Sequence[str], columns: Sequence[str], model: str, *, num: int, data: str | None,
    row: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Print the first examples of every data set as the model sees them. A solution is shown only if a stage trains
    on it or measures its validation loss on it. A file without a model is shown as texts."""
    announce(f"truestep data show: reading {source}")
    from rich.text import Text

    settings, sets, needs = _sets(source, overrides, columns, model)
    if data is not None and data not in sets:
        raise UserError(f"--data {data}: expected one of {', '.join(sets)}")
    sets = sets if data is None else {data: sets[data]}
    chosen = {name: [p for p in of if row is None or p.row.endswith(f":{row}")] for name, of in sets.items()}
    if not any(chosen.values()):
        raise UserError(f"--row {row}: {', '.join(sets)} has no row with this number")
    make = _maker(settings) if settings else _texts
    console = PlainConsole(soft_wrap=True)
    documents = []
    for name, problems in sets.items():
        wanted = needs.get(name, set())
        described = describe(problems, wanted)
        use = use_of(settings, name) if settings else TRAINED_ON
        has_solutions = not wanted or "solution" in wanted
        for said in () if as_json else (*read_as(described), *not_used(described, use, wanted)):
            console.print(f"{name}: {said}", markup=False)
        for problem in chosen[name][:num]:
            problem = problem if has_solutions else replace(problem, solution="", dialogue=())
            for spans, document in make(problem):
                documents.append({"data": name, "layout": problem.layout, **document})
                if as_json:
                    continue
                title = f"{name} {problem.id} ({problem.row})"
                if "num_tokens" in document:
                    num_trained, total = document["num_trained"], document["num_tokens"]
                    counts = f"{counted(num_trained, 'token', total)} {verb(num_trained, 'are')} {use}"
                    prompt = f"a prompt of {counted(total, 'token')}"
                    title += f": {counts if has_solutions else prompt}"
                answer = f"; answer {problem.answer}" if problem.answer else ""
                console.print(Text(title + answer, "bold"))
                console.print(spans, end="\n\n")
    if as_json:
        echo(json.dumps({"examples": documents}))


Example = tuple["Text", dict[str, Any]]


def _sets(
    source: str, overrides: Sequence[str], columns: Sequence[str], model: str
) -> tuple[Settings | None, dict[str, list[Problem]], Mapping[str, Collection[str]]]:
    """Return the settings (None for a file without a model), the data sets, and what their rows need."""
    if source.endswith(".toml"):
        if model:
            raise UserError(
                "--model is for data files; a recipe has a model, which --set model.path=... changes"
            )
        require_no_columns(source, columns)
        settings, base_dir = load_settings(source, overrides), Path(source).parent
        needs = needs_of(settings, _guided(settings, base_dir))
        return settings, _load_sets(settings, base_dir, needs), needs
    name, data = of_file(source, overrides, columns)
    sets = {name: load_problems(name, data, seed=0, base_dir=Path(), needs=())}
    if not model:
        return None, sets, {}
    table = {"name": "show", "model": {"path": model}, "data": {}, "stages": []}
    return parse(Settings, table, where="--model"), sets, {}


def _maker(settings: Settings) -> Callable[[Problem], Iterator[Example]]:
    from truestep.data.templates import choose_template
    from truestep.model.load import load_tokenizer
    from truestep.pipeline.prepare import context_and_eos

    tokenizer, (context, _) = load_tokenizer(settings.model), context_and_eos(settings)
    choose_template(tokenizer, settings.chat.template, settings.model.path)
    return partial(_example, tokenizer, settings=settings, context=context)


def _texts(problem: Problem) -> Iterator[Example]:
    """Yield one row as its turns, of which those between ⟦ and ⟧ are trained on."""
    from rich.text import Text

    solution = (Message(role="assistant", content=problem.solution),) if problem.solution else ()
    turns = problem.dialogue or (*(replace(m, is_trained=False) for m in problem.messages), *solution)
    spans = [
        {"role": m.role, "trained": m.role == "assistant" and m.is_trained, "text": m.content} for m in turns
    ]
    spans += [{"role": "text", "trained": True, "text": problem.text}] if problem.text else []
    text = Text("\n").join(
        Text(f"{span['role']}: ", "dim").append(
            f"⟦{span['text']}⟧" if span["trained"] else str(span["text"]),
            "bold green" if span["trained"] else "",
        )
        for span in spans
    )
    yield text, {"id": problem.id, "spans": spans}


def _load_sets(
    settings: Settings, base_dir: Path, needs: Mapping[str, Collection[str]]
) -> dict[str, list[Problem]]:
    return {
        name: load_problems(name, data, seed=settings.seed, base_dir=base_dir, needs=needs[name])
        for name, data in settings.data.items()
    }


def _guided(settings: Settings, base_dir: Path) -> list[str]:
    """Return the data sets whose solutions a stage that samples trains on."""
    from truestep.pipeline.prepare import method_of

    sampled = [s for s in settings.stages if s.kind == "rl" and method_of(s, base_dir).needs_demonstrations]
    return [name for stage in sampled for name in stage.guided]


def _example(
    tokenizer: PreTrainedTokenizerBase, problem: Problem, settings: Settings, context: int
) -> Iterator[Example]:
    """Yield one row's sequences as colored text and, for JSON, as counts and spans of tokens of the same kind."""
    from rich.text import Text

    from truestep.data.chat import encode_prompt, prompt_roles
    from truestep.data.demonstrations import encode_row
    from truestep.records import Origin, Role

    styles = {
        Role.SYSTEM: "magenta", Role.USER: "cyan", Role.ASSISTANT: "yellow", Role.TEMPLATE: "dim", Role.TOOL: "blue",
    }  # fmt: skip
    sequences: list[tuple[Sequence[int], Sequence[bool]]] = []
    if problem.solution or problem.text or problem.dialogue:
        for made in encode_row(tokenizer, problem, settings.chat, context):
            sequences.append((made.token_ids, [o is Origin.EXPERT for o in made.origin]))
    else:
        prompt = encode_prompt(tokenizer, problem, settings.chat).token_ids
        sequences.append((prompt, [False] * len(prompt)))
    for ids, trained in sequences:
        roles = [Role.ASSISTANT] * len(ids)
        if not problem.text:
            known = prompt_roles(tokenizer, problem, settings.chat)
            # Of several sequences of a dialogue, only the last one has the problem's prompt.
            end = next((i for i in reversed(range(len(ids))) if not trained[i]), -1) + 1
            roles[:end] = known if len(known) == end else [Role.TEMPLATE] * end
        spans = []
        grouped = groupby(zip(ids, roles, trained, strict=True), key=itemgetter(1, 2))
        for (role, is_trained), group in grouped:
            words = str(
                tokenizer.decode([token for token, _, _ in group], clean_up_tokenization_spaces=False)
            )
            spans.append({"role": role.name.lower(), "trained": is_trained, "text": words})
        text = Text()
        for is_trained, marked in groupby(spans, key=itemgetter("trained")):
            if is_trained:
                text.append(f"⟦{''.join(span['text'] for span in marked)}⟧", style="bold green")
            else:
                for span in marked:
                    text.append(span["text"], style=styles[Role[span["role"].upper()]])
        document = {"id": problem.id, "num_tokens": len(ids), "num_trained": sum(trained), "spans": spans}
        yield text, document
