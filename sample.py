"""From tokens to text: streamed as they are made, as a text that goes on or as a chat; and what it costs.

    python sample.py                                                  a new document; an assistant is greeted
    python sample.py --prompt "The mayor of Amber Hollow is" --n 3    three ways to go on
    python sample.py --prompts FILE                                   a line, a prompt: all as one batch
    python sample.py --prompt "Once" --temperature 0 --show_probs     each token coloured by its probability
    python sample.py --chat --system "Answer in one word."            talk with what sft.py or dpo.py made
    python sample.py --draft out/draft.pt                             faster by guessing (speculative.py)
    python sample.py --int4                                           smaller (packed.py)
    python sample.py --compile                                        each step one program (decode.py)
    python sample.py --bench --random 110M                            what it costs, side by side (bench.py)

How a token is chosen stands in decode.py. Prefill reads the whole prompt in one pass; decode then reads every
weight for each token: its speed is the memory's. Left out: text past the context, a cache kept between turns.
"""

import codecs
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

import bench
import chain
from bpe import Tokenizer
from checkpoint import load_model, newest_checkpoint, random_model
from decode import compile_step, generate, pad_prompts, until
from drafts import GUESSES, has_experts, make_draft, read_draft
from model import GPT, KVCache, count_parameters
from packed import has_kernel, quantize_model, weight_bytes
from speculative import Rounds, speculate, tokens_a_round


@dataclass
class Config:
    """The flags of `python sample.py`."""
    out: str = chain.option("out", "folder for everything that is made")
    checkpoint: str | None = chain.option(None, "checkpoint to read (default: the newest room's in --out)")
    prompt: str = chain.option("", "text to go on from, or to answer; without: a new document, or a greeting")
    prompts: str | None = chain.option(None, "a file with a prompt a line, all to be made as one batch")
    chat: bool = chain.option(False, "answer what you type; commands: /reset, /system TEXT, /quit")
    system: str = chain.option("", "system prompt of an assistant")
    n: int = chain.option(1, "how many completions, made as one batch")
    tokens: int = chain.option(200, "the most tokens to write")
    temperature: float = chain.option(0.7, "0 is greedy, 1 the model's own probabilities")
    top_k: int = chain.option(0, "keep only the k likeliest tokens; 0 keeps all")
    top_p: float = chain.option(0.95, "the fewest tokens that together reach this probability; 1 keeps all")
    repetition_penalty: float = chain.option(1.0, "above 1: tokens that were seen become less likely")
    show_probs: bool = chain.option(False, "colour each token by its probability and list the runners-up")
    draft: str | None = chain.option(None, "a checkpoint that guesses tokens, or ngram")
    n_draft: int | None = chain.option(None, "tokens guessed at once (default: 5 by a model, 8 by look-up)")
    int8: bool = chain.option(False, "put the weights into 8 bits")
    int4: bool = chain.option(False, "put the weights into 4 bits")
    compile: bool = chain.option(False, "compile the step (half a minute)")
    bench: bool = chain.option(False, "measure the speed of all these ways")
    random: str | None = chain.option(None, "with --bench: random weights of that many parameters, as 110M")
    dollars_per_hour: float = chain.option(0.0, "what the machine costs: tells the price of a million tokens")
    seed: int = chain.option(0, "seed of the draws")
    device: str = chain.option("auto", "auto, cpu, cuda or mps")


@dataclass
class Way:
    """How tokens are made, when not plainly: by a compiled step, or with a draft's guesses, counted."""
    step: object = None
    draft: GPT | str | None = None
    rounds: Rounds | None = None


# --------------------------------------------------------------------------------------------- ids → text

def text_decoder() -> codecs.IncrementalDecoder:
    """Return a decoder that holds bytes back until their character is whole: tokens may cut characters."""
    return codecs.getincrementaldecoder("utf-8")("replace")


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
    """Return the ids that ask the assistant to speak: <|endoftext|><|user|> Hi<|end|><|assistant|>."""
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

def write(model: GPT, config: Config, way: Way, prompts: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (new ids (B, 1), logits (B, V)) that go on from the prompts. UserError if one is too long."""
    T, context = max(map(len, prompts)), model.config.context
    chain.require(T <= context, f"the prompt is {T:,} tokens long, the model's context holds {context:,}: "
                  "shorten it, or train with a larger --context")
    ids, lengths = pad_prompts(prompts, model.device)  # (B, T), (B,)
    filters = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    if way.draft is not None:
        draft = make_draft(way.draft, model, config.compile, **filters)
        way.rounds = Rounds(config.n_draft or GUESSES["ngram" if way.draft == "ngram" else "draft"])
        return speculate(model, draft, ids, config.tokens, way.rounds, **filters, compiled=config.compile)
    return generate(model, ids, config.tokens, **filters, repetition_penalty=config.repetition_penalty,
                    lengths=lengths if len(set(map(len, prompts))) > 1 else None, step=way.step)


def complete(model: GPT, tokenizer: Tokenizer, config: Config, way: Way, prompts: list[list[int]],
             end: int | None, leads: list[str]) -> tuple[str, dict]:
    """Print the texts that go on from `prompts` to `end`, after `leads`; return (the first, metrics)."""
    # subtle: what an assistant says begins with a space that is not its own, see `encode_chat`
    context, space = model.config.context, " " if end == tokenizer.special.get("<|end|>", -1) else ""
    rows, law, times, decoder = [[] for _ in prompts], [], [time.perf_counter()], text_decoder()
    print(leads[0], end="", flush=True)
    for new, logits in write(model, config, way, prompts):
        rows = [[*row, token] for row, token in zip(rows, new[:, 0].tolist())]  # waits for a GPU
        times.append(time.perf_counter())
        law.append(logits[0])
        if len(law) == 1:
            at_once = way.rounds.tokens if way.rounds else 1  # a draft's first round may bring several
        if end not in rows[0] and len(rows[0]) <= context - len(prompts[0]) + 1:
            said = decoder.decode(tokenizer.vocab[rows[0][-1]])
            print(said.removeprefix(space if len(law) == 1 else ""), end="", flush=True)
        if all(end in row for row in rows):
            break
    print(decoder.decode(b"", final=True))
    rows = [row[:context - len(prompt) + 1] for prompt, row in zip(prompts, rows)]
    texts = [tokenizer.decode(until(row, end)).removeprefix(space) for row in rows]
    for number, (lead, text) in enumerate(zip(leads[1:], texts[1:]), 2):
        print(f"--- {number}\n{lead}{text}")
    if config.show_probs:
        print_probabilities(tokenizer, until(rows[0], end), law)
    if any(end not in row for row in rows):
        print(f"(stopped after {len(law)} tokens: --tokens is {config.tokens}, the context holds {context})")
    return texts[0], speed(model, config, prompts, times[:1] + times[min(at_once, len(law)):])


def chat(model: GPT, tokenizer: Tokenizer, config: Config, way: Way, system: list[dict[str, str]]) -> None:
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
            answer, _ = complete(model, tokenizer, config, way, [prompt], tokenizer.special["<|end|>"], [""])
            messages = [*kept, {"role": "assistant", "content": answer}]


def speed(model: GPT, config: Config, prompts: list[list[int]], times: list[float]) -> dict:
    """Return what the completions cost. `times` (seconds): the start, the first tokens, each one after."""
    n, first, rest = len(prompts), times[1] - times[0], (times[-1] - times[1]) / max(1, len(times) - 2)
    metrics = {"time_to_first_token_ms": 1000 * first,
               "prompt_tokens_per_second": sum(map(len, prompts)) / first,
               "ms_per_token": 1000 * rest, "decode_tokens_per_second": n / rest if rest else 0.0,
               "weight_bytes": weight_bytes(model),
               "cache_bytes": KVCache(model.config, n, dtype=model.dtype).n_bytes}
    if config.dollars_per_hour:
        metrics["dollars_per_million_tokens"] = config.dollars_per_hour * 1e6 * rest / n / 3600
    return metrics


def speculation(model: GPT, config: Config, rounds: Rounds, prompts: list, ms_per_token: float) -> dict:
    """Return what guessing brought, beside plain decoding of as many tokens from the same prompt."""
    times = bench.arrivals(write(model, replace(config, tokens=rounds.tokens), Way(), prompts), model.device)
    return {"accepted": rounds.alpha, "tokens_a_pass": rounds.tokens_a_pass,
            "tokens_a_round": sum(rounds.accepted) / max(1, len(rounds.accepted)) + 1,  # of the full ones
            "tokens_a_round_by_formula": tokens_a_round(rounds.alpha, rounds.n),
            "speed_up": 1000 * (times[-1] - times[0]) / max(1, len(times) - 1) / ms_per_token}


def quantize(model: GPT, bits: int, path: Path) -> None:
    """Put the weights of `model` into so many bits, in place."""
    try:
        quantize_model(model, bits)
    except ValueError as error:
        raise chain.UserError(f"--int{bits} {path}: {error}; leave out --int{bits}")
    if not has_kernel(bits, model.device):
        print(f"(torch has no kernel for int{bits} on {model.device}: the readable path serves, no faster)")


def check(config: Config) -> None:
    """Raise UserError for flags that make no sense."""
    chain.require(min(config.n, config.tokens) >= 1, f"--n {config.n} --tokens {config.tokens}: start at 1")
    chain.require(config.temperature == 0 or 0.01 <= config.temperature < 1e6,
                  f"--temperature {config.temperature}: give 0 (greedy), or 0.01 and more")
    chain.require(0 < config.top_p <= 1 and config.top_k >= 0,
                  f"--top_p {config.top_p} --top_k {config.top_k}: 0 < top_p ≤ 1 and top_k ≥ 0")
    chain.require(config.repetition_penalty > 0, f"--repetition_penalty {config.repetition_penalty}: use > 0")
    chain.require(not (config.chat and (config.prompt or config.prompts)),
                  "--chat reads what you type; leave out --prompt and --prompts")
    chain.require(not (config.int8 and config.int4), "--int8 and --int4: choose one")
    chain.require(config.n_draft is None or config.n_draft >= 1, f"--n_draft {config.n_draft}: start at 1")
    alone = config.n == 1 and not config.prompts and config.repetition_penalty == 1
    chain.require(config.draft is None or alone, f"--draft {config.draft} serves one text at a time: leave "
                  "out --n, --prompts and --repetition_penalty")
    chain.require(not (config.bench and config.draft and config.compile),
                  "--bench measures a draft as it is: leave out --compile or --draft")
    chain.require(config.bench or not config.random, f"--random {config.random}: add --bench; it can't write")


def read_prompts(config: Config, tokenizer: Tokenizer, is_chat: bool, system: list[dict]) -> tuple:
    """Return (prompts as ids, the token that ends an answer, what is printed before each)."""
    texts = [config.prompt] * config.n
    if config.prompts:
        path = Path(config.prompts)
        chain.require(path.is_file(), f"--prompts {path}: no such file; give a text with a prompt a line")
        texts = [line for line in path.read_text("utf-8", "replace").splitlines() if line.strip()]
        chain.require(texts, f"--prompts {path}: it has no line; write a prompt a line")
    if is_chat:
        said = [[*system, {"role": "user", "content": text or "Hello. Who are you?"}] for text in texts]
        return [chat_prompt(tokenizer, each) for each in said], tokenizer.special["<|end|>"], [""] * len(said)
    end = tokenizer.special.get("<|endoftext|>")  # stands before each document too
    start = [] if end is None else [end]
    return [start + tokenizer.encode(text) or tokenizer.encode("\n") for text in texts], end, texts


@chain.command
def main(argv=None) -> dict:
    """Write text with a checkpoint, and report what it cost."""
    config, started = chain.parse(Config, argv, __doc__), time.time()
    check(config)
    config.device = chain.pick_device(config.device)
    path = Path(config.checkpoint or newest_checkpoint(config.out))
    model, tokenizer, content = ((random_model(config.random, config.device), None, {"step": 0})
                                 if config.random else load_model(path, config.device))
    print(f"{config.random or path}: {count_parameters(model.config):,} parameters, step {content['step']}\n")
    draft = read_draft(config.draft, model, content) if config.draft else None
    chain.require(not (config.compile and has_experts(model, draft)),
                  f"{path} or its draft has experts: leave out --compile")
    chain.require(not (config.compile and draft) or model.device.type == "cpu",
                  f"--draft {config.draft} --compile: that is for a CPU; leave out --compile")
    if config.bench:
        metrics = bench.measure(model, draft, config.dollars_per_hour, config.compile)
        chain.report("sample.py --bench", config, metrics, time.time() - started)
        return metrics
    chain.require(content.get("chat") or not (config.chat or config.system), f"{path} is no assistant: "
                  "--chat and --system need one, and `python sft.py` makes it")
    if config.int8 or config.int4:
        quantize(model, 8 if config.int8 else 4, path)
    torch.manual_seed(config.seed)
    way = Way(compile_step(model.device) if config.compile and not draft else None, draft)
    system = [{"role": "system", "content": config.system}] if config.system else []
    if config.chat:
        chat(model, tokenizer, config, way, system)
        return {}
    prompts, end, leads = read_prompts(config, tokenizer, bool(content.get("chat")), system)
    metrics, before = {}, time.perf_counter()
    if config.compile:
        with torch.random.fork_rng():  # a prefill and a step, or a round of guesses and the next one
            list(islice(write(model, config, way, prompts), 2 + (config.n_draft or GUESSES["draft"])))
        metrics["compile_seconds"] = time.perf_counter() - before
    metrics |= complete(model, tokenizer, config, way, prompts, end, leads)[1]
    if way.rounds and metrics["ms_per_token"]:  # one token tells no speed
        metrics |= speculation(model, config, way.rounds, prompts, metrics["ms_per_token"])
    chain.report("sample.py", config, metrics, time.time() - started)
    return metrics


if __name__ == "__main__":
    main()
