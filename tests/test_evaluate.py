"""evaluate.py: each measure against its slow definition."""

import math
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bpe
import evaluate
import world
from model import GPT, GPTConfig


def kneser_ney(train, test, V, d=0.75) -> float:
    """The trigram model again, from its definition, with dictionaries."""
    trigrams = Counter(zip(train, train[1:], train[2:]))
    bigrams = Counter((b, c) for _, b, c in trigrams)
    unigrams = Counter(c for _, c in bigrams)

    def p(token, context, tables):
        if not tables:
            return 1 / V
        after = {key[-1]: n for key, n in tables[0].items() if key[:-1] == context}
        lower = p(token, context[1:], tables[1:])
        total = sum(after.values())
        return (max(after.get(token, 0) - d, 0) + d * len(after) * lower) / total if total else lower
    tables = [trigrams, bigrams, Counter({(c,): n for c, n in unigrams.items()})]
    losses = [-math.log(p(c, (a, b), tables)) for a, b, c in zip(test, test[1:], test[2:])]
    assert abs(sum(p(c, tuple(test[:2]), tables) for c in range(V)) - 1) < 1e-9, "the oracle is no law"
    return sum(losses) / len(losses)


def test_trigram_is_kneser_ney():
    rng = random.Random(0)
    train, test = [rng.randrange(6) for _ in range(80)], [rng.randrange(8) for _ in range(40)]
    ours = evaluate.trigram_loss(np.array(train, np.uint16), np.array(test, np.uint16), 8)
    assert ours == pytest.approx(kneser_ney(train, test, 8), abs=1e-9)


@pytest.mark.parametrize("n,most", [(33, 999), (40, 999), (9, 999), (100, 48), (1200, 999)])
def test_every_token_is_scored_once(n, most):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=20, context=16, depth=1, width=32, heads=1, kv_heads=1, hidden=32))
    ids = np.random.default_rng(0).integers(0, 20, n).astype(np.uint16)
    used, losses = ids[:most + 1], []
    for i in range(0, len(used) - 1, 16):
        window = torch.from_numpy(used[i:i + 17].astype(np.int64))
        losses += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="none").tolist()
    assert len(losses) == len(used) - 1
    assert evaluate.mean_loss(model, ids, 16, most) == pytest.approx(np.mean(losses), abs=1e-6)


class Copier(torch.nn.Module):
    """A model that repeats what followed when the last four tokens stood there before, else says token 0."""

    def __init__(self, copies: bool):
        super().__init__()
        self.config, self.copies = GPTConfig(context=4096), copies
        self.device = torch.device("cpu")

    def forward(self, ids):
        logits, seen = torch.zeros(*ids.shape, 300), {}
        for t in range(ids.shape[1]):
            last = tuple(ids[0, max(0, t - 3):t + 1].tolist())
            if self.copies and last in seen:
                logits[0, t, ids[0, seen[last] + 1]] = 1
            seen[last] = t
        return logits


def test_copying_is_what_it_says():
    tokenizer = bpe.train_bpe((world.document("train", 0, i) for i in range(20)), 300, bpe.SPECIAL_TOKENS)
    good, bad = (evaluate.copying(Copier(copies), tokenizer, 15) for copies in (True, False))
    assert good["copying_names"] == bad["copying_names"] > 10
    assert good["copying"] > 0.6, f"a model that looks back four tokens copies most names: {good['copying']}"
    assert bad["copying"] == bad["copying_whole_name"] == 0, "a model that never copies must score 0"
    assert good["copying_whole_name"] <= good["copying"]


def test_bits_per_byte_counts_bytes():
    model = GPT(GPTConfig(vocab_size=20, context=16, depth=1, width=32, heads=1, kv_heads=1, hidden=32))
    ids = np.random.default_rng(0).integers(0, 20, 400).astype(np.uint16)
    part = SimpleNamespace(ids=ids, n_bytes=800)
    metrics = evaluate.measure(model, SimpleNamespace(n_vocab=20), part, part, 0, 0)
    bits = metrics["validation_loss"] / math.log(2)
    assert metrics["bits_per_byte"] == pytest.approx(bits / 2), "400 tokens stand for 800 bytes"
