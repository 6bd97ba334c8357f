"""The actions of ``truestep data check`` and ``truestep data show``, imported only if one of them runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from truestep.cli.output import PlainConsole, echo
from truestep.cli.progress import announce
from truestep.data.describe import describe
from truestep.data.overlap import overlap_report
from truestep.data.problems import load_problems
from truestep.errors import UserError
from truestep.records import Problem, Verdict, conserve
from truestep.settings import DataSettings, Settings, load_settings

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase


def check(source: str, overrides: Sequence[str], *, gold: bool, as_json: bool) -> None:
    """Validate every row of every data set and print the results. Exit with 1 if a gold answer is refused."""
    announce(f"truestep data check: reading {source}")

    if source.endswith(".toml"):
        settings = load_settings(source, overrides)
        sets = _load_sets(settings, Path(source).parent)
        judged = [*settings.evaluate.data, *(s.dev.data for s in settings.stages if s.dev.data)]
        trained = {s.data: sets[s.data] for s in settings.stages}
        report = overlap_report(trained, {name: sets[name] for name in judged})
    else:
        if overrides:
            raise UserError(f"--set applies only to recipes, but {source} is a data file; remove --set")
        name, data = Path(source).stem, DataSettings(source=source)
        sets = {name: load_problems(name, data, seed=0, base_dir=Path(), needs=())}
        report = overlap_report({}, {})
    described = {name: describe(problems) for name, problems in sets.items()}
    if gold:
        for name, problems in sets.items():
            described[name]["gold"] = _judge_golds(problems)
    num_refused = sum(len(d.get("gold", {}).get("refused", ())) for d in described.values())
    if as_json:
        document = {"data": described, "overlap": report["pairs"], "num_refused_golds": num_refused}
        echo(json.dumps(document))
    else:
        _print_check(PlainConsole(soft_wrap=True), described, report["pairs"])
    if num_refused:
        raise typer.Exit(1)


def show(recipe: str, overrides: Sequence[str], *, num: int, as_json: bool) -> None:
    """Print the first examples of every data set as the model sees them."""
    announce(f"truestep data show: loading the tokenizer and the data of {recipe}")
    from rich.text import Text

    from truestep.model.load import load_tokenizer

    if not recipe.endswith(".toml"):
        raise UserError(f"{recipe} is not a recipe (.toml); pass a recipe, which names the tokenizer")
    settings = load_settings(recipe, overrides)
    tokenizer = load_tokenizer(settings.model)
    console = PlainConsole(soft_wrap=True)
    documents = []
    for name, problems in _load_sets(settings, Path(recipe).parent).items():
        for problem in problems[:num]:
            spans, document = _example(tokenizer, problem, settings)
            documents.append({"data": name, **document})
            if not as_json:
                counts = f"{document['num_trained']} of {document['num_tokens']} tokens are trained on"
                title = f"{name} {problem.id} ({problem.row}): {counts}; answer {problem.answer}"
                console.print(Text(title, "bold"))
                console.print(spans, end="\n\n")
    if as_json:
        echo(json.dumps({"examples": documents}))


def _load_sets(settings: Settings, base_dir: Path) -> dict[str, list[Problem]]:
    return {
        name: load_problems(name, data, seed=settings.seed, base_dir=base_dir, needs=_needs(settings, name))
        for name, data in settings.data.items()
    }


def _needs(settings: Settings, name: str) -> set[str]:
    """Return what every row of a data set needs: a solution for SFT, an answer for all other uses."""
    needs = {"solution" if s.kind == "sft" else "answer" for s in settings.stages if s.data == name}
    judged = {*settings.evaluate.data, *(s.dev.data for s in settings.stages)}
    return needs | ({"answer"} if name in judged else set())


def _judge_golds(problems: Sequence[Problem]) -> dict[str, Any]:
    """Grade every gold answer with its checker. If one is refused, correct samples would get no credit."""
    from rich.progress import track

    from truestep.grade.score import Grader

    answered = [p for p in problems if p.answer]
    with Grader() as grader:
        progress = track(answered, "golds", console=PlainConsole(stderr=True), transient=True)
        scores = [grader.check_gold(problem) for problem in progress]
    refused = [
        {"id": p.id, "row": p.row, "answer": p.answer, "verdict": s.label, "reason": s.reason}
        for p, s in zip(answered, scores, strict=True)
        if s.verdict is not Verdict.CORRECT
    ]
    return {**conserve(scores), "refused": refused}


def _print_check(console: Any, described: dict[str, dict[str, Any]], pairs: Sequence[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table("data", "rows", "answers", "solutions", "repeated", "characters", "refused", box=None)
    for name, d in described.items():
        lengths = [d[key] for key in ("problem_characters", "solution_characters") if d[key]]
        refused = str(len(d["gold"]["refused"])) if "gold" in d else "not judged"
        counts = [str(d[f"num_{key}"]) for key in ("problems", "answers", "solutions", "duplicate_texts")]
        characters = " + ".join(f"{found['min']}-{found['max']}" for found in lengths)
        table.add_row(name, *counts, characters, refused)
    console.print(table)
    for name, d in described.items():
        if d["num_contradictory_texts"]:
            rows = " and ".join(d["duplicate_examples"][0])
            count = f"problem texts with different answers: {d['num_contradictory_texts']}"
            console.print(f"{name}: {count}, e.g. {rows}", markup=False)
        for gold in d.get("gold", {}).get("refused", ())[:10]:
            words = f"{gold['verdict']} {gold['reason']}".strip()
            console.print(f"{name}: {gold['row']}: answer {gold['answer']!r} is {words}", markup=False)
    for pair in pairs:
        console.print(
            f"overlap of {pair['train']} with {pair['evaluation']}: of {pair['num_evaluation']} problems, "
            f"{pair['exact']['num_evaluation']} have the same text, {pair['ngram']['num_evaluation']} share 13 words in a row",
            markup=False,
        )


def _example(
    tokenizer: PreTrainedTokenizerBase, problem: Problem, settings: Settings
) -> tuple[Text, dict[str, Any]]:
    """Return one problem as colored text and, for JSON, as counts and spans of tokens of the same kind."""
    from rich.text import Text

    from truestep.data.chat import encode_demonstration, encode_prompt, prompt_roles
    from truestep.records import Demonstration, Prompt, Role

    encoded: Demonstration | Prompt = (
        encode_demonstration(tokenizer, problem, settings.chat)
        if problem.solution
        else encode_prompt(tokenizer, problem, settings.chat)
    )
    ids, roles = encoded.token_ids, prompt_roles(tokenizer, problem, settings.chat)
    own = len(ids) - len(roles)
    trained, roles = (False,) * len(roles) + (True,) * own, roles + (Role.ASSISTANT,) * own
    styles = {Role.SYSTEM: "magenta", Role.USER: "cyan", Role.ASSISTANT: "yellow", Role.TEMPLATE: "dim"}
    text, spans = Text(), []
    for (role, is_trained), group in groupby(zip(ids, roles, trained, strict=True), key=itemgetter(1, 2)):
        words = str(tokenizer.decode([token for token, _, _ in group], clean_up_tokenization_spaces=False))
        text.append(f"⟦{words}⟧" if is_trained else words, style="bold green" if is_trained else styles[role])
        spans.append({"role": role.name.lower(), "trained": is_trained, "text": words})
    return text, {"id": problem.id, "num_tokens": len(ids), "num_trained": sum(trained), "spans": spans}
