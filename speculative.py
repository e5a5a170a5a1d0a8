"""Speculative decoding: a quick draft guesses some tokens, and the model checks them all in one pass.

    guess    x_1 … x_n, each drawn from the draft's law q_i
    check    one pass of the model gives its own laws p_1 … p_{n+1}
    accept   x_i with probability min(1, p_i(x_i) / q_i(x_i)), up to the first that is rejected
    then     in its place draw from norm(max(p_i - q_i, 0)); if none was rejected, one more token from p_{n+1}

What comes out has exactly the law of the model alone, whatever the draft; greedy, it is the same text. With
α = Σ min(p, q), the chance that a guess is accepted, a round brings (1 - α^(n+1)) / (1 - α) tokens on average
where α is the same everywhere. A round costs n steps of the draft and one pass: a small draft that is often
right pays. The cheapest draft is no model at all: it looks up how what was just said went on before. Both are
in drafts.py.

    python speculative.py                    out/base.pt with out/draft.pt and with look-up (2 minutes)
    python sample.py --draft out/draft.pt    write with it; --draft ngram looks up; --compile on a CPU

Greedy on held-out documents, look-up brings 2.6 tokens a pass and 1.6 times plain decoding's speed; where a
list is said again, 4.0 tokens and 2.4 times. The trained draft brings 3.8 tokens but the speed of plain
decoding: five steps of its one layer and a check take as long. Guesses and check as compiled programs write
2.3 times as fast as plain decoding; but compiled, that does 2.7 times: the draft's layer and head are a third
of the model. Only looking up where a list is said again is faster still, 3.5 times.

Left out: trees of guesses, several prompts at once, the repetition penalty.
Papers: Leviathan 2023 (algorithm 1, equation 1), Chen 2023.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import chain
import world
from checkpoint import load_model
from decode import compile_step, few_threads, filter_logits, generate, open_cache, program, roll_back
from dial import can_compile
from drafts import GUESSES, has_experts, make_draft, read_draft
from model import GPT, positions


SPEED_UPS = ("speed_up", "speed_up_compiled", "compiled_over_plain")


@dataclass
class Config:
    """The flags of `python speculative.py`."""
    out: str = chain.option("out", "folder for everything that is made")
    checkpoint: str | None = chain.option(None, "checkpoint to read (default: <out>/base.pt)")
    draft: str | None = chain.option(None, "checkpoint of the draft (default: <out>/draft.pt)")
    n_draft: int | None = chain.option(None, "tokens guessed at once (default: 5 by a model, 8 by look-up)")
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


def agree(logits: Tensor, guessed: Tensor) -> tuple[int, Tensor]:
    """As `accept` at temperature 0, where all laws are certain. logits (n + 1, V), guessed (n,)."""
    best = logits.argmax(dim=-1)  # (n + 1,)
    k = int((best[:-1] == guessed).int().cumprod(dim=0).sum())
    return k, best[k:k + 1]


def tokens_a_round(alpha: float, n: int) -> float:
    """Return the mean number of tokens that a round of n guesses brings (Leviathan 2023, equation 1).

    >>> tokens_a_round(0.5, 2), tokens_a_round(1.0, 4)
    (1.75, 5)
    """
    return n + 1 if alpha == 1 else (1 - alpha ** (n + 1)) / (1 - alpha)


# ---------------------------------------------------------------------------------------------- the loop

@dataclass
class Rounds:
    """What a run has counted. The formula is of rounds with n guesses; the last one often has fewer."""
    n: int
    passes: int = 0  # of the model
    tokens: int = 0
    accepted: list[int] = field(default_factory=list)  # of each full round

    @property
    def alpha(self) -> float:
        """The share of the checked guesses that were accepted."""
        checked = sum(min(k + 1, self.n) for k in self.accepted)
        return sum(self.accepted) / max(1, checked)

    @property
    def tokens_a_pass(self) -> float:
        """What a pass of the model brought; rounds with fewer guesses, or none, count too."""
        return self.tokens / self.passes


def all_logits(model: GPT, new: Tensor, cache) -> Tensor:
    """Read new (1, T) and return the logits (T, V) of what follows each of its tokens."""
    return model.head(model.hidden(new, cache)[0]).float()


@torch.inference_mode()
def speculate(model: GPT, draft, ids: Tensor, tokens: int, rounds: Rounds, *, temperature: float = 1.0,
              top_k: int = 0, top_p: float = 1.0, generator: torch.Generator | None = None,
              compiled: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Go on from ids (1, T): yield (new id (1, 1), the model's logits (1, V)), as decode.py's `generate`.

    It guesses `rounds.n` tokens a round, fewer where `tokens` or the context end, and counts in `rounds`.
    Raises ValueError when the prompt does not fit.
    """
    context, T = model.config.context, ids.shape[1]
    positions(0, T, context)  # does it fit?
    written, left = ids[0].tolist(), min(tokens, context - T + 1)  # the last token is written, but not read
    cache = open_cache(model, compiled)
    with few_threads(model, 1):
        if T > 1:
            model.hidden(ids[:, :-1], cache)
        while left > 0:
            # a round brings one token more than guesses; a program has one form, so it guesses too many
            guessed, q = draft.guess(written, rounds.n if compiled else min(rounds.n, left - 1), generator)
            n = min(len(guessed), left - 1)
            guessed, q = guessed[:n], q[:n]  # (n,), (n, V)
            new = torch.cat([torch.tensor(written[-1:], device=model.device), guessed])[None]  # (1, 1 + n)
            if compiled and len(written) + rounds.n <= context:
                # what is filled up is thrown away
                logits = program(all_logits)(model, F.pad(new, (0, rounds.n - n)), cache)[:n + 1]
            else:
                logits = all_logits(model, new, cache)  # (n + 1, V)
            if temperature == 0:
                k, token = agree(logits, guessed)
            else:
                p = filter_logits(logits, temperature, top_k, top_p).softmax(dim=-1)  # (n + 1, V)
                k, token = accept(p, q, guessed, generator)
            made = torch.cat([guessed[:k], token])  # (k + 1,)
            written += made.tolist()
            roll_back(cache, len(written) - 1)  # what was rejected is written over
            left -= k + 1
            rounds.passes, rounds.tokens = rounds.passes + 1, rounds.tokens + k + 1
            rounds.accepted += [k] if n == rounds.n else []
            yield from zip(made[:, None, None], logits[:, None])


# ------------------------------------------------------------------------------------------- measurement

def seconds(stream) -> tuple[float, list[int]]:
    """Return how long `stream` took, and its ids."""
    started = time.perf_counter()
    ids = [int(new) for new, _ in stream]
    return time.perf_counter() - started, ids


def compare(model: GPT, draft: GPT | str, step, prompts: list, temperature: float, n: int, c: Config) -> dict:
    """Return what n guesses a round bring over plain decoding, prompt by prompt in turns.

    With a compiled `step`, also what they bring where both are compiled.
    """
    options = {"temperature": temperature, "generator": torch.Generator(model.device).manual_seed(c.seed)}

    def guessing(ids: Tensor, rounds: Rounds, compiled: bool = False):
        who = make_draft(draft, model, compiled, temperature=temperature)
        return speculate(model, who, ids, c.tokens, rounds, compiled=compiled, **options)

    rounds, spent, same = Rounds(n), Counter(), 0
    untimed = [min(prompts, key=len), max(prompts, key=len)] if step else []  # a static cache has two sizes
    for number, prompt in enumerate(untimed + prompts):
        ids = torch.tensor([prompt], device=model.device)  # (1, T)
        streams = {"plain": generate(model, ids, c.tokens, **options),
                   "guessing": guessing(ids, rounds if number >= len(untimed) else Rounds(n))}
        if step:
            streams |= {"plain compiled": generate(model, ids, c.tokens, step=step, **options),
                        "guessing compiled": guessing(ids, Rounds(n), compiled=True)}
        timed = {way: seconds(stream) for way, stream in streams.items()}
        if number >= len(untimed):
            spent.update({way: took for way, (took, _) in timed.items()})
            same += all(text == timed["plain"][1] for _, text in timed.values())
    brought = torch.tensor(rounds.accepted).double() + 1
    found = {"accepted": rounds.alpha, "tokens_a_round": float(brought.mean()),
             "error": float((brought - brought.mean()).square().mean().sqrt() / len(brought) ** 0.5),
             "formula": tokens_a_round(rounds.alpha, n), "same": same / len(prompts),
             "tokens_a_pass": rounds.tokens_a_pass,
             "speed_up": spent["plain"] / spent["guessing"]}
    if step:
        found["speed_up_compiled"] = spent["plain compiled"] / spent["guessing compiled"]
        found["compiled_over_plain"] = spent["plain"] / spent["guessing compiled"]
    return found


@chain.command
def main(argv=None) -> dict:
    """Measure both drafts on held-out documents, greedy and drawn."""
    c, started = chain.parse(Config, argv, __doc__), time.time()
    chain.require(c.prompts >= 1, f"--prompts {c.prompts}: start at 1")
    chain.require(c.n_draft is None or c.n_draft >= 1, f"--n_draft {c.n_draft}: start at 1")
    most = c.n_draft or max(GUESSES.values())
    chain.require(c.tokens > most, f"--tokens {c.tokens}: a round of {most} guesses brings more; give more")
    c.device = chain.pick_device(c.device)
    model, tokenizer, content = load_model(c.checkpoint or Path(c.out, "base.pt"), c.device)
    trained = read_draft(c.draft or str(Path(c.out, "draft.pt")), model, content)
    compiles = model.device.type == "cpu" and not has_experts(model, trained) and can_compile("cpu")
    step = compile_step(model.device) if compiles else None
    metrics, start = {}, tokenizer.special["<|endoftext|>"]
    print("tokens in a round of all guesses, by the formula, in a pass; beside plain decoding the speed-up\n"
          "as they are, both compiled, only the guessing compiled\n"
          "draft  text   temperature accepted  full round  formula  a pass  as they are  both  only  same")
    for text, kind in (("all", None), ("lists", "lists")):
        documents = [world.document("held-out", c.seed, i, kind) for i in range(c.prompts)]
        ids = [[start, *tokenizer.encode(document)] for document in documents]
        prompts = [each[:min(len(each) // 2, model.config.context // 2)] for each in ids]
        for name, draft in (("draft", trained), ("ngram", "ngram")):
            for temperature in (0, 1):
                found = compare(model, draft, step, prompts, temperature, c.n_draft or GUESSES[name], c)
                ups = (f"{found[key]:.2f}" if key in found else "-" for key in SPEED_UPS)
                same = f"{found['same']:.0%}" if temperature == 0 else ""
                print(f"{name:<6} {text:<6} {temperature:>11} {found['accepted']:>9.1%} "
                      f"{found['tokens_a_round']:>4.2f} ± {found['error']:.2f} {found['formula']:>8.2f} "
                      f"{found['tokens_a_pass']:>7.2f}  "
                      f"{'{:>11} {:>5} {:>5}'.format(*ups)} {same:>5}", flush=True)
                metrics |= {f"{name}_{text}_{'greedy' if temperature == 0 else 'drawn'}_{key}": found[key]
                            for key in ("accepted", "tokens_a_pass", *SPEED_UPS) if key in found}
    chain.report("speculative.py", c, metrics, time.time() - started)
    return metrics


if __name__ == "__main__":
    main()
