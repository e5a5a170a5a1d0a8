"""Pre-training: a GPT learns to predict the next token, and so learns everything else that it knows.

    loss = mean over tokens of -log p(token | the tokens before it)         in nats; at step 0 about ln V
    each step: gradient of the loss on one batch -> clip its length -> AdamW at this step's learning rate

    python train.py                                        the small world, into out/base.pt: MINUTES
    python train.py --resume                               go on where a run was stopped, bit for bit
    python train.py --data my.txt --out mine               your own text: a file, a folder, an address, or `stdlib`
    python train.py --depth 12 --vocab_size 32768 --data DIR      the size of GPT-2: for a GPU
    torchrun --nproc_per_node=8 train.py --depth 12 ...    the same on eight

One dial, `--depth`, sets the rest: width, heads, context, tokens, batch, learning rate. `derive` has each formula
with its source, the run prints each value, and a flag overrules it.

Where each number comes from: PLACEHOLDER
Left out: dropout (no text is seen often), Muon (no clear win here for its lines), sharding a model over devices.
Papers: Radford 2019 (GPT-2), Loshchilov 2019 (AdamW), Hoffmann 2022 (Chinchilla), Yang 2022 (muP), Chowdhery 2022 (MFU).
"""

import dataclasses
import functools
import math
import os
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
from evaluate import mean_loss, measure
from dial import derive, model_config, settle
from model import ATTENTION, GPT, GPTConfig, count_parameters, flops_per_token
from sample import generate

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12, "4090": 165e12, "T4": 65e12}  # dense, 16 bit


@dataclass
class Config:
    """The flags of `python train.py`. What is None is derived from depth."""
    data: str = chain.option("world", "world, a file, a folder, an http(s) address, or stdlib")
    out: str = chain.option("out", "folder for everything that is made")
    name: str = chain.option("base", "the checkpoint is <out>/<name>.pt")
    depth: int | None = chain.option(None, "layers: the dial that sets the rest; 4, on CUDA 8")
    width: int | None = chain.option(None, "size of a token's vector; depth * min(64, 8 * depth)")
    heads: int | None = chain.option(None, "attention heads; width / 32, from width 512 on width / 64")
    hidden: int | None = chain.option(None, "width inside the feed-forward layer; 8/3 * width")
    context: int | None = chain.option(None, "tokens seen at once; 256, from depth 8 on 1024")
    vocab_size: int | None = chain.option(None, "tokens of a tokenizer that has to be made; 1024, from depth 8 on 8192")
    tokens_per_parameter: float = chain.option(8.0, "length of the training; Chinchilla's optimum is 20")
    steps: int | None = chain.option(None, "optimizer steps; tokens / (batch_size * context)")
    batch_size: int | None = chain.option(None, "sequences a step")
    micro_batch: int | None = chain.option(None, "sequences at once, the gradient adds up over them; all, at most 32")
    learning_rate: float | None = chain.option(None, "at its highest; 3e-3 * 128 / width")
    weight_decay: float = chain.option(0.1, "share of the learning rate by which matrices shrink a step")
    attention: str = chain.option("sdpa", "how attention is computed", choices=tuple(ATTENTION))
    compile: str = chain.option("auto", "torch.compile: auto takes it where a long run pays for it", choices=("auto", "on", "off"))
    precision: str = chain.option("auto", "bfloat16 or float32 products; auto measures", choices=("auto", "float32", "bfloat16"))
    resume: bool = chain.option(False, "go on from <out>/<name>.resume.pt")
    seed: int = chain.option(0, "seed of the weights, the order of the text, the world")
    device: str = chain.option("auto", "auto, cpu, cuda or mps")


# ------------------------------------------------------------------------------------------- the algorithm

def cosine_lr(step: int, steps: int, peak: float, warmup: int) -> float:
    """Return the learning rate: a linear rise over `warmup` steps, then half a cosine down to 0, and 0 from there on.

    >>> [round(cosine_lr(s, 10, 1.0, 2), 2) for s in (0, 1, 2, 6, 10, 15)]
    [0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))  # subtle: without the clamp the cosine rises again
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def adamw_update(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, t: int, lr: float, betas: tuple[float, float],
                 eps: float, decay: float) -> None:
    """Step `t` (from 1) of AdamW on one tensor, in place (Loshchilov 2019, algorithm 2). m and v are the moments.

    This is the form to read. Training uses torch's fused one, and a test holds the two together.
    """
    p.mul_(1 - lr * decay)  # decoupled: the decay does not pass through the moments
    m.lerp_(grad, 1 - betas[0])
    v.lerp_(grad * grad, 1 - betas[1])
    m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)  # both start at 0, this takes the bias out
    p.sub_(lr * m_hat / (v_hat.sqrt() + eps))  # subtle: eps stands outside the root


def make_optimizer(model: torch.nn.Module, decay: float) -> torch.optim.AdamW:
    """Return AdamW that decays matrices and leaves norms and other 1-D tensors alone."""
    groups = [[p for p in model.parameters() if p.dim() >= 2], [p for p in model.parameters() if p.dim() < 2]]
    return torch.optim.AdamW([{"params": groups[0], "weight_decay": decay}, {"params": groups[1], "weight_decay": 0.0}],
                             betas=(0.9, 0.99), eps=1e-8, fused=True)


@functools.lru_cache(maxsize=2)
def window_starts(n_tokens: int, context: int, seed: int, epoch: int) -> np.ndarray:
    """Return where the training windows of one epoch start: side by side from a random shift, in random order."""
    rng = np.random.default_rng([seed, epoch])
    shift = rng.integers(min(context, n_tokens - context))
    return shift + context * rng.permutation((n_tokens - 1 - shift) // context)


def batch(ids: np.ndarray, step: int, batch_size: int, context: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return step's inputs and targets (B, T): the targets are the inputs moved on by one token.

    It depends on nothing but its arguments, so a resumed run needs no position in the data.
    """
    per_epoch = (len(ids) - 1) // context - 1 or 1  # the fewest windows that any shift leaves
    number = np.arange(step * batch_size, (step + 1) * batch_size)
    rows = [window_starts(len(ids), context, seed, int(n // per_epoch))[n % per_epoch] for n in number]
    windows = torch.from_numpy(np.stack([ids[r:r + context + 1] for r in rows]).astype(np.int64))  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


def token_loss(model, x: Tensor, y: Tensor, bfloat16: bool) -> Tensor:
    """Return the summed cross-entropy of the targets y (B, T) in nats; products in bfloat16, the sum in float32."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
        logits = model(x)  # (B, T, V)
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum")


# ------------------------------------------------------------------------------------------- the loop

def fit(model: GPT, ids: np.ndarray, c: Config, look=None, save=None, state: dict | None = None) -> tuple[list[tuple], float]:
    """Train `model` on `ids` up to step `c.steps`; return the history of (step, training loss), and tokens/s.

    Ten times on the way come `look(step)` and `save(step, optimizer, history)`; `state` is what was saved: training
    goes on from there. Raises UserError at a loss that is not finite, before it reaches the weights.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    optimizer, history, first = make_optimizer(model, c.weight_decay), [], 0
    if state:
        optimizer.load_state_dict(state["optimizer"])
        history, first = state["history"], state["step"]
    parallel = torch.nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    loss_of = torch.compile(token_loss) if c.compile == "on" else token_loss
    warmup, every, clock = max(1, min(100, c.steps // 10)), max(1, c.steps // 10), Clock(c, model.config, rank, ranks)
    for step in range(first, c.steps):
        rate = cosine_lr(step, c.steps, c.learning_rate, warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        x, y = (t[rank::ranks].to(c.device) for t in batch(ids, step, c.batch_size, c.context, c.seed))  # (B, T)
        loss = torch.zeros((), device=c.device)
        for xs, ys in zip(x.split(c.micro_batch), y.split(c.micro_batch)):
            # subtle: the mean over all tokens of the step, not the mean of the micro-batches' means
            part = loss_of(parallel, xs, ys, c.precision == "bfloat16") / y.numel()
            part.backward()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        loss, norm = loss.item(), norm.item()
        chain.require(math.isfinite(loss + norm), f"step {step}: the loss is {loss} and its gradient {norm}; what was "
                      f"saved before is good: --resume from it, or start again with half the --learning_rate {rate:.1e}")
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


class Clock:
    """Shows how the run goes: a bar on a terminal, elsewhere lines in columns. The first steps warm up, untimed."""

    def __init__(self, c: Config, shape: GPTConfig, rank: int, ranks: int):
        self.c, self.rank, self.timed, self.seconds, self.last = c, rank, 0, 0.0, None
        self.bar = tqdm(total=c.steps, unit="step", disable=None if rank == 0 else True)
        gpu = torch.cuda.get_device_name() if c.device.startswith("cuda") else ""
        peak = next((flops for name, flops in PEAK_FLOPS.items() if name in gpu), math.inf)
        self.mfu_of_one = flops_per_token(shape, c.context) / peak / ranks  # share of the peak that 1 token/s takes

    @property
    def tokens_per_second(self) -> float:
        return self.timed * self.c.batch_size * self.c.context / self.seconds if self.timed else 0.0

    def tick(self, step: int, text: str) -> None:
        """Count a step that has just ended, and show it with `text`."""
        now, self.ticks = time.perf_counter(), getattr(self, "ticks", 0) + 1
        if self.ticks > 5:
            self.timed, self.seconds = self.timed + 1, self.seconds + now - self.last
        self.last = now
        text += f"  {self.tokens_per_second:,.0f} tokens/s"
        if self.mfu_of_one:
            text += f"  MFU {self.tokens_per_second * self.mfu_of_one:.0%}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(step + 1 - self.bar.n)
        if self.rank == 0 and self.bar.disable and (step % max(1, self.c.steps // 50) == 0 or step + 1 == self.c.steps):
            left = (self.c.steps - step - 1) * self.seconds / max(1, self.timed)
            print(f"step {step:>6}/{self.c.steps}  {text}  {left:5.0f} s left", flush=True)


def read_state(given: Config) -> tuple[dict, Config]:
    """Return what a stopped run saved, and its Config. A flag that contradicts it is a UserError."""
    path = Path(given.out, f"{given.name}.resume.pt")
    chain.require(path.is_file(), f"--resume: {path} is not there: no run was stopped; start one without --resume")
    state = chain.load_checkpoint(path)
    kept = dataclasses.replace(Config(**state["arguments"]), out=given.out, resume=True)
    for field in dataclasses.fields(Config):
        value, old = getattr(given, field.name), getattr(kept, field.name)
        chain.require(value in (field.default, old) or field.name in ("out", "resume"),
                      f"--{field.name} {value}: the stopped run has {old}; leave the flag out, or start without --resume")
    return state, kept


def save_curve(history: list[tuple], path: Path) -> None:
    """Draw the training loss, each point the mean of 1/100 of the run; without matplotlib, do nothing."""
    try:
        import matplotlib
        matplotlib.use("agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return
    parts = np.array_split(np.array(history), min(100, len(history)))
    plt.figure(figsize=(6, 4))
    plt.plot([part[-1, 0] for part in parts], [part[:, 1].mean() for part in parts])
    plt.xlabel("step")
    plt.ylabel("training loss (nats a token)")
    plt.savefig(path, dpi=120)
    plt.close()


@chain.command
def main(argv=None) -> dict:
    """Train a model from text to checkpoint."""
    given, started, state = chain.parse(Config, argv, __doc__), time.time(), None
    rank = start_rank()
    if given.resume:
        state, given = read_state(given)
    given.device = chain.pick_device(given.device)
    out, stopped = Path(given.out), Path(given.out, f"{given.name}.resume.pt")
    source = data.open_source(given.data, out, given.seed)
    tokenizer = Tokenizer.from_dict(state["tokenizer"]) if state else bpe.find_or_make(source, out, given.vocab_size)
    c = derive(given, tokenizer.n_vocab)
    settle(c)
    train, held_out = data.token_files(source, tokenizer, out, tokens=c.steps * c.batch_size * c.context)
    chain.require(len(train.ids) > c.context + 1, f"--data {c.data}: its {len(train.ids):,} training tokens are fewer "
                  f"than the context of {c.context:,}: give more text or a smaller --context")
    torch.manual_seed(c.seed)
    model = GPT(model_config(c, tokenizer.n_vocab)).to(c.device)
    if state:
        model.load_state_dict(state["weights"])
    prompt = torch.from_numpy(held_out.ids[:12].astype(np.int64)).to(c.device)[None]  # (1, 12): a beginning never seen

    def checkpoint(path: Path, step: int, loss: float, **more) -> None:
        chain.save_checkpoint(path, config=dataclasses.asdict(model.config), weights=model.state_dict(), loss=loss,
                              tokenizer=tokenizer.to_dict(), step=step, arguments=dataclasses.asdict(c), **more)

    def look(step: int) -> None:
        loss = mean_loss(model, held_out.ids, c.context, 20_000)
        ids = [int(new) for new, _ in generate(model, prompt, 40, temperature=0)]
        text = f"{tokenizer.decode(prompt[0].tolist())}|{tokenizer.decode(ids)}"
        tqdm.write(f"  -- step {step}: validation {loss:.4f}; it writes: {' '.join(text.split())}")

    def save(step: int, optimizer, history: list) -> None:
        checkpoint(stopped, step, history[-1][1], optimizer=optimizer.state_dict(), history=history)

    history, speed = fit(model, train.ids, c, look, save, state)
    if rank > 0:
        return {}
    metrics = {"parameters": count_parameters(model.config), "training_loss": float(np.mean([l for _, l in history[-50:]]))}
    metrics |= measure(model.eval(), tokenizer, train, held_out, 300 if c.data == "world" else 0, c.seed)
    metrics |= {"training_tokens": c.steps * c.batch_size * c.context, "tokens_per_second": speed}
    checkpoint(Path(c.out, f"{c.name}.pt"), c.steps, metrics["validation_loss"])
    stopped.unlink(missing_ok=True)
    save_curve(history, Path(c.out, f"{c.name}.png"))
    chain.report("train.py", c, metrics, time.time() - started)
    return metrics


if __name__ == "__main__":
    main()
