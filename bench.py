"""What inference costs: time to the first token, time and bytes a token, and the price, way by way.

    bytes a token  = (bytes of the weights + keys and values so far) / batch      each step reads all of them
    GB/s           = bytes a step / time a step, beside what the memory can copy
    price          = dollars an hour * 1e6 / (3600 * tokens/s), for a million tokens

A batch shares one reading of the weights: more tokens a second, and each of them is a little later. A step
that moves bytes at the memory's speed can only get faster by moving fewer.

    python sample.py --bench                  the chain's newest model (1 minute)
    python sample.py --bench --random 110M    a larger one: what it has learned makes it no faster (5 minutes)

Left out: many users who come and go (vLLM's paging), more than one device. Papers: Pope 2022 (what bounds
inference), Kwon 2023 (paged caches).
"""

import copy
import math
import time
from itertools import pairwise

import torch

from decode import generate
from model import GPT, KVCache
from packed import quantize_model, weight_bytes
from speculative import ModelDraft, NgramDraft, Rounds, speculate

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


def row(times: list[float], batch: int, n_bytes: int, dollars_per_hour: float) -> dict:
    """Return the measures of a way whose tokens came at `times` and whose steps move `n_bytes`.

    Guesses that were accepted come at once, so the mean says more of them than the quantiles.
    """
    steps = [1000 * (b - a) for a, b in pairwise(times)]
    mean = sum(steps) / len(steps)
    return {"first_ms": 1000 * times[0], "p50_ms": quantile(steps, 0.5), "p95_ms": quantile(steps, 0.95),
            "tokens_per_second": 1000 * batch / mean, "MB_a_token": n_bytes / batch / 1e6,
            "GB_per_second": n_bytes / mean / 1e6,
            "dollars_per_million": dollars_per_hour * 1e6 / 3600 * mean / 1000 / batch}


def measure(model: GPT, draft: GPT | str | None, dollars_per_hour: float) -> dict:
    """Print a table of batches and ways; return their speeds. `draft` as read_draft returns it, or None."""
    models = {"plain": model}
    for bits in (8, 4):
        models[f"int{bits}"] = quantize_model(copy.deepcopy(model), bits)
    bandwidth, metrics = copy_bandwidth(model.device), {}
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (max(BATCHES), PROMPT), generator=draws).to(model.device)
    rounds = Rounds(4)
    guess = (ModelDraft(draft, temperature=0) if isinstance(draft, GPT)
             else NgramDraft(model.config.vocab_size, model.device))
    print(f"the memory copies {bandwidth / 1e9:.1f} GB/s; {PROMPT} tokens read, {TOKENS} written, greedy\n")
    for batch in BATCHES:
        streams = {name: (each, lambda each=each: generate(each, ids[:batch], TOKENS, temperature=0))
                   for name, each in models.items()}
        if batch == 1:
            streams["speculative"] = model, lambda: speculate(
                model, guess, ids[:1], TOKENS, rounds, temperature=0)
        for name, (each, stream) in streams.items():
            arrivals(stream(), model.device)  # the first time packs and warms up
            cache = KVCache(each.config, batch, dtype=each.dtype).n_bytes * (PROMPT + TOKENS / 2)
            n_bytes = weight_bytes(each) + int(cache / each.config.context)
            found = row(arrivals(stream(), model.device), batch, n_bytes, dollars_per_hour)
            if not metrics:
                print("batch  way          " + "  ".join(f"{key:>9}" for key in found))
            print(f"{batch:>5}  {name:<11}  " + "  ".join(
                f"{value:>{max(9, len(key))},.2f}" for key, value in found.items()), flush=True)
            metrics[f"{name}_{batch}_tokens_per_second"] = found["tokens_per_second"]
    return {"copy_GB_per_second": bandwidth / 1e9, "accepted": rounds.alpha, **metrics}
