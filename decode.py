"""From logits to tokens: temperature, top-k, top-p, a repetition penalty; one prompt or many; compiled.

    scores = logits / temperature         below 1: bolder on what is likely; 0: always the likeliest (greedy)
    top-k: keep the k likeliest tokens    top-p: keep the fewest tokens whose probabilities reach p
    the next token is drawn from softmax(scores), written into the cache, and the model is asked again

Prefill reads the whole prompt in one pass; decode then asks for one token at a time. A step of a small model
takes longer to start than to compute: the processor waits for Python. `torch.compile` turns the step into one
program, if all its shapes stay the same: a static RowCache is read in full, and a mask hides what is not
written yet. Each of its rows has its own length, so prompts of unequal length share a batch, and each is
answered as if it were alone.

Left out: beam search (it harms open-ended text), text past the context, taking new prompts into a batch as
others end (continuous batching). Papers: Fan 2018 (top-k), Holtzman 2020 (top-p), Keskar 2019 (penalty).
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dial import require_compiler
from model import GPT, KVCache, count_parameters, positions


# -------------------------------------------------------------------------------------- logits → a token

def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Return the logits (B, V) of the law to draw from: logits / temperature, -inf for what is filtered out.

    `temperature` 0 keeps the likeliest token alone. Top-p keeps the token that crosses p, so at least one.

    >>> filter_logits(torch.tensor([[3., 1., 2., 0.]]), top_k=2).tolist()
    [[3.0, -inf, 2.0, -inf]]
    """
    if temperature == 0:
        return torch.full_like(logits, -math.inf).scatter(-1, logits.argmax(dim=-1, keepdim=True), 0.0)
    logits = logits / temperature
    if top_k > 0 or top_p < 1:
        values, places = logits.sort(dim=-1, descending=True)  # (B, V)
        values[:, top_k or values.shape[-1]:] = -math.inf  # subtle: by value, ties let more than k through
        if top_p < 1:
            p = values.softmax(dim=-1)  # (B, V)
            values = values.masked_fill(p.cumsum(dim=-1) - p >= top_p, -math.inf)  # likelier ones reach p
        logits = torch.full_like(logits, -math.inf).scatter(-1, places, values)
    return logits


def penalise_repetition(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Make `ids` (B, T) unlikelier in logits (B, V): / penalty if positive, else · penalty (Keskar 2019)."""
    seen = logits.gather(-1, ids)  # (B, T)
    return logits.scatter(-1, ids, torch.where(seen > 0, seen / penalty, seen * penalty))


def sample_token(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token a row from softmax(logits). logits (B, V) → ids (B, 1)."""
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


# ------------------------------------------------------------------------------- many rows, static shapes

class RowCache(nn.Module):
    """Serves a model as a KVCache does, but each row has its own length (B,); what comes after is hidden.

    If it is `static` its shapes never change: it is read in full, written or not. It has room for `tokens`,
    in steps of 128, so that few different sizes are ever compiled. It is a module, as torch takes a module's
    buffers to stay where they are in memory: of a step that changes other tensors it records no CUDA graph.
    """

    def __init__(self, model: GPT, batch_size: int, tokens: int, static: bool):
        super().__init__()
        size = min(model.config.context, -(-tokens // 128) * 128)
        shape = (batch_size, model.config.kv_heads, size, model.config.head_width)
        empty = torch.zeros(shape, device=model.device, dtype=model.dtype)  # (B, G, size, D)
        for layer in range(model.config.depth):  # apart: to change a part of one large buffer may copy it all
            self.register_buffer(f"k{layer}", empty.clone())
            self.register_buffer(f"v{layer}", empty.clone())
        self.register_buffer("rows", torch.arange(batch_size, device=model.device)[:, None])  # (B, 1)
        self.register_buffer("slots", torch.arange(size, device=model.device))  # (size,)
        self.register_buffer("length", torch.zeros_like(self.rows[:, 0]))  # (B,)
        self.static = static
        self.read = size if static else 0  # S: slots that are read

    def take(self, T: int) -> Tensor:
        """Return the positions (B, 1, T) of T new tokens, and count them.

        A row that is full writes over its last place: what it says then is to be thrown away.
        """
        self.places = (self.length[:, None] + self.slots[:T]).clamp(max=len(self.slots) - 1)  # (B, T)
        self.length += T
        if not self.static:
            self.read = min(self.read + T, len(self.slots))
        self.mask = self.slots[:self.read] <= self.places[:, None, :, None]  # (B, 1, T, S)
        return self.places[:, None]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new k and v (B, G, T, D) of a layer; return what is read (B, G, S, D)."""
        all_k, all_v = getattr(self, f"k{layer}"), getattr(self, f"v{layer}")  # (B, G, size, D) both
        all_k[self.rows, :, self.places] = k.transpose(1, 2)  # (B, T, G, D)
        all_v[self.rows, :, self.places] = v.transpose(1, 2)  # (B, T, G, D)
        return all_k[:, :, :self.read], all_v[:, :, :self.read]


def open_cache(model: GPT, compiled: bool) -> KVCache | RowCache:
    """Return an empty cache of one row, with room for the whole context."""
    if compiled:
        return RowCache(model, 1, model.config.context, static=True)
    return KVCache(model.config, 1, model.device, model.dtype)


def roll_back(cache: KVCache | RowCache, length: int) -> None:
    """Forget all after the first `length` tokens: it will be written over."""
    if isinstance(cache, RowCache):
        cache.length.fill_(length)  # where a program looks for it
    else:
        cache.length = length


def pad_prompts(prompts: list[list[int]], device="cpu") -> tuple[Tensor, Tensor]:
    """Return ids (B, T) and lengths (B,). Shorter prompts are filled up at the right, with their first token.

    That token was seen anyway, so that the repetition penalty does not notice what fills up.

    >>> pad_prompts([[5, 6, 7], [8]])[0].tolist()
    [[5, 6, 7], [8, 8, 8]]
    """
    lengths = [len(prompt) for prompt in prompts]
    rows = [prompt + prompt[:1] * (max(lengths) - len(prompt)) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(lengths, device=device)


def next_logits(model: GPT, new: Tensor, cache: KVCache | RowCache) -> Tensor:
    """Read new (B, T) and return the logits (B, V) of what follows its last token."""
    return model.head(model.hidden(new, cache)[:, -1]).float()


@functools.cache
def program(function):
    """Return `function` as one compiled program, for a CPU: nothing in it waits for Python.

    Raises UserError where there is no C++ compiler.
    """
    require_compiler("cpu")
    return torch.compile(function, fullgraph=True, dynamic=False, options={"cpp_wrapper": True})


def compile_step(device: torch.device):
    """Return `next_logits` as one compiled program without Python between; on CUDA as a recorded graph."""
    if device.type == "cuda":
        require_compiler("cuda")
        step = torch.compile(next_logits, fullgraph=True, dynamic=False, mode="reduce-overhead")
    else:
        step = program(next_logits)
    return lambda *given: step(*given).clone()  # subtle: a graph writes all steps' logits to the same place


def until(ids: list[int], end: int | None) -> list[int]:
    """Return the ids before the first `end`.

    >>> until([5, 6, 0, 7], 0)
    [5, 6]
    """
    return ids[:ids.index(end)] if end in ids else ids


# ---------------------------------------------------------------------------------------------- the loop

@contextmanager
def few_threads(model: GPT, batch_size: int):
    """One thread while a step is short, as it takes longer when cores share it; then as many as before."""
    threads = torch.get_num_threads()
    try:
        if count_parameters(model.config) * batch_size < 2e7:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def generate(model: GPT, ids: Tensor, tokens: int, *, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0, repetition_penalty: float = 1.0, lengths: Tensor | None = None, step=None,
             generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Go on from ids (B, T), T ≥ 1: yield (new ids (B, 1), the model's own logits (B, V)) for each new token.

    With `lengths` (B,) row b goes on from ids[b, :lengths[b]]. `step` is what `compile_step` returns. It ends
    after `tokens`, or when the shortest prompt's row fills the context. Others fill it sooner: what they say
    then is to be thrown away. Raises ValueError when a prompt does not fit.
    """
    B, T = ids.shape
    shortest = T if lengths is None else int(lengths.min())
    positions(0, T, model.config.context)  # does it fit?
    cache = (KVCache(model.config, B, model.device, model.dtype) if step is None and lengths is None
             else RowCache(model, B, T + tokens, static=step is not None))
    written = ids
    with few_threads(model, B):
        for n in range(min(tokens, model.config.context - shortest + 1)):
            if n == 0 and lengths is not None:
                last = model.hidden(ids, cache)[torch.arange(B), lengths - 1]  # (B, C)
                logits = model.head(last).float()  # (B, V)
                cache.length.copy_(lengths)  # what fills up was read as well
            else:
                logits = (n and step or next_logits)(model, new if n else ids, cache)  # (B, V)
            scores = logits
            if repetition_penalty != 1:
                scores = penalise_repetition(logits, written, repetition_penalty)  # (B, V)
            new = (scores.argmax(dim=-1, keepdim=True) if temperature == 0 else
                   sample_token(filter_logits(scores, temperature, top_k, top_p), generator))  # (B, 1)
            written = torch.cat([written, new], dim=1)  # (B, T + n + 1)
            yield new, logits
