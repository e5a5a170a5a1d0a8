"""experts.py: who goes where, what keeps it even, and two paths that agree."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from experts import (Experts, balance_bias, balance_loss, by_expert, by_token, capacity_of, expert_layers,
                     load, make_model, route, within_capacity, z_loss)
from lora import add_lora, merge_lora
from model import GPTConfig, KVCache, count_parameters, flops_per_token
from packed import quantize_model

SMALL = GPTConfig(vocab_size=50, context=24, depth=2, width=32, heads=4, kv_heads=2, hidden=32, experts=4)


def make(config: GPTConfig = SMALL):
    """A float64 model in which no weight is zero."""
    torch.manual_seed(0)
    model = make_model(config).double()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model.eval()


def test_two_choices_are_divided_by_their_sum():
    """As in Mixtral: that is the softmax over the chosen logits alone."""
    logits = torch.randn(50, 8, generator=torch.manual_seed(0))
    weights, chosen, p = route(logits, 2)
    top = logits.topk(2, dim=-1)
    assert torch.equal(chosen, top.indices), "the likeliest expert comes first, then the second"
    assert (weights - top.values.softmax(dim=-1)).abs().max() < 1e-6, "the weights of the chosen add up to 1"
    assert (p - logits.softmax(dim=-1)).abs().max() < 1e-6, "p is over all experts"


def test_one_choice_keeps_its_probability():
    logits = torch.randn(50, 8, generator=torch.manual_seed(0), requires_grad=True)
    weights, chosen, p = route(logits, 1)
    assert torch.equal(weights[:, 0], p.max(dim=-1).values), "divided by itself the weight would be 1"
    weights.sum().backward()
    assert logits.grad.abs().sum() > 0, "the router of Switch learns through the weight"


def test_the_router_counts_in_float32():
    assert route(torch.randn(5, 4).bfloat16(), 2)[2].dtype == torch.float32


def test_the_bias_is_for_the_choice_alone():
    logits, bias = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0.0, 0.0, 10.0])
    weights, chosen, p = route(logits, 2, bias)
    assert chosen.tolist() == [[2, 0]], "the bias makes expert 2 the first choice"
    wanted = p[0, [2, 0]] / p[0, [2, 0]].sum()
    assert torch.allclose(weights[0], wanted), "the weights come from p, without the bias"


@pytest.mark.parametrize("k", [1, 2])
def test_the_balance_loss_is_k_when_even(k):
    even = torch.stack([torch.arange(8).roll(-i)[:k] for i in range(8)])
    assert balance_loss(torch.full((8, 8), 1 / 8), even) == pytest.approx(k)
    one = torch.eye(8)[:1].expand(8, 8)
    assert balance_loss(one, torch.zeros(8, 1, dtype=torch.long)) == pytest.approx(8), "collapsed it is E"


def test_the_balance_loss_is_mixtrals():
    p = torch.randn(40, 8, generator=torch.manual_seed(0)).softmax(dim=-1).requires_grad_()
    chosen = p.topk(2, dim=-1).indices
    loss = balance_loss(p, chosen)
    share = [sum(e in row for row in chosen.tolist()) / 40 for e in range(8)]
    wanted = 8 * sum(f * p[:, e].mean().item() for e, f in enumerate(share))
    assert loss.item() == pytest.approx(wanted, abs=1e-6)
    loss.backward()
    wanted = 8 * torch.tensor(share) / 40
    assert torch.allclose(p.grad, wanted.expand(40, 8), atol=1e-6), "P is the mean over all of p"


def test_the_z_loss():
    logits = torch.randn(9, 4, generator=torch.manual_seed(0))
    assert z_loss(logits).item() == pytest.approx(logits.exp().sum(-1).log().pow(2).mean().item(), abs=1e-6)


def test_the_bias_moves_towards_an_even_load():
    chosen = torch.tensor([[0], [0], [0], [1], [2], [2]])
    assert load(chosen, 4).tolist() == pytest.approx([2, 2 / 3, 4 / 3, 0])
    assert balance_bias(torch.zeros(4), chosen, 0.1).tolist() == pytest.approx([-0.1, 0.1, -0.1, 0.1])


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 8.0])
def test_first_come_first_served(k, factor):
    """By hand: first choices in the order of the tokens, then second choices."""
    chosen = torch.randn(30, 4, generator=torch.manual_seed(1)).topk(k, dim=-1).indices
    capacity, taken = capacity_of(30, k, 4, factor), [0] * 4
    kept = within_capacity(chosen, 4, capacity)
    for choice in range(k):
        for token in range(30):
            expert = chosen[token, choice].item()
            taken[expert] += 1
            has_room = taken[expert] <= capacity
            assert kept[token, choice] == has_room, f"choice {choice} of token {token}: room {has_room}"


def mlps(E: int, width: int = 16):
    torch.manual_seed(0)
    layer = Experts(GPTConfig(width=width, hidden=32, experts=E)).double()
    for p in layer.parameters():
        p.data.normal_(std=0.3)
    return layer


@pytest.mark.parametrize("k, E", [(1, 2), (2, 4), (3, 8), (4, 4)])
def test_both_paths_agree(k, E):
    layer, results = mlps(E), []
    x = torch.randn(20, 16, dtype=torch.float64)
    logits = torch.randn(20, E, dtype=torch.float64)
    logits[:, -1] = -9.0  # for k < E an expert that gets nothing
    for path in (by_token, by_expert):
        inputs = [t.clone().requires_grad_() for t in (x, logits)]
        weights, chosen, _ = route(inputs[1], k)
        y = path(inputs[0], weights, chosen, layer.experts)
        y.square().sum().backward()
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in layer.experts.parameters()]
        results.append([y.detach(), *(t.grad for t in inputs), *(g.clone() for g in grads)])
        layer.zero_grad()
    for slow, fast in zip(*results):
        assert (slow - fast).abs().max() < 1e-6, "the paths differ: is the order of the tokens restored?"


def test_it_is_mixtrals_block():
    """Every expert on every token, weighted with 0 where it was not chosen."""
    layer, x = mlps(8).eval(), torch.randn(2, 7, 16, dtype=torch.float64)
    scores = layer.router(x).topk(2, dim=-1)
    zeros = torch.zeros(2, 7, 8, dtype=torch.float64)
    weights = zeros.scatter(-1, scores.indices, scores.values.softmax(dim=-1))
    wanted = 0
    for e, expert in enumerate(layer.experts):
        gate, up = (x @ expert.gate_up.weight.T).chunk(2, dim=-1)
        wanted = wanted + weights[..., e:e + 1] * ((F.silu(gate) * up) @ expert.down.weight.T)
    assert (layer(x) - wanted).abs().max() < 1e-6


def test_a_dropped_token_leaves_by_the_residual_alone():
    model = make(replace(SMALL, depth=1, top_k=1))
    layer, x = expert_layers(model)[0].train(), torch.randn(1, 6, 32, dtype=torch.float64)
    layer.capacity = 1e-9  # each expert takes one token
    y, (*_, chosen, kept) = layer(x)[0], layer.last
    first = [chosen[:i, 0].tolist().count(chosen[i, 0].item()) == 0 for i in range(6)]
    assert kept[:, 0].tolist() == first, "the first token of each expert is kept"
    assert (y[~kept[:, 0]] == 0).all() and (y[kept[:, 0]] != 0).all(), "what is dropped gets nothing"
    layer.eval()
    assert (layer(x) != 0).all(), "a model that is used drops nothing"


def test_the_shared_expert_sees_every_token():
    config = replace(SMALL, shared=1)
    layer, x = expert_layers(make(config))[0], torch.randn(1, 5, 32, dtype=torch.float64)
    y, shared = layer(x), layer.shared(x)
    layer.shared = None
    assert torch.allclose(y, layer(x) + shared)


@pytest.mark.parametrize("chunks", [[24], [1] * 24, [5, 1, 7, 11]])
def test_cache_changes_nothing(chunks):
    model, ids = make(), torch.randint(50, (3, 24))
    cache = KVCache(model.config, 3, dtype=torch.float64)
    logits = torch.cat([model(part, cache) for part in ids.split(chunks, dim=1)], dim=1)
    assert (logits - model(ids)).abs().max() < 1e-12, "a token's experts depend on the tokens beside it"


@pytest.mark.parametrize("change", [{}, {"top_k": 1}, {"shared": 2}, {"experts": 0}])
def test_counts_are_the_module_s(change):
    config = replace(SMALL, **change)
    model = make_model(config)
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())
    met = sum(p.numel() * (config.top_k / 4 if ".experts." in name else 1)
              for name, p in model.named_parameters() if p.dim() == 2 and "embedding" not in name)
    assert flops_per_token(config, 10) - 12 * config.depth * config.width * 10 == 6 * met


def test_every_expert_gets_a_gradient():
    model = make().float()
    model(torch.randint(50, (8, 24))).logsumexp(-1).sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not idle, f"no gradient reaches {idle}"


def test_fewer_bits_and_adapters_take_experts_too():
    model, ids = make().float(), torch.randint(50, (2, 24))
    wanted = model(ids)
    add_lora(model, 2)
    assert torch.allclose(model(ids), wanted), "adapters start as nothing"
    merge_lora(model)
    error = (quantize_model(model, 8)(ids) - wanted).norm() / wanted.norm()
    assert error < 0.2, f"int8 changes the logits by {error:.0%}"


@pytest.mark.parametrize("top_k", [0, 5])
def test_no_more_choices_than_experts(top_k):
    with pytest.raises(ValueError, match="experts"):
        make_model(replace(SMALL, top_k=top_k))
