"""What inference costs: time to the first token, time and bytes a token, and the price, way by way.

    bytes a token  = (bytes of the weights + keys and values so far) / batch      each step reads all of them
    GB/s           = bytes a step / time a step, beside what the memory can copy
    price          = dollars an hour * 1e6 / (3600 * tokens/s), for a million tokens

A batch shares one reading of the weights: more tokens a second, and each of them is a little later. A step
that moves bytes at the memory's speed can only get faster by moving fewer.

    python sample.py --bench                  the chain's newest model (1 minute)
    python sample.py --bench --random 110M    a larger one: what it has learned makes it no faster (2 minutes)
    python sample.py --bench --compile        one row at a time, each step compiled (2 minutes)

Left out: many users who come and go (vLLM's paging), more than one device. Papers: Pope 2022 (what bounds
inference), Kwon 2023 (paged caches).
"""

import copy
import math
import time
from itertools import pairwise

import torch

from decode import compile_step, generate
from drafts import make_draft
from model import GPT, KVCache
from packed import quantize_model, weight_bytes
from speculative import Rounds, speculate

BATCHES, PROMPT, TOKENS = (1, 8, 32), 64, 48  # rows at once, tokens read, tokens written


def copy_bandwidth(device: torch.device) -> float:
    """Return how many bytes a second the memory reads and writes, at best, when it copies 256 MB."""
    data, best = torch.ones(1 << 26, device=device), 0.0
    there = torch.empty_like(data)
    for _ in range(5):
        started = time.perf_counter()
        there.copy_(data)
        synchronize(device)
        best = max(best, 2 * data.nbytes / (time.perf_counter() - started))
    return best


def synchronize(device: torch.device) -> None:
    """Wait for a GPU, which works while Python goes on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def arrivals(stream, device: torch.device) -> list[float]:
    """Return when each token of `stream` came, in seconds from the start on."""
    started, times = time.perf_counter(), []
    for _ in stream:
        synchronize(device)
        times.append(time.perf_counter() - started)
    return times


def quantile(values: list[float], share: float) -> float:
    """Return the value that `share` of the values do not exceed.

    >>> quantile([4.0, 1.0, 3.0, 2.0], 0.5)
    2.0
    """
    return sorted(values)[max(0, math.ceil(len(values) * share) - 1)]


def row(times: list[float], batch: int, n_bytes: float, dollars_per_hour: float) -> dict:
    """Return the measures of a way whose tokens came at `times`, each for the price of `n_bytes` moved a row.

    Guesses that were accepted come at once, so of them the mean says more than the quantiles.
    """
    steps = [1000 * (b - a) for a, b in pairwise(times)]
    mean = sum(steps) / len(steps)
    return {"first_ms": 1000 * times[0], "p50_ms": quantile(steps, 0.5), "p95_ms": quantile(steps, 0.95),
            "tokens_per_second": 1000 * batch / mean, "MB_a_token": n_bytes / batch / 1e6,
            "GB_per_second": n_bytes / mean / 1e6,
            "dollars_per_million": dollars_per_hour * 1e6 / 3600 * mean / 1000 / batch}


def bytes_a_step(model: GPT, batch: int, tokens: float) -> float:
    """Return the bytes of the weights and the cache that a step reads, with so many tokens in each row.

    Of the embedding it reads a few rows, so its table does not count, unless it is the head's as well.
    """
    table = model.embedding.state_dict().values()
    is_head = model.config.tied and isinstance(model.head, torch.nn.Linear)
    weights = weight_bytes(model) - (0 if is_head else sum(part.nbytes for part in table))
    return weights + KVCache(model.config, batch, dtype=model.dtype).n_bytes * tokens / model.config.context


def measure(model: GPT, draft: GPT | str | None, dollars_per_hour: float, compiled: bool) -> dict:
    """Print a table of batches and ways; return their speeds. `draft` as read_draft returns it, or None."""
    models = {"plain": model}
    for bits in (8, 4):
        try:
            models[f"int{bits}"] = quantize_model(copy.deepcopy(model), bits)
        except ValueError as error:
            print(f"(no int{bits}: {error})")
    bandwidth, metrics, device = copy_bandwidth(model.device), {}, model.device
    T, draws = min(PROMPT, model.config.context // 2), torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (max(BATCHES), T), generator=draws).to(device)
    step, rounds = compile_step(device) if compiled else None, Rounds(4)
    ways = {name: (each, lambda ids, each=each: generate(each, ids, TOKENS, temperature=0, step=step))
            for name, each in models.items()}

    def guessed(ids):
        guess = make_draft(draft or "ngram", model, temperature=0)
        return speculate(model, guess, ids, TOKENS, rounds, temperature=0)

    print(f"the memory copies {bandwidth / 1e9:.1f} GB/s; {T} tokens read, {TOKENS} written, greedy")
    for batch in BATCHES[:1] if compiled else BATCHES:
        both = ways | ({"speculative": (model, guessed)} if batch == 1 and not compiled else {})
        for name, (each, stream) in both.items():
            warm_up = arrivals(stream(ids[:batch]), device)  # packs the weights, or compiles
            if compiled:
                metrics[f"{name}_compile_seconds"] = warm_up[-1]
            times = arrivals(stream(ids[:batch]), device)
            passes = 1 / rounds.tokens_a_pass if name == "speculative" else 1  # a token
            found = row(times, batch, bytes_a_step(each, batch, T + TOKENS / 2) * passes, dollars_per_hour)
            if (batch, name) == (BATCHES[0], "plain"):
                print("\nbatch  way          " + "  ".join(f"{key:>9}" for key in found))
            print(f"{batch:>5}  {name:<11}  " + "  ".join(
                f"{value:>{max(9, len(key))},.2f}" for key, value in found.items()), flush=True)
            metrics[f"{name}_{batch}_tokens_per_second"] = found["tokens_per_second"]
    return {"copy_GB_per_second": bandwidth / 1e9, "accepted": rounds.alpha, **metrics}
