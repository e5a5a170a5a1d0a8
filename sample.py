"""From logits to text: temperature, top-k, top-p, a repetition penalty, and tokens streamed as they are made.

    scores = logits / temperature         below 1: bolder on what is likely; 0: always the likeliest (greedy)
    top-k: keep the k likeliest tokens    top-p: keep the fewest tokens whose probabilities reach p
    the next token is drawn from softmax(scores), written into the cache, and the model is asked again

    python sample.py                                                  a new document from out/base.pt
    python sample.py --prompt "The mayor of Amber Hollow is" --n 3    three ways to go on
    python sample.py --prompt "Once" --temperature 0 --show_probs     each token coloured by its probability

Prefill reads the whole prompt in one pass; decode then asks for one token at a time. Decode reads every
weight for each token, so its speed is the memory's, not the processor's: the report tells both.
Left out: beam search (it makes open-ended text worse, Holtzman 2020), and text longer than the context.
Papers: Fan 2018 (top-k), Holtzman 2020 (top-p), Keskar 2019 (repetition penalty).
"""

import codecs
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import chain
from bpe import Tokenizer
from model import GPT, GPTConfig, KVCache


@dataclass
class Config:
    """The flags of `python sample.py`."""
    out: str = chain.option("out", "folder for everything that is made")
    checkpoint: str | None = chain.option(None, "checkpoint to read (default: the newest room's in --out)")
    prompt: str = chain.option("", "text to go on from; without one, a new document")
    n: int = chain.option(1, "how many completions, made as one batch")
    tokens: int = chain.option(200, "the most tokens to write")
    temperature: float = chain.option(0.7, "0 is greedy, 1 the model's own probabilities")
    top_k: int = chain.option(0, "keep only the k likeliest tokens; 0 keeps all")
    top_p: float = chain.option(0.95, "keep the likeliest tokens that together reach this probability; "
                                "1 keeps all")
    repetition_penalty: float = chain.option(1.0, "above 1: tokens that were seen become less likely")
    show_probs: bool = chain.option(False, "colour each token by its probability and list the runners-up")
    dollars_per_hour: float = chain.option(0.0, "what the machine costs: tells the price of a million tokens")
    seed: int = chain.option(0, "seed of the draws")
    device: str = chain.option("auto", "auto, cpu, cuda or mps")


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
    if 0 < top_k < logits.shape[-1]:
        # subtle: keep by place, not by value, or ties would let more than k tokens through
        values, places = logits.topk(top_k, dim=-1)  # (B, k)
        logits = torch.full_like(logits, -math.inf).scatter(-1, places, values)
    if top_p < 1:
        values, places = logits.sort(dim=-1, descending=True)  # (B, V)
        p = values.softmax(dim=-1)
        before = p.cumsum(dim=-1) - p  # the probability of all likelier tokens
        values = values.masked_fill(before >= top_p, -math.inf)
        logits = torch.full_like(logits, -math.inf).scatter(-1, places, values)
    return logits


def penalise_repetition(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Make the tokens in `ids` (B, T) less likely: divide their positive logits (B, V) by `penalty`, multiply
    the negative ones (Keskar 2019, eq. 2).
    """
    seen = logits.gather(-1, ids)  # (B, T)
    return logits.scatter(-1, ids, torch.where(seen > 0, seen / penalty, seen * penalty))


def sample_token(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token a row from softmax(logits). logits (B, V) → ids (B, 1)."""
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


@torch.inference_mode()
def generate(model: GPT, ids: Tensor, tokens: int, *, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0, repetition_penalty: float = 1.0,
             generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Go on from ids (B, T), T ≥ 1: yield (new ids (B, 1), the model's own logits (B, V)) for each new token.

    It ends after `tokens`, or when the context is full. Raises ValueError when the prompt does not fit.
    """
    cache = KVCache(model.config, ids.shape[0], ids.device, model.embedding.weight.dtype)
    written = new = ids
    threads = torch.get_num_threads()
    try:
        if sum(p.numel() for p in model.parameters()) * ids.shape[0] < 2e7:
            torch.set_num_threads(1)  # so short a step takes longer when cores share it
        for _ in range(min(tokens, max(1, model.config.context - ids.shape[1] + 1))):
            logits = model(new, cache)[:, -1].float()  # (B, V)
            scores = logits
            if repetition_penalty != 1:
                scores = penalise_repetition(logits, written, repetition_penalty)
            if temperature == 0:
                new = scores.argmax(dim=-1, keepdim=True)  # (B, 1)
            else:
                new = sample_token(filter_logits(scores, temperature, top_k, top_p), generator)  # (B, 1)
            if repetition_penalty != 1:
                written = torch.cat([written, new], dim=1)  # (B, T + 1)
            yield new, logits
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------ checkpoint → model, ids → text

ROOMS = ("base",)  # the checkpoints of the chain, in order; the last one that exists is the newest


def newest_checkpoint(out: str) -> Path:
    """Return the checkpoint in the folder `out` that has come furthest along the chain."""
    there = [Path(out, f"{room}.pt") for room in ROOMS if Path(out, f"{room}.pt").exists()]
    return there[-1] if there else Path(out, f"{ROOMS[0]}.pt")


def load_model(path, device: str = "cpu") -> tuple[GPT, Tokenizer, dict]:
    """Return (model in eval mode on `device`, its tokenizer, the checkpoint's content). Raises UserError."""
    content = chain.load_checkpoint(path)
    try:
        model = GPT(GPTConfig(**content["config"]))
        model.load_state_dict(content["weights"])
        tokenizer = Tokenizer.from_dict(content["tokenizer"])
    except (TypeError, RuntimeError, ValueError, AssertionError, KeyError) as error:
        raise chain.UserError(f"{path}: its sizes and its weights do not belong together "
                              f"({str(error).splitlines()[-1].strip()[:120]}); make it again")
    return model.to(device).eval(), tokenizer, content


def text_decoder() -> codecs.IncrementalDecoder:
    """Return a decoder that holds bytes back until their character is whole: tokens may cut characters."""
    return codecs.getincrementaldecoder("utf-8")("replace")


def until(ids: list[int], end: int | None) -> list[int]:
    """Return the ids before the first `end`.

    >>> until([5, 6, 0, 7], 0)
    [5, 6]
    """
    return ids[:ids.index(end)] if end in ids else ids


def colour(probability: float) -> str:
    """Return the terminal's code for a probability: red is a surprise, green is sure."""
    return f"\x1b[38;5;{(196, 208, 220, 148, 46)[min(4, int(probability * 5))]}m"


def print_probabilities(tokenizer: Tokenizer, ids: list[int], law: list[Tensor]) -> None:
    """Print each token in the colour of its probability, then a line a token with the three likeliest.

    `law` are the model's own logits (V,) before each token, untouched by temperature and the filters.
    """
    probabilities = [logits.softmax(dim=-1) for logits in law[:len(ids)]]
    coloured = [(colour(float(p[i])), tokenizer.decode([i])) for i, p in zip(ids, probabilities)]
    print("".join(f"{code}{text}\x1b[0m" for code, text in coloured))
    for i, p, (code, text) in zip(ids, probabilities, coloured):
        runners = [f"{tokenizer.decode([j])!r} {float(p[j]):.0%}" for j in p.topk(3).indices.tolist()]
        print(f"{code}{text!r:>16} {p[i]:4.0%}\x1b[0m   {'   '.join(runners)}")


# ---------------------------------------------------------------------------------------------- the loop

def complete(model: GPT, tokenizer: Tokenizer, config: Config) -> dict:
    """Print `config.n` completions of `config.prompt`, the first one as it is made; return the metrics."""
    context, device = model.config.context, model.embedding.weight.device
    end = tokenizer.special.get("<|endoftext|>")  # ends a document, and so stands before each
    prompt = [*([] if end is None else [end]), *tokenizer.encode(config.prompt)] or tokenizer.encode("\n")
    chain.require(len(prompt) <= context, f"--prompt is {len(prompt):,} tokens long, the model's context "
                  f"holds {context:,}: shorten it, or train with a larger --context")
    ids = torch.tensor([prompt] * config.n, device=device)  # (n, T)
    draws, decoder = torch.Generator(device).manual_seed(config.seed), text_decoder()
    rows, law, times = [[] for _ in range(config.n)], [], [time.perf_counter()]
    print(config.prompt, end="", flush=True)
    for new, logits in generate(model, ids, config.tokens, temperature=config.temperature,
                                top_k=config.top_k, top_p=config.top_p,
                                repetition_penalty=config.repetition_penalty, generator=draws):
        times.append(time.perf_counter())
        law.append(logits[0])
        for row, token in zip(rows, new[:, 0].tolist()):
            row.append(token)
        if end not in rows[0]:
            print(decoder.decode(tokenizer.vocab[rows[0][-1]]), end="", flush=True)
        if all(end in row for row in rows):
            break
    print(decoder.decode(b"", final=True))
    for number, row in enumerate(rows[1:], 2):
        print(f"--- {number}\n{config.prompt}{tokenizer.decode(until(row, end))}")
    if config.show_probs:
        print_probabilities(tokenizer, until(rows[0], end), law)
    if len(prompt) + len(law) > context:
        print(f"(stopped: the context of {context} tokens is full)")
    return speed(model, config, len(prompt), times)


def speed(model: GPT, config: Config, T: int, times: list[float]) -> dict:
    """Return what the completions cost. `times` (seconds) are the start and the arrival of each token."""
    first, rest = times[1] - times[0], (times[-1] - times[1]) / max(1, len(times) - 2)
    metrics = {
        "time_to_first_token_ms": 1000 * first,
        "prompt_tokens_per_second": config.n * T / first,
        "ms_per_token": 1000 * rest,
        "decode_tokens_per_second": config.n / rest if rest else 0.0,
        "weight_bytes": sum(p.nbytes for p in model.parameters()),
        "cache_bytes": KVCache(model.config, config.n, dtype=model.embedding.weight.dtype).n_bytes,
    }
    if config.dollars_per_hour:
        metrics["dollars_per_million_tokens"] = config.dollars_per_hour * 1e6 * rest / config.n / 3600
    return metrics


@chain.command
def main(argv=None) -> dict:
    """Write text with a checkpoint, and report what it cost."""
    config, started = chain.parse(Config, argv, __doc__), time.time()
    chain.require(config.n >= 1 and config.tokens >= 1,
                  f"--n {config.n} --tokens {config.tokens}: both start at 1")
    chain.require(config.temperature == 0 or 0.01 <= config.temperature < 1e6,
                  f"--temperature {config.temperature}: give 0 (greedy), or 0.01 and more")
    chain.require(0 < config.top_p <= 1 and config.top_k >= 0,
                  f"--top_p {config.top_p} --top_k {config.top_k}: 0 < top_p ≤ 1 and top_k ≥ 0")
    chain.require(config.repetition_penalty > 0,
                  f"--repetition_penalty {config.repetition_penalty}: it is above 0")
    config.device = chain.pick_device(config.device)
    path = Path(config.checkpoint) if config.checkpoint else newest_checkpoint(config.out)
    model, tokenizer, content = load_model(path, config.device)
    print(f"{path}: {sum(p.numel() for p in model.parameters()):,} parameters, step {content['step']:,}\n")
    metrics = complete(model, tokenizer, config)
    chain.report("sample.py", config, metrics, time.time() - started)
    return metrics


if __name__ == "__main__":
    main()
