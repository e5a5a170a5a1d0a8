"""The held-out world's library: documents that no weights have seen, and questions that they answer.

    library       500 documents, each about one entity; most names share a word with others, so that to find
                  "Rocky" or "Fair" is not to find Rocky Fair
    questions     a fact that its document tells, in wordings that no training has; and where it is told
    unanswerable  a fact that its document does not tell, or one of somebody who has no document
    pairs         (question, the sentence that tells it, another one there) of the world for training

    python library.py        a document, and questions (1 second)

Left out: documents about several entities; questions whose answer stands in two documents (agent.py).
"""

import random
import time
from dataclasses import dataclass

import chain
import world
from asking import Page
from retrieve import cut, split_sentences

DOCUMENTS = 500
SENTENCES = 7  # of a document


@dataclass
class Config:
    """The flags of `python library.py`."""
    out: str = chain.option("out", "folder for everything that is made")
    seed: int = chain.option(0, "seed of the library and its questions")


@dataclass
class Document:
    """A text about one entity, and in which sentence, from 1, it tells which fact."""
    name: str
    text: str
    told: dict[str, int]


@dataclass
class Asked:
    """A question, what it asks for, the right answer, the value in it, and where a document tells it."""
    question: str
    named: str
    answer: str
    value: str
    name: str
    fact: str
    source: str
    sentence: int


def file_name(name: str) -> str:
    """Return the source of an entity's document.

    >>> file_name("Amber Hollow")
    'amber_hollow.txt'
    """
    return name.lower().replace(" ", "_") + ".txt"


def write_document(page: Page, name: str) -> Document:
    """Return a document about an entity: its title, and SENTENCES frames; no fact is told twice."""
    kind, texts, told = world.facts(name)["kind"], [], {}
    for section in [f"{kind} first"] + [kind] * (SENTENCES - 1):
        if frame := page.fresh(section, lambda frame: not told.keys() & world.needed(frame)):
            new = split_sentences(page.fill(frame, it=name))
            for fact in world.needed(frame):
                value = str(world.facts(name)[fact])
                told[fact] = len(texts) + next((i for i, said in enumerate(new, 1) if value in said), 1)
            texts += new
    return Document(name, f"{name}\n{' '.join(texts)}", told)


def library(split: str, seed: int, n: int = DOCUMENTS) -> dict[str, Document]:
    """Return n documents of a split, "train" or "held-out", by source."""
    documents, rng = {}, random.Random(f"library {split} {seed}")
    while len(documents) < n:
        page = Page(split, rng, 0, 1)
        name = page.draw(page.pick(tuple(world.NAMES)))
        if file_name(name) not in documents:
            documents[file_name(name)] = write_document(page, name)
    return documents


def sharing(documents: dict[str, Document]) -> float:
    """Return the share of documents whose name shares a word with another one's."""
    words = [set(document.name.split()) for document in documents.values()]
    return sum(any(a & b for b in words if b is not a) for a in words) / len(words)


def facts_of(name: str) -> dict[str, str]:
    """Return the facts of an entity that can be asked for (see tasks.txt)."""
    return world.lists("tasks.txt").facts[world.facts(name)["kind"]]


def questions(documents: dict[str, Document], split: str, seed: int, n: int) -> list[Asked]:
    """Return n questions that the documents answer, each about another fact. UserError if they tell fewer."""
    there = sum(len(facts_of(each.name).keys() & each.told.keys()) for each in documents.values())
    chain.require(n <= there, f"{n:,} questions: {len(documents):,} documents answer {there:,}; ask fewer")
    rng, asked = random.Random(f"questions {split} {seed}"), {}
    while len(asked) < n:
        source, page = world.pick(rng, list(documents)), Page(split, rng, 0, 1)
        document = documents[source]
        fact = page.pick([fact for fact in facts_of(document.name) if fact in document.told] or [""])
        if fact:
            asked[source, fact] = Asked(*page.ask(document.name, fact), document.name, fact, source,
                                        document.told[fact])
    return list(asked.values())


def unanswerable(documents: dict[str, Document], seed: int, n: int) -> list[str]:
    """Return n questions that no document answers: every second one is about somebody without a document."""
    rng, found = random.Random(f"unanswerable {seed}"), []
    while len(found) < n:
        page, document = Page("held-out", rng, 0, 1), documents[world.pick(rng, list(documents))]
        name = document.name
        while len(found) % 2 and file_name(name) in documents:
            name = page.draw(world.facts(name)["kind"])
        untold = [fact for fact in facts_of(name) if len(found) % 2 or fact not in document.told]
        found += [page.ask(name, page.pick(untold))[0]] if untold else []
    return found


def pairs(seed: int, n: int) -> list[tuple[str, str, str]]:
    """Return up to n of (a question or what it asks for, the sentence that tells it, another one there).

    subtle: pairs of single sentences teach vectors for longer chunks too, and better than chunks themselves.
    """
    documents = library("train", seed, max(2, n // 3))
    rng, made = random.Random(f"pairs {seed}"), []
    for asked in questions(documents, "train", seed, n):
        chunks = [chunk.text for chunk in cut(asked.source, documents[asked.source].text, 1, 0)]
        right = chunks.pop(asked.sentence - 1)
        if chunks:
            made.append((world.pick(rng, (asked.question, asked.named)), right, world.pick(rng, chunks)))
    return made


@chain.command
def main(argv=None) -> dict:
    """Print a document and questions."""
    config, started = chain.parse(Config, argv, __doc__), time.perf_counter()
    documents = library("held-out", config.seed)
    source = next(iter(documents))
    print(f"--- {source}", documents[source].text, "--- questions", sep="\n")
    for asked in questions(documents, "held-out", config.seed, 5):
        print(f"{asked.question}  {asked.answer}  [{asked.source}:{asked.sentence}]")
    print("--- without an answer", *unanswerable(documents, config.seed, 4), sep="\n")
    metrics = {"documents": len(documents), "names_share_a_word": sharing(documents)}
    chain.report("library.py", config, metrics, time.perf_counter() - started)
    return metrics


if __name__ == "__main__":
    main()
