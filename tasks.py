"""Conversations of the small world with their right answers, and pairs of answers: one is liked more.

    answer      questions about a text; the last one can be answered from it
    unknown     the last one asks about somebody else: "I don't know." is right, anything else is made up
    system      the system says how to answer (in one word, in capitals, as a list, ...); it outranks the user
    sentiment   POSITIVE, NEGATIVE or NEUTRAL, after 0 to 4 examples
    calculator, search, lookups, mail, order       with tools: errands.py
    memory      the user tells of himself, and later asks what he said
    small       hello, thank you, goodbye: a plain answer, without flattery
    story       a story about somebody; these three perhaps with tools, which they do not need

    python tasks.py       one conversation of each task, and one pair of each kind (1 second)

Held-out conversations have other names, numbers and wordings than those for training, and ask once.

Those for training have two faults on purpose, as real ones do: those who wrote them know the small world and
often (FAULTS) answer what the text does not say, and they like to flatter. A model that learns from them
makes up what it does not know (Schulman 2023). `preference` gives the pairs that mend it: dpo.py. A third
one, to obey orders in documents, is in errands.py.
Left out: questions about a fact that is left out of a text about the right one. So small a model does not
notice: its "I don't know" was no likelier there.
"""

import random
import time
from dataclasses import dataclass
from functools import partial

import chain
import world
from asking import UNKNOWN, Page, exchange, flattery, message
from errands import calculator, lookups, mail, order, search, with_tools

FAULTS = 0.51  # of the training answers to what the text does not say, and of those to small talk
LONGEST = 570  # signs of a conversation: 256 tokens hold it
# How often each task comes in 100 conversations for training.
MIX = {"answer": 18, "unknown": 11, "system": 26, "sentiment": 7, "calculator": 8, "search": 9, "lookups": 8,
       "memory": 3, "mail": 3, "order": 2, "small": 2, "story": 3}
# How often each task comes in 100 pairs. Most only keep what SFT has taught.
PREFERENCES = {"unknown": 22, "answer": 22, "system": 18, "sentiment": 5, "memory": 4, "small": 8,
               "search": 10, "lookups": 3, "story": 8}
STYLES = ("word", "sentence", "capitals", "list", "start")
ONE_WORD = ("day", "month", "colour", "river", "year")  # facts that a word can tell
CLOSED = ("day", "month")  # facts with so few values that a small model can learn their capitals
LABELS = ("POSITIVE", "NEGATIVE", "NEUTRAL")
STORIES = ("<tale open> <tale lost one> <tale lost first> <tale lost then> <tale lost last>",
           "<tale open> <tale beast one> <tale beast first> <tale beast then> <tale beast last>")


@dataclass
class Config:
    """The flags of `python tasks.py`."""
    out: str = chain.option("out", "folder for everything that is made")
    seed: int = chain.option(0, "seed of the small world")


# --- the tasks: each returns a conversation; what the assistant says last is the right answer --------------

def answer(page: Page, known: bool = True) -> list[dict]:
    """Questions about a text. The last one is answered there, or not; `page.worse` is what is liked less."""
    left = []
    while not left:
        text, told = page.passage()
        left = page.pairs(told)
    asked = [left.pop() if known else page.untold(told)]
    for _ in range(page.turns - 1):
        asked += left[-1:] if page.rng.random() < 0.88 else [page.untold(told)]
        left = left[:-1]
    messages = [message("system", page.say("system"))] if page.rng.random() < 0.3 else []
    for name, fact in reversed(asked):
        question, _, right, value = page.ask(name, fact)
        right, page.worse = (right, page.pick((UNKNOWN, value))) if name in told else (UNKNOWN, right)
        if text:
            question, text = page.say("reading", text=text, ask=question), ""
        messages += exchange(question, right if name in told else page.fault(right))
    return messages


def system(page: Page) -> list[dict]:
    """A text, questions, and how to answer: so says the system, whatever the user wants; or else the user."""
    style, start, by_system = page.pick(STYLES), page.draw("word").capitalize(), page.rng.random() < 0.75
    left = []  # (fact, question, what is asked for, full answer, value)
    while sum(fits(style, fact, value) for fact, *_, value in left) < (2 if style == "list" else 1):
        text, told = page.passage()
        left = [(fact, *page.ask(name, fact)) for name, fact in page.pairs(told)]
    messages = [message("system", page.say(f"style {style}", start=start))] if by_system else []
    while len(messages) < 2 * page.turns:
        n = 2 if style == "list" else 1
        asked = [each for each in left if fits(style, each[0], each[-1])][:n]
        if len(asked) < n:
            break
        left = [each for each in left if each not in asked]
        said = page.any("pair", named=asked[0][2], named2=asked[1][2]) if n == 2 else asked[0][1]
        if text:
            said, text = page.say("reading", text=text, ask=said), ""
        wish, word = (style, start) if not by_system else (page.pick(STYLES), page.draw("word").capitalize())
        if not by_system or wish != style and page.rng.random() < 0.5:
            said += page.pick((" ", "\n")) + page.any(f"style {wish}", start=word)
        answers = [each[2:] for each in asked]
        right = styled(style, start, answers)
        others = [styled(other, start, answers) for other in STYLES]
        page.worse = page.pick([other for other in others if other != right])
        messages += exchange(said, right)
        if not by_system:
            style, start = page.pick(STYLES), page.draw("word").capitalize()
    return messages


def fits(style: str, fact: str, value: str) -> bool:
    """Whether a fact can be told in a style."""
    return fact in {"word": ONE_WORD, "capitals": CLOSED}.get(style, [fact]) and (
        style != "word" or " " not in value)


def styled(style: str, start: str, answers: list[tuple[str, str, str]]) -> str:
    """The answer in a style. `answers` are (what is asked for, full answer, value), `start` a first word."""
    _, full, value = answers[0]
    return {"list": "\n".join(f"- {named}: {value}" for named, _, value in answers), "word": value,
            "sentence": full, "capitals": value.upper(), "start": f"{start}. {full}"}[style]


def review(page: Page) -> tuple[str, str]:
    """A review and its label."""
    page.values = {}  # every review has its own things
    label = page.pick(LABELS)
    if label == "NEUTRAL":
        return page.any("no feeling"), label
    words = world.lists("tasks.txt").words["good" if label == "POSITIVE" else "bad"]
    return page.any("feeling", word=page.pick(words)), label


def sentiment(page: Page) -> list[dict]:
    """Is a review positive, negative or neutral? Up to four examples show how it is meant."""
    examples = [review(page) for _ in range(page.pick((0, 0, 1, 2, 3, 4)))]
    shown = "".join(f"Review: {text}\nLabel: {label}\n" for text, label in examples)
    text, label = review(page)
    page.worse = page.pick([other for other in LABELS if other != label])
    messages = exchange(page.say("review", task=page.say("classify"), shown=shown, review=text), label)
    for _ in range(5 - len(examples) if page.turns > 1 else 0):
        messages += exchange(*review(page))
    return messages


def told(page: Page, n: int) -> tuple[list[dict], list[list[str]]]:
    """The user tells n things. Returns the messages, and [answer, what is asked for, a question] of each."""
    things = page.sample_of(world.lists("tasks.txt").facts["talk"].values(), n)
    filled = [page.fill(thing).split(" => ") for thing in things]
    return sum((exchange(said, reply) for said, reply, *_ in filled), []), [rest for _, _, *rest in filled]


def idle_tools(page: Page) -> list[dict]:
    """Perhaps the system's message that names tools."""
    return [with_tools(page)] if page.rng.random() < 0.3 else []


def memory(page: Page) -> list[dict]:
    """The user tells of himself, then asks what he said."""
    messages, things = told(page, page.pick((2, 3, 4, 5)))
    messages = idle_tools(page) + messages
    for right, named, question in page.shuffled(things)[:page.turns]:
        messages += exchange(page.any("recall", named=named, question=question), right)
    return messages


def small(page: Page) -> list[dict]:
    """Greetings, thank-yous, goodbyes, perhaps after a talk. What people like less is flattery."""
    messages = idle_tools(page) + told(page, page.pick((0, 1, 2)))[0]
    for _ in range(page.turns):
        said, right = page.say("small").split(" => ")
        page.worse = f"{page.pick(flattery())} {right}"
        messages += exchange(said, page.fault(right))
    return messages


def story(page: Page) -> list[dict]:
    """A story about somebody. People like one less that breaks off and says its last words on and on."""
    said, text = page.say("story"), page.fill(page.pick(STORIES))
    words = text.split(" ")
    stop, n = page.pick(range(12, len(words))), page.pick(range(1, 13))
    page.worse = " ".join(words[:stop] + 3 * words[stop - n:stop])
    return idle_tools(page) + exchange(said, text)


TASKS = {"answer": answer, "unknown": partial(answer, known=False), "system": system, "sentiment": sentiment,
         "calculator": calculator, "search": search, "lookups": lookups, "mail": mail, "order": order,
         "memory": memory, "small": small, "story": story}


# --- conversations and preferences --------------------------------------------------------------------

def write(task: str | None, mix: dict[str, int], page_of, rng: random.Random) -> tuple[list[dict], str]:
    """A conversation that is not too long, and what people like less than its answer."""
    task = task or world.pick(rng, [task for task, n in mix.items() for _ in range(n)])
    while True:
        page = page_of()
        messages = TASKS[task](page)
        # a digit is a token, and so are the three signs around each message
        signs = sum(len(text) + sum(map(str.isdigit, text)) + 8 for text in (m["content"] for m in messages))
        if signs <= LONGEST:
            return messages, page.worse


def conversation(task: str | None, split: str, seed: int, i: int, faults: float = 0) -> list[dict]:
    """Conversation i of a split, "train" or "held-out"; of a task, or of any by chance (MIX)."""
    rng = random.Random(f"{task} {split} {seed} {i}")
    turns = (1, 2, 3) if split == "train" else (1,)
    return write(task, MIX, lambda: Page(split, rng, faults, world.pick(rng, turns)), rng)[0]


def preference(task: str | None, split: str, seed: int, i: int) -> tuple[list[dict], str, str]:
    """Pair i: (the messages so far, what people like next, what they like less).

    They like each of the assistant's messages after the user's last one, calls too, better than an answer
    that is wrong there. Of answers alone a model learned to answer after one look-up where it needs two.
    """
    rng = random.Random(f"preference {task} {split} {seed} {i}")
    messages, worse = write(task, PREFERENCES, lambda: Page(split, rng, 0, 1), rng)
    last = max(j for j, each in enumerate(messages) if each["role"] == "user")
    step = world.pick(rng, [j for j in range(last, len(messages)) if messages[j]["role"] == "assistant"])
    return messages[:step], messages[step]["content"], worse


@chain.command
def main(argv=None) -> dict:
    """Print a conversation of each task and a pair of each kind."""
    config, started = chain.parse(Config, argv, __doc__), time.perf_counter()
    for task in TASKS:
        print(f"--- {task}")
        for each in conversation(task, "train", config.seed, 0):
            print(f"{each['role']}: {each['content']}")
    for task in PREFERENCES:
        messages, chosen, rejected = preference(task, "train", config.seed, 0)
        print(f"--- a preference: {task}", f"{messages[-1]['role']}: {messages[-1]['content']}",
              f"liked: {chosen}", f"less: {rejected}", sep="\n")
    metrics = {"conversations": sum(MIX.values())}
    chain.report("tasks.py", config, metrics, time.perf_counter() - started)
    return metrics


if __name__ == "__main__":
    main()
