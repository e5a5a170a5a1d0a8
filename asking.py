"""A page that asks: a text of the small world, questions in many wordings, and the form of a tool call.

    passage   a text about one or two entities, and which of their facts it tells
    ask       a question about a fact, what it asks for, the full answer, and the value alone
    call      an assistant's message that begins with "call " is a tool call, all of it: call name(literals)

    >>> read_call('call calculator("12 + 30")'), read_call("I call him Tom.")
    (('calculator', ('12 + 30',)), None)

The wordings are in tasks.txt. Every fourth form of asking is held out: no training conversation uses it. Left
out: questions about several facts at once, except for lists.
"""

import ast
import random
from functools import cache

import world

UNKNOWN = "I don't know."


def message(role: str, content: str) -> dict[str, str]:
    """One message of a conversation."""
    return {"role": role, "content": content}


def exchange(said: str, answer: str) -> list[dict]:
    """What the user says and the assistant answers."""
    return [message("user", said), message("assistant", answer)]


def write_call(name: str, argument: str) -> str:
    """The call of a tool, as the assistant writes it."""
    return f'call {name}("{argument}")'


def read_call(content: str) -> tuple[str, tuple] | None:
    """(name, arguments) of a tool call; None if the message is none. ValueError if it is a broken one."""
    if not content.startswith("call "):
        return None
    try:
        call = ast.parse(content[5:].strip(), mode="eval").body
        if call.keywords:
            raise ValueError("a name before an argument")
        return call.func.id, tuple(ast.literal_eval(argument) for argument in call.args)
    except (SyntaxError, ValueError, TypeError, AttributeError, RecursionError, MemoryError):
        raise ValueError(f'{content!r} is no call; write it like {write_call("calculator", "12 + 30")}')


@cache
def frames(split: str) -> dict[str, list[str]]:
    """The frames of world.txt and those of tasks.txt: three lines of four for training, one held out.

    Those of stories serve both: the assistant says them.
    """
    own = {section: [line for i, line in enumerate(lines)
                     if section.startswith("tale") or (i % 4 == 3) == (split == "held-out")]
           for section, lines in world.lists("tasks.txt").frames.items()}
    return world.lists().frames | own


@cache
def flattery() -> list[str]:
    """What flattery begins with."""
    return world.lists("tasks.txt").words["flattery"]


@cache
def questions(kind: str, fact: str) -> list[str]:
    """The questions for a fact: those of tasks.txt, and those of world.txt that tell nothing themselves."""
    _, _, _, *found = world.lists("tasks.txt").facts[kind][fact].split(" => ")
    for frame in world.lists().frames[f"{kind} asks"]:
        question, answer = frame.split(" => ")
        if world.needed(answer) == {fact} and not world.needed(question) and question not in found:
            found.append(question)
    return found


class Page(world.Page):
    """A page of world.py that also asks.

    In a share `faults` of all cases `fault` gives the answer that people like less, `worse`. It asks `turns`
    times, where a task can ask more than once.
    """

    def __init__(self, split: str, rng: random.Random, faults: float, turns: int):
        super().__init__(split, rng, frames(split))
        self.split, self.faults, self.turns, self.worse = split, faults, turns, UNKNOWN

    def fault(self, right: str) -> str:
        """The right answer, or by chance the worse one."""
        return self.worse if self.rng.random() < self.faults else right

    def any(self, section: str, **values) -> str:
        """A frame of the section, filled; it may come again, unlike what `say` gives."""
        return self.fill(self.pick(self.frames[section]), **values)

    def sample_of(self, items, n: int) -> list:
        """n different ones of the items."""
        return self.shuffled(list(items))[:n]

    def excerpt(self, name: str, n: int, fact: str = "", known: bool = False) -> tuple[str, set[str]]:
        """A part of a document, as a search finds it: its title, n sentences; and the facts that they tell.

        With a `fact`, one of them tells it, if it is `known`, and none else.
        """
        sentences, told = [], set()
        for wanted in self.shuffled([known] + [False] * (n - 1)):
            frame = self.fresh(world.facts(name)["kind"], lambda frame: not told & world.needed(frame) and (
                wanted == (fact in world.needed(frame))))
            if frame or wanted:
                sentences.append(self.fill(frame, it=name) if frame else self.asked(name, fact)[1])
                told |= world.needed(frame) or {fact}
        return f"{name}. {' '.join(sentences)}", told

    def passage(self) -> tuple[str, dict[str, set[str]]]:
        """A text about one or two entities of a kind, and which of their facts it tells."""
        kind, told, texts = self.pick(tuple(world.NAMES)), {}, []
        part, gap = self.pick(((self.tell, " "), (self.tell, "\n"), (self.excerpt, "\n")))
        for name in self.sample(kind, n := self.pick((1, 1, 2))):
            text, told[name] = part(name, self.pick((2, 3, 4)) - n + (part == self.excerpt))
            texts.append(text)
        return gap.join(texts), told

    def pairs(self, told: dict[str, set[str]]) -> list[tuple[str, str]]:
        """All (name, fact) that can be asked for and that the text tells, in any order."""
        return self.shuffled([(name, fact) for name, facts in told.items() for fact in world.lists(
            "tasks.txt").facts[world.facts(name)["kind"]] if fact in facts])

    def untold(self, told: dict[str, set[str]]) -> tuple[str, str]:
        """(name, fact) of somebody else than those the text tells of, but of their kind."""
        name = self.draw(kind := world.facts(min(told))["kind"], told)
        return name, self.pick(list(world.lists("tasks.txt").facts[kind]))

    def asked(self, name: str, fact: str) -> tuple[str, str, str, str]:
        """(what is asked for, the full answer, the value alone, a question): "mayor of Amber Hollow", ..."""
        kind = world.facts(name)["kind"]
        parts = world.lists("tasks.txt").facts[kind][fact].split(" => ")[:3]
        return tuple(self.fill(part, it=name) for part in (*parts, self.pick(questions(kind, fact))))

    def ask(self, name: str, fact: str) -> tuple[str, str, str, str]:
        """(a question, what is asked for, the full answer, the value alone)."""
        named, answer, value, question = self.asked(name, fact)
        return self.any("ask", named=named, question=question), named, answer, value
