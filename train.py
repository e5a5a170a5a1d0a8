"""Pre-training: a GPT learns to predict the next token, and so learns everything else that it knows.

    loss = mean over tokens of -log p(token | the tokens before it)      in nats; at step 0 about ln V
    each step: gradient of the loss on one batch, clip its length, AdamW at this step's learning rate

    python train.py                                   the small world: 5 to 7 minutes, copying 98 %
    python train.py --resume                          go on where a run was stopped, bit for bit
    python train.py --data my.txt --out mine          your own text: file, folder, address or `stdlib`
    python train.py --depth 12 --vocab_size 32768 --data FOLDER          GPT-2's size: for a GPU
    torchrun --nproc_per_node=8 train.py --depth 12 --data FOLDER        the same on eight

`--depth` sets the rest: width, heads, context, tokens, batch, learning rate (dial.py, each with its source).
The run prints what it chose, and any flag overrules it.

Validation ends 49 % below a Kneser-Ney trigram model that counted the same tokens (evaluate.py).
Left out: dropout (no text is seen often), splitting a model up, Muon (about this loss a fifth sooner; but its
assistants here miss what a text leaves out). Papers: Radford 2019, Loshchilov 2019, Micikevicius 2018.
"""

import dataclasses
import functools
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import bpe
import chain
import data
from attention import ATTENTION
from decode import generate
from dial import compiled, derive, model_config, peak_flops, settle
from evaluate import copying, mean_loss, measure
from model import GPT, count_parameters, flops_per_token


@dataclass
class Config:
    """The flags of `python train.py`. What is None is derived from depth."""
    data: str = chain.option("world", "world, a file, a folder, an http(s) address, or stdlib")
    out: str = chain.option("out", "folder for everything that is made")
    name: str = chain.option("base", "the checkpoint is <out>/<name>.pt")
    depth: int | None = chain.option(None, "layers: the dial that sets the rest; 4, on CUDA 8")
    width: int | None = chain.option(None, "size of a token's vector; depth * min(64, 8 * depth)")
    heads: int | None = chain.option(None, "attention heads; width / 32, from depth 8 on width / 64")
    hidden: int | None = chain.option(None, "width inside the feed-forward layer; 8/3 * width")
    context: int | None = chain.option(None, "tokens seen at once; 256, from depth 8 on 1024")
    vocab_size: int | None = chain.option(None, "tokens of the tokenizer, when there is none yet; 1024")
    tokens_per_parameter: float = chain.option(8.0, "length of the training; Chinchilla's optimum is 20")
    steps: int | None = chain.option(None, "optimizer steps; tokens / (batch_size * context)")
    batch_size: int | None = chain.option(None, "sequences a step; grows with the square root of the tokens")
    micro_batch: int | None = chain.option(None, "sequences at once: the gradient adds up over them; 32")
    learning_rate: float | None = chain.option(None, "at its highest; 4.5e-3 * 128 / width")
    weight_decay: float = chain.option(0.5, "how fast matrices shrink, as a share of the learning rate")
    attention: str = chain.option("auto", "auto is the fastest here", choices=("auto", *ATTENTION))
    compile: str = chain.option("auto", "auto where it pays", choices=("auto", "on", "off"))
    precision: str = chain.option("auto", "auto where it pays", choices=("auto", "float32", "bfloat16"))
    resume: bool = chain.option(False, "go on from <out>/<name>.resume.pt")
    seed: int = chain.option(0, "seed of the weights, the order of the text, the world")
    device: str = chain.option("auto", "auto, cpu, cuda or mps")


# ---------------------------------------------------------------------------------------- the algorithm

def cosine_lr(step: int, steps: int, peak: float, warmup: int) -> float:
    """Return the learning rate: a linear rise over `warmup` steps, half a cosine down to 0, then 0.

    >>> [round(cosine_lr(s, 10, 1.0, 2), 2) for s in (0, 1, 2, 6, 10, 15)]
    [0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))  # subtle: unclamped, the cosine rises again
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def adamw_update(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, t: int, lr: float,
                 betas: tuple[float, float], eps: float, decay: float) -> None:
    """Step `t` (from 1) of AdamW on one tensor, in place (Loshchilov 2019, algorithm 2). m, v: the moments.

    This is the form to read. Training uses torch's fused one, and a test holds the two together.
    """
    p.mul_(1 - lr * decay)  # decoupled: the decay does not pass through the moments
    m.lerp_(grad, 1 - betas[0])
    v.lerp_(grad * grad, 1 - betas[1])
    m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)  # both start at 0: take the bias out
    p.sub_(lr * m_hat / (v_hat.sqrt() + eps))  # subtle: eps stands outside the root


def make_optimizer(model: torch.nn.Module, decay: float) -> torch.optim.AdamW:
    """Return AdamW that decays matrices and leaves norms and other 1-D tensors alone."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-8, fused=True)  # nanoGPT's for small batches


@functools.lru_cache(maxsize=2)
def window_starts(n_tokens: int, context: int, seed: int, epoch: int) -> np.ndarray:
    """Return where an epoch's windows start: side by side from a random shift on, in random order."""
    rng = np.random.default_rng([seed, epoch])
    per_epoch = max(1, (n_tokens - 1) // context - 1)  # the windows that fit at any shift
    shift = rng.integers(n_tokens - per_epoch * context)
    return shift + context * rng.permutation(per_epoch)


def batch(ids: np.ndarray, step: int, batch_size: int, context: int, seed: int,
          first: int | None = None) -> tuple[Tensor, Tensor]:
    """Return step's inputs and targets (B, T): the targets are the inputs moved on by one token.

    It depends on nothing but its arguments, so a resumed run needs no position in the data. `first` is the
    token that starts a document: a window that starts inside of one is moved back to its beginning, if that
    is less than a window away. Or half of the questions would stand in a window without their text.
    """
    per_epoch = len(window_starts(len(ids), context, seed, 0))
    turns = [divmod(n, per_epoch) for n in range(step * batch_size, (step + 1) * batch_size)]
    starts = [window_starts(len(ids), context, seed, epoch)[i] for epoch, i in turns]
    for i, start in enumerate(starts):
        before = np.flatnonzero(ids[max(0, start - context + 1):start + 1][::-1] == first)
        starts[i] -= before[0] if before.size else 0
    rows = np.stack([ids[start:start + context + 1] for start in starts]).astype(np.int64)  # (B, T + 1)
    return torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])


def token_loss(model, x: Tensor, y: Tensor, bfloat16: bool) -> Tensor:
    """Return the summed cross-entropy of y (B, T) in nats: products in bfloat16, the sum in float32."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
        logits = model(x)  # (B, T, V)
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum")


# ---------------------------------------------------------------------------------------- the loop

def fit(model: GPT, ids: np.ndarray, c: Config, look=None, save=None, state: dict | None = None,
        first: int | None = None, summed_loss=token_loss) -> tuple:
    """Train `model` on `ids` up to step `c.steps`; return (history of (step, loss), tokens/s).

    Up to ten times on the way it calls `look(step)` and `save(step, optimizer, history)`; `state` is what was
    saved, to go on from; `first` as in `batch`. Raises UserError at a loss that is not finite, before it
    reaches the weights.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    optimizer, history = make_optimizer(model, c.weight_decay), state["history"] if state else []
    if state:
        optimizer.load_state_dict(state["optimizer"])
    parallel = torch.nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    loss_of = compiled(summed_loss, c, -(-c.batch_size // c.micro_batch))
    warmup, every = max(1, min(100, c.steps // 10)), -(-c.steps // 10)
    mfu = flops_per_token(model.config, c.context) / peak_flops(c.device) / ranks  # of one token a second
    clock = chain.Clock(c.steps, c.batch_size * c.context, mfu, show=rank == 0)
    for step in range(len(history), c.steps):
        rate = cosine_lr(step, c.steps, c.learning_rate, warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        x, y = batch(ids, step, c.batch_size, c.context, c.seed, first)
        x, y = (t[rank::ranks].to(c.device) for t in (x, y))  # (B, T) both
        loss = torch.zeros((), device=c.device)
        for xs, ys in zip(x.split(c.micro_batch), y.split(c.micro_batch)):
            # subtle: the mean over all tokens of the step, not the mean of the micro-batches' means
            part = loss_of(parallel, xs, ys, c.precision == "bfloat16") / y.numel()
            part.backward()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()  # of all tensors together
        loss = loss.item()
        chain.require(math.isfinite(loss + norm), f"step {step}: loss {loss}, gradient {norm}; what was "
                      f"saved is good. Start again with less than --learning_rate {c.learning_rate:.1e}")
        optimizer.step()
        optimizer.zero_grad()
        history.append((step, loss))
        clock.tick(step, f"loss {loss:.4f}  rate {rate:.2e}  |g| {norm:5.2f}")
        if (step + 1) % every == 0 and rank == 0:
            if look:
                look(step + 1)
            if save and step + 1 < c.steps:
                save(step + 1, optimizer, history)
            clock.last = time.perf_counter()  # looking and saving are not training
    clock.bar.close()
    return history, clock.tokens_per_second


def read_state(given) -> tuple:
    """Return what a stopped run saved, and its Config; only how it computes may be another than before.

    Raises UserError if nothing was saved, or if a flag contradicts what was.
    """
    path = Path(given.out, f"{given.name}.resume.pt")
    chain.require(path.is_file(), f"--resume: {path} is not there, no run was saved; leave --resume out")
    state, fields = chain.load_checkpoint(path), dataclasses.fields(given)
    free = ("out", "resume", "device", "compile", "precision", "attention")
    values = state.get("arguments", {})
    chain.require({"optimizer", "history", "text"} <= set(state) and set(values) == {f.name for f in fields},
                  f"{path}: no stopped run of this script; delete it, or give another --name")
    for field in fields:
        value, old = getattr(given, field.name), values.get(field.name)
        if field.name in free:
            values[field.name] = old if value == field.default and field.name != "out" else value
        chain.require(field.name in free or value in (field.default, old), f"--{field.name} {value}: "
                      f"the stopped run has {old}; leave out that flag, or --resume")
    return state, type(given)(**values)


def save_curve(history: list[tuple], path: Path) -> None:
    """Draw the training loss, a point the mean of 1/100 of the run. Without matplotlib do nothing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    parts = np.array_split(np.array(history), min(100, len(history)))
    axes = (figure := Figure(figsize=(6, 4))).add_subplot()
    axes.plot([part[-1, 0] for part in parts], [part[:, 1].mean() for part in parts])
    axes.set(xlabel="step", ylabel="training loss (nats a token)")
    chain.write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))


def prepare(given: Config, state: dict | None, rank: int) -> tuple:
    """Return (settled Config, tokenizer, training tokens, held-out tokens, identity of the text).

    What is missing is made by the first process; the others wait, and find it.
    """
    if rank > 0:
        dist.barrier()
    source = data.open_source(given.data, Path(given.out), given.seed)
    if state:
        chain.require(state["text"] == source.identity, f"--resume: {given.data} is another text than when "
                      "the run stopped; bring that back, or start anew without --resume")
        tokenizer = bpe.Tokenizer.from_dict(state["tokenizer"])
    else:
        tokenizer = bpe.find_or_make(source, given.out, given.vocab_size)
    c = derive(given, tokenizer.n_vocab)
    tokens = c.steps * c.batch_size * c.context + 2 * c.context
    train, held_out = data.token_files(source, tokenizer, Path(c.out), tokens)
    if rank == 0 and dist.is_initialized():
        dist.barrier()
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    chain.require(c.batch_size % ranks == 0, f"--batch_size {c.batch_size}: {ranks} processes can't share it")
    chain.require(len(train.ids) > c.context + 1, f"--data {c.data}: {len(train.ids):,} training tokens do "
                  f"not fill the context of {c.context:,}; give more text or a smaller --context")
    # after the workers that write tokens: compiling starts threads, and threads do not fork
    settle(c, model_config(c, tokenizer.n_vocab), c.steps * c.batch_size * c.context)
    return c, tokenizer, train, held_out, source.identity


@chain.command
def main(argv=None) -> dict:
    """Train a model, from text to checkpoint."""
    given, started, state = chain.parse(Config, argv, __doc__), time.time(), None
    rank = chain.start_rank()
    if given.resume:
        state, given = read_state(given)
    given.device = chain.pick_device(given.device)
    c, tokenizer, train, held_out, text = prepare(given, state, rank)
    torch.manual_seed(c.seed)
    model = GPT(model_config(c, tokenizer.n_vocab)).to(c.device)
    if state:
        model.load_state_dict(state["weights"])
    path, stopped = Path(c.out, f"{c.name}.pt"), Path(c.out, f"{c.name}.resume.pt")
    prompt = torch.tensor(held_out.ids[None, :1].astype(np.int64), device=c.device)  # (1, 1): a beginning

    def checkpoint(path: Path, step: int, loss: float, **more) -> None:
        config = dataclasses.asdict(model.config) | {"attention": "sdpa"}  # how, not what
        chain.save_checkpoint(path, config=config, weights=model.state_dict(), tokenizer=tokenizer.to_dict(),
                              step=step, loss=loss, arguments=dataclasses.asdict(c), **more)

    def look(step: int) -> None:
        told = f"step {step}: validation loss {mean_loss(model, held_out.ids, c.context, 10_000):.4f}"
        if c.data == "world":
            told += f", copying {copying(model, tokenizer, 30, c.seed)['copying']:.0%}"
        draws = torch.Generator(c.device).manual_seed(c.seed)
        new = [int(i) for i, _ in generate(model, prompt, 48, temperature=0.7, generator=draws)]
        tqdm.write(f"  {told}; it writes {tokenizer.decode(new)!r}")

    def save(step: int, optimizer, history: list) -> None:
        checkpoint(stopped, step, history[-1][1], optimizer=optimizer.state_dict(), history=history,
                   text=text)

    if not state and rank == 0:
        stopped.unlink(missing_ok=True)  # of an older run: --resume must not go on with that
    history, speed = fit(model, train.ids, c, look, save, state, tokenizer.special.get("<|endoftext|>"))
    if rank > 0:
        return {}
    checkpoint(path, c.steps, history[-1][1])
    stopped.unlink(missing_ok=True)
    metrics = {"parameters": count_parameters(model.config), "tokens_per_second": speed,
               "training_tokens": c.steps * c.batch_size * c.context,
               "training_loss": float(np.mean([loss for _, loss in history[-50:]]))}
    metrics |= measure(model, tokenizer, train, held_out, 300 if c.data == "world" else 0, c.seed)
    save_curve(history, path.with_suffix(".png"))
    chain.report(f"train.py --name {c.name}".removesuffix(" --name base"), c, metrics, time.time() - started)
    return metrics


if __name__ == "__main__":
    main()
