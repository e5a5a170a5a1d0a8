"""The small world: an endless invented text, the default that needs no download.

How the world is made, from the bottom up:

    words      world.txt holds word lists, sentence frames and the rules of what is true of whom.
    names      two words each: Amber Hollow, Nora Whitlock, the Brave Heron, the marsh lantern. A hash of the name
               puts about 10 % of them into the held-out world, so "never seen in training" is literally true.
    facts      facts(name) follows from the name alone. Every text that tells of Amber Hollow tells the same, so
               any question about it has an exact answer. A train place has a train mayor, and so on.
    frames     "{hero} of {town} lost {a thing}.": a slot is filled once and then stays for the whole document.
               No frame comes twice in a document.
    documents  document(split, seed, i) depends on nothing else: any worker can make any part of the endless row.

Names, numbers and values come from large open lists on purpose: what can't be guessed must be copied from the text
above, and copying (induction) is what retrieval and tools will stand on.

    >>> document("train", seed=0, i=7) == document("train", seed=0, i=7)
    True
    >>> facts("Amber Hollow")["kind"], is_held_out("Amber Hollow")
    ('place', False)

Left out: conversations, preferences and tool calls. Later rooms make them from the same names and facts.
"""

import random
import re
import zlib
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import NamedTuple

# An entity's kind -> the word lists of its first and of its second word. The second word tells the kind.
NAMES = {
    "place": (("place first",), "place second"),
    "person": (("woman", "man"), "surname"),
    "ship": (("ship first",), "ship second"),
    "creature": (("creature first",), "creature second"),
}
PRONOUNS = ({"he": "he", "him": "him", "his": "his"}, {"he": "she", "him": "her", "his": "her"})
CHOICE = re.compile(r"\(([^()]*\|[^()]*)\)")                  # an innermost (this|that)
SLOT = re.compile(r"\{([aA] )?([\w.]+)\}|<([^<>]+)>")         # {hero}, {a thing}, <section>


# --- words, names and facts ------------------------------------------------------------------------------------

class Lists(NamedTuple):
    """The content of world.txt."""
    words: dict[str, list[str]]
    frames: dict[str, list[str]]
    facts: dict[str, dict[str, str]]
    roles: dict[str, str]
    first: set[str]         # the first words of names
    kinds: dict[str, str]   # the second words, each with the kind that it tells


@cache
def lists() -> Lists:
    """world.txt, read once."""
    made = Lists({}, {}, {}, {}, set(), {})
    text = Path(__file__).with_name("world.txt").read_text(encoding="utf-8")
    for section in re.split(r"^\[", text, flags=re.MULTILINE)[1:]:
        title, body = section.split("]\n", 1)
        what, _, name = title.partition(" ")
        lines = [line for line in body.split("\n") if line and line[0] != "#"]
        if what == "words":
            made.words[name] = [word.strip() for word in " ".join(lines).split(",")]
        elif what == "frames":
            made.frames[name] = [line.replace("\\n", "\n") for line in lines]
        elif what == "facts":
            made.facts[name] = dict(line.split(": ") for line in lines)
        else:
            made.roles.update(line.split(": ") for line in lines)
    for kind, (first, second) in NAMES.items():
        made.first.update(word for part in first for word in made.words[part])
        made.kinds.update((word, kind) for word in made.words[second])
    made.words["any"] = sorted({word for words in made.words.values() for word in words if word.isalpha()})
    return made


def is_held_out(name: str) -> bool:
    """Whether the entity of this name belongs to the held-out world (about one in ten does)."""
    return zlib.crc32(name.encode()) % 10 == 0


def seeded(*key: object) -> random.Random:
    """A generator that depends on the key alone, the same on every machine and version of Python."""
    return random.Random(int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "big"))


def pick(rng: random.Random, items):
    return items[int(rng.random() * len(items))]   # random() is promised to stay the same, choice() is not


def draw(rule: str, held_out: bool, rng: random.Random, taken=()) -> str | int:
    """A value not taken yet, by a rule of world.txt: an entity of a kind, a word of a list, a number of a range."""
    words, (first, second) = lists().words, NAMES.get(rule, ("", ""))
    while True:
        if second:
            value = f"{pick(rng, words[pick(rng, first)])} {pick(rng, words[second])}"
        elif rule in words:
            value = pick(rng, words[rule])
        else:
            low, high = map(int, rule.split("-"))
            value = low + int(rng.random() * (high - low + 1))
        if value not in taken and (not second or is_held_out(value) == held_out):
            return value


@lru_cache(maxsize=20_000)
def facts(name: str) -> dict[str, str | int]:
    """All that is true of an entity, from its name alone; to be read, not changed.

    Its kind's rules in world.txt, "kind", and of the name "first", "he", "him", "his". KeyError if it is no name.
    """
    first, _, second = name.rpartition(" ")
    kind = lists().kinds[second]
    known = {"kind": kind, "first": first} | PRONOUNS[first in lists().words["woman"]]
    rng, held_out = seeded("facts", name), is_held_out(name)
    for fact, rule in lists().facts[kind].items():
        known[fact] = draw(rule, held_out, rng, (name, *known.values()))
    return known


def second_mentions(text: str) -> list[tuple[int, int]]:
    """Character spans of the second mention of every capitalised two-word name (people, places, ships) in a text.

    >>> text = "Nora Whitlock left Amber Hollow. Nora Whitlock was glad."
    >>> [text[start:end] for start, end in second_mentions(text)]
    ['Nora Whitlock']
    """
    seen, spans = {}, []
    for match in re.finditer(r"\b(?=([A-Z][a-z]+) ([A-Z][a-z]+)\b)", text):   # a look-ahead: matches may overlap
        name = match.groups()
        if name[0] in lists().first and name[1] in lists().kinds:
            seen[name] = seen.get(name, 0) + 1
            if seen[name] == 2:
                spans.append((match.start(), match.end(2)))
    return spans


@cache
def needed(frame: str) -> frozenset[str]:
    """The facts of {it} that a frame tells.

    >>> sorted(needed("{it.mayor} and {it.mayor.his} {it.mayor.pet} saw {it}."))
    ['mayor', 'mayor.pet']
    """
    paths = re.findall(r"\{(?:[aA] )?[iI]t\.([\w.]+)", frame)
    return frozenset(re.sub(r"(^|\.)(he|him|his|first)$", "", path) for path in paths) - {""}


# --- a page: one document in the making ------------------------------------------------------------------------

class Page:
    """One document in the making: its chance, its world, the values of its slots, the frames it has used."""

    def __init__(self, split: str, rng: random.Random):
        self.held_out, self.rng = split == "held-out", rng
        self.values, self.used = {}, set()

    def pick(self, items):
        return pick(self.rng, items)

    def draw(self, rule: str, taken=()) -> str | int:
        return draw(rule, self.held_out, self.rng, taken)

    def sample(self, rule: str, n: int) -> list:
        """n different values by a rule."""
        found = []
        while len(found) < n:
            found.append(self.draw(rule, found))
        return found

    def shuffled(self, items: list) -> list:
        return sorted(items, key=lambda _: self.rng.random())

    def value(self, path: str) -> str | int:
        """What a slot holds: "hero" is drawn when first met, "hero.home" is a fact of it."""
        head, *rest = path.split(".")
        if head not in self.values:
            rule = head.rstrip("23456789")   # {thing2} is another thing
            rule = lists().roles.get(rule, rule)
            self.values[head] = self.value(rule) if "." in rule else self.draw(rule, self.values.values())
        value = self.values[head]
        for fact in rest:
            value = facts(value)[fact]
        return value

    def fill(self, frame: str, **values) -> str:
        """The text of a frame: first the choices, the inner ones first, then the slots and the frames within."""
        self.values.update(values)
        while (chosen := CHOICE.sub(lambda match: self.pick(match[1].split("|")), frame)) != frame:
            frame = chosen
        return SLOT.sub(self.slot, frame)

    def slot(self, match: re.Match) -> str:
        """The text of one slot."""
        article, path, section = match.groups()
        if section:
            return self.say(section)
        value = str(self.value(path[0].lower() + path[1:]))
        if article:
            value = ("an " if value[0] in "aeiouAEIOU" else "a ") + value
        return value[0].upper() + value[1:] if (article or path)[0].isupper() else value

    def fresh(self, section: str, fits: Callable[[str], bool] = lambda frame: True) -> str:
        """A frame of the section that this page has not used yet; "" when none is left that fits."""
        left = [frame for frame in lists().frames[section] if frame not in self.used and fits(frame)]
        frame = self.pick(left) if left else ""
        self.used.add(frame)
        return frame

    def say(self, section: str, **values) -> str:
        """A fresh frame of the section, filled, with these slots set beforehand."""
        frame = self.fresh(section)
        assert frame, f"[frames {section}] has no line left for this document"
        return self.fill(frame, **values)

    def tell(self, name: str, n: int) -> tuple[str, set[str]]:
        """Some n sentences about an entity, and the facts that they tell; none is told twice."""
        kind = facts(name)["kind"]
        sentences, told = [], set()
        for section in [f"{kind} first"] + [kind] * n:
            if frame := self.fresh(section, lambda frame: not told & needed(frame)):
                sentences.append(self.fill(frame, it=name))
                told |= needed(frame)
        return " ".join(sentences), told


# --- the kinds of document -------------------------------------------------------------------------------------

def article(page: Page) -> str:
    """What is known of one entity, and then some of it again in other words."""
    kind = page.pick(tuple(NAMES))
    name = page.draw(kind)
    text, told = page.tell(name, page.pick((3, 4, 5, 6)))
    again = [page.fresh(f"{kind} again", lambda frame: needed(frame) <= told) for _ in range(page.pick((1, 2)))]
    again = " ".join(page.fill(frame) for frame in again if frame)
    return page.say("article", head=("The " if kind in ("ship", "creature") else "") + name, text=text, again=again)


def reading(page: Page) -> str:
    """A text about one or two entities, then questions with their answers; some are not in the text."""
    kind = page.pick(tuple(NAMES))
    told, texts = {}, []
    for name in page.sample(kind, page.pick((1, 1, 2))):
        text, told[name] = page.tell(name, page.pick((2, 3, 4)))
        texts.append(text)
    lines, form = [page.say("reading", text="\n".join(texts))], page.fresh("question form")
    for _ in range(page.pick((2, 3, 4))):
        name, known = page.pick(list(told)), page.rng.random() < 0.87
        if frame := page.fresh(f"{kind} asks", lambda frame: is_known(frame, told[name]) is known):
            question, answer = frame.split(" => ")
            answer = answer if known else page.pick(lists().frames["unknown"])
            lines.append(page.fill(form, question=page.fill(question, it=name), answer=page.fill(answer)))
    return "\n".join(lines)


def is_known(frame: str, told: set[str]) -> bool | None:
    """Whether a text that told these facts answers a question; None if it does so in part: better not asked."""
    question, answer = map(needed, frame.split(" => "))
    if question | answer <= told:
        return True
    return False if question <= told and not answer & told else None


def sums(page: Page) -> str:
    """Small sums in digits and in words, bare and in stories; always right."""
    lines = []
    for _ in range(page.pick((3, 4, 5))):
        op = page.pick(("plus", "minus", "times", "share"))
        a, b = page.sample("2-12" if op in ("times", "share") else page.pick(("2-9", "2-50")), 2)
        x, y, z = {"plus": (a, b, a + b), "minus": (a + b, a, b), "times": (a, b, a * b), "share": (a * b, a, b)}[op]
        words = (lists().words["number"] + [""] * 50)
        page.values = dict(x=x, y=y, z=z, xw=words[x], yw=words[y], zw=words[z])   # no people yet: each sum has its own
        lines.append(page.say(f"sum {op}"))
    return "\n".join(lines)


def patterns(page: Page) -> str:
    """A pattern that sets itself and goes on: said again, looked up again, counted on, sorted by label."""
    form, n = page.pick(("repeat", "repeat", "pairs", "pairs", "count", "label")), page.pick(range(4, 11))
    listed, mark = lists().words["listed"], page.pick((": ", " - ", " = ", " > ", ", "))
    if form == "repeat":
        row = page.pick((", ", "; ", " - ", " / ")).join(map(str, page.sample(page.pick(listed), n)))
        return page.say("list repeat", row=row)
    if form == "count":
        step = page.pick((1, 2, 3, 4, 5, 10, 25, 100, -1, -2, -3, -5))
        start = page.draw("1-60") + (0 if step > 0 else 60)
        row = [str(start + step * k) for k in range(n + 4)]
        return page.say("list count", row=", ".join(row), step=abs(step), start=start, last=row[-1])
    if form == "pairs":
        pairs = zip(page.sample(page.pick(listed), n), page.sample(page.pick(listed), n))
    else:
        pairs = [(page.draw(label), label) for label in page.sample("label", 3) for _ in range(n // 2 + 1)]
    rows = page.shuffled([f"{key}{mark}{value}" for key, value in pairs])
    return page.say(f"list {form}", rows="\n".join(rows), again="\n".join(page.shuffled(rows)))


WRITERS = {"story": lambda page: page.say("story"), "talk": lambda page: page.say("talk"), "article": article,
           "reading": reading, "sums": sums, "lists": patterns}
KINDS = tuple(WRITERS)
MIX = ("story",) * 6 + ("reading",) * 5 + ("article",) * 3 + ("talk",) * 3 + ("lists",) * 2 + ("sums",)


def document(split: str, seed: int, i: int, kind: str | None = None) -> str:
    """Document i of a split ("train" or "held-out"); its kind is one of KINDS, by chance if none is asked for."""
    assert split in ("train", "held-out"), f'the split is "train" or "held-out", not {split!r}'
    page = Page(split, seeded(split, seed, i))
    mixed = page.pick(MIX)
    return WRITERS[kind or mixed](page)


def documents(split: str, seed: int = 0, start: int = 0) -> Iterator[str]:
    """The endless row of documents of a split, from document `start` on."""
    return (document(split, seed, i) for i in count(start))
