"""attention.py: four attentions that agree, blocks without the future's keys, and flash's memory."""

import itertools
import math

import pytest
import torch

import attention
from attention import (ATTENTION, blocks_attention, cached_attention, flash_attention, naive_attention,
                       visible)


def qkv(T, S, D=8, grad=False):
    torch.manual_seed(T * 100 + S)
    return [torch.randn(2, 3, n, D, dtype=torch.float64, requires_grad=grad) for n in (T, S, S)]


def by_hand(q, k, v, causal):
    """Attention with loops, as the oracle."""
    out = torch.zeros_like(q)
    T, S = q.shape[2], k.shape[2]
    for b, h, t in itertools.product(*map(range, q.shape[:3])):
        n = S - T + t + 1 if causal else S
        weights = torch.stack([q[b, h, t] @ k[b, h, s] / math.sqrt(q.shape[3]) for s in range(n)]).softmax(0)
        out[b, h, t] = sum(w * v[b, h, s] for s, w in enumerate(weights))
    return out


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T,S", [(7, 7), (3, 7), (1, 7)])
def test_attention_is_the_formula(name, causal, T, S):
    q, k, v = qkv(T, S)
    difference = (ATTENTION[name](q, k, v, causal) - by_hand(q, k, v, causal)).abs().max()
    assert difference < 1e-12, f"{name}: off by {difference:.1e} for {T} queries at the end of {S} keys"


@pytest.mark.parametrize("T", [1, 3])
def test_a_cache_is_read_up_to_each_rows_length(T):
    """Two rows, of 4 and 7 tokens with the new ones: what lies behind is hidden, compiled or not."""
    (q, k, v), lengths = qkv(T, 9), torch.tensor([4, 7])
    mask = torch.arange(9) <= (lengths[:, None] - T + torch.arange(T))[:, None, :, None]  # (B, 1, T, S)
    alone = [by_hand(q[b:b + 1], k[b:b + 1, :, :n], v[b:b + 1, :, :n], True) for b, n in enumerate(lengths)]
    for way in (cached_attention, torch.compile(cached_attention, backend="eager", fullgraph=True)):
        difference = (way(q, k, v, mask) - torch.cat(alone)).abs().max()
        assert difference < 1e-12, f"off by {difference:.1e}: a row sees more or less than its own tokens"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T,S,size", [(37, 37, 16), (32, 32, 16), (21, 37, 16), (1, 20, 16)])
def test_blocks_and_their_gradients_equal_naive(T, S, size, causal):
    inputs, do = qkv(T, S, grad=True), torch.randn(2, 3, T, 8, dtype=torch.float64)
    segments = torch.tensor([[0] * 9 + [1] * (S - 9), [3] * 17 + [5] * (S - 17)])
    for given in (None, segments):
        results = [(o, *torch.autograd.grad(o, inputs, do)) for o in (
            naive_attention(*inputs, causal, given), blocks_attention(*inputs, causal, given, size))]
        for what, a, b in zip(("o", "dq", "dk", "dv"), *results):
            difference = (a - b).abs().max()
            assert difference < 1e-12, f"blocks: {what} differs from the formula's by {difference:.1e}"


def test_blocks_leave_the_future_out(monkeypatch):
    scores = []

    def count(q, k, *rest):
        scores.append(q.shape[-2] * k.shape[-2])
        return naive_attention(q, k, *rest)
    monkeypatch.setattr(attention, "naive_attention", count)
    blocks_attention(*qkv(64, 64), True, None, 16)
    assert sum(scores) == 16 * (16 + 32 + 48 + 64), f"scores of each block: {scores}; keys of the future"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T,S,tile", [(37, 37, 16), (37, 37, 37), (37, 37, 64), (5, 37, 16), (1, 20, 16)])
def test_flash_and_its_gradients_equal_naive(T, S, tile, causal):
    inputs, do = qkv(T, S, grad=True), torch.randn(2, 3, T, 8, dtype=torch.float64)
    results = [(o, *torch.autograd.grad(o, inputs, do)) for o in
               (naive_attention(*inputs, causal), flash_attention(*inputs, causal, tile))]
    for what, a, b in zip(("o", "dq", "dk", "dv"), *results):
        difference = (a - b).abs().max()
        assert difference < 1e-12, f"flash: {what} differs from the formula's by {difference:.1e}"


def test_flash_passes_gradcheck():
    inputs = [t[:1, :1] for t in qkv(5, 9, D=4, grad=True)]
    right = torch.autograd.gradcheck(lambda *a: flash_attention(*a, True, 4), inputs)
    assert right, "flash: the backward is wrong"


def test_flash_rows_that_see_no_key_are_zero_and_have_no_gradient():
    q, k, v = qkv(6, 4, grad=True)  # the first two of six queries stand before all four keys
    o = flash_attention(q, k, v, True, 2)
    grads = torch.autograd.grad(o.sum(), (q, k, v))
    assert o[:, :, :2].abs().max() == 0, "a row without keys must be 0"
    assert all(g.isfinite().all() for g in grads), "a row without keys made a gradient nan: -inf minus -inf"
    rest = naive_attention(q[:, :, 2:], k, v)
    assert (o[:, :, 2:] - rest).abs().max() < 1e-12, "the rows that see keys differ from the formula"


def test_flash_survives_scores_of_any_size():
    q, k, v = (1e3 * t for t in qkv(9, 9))
    o = flash_attention(q, k, v, True, 4)
    assert torch.equal(o.isfinite(), torch.ones_like(q).bool()), "exp overflowed"


def saved_bytes(attend, T) -> int:
    """The bytes that autograd keeps for the backward pass."""
    total, seen = 0, set()

    def pack(t):
        nonlocal total
        if t.data_ptr() not in seen:
            seen.add(t.data_ptr())
            total += t.nbytes
        return t
    q, k, v = qkv(T, T, grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        attend(q, k, v, True)
    return total


def test_flash_memory_is_linear_in_time():
    flash, naive = ([saved_bytes(f, T) for T in (128, 256, 512)] for f in (flash_attention, naive_attention))
    assert flash[2] / flash[1] < 2.1, f"flash saves {flash} bytes at T = 128, 256, 512: it should only double"
    assert naive[2] / naive[1] > 3, f"naive saves {naive}: it should grow fourfold, or this measures nothing"


def test_visible_is_aligned_at_the_end():
    seen = visible(2, 4, "cpu").tolist()
    assert seen == [[True, True, True, False], [True] * 4], "queries are the last positions"


def test_flash_under_autocast_has_gradients():
    q, k, v = (t.detach().float().requires_grad_() for t in qkv(9, 9))
    with torch.autocast("cpu", torch.bfloat16):
        o = flash_attention(q, k, v.bfloat16(), True, 4)
    o.sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v)), "mixed precision breaks flash's backward"
