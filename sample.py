"""From logits to text: temperature, top-k, top-p, a repetition penalty, and tokens streamed as they are made.

    scores = logits / temperature         below 1: bolder on what is likely; 0: always the likeliest (greedy)
    top-k: keep the k likeliest tokens    top-p: keep the fewest tokens whose probabilities reach p
    the next token is drawn from softmax(scores), written into the cache, and the model is asked again

    python sample.py                                                  a new document; an assistant is greeted
    python sample.py --prompt "The mayor of Amber Hollow is" --n 3    three ways to go on
    python sample.py --prompt "Once" --temperature 0 --show_probs     each token coloured by its probability
    python sample.py --chat --system "Answer in one word."            talk with what sft.py or dpo.py made

Prefill reads the whole prompt in one pass; decode then asks for one token at a time. Decode reads every
weight for each token, so its speed is the memory's, not the processor's: the report tells both.
Left out: beam search (it harms open-ended text), text past the context, a cache kept between a chat's turns.
Papers: Fan 2018 (top-k), Holtzman 2020 (top-p), Keskar 2019 (repetition penalty).
"""

import codecs
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import chain
from bpe import Tokenizer
from model import GPT, GPTConfig, KVCache

ROOMS = ("base", "sft", "dpo")  # the checkpoints of the chain, in order; the last that exists is the newest


@dataclass
class Config:
    """The flags of `python sample.py`."""
    out: str = chain.option("out", "folder for everything that is made")
    checkpoint: str | None = chain.option(None, "checkpoint to read (default: the newest room's in --out)")
    prompt: str = chain.option("", "text to go on from, or to answer; without: a new document, or a greeting")
    chat: bool = chain.option(False, "answer what you type; commands: /reset, /system TEXT, /quit")
    system: str = chain.option("", "system prompt of an assistant")
    n: int = chain.option(1, "how many completions, made as one batch")
    tokens: int = chain.option(200, "the most tokens to write")
    temperature: float = chain.option(0.7, "0 is greedy, 1 the model's own probabilities")
    top_k: int = chain.option(0, "keep only the k likeliest tokens; 0 keeps all")
    top_p: float = chain.option(0.95, "the fewest tokens that together reach this probability; 1 keeps all")
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


@torch.inference_mode()
def generate(model: GPT, ids: Tensor, tokens: int, *, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0, repetition_penalty: float = 1.0,
             generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Go on from ids (B, T), T ≥ 1: yield (new ids (B, 1), the model's own logits (B, V)) for each new token.

    It ends after `tokens`, or when the context is full. Raises ValueError when the prompt does not fit.
    """
    cache = KVCache(model.config, ids.shape[0], ids.device, model.embedding.weight.dtype)
    written, new, threads = ids, ids, torch.get_num_threads()
    try:
        if sum(p.numel() for p in model.parameters()) * ids.shape[0] < 2e7:
            torch.set_num_threads(1)  # so short a step takes longer when cores share it
        for _ in range(min(tokens, max(1, model.config.context - ids.shape[1] + 1))):
            logits = model(new, cache)[:, -1].float()  # (B, V)
            scores = penalise_repetition(logits, written, repetition_penalty)
            new = (scores.argmax(dim=-1, keepdim=True) if temperature == 0 else
                   sample_token(filter_logits(scores, temperature, top_k, top_p), generator))  # (B, 1)
            written = torch.cat([written, new], dim=1)  # (B, T + 1)
            yield new, logits
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------ checkpoint → model, ids → text

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


def print_probabilities(tokenizer: Tokenizer, ids: list[int], law: list[Tensor]) -> None:
    """Print ids from red (a surprise) to green (sure), then their rivals; `law`: the model's logits (V,)."""
    colours, probabilities = (196, 208, 220, 148, 46), [logits.softmax(dim=-1) for logits in law]
    codes = [f"\x1b[38;5;{colours[min(4, int(5 * p[i]))]}m" for i, p in zip(ids, probabilities)]
    texts = [tokenizer.decode([i]) for i in ids]
    print("".join(f"{code}{text}\x1b[0m" for code, text in zip(codes, texts)))
    for i, p, code, text in zip(ids, probabilities, codes, texts):
        runners = [f"{tokenizer.decode([j])!r} {float(p[j]):.0%}" for j in p.topk(3).indices.tolist()]
        print(f"{code}{text!r:>16} {p[i]:4.0%}\x1b[0m   {'   '.join(runners)}")


def chat_prompt(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """Return the ids that ask the assistant to speak: <|endoftext|><|user|>Hi<|end|><|assistant|>."""
    return tokenizer.encode_chat(messages)[0] + [tokenizer.special["<|assistant|>"]]


def cut_history(tokenizer: Tokenizer, messages: list[dict], limit: int) -> tuple[list[dict], int]:
    """Drop the oldest exchanges until the prompt fits into `limit` tokens; return (messages, how many went).

    An exchange is a user's message and all up to the next one. The last one stays, even if it doesn't fit.
    """
    first, *later = [i for i, message in enumerate(messages) if message["role"] == "user"]
    kept = messages
    while later and len(chat_prompt(tokenizer, kept)) > limit:
        kept = messages[:first] + messages[later.pop(0):]  # a system message stands before the first
    return kept, len(messages) - len(kept)


# ---------------------------------------------------------------------------------------------- the loop

def complete(model: GPT, tokenizer: Tokenizer, config: Config, prompt: list[int], end: int | None,
             lead: str = "") -> tuple[str, dict]:
    """Print `config.n` texts that go on from `prompt` to `end`, after `lead`; return (the first, metrics)."""
    context = model.config.context
    chain.require(len(prompt) <= context, f"the prompt is {len(prompt):,} tokens long, the model's context "
                  f"holds {context:,}: shorten it, or train with a larger --context")
    ids = torch.tensor([prompt] * config.n, device=model.embedding.weight.device)  # (n, T)
    rows, law, times, decoder = [[] for _ in range(config.n)], [], [time.perf_counter()], text_decoder()
    print(lead, end="", flush=True)
    for new, logits in generate(model, ids, config.tokens, temperature=config.temperature, top_k=config.top_k,
                                top_p=config.top_p, repetition_penalty=config.repetition_penalty):
        times.append(time.perf_counter())
        law.append(logits[0])
        rows = [[*row, token] for row, token in zip(rows, new[:, 0].tolist())]
        if end not in rows[0]:
            print(decoder.decode(tokenizer.vocab[rows[0][-1]]), end="", flush=True)
        if all(end in row for row in rows):
            break
    print(decoder.decode(b"", final=True))
    texts = [tokenizer.decode(until(row, end)) for row in rows]
    for number, text in enumerate(texts[1:], 2):
        print(f"--- {number}\n{lead}{text}")
    if config.show_probs:
        print_probabilities(tokenizer, until(rows[0], end), law)
    if not all(end in row for row in rows):
        print(f"(stopped after {len(law)} tokens: --tokens is {config.tokens}, the context holds {context})")
    return texts[0], speed(model, config, len(prompt), times)


def chat(model: GPT, tokenizer: Tokenizer, config: Config, system: list[dict[str, str]]) -> None:
    """Answer each line that is typed, until /quit or the end. `system`: the system message, or no message."""
    context, messages = model.config.context, system
    limit = context - min(config.tokens, context // 4)  # the rest is for the answer
    sys.stdin.reconfigure(errors="replace")  # a byte that isn't UTF-8 shall not stop the program
    while True:
        print("> " if sys.stdin.isatty() else "", end="", flush=True)
        line = sys.stdin.readline()  # "" is the end, an empty line is not
        command, *text = line.strip().split(maxsplit=1) or [""]
        if not line or command == "/quit":
            print()  # Ctrl-D left the cursor behind the "> "
            return
        if command == "/system":
            system = [{"role": "system", "content": content} for content in text]  # none without TEXT
        if command in ("/reset", "/system"):
            messages = system
            print("(a new conversation)")
        elif command.startswith("/"):
            print(f"{command}: no such command; there are /reset, /system TEXT and /quit")
        elif command:
            kept, gone = cut_history(tokenizer, [*messages, {"role": "user", "content": line.strip()}], limit)
            prompt = chat_prompt(tokenizer, kept)
            if len(prompt) > limit:
                print(f"(not said: it makes {len(prompt):,} tokens, {limit:,} fit; "
                      "shorten it or the system prompt)")
                continue
            if gone:
                print(f"(the first {gone} messages no longer fit into the context of {context} tokens)")
            answer, _ = complete(model, tokenizer, config, prompt, tokenizer.special["<|end|>"])
            messages = [*kept, {"role": "assistant", "content": answer}]


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
    chain.require(min(config.n, config.tokens) >= 1, f"--n {config.n} --tokens {config.tokens}: start at 1")
    chain.require(config.temperature == 0 or 0.01 <= config.temperature < 1e6,
                  f"--temperature {config.temperature}: give 0 (greedy), or 0.01 and more")
    chain.require(0 < config.top_p <= 1 and config.top_k >= 0,
                  f"--top_p {config.top_p} --top_k {config.top_k}: 0 < top_p ≤ 1 and top_k ≥ 0")
    chain.require(config.repetition_penalty > 0, f"--repetition_penalty {config.repetition_penalty}: use > 0")
    config.device = chain.pick_device(config.device)
    path = Path(config.checkpoint) if config.checkpoint else newest_checkpoint(config.out)
    model, tokenizer, content = load_model(path, config.device)
    print(f"{path}: {sum(p.numel() for p in model.parameters()):,} parameters, step {content['step']:,}\n")
    chain.require(content.get("chat") or not (config.chat or config.system), f"{path} is no assistant: "
                  "--chat and --system need one, and `python sft.py` makes it")
    chain.require(not (config.chat and config.prompt), "--chat reads what you type; leave out --prompt")
    torch.manual_seed(config.seed)
    system = [{"role": "system", "content": config.system}] if config.system else []
    if config.chat:
        chat(model, tokenizer, config, system)
        return {}
    if content.get("chat"):
        user = {"role": "user", "content": config.prompt or "Hello. Who are you?"}
        prompt, end, lead = chat_prompt(tokenizer, [*system, user]), tokenizer.special["<|end|>"], ""
    else:
        end, lead = tokenizer.special.get("<|endoftext|>"), config.prompt  # stands before each document too
        prompt = [*([] if end is None else [end]), *tokenizer.encode(lead)] or tokenizer.encode("\n")
    _, metrics = complete(model, tokenizer, config, prompt, end, lead)
    chain.report("sample.py", config, metrics, time.time() - started)
    return metrics


if __name__ == "__main__":
    main()
