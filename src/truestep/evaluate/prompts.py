"""Prompt templates by name: the paper's, Qwen's, a plain one, a bare completion, and deliberately odd ones.

A score that changes between reasonable templates says as much about the template as about the model, so
``--prompts`` evaluates with several templates and reports the spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from truestep.errors import UserError
from truestep.records import Message, Problem

_PAPER = (  # the paper's figure 5, word for word
    "Your task is to follow a systematic, thorough reasoning process before providing the final "
    "solution. This involves analyzing, summarizing, exploring, reassessing, and refining your thought "
    "process through multiple iterations. Structure your response into two sections: Thought and "
    'Solution. In the Thought section, present your reasoning using the format: "<think>\\n {thoughts} '
    '</think>\\n". Each thought should include detailed analysis, brainstorming, verification, and '
    'refinement of ideas. After "</think>\\n," in the Solution section, provide the final, logical, and '
    "accurate answer, clearly derived from the exploration in the Thought section. If applicable, "
    "include the answer in \\boxed{} for closed-form results like multiple choices or mathematical "
    "solutions."
)
_BOX = "Please reason step by step, and put your final answer within \\boxed{}."
_LETTER = " The final answer is the letter of the right choice alone."


@dataclass(frozen=True, kw_only=True)
class Template:
    """A way to present a problem. ``suffix`` opens the model's turn and is treated as the model's own text.
    If ``chat`` is False, the prompt is text to continue, without a chat template, and a completion ends at
    the first ``stop``. If ``brief`` is True, each worked example has one step and one line."""

    id: str
    math: str
    choice: str
    system: str = ""
    choice_system: str = ""
    suffix: str = ""
    chat: bool = True
    stop: tuple[str, ...] = ()
    brief: bool = False
    odd: bool = False


TEMPLATES: tuple[Template, ...] = (
    Template(
        id="paper", system=_PAPER, choice_system=_PAPER, suffix="<think>\n",
        math="This is the problem:\n{problem}", choice="This is the problem:\n{problem}",
    ),
    Template(id="qwen", system=_BOX, choice_system=_BOX + _LETTER, math="{problem}", choice="{problem}"),
    Template(
        id="plain", math="{problem}\nEnd with a line that says: The answer is, and then the answer.",
        choice="{problem}\nEnd with a line that says: The answer is, and then the letter of your choice.",
    ),
    Template(
        id="completion", chat=False, stop=("\n\nQuestion:", "\nQuestion:", "\n\n"),
        math="Question: {problem}\nAnswer:", choice="Question: {problem}\nAnswer:",
    ),
    Template(
        id="brief", chat=False, stop=("\n",), brief=True,
        math="Question: {problem}\nAnswer:", choice="Question: {problem}\nAnswer:",
    ),
    Template(id="odd-bare", odd=True, math="{problem}", choice="{problem}"),
    Template(
        id="odd-shout", odd=True, math="ANSWER THIS NOW!!! {problem} ONLY \\boxed{} COUNTS!!!",
        choice="ANSWER THIS NOW!!! {problem}\nONLY THE LETTER IN \\boxed{} COUNTS!!!",
    ),
    Template(
        id="odd-after", odd=True,
        math="Answer in \\boxed{} what stands between the rules.\n-----\n{problem}\n-----",
        choice="Answer in \\boxed{} with a letter what stands between the rules.\n-----\n{problem}\n-----",
    ),
    Template(
        id="odd-polite", odd=True, system="You are a patient gardener who also likes riddles.",
        choice_system="You are a patient gardener who also likes riddles.",
        math="Good evening! If it is no trouble, my niece asks:\n\n{problem}\n\nThank you! In \\boxed{} please.",
        choice="Good evening! If it is no trouble, my niece asks:\n\n{problem}\n\nThank you! A letter in \\boxed{}.",
    ),
)  # fmt: skip
BY_ID = {t.id: t for t in TEMPLATES}

# Written for this project, so that no row of a benchmark is shown (question, worked answer).
_MATH_SHOTS = (
    ("A baker makes 12 rolls an hour for 4 hours and sells 30 of them. How many rolls are left?",
     "She makes 12 * 4 = 48 rolls. After selling 30, 48 - 30 = 18 are left. The answer is 18"),
    ("Omar has 5 boxes with 8 pens each. He gives 7 pens to his sister. How many pens does he have now?",
     "He has 5 * 8 = 40 pens. After giving away 7, he has 40 - 7 = 33. The answer is 33"),
    ("A bus has 36 seats. A third of them are empty. How many seats are taken?",
     "A third of 36 is 36 / 3 = 12 empty seats. So 36 - 12 = 24 are taken. The answer is 24"),
    ("Lena is 9 years old and her uncle is 4 times as old. How old will the uncle be in 5 years?",
     "The uncle is 4 * 9 = 36 years old. In 5 years he will be 36 + 5 = 41. The answer is 41"),
    ("A rope of 50 metres is cut into 3 pieces of 12 metres. How long is the rest?",
     "The pieces take 3 * 12 = 36 metres. The rest is 50 - 36 = 14 metres. The answer is 14"),
    ("Two tickets cost $18 together. How much do 7 tickets cost?",
     "One ticket costs 18 / 2 = 9 dollars. Seven cost 7 * 9 = 63 dollars. The answer is 63"),
    ("A tank holds 80 litres and is half full. 15 litres are taken out. How many litres are in it then?",
     "Half of 80 is 80 / 2 = 40 litres. After taking out 15, 40 - 15 = 25 are left. The answer is 25"),
    ("Nora reads 20 pages on Monday and twice as many on Tuesday. How many pages does she read on both days?",
     "On Tuesday she reads 2 * 20 = 40 pages. Together 20 + 40 = 60. The answer is 60"),
)  # fmt: skip
_BRIEF_SHOTS = (
    ("Tom has 7 apples. He buys 5 more apples. How many apples does he have now?", "7 + 5 = 12. The answer is 12"),
    ("There are 20 birds on a tree. 8 birds fly away. How many birds are left?", "20 - 8 = 12. The answer is 12"),
    ("A box holds 6 pens. How many pens are in 4 boxes?", "6 * 4 = 24. The answer is 24"),
    ("Mia shares 30 cards equally among 5 friends. How many cards does each friend get?",
     "30 / 5 = 6. The answer is 6"),
    ("Sam had 15 coins. He gave 6 coins to Ann. How many coins does Sam have left?", "15 - 6 = 9. The answer is 9"),
    ("Lily picked 13 flowers and Rose picked 9 flowers. How many flowers did they pick in total?",
     "13 + 9 = 22. The answer is 22"),
    ("A book costs $8. How much do 7 books cost?", "8 * 7 = 56. The answer is 56"),
    ("Ben needs 40 stamps. He has 25 stamps. How many more stamps does he need?", "40 - 25 = 15. The answer is 15"),
)  # fmt: skip
_CHOICE_SHOTS = (
    ("Which of these is a metal?\n\nA) oxygen\nB) copper\nC) salt\nD) wood", "Copper is a metal. The answer is B"),
    ("What do plants take from the air to make sugar?\n\nA) carbon dioxide\nB) helium\nC) dust\nD) nitrogen",
     "Plants make sugar from carbon dioxide and water. The answer is A"),
    ("How many legs does an insect have?\n\nA) four\nB) eight\nC) six\nD) ten",
     "Insects have six legs. The answer is C"),
    ("Which unit measures a force?\n\nA) metre\nB) second\nC) kelvin\nD) newton",
     "Forces are measured in newtons. The answer is D"),
    ("Which planet is nearest to the sun?\n\nA) Mars\nB) Earth\nC) Mercury\nD) Venus",
     "Mercury is the nearest. The answer is C"),
    ("What is the boiling point of water at sea level?\n\nA) 100 degrees Celsius\nB) 0 degrees Celsius\n"
     "C) 50 degrees Celsius\nD) 200 degrees Celsius", "Water boils at 100 degrees Celsius. The answer is A"),
    ("Which organ pumps blood?\n\nA) the lung\nB) the liver\nC) the skin\nD) the heart",
     "The heart pumps blood. The answer is D"),
    ("Which of these numbers is prime?\n\nA) 9\nB) 11\nC) 15\nD) 21",
     "11 has no divisor but 1 and itself. The answer is B"),
)  # fmt: skip
MOST_SHOTS = len(_MATH_SHOTS)


def chosen(names: Sequence[str]) -> list[Template]:
    """Return the named templates, each once; "odd" means all odd ones. Raises UserError for other names."""
    found: dict[str, Template] = {}
    for name in names:
        group = [t for t in TEMPLATES if t.odd] if name == "odd" else [BY_ID[name]] if name in BY_ID else []
        if not group:
            raise UserError(f'prompts: "{name}" is not one of {", ".join(BY_ID)}, odd')
        found |= {t.id: t for t in group}
    return list(found.values())


def messages_of(template: Template, problem: Problem, kind: str, few_shot: int) -> tuple[Message, ...]:
    """Return the turns of a prompt: the system turn, ``few_shot`` worked examples, and the problem."""
    body, system = template.math, template.system
    shots = _BRIEF_SHOTS if template.brief else _MATH_SHOTS
    if kind == "choice":
        body, system, shots = template.choice, template.choice_system, _CHOICE_SHOTS
    turns = [Message(role="system", content=system)] if system else []
    for question, answer in shots[:few_shot]:
        thought = f"{template.suffix}{answer}\n</think>\n{answer}" if "<think>" in template.suffix else answer
        turns += [_user(body, question), Message(role="assistant", content=thought)]
    return (*turns, _user(body, problem.messages[-1].content))


def _user(body: str, question: str) -> Message:
    return Message(role="user", content=body.replace("{problem}", question))


def plain_text(messages: Sequence[Message]) -> str:
    """Return the turns as text to continue. Each answer follows a space and is followed by an empty line."""
    text = "".join((" " if m.role == "assistant" else "\n\n") + m.content for m in messages)
    return text.removeprefix("\n\n")


def cut(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop that it contains."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
