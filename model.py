"""The GPT: from token ids to the logits of the next token. Pre-norm RMSNorm, RoPE, grouped-query attention, SwiGLU.

    x = embedding[ids]                           each token looks up its vector
    x = x + attention(norm(x))                   tokens look at earlier tokens, depth times
    x = x + down(silu(gate) * up)                each token thinks by itself, depth times
    logits = head(norm(x))                       a score for every token of the vocabulary

Attention is written three times, and all three agree (a test keeps that):
    naive    the formula, softmax(q kᵀ / √D) v. Memory grows with T².
    flash    the same in tiles, forward and backward by hand. Memory grows with T. Slow here: it is there to be read.
    sdpa     torch's own fused kernel. The default.

Dims, the same letters in all files:
    B batch   T time (new tokens)   S all tokens that can be seen (cached + new)   C width   D head width
    H query heads   G key/value heads (H is a multiple of G)   F feed-forward width   V vocabulary   L layers

Three options go beyond Llama (qk_norm, smear, an untied head costs nothing there). With qk_norm and smear off,
a Llama's weights fit by renaming and concatenating alone: qkv is q, k and v; gate_up is gate and up.
Left out: dropout (we never see a text often enough to need it), biases, parallelism over devices.
Papers: Touvron 2023 (Llama), Su 2021 (RoPE), Ainslie 2023 (GQA), Shazeer 2020 (SwiGLU), Dao 2022 (Flash attention).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class GPTConfig:
    """The shape of a model. It is stored in every checkpoint."""
    vocab_size: int = 1024
    context: int = 256          # the most tokens that the model can see at once
    depth: int = 4              # L
    width: int = 128            # C
    heads: int = 4              # H
    kv_heads: int = 4           # G
    hidden: int = 384           # F
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = False          # head and embedding share their weights
    qk_norm: bool = True        # normalise q and k, with a learned gain (Henry 2020): sharp attention in small heads
    smear: bool = True          # add a learned share of the previous token's embedding to each token
    attention: str = "sdpa"     # naive, flash or sdpa


# ------------------------------------------------------------------------------------------- attention, three times

def naive_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """Return softmax(q kᵀ / √D) v. q (B, H, T, D), k and v (B, H, S, D) with S ≥ T → (B, H, T, D).

    The T queries are the *last* T of the S positions: query i sees the keys up to i + S - T.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    if causal:
        scores = scores.masked_fill(~visible(q.shape[-2], k.shape[-2], q.device), -math.inf)
    return scores.softmax(dim=-1) @ v  # (B, H, T, D)


def visible(T: int, S: int, device, first_key: int = 0, n_keys: int | None = None) -> Tensor:
    """Return the causal mask (T, n_keys) of the last T of S positions: True where query may see key.

    >>> visible(2, 3, "cpu").int().tolist()
    [[1, 1, 0], [1, 1, 1]]
    """
    keys = torch.arange(first_key, first_key + (S if n_keys is None else n_keys), device=device)
    return keys <= torch.arange(S - T, S, device=device)[:, None]


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """The same by torch's fused kernel. Shapes as in `naive_attention`."""
    T, S = q.shape[-2], k.shape[-2]
    if not causal or T == 1:  # a single new token sees everything
        return F.scaled_dot_product_attention(q, k, v)
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # subtle: with fewer queries than keys `is_causal` would line up the first query with the first key
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible(T, S, q.device))


class FlashAttention(torch.autograd.Function):
    """Attention over tiles of keys (Dao 2022, algorithms 1 and 4). Saved for backward: q, k, v, o and one number a row."""

    @staticmethod
    def forward(ctx, q, k, v, causal, tile):
        T, S = q.shape[-2], k.shape[-2]
        scale = 1 / math.sqrt(q.shape[-1])
        o = torch.zeros_like(q)  # (B, H, T, D): the sum of exp(score - m) v so far
        m = q.new_full((*q.shape[:-1], 1), -math.inf)  # (B, H, T, 1): the largest score so far
        l = torch.zeros_like(m)  # (B, H, T, 1): the sum of exp(score - m) so far
        for j in range(0, S, tile):
            scores = tile_scores(q, k[..., j:j + tile, :], scale, causal, S, j)  # (B, H, T, tile)
            m_new = torch.maximum(m, scores.amax(dim=-1, keepdim=True))
            # subtle: a row that has seen no key yet has m = -inf, and -inf - -inf is nan; any finite m will do there
            m_safe = m_new.masked_fill(m_new == -math.inf, 0)
            p = torch.exp(scores - m_safe)
            shrink = torch.exp(m - m_safe)  # what was summed against the old maximum, told in the new one
            l = l * shrink + p.sum(dim=-1, keepdim=True)
            o = o * shrink + p @ v[..., j:j + tile, :]
            m = m_new
        o = o / l.clamp(min=torch.finfo(l.dtype).tiny)
        lse = m + l.log()  # (B, H, T, 1): logsumexp of the row's scores, enough to compute P again
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.causal, ctx.tile, ctx.scale = causal, tile, scale
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
        delta = (do * o).sum(dim=-1, keepdim=True)  # (B, H, T, 1): rowsum(dO ∘ O) = rowsum(P ∘ dP)
        lse = lse.masked_fill(lse == -math.inf, 0)
        for j in range(0, k.shape[-2], ctx.tile):
            keys = slice(j, j + ctx.tile)
            scores = tile_scores(q, k[..., keys, :], ctx.scale, ctx.causal, k.shape[-2], j)
            p = torch.exp(scores - lse)  # (B, H, T, tile)
            dv[..., keys, :] = p.transpose(-2, -1) @ do
            ds = p * (do @ v[..., keys, :].transpose(-2, -1) - delta) * ctx.scale  # (B, H, T, tile)
            dq += ds @ k[..., keys, :]
            dk[..., keys, :] = ds.transpose(-2, -1) @ q
        return dq, dk, dv, None, None


def tile_scores(q: Tensor, k: Tensor, scale: float, causal: bool, S: int, first_key: int) -> Tensor:
    """Return the masked scores (B, H, T, tile) of all queries and one tile of keys that starts at `first_key`."""
    scores = q @ k.transpose(-2, -1) * scale
    if not causal:
        return scores
    return scores.masked_fill(~visible(q.shape[-2], S, q.device, first_key, k.shape[-2]), -math.inf)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, tile: int = 128) -> Tensor:
    """The same in tiles of `tile` keys, with memory linear in T. Shapes as in `naive_attention`."""
    return FlashAttention.apply(q, k, v, causal, tile)


ATTENTION = {"naive": naive_attention, "flash": flash_attention, "sdpa": sdpa_attention}


# ------------------------------------------------------------------------------------------- positions and the cache

def rope_tables(config: GPTConfig) -> tuple[Tensor, Tensor]:
    """Return cos and sin (context, D) of RoPE's angles: position × base^(-2i/D), i = 0 .. D/2-1 (Su 2021, eq. 15)."""
    D = config.width // config.heads
    frequency = config.rope_base ** (-torch.arange(0, D, 2).float() / D)  # (D/2,)
    angle = torch.arange(config.context)[:, None] * frequency  # (context, D/2)
    angle = torch.cat([angle, angle], dim=-1)  # (context, D)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+D/2}) by its angle. x (B, H, T, D), cos and sin (T, D) → (B, H, T, D).

    subtle: Llama pairs i with i + D/2 ("half-split"), the paper 2i with 2i + 1. Both train; only one loads Llama.
    """
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class KVCache:
    """The keys and values of all tokens so far, so that a new token costs one token's work. Room for `context`.

    To take tokens back (speculative decoding does), lower `length`.
    """

    def __init__(self, config: GPTConfig, batch_size: int, device="cpu", dtype=torch.float32):
        D = config.width // config.heads
        shape = (config.depth, batch_size, config.kv_heads, config.context, D)  # (L, B, G, context, D)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.ids = torch.zeros(batch_size, config.context, device=device, dtype=torch.long)  # for `smear`
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new k and v (B, G, T, D) of a layer; return all that is there (B, G, S, D)."""
        S = self.length + k.shape[-2]
        self.k[layer, :, :, self.length:S] = k
        self.v[layer, :, :, self.length:S] = v
        return self.k[layer, :, :, :S], self.v[layer, :, :, :S]

    @property
    def n_bytes(self) -> int:
        return 2 * self.k.nbytes


# ------------------------------------------------------------------------------------------- the model

class RMSNorm(nn.RMSNorm):
    """x / √(mean(x²) + eps) · weight, over the last dimension (Zhang 2019). eps stands inside the root."""


class Attention(nn.Module):
    """Grouped-query self-attention: H query heads share G key and value heads."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.H, self.G, self.D = config.heads, config.kv_heads, config.width // config.heads
        self.attend = ATTENTION[config.attention]
        self.qkv = nn.Linear(config.width, (self.H + 2 * self.G) * self.D, bias=False)
        self.out = nn.Linear(self.H * self.D, config.width, bias=False)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(self.D, config.norm_eps), RMSNorm(self.D, config.norm_eps)
        self.qk_norm = config.qk_norm

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None, layer: int) -> Tensor:
        """x (B, T, C), cos and sin (T, D) → (B, T, C)."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, self.H + 2 * self.G, self.D).split([self.H, self.G, self.G], dim=2)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D), (B, G, T, D) twice
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, G, S, D)
        if self.G != self.H:  # subtle: heads 0 and 1 share the first k and v, so repeat_interleave, not repeat
            k, v = (t.repeat_interleave(self.H // self.G, dim=1) for t in (k, v))  # (B, H, S, D)
        y = self.attend(q, k, v)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, self.H * self.D))  # (B, T, C)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer 2020, eq. 6)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # (B, T, F) twice
        return self.down(F.silu(gate) * up)  # (B, T, C)


class Block(nn.Module):
    """One layer: look around, then think, each added to the residual stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(config.width, config.norm_eps), Attention(config)
        self.mlp_norm, self.mlp = RMSNorm(config.width, config.norm_eps), MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None, layer: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, cache, layer)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """The whole model. `model(ids)` gives the logits; with a cache, only new tokens are given."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        assert config.width % config.heads == 0 and config.heads % config.kv_heads == 0, f"heads do not divide: {config}"
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.smear = nn.Parameter(torch.full((config.width,), 0.5)) if config.smear else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Matrices N(0, 1/fan-in), outputs of a layer zero: each layer starts as the identity. Loss at step 0 ≈ ln V."""
        for name, p in self.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                p.fill_(1.5)  # scores start 1.5² times as wide: heads of 32 can point at one token
            elif name.endswith(("out.weight", "down.weight")):
                p.zero_()
            elif name == "embedding.weight":
                p.normal_(std=0.02 if self.config.tied else 1.0)
            elif name == "head.weight":
                p.normal_(std=0.02)
            elif p.dim() == 2:
                p.normal_(std=p.shape[1] ** -0.5)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids (B, T) → logits (B, T, V). With a cache, `ids` go on where it ends, and it grows by T.

        Raises ValueError when the tokens do not fit into the context.
        """
        T, start = ids.shape[1], 0 if cache is None else cache.length
        if start + T > self.config.context:
            raise ValueError(f"{start + T} tokens do not fit into the context of {self.config.context}")
        x = self.embedding(ids)  # (B, T, C)
        if self.smear is not None:
            before = F.pad(x[:, :-1], (0, 0, 1, 0))  # (B, T, C): the token before; none before the first
            if start:
                before[:, 0] = self.embedding(cache.ids[:, start - 1])
            x = x + self.smear * before
        cos, sin = self.cos[start:start + T], self.sin[start:start + T]  # (T, D)
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, cache, layer)
        if cache is not None:
            cache.ids[:, start:start + T] = ids
            cache.length += T
        return self.head(self.norm(x))  # (B, T, V)


def count_parameters(config: GPTConfig) -> int:
    """Return the number of parameters by formula (the test compares it with the module)."""
    C, D = config.width, config.width // config.heads
    attention = C * D * (config.heads + 2 * config.kv_heads) + C * C + 2 * D * config.qk_norm
    block = attention + 3 * C * config.hidden + 2 * C
    return config.vocab_size * C * (1 if config.tied else 2) + config.depth * block + C + C * config.smear


def flops_per_token(config: GPTConfig, T: int | None = None) -> int:
    """Return the FLOPs of one token, forward and backward: 6 a matrix weight, 12·L·C·T of attention (PaLM, appendix B)."""
    C, D = config.width, config.width // config.heads
    block = C * D * (config.heads + 2 * config.kv_heads) + C * C + 3 * C * config.hidden
    return 6 * (config.depth * block + config.vocab_size * C) + 12 * config.depth * C * (T or config.context)
