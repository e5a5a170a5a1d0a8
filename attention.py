"""Attention, four times: the formula, in blocks, in tiles with memory linear in T, and torch's fused kernel.

    scores = q kᵀ / √D                     how much each query wants each key; keys of the future are hidden
    out    = softmax(scores) v             a mean of the values, weighted by that

`flash` never holds all scores. It walks over tiles of keys and keeps, for each query, the largest score m so
far and the sum l of exp(score - m). When m grows, what was summed is shrunk by exp(m_old - m_new). Backward
computes the softmax P again from logsumexp = m + log l, and uses that the softmax's gradient is
P ∘ (dP - rowsum(dO ∘ O)).

    naive    for reading: memory grows with T²
    blocks   naive on some queries at a time, without the keys of their future: up to half the work; what the
             compiler makes of it is the fastest on a CPU while T² is small
    flash    for reading: forward and backward by hand, memory grows with T (slow: Python walks the tiles)
    sdpa     for use: `torch.nn.functional.scaled_dot_product_attention`

`cached_attention` reads a cache of which a mask hides a part, as decode.py needs it.
Left out: dropout on the scores, tiles over queries (they matter to the chip's memory, not to the idea).
Papers: Vaswani 2017 (attention), Milakov 2018 (the running softmax), Dao 2022, 2023 (Flash attention 1, 2).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True,
                    segments: Tensor | None = None) -> Tensor:
    """Return softmax(q kᵀ / √D) v. q (B, H, T, D), k and v (B, H, S, D) with S ≥ T → (B, H, T, D).

    The T queries are the *last* T of the S positions: query i sees the keys up to i + S - T. Where several
    texts share a row, `segments` (B, S) numbers them, and a query sees the keys of its own text alone.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    if causal:
        scores = scores.masked_fill(~visible(q.shape[-2], k.shape[-2], q.device, segments), -math.inf)
    return scores.softmax(dim=-1) @ v  # (B, H, T, D)


def blocks_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, segments: Tensor | None = None,
                     size: int = 128) -> Tensor:
    """The same on `size` queries at a time, each block without the keys that come after all of it.

    Shapes as in `naive_attention`. On two cores a compiled training step at T = 256 takes 1 to 12 % less.
    """
    T, S, outs = q.shape[-2], k.shape[-2], []
    for i in range(0, T, size):
        block = q[..., i:i + size, :]  # (B, H, t, D)
        n = S - T + i + block.shape[-2] if causal else S  # the keys that the block's last query sees
        seen = None if segments is None else segments[:, :n]  # (B, n)
        outs.append(naive_attention(block, k[..., :n, :], v[..., :n, :], causal, seen))
    return torch.cat(outs, dim=-2)  # (B, H, T, D)


def visible(T: int, S: int, device, segments: Tensor | None = None, keys: slice = slice(None)) -> Tensor:
    """Return the causal mask (T, keys) of the last T of S positions: True where a query may see a key.

    With `segments` (B, S) it is (B, 1, T, keys), and also hides what belongs to another segment.

    >>> visible(2, 3, "cpu").int().tolist(), visible(2, 3, "cpu", torch.tensor([[5, 8, 8]])).int().tolist()
    ([[1, 1, 0], [1, 1, 1]], [[[[0, 1, 0], [0, 1, 1]]]])
    """
    # half as wide as int64: a compiled step on a CPU takes a tenth less time
    i, j = (torch.arange(n, device=device, dtype=torch.int32) for n in (T, S))  # (T,), (S,)
    causal = j[keys] <= i[:, None] + S - T  # (T, keys)
    if segments is None:
        return causal
    return causal & (segments[:, None, S - T:, None] == segments[:, None, None, keys])  # (B, 1, T, keys)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True,
                   segments: Tensor | None = None) -> Tensor:
    """The same by torch's fused kernel. Shapes as in `naive_attention`."""
    T, S = q.shape[-2], k.shape[-2]
    # subtle: with fewer queries than keys `is_causal` would line up the first query with the first key
    needs_mask = causal and (1 < T < S or segments is not None)  # one new token sees everything
    mask = visible(T, S, q.device, segments) if needs_mask else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask,
                                          is_causal=causal and T == S and not needs_mask)


class FlashAttention(torch.autograd.Function):
    """Attention over tiles of keys (Dao 2022, algorithms 1, 4). Backward needs q, k, v, o, a number a row."""

    @staticmethod
    def forward(ctx, q, k, v, causal, segments, tile):
        scale = 1 / math.sqrt(q.shape[-1])
        o = torch.zeros_like(q)  # (B, H, T, D): the sum of exp(score - m) v so far
        m = q.new_full((*q.shape[:-1], 1), -math.inf)  # (B, H, T, 1): the largest score so far
        l = torch.zeros_like(m)  # (B, H, T, 1): the sum of exp(score - m) so far
        for j in range(0, k.shape[-2], tile):
            keys = slice(j, j + tile)
            scores = tile_scores(q, k, keys, scale, causal, segments)  # (B, H, T, tile)
            m_new = torch.maximum(m, scores.amax(dim=-1, keepdim=True))
            # subtle: a row that saw no key yet has m = -inf, and -inf - -inf is nan; any finite m will do
            m_safe = m_new.masked_fill(m_new == -math.inf, 0)
            p = torch.exp(scores - m_safe)
            shrink = torch.exp(m - m_safe)  # what was summed against the old maximum, told in the new one
            l = l * shrink + p.sum(dim=-1, keepdim=True)
            o = o * shrink + p @ v[..., keys, :]
            m = m_new
        o = o / l.clamp(min=torch.finfo(l.dtype).tiny)
        lse = m + l.log()  # (B, H, T, 1): logsumexp of the row's scores, enough to compute P again
        ctx.save_for_backward(q, k, v, o, lse, segments)
        ctx.causal, ctx.tile, ctx.scale = causal, tile, scale
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse, segments = ctx.saved_tensors
        dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
        delta = (do * o).sum(dim=-1, keepdim=True)  # (B, H, T, 1): rowsum(dO ∘ O) = rowsum(P ∘ dP)
        lse = lse.masked_fill(lse == -math.inf, 0)
        for j in range(0, k.shape[-2], ctx.tile):
            keys = slice(j, j + ctx.tile)
            scores = tile_scores(q, k, keys, ctx.scale, ctx.causal, segments)  # (B, H, T, tile)
            p = torch.exp(scores - lse)
            dv[..., keys, :] = p.transpose(-2, -1) @ do
            ds = p * (do @ v[..., keys, :].transpose(-2, -1) - delta) * ctx.scale  # (B, H, T, tile)
            dq += ds @ k[..., keys, :]
            dk[..., keys, :] = ds.transpose(-2, -1) @ q
        return dq, dk, dv, None, None, None


def tile_scores(q: Tensor, k: Tensor, keys: slice, scale: float, causal: bool, segments) -> Tensor:
    """Return the masked scores (B, H, T, tile) of all queries and one tile of keys."""
    scores = q @ k[..., keys, :].transpose(-2, -1) * scale
    if causal:
        scores = scores.masked_fill(~visible(q.shape[-2], k.shape[-2], q.device, segments, keys), -math.inf)
    return scores


def flash_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, tile: int = 128,
                    segments: Tensor | None = None) -> Tensor:
    """The same in tiles of `tile` keys, with memory linear in T. Shapes as in `naive_attention`."""
    with torch.autocast(q.device.type, enabled=False):  # backward runs outside autocast: one type for both
        return FlashAttention.apply(q, k.to(q.dtype), v.to(q.dtype), causal, segments, tile)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Return attention (B, H, T, D) to a cache of S tokens, of which a mask (B, 1, T, S) shows a part.

    Compiled for a CPU, that of one token is sums of products: the compiler fuses them with what makes the
    keys, so that these are never written to memory, as torch's kernel needs them. A step of the default model
    takes 0.33 ms instead of 0.39.
    """
    if q.device.type != "cpu" or q.shape[-2] > 1 or not torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q[..., None, :] * k[:, :, None]).sum(dim=-1) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    p = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
    return (p[..., None] * v[:, :, None]).sum(dim=-2)  # (B, H, T, D)


ATTENTION = {"naive": naive_attention, "blocks": blocks_attention, "flash": flash_attention,
             "sdpa": sdpa_attention}
