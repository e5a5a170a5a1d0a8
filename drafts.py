"""Who guesses: a smaller model, or a look-up in what is already written. speculative.py checks the guesses.

    model     reads the last two tokens (both are new where all guesses were accepted), and guesses n, one
              after the other, each from its own law q
    ngram     finds where the last three tokens, or two, or one, stood before: what followed then is the guess

A guess is drawn by a race: token i arrives after a time with the law Exp(1), divided by q_i, and the first
one wins: it is i with probability q_i. So n guesses can be one compiled program.

Left out: trees of guesses, heads on the model itself (Medusa, EAGLE). Papers: Leviathan 2023, Saxena 2023.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import chain
from checkpoint import load_model
from decode import filter_logits, next_logits, open_cache, program, roll_back
from model import GPT

GUESSES = {"draft": 5, "ngram": 8}  # at once: a step of a draft is dear, a look-up costs nothing


def chain_guesses(model: GPT, new: Tensor, cache, race: Tensor, filters: tuple) -> tuple[Tensor, Tensor]:
    """Return n guesses (n,) of what follows new (1, T), and their laws q (n, V).

    `race` (n, V) holds times with the law Exp(1), or all 1 to take the likeliest; `filters`: temperature,
    top_k and top_p.
    """
    guesses, laws = [new[0, :0]], [race[:0]]  # none yet: (0,), (0, V)
    for times in race:  # (V,)
        laws.append(filter_logits(next_logits(model, new, cache), *filters).softmax(dim=-1))  # (1, V)
        new = (laws[-1] / times).argmax(dim=-1, keepdim=True)  # (1, 1): the first to arrive
        guesses.append(new[0])
    return torch.cat(guesses), torch.cat(laws)


class ModelDraft:
    """A smaller model guesses, with a cache of its own."""

    def __init__(self, model: GPT, compiled=False, temperature=1.0, top_k=0, top_p=1.0):
        """The filters of the model's law are the best ones: with others fewer guesses are accepted."""
        self.model, self.compiled, self.filters = model, compiled, (temperature, top_k, top_p)
        self.cache = open_cache(model, compiled)

    def guess(self, written: list[int], n: int, draws: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return n guesses (n,) of how `written` goes on, and the laws q (n, V) that they were drawn from."""
        start = max(0, min(int(self.cache.length), len(written) - 2))
        roll_back(self.cache, start)  # guesses that were rejected, and the last token but one
        if start < len(written) - 2:  # the prompt
            self.model.hidden(torch.tensor([written[start:-2]], device=self.model.device), self.cache)
        new = torch.tensor([written[-2:]], device=self.model.device)  # (1, 2), or (1, 1) at the first token
        race = torch.ones(n, self.model.config.vocab_size, device=new.device)
        if self.filters[0] > 0:
            race.exponential_(generator=draws)
        guess = program(chain_guesses) if self.compiled and len(written) > 1 else chain_guesses
        return guess(self.model, new, self.cache, race, self.filters)


class NgramDraft:
    """No model: what followed the last three tokens, or two, or one, when they stood there before."""

    def __init__(self, vocab_size: int, device):
        self.vocab_size, self.device = vocab_size, device

    def guess(self, written: list[int], n: int, draws: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """As ModelDraft's, but at most n guesses. They were not drawn: the law of each is certain of it."""
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


def make_draft(draft: GPT | str, model: GPT, compiled: bool = False, **filters) -> ModelDraft | NgramDraft:
    """Return a new draft for one text of `model`: a smaller model, or "ngram". The rest as in ModelDraft."""
    if draft == "ngram":
        return NgramDraft(model.config.vocab_size, model.device)
    return ModelDraft(draft, compiled, **filters)


def has_experts(*models: GPT | str | None) -> bool:
    """Return whether one of them is a mixture of experts, which can't be one program."""
    return any(isinstance(model, GPT) and model.config.experts > 0 for model in models)


def read_draft(name: str, model: GPT, content: dict) -> GPT | str:
    """Return the model of the checkpoint `name`, to guess for `model` with checkpoint `content`; or "ngram".

    Raises UserError if it writes other tokens, or holds fewer.
    """
    if name == "ngram":
        return name
    chain.require(Path(name).is_file(), f"--draft {name}: no such checkpoint; make the chain's with "
                  "`make out/draft.pt`, or look up with --draft ngram")
    draft, tokenizer, _ = load_model(name, model.device)
    chain.require(tokenizer.to_dict() == content.get("tokenizer"), f"--draft {name}: it has another "
                  "tokenizer than the model, its tokens mean other words; train one with the same --out")
    chain.require(draft.config.context >= model.config.context, f"--draft {name}: its context of "
                  f"{draft.config.context} tokens is shorter than the model's {model.config.context}")
    return draft
