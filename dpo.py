"""Direct preference optimisation: from pairs of answers, a model learns which one people prefer.

    h    = (log π(chosen) - log π_ref(chosen)) - (log π(rejected) - log π_ref(rejected))
    loss = -log σ(β h)                                 ln 2 at the start, where π = π_ref
    the reward of an answer = β (log π - log π_ref): how much more the model likes it than it did

log π of an answer is the sum over its tokens and its <|end|>, given what stands before it. π_ref is the model
at the start, frozen: its log-probabilities are computed once. A small β lets the model go far from it.

The loss sees a difference alone: both answers may become unlikely, and what takes their place is nobody's
choice. Where made-up sentences became unlikely, right ones did too, and scraps came instead. So SFT's loss on
the chosen answers is added, --nll times (Pang 2024). What the pairs do not show suffers too: at the end the
weights go a part of the way back to the start (`go_back`).

    python dpo.py                    out/sft.pt -> out/dpo.pt on preferences of the small world (2 minutes)
    python dpo.py --loss ipo --beta 0.3    or cdpo: see the functions
    python dpo.py --data my.jsonl    your own: {"prompt": "Hi", "chosen": "Hello", "rejected": "What?"} a line

What the small world's people like: "I don't know" more than an answer that the text does not give; where it
gives one, a sentence more than "I don't know" or the bare value; plain words more than flattery; a story that
goes on more than one that goes round; each other right step more than a wrong one (tasks.py).
Percent of held-out questions (right answers and nine other tasks: points gained or lost), mean and standard
deviation over three seeds of pairs and questions, all from one out/sft.pt. With the larger β the model stays
nearer to what it was; the rest is equal within the noise. The worst single tasks lost 4 and 2.5 points:

    β      made up, before   after       right answers   nine other tasks   flattery after   KL
    3      58 ± 2            3.8 ± 0.8   -1.0 ± 0.5      -0.4 ± 0.3         3.7 ± 1.2        0.029 ± 0.002
    0.3    58 ± 2            3.8 ± 0.8   -1.0 ± 0.5      -0.3 ± 0.2         0.8 ± 1.0        0.053 ± 0.001

Left out: resuming, as it takes minutes; reward models and PPO. Papers: Rafailov 2023 (DPO, equation 7), Azar
2023 (IPO), Mitchell 2023 (conservative DPO), Pang 2024 (the term beside it), Wortsman 2021 (the way back).
"""

import copy
import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import chain
import tasks
from checkpoint import load_float
from dialogue import answer_log_probs, answer_logits, encode_pair, log_probs, pad, preference_of, read_lines
from exam import hold_exam, print_marks
from model import GPT
from train import cosine_lr, make_optimizer

HELD_OUT = 300  # pairs of the small world


@dataclass
class Config:
    """The flags of `python dpo.py`."""
    data: str = chain.option("world", "world, or a .jsonl file of preferences")
    out: str = chain.option("out", "folder for everything that is made")
    name: str = chain.option("dpo", "the checkpoint is <out>/<name>.pt")
    checkpoint: str | None = chain.option(None, "checkpoint to start from (default: <out>/sft.pt)")
    loss: str = chain.option("dpo", "what to minimise", choices=("dpo", "ipo", "cdpo"))
    beta: float = chain.option(3.0, "how strongly the reference holds the model")
    pairs: int = chain.option(2600, "how many of the small world")
    epochs: int = chain.option(1, "how often each pair is learned from")
    batch_size: int = chain.option(8, "pairs a step")
    nll: float = chain.option(15.0, "weight of SFT's loss on the chosen answers, added; 0 for none")
    learning_rate: float = chain.option(1e-4, "at its highest")
    keep: float = chain.option(0.85, "how much of the way that the weights went is kept, 0 to 1")
    questions: int = chain.option(200, "questions a task in the exam, before and after; 0 for no exam")
    seed: int = chain.option(0, "seed of the pairs and of their order")
    device: str = chain.option("auto", "auto, cpu, cuda or mps")


# ---------------------------------------------------------------------------------------- the algorithm

def margin(policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor,
           reference_rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Return h (B,), and log π - log π_ref of both sides (2, B), chosen first; gradients reach h alone."""
    ratios = torch.stack([policy_chosen - reference_chosen, policy_rejected - reference_rejected])  # (2, B)
    return ratios[0] - ratios[1], ratios.detach()


def dpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor,
             reference_rejected: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return (mean loss, rewards (2, B): chosen, rejected) from summed log-probs (B,) (Rafailov, eq. 7)."""
    h, ratios = margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return -F.logsigmoid(beta * h).mean(), beta * ratios


def cdpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor,
              reference_rejected: Tensor, beta: float, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """As `dpo_loss` where a share `noise` of the pairs is the wrong way round (Mitchell 2023, eq. 3)."""
    h, ratios = margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    losses = -(1 - noise) * F.logsigmoid(beta * h) - noise * F.logsigmoid(-beta * h)
    return losses.mean(), beta * ratios


def ipo_loss(policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor,
             reference_rejected: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """As `dpo_loss`, but h shall reach 1 / (2β) and go no further (Azar 2023, eq. 17; its τ is our β)."""
    h, ratios = margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return (h - 1 / (2 * beta)).square().mean(), beta * ratios


LOSSES = {"dpo": dpo_loss, "ipo": ipo_loss, "cdpo": cdpo_loss}


def all_log_probs(model: GPT, pairs: list[list[tuple]], device) -> Tensor:
    """Return log π (N, 2) of all pairs: chosen, rejected."""
    return log_probs(model, [side for pair in pairs for side in pair], device).view(-1, 2)  # (N, 2)


@torch.no_grad()
def kl_divergence(model: GPT, start: GPT, ids: Tensor, mask: Tensor) -> float:
    """Return the mean over the answers' tokens of KL(π || π_ref) in nats: how far the model has moved."""
    log_p, log_q = (answer_logits(each, ids, mask)[0].log_softmax(-1) for each in (model, start))  # (n, V)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean().item()


# ---------------------------------------------------------------------------------------- the loop

def fit(model: GPT, pairs: list[list[tuple]], reference: Tensor, c: Config, look=None) -> None:
    """Train `model` on encoded pairs, whose `reference` are log π_ref (N, 2).

    Calls `look(step)` up to five times. Raises UserError at a loss that is not finite, before it reaches
    the weights.
    """
    optimizer, per_epoch = make_optimizer(model, 0.0), -(-len(pairs) // c.batch_size)
    steps = c.epochs * per_epoch
    lengths = np.array([[len(ids) for ids, _ in pair] for pair in pairs])  # (N, 2)
    clock = chain.Clock(steps, int(lengths.sum()) // per_epoch, 0, show=True)
    for step in range(steps):
        rate = cosine_lr(step, steps, c.learning_rate, max(1, steps // 10))
        for group in optimizer.param_groups:
            group["lr"] = rate
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([c.seed, epoch]).permutation(len(pairs))
        part = np.arange(len(pairs)) // (16 * c.batch_size)  # each sorted by length: little to pad
        order = order[np.lexsort((lengths.max(axis=1)[order], part))]
        picked = order[place * c.batch_size:(place + 1) * c.batch_size]
        sides = pad([side for i in picked for side in pairs[i]], c.device)  # chosen, rejected, chosen, ...
        policy = answer_log_probs(model, *sides).view(-1, 2)  # (B, 2)
        nll = -policy[:, 0].sum() / sides[1][::2].sum()  # a mean over the chosen's tokens
        loss, rewards = LOSSES[c.loss](*policy.unbind(1), *reference[picked].unbind(1), c.beta)
        (loss + c.nll * nll).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        chain.require(math.isfinite(loss.item() + norm), f"step {step}: loss {loss.item()}, gradient {norm}; "
                      "nothing was written. Start again with less than --learning_rate "
                      f"{c.learning_rate:.1e}")
        optimizer.step()
        optimizer.zero_grad()
        accuracy = (rewards[0] > rewards[1]).float().mean()
        clock.tick(step, f"loss {loss.item():.4f}  accuracy {accuracy:4.0%}  "
                   f"rewards {rewards[0].mean():+.2f} {rewards[1].mean():+.2f}")
        if look and (step + 1) % -(-steps // 5) == 0:
            look(step + 1)
            clock.last = time.perf_counter()
    clock.bar.close()


def read_preferences(c: Config) -> tuple[list[tuple], list[tuple]]:
    """Return the preferences for training and those held out: of a file the last tenth."""
    if c.data == "world":
        return tuple([tasks.preference(None, split, c.seed, i) for i in range(n)]
                     for split, n in (("train", c.pairs), ("held-out", HELD_OUT)))
    found = read_lines(c.data, preference_of, '{"prompt": "Hi", "chosen": "Hello", "rejected": "What?"}')
    n = max(1, int(0.9 * len(found)))
    return found[:n], found[n:]


@torch.no_grad()
def go_back(model: GPT, start: GPT, keep: float) -> None:
    """Make each weight of `model` start + keep · (model - start), in place (Wortsman 2021, eq. 1).

    Near the end most of what was learned stays, and some of what was lost is back.
    """
    for p, first in zip(model.parameters(), start.parameters()):
        p.lerp_(first, 1 - keep)


@torch.no_grad()
def measure(model: GPT, start: GPT, pairs: list[list[tuple]], reference: Tensor, c: Config) -> dict:
    """Return the measures of `model` on pairs whose log π_ref are `reference` (N, 2).

    How often the chosen answer has the higher reward; by how much; log π of the chosen, which only --nll
    holds up; and how far the model has gone from the start.
    """
    policy = all_log_probs(model, pairs, c.device)  # (N, 2)
    loss, rewards = LOSSES[c.loss](*policy.unbind(1), *reference.unbind(1), c.beta)
    some = pad([side for pair in pairs[:64] for side in pair], c.device)
    return {"preference_loss": loss.item(),
            "reward_accuracy": (rewards[0] > rewards[1]).float().mean().item(),
            "reward_margin": (rewards[0] - rewards[1]).mean().item(),
            "log_prob_chosen": policy[:, 0].mean().item(), "kl": kl_divergence(model, start, *some)}


@chain.command
def main(argv=None) -> dict:
    """Train an assistant on preferences, and hold its exam before and after."""
    c, started = chain.parse(Config, argv, __doc__), time.time()
    for field in ("pairs", "epochs", "batch_size", "beta", "learning_rate"):
        chain.require(getattr(c, field) > 0, f"--{field} {getattr(c, field)}: it must be above 0")
    chain.require(min(c.nll, c.questions) >= 0, f"--nll {c.nll} --questions {c.questions}: give 0 or more")
    chain.require(0 <= c.keep <= 1, f"--keep {c.keep}: give a number from 0 to 1")
    c.device = chain.pick_device(c.device)
    path = Path(c.checkpoint or Path(c.out, "sft.pt"))
    chain.require(path.is_file(), f"{path}: no such checkpoint; make it with `python sft.py`")
    model, tokenizer, content = load_float(path, c.device)
    chain.require(content.get("chat"), f"{path}: no assistant, it goes on with texts; run `python sft.py`")
    start = copy.deepcopy(model).requires_grad_(False)  # π_ref
    parts = [[encode_pair(tokenizer, pair, model.config.context) for pair in part]
             for part in read_preferences(c)]
    cut = sum(lost > 0 for part in parts for _, lost in part)
    train, held_out = ([sides for sides, _ in part] for part in parts)
    print(f"{len(train):,} pairs to learn from, {len(held_out):,} held out; {cut:,} were longer than the "
          f"context of {model.config.context} and lost their beginning")
    reference, reference_held_out = (all_log_probs(start, part, c.device) for part in (train, held_out))

    def look(step: int) -> None:
        found = measure(model, start, held_out[:64], reference_held_out[:64], c)
        tqdm.write(f"  step {step}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()))

    look(0)
    fit(model, train, reference, c, look)
    go_back(model, start, c.keep)
    metrics = measure(model, start, held_out, reference_held_out, c)
    chain.save_checkpoint(Path(c.out, f"{c.name}.pt"), config=content["config"], weights=model.state_dict(),
                          tokenizer=content["tokenizer"], step=content["step"], chat=True,
                          loss=metrics["preference_loss"], arguments=dataclasses.asdict(c))
    if c.data == "world" and c.questions:
        before, after = (hold_exam(each, tokenizer, c.questions, c.seed) for each in (start, model))
        print_marks(before, after)
        for name, mark in (("made_up", "unknown"), ("flattery", "small")):
            for when, marks in (("before", before), ("after", after)):
                metrics[f"{name}_{when}"] = 1 - marks[mark][0] / marks[mark][1]
        metrics |= {mark: right / n for mark, (right, n) in after.items() if mark not in ("unknown", "small")}
    chain.report("dpo.py", c, metrics, time.time() - started)
    return metrics


if __name__ == "__main__":
    main()
