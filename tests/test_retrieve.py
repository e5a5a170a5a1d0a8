"""retrieve.py and embed.py: scores by their formulas, and an index that changes as a new one would be."""

import io
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import retrieve
from bpe import train_bpe
from chain import UserError
from embed import encode, info_nce, mean_pooled, vectors_by
from model import GPT, GPTConfig
from retrieve import BM25, Index, cut, fuse, ranked, recall, reciprocal_rank, split_sentences, words_of

TEXTS = ["The mayor of Rocky Fair is Olive Smart.", "Rocky Hill has a mayor. The mayor is old.",
         "A fair is held on Monday, a big fair.", "Nothing here.", "mayor mayor mayor"]


def bm25_by_hand(query: str, texts: list[str], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Robertson 2009, eq. 3.15, with Lucene's idf."""
    words = [words_of(text) for text in texts]
    mean = sum(map(len, words)) / len(words)
    scores = []
    for own in words:
        score = 0.0
        for word in words_of(query):
            n, tf = sum(word in each for each in words), own.count(word)
            idf = math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
            score += idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(own) / mean))
        scores.append(score)
    return scores


def bm25_of(texts: list[str]) -> BM25:
    bm25 = BM25()
    for number, text in enumerate(texts):
        bm25.add(number, text)
    return bm25


@pytest.mark.parametrize("query", ["mayor of Rocky Fair", "fair fair", "nobody", "", "MAYOR?"])
def test_bm25_by_its_formula(query):
    wanted, found = bm25_by_hand(query, TEXTS), bm25_of(TEXTS).scores(query)
    assert {i for i, score in enumerate(wanted) if score} == set(found), "each text that has a word, no other"
    for i, score in found.items():
        assert score == pytest.approx(wanted[i], abs=1e-9), f"text {i} for {query!r}"


def test_a_word_in_every_text_never_counts_below_zero():
    """With the idf of 1976 a word that most texts have would lower the score."""
    assert all(score > 0 for score in bm25_of(["a b", "a c", "a d"]).scores("a").values())


def test_forgotten_texts_leave_no_trace():
    bm25 = bm25_of([*TEXTS, "Rocky Fair again, mayor!"])
    bm25.scores("mayor of Rocky Fair")  # what it keeps ready must not stay
    bm25.remove(5, "Rocky Fair again, mayor!")
    assert bm25.scores("mayor of Rocky Fair") == pytest.approx(bm25_of(TEXTS).scores("mayor of Rocky Fair"))
    for number, text in enumerate(TEXTS):
        bm25.remove(number, text)
    assert bm25.scores("mayor") == {}, "an empty index finds nothing"


def test_rank_fusion_by_its_formula():
    scores = fuse([["a", "b", "c"], ["c", "a"]])
    assert scores == pytest.approx({"a": 1 / 61 + 1 / 62, "b": 1 / 62, "c": 1 / 63 + 1 / 61})
    assert ranked({3: 1.0, 1: 1.0, 2: 2.0}) == [2, 1, 3], "among equals the lower number comes first"


def test_recall_and_reciprocal_rank():
    assert [recall([5, 3, 1], {1, 3}, k) for k in (1, 2, 3)] == [0, 0.5, 1]
    assert [reciprocal_rank([5, 3, 1], each) for each in ({5}, {1, 3}, {9})] == [1, 0.5, 0]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("size, overlap", [(1, 0), (3, 1), (3, 2)])
def test_chunks_hold_every_sentence(n, size, overlap):
    sentences = [f"Sentence {i}." for i in range(1, n + 1)]
    chunks = cut("a.txt", " ".join(sentences), size, overlap)
    assert {each for chunk in chunks for each in chunk.sentences} == set(sentences)
    for chunk in chunks:
        assert chunk.sentences[0] == sentences[chunk.number - 1], "`number` is the first sentence's"
    for chunk, following in zip(chunks, chunks[1:]):
        assert chunk.sentences[size - overlap:] == following.sentences[:overlap], "neighbours overlap"
    assert not any(set(chunk.sentences) < set(other.sentences) for chunk in chunks for other in chunks)


def test_a_title_goes_with_every_chunk():
    chunks = cut("a.txt", "# Amber Hollow\n\nIt is old. It is small.", 1, 0)
    assert [chunk.text for chunk in chunks] == ["Amber Hollow. It is old.", "Amber Hollow. It is small."]
    assert cut("a.txt", "It is old.\nIt is small.", 1, 0)[0].title == "", "a sentence is no title"
    assert [chunk.text for chunk in cut("a.txt", "Just a heading")] == ["Just a heading"]
    assert cut("a.txt", " \n ") == [] and split_sentences("") == []


def test_mean_pooling_leaves_out_what_fills_up():
    hidden = torch.randn(2, 5, 4, generator=torch.manual_seed(0))
    mask = torch.tensor([[1., 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    found = mean_pooled(hidden, mask)
    assert torch.allclose(found[1], F.normalize(hidden[1, :2].mean(dim=0), dim=-1), atol=1e-6)
    assert torch.allclose(found.norm(dim=-1), torch.ones(2)), "vectors have length 1"


def test_a_text_has_the_same_vector_alone_and_in_a_batch():
    tokenizer = train_bpe(TEXTS, 300)
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=300, context=16, depth=1, width=32, heads=2, kv_heads=2, hidden=32)
    model = GPT(config).eval()
    together = vectors_by(model, tokenizer)([*TEXTS, ""])
    for text, vector in zip(TEXTS, together):
        assert np.abs(encode(model, tokenizer, [text])[0].detach().numpy() - vector).max() < 1e-5, text
    assert np.isfinite(together).all(), "an empty text has a vector too"


def test_info_nce_by_its_formula():
    torch.manual_seed(0)
    queries, chunks = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    cosine = [[float(q @ d / q.norm() / d.norm()) for d in chunks] for q in queries]
    wanted = -sum(math.log(math.exp(20 * row[i]) / sum(math.exp(20 * x) for x in row))
                  for i, row in enumerate(cosine)) / 3
    assert info_nce(queries, chunks).item() == pytest.approx(wanted, abs=1e-6)


def by_letters(texts: list[str]) -> np.ndarray:
    """Vectors that count letters, of length 1."""
    letters = "abcdefghijklmnopqrst"
    counts = np.array([[text.lower().count(letter) + 0.01 for letter in letters] for text in texts])
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def found_by(index: Index) -> list:
    return [[chunk.place for chunk in index.search(query, 5, way)]
            for query in ("old mayor", "the fair on Monday")
            for way in ("bm25", "dense", "fused", "reranked")]


def test_an_index_that_was_changed_is_as_a_new_one():
    rng, words = random.Random(0), "the mayor old fair monday tuesday river is small big".split()

    def text() -> str:
        return " ".join(" ".join(rng.sample(words, 4)).capitalize() + "." for _ in range(5))

    documents = {f"{i}.txt": text() for i in range(8)}
    index = Index(by_letters)
    index.update(documents | {"7.txt": "Old."})
    index.update({"8.txt": text()})
    index.remove({"8.txt"})
    index.update(documents)
    new = Index(by_letters)
    new.update(documents)
    assert found_by(index) == found_by(new), "added, changed and removed: as if it had been built anew"


def test_what_did_not_change_is_not_read_again():
    read = []

    def encode(texts):
        read.extend(texts)
        return by_letters(texts)

    index = Index(encode)
    index.update({"a.txt": "Old.", "b.txt": "Small."})
    index.update({"a.txt": "Old.", "b.txt": "Big."})
    assert read == ["Old.", "Small.", "Big."]


def test_reranked_are_the_best_by_words_in_the_order_of_their_vectors(monkeypatch):
    monkeypatch.setattr(retrieve, "CANDIDATES", 3)
    index = Index(by_letters, 1, 0)
    index.update({f"{i}.txt": text for i, text in enumerate(TEXTS)})
    for query in ("old mayor", "the fair on Monday", "nothing of it"):
        words, near = (index.search(query, 100, way) for way in ("bm25", "dense"))
        wanted = [chunk for chunk in near if chunk in words[:3]]
        assert index.search(query, 100, "reranked") == wanted, f"{query}: words choose, vectors order"
        cosines = [float(by_letters([query])[0] @ by_letters([chunk.text])[0]) for chunk in wanted]
        for least in [cosine - 1e-6 for cosine in cosines]:
            near = [chunk for chunk, cosine in zip(wanted, cosines) if cosine >= least]
            assert index.search(query, 100, "reranked", least) == near, "what is too far is not found"


def test_a_saved_index_finds_the_same(tmp_path):
    index = Index(by_letters, 2, 1)
    index.update({f"{i}.txt": text for i, text in enumerate(TEXTS)})
    index.save(tmp_path / "index.npz")
    again = Index.load(tmp_path / "index.npz", by_letters)
    assert found_by(again) == found_by(index) and (again.size, again.overlap) == (2, 1)


def array_file(value) -> bytes:
    file = io.BytesIO()
    np.save(file, value) if isinstance(value, np.ndarray) else np.savez(file, **value)
    return file.getvalue()


def flipped(place: int, bit: int) -> bytes:
    """An index in whose list of files one bit is wrong: it asks for a password, or for another packing."""
    content = bytearray(array_file({"cut": (2, 1), "vectors": np.zeros((0, 1)), "chunks": np.array("[]")}))
    content[content.index(b"PK\x01\x02") + 2 + place] ^= bit
    return bytes(content)


@pytest.mark.parametrize("content", [
    b"", b"no index", b"PK\x03\x04 cut off", array_file(np.zeros(3)),
    array_file({"cut": (2, 1), "vectors": np.zeros((1, 3)), "chunks": np.array('[{"source": "a"}]')}),
    array_file({"cut": (2, 1), "vectors": np.zeros((1, 3)), "chunks": np.array("7")}),
    flipped(6, 1), flipped(8, 1)])
def test_a_file_that_is_no_index(content, tmp_path):
    path = tmp_path / "index.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match="index.npz"):
        Index.load(path, by_letters)


def test_a_wrapped_text_has_no_title():
    wrapped = "Amber Hollow, which is a town on the river Salt and has a market, is\nold. It is small."
    assert [chunk.text for chunk in cut("a.txt", wrapped)] == [
        "Amber Hollow, which is a town on the river Salt and has a market, is old. It is small."]
    assert cut("a.txt", "Its mayor is\nnobody. It is small.")[0].text == "Its mayor is nobody. It is small."


def test_an_empty_index_finds_nothing(tmp_path):
    index = Index(by_letters)
    index.save(tmp_path / "index.npz")
    assert Index.load(tmp_path / "index.npz", by_letters).search("mayor", 3) == []
