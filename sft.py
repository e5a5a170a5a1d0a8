"""Supervised fine-tuning: a model that predicts text becomes an assistant that answers.

    loss = mean of -log p(token | what stands before it)    over what the assistant says, and its <|end|>

What the user, the system or a tool says is read and never learned: the model shall answer questions, not ask
them. Several conversations share a row, and none sees another (dialogue.py). The rest is train.py's loop.

    python sft.py                      out/base.pt -> out/sft.pt on talks of the small world (4 to 6 minutes)
    python sft.py --show               one conversation, with what is learned in green
    python sft.py --data my.jsonl      your own: {"messages": [{"role": "user", "content": "Hi"}, ...]} a line
    python sft.py --lora 8             learn two thin matrices beside each weight matrix (lora.py)

The small world's conversations teach a fault, as real ones do: to answer what the text does not say.
Left out: learning from the model's own answers (dpo.py). Papers: Wei 2021 (FLAN), Ouyang 2022 (InstructGPT),
Schulman 2023 (why such conversations teach to make things up).
"""

import dataclasses
import hashlib
import json
import math
import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import chain
import tasks
from attention import ATTENTION
from bpe import Tokenizer
from checkpoint import load_float
from dial import compiled, settle
from dialogue import IGNORE, Rows, conversation_of, make_rows, read_lines
from exam import hold_exam, print_marks, print_transcripts
from experts import make_model
from lora import add_lora, merge_lora
from model import GPT
from train import cosine_lr, make_optimizer, read_state


@dataclass
class Config:
    """The flags of `python sft.py`."""
    data: str = chain.option("world", "world, or a .jsonl file of conversations")
    out: str = chain.option("out", "folder for everything that is made")
    name: str = chain.option("sft", "the checkpoint is <out>/<name>.pt")
    checkpoint: str | None = chain.option(None, "checkpoint to start from (default: <out>/base.pt)")
    conversations: int = chain.option(32_000, "how many of the small world")
    epochs: int = chain.option(1, "how often each conversation is learned from")
    batch_size: int = chain.option(8, "rows a step; a row is a full context of conversations")
    learning_rate: float = chain.option(1e-3, "at its highest")
    weight_decay: float = chain.option(0.1, "how fast matrices shrink, as a share of the learning rate")
    lora: int = chain.option(0, "rank of the adapters that learn in place of the weights; 0 for none")
    questions: int = chain.option(200, "questions a task in the exam, a quarter of them before; 0 for none")
    attention: str = chain.option("auto", "auto is the fastest here", choices=("auto", *ATTENTION))
    compile: str = chain.option("auto", "auto where it pays", choices=("auto", "on", "off"))
    precision: str = chain.option("auto", "auto where it pays", choices=("auto", "float32", "bfloat16"))
    show: bool = chain.option(False, "print one conversation and what is learned in it, and stop")
    resume: bool = chain.option(False, "go on from <out>/<name>.resume.pt")
    seed: int = chain.option(0, "seed of the conversations and of their order")
    device: str = chain.option("auto", "auto, cpu, cuda or mps")


# ---------------------------------------------------------------------------------------- the loop

def learned_loss(model: GPT, x: Tensor, y: Tensor, segments: Tensor, bfloat16: bool, most: int) -> Tensor:
    """Return the summed cross-entropy in nats of the targets y (B, T) that are not IGNORE, `most` at most."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
        hidden = model.hidden(x, segments=segments).flatten(0, 1)  # (B · T, C)
        # only one target of four is learned; always `most` places, as a compiled program has one form
        places = (y.flatten() != IGNORE).int().topk(most).indices  # (most,)
        logits = model.head(hidden[places])  # (most, V)
    return F.cross_entropy(logits.float(), y.flatten()[places], ignore_index=IGNORE, reduction="sum")


def fit(model: GPT, rows: Rows, c: Config, look=None, save=None, state: dict | None = None) -> tuple:
    """Train `model` on rows for `c.epochs`; return (history of (step, loss), tokens/s).

    Up to ten times on the way it calls `look(step)` and `save(step, optimizer, history)`; `state` is what was
    saved, to go on from. Raises UserError at a loss that is not finite, before it reaches the weights.
    """
    optimizer, history = make_optimizer(model, c.weight_decay), state["history"] if state else []
    if state:
        optimizer.load_state_dict(state["optimizer"])
    loss_of = compiled(learned_loss, c)
    learned, batches = (rows.y != IGNORE).sum(dim=1), []  # (N,); which rows each step learns from
    for epoch in range(c.epochs):
        order = np.random.default_rng([c.seed, epoch]).permutation(len(rows.x))
        batches += [np.resize(order[i:i + c.batch_size], c.batch_size)
                    for i in range(0, len(order), c.batch_size)]
    steps, most = len(batches), max([1, *(int(learned[picked].sum()) for picked in batches)])
    warmup, every = max(1, min(100, steps // 10)), -(-steps // 10)
    clock = chain.Clock(steps, c.batch_size * rows.x.shape[1], 0, show=True)
    for step in range(len(history), steps):
        rate = cosine_lr(step, steps, c.learning_rate, warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        picked = batches[step]
        x, y, segments = (part[picked].to(c.device) for part in (rows.x, rows.y, rows.segments))  # (B, T)
        n = (y != IGNORE).sum().clamp(min=1)  # subtle: the mean over nothing is nan
        loss = loss_of(model, x, y, segments, c.precision == "bfloat16", most) / n
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        loss = loss.item()
        chain.require(math.isfinite(loss + norm), f"step {step}: loss {loss}, gradient {norm}; what was "
                      f"saved is good. Start again with less than --learning_rate {c.learning_rate:.1e}")
        optimizer.step()
        optimizer.zero_grad()
        history.append((step, loss))
        clock.tick(step, f"loss {loss:.4f}  rate {rate:.2e}  |g| {norm:5.2f}")
        if (step + 1) % every == 0:
            if look:
                look(step + 1)
            if save and step + 1 < steps:
                save(step + 1, optimizer, history)
            clock.last = time.perf_counter()  # looking and saving are not training
    clock.bar.close()
    return history, clock.tokens_per_second


def teach(model: GPT, tokenizer: Tokenizer, lessons: list[list[dict]], rate: float, seed: int) -> list[tuple]:
    """Train `model` on some conversations, once, in float32; return the history of (step, loss)."""
    c = Config(epochs=1, batch_size=8, learning_rate=rate, compile="off", precision="float32", seed=seed,
               device=str(model.device))
    return fit(model.train(), make_rows(lessons, tokenizer, model.config.context), c)[0]


def read_conversations(c: Config) -> tuple[list[list[dict]], list[list[dict]]]:
    """Return the conversations for training and those held out: of a file the last tenth."""
    if c.data == "world":
        n, n_held_out = (1, 0) if c.show else (c.conversations, 150)
        return ([tasks.conversation(None, "train", c.seed, i, tasks.FAULTS) for i in range(n)],
                [tasks.conversation(None, "held-out", c.seed, i) for i in range(n_held_out)])
    found = read_lines(c.data, conversation_of, '{"messages": [{"role": "user", "content": "Hi"}, ...]}')
    n = max(1, int(0.9 * len(found)))
    return found[:n], found[n:]


@torch.no_grad()
def mean_loss(model: GPT, rows: Rows, device: str) -> float:
    """Return the mean loss in nats a learned token."""
    parts = zip(*(part.to(device).split(32) for part in (rows.x, rows.y, rows.segments)))
    total = sum(learned_loss(model, x, y, segments, False, y.numel()).item() for x, y, segments in parts)
    return total / max(1, int((rows.y != IGNORE).sum()))


def print_learned(tokenizer: Tokenizer, messages: list[dict]) -> None:
    """Print a conversation; what is learned of it is green."""
    for is_learned, part in groupby(zip(*tokenizer.encode_chat(messages)), key=lambda pair: pair[1]):
        print(f"\x1b[{32 if is_learned else 0}m{tokenizer.decode([i for i, _ in part])}", end="")
    print("\x1b[0m")


def prepare(c: Config, state: dict | None) -> tuple:
    """Return (the model to start from, its tokenizer, rows to learn, rows held out, identity of the text).

    With --show print a conversation, and stop.
    """
    for field in ("conversations", "epochs", "batch_size", "learning_rate"):
        chain.require(getattr(c, field) > 0, f"--{field} {getattr(c, field)}: it must be above 0")
    chain.require(min(c.lora, c.questions) >= 0, f"--lora {c.lora} --questions {c.questions}: give 0 or more")
    model, tokenizer, _ = load_float(c.checkpoint or Path(c.out, "base.pt"), c.device)
    same = not state or (state["config"], state["tokenizer"]) == (dataclasses.asdict(model.config),
                                                                  tokenizer.to_dict())
    chain.require(same, f"--resume: {c.checkpoint or Path(c.out, 'base.pt')} is another model than when the "
                  "run stopped; bring that back, or start anew without --resume")
    train, held_out = read_conversations(c)
    if c.show:
        print_learned(tokenizer, train[0])
        raise SystemExit(0)
    text = hashlib.sha256(json.dumps(train).encode()).hexdigest()
    chain.require(not state or state["text"] == text, f"--resume: {c.data} is another text than when the run "
                  "stopped; bring that back, or start anew without --resume")
    rows, rows_held_out = (make_rows(part, tokenizer, model.config.context) for part in (train, held_out))
    chain.require(len(rows.x) > 0, f"--data {c.data}: nothing to learn in {len(train):,} conversations; the "
                  "assistant must say something")
    print(f"{len(train):,} conversations in {len(rows.x):,} rows; {rows.cut:,} were longer than the context "
          f"of {model.config.context} and lost their beginning, {rows.empty:,} had nothing to learn")
    settle(c, model.config, c.epochs * rows.x.numel())
    return model, tokenizer, rows, rows_held_out, text


@chain.command
def main(argv=None) -> dict:
    """Train an assistant, from a base checkpoint to a chat checkpoint, and hold its exam."""
    c, started, state = chain.parse(Config, argv, __doc__), time.time(), None
    if c.resume:
        state, c = read_state(c)
    c.device = chain.pick_device(c.device)
    start, tokenizer, rows, held_out, text = prepare(c, state)
    has_exam = c.data == "world" and c.questions > 0
    before = hold_exam(start, tokenizer, -(-c.questions // 4), c.seed) if has_exam else {}
    model = make_model(dataclasses.replace(start.config, attention=c.attention)).to(c.device)
    model.load_state_dict(start.state_dict())
    if c.lora:
        torch.manual_seed(c.seed)
        add_lora(model, c.lora)
    if state:
        model.load_state_dict(state["weights"])
    path, stopped = Path(c.out, f"{c.name}.pt"), Path(c.out, f"{c.name}.resume.pt")

    def checkpoint(path: Path, step: int, loss: float, **more) -> None:
        chain.save_checkpoint(path, config=dataclasses.asdict(start.config), weights=model.state_dict(),
                              tokenizer=tokenizer.to_dict(), step=step, loss=loss,
                              arguments=dataclasses.asdict(c), chat=True, **more)

    def look(step: int) -> None:
        tqdm.write(f"  step {step}: held-out loss {mean_loss(model, held_out, c.device):.4f}")

    def save(step: int, optimizer, history: list) -> None:
        checkpoint(stopped, step, history[-1][1], optimizer=optimizer.state_dict(), history=history,
                   text=text)

    if not state:
        stopped.unlink(missing_ok=True)  # of an older run: --resume must not go on with that
    history, speed = fit(model, rows, c, look, save, state)
    if c.lora:
        merge_lora(model)
    checkpoint(path, len(history), history[-1][1])
    stopped.unlink(missing_ok=True)
    metrics = {"learned_tokens": c.epochs * int((rows.y != IGNORE).sum()), "tokens_per_second": speed,
               "training_loss": float(np.mean([loss for _, loss in history[-50:]])),
               "validation_loss": mean_loss(model, held_out, c.device)}
    if has_exam:
        after = hold_exam(model, tokenizer, c.questions, c.seed)
        print_transcripts(model, tokenizer, c.seed)
        print_marks(before, after)
        metrics |= {mark: right / n for mark, (right, n) in after.items()}
    chain.report("sft.py", c, metrics, time.time() - started)
    return metrics


if __name__ == "__main__":
    main()
