"""model.py: a cache that changes nothing, a Llama inside, and counts by formula."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from attention import ATTENTION
from experts import make_model
from model import GPT, GPTConfig, KVCache, count_parameters, flops_per_token, rope_tables, rotate

SMALL = GPTConfig(vocab_size=50, context=24, depth=2, width=32, heads=4, kv_heads=2, hidden=48)


def make(config: GPTConfig = SMALL) -> GPT:
    """A float64 model in which no weight is zero or one, so that every part of it counts."""
    torch.manual_seed(0)
    model = make_model(config).double()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model.eval()


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("chunks", [[24], [1] * 24, [5, 1, 7, 11], [23, 1]])
def test_cache_changes_nothing(attention, chunks):
    model, ids = make(replace(SMALL, attention=attention)), torch.randint(50, (3, 24))
    cache = KVCache(model.config, 3, dtype=torch.float64)
    logits = torch.cat([model(part, cache) for part in ids.split(chunks, dim=1)], dim=1)
    difference = (logits - model(ids)).abs().max()
    assert difference < 1e-12, f"chunks of {chunks}: the cached logits are off by {difference:.1e}"


def test_cache_rolls_back():
    model, ids = make(), torch.randint(50, (2, 10))
    cache = KVCache(model.config, 2, dtype=torch.float64)
    model(ids[:, :6], cache)
    model(torch.randint(50, (2, 4)), cache)
    cache.length = 6  # the four tokens are taken back
    difference = (model(ids[:, 6:], cache) - model(ids)[:, 6:]).abs().max()
    assert difference < 1e-12, "tokens taken back left a trace"


def test_past_the_context_is_a_clear_error():
    model = make()
    cache = KVCache(model.config, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="25 tokens do not fit into the context of 24"):
        model(torch.zeros(1, 25, dtype=torch.long))
    model(torch.zeros(1, 24, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="context of 24"):
        model(torch.zeros(1, 1, dtype=torch.long), cache)


def test_the_future_does_not_reach_the_past():
    model, ids = make(), torch.randint(50, (1, 12))
    changed = ids.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 50
    moved = (model(ids) - model(changed)).abs().amax(dim=-1)[0]
    assert moved[:8].max() == 0, "a later token changed earlier logits: the mask leaks"
    assert moved[8:].min() > 0, "a token does not reach what follows it"


def test_rope_sees_distance_only():
    cos, sin = (t.double() for t in rope_tables(SMALL))
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(i, j):
        return (rotate(q, cos[i:i + 1], sin[i:i + 1]) * rotate(k, cos[j:j + 1], sin[j:j + 1])).sum()
    assert abs(score(9, 4) - score(17, 12)) < 1e-6, "the same distance must give the same score"
    assert abs(score(9, 4) - score(9, 5)) > 1e-3, "another distance must give another score"


def llama(weights: dict, config: GPTConfig, ids: torch.Tensor) -> torch.Tensor:
    """A Llama forward pass in the published layout (q, k, v, gate, up apart), not made from model.py."""
    C, H, G = config.width, config.heads, config.kv_heads
    D, T = C // H, ids.shape[1]

    def norm(x, w):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * w

    def turn(x):  # x (T, D): pairs (i, i + D/2) as complex numbers
        i = torch.arange(D // 2, dtype=torch.float64)
        angle = torch.arange(T, dtype=torch.float64)[:, None] * config.rope_base ** (-2 * i / D)
        z = torch.complex(x[:, :D // 2], x[:, D // 2:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag], dim=-1)
    rows = []
    for row in ids:
        x = weights["embed_tokens"][row]
        for l in range(config.depth):
            w = {k.removeprefix(f"{l}."): t for k, t in weights.items() if k.startswith(f"{l}.")}
            h = norm(x, w["input_layernorm"])
            heads = []
            for i in range(H):
                j = i * G // H  # query heads 0 .. H/G-1 share the first key and value
                q = h @ w["q"][i * D:(i + 1) * D].T
                k, v = (h @ w[name][j * D:(j + 1) * D].T for name in "kv")
                scores = turn(q) @ turn(k).T / math.sqrt(D)
                heads.append((scores + torch.full((T, T), -math.inf).triu(1)).softmax(-1) @ v)
            x = x + torch.cat(heads, dim=-1) @ w["o"].T
            h = norm(x, w["post_attention_layernorm"])
            x = x + (F.silu(h @ w["gate"].T) * (h @ w["up"].T)) @ w["down"].T
        rows.append(norm(x, weights["norm"]) @ weights["lm_head"].T)
    return torch.stack(rows)


def test_a_llama_fits_by_renaming_and_concatenating():
    config = replace(SMALL, qk_norm=False, key_shift=False)
    model, weights = make(config), {}
    C, D = config.width, config.width // config.heads

    def rand(*shape):
        return torch.randn(shape, dtype=torch.float64) * 0.3
    for l in range(config.depth):
        weights |= {f"{l}.q": rand(C, C), f"{l}.k": rand(2 * D, C),
                    f"{l}.v": rand(2 * D, C), f"{l}.o": rand(C, C),
                    f"{l}.gate": rand(48, C), f"{l}.up": rand(48, C), f"{l}.down": rand(C, 48),
                    f"{l}.input_layernorm": rand(C), f"{l}.post_attention_layernorm": rand(C)}
    weights |= {"embed_tokens": rand(50, C), "norm": rand(C), "lm_head": rand(50, C)}
    ours = {"embedding.weight": weights["embed_tokens"], "norm.weight": weights["norm"],
            "head.weight": weights["lm_head"]}
    for l in range(config.depth):
        ours |= {f"blocks.{l}.attention.qkv.weight": torch.cat([weights[f"{l}.{x}"] for x in "qkv"]),
                 f"blocks.{l}.attention.out.weight": weights[f"{l}.o"],
                 f"blocks.{l}.mlp.gate_up.weight": torch.cat([weights[f"{l}.gate"], weights[f"{l}.up"]]),
                 f"blocks.{l}.mlp.down.weight": weights[f"{l}.down"],
                 f"blocks.{l}.attention_norm.weight": weights[f"{l}.input_layernorm"],
                 f"blocks.{l}.mlp_norm.weight": weights[f"{l}.post_attention_layernorm"]}
    model.load_state_dict(ours)
    ids = torch.randint(50, (2, 24))
    difference = (model(ids) - llama(weights, config, ids)).abs().max()
    assert difference < 1e-5, f"off by {difference:.1e}: RoPE's pairing or the sharing of k and v differs"


@pytest.mark.parametrize("change", [
    {}, {"tied": True}, {"qk_norm": False, "key_shift": False}, {"kv_heads": 4, "depth": 3}])
def test_parameter_count_is_the_module_s(change):
    config = replace(SMALL, **change)
    n = sum(p.numel() for p in GPT(config).parameters())
    assert count_parameters(config) == n, f"the formula is off: {change}"


def test_flops_are_three_times_two_a_weight_and_attention():
    """Without attention's own part (T = 0 has none), 6 FLOPs for each weight of a matrix a token passes."""
    weights = sum(p.numel() for name, p in GPT(SMALL).named_parameters()
                  if p.dim() == 2 and "embedding" not in name)
    assert flops_per_token(SMALL, 10) - 12 * SMALL.depth * SMALL.width * 10 == 6 * weights


def test_loss_before_training_is_that_of_a_guess():
    torch.manual_seed(0)
    model, ids = GPT(GPTConfig()), torch.randint(1024, (4, 65))
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
    guess = math.log(1024)
    assert abs(loss - guess) < 0.1, f"the loss at step 0 is {loss:.3f}, a guess has ln V = {guess:.3f}"


@pytest.mark.parametrize("experts", [0, 4])
def test_wanted_places_get_what_all_places_would(experts):
    model = make(replace(SMALL, experts=experts, top_k=2))
    ids, wanted = torch.randint(50, (3, 24)), torch.rand(3, 24) < 0.3
    some, every = model.hidden(ids, wanted=wanted), model.hidden(ids)[wanted]
    assert (some - every).abs().max() < 1e-12, "hidden(wanted=mask) is not hidden()[mask]"
    for found, right in zip(*(torch.autograd.grad(each.square().sum(), list(model.parameters()),
                                                  allow_unused=True) for each in (some, every))):
        assert (found is None) == (right is None), "with `wanted` the gradient reaches other weights"
        assert right is None or (found - right).abs().max() < 1e-9, "with `wanted` the gradient is another"


def test_every_parameter_gets_a_gradient():
    model = make().float()
    model(torch.randint(50, (2, 8))).logsumexp(-1).sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not idle, f"no gradient reaches {idle}"
