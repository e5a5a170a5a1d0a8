"""How good is a model? Its loss on text it never saw, beside a trigram model's, and whether it can copy.

    loss            mean of -log p(token | the tokens before it), in nats a token
    bits per byte   loss / ln 2 * tokens / bytes: compares models with different tokenizers
    trigram         the loss of a table of counts that sees two tokens back, made from the training text: a
                    million tokens here, all that the model has read (up to ten million) in train.py
    copying         how often the second word of a never-seen two-word name is right at its second mention,
                    given the first word. The words are known, their combination is new: only looking back
                    finds it.

    python evaluate.py                                   the newest model on the small world (half a minute)
    python evaluate.py --checkpoint X.pt --data FILE     any checkpoint on any text

The trigram model is interpolated Kneser-Ney with one discount, the strongest of the plain counting models.
Left out: the marks of an assistant, see exam.py. Papers: Kneser & Ney 1995, Chen & Goodman 1999, Olsson
2022 (copying by "induction heads": find where the token stood before, copy what followed).
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import chain
import data
import world
from bpe import Tokenizer
from checkpoint import load_model, newest_checkpoint
from model import GPT

MOST_TOKENS = 1_000_000  # of held-out text, and ten times that of training text: more moves no measure


@dataclass
class Config:
    """The flags of `python evaluate.py`."""
    data: str = chain.option("world", "world, a file, a folder, an http(s) address, or stdlib")
    out: str = chain.option("out", "folder for everything that is made")
    checkpoint: str | None = chain.option(None, "checkpoint to read (default: the newest room's in --out)")
    documents: int = chain.option(400, "held-out documents of the world in which copying is looked for")
    seed: int = chain.option(0, "seed of the world")
    device: str = chain.option("auto", "auto, cpu, cuda or mps")


@torch.no_grad()
def mean_loss(model: GPT, ids: np.ndarray, context: int, most_tokens: int) -> float:
    """Return the mean loss in nats a token on the first `most_tokens` of `ids`, in windows side by side.

    Every token but the first is predicted once; the last window may be shorter.
    """
    device, n, total = model.device, min(len(ids) - 1, most_tokens), 0.0
    step = 32 * context  # tokens at once
    for start in range(0, n, step):
        rows = torch.from_numpy(ids[start:min(start + step, n) + 1].astype(np.int64)).to(device)
        whole = (len(rows) - 1) // context * context
        for x, y in ((rows[:whole].view(-1, context), rows[1:whole + 1].view(-1, context)),  # (windows, T)
                     (rows[None, whole:-1], rows[None, whole + 1:])):  # (1, what is left)
            if y.numel():
                total += F.cross_entropy(model(x).float().flatten(0, 1), y.flatten(), reduction="sum").item()
    return total / n


@torch.no_grad()
def copying(model: GPT, tokenizer: Tokenizer, documents: int, seed: int = 0) -> dict[str, float]:
    """Return how often names are repeated right at their second mention in held-out documents of the world.

    "copying" is the second word given the first; "copying_whole_name" counts the first word too, though a
    document may well go on otherwise there. Right means greedy: every token of it is the likeliest one.
    """
    rights, start, device = [], tokenizer.special["<|endoftext|>"], model.device
    for i in range(documents):
        text = world.document("held-out", seed, i)
        whole = torch.tensor([[start, *tokenizer.encode(text)]], device=device)[:, :model.config.context]
        guess = model(whole).argmax(dim=-1)[0]  # (T,): guess[t] stands for token t + 1
        for begin, end in world.second_mentions(text):
            places = max(0, begin - 1), text.index(" ", begin), end
            cuts = [1 + len(tokenizer.encode(text[:at])) for at in places]
            if cuts[2] <= whole.shape[1]:
                right = guess[cuts[0] - 1:cuts[2] - 1] == whole[0, cuts[0]:cuts[2]]  # one a token of the name
                rights.append((bool(right[cuts[1] - cuts[0]:].all()), bool(right.all())))
    second, name = np.mean(rights, axis=0).tolist() if rights else (math.nan, math.nan)
    return {"copying": second, "copying_whole_name": name, "copying_names": len(rights)}


def look_up(table: tuple[np.ndarray, np.ndarray], codes: np.ndarray) -> np.ndarray:
    """Return the count of each code, 0 where the table has none."""
    keys, counts = table
    place = np.searchsorted(keys, codes).clip(max=len(keys) - 1)
    return np.where(keys[place] == codes, counts[place], 0)


def trigram_loss(train: np.ndarray, held_out: np.ndarray, vocab_size: int, discount: float = 0.75) -> float:
    """Return the loss in nats a token of an interpolated Kneser-Ney trigram model (Chen 1999, eq. 24).

        p(c | a b) = max(n(abc) - d, 0) / n(ab) + d · kinds(ab) / n(ab) · p(c | b)

    where kinds(ab) is how many different tokens followed ab, and p(c | b) counts in how many different
    contexts bc stood in place of how often. p(c | b) backs off to p(c) alike, and p(c) to 1 / V.
    """
    V, p = vocab_size, 1 / vocab_size
    a, b, c = (held_out[i:len(held_out) - 2 + i].astype(np.int64) for i in range(3))
    ids = train.astype(np.int64)
    # Each table: the distinct codes in order, and how often each stands there.
    trigrams = np.unique((ids[:-2] * V + ids[1:-1]) * V + ids[2:], return_counts=True)
    bigrams = np.unique(trigrams[0] % (V * V), return_counts=True)  # n(bc): in how many trigrams
    unigrams = np.unique(bigrams[0] % V, return_counts=True)
    orders = ((unigrams, 0 * c, c), (bigrams, b, b * V + c), (trigrams, a * V + b, (a * V + b) * V + c))
    for table, context, token in orders:
        keys, counts = table
        seen = np.unique(keys // V, return_inverse=True)
        totals = seen[0], np.bincount(seen[1], weights=counts)
        kinds = seen[0], np.bincount(seen[1])
        n, k = look_up(totals, context), look_up(kinds, context)
        own = np.maximum(look_up(table, token) - discount, 0)
        p = np.where(n > 0, (own + discount * k * p) / np.maximum(n, 1), p)
    return float(-np.log(p).mean())


@chain.command
def main(argv=None) -> dict:
    """Measure a checkpoint on a text's held-out part."""
    config, started = chain.parse(Config, argv, __doc__), time.time()
    config.device = chain.pick_device(config.device)
    path = Path(config.checkpoint) if config.checkpoint else newest_checkpoint(config.out)
    model, tokenizer, _ = load_model(path, config.device)
    source = data.open_source(config.data, Path(config.out), config.seed)
    train, held_out = data.token_files(source, tokenizer, Path(config.out), tokens=1_000_000)
    documents = config.documents if config.data == "world" else 0
    metrics = measure(model, tokenizer, train, held_out, documents, config.seed)
    chain.report("evaluate.py", config, metrics, time.time() - started)
    return metrics


def measure(model: GPT, tokenizer: Tokenizer, train, held_out, documents: int, seed: int) -> dict[str, float]:
    """Return all measures of a model, on at most MOST_TOKENS of each part of a text (data.Tokens).

    Copying is looked for in so many `documents` of the world; 0 for other texts.
    """
    loss = mean_loss(model, held_out.ids, model.config.context, MOST_TOKENS)
    trigram = trigram_loss(train.ids[:10 * MOST_TOKENS], held_out.ids[:MOST_TOKENS], tokenizer.n_vocab)
    metrics = {"validation_loss": loss, "trigram_loss": trigram, "below_trigram": 1 - loss / trigram,
               "bits_per_byte": loss / math.log(2) * len(held_out.ids) / held_out.n_bytes}
    return metrics | (copying(model, tokenizer, documents, seed) if documents else {})


if __name__ == "__main__":
    main()
