"""Speculative decoding: a quick draft guesses some tokens, and the model checks them all in one pass.

    guess    x_1 … x_n, each drawn from the draft's law q_i
    check    one pass of the model gives its own laws p_1 … p_{n+1}
    accept   x_i with probability min(1, p_i(x_i) / q_i(x_i)), up to the first that is rejected
    then     in its place draw from norm(max(p_i - q_i, 0)); if none was rejected, one more token from p_{n+1}

What comes out has exactly the law of the model alone, whatever the draft; greedy, it is the same text. With
α = Σ min(p, q), the chance that a guess is accepted, a round brings (1 - α^(n+1)) / (1 - α) tokens on average
where α is the same everywhere. A round costs n steps of the draft and one pass: a small draft that is often
right pays. The cheapest draft is no model at all: it looks up how what was just said went on before.

    python speculative.py                    out/base.pt with out/draft.pt and with look-up (2 minutes)
    python sample.py --draft out/draft.pt    write with it; --draft ngram looks up

Greedy on held-out documents, look-up brings 3.4 tokens a round and 1.6 times plain decoding's speed; where a
list is said again, 5.9 tokens and 2.4 times. The trained draft brings 2.7 tokens and is no faster than none:
a step of its one layer takes four tenths of the time of the model's four; three and a check cost as much.

Left out: trees of guesses (Medusa, EAGLE), several prompts at once, the repetition penalty.
Papers: Leviathan 2023 (algorithm 1, equation 1), Chen 2023; Saxena 2023 (prompt look-up).
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import chain
import world
from checkpoint import load_model
from decode import few_threads, filter_logits, generate
from model import GPT, KVCache

GUESSES = {"draft": 3, "ngram": 8}  # at once: a step of a draft is dear, a look-up costs nothing


@dataclass
class Config:
    """The flags of `python speculative.py`."""
    out: str = chain.option("out", "folder for everything that is made")
    checkpoint: str | None = chain.option(None, "checkpoint to read (default: <out>/base.pt)")
    draft: str | None = chain.option(None, "checkpoint of the draft (default: <out>/draft.pt)")
    n_draft: int | None = chain.option(None, "tokens guessed at once (default: 3 by a model, 8 by look-up)")
    prompts: int = chain.option(40, "held-out documents to go on with, of each kind of text")
    tokens: int = chain.option(64, "tokens to write for each")
    seed: int = chain.option(0, "seed of the documents and of the draws")
    device: str = chain.option("auto", "auto, cpu, cuda or mps")


# ------------------------------------------------------------------------------------------- one round

def accept(p: Tensor, q: Tensor, guessed: Tensor, draws: torch.Generator | None = None) -> tuple[int, Tensor]:
    """Return how many of the n guesses are accepted, and the token (1,) that follows (Leviathan 2023).

    p (n + 1, V) are the model's laws, q (n, V) the draft's, from which guessed (n,) were drawn.
    """
    n, places = len(guessed), torch.arange(len(guessed), device=p.device)
    u = torch.rand(n, generator=draws, device=p.device)
    accepted = u * q[places, guessed] < p[places, guessed]  # (n,)
    k = int(accepted.int().cumprod(dim=0).sum())
    if k == n:
        return n, torch.multinomial(p[n], 1, generator=draws)  # all accepted: the pass has told one more law
    # subtle: drawn from p itself, a token that was just rejected would come too often
    rest = (p[k] - q[k]).clamp(min=0)  # (V,)
    return k, torch.multinomial(rest if rest.sum() > 0 else p[k], 1, generator=draws)


def tokens_a_round(alpha: float, n: int) -> float:
    """Return the mean number of tokens that a round of n guesses brings (Leviathan 2023, equation 1).

    >>> tokens_a_round(0.5, 2), tokens_a_round(1.0, 4)
    (1.75, 5)
    """
    return n + 1 if alpha == 1 else (1 - alpha ** (n + 1)) / (1 - alpha)


# ------------------------------------------------------------------------------------------- the drafts

class ModelDraft:
    """A smaller model guesses, one token after the other, with a cache of its own."""

    def __init__(self, model: GPT, **filters):
        """`filters`: temperature, top_k, top_p. Those of the model's law, or fewer guesses are accepted."""
        self.model, self.filters = model, filters
        self.cache = KVCache(model.config, 1, model.device, model.dtype)

    def guess(self, written: list[int], n: int, draws: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return n guesses (n,) of how `written` goes on, and the laws q (n, V) that they were drawn from."""
        self.cache.length = min(self.cache.length, len(written) - 1)  # forget the guesses that were rejected
        new, guesses, laws = torch.tensor([written[self.cache.length:]], device=self.model.device), [], []
        for _ in range(n):
            logits = self.model.head(self.model.hidden(new, self.cache)[:, -1]).float()  # (1, V)
            laws.append(filter_logits(logits, **self.filters).softmax(dim=-1))
            new = torch.multinomial(laws[-1], 1, generator=draws)  # (1, 1)
            guesses.append(new)
        none = torch.zeros(1, 0, dtype=torch.long, device=new.device)
        q = torch.cat(laws) if laws else torch.zeros(0, self.model.config.vocab_size, device=new.device)
        return torch.cat([none, *guesses], dim=1)[0], q


class NgramDraft:
    """No model: what followed the last three tokens, or two, or one, when they stood there before."""

    def __init__(self, vocab_size: int, device):
        self.vocab_size, self.device = vocab_size, device

    def guess(self, written: list[int], n: int, draws: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """As ModelDraft's, at most n guesses. They were not drawn: the law of each is certain of it."""
        guesses = torch.tensor(self.look_up(written)[:n], dtype=torch.long, device=self.device)  # (n,)
        return guesses, F.one_hot(guesses, self.vocab_size).float()

    @staticmethod
    def look_up(written: list[int]) -> list[int]:
        """Return all that followed the last place where the last tokens stood before.

        >>> NgramDraft.look_up([1, 2, 3, 4, 9, 2, 3]), NgramDraft.look_up([1, 2])
        ([4, 9, 2, 3], [])
        """
        for size in (3, 2, 1):
            end = written[-size:]
            for at in range(len(written) - 1, size - 1, -1):
                if written[at - 1] == end[-1] and written[at - size:at] == end:
                    return written[at:]
        return []


def make_draft(draft: GPT | str, model: GPT, **filters) -> ModelDraft | NgramDraft:
    """Return a new draft for one text of `model`: a smaller model, or "ngram". `filters` as in ModelDraft."""
    if draft == "ngram":
        return NgramDraft(model.config.vocab_size, model.device)
    return ModelDraft(draft, **filters)


# ---------------------------------------------------------------------------------------------- the loop

@dataclass
class Rounds:
    """What a run has counted. Rounds with fewer guesses than n, as the last one, tell nothing of α."""
    n: int
    passes: int = 0  # of the model
    tokens: int = 0
    accepted: list[int] = field(default_factory=list)  # of each full round

    @property
    def alpha(self) -> float:
        """The share of the checked guesses that were accepted."""
        checked = sum(min(k + 1, self.n) for k in self.accepted)
        return sum(self.accepted) / max(1, checked)


@torch.inference_mode()
def speculate(model: GPT, draft, ids: Tensor, tokens: int, rounds: Rounds, *, temperature: float = 1.0,
              top_k: int = 0, top_p: float = 1.0,
              generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Go on from ids (1, T): yield (new id (1, 1), the model's logits (1, V)), as decode.py's `generate`.

    It guesses `rounds.n` tokens a round, fewer where `tokens` or the context end, and counts in `rounds`.
    """
    context, T = model.config.context, ids.shape[1]
    cache = KVCache(model.config, 1, model.device, model.dtype)
    written, left = ids[0].tolist(), min(tokens, max(1, context - T + 1))
    with few_threads(model, 1):
        while left > 0:
            most = max(0, min(rounds.n, left - 1, context - len(written)))
            guessed, q = draft.guess(written, most, generator)  # (n,), (n, V)
            n, unread = len(guessed), torch.tensor([written[cache.length:]], device=model.device)
            new = torch.cat([unread, guessed[None]], dim=1)  # (1, unread + n)
            logits = model.head(model.hidden(new, cache)[0, -n - 1:]).float()  # (n + 1, V)
            p = filter_logits(logits, temperature, top_k, top_p).softmax(dim=-1)
            k, token = accept(p, q, guessed, generator)
            made = torch.cat([guessed[:k], token])  # (k + 1,)
            written += made.tolist()
            cache.length = len(written) - 1  # roll back: what was rejected is written over
            left -= k + 1
            rounds.passes, rounds.tokens = rounds.passes + 1, rounds.tokens + k + 1
            rounds.accepted += [k] if n == rounds.n else []
            yield from zip(made[:, None, None], logits[:, None])


def read_draft(name: str, model: GPT, content: dict) -> GPT | str:
    """Return the model of the checkpoint `name`, to guess for `model` with checkpoint `content`; or "ngram".

    Raises UserError if it writes other tokens, or holds fewer.
    """
    if name == "ngram":
        return name
    draft, tokenizer, _ = load_model(name, model.device)
    chain.require(tokenizer.to_dict() == content.get("tokenizer"), f"--draft {name}: it has another "
                  "tokenizer than the model, its tokens mean other words; train one with the same --out")
    chain.require(draft.config.context >= model.config.context, f"--draft {name}: its context of "
                  f"{draft.config.context} tokens is shorter than the model's {model.config.context}")
    return draft


# ------------------------------------------------------------------------------------------- measurement

def seconds(stream) -> tuple[float, list[int]]:
    """Return how long `stream` took, and its ids."""
    started = time.perf_counter()
    ids = [int(new) for new, _ in stream]
    return time.perf_counter() - started, ids


def compare(model: GPT, draft: GPT | str, prompts: list, temperature: float, n: int, c: Config) -> dict:
    """Return what n guesses a round bring over plain decoding, prompt by prompt in turns."""
    rounds, plain, fast, same = Rounds(n), 0.0, 0.0, 0
    options = {"temperature": temperature, "generator": torch.Generator(model.device).manual_seed(c.seed)}
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)  # (1, T)
        took, wanted = seconds(generate(model, ids, c.tokens, **options))
        guess = make_draft(draft, model, temperature=temperature)
        took_fast, found = seconds(speculate(model, guess, ids, c.tokens, rounds, **options))
        plain, fast, same = plain + took, fast + took_fast, same + (wanted == found)
    brought = torch.tensor(rounds.accepted).double() + 1
    return {"accepted": rounds.alpha, "tokens_a_round": float(brought.mean()),
            "error": float((brought - brought.mean()).square().mean().sqrt() / len(brought) ** 0.5),
            "formula": tokens_a_round(rounds.alpha, n), "speed_up": plain / fast,
            "same": same / len(prompts)}


@chain.command
def main(argv=None) -> dict:
    """Measure both drafts on held-out documents, greedy and drawn."""
    c, started = chain.parse(Config, argv, __doc__), time.time()
    chain.require(min(c.prompts, c.tokens) >= 1, f"--prompts {c.prompts} --tokens {c.tokens}: start at 1")
    chain.require(c.n_draft is None or c.n_draft >= 1, f"--n_draft {c.n_draft}: start at 1")
    c.device = chain.pick_device(c.device)
    model, tokenizer, content = load_model(c.checkpoint or Path(c.out, "base.pt"), c.device)
    trained = read_draft(c.draft or str(Path(c.out, "draft.pt")), model, content)
    metrics, start = {}, tokenizer.special["<|endoftext|>"]
    print("draft  text       temperature  accepted  tokens a round  by formula  speed-up  same text")
    for text, kind in (("all", None), ("lists", "lists")):
        documents = [world.document("held-out", c.seed, i, kind) for i in range(c.prompts)]
        ids = [[start, *tokenizer.encode(document)] for document in documents]
        prompts = [each[:min(len(each) // 2, model.config.context // 2)] for each in ids]
        for name, draft in (("draft", trained), ("ngram", "ngram")):
            for temperature in (0, 1):
                found = compare(model, draft, prompts, temperature, c.n_draft or GUESSES[name], c)
                print(f"{name:<6} {text:<10} {temperature:>11} {found['accepted']:>9.1%} "
                      f"{found['tokens_a_round']:>8.2f} ± {found['error']:.2f} {found['formula']:>11.2f} "
                      f"{found['speed_up']:>9.2f} {found['same']:>10.0%}", flush=True)
                metrics |= {f"{name}_{text}_{'greedy' if temperature == 0 else 'drawn'}_{key}": found[key]
                            for key in ("accepted", "speed_up")}
    chain.report("speculative.py", c, metrics, time.time() - started)
    return metrics


if __name__ == "__main__":
    main()
