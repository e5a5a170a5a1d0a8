"""A mixture of experts: many feed-forward layers stand side by side, and each token goes through a few.

    p = softmax(W x)                         the router scores E experts for each token
    y = Σ w_e · expert_e(x)                  over the k likeliest; w is p, for k > 1 divided by their sum

So a model has E times the feed-forward weights, and a token still costs k experts. Left alone the router
sends most tokens to few experts, as what is chosen learns, and is chosen again. What keeps the load even:

    balance loss   E Σ f_e P_e     f: the share of tokens that chose e, P: mean of p_e; k if even, E if one
                                   expert takes all (k = 1). Its gradient lowers P where f is large
    z-loss         mean (log Σ exp(logits))²       keeps the router's logits small
    bias           added to p for the choice alone, moved up where an expert got less than its share
    capacity       each expert takes so many tokens and no more; a token that is dropped leaves the layer as
                   it came, by the residual stream

Two paths: `by_token` is the one to read; `by_expert` sorts the tokens by expert and makes one matrix product
for each, a hundred times as fast. Dims as in model.py, and: n tokens (B·T), k choices a token, E experts.

moe.py trains such a model and measures what it buys. Left out: experts on different devices.
Papers: Shazeer 2017, Lepikhin 2020 (GShard: capacity for k = 2), Fedus 2021 (Switch: k = 1), Zoph 2022
(z-loss), Jiang 2024 (Mixtral), DeepSeek-AI 2024 (V3: bias, shared expert).
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from model import GPT, MLP, GPTConfig


# -------------------------------------------------------------------------------------- who goes where

def route(logits: Tensor, k: int, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return (weights (n, k), chosen experts (n, k), p (n, E)) for the router's logits (n, E).

    k = 1 keeps p as the weight (Switch, eq. 2): divided by itself it were 1, and the router learned nothing.
    k > 1 divides by the sum (Mixtral, section 2.1). `bias` (E,) is for the choice alone (V3, eq. 16).
    """
    p = logits.float().softmax(dim=-1)  # (n, E), in float32 whatever the logits are
    chosen = (p if bias is None else p + bias).topk(k, dim=-1).indices  # (n, k), the likeliest first
    weights = p.gather(-1, chosen)  # (n, k)
    return weights if k == 1 else weights / weights.sum(dim=-1, keepdim=True), chosen, p


def load(chosen: Tensor, E: int) -> Tensor:
    """Return each expert's share of the choices (n, k), as a multiple of a fair one: (E,), mean 1.

    >>> load(torch.tensor([[0, 1], [0, 2], [0, 1]]), 3).tolist()
    [1.5, 1.0, 0.5]
    """
    return chosen.flatten().bincount(minlength=E).float() * E / chosen.numel()


def balance_loss(p: Tensor, chosen: Tensor) -> Tensor:
    """Return E Σ f_e P_e (Switch, eq. 4-6; for k > 1 as in Mixtral): k when the load is even.

    subtle: P is the mean over all of p (n, E), not over what was chosen, or it would be the counts again.
    """
    n, k = chosen.shape
    f = load(chosen, p.shape[-1]) * k / p.shape[-1]  # (E,): tokens that chose it / n; counts have no gradient
    return p.shape[-1] * (f * p.mean(dim=0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Return the mean of logsumexp² of the router's logits (n, E) (Zoph 2022, eq. 5)."""
    return logits.float().logsumexp(dim=-1).square().mean()


def balance_bias(bias: Tensor, chosen: Tensor, rate: float) -> Tensor:
    """Return the bias (E,) moved by `rate`: up for experts below their fair share, down above (V3, 2.1.2)."""
    return bias + rate * (1 - load(chosen, len(bias))).sign()


def capacity_of(n: int, k: int, E: int, factor: float) -> int:
    """Return how many tokens an expert takes: `factor` times its fair share, rounded up (Switch, eq. 3).

    >>> capacity_of(10, 2, 8, 1.25)
    4
    """
    return math.ceil(factor * n * k / E)


def within_capacity(chosen: Tensor, E: int, capacity: int) -> Tensor:
    """Return which choices (n, k) find room: first come, first served; False is dropped.

    All first choices come before all second ones, so that a token rather loses its second (GShard, alg. 1).
    """
    n, k = chosen.shape
    in_turn = nn.functional.one_hot(chosen.T.flatten(), E)  # (k · n, E): 1 at the expert wanted
    place = (in_turn.cumsum(dim=0) * in_turn).sum(dim=-1)  # (k · n,): the how-manieth there, from 1
    return (place <= capacity).view(k, n).T  # (n, k)


# ----------------------------------------------------------------------------- tokens → experts → tokens

def by_token(x: Tensor, weights: Tensor, chosen: Tensor, experts) -> Tensor:
    """Return Σ w_e · expert_e(x), token by token. x (n, C), weights and chosen (n, k) → (n, C)."""
    return torch.stack([sum(w * experts[e](x[t]) for w, e in zip(weights[t], chosen[t].tolist()))
                        for t in range(len(x))])


def by_expert(x: Tensor, weights: Tensor, chosen: Tensor, experts) -> Tensor:
    """Return what `by_token` does, with one call of each expert."""
    n, k = chosen.shape
    order = chosen.flatten().argsort(stable=True)  # (n · k,): first all choices of expert 0, then of 1, ...
    counts = chosen.flatten().bincount(minlength=len(experts)).tolist()
    parts = x[order // k].split(counts)  # E times (tokens of this expert, C)
    y = torch.cat([expert(part) for expert, part in zip(experts, parts)])  # (n · k, C), in that order
    y = y[order.argsort()].view(n, k, -1)  # (n, k, C): subtle: back into the order of the tokens
    return (weights[..., None].to(y.dtype) * y).sum(dim=1)  # (n, C)


class Experts(nn.Module):
    """What a GPT takes in place of its MLP. An expert is an MLP of config.hidden; a token goes to top_k."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.k, E = config.top_k, config.experts
        self.router = nn.Linear(config.width, E, bias=False)
        self.experts = nn.ModuleList(MLP(config) for _ in range(E))
        self.shared = MLP(replace(config, hidden=config.shared * config.hidden)) if config.shared else None
        self.register_buffer("bias", torch.zeros(E))
        self.capacity, self.noise = 0.0, 0.0  # in training; 0 is none
        self.last = None  # (logits (n, E), p (n, E), chosen (n, k), kept (n, k)) of the newest tokens

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) → (B, T, C), or (n, C) → (n, C)."""
        tokens = x.flatten(0, -2)  # (n, C)
        logits = self.router(tokens)  # (n, E)
        if self.training and self.noise:
            logits = logits + self.noise * torch.randn_like(logits)
        weights, chosen, p = route(logits, self.k, self.bias)
        kept = torch.ones_like(chosen, dtype=torch.bool)
        if self.training and self.capacity:
            room = capacity_of(len(tokens), self.k, len(self.experts), self.capacity)
            kept = within_capacity(chosen, len(self.experts), room)
        self.last = logits, p, chosen, kept
        y = by_expert(tokens, weights * kept, chosen, self.experts)  # (n, C); what is dropped weighs 0
        return (y if self.shared is None else y + self.shared(tokens)).view_as(x)


def make_model(config: GPTConfig) -> GPT:
    """Return a new GPT of this shape: with experts, if it has some. Raises ValueError if it can't be."""
    if config.experts and not 1 <= config.top_k <= config.experts:
        raise ValueError(f"a token can't go to {config.top_k} of {config.experts} experts")
    return GPT(config, Experts if config.experts else MLP)


def expert_layers(model: nn.Module) -> list[Experts]:
    """Return the layers of experts, from the lowest up."""
    return [module for module in model.modules() if isinstance(module, Experts)]
