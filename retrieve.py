"""Find the passage that answers a question: by its words, by its meaning, and by both.

    chunks   a text is cut by sentences, a few at a time, so that neighbours share some
    BM25     Σ over words of the query: idf · tf (k1 + 1) / (tf + k1 (1 - b + b · length / mean length))
             idf = ln(1 + (N - n + ½) / (n + ½)), n of N chunks have the word (Lucene's, never negative)
    dense    the cosine of two vectors, the query's and the chunk's
    fused    Σ over rankings 1 / (60 + rank): needs no common scale of the scores
    reranked words choose CANDIDATES chunks, vectors order them

Words find rare names and miss other wordings ("Who leads" / "The mayor of"); vectors the other way round.
What makes vectors near is learned: embed.py. An Index holds chunks for both ways; documents can be added,
changed and removed one by one. rag.py uses it.

Left out: stemming, approximate search (10,000 vectors are one product of matrices), a second model that ranks
anew. Papers: Robertson 2009 (BM25), Cormack 2009 (fusion), Karpukhin 2020 (DPR).
"""

import io
import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import chain

SIZE, OVERLAP = 2, 1  # sentences of a chunk, and those that it shares with the next one
TITLE = 60            # signs that a title has at most: a longer line is the first of a wrapped text
CANDIDATES = 20       # chunks that are reranked


# ---------------------------------------------------------------------------------------------- chunks

def titled(title: str, sentences: Iterable[str]) -> str:
    """Return sentences after their title, in one line.

    subtle: a sentence that begins a line begins with a token without a space, "Ed" for " Ed". A small model
    that copies its first name into an answer, where it has a space, fails in four cases of five.

    >>> titled("Letters", ["A.", "B."]), titled("", ["A."])
    ('Letters. A. B.', 'A.')
    """
    return f"{title}. {' '.join(sentences)}" if title else " ".join(sentences)


@dataclass(frozen=True)
class Chunk:
    """A few sentences of a document: those from `number` on, counted from 1."""
    source: str
    number: int
    sentences: tuple[str, ...]
    title: str  # of the document: it tells who "it" is

    @property
    def text(self) -> str:
        """What is searched and read. See `titled`."""
        return titled(self.title, self.sentences)

    @property
    def place(self) -> str:
        """Where it stands: [place.txt:2]."""
        return f"[{self.source}:{self.number}]"


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text.

    >>> split_sentences("It rains. Does it?\\nYes: 3.5 inches!")
    ['It rains.', 'Does it?', 'Yes: 3.5 inches!']
    """
    return [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n{2,}", text.strip()) if part]


def cut(source: str, text: str, size: int = SIZE, overlap: int = OVERLAP) -> list[Chunk]:
    """Return the chunks of a document: `size` sentences each, `overlap` of them also in the next one.

    A short first line that is no sentence is the title, as "# Amber Hollow"; each chunk carries it.

    >>> [chunk.text for chunk in cut("a.txt", "# Letters\\nA. B. C. D.", 2, 1)]
    ['Letters. A. B.', 'Letters. B. C.', 'Letters. C. D.']
    """
    title, _, body = text.strip().partition("\n")
    if not body or len(title) > TITLE or body[0].islower() or title.rstrip().endswith((".", "!", "?")):
        title, body = "", text
    sentences = split_sentences(body)
    starts = range(0, max(1, len(sentences) - overlap), size - overlap)
    return [Chunk(source, start + 1, tuple(sentences[start:start + size]), title.lstrip("# "))
            for start in starts if sentences]


def join(chunks: list[Chunk]) -> str:
    """Return what a model reads of chunks: those of a document together, no sentence twice, titles first.

    >>> join(cut("a.txt", "Letters\\nA. B. C.", 2, 1))
    'Letters. A. B. C.'
    """
    titles, sentences = {}, defaultdict(dict)  # by source; and there by number
    for chunk in chunks:
        titles[chunk.source] = chunk.title
        sentences[chunk.source] |= dict(enumerate(chunk.sentences, chunk.number))
    return "\n".join(titled(title, [told for _, told in sorted(sentences[source].items())])
                     for source, title in titles.items())


# ------------------------------------------------------------------------------------ by words, and by both

def words_of(text: str) -> list[str]:
    """Return the words of a text, in small letters."""
    return re.findall(r"\w+", text.lower())


class BM25:
    """An inverted index: for each word, the texts that have it and how often."""

    def __init__(self, k1: float = 1.5, b: float = 0.75):
        self.k1, self.b = k1, b
        self.counts = defaultdict(dict)  # word -> {number of the text: tf}
        self.lengths = {}                # number of the text -> its words
        self.tables = {}                 # word -> (numbers, tf) as arrays, made when first asked for

    def add(self, number: int, text: str) -> None:
        """Take in a text under a new number."""
        words = words_of(text)
        self.lengths[number] = len(words)
        for word in words:
            self.counts[word][number] = self.counts[word].get(number, 0) + 1
            self.tables.pop(word, None)

    def remove(self, number: int, text: str) -> None:
        """Forget the text of that number."""
        del self.lengths[number]
        for word in set(words_of(text)):
            del self.counts[word][number]
            self.tables.pop(word, None)

    def scores(self, query: str) -> dict[int, float]:
        """Return the score of each text that has a word of the query. A word said twice counts twice."""
        if not self.lengths:
            return {}
        lengths = np.zeros(max(self.lengths) + 1)
        lengths[list(self.lengths)] = list(self.lengths.values())
        mean, N, total = lengths.sum() / len(self.lengths), len(self.lengths), np.zeros(len(lengths))
        for word in words_of(query):
            if found := self.counts.get(word):
                if word not in self.tables:
                    self.tables[word] = np.array(list(found)), np.array(list(found.values()), dtype=float)
                numbers, tf = self.tables[word]
                idf = np.log(1 + (N - len(tf) + 0.5) / (len(tf) + 0.5))
                norm = self.k1 * (1 - self.b + self.b * lengths[numbers] / mean)
                total[numbers] += idf * tf * (self.k1 + 1) / (tf + norm)
        return {int(number): total[number] for number in np.flatnonzero(total)}


def ranked(scores: dict[int, float]) -> list[int]:
    """Return the numbers with the highest scores first; among equals the lower number."""
    numbers, values = np.array(list(scores), dtype=int), np.array(list(scores.values()), dtype=float)
    return numbers[np.lexsort((numbers, -values))].tolist()


def fuse(rankings: list[list[int]], k: int = 60) -> dict[int, float]:
    """Return the score Σ 1 / (k + rank) of every number in the rankings, rank from 1 (Cormack 2009, eq. 1).

    >>> ranked(fuse([[7, 8, 9], [8, 9]]))
    [8, 9, 7]
    """
    scores = defaultdict(float)
    for ranking in rankings:
        for rank, number in enumerate(ranking, 1):
            scores[number] += 1 / (k + rank)
    return dict(scores)


# ------------------------------------------------------------------------------------------- the index

class Index:
    """Chunks of documents, to be found by words and by vectors. `encode(texts)` gives vectors (n, C)."""

    def __init__(self, encode, size: int = SIZE, overlap: int = OVERLAP):
        self.encode, self.size, self.overlap = encode, size, overlap
        self.chunks, self.vectors, self.bm25, self.next = {}, {}, BM25(), 0  # by number
        self.matrix = None  # all vectors (chunks, C), made when first asked for

    def update(self, documents: dict[str, str]) -> None:
        """Take in documents, text by source. One that is there already is replaced; if it is equal, kept."""
        chunks = {source: cut(source, text, self.size, self.overlap) for source, text in documents.items()}
        there = defaultdict(list)
        for chunk in self.chunks.values():
            there[chunk.source].append(chunk)
        changed = {source for source in chunks if chunks[source] != there[source]}
        self.remove(changed)
        new = [chunk for source in chunks if source in changed for chunk in chunks[source]]
        for chunk, vector in zip(new, self.encode([chunk.text for chunk in new]) if new else ()):
            self.put(chunk, vector)

    def put(self, chunk: Chunk, vector: np.ndarray) -> None:
        """Take in one chunk and its vector (C,)."""
        self.chunks[self.next], self.vectors[self.next] = chunk, vector
        self.bm25.add(self.next, chunk.text)
        self.next, self.matrix = self.next + 1, None

    def remove(self, sources: set[str]) -> None:
        """Forget documents."""
        for number in [number for number, chunk in self.chunks.items() if chunk.source in sources]:
            self.bm25.remove(number, self.chunks.pop(number).text)
            del self.vectors[number]
            self.matrix = None

    def search(self, query: str, k: int, way: str = "fused", least: float = -1.0) -> list[Chunk]:
        """Return the k best chunks, the best first; `way` is bm25, dense, fused or reranked.

        A chunk whose cosine with the query is below `least` is not found by its vector. Of each ranking the
        first 100 are fused.
        """
        rankings = []
        if way != "dense":
            rankings.append(ranked(self.bm25.scores(query)))
        if way != "bm25" and self.chunks:
            if self.matrix is None:
                self.matrix = np.stack(list(self.vectors.values()))  # (chunks, C)
            near = dict(zip(self.vectors, (self.matrix @ self.encode([query])[0]).tolist()))
            rankings.append([number for number in ranked(near) if near[number] >= least])
        if way == "reranked":
            chosen = set(rankings[0][:CANDIDATES])
            rankings = [[number for number in rankings[-1] if number in chosen]]
        return [self.chunks[number] for number in ranked(fuse([ranking[:100] for ranking in rankings]))[:k]]

    def save(self, path) -> None:
        """Write chunks and vectors to a .npz file."""
        chunks = json.dumps([asdict(chunk) for chunk in self.chunks.values()])
        vectors = np.stack(list(self.vectors.values())) if self.vectors else np.zeros((0, 1))
        packed = io.BytesIO()
        np.savez(packed, chunks=np.array(chunks), vectors=vectors, cut=(self.size, self.overlap))
        chain.write_whole(path, lambda file: file.write(packed.getvalue()))

    @classmethod
    def load(cls, path, encode) -> "Index":
        """Return the index that `save` wrote. Raises UserError if it is none."""
        chain.require(Path(path).is_file(), f"{path}: no such index; `python rag.py` makes one")
        try:
            with np.load(path, allow_pickle=False) as found:
                index, vectors = cls(encode, *map(int, found["cut"])), found["vectors"]
                for chunk, vector in zip(json.loads(str(found["chunks"])), vectors):
                    index.put(Chunk(**chunk | {"sentences": tuple(chunk["sentences"])}), vector)
        except (ValueError, TypeError, KeyError, OSError, EOFError, RuntimeError, zipfile.BadZipFile):
            raise chain.UserError(f"{path}: cut off or no index; delete it, it is made again")
        return index


# ------------------------------------------------------------------------------------------- how good is it

def recall(found: list, relevant: set, k: int) -> float:
    """Return which share of what is relevant is among the first k found.

    >>> recall([3, 1, 2], {1, 9}, 2)
    0.5
    """
    return len(relevant & set(found[:k])) / len(relevant)


def reciprocal_rank(found: list, relevant: set) -> float:
    """Return 1 / the rank of the first relevant one, from 1; 0 if none is found. Its mean is the MRR.

    >>> reciprocal_rank([3, 1, 2], {1, 2})
    0.5
    """
    return next((1 / rank for rank, each in enumerate(found, 1) if each in relevant), 0.0)
