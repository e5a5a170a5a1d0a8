"""The small world: an endless invented text, the default that needs no download.

    words      world.txt holds word lists, sentence frames and the rules of what is true of whom.
    names      two words each: Amber Hollow, Nora Whitlock, the Brave Heron, the marsh lantern. By a hash of
               the name about 10 % of them are held out, so "never seen in training" is literally true.
    facts      facts(name) follows from the name alone. Every text tells the same of Amber Hollow, so that a
               question about it has an exact answer. A train place has a train mayor, and so on.
    frames     "{hero} of {town} lost {a thing}.": a slot is filled once a document, no frame comes twice.
    documents  document(split, seed, i) depends on nothing else: workers can share the endless row.

Names, numbers and values come from large open lists on purpose: what can't be guessed must be copied from the
text above, and copying (induction) is what retrieval and tools will stand on.
Left out: conversations, preferences and tool calls. tasks.py makes them from the same names and facts.
"""

import random
import re
import zlib
from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

# An entity's kind -> the word lists of its first and of its second word. The second word tells the kind.
NAMES = {"place": (("place first",), "place second"), "person": (("woman", "man"), "surname"),
         "ship": (("ship first",), "ship second"), "creature": (("creature first",), "creature second")}
PRONOUNS = ({"he": "he", "him": "him", "his": "his"}, {"he": "she", "him": "her", "his": "her"})
CHOICE = re.compile(r"\(([^()]*\|[^()]*)\)")                  # an innermost (this|that)
SLOT = re.compile(r"\{([aA] )?([\w.]+)\}|<([^<>]+)>")         # {hero}, {a thing}, <section>


# --- words, names and facts ---------------------------------------------------------------------------
@cache
def lists(file: str = "world.txt") -> SimpleNamespace:
    """A file, read once: .words, .frames and .facts by name; .kinds: what a second word of a name tells."""
    made = SimpleNamespace(words={}, frames={}, facts={})
    text = Path(__file__).with_name(file).read_text(encoding="utf-8")
    _, *parts = re.split(r"^\[(\w+) ?(.*)\]$", text, flags=re.MULTILINE)
    for what, name, body in zip(parts[::3], parts[1::3], parts[2::3]):
        lines = [line for line in body.split("\n") if line and line[0] != "#"]
        if what == "words":
            made.words[name] = [word.strip() for word in " ".join(lines).split(",")]
        elif what == "frames":
            made.frames[name] = [line.replace("\\n", "\n") for line in lines]
        else:
            made.facts[name or what] = dict(line.split(": ") for line in lines)
    made.kinds = {word: kind for kind, (_, second) in NAMES.items() for word in made.words.get(second, ())}
    made.words["word"] = sorted({word for words in made.words.values() for word in words if word.isalpha()})
    return made


def is_held_out(name: str) -> bool:
    """Whether the entity of this name belongs to the held-out world (about one in ten does)."""
    return zlib.crc32(name.encode()) % 10 == 0


def pick(rng: random.Random, items):
    """One of the items. Only random() is used of the generator: its numbers are promised never to change."""
    return items[int(rng.random() * len(items))]


def draw(held_out: bool, rng: random.Random, rule: str, taken=()) -> str | int:
    """A value not taken yet, by a rule of world.txt: an entity's name, a word of a list, a number."""
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
    """All that is true of an entity, from its name alone: "kind", the facts of its kind in world.txt, and of
    people "first", "he", "him" and "his". To be read, not changed. Raises KeyError if it is no name.
    """
    first, _, second = name.rpartition(" ")
    known = {"kind": lists().kinds[second], "first": first} | PRONOUNS[first in lists().words["woman"]]
    rng, held_out = random.Random(f"facts of {name}"), is_held_out(name)
    for fact, rule in lists().facts[known["kind"]].items():
        known[fact] = draw(held_out, rng, rule, (name, *known.values()))
    return known


def second_mentions(text: str) -> list[tuple[int, int]]:
    """Character spans (start, end) of the second mention of every capitalised name: people, places, ships.

    >>> text = "Nora Whitlock left Amber Hollow. Nora Whitlock was glad."
    >>> [text[start:end] for start, end in second_mentions(text)]
    ['Nora Whitlock']
    """
    words, kinds, seen, spans = lists().words, lists().kinds, [], []
    for match in re.finditer(r"\b(?=([A-Z]\w+) ([A-Z]\w+))", text):   # a look-ahead: "Sunday Nora Whitlock"
        first, second = match.groups()
        if second in kinds and any(first in words[part] for part in NAMES[kinds[second]][0]):
            seen.append((first, second))
            if seen.count((first, second)) == 2:
                spans.append((match.start(), match.end(2)))
    return spans


@cache
def needed(frame: str) -> frozenset[str]:
    """The facts of {it} that a frame tells: mayor and mayor.pet for "{it.mayor.his} {it.mayor.pet}"."""
    paths = re.findall(r"\{(?:[aA] )?[iI]t\.([\w.]+)", frame)
    return frozenset(re.sub(r"(^|\.)(he|him|his|first)$", "", path) for path in paths) - {""}


# --- a page: one document in the making ---------------------------------------------------------------
class Page:
    """One document in the making: its chance, what its slots hold, the values and frames that it has used."""

    def __init__(self, split: str, rng: random.Random, frames: dict[str, list[str]] | None = None):
        self.rng, self.pick, self.draw = rng, partial(pick, rng), partial(draw, split == "held-out", rng)
        self.frames, self.values, self.taken, self.used = frames or lists().frames, {}, set(), set()

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
            rule = lists().facts["roles"].get(rule, rule)
            self.values[head] = self.value(rule) if "." in rule else self.draw(rule, self.taken)
            self.taken.add(self.values[head])
        value = self.values[head]
        for fact in rest:
            value = facts(value)[fact]
        return value

    def fill(self, frame: str, **values) -> str:
        """The text of a frame: first the choices, from the inside out, then the slots."""
        self.values.update(values)
        while (chosen := CHOICE.sub(lambda match: self.pick(match[1].split("|")), frame)) != frame:
            frame = chosen
        return SLOT.sub(self.slot, frame)

    def slot(self, match: re.Match) -> str:
        article, path, section = match.groups()
        if section:
            return self.say(section)
        value = str(self.value(path[0].lower() + path[1:]))
        if article:
            value = ("an " if value[0] in "aeiouAEIOU" else "a ") + value
        return value[0].upper() + value[1:] if (article or path)[0].isupper() else value

    def fresh(self, section: str, fits: Callable[[str], bool] = lambda frame: True) -> str:
        """A frame of the section that this page has not used yet; "" when none is left that fits."""
        left = [frame for frame in self.frames[section] if frame not in self.used and fits(frame)]
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
        kind, sentences, told = facts(name)["kind"], [], set()
        for section in [f"{kind} first"] + [kind] * n:
            if frame := self.fresh(section, lambda frame: not told & needed(frame)):
                sentences.append(self.fill(frame, it=name))
                told |= needed(frame)
        return " ".join(sentences), told


# --- the kinds of document ----------------------------------------------------------------------------
def article(page: Page) -> str:
    """What is known of an entity and, perhaps, of a second one that it led to."""
    name, paragraphs = page.draw(page.pick(tuple(NAMES))), []
    head = ("The " if facts(name)["kind"] in ("ship", "creature") else "") + name
    for n in page.pick(((5,), (6,), (7,), (3, 3), (4, 3))):
        kind, (text, told) = facts(name)["kind"], page.tell(name, n)
        again = page.fresh(f"{kind} again", lambda frame: needed(frame) <= told)
        paragraphs.append(f"{text} {page.fill(again)}".strip())
        linked = [fact for fact, rule in lists().facts[kind].items() if fact in told and rule in NAMES]
        name = facts(name)[page.pick(linked)] if linked else page.draw(kind)
    return page.say("article", head=head, text="\n".join(paragraphs))


def reading(page: Page) -> str:
    """A text, then questions about it with their answers, long or short; some ask about somebody else."""
    about = page.pick((facts_asked, facts_asked, scenes_asked))
    is_short = about is facts_asked and page.pick((False, True))
    text, asked = about(page)
    lines, form = [page.say("reading", text=text)], page.fresh("short form" if is_short else "question form")
    lines += [page.fill(form, question=question, answer=answers[is_short]) for question, *answers in asked]
    return "\n".join(lines)


def facts_asked(page: Page) -> tuple[str, list[tuple[str, str, str]]]:
    """One or two entities of a kind, and (question, answer, short answer); some are about another."""
    kind, told, texts, asked = page.pick(tuple(NAMES)), {}, [], {}
    for name in page.sample(kind, n := page.pick((1, 2))):
        text, told[name] = page.tell(name, page.pick((3, 4, 5)) - n)
        texts.append(text)

    def fits(frame: str) -> bool:
        """Whether the text tells all that the frame says; of a stranger, if the question says nothing."""
        (question, answer), known = map(needed, frame.split(" => ")), told.get(name, set())
        right = question <= known and (answer <= known or name not in told)
        return right and (name, needed(frame)) not in asked

    for _ in range(page.pick((7, 8, 9))):
        name = page.pick(list(told)) if page.rng.random() < 0.6 else page.draw(kind, told)  # a stranger
        if frame := page.fresh(f"{kind} asks", fits):
            question, answer = map(needed, frame.split(" => "))
            new = "".join(f".{fact}" for fact in answer - question)   # it tells a fact of {it}, or who it is
            question, *answers = page.fill(f"{frame} => {{it{new}}}", it=name).split(" => ")
            unknown = page.pick(lists().frames["unknown"])
            asked[name, needed(frame)] = question, *(answers if name in told else [unknown, unknown])
    return "\n".join(texts), list(asked.values())


def scenes_asked(page: Page) -> tuple[str, list[tuple[str, str]]]:
    """Several people do things, and it is asked who did what. The last scene may be asked of but not told."""
    said, asked, hidden = [], [], page.rng.random() < 0.3
    for _ in range(page.pick((3, 4, 5)) + hidden):
        page.values = {}   # every scene has its own people
        scene, *pairs = page.say("scene").split(" => ")
        said.append(scene)
        asked.append(page.pick(list(zip(pairs[::2], pairs[1::2]))))
    if hidden:
        said.pop()
        asked[-1] = asked[-1][0], page.pick(lists().frames["unknown"])
    return " ".join(said), page.shuffled(asked)


def sums(page: Page) -> str:
    """Small sums in digits and in words, bare and in stories; always right."""
    lines, words = [], lists().words["number"]
    for _ in range(page.pick((4, 5, 6))):
        op = page.pick(("plus", "minus", "times", "share"))
        a, b = page.sample("2-10" if op in ("times", "share") else page.pick(("2-9", "2-50")), 2)
        c = a + b if op in ("plus", "minus") else a * b
        x, y, z = (a, b, c) if op in ("plus", "times") else (c, a, b)
        page.values, page.taken = {}, set()   # every sum has its own people
        lines.append(page.say(f"sum {op}", x=x, y=y, z=z, xw=words[x], yw=words[y], zw=words[z]))
    return "\n".join(lines)


def patterns(page: Page) -> str:
    """Lists that set a pattern and go on: said again, looked up again, counted on, sorted by label."""
    blocks = []
    for form in page.pick(("repeat pairs", "repeat label", "count pairs", "repeat repeat", "pairs")).split():
        n, step = page.pick(range(4, 10)), page.pick((1, 2, 3, 5, 10, 25, -1, -2, -3))
        items, others = (page.sample(page.pick(lists().words["listed"]), n) for _ in range(2))
        if form == "count":
            items = [start := page.draw("30-90")] + [start + step * k for k in range(1, n + 4)]
        elif form == "label":
            others = page.sample("label", 3) * 4
            items = [page.draw(label) for label in others]
        comma, mark = page.pick((", ", "; ", " - ", " / ")), page.pick((": ", " - ", " = ", " > ", ", "))
        rows = page.shuffled([f"{item}{mark}{other}" for item, other in zip(items, others)])
        blocks.append(page.say(f"list {form}", row=comma.join(map(str, items)), last=items[-1],
                               rows="\n".join(rows), again="\n".join(page.shuffled(rows))))
    return "\n\n".join(blocks)


def guests(page: Page) -> str:
    """Names as they come, each marked as new or again. Who learns to notice that, notices strangers too."""
    few = page.sample(page.pick(tuple(NAMES)), page.pick(range(8, 14)))
    came, mark = [page.pick(few) for _ in range(2 * len(few))], page.pick((": ", " - ", " = ", " > ", ", "))
    rows = [f"{name}{mark}{'again' if name in came[:i] else 'new'}" for i, name in enumerate(came)]
    return page.say("guests", rows="\n".join(rows))


KINDS = {"story": lambda page: page.say("story"), "article": article, "reading": reading,
         "talk": lambda page: page.say("talk"), "lists": patterns, "guests": guests, "sums": sums}
MIX = ("story",) * 3 + ("reading",) * 13 + ("lists", "guests") * 2 + ("article", "talk", "sums")


def document(split: str, seed: int, i: int, kind: str | None = None) -> str:
    """Document i of a split, "train" or "held-out"; of one of the KINDS, by chance if none is asked for."""
    assert split in ("train", "held-out"), f'the split is "train" or "held-out", not {split!r}'
    page = Page(split, random.Random(f"{split} {seed} {i}"))
    return KINDS[kind or page.pick(MIX)](page)


def documents(split: str, seed: int = 0, start: int = 0) -> Iterator[str]:
    """The endless row of documents of a split, from document `start` on."""
    return (document(split, seed, i) for i in count(start))
