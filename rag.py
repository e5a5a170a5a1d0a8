"""Retrieval-augmented generation: the model answers from documents that its weights have never seen.

    find     the chunks that are near the question (retrieve.py)
    read     each chunk alone, and answer from it; the answer that the model finds likeliest wins (Lewis 2020
             sums over the chunks, RAG-Sequence). In one prompt they are too much for a small model
    check    what an answer names must stand in its chunk; if no answer passes, it is "I don't know."
    quote    the chunk of the answer is its source

    python rag.py                            questions to the library (2 minutes, exact 92 %)
    python rag.py --ask "Who is the mayor of Sugar Isle?"
    python rag.py --docs FOLDER              your own .txt and .md files; without --ask a conversation

The vectors are those of the assistant itself, tuned once (embed.py tunes them anew). The index is kept in
out/library_2.npz or out/docs_2.npz (chunks of 2 sentences); only files that have changed are taken in anew.

Left out: asking again with other words, reading on in the same document. Papers: Lewis 2020 (RAG), Gao 2023
(ALCE: answers with sources).
"""

import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import chain
import dialogue
import library
from asking import UNKNOWN, message
from bpe import Tokenizer
from checkpoint import load_model, newest_checkpoint
from embed import open_embedder
from exam import answer_all, would_say
from model import GPT
from retrieve import OVERLAP, SIZE, Chunk, Index, join, recall, reciprocal_rank
from sample import chat_prompt

WAYS = ("bm25", "dense", "fused", "reranked")
ANSWER = 60  # tokens kept free for the answer
EDITS = 20   # documents that are changed
UNANSWERED = (-math.inf, UNKNOWN, None)  # (log p, answer, source)


@dataclass
class Config:
    """The flags of `python rag.py`."""
    out: str = chain.option("out", "folder for everything that is made")
    checkpoint: str | None = chain.option(None, "assistant that reads (default: the newest room's in --out)")
    docs: str | None = chain.option(None, "folder of .txt and .md files in place of the library")
    ask: str | None = chain.option(None, "a question; the answer is printed with its source")
    chunks: int = chain.option(5, "chunks that the model reads")
    questions: int = chain.option(300, "questions to the library")
    seed: int = chain.option(0, "seed of the library, its questions and the pairs")
    device: str = chain.option("auto", "auto, cpu, cuda or mps")


def open_index(name: str, documents: dict[str, str], c, size: int, overlap: int) -> Index:
    """Return the index of these documents, kept in <out>/<name>.npz; only what changed is taken in anew.

    `c` are a script's flags: out, checkpoint, seed and device are used.
    """
    path, vectors = Path(c.out, f"{name}.npz"), open_embedder(c)
    index = Index.load(path, vectors) if path.exists() else None
    if index is None or (index.size, index.overlap) != (size, overlap):
        index = Index(vectors, size, overlap)
    index.remove({chunk.source for chunk in index.chunks.values()} - set(documents))
    index.update(documents)
    index.save(path)
    return index


# -------------------------------------------------------------------------------------------- the answer

def prompt(question: str, chunks: list[Chunk]) -> list[dict]:
    """Return the conversation in which the model reads the chunks and then the question."""
    return [message("user", f"{join(chunks)}\n{question}".strip())]


def fit_in(tokenizer: Tokenizer, question: str, chunks: list[Chunk], context: int) -> list[Chunk]:
    """Return as many of the chunks, from the first on, as fit into a prompt with the question and an answer.

    Raises UserError if the question alone does not fit.
    """
    for n in range(len(chunks), -1, -1):
        tokens = len(chat_prompt(tokenizer, prompt(question, chunks[:n])))
        if tokens + ANSWER <= context:
            return chunks[:n]
    raise chain.UserError(f"the question is {tokens:,} tokens long, the context holds {context:,} with an "
                          f"answer of {ANSWER}: shorten it")


def names_in(text: str) -> set[str]:
    """Return the names and numbers of a text: what must not be made up. Any first word may have a capital.

    >>> sorted(names_in("The mayor of Sugar Isle is Olga Page, 80."))
    ['80', 'Isle', 'Olga', 'Page', 'Sugar']
    """
    return set(re.findall(r"\d+|(?<!^)\b[A-Z]\w+", text))


def backs(chunk: Chunk, question: str, said: str | None) -> bool:
    """Return whether a chunk holds all names and numbers of an answer, those of the question among them."""
    if not said or said == UNKNOWN:
        return False
    wanted = names_in(said) | {name for name in names_in(question) if name in said}
    return wanted <= set(re.findall(r"\w+", chunk.text))


def log_probs(model: GPT, tokenizer: Tokenizer, prompts: list[list[dict]], said: list[str]) -> list[float]:
    """Return log p of each answer to its conversation."""
    coded = [dialogue.encode_answer(tokenizer, *each) for each in zip(prompts, said)]
    return dialogue.log_probs(model, coded, model.device).tolist() if coded else []


def read_each(model: GPT, tokenizer: Tokenizer, questions: list[str],
              read: list[list[Chunk]]) -> list[list[tuple[float, str, Chunk | None]]]:
    """Return for each question, of each of its chunks read alone, (log p, answer, the chunk).

    Where the chunk does not back the answer that is (-inf, "I don't know.", None).
    """
    tries = [(i, chunk) for i, chunks in enumerate(read) for chunk in chunks]
    prompts = [prompt(questions[i], [chunk]) for i, chunk in tries]
    said = answer_all(model, tokenizer, prompts, ANSWER)
    good = [j for j, (i, chunk) in enumerate(tries) if backs(chunk, questions[i], said[j])]
    log_p = dict(zip(good, log_probs(model, tokenizer, [prompts[j] for j in good], [said[j] for j in good])))
    found = [[] for _ in questions]
    for j, (i, chunk) in enumerate(tries):
        found[i].append((log_p[j], said[j], chunk) if j in log_p else UNANSWERED)
    return found


def likeliest(tries: list[tuple[float, str, Chunk | None]]) -> tuple[str, Chunk | None]:
    """Return the (answer, source) that the model finds likeliest, or ("I don't know.", None)."""
    return max([UNANSWERED, *tries], key=lambda each: each[0])[1:]


def answer(model: GPT, tokenizer: Tokenizer, index: Index, question: str, k: int) -> tuple[str, Chunk | None]:
    """Search, read, answer. Prints when chunks are too long for the context, and are not read."""
    found = index.search(question, k)
    chunks = [chunk for chunk in found if fit_in(tokenizer, question, [chunk], model.config.context)]
    if len(chunks) < len(found):
        print(f"(only {len(chunks)} of {len(found)} chunks fit into the context)")
    return likeliest(read_each(model, tokenizer, [question], [chunks])[0])


# ---------------------------------------------------------------------------------------- what it brings

def tells(chunk: Chunk, asked: library.Asked) -> bool:
    """Return whether a chunk holds the sentence that answers a question."""
    return chunk.source == asked.source and asked.sentence - chunk.number in range(len(chunk.sentences))


def measure_search(index: Index, asked: list[library.Asked]) -> dict[str, float]:
    """Print and return recall@1, 3, 5 and the mean reciprocal rank (0 beyond 10) of each way.

    What is relevant is the one sentence that tells the fact; chunks that share it count once.
    """
    print(f"\n{'':<8} recall@1       @3       @5      MRR")
    metrics = {}
    for way in WAYS:
        marks = []
        for each in asked:
            found = [tells(chunk, each) for chunk in index.search(each.question, 10, way)]
            marks.append([recall(found, {True}, k) for k in (1, 3, 5)] + [reciprocal_rank(found, {True})])
        row = np.mean(marks, axis=0).tolist()
        print(f"{way:<8}" + "".join(f"{mark:>9.1%}" for mark in row))
        metrics |= dict(zip((f"{way}_recall_1", f"{way}_recall_3", f"{way}_recall_5", f"{way}_mrr"), row))
    return metrics


def measure_answers(model: GPT, tokenizer: Tokenizer, index: Index, asked: list[library.Asked],
                    unanswerable: list[str], k: int) -> dict[str, float]:
    """Print and return exact match: closed book, by chunks read, with the right chunk; what is unknown."""
    questions, wanted = [each.question for each in asked], [each.answer for each in asked]
    found = [index.search(question, max(k, 5)) for question in questions]

    def together(read: list[list[Chunk]]) -> float:
        read = [fit_in(tokenizer, *each, model.config.context) for each in zip(questions, read)]
        return float(np.mean(would_say(model, tokenizer, list(map(prompt, questions, read)), wanted)))

    tried = read_each(model, tokenizer, questions, found)
    alone = {n: [likeliest(tries[:n]) for tries in tried] for n in sorted({1, 3, 5, k})}
    exact = {n: float(np.mean([text == right for (text, _), right in zip(said, wanted)]))
             for n, said in alone.items()}
    metrics = {"closed_book": together([[] for _ in asked])}
    metrics |= {f"together_{n}": together([chunks[:n] for chunks in found]) for n in (1, 3, 5)}
    metrics |= {f"exact_{n}": exact[n] for n in (1, 3, 5)}
    metrics["right_chunk"] = together([[next(chunk for chunk in index.chunks.values() if tells(chunk, each))]
                                       for each in asked])
    quoted = [source.source == each.source for (_, source), each in zip(alone[k], asked) if source]
    metrics |= {"exact": exact[k], "right_source": float(np.mean(quoted)) if quoted else 0.0}
    tried = read_each(model, tokenizer, unanswerable, [index.search(each, k) for each in unanswerable])
    metrics["unknown"] = float(np.mean([likeliest(tries)[0] == UNKNOWN for tries in tried]))
    for key, value in metrics.items():
        print(f"{key:<20} {value:6.1%}")
    return metrics


def show_edits(model: GPT, tokenizer: Tokenizer, index: Index, asked: list[library.Asked],
               documents: dict[str, library.Document], k: int) -> float:
    """Change a fact in each of EDITS documents; return how often the answer followed. Print the first."""
    followed = []
    for each in asked:
        other = next((one.value for one in asked if one.fact == each.fact and one.value != each.value), None)
        before, source = answer(model, tokenizer, index, each.question, k)
        if not other or before != each.answer:
            continue
        index.update({each.source: documents[each.source].text.replace(each.value, other)})
        after, source_after = answer(model, tokenizer, index, each.question, k)
        if not followed:
            print(f"\n{each.question}\n{before} {source.place}")
            print(f"({each.source} is changed: {each.value} -> {other})")
            print(after, source_after.place if source_after else "")
        followed.append(after == each.answer.replace(each.value, other))
        if len(followed) == EDITS:
            break
    print(f"({sum(followed)} of {len(followed)} such changes were followed)")
    return sum(followed) / max(1, len(followed))


def read_folder(folder: str) -> dict[str, str]:
    """Return the texts of the .txt and .md files of a folder, by file name. UserError if one is no text."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    paths = sorted(path for path in files if path.suffix in (".txt", ".md"))
    chain.require(paths, f"--docs {folder}: no .txt or .md file there; give a folder that has some")
    texts = {}
    for path in paths:
        try:
            texts[str(path.relative_to(folder))] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise chain.UserError(f"{path}: not a UTF-8 text; convert it, or take it out of the folder")
        chain.require(texts[str(path.relative_to(folder))].strip(), f"{path}: an empty file; take it out")
    return texts


def open_documents(c, folder: str | None, size: int = SIZE, overlap: int = OVERLAP) -> tuple[dict, Index]:
    """Return (the library's documents by source, the index), or ({}, that of a folder)."""
    documents = {} if folder else library.library("held-out", c.seed)
    texts = read_folder(folder) if folder else {source: each.text for source, each in documents.items()}
    index = open_index(f"{'docs' if folder else 'library'}_{size}", texts, c, size, overlap)
    print(f"{len(texts):,} documents, {len(index.chunks):,} chunks")
    return documents, index


def load_assistant(c, load=load_model) -> tuple[GPT, Tokenizer]:
    """Return the assistant that c.checkpoint names, or the newest one. UserError if it can't chat."""
    path = Path(c.checkpoint or newest_checkpoint(c.out))
    model, tokenizer, content = load(path, c.device)
    chain.require(content.get("chat"), f"{path}: no assistant, it goes on with texts; run `python sft.py`")
    return model, tokenizer


def typed() -> Iterator[str]:
    """Yield the lines that are typed, up to an empty one."""
    sys.stdin.reconfigure(errors="replace")  # a byte that isn't UTF-8 shall not stop the program
    while True:
        print("> " if sys.stdin.isatty() else "", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


@chain.command
def main(argv=None) -> dict:
    """Answer one question, or talk, or measure."""
    c, started = chain.parse(Config, argv, __doc__), time.time()
    for field in ("chunks", "questions"):
        chain.require(getattr(c, field) > 0, f"--{field} {getattr(c, field)}: give at least 1")
    chain.require(c.ask is None or c.ask.strip(), '--ask "": give a question')
    c.device = chain.pick_device(c.device)
    model, tokenizer = load_assistant(c)
    documents, index = open_documents(c, c.docs)
    if c.docs or c.ask:
        for question in [c.ask] if c.ask else typed():
            try:
                said, source = answer(model, tokenizer, index, question, c.chunks)
                print(said, source.place if source else "")
            except chain.UserError as error:
                if c.ask:
                    raise
                print(f"(not asked: {error})")
        return {}
    asked = library.questions(documents, "held-out", c.seed, c.questions)
    unanswerable = library.unanswerable(documents, c.seed, max(2, c.questions // 2))
    metrics = {"documents": len(documents), "names_share_a_word": library.sharing(documents)}
    metrics |= measure_search(index, asked)
    metrics |= measure_answers(model, tokenizer, index, asked, unanswerable, c.chunks)
    metrics["edit_followed"] = show_edits(model, tokenizer, index, asked, documents, c.chunks)
    chain.report("rag.py", c, metrics, time.time() - started)
    return metrics


if __name__ == "__main__":
    main()
