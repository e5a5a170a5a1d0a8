"""The GPT: token ids become the logits of the next token. RMSNorm, RoPE, grouped-query attention, SwiGLU.

    x = embedding[ids]                           each token looks up its vector
    x = x + attention(norm(x))                   tokens look at earlier tokens, depth times
    x = x + down(silu(gate) * up)                each token thinks by itself, depth times
    logits = head(norm(x))                       a score for every token of the vocabulary

What attention computes is in attention.py; here it gets its heads, its positions (RoPE) and its cache.

Dims, the same letters in all files:
    B batch   T time (new tokens)   S all tokens in sight (cached + new)   C width   D head width
    H query heads   G key/value heads (G divides H)   F feed-forward width   V vocabulary   L layers

With qk_norm and key_shift off, a Llama's weights fit by renaming and concatenating alone: qkv is q, k, v.
Left out: dropout (no text is seen often), biases, splitting a model over devices.
Papers: Touvron 2023 (Llama), Su 2021 (RoPE), Ainslie 2023 (GQA), Shazeer 2020 (SwiGLU), Henry 2020
(QK-norm), Xu 2024 (KV shifting).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import ATTENTION, cached_attention


@dataclass
class GPTConfig:
    """The shape of a model. It is stored in every checkpoint."""
    vocab_size: int = 1024
    context: int = 256          # the most tokens that the model can see at once
    depth: int = 4              # L
    width: int = 128            # C
    heads: int = 4              # H
    kv_heads: int = 4           # G
    hidden: int = 352           # F, of each expert if there are some
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = False          # head and embedding share their weights
    qk_norm: bool = True        # normalise q and k, with a learned gain they share: heads look sharply
    key_shift: bool = True      # each head learns how much of a key is the previous token's
    attention: str = "sdpa"     # naive, blocks, flash or sdpa
    experts: int = 0            # feed-forward layers side by side, a token goes to top_k: experts.py
    top_k: int = 2
    shared: int = 0             # so many times F more that all tokens go through

    @property
    def head_width(self) -> int:
        """D."""
        return self.width // self.heads


# ------------------------------------------------------------------------------- positions and the cache

def positions(start: int, T: int, context: int) -> slice:
    """Return the positions of T tokens from `start` on. Raises ValueError if they do not fit."""
    if start + T > context:
        raise ValueError(f"{start + T} tokens do not fit into the context of {context}")
    return slice(start, start + T)


def rope_tables(config: GPTConfig) -> tuple[Tensor, Tensor]:
    """Return cos and sin (context, D/2) of RoPE's angles, position × base^(-2i/D) (Su 2021, eq. 15)."""
    D = config.head_width
    frequency = config.rope_base ** (-torch.arange(0, D, 2).float() / D)  # (D/2,)
    angle = torch.arange(config.context)[:, None] * frequency  # (context, D/2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+D/2}) by its angle. x (B, H, T, D), cos and sin (T, D/2) → as x.

    subtle: Llama pairs i with i + D/2 ("half-split"), the paper 2i with 2i + 1. Both train, one loads Llama.
    """
    a, b = x.chunk(2, dim=-1)  # (B, H, T, D/2) twice
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)  # (B, H, T, D)


class KVCache:
    """The keys and values of all tokens so far, so that a new token costs one token's work.

    To take tokens back, lower `length`. Keys are kept as they were before `mix_keys`: nothing else has them.
    """

    def __init__(self, config: GPTConfig, batch_size: int, device="cpu", dtype=torch.float32):
        shape = (config.depth, batch_size, config.kv_heads, config.context, config.head_width)
        self.k = torch.zeros(shape, device=device, dtype=dtype)  # (L, B, G, context, D)
        self.v = torch.zeros_like(self.k)
        self.length, self.mask = 0, None  # decode.py has a cache that hides more than the future

    def take(self, T: int) -> slice:
        """Return the positions of T new tokens, and count them."""
        places = positions(self.length, T, self.k.shape[-2])
        self.length += T
        return places

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new k and v (B, G, T, D) of a layer; return all that is there (B, G, S, D)."""
        S, T = self.length, k.shape[-2]
        self.k[layer, :, :, S - T:S] = k
        self.v[layer, :, :, S - T:S] = v
        return self.k[layer, :, :, :S], self.v[layer, :, :, :S]

    @property
    def n_bytes(self) -> int:
        """What keys and values take, for a full context."""
        return self.k.nbytes + self.v.nbytes


# --------------------------------------------------------------------------------------------- the model

class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight, over the last dimension (Zhang 2019). eps stands inside the root."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query self-attention: H query heads share G key and value heads."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.H, self.G, self.D = config.heads, config.kv_heads, config.head_width
        self.attend = ATTENTION[config.attention]
        self.qkv = nn.Linear(config.width, (self.H + 2 * self.G) * self.D, bias=False)
        self.out = nn.Linear(self.H * self.D, config.width, bias=False)
        self.qk_norm = RMSNorm(self.D, config.norm_eps) if config.qk_norm else nn.Identity()
        shares = torch.arange(1.0, self.G + 1) % 2  # (G,): 1, 0, 1, 0 …
        self.shift = nn.Parameter(shares) if config.key_shift else None

    def mix_keys(self, k: Tensor, segments: Tensor | None) -> Tensor:
        """Mix each key with the one before it, by a share that each head learns (Xu 2024). k (B, G, S, D).

        A head with share 1 whose q and k matrices start equal looks, from birth, at what followed when the
        present token stood there before: it is an induction head, and copying need not be discovered. On a
        first version of the small world, 6 M tokens brought the copying of new names to 97 %; without the
        shift, with a share of the previous token's embedding added to each token instead, to 10 %.
        """
        before = F.pad(k[:, :, :-1], (0, 0, 1, 0))  # (B, G, S, D)
        if segments is not None:  # subtle: the first key of a text has none before it
            goes_on = F.pad(segments[:, 1:] == segments[:, :-1], (1, 0))  # (B, S)
            before = before * goes_on[:, None, :, None]
        return torch.lerp(k, before, self.shift[:, None, None].to(k.dtype))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None, layer: int,
                segments: Tensor | None) -> Tensor:
        """x (B, T, C), cos and sin (T, D/2) or (B, 1, T, D/2) → (B, T, C)."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, self.H + 2 * self.G, self.D).transpose(1, 2)  # (B, H + 2G, T, D)
        qk, v = qkv.split([self.H + self.G, self.G], dim=1)  # (B, H + G, T, D), (B, G, T, D)
        q, k = rotate(self.qk_norm(qk), cos, sin).split([self.H, self.G], dim=1)  # (B, H, T, D), (B, G, T, D)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, G, S, D)
        if self.shift is not None:
            k = self.mix_keys(k, segments)
        if self.G != self.H:  # subtle: heads 0 and 1 share k and v number 0, so repeat_interleave, not repeat
            k, v = (t.repeat_interleave(self.H // self.G, dim=1) for t in (k, v))  # (B, H, S, D)
        if cache is not None and cache.mask is not None:
            y = cached_attention(q, k, v, cache.mask)  # (B, H, T, D)
        else:
            y = self.attend(q, k, v, segments=segments)  # (B, H, T, D)
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

    def __init__(self, config: GPTConfig, feed_forward: type[nn.Module]):
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(config.width, config.norm_eps), Attention(config)
        self.mlp_norm, self.mlp = RMSNorm(config.width, config.norm_eps), feed_forward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None, layer: int,
                segments: Tensor | None, wanted: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, cache, layer, segments)
        x = x if wanted is None else x[wanted]  # (n, C)
        return x + self.mlp(self.mlp_norm(x))


# In a compiled step all layers share what the compiler made of the first one: it takes half the time. Experts
# can't be compiled whole, a cache changes with each layer, and on CUDA this is untried.
one_program = torch.compiler.nested_compile_region(lambda block, *given: block(*given))


class GPT(nn.Module):
    """The whole model. `model(ids)` gives the logits; with a cache, only new tokens are given.

    `feed_forward(config)` makes the layer in which each token thinks: (B, T, C) → (B, T, C).
    """

    def __init__(self, config: GPTConfig, feed_forward: type[nn.Module] = MLP):
        super().__init__()
        assert config.width % config.heads == 0, f"heads must divide width: {config}"
        assert config.heads % config.kv_heads == 0, f"kv_heads must divide heads: {config}"
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, feed_forward) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        for name, table in zip(("cos", "sin"), rope_tables(config)):
            self.register_buffer(name, table, persistent=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Matrices N(0, 1/fan-in), a layer's outputs 0: it starts as the identity. Loss at step 0 ≈ ln V."""
        for name, p in self.named_parameters():
            if name.endswith("qk_norm.weight"):
                p.fill_(1.5)  # scores start 1.5² times as wide: heads of 32 can point at one token
            elif name.endswith(("out.weight", "down.weight")):
                p.zero_()
            elif name == "embedding.weight":
                p.normal_(std=0.02 if self.config.tied else 1.0)
            elif name == "head.weight":
                p.normal_(std=0.02)
            elif p.dim() == 2:
                p.normal_(std=p.shape[1] ** -0.5)
        for block in self.blocks if self.config.key_shift else ():
            H, G, D = self.config.heads, self.config.kv_heads, self.config.head_width
            heads = block.attention.qkv.weight.view(-1, D, self.config.width)  # (H + 2G, D, C)
            q, k, _ = heads.split([H, G, G])
            k[::2] = q[::H // G][::2]  # a shifted head looks for the token that it stands on

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of what flows through it, and so of its cache."""
        return self.norm.weight.dtype

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids (B, T) → logits (B, T, V) of the next token. With a cache, `ids` go on where it ends."""
        return self.head(self.hidden(ids, cache))  # (B, T, V)

    def hidden(self, ids: Tensor, cache: KVCache | None = None, segments: Tensor | None = None,
               wanted: Tensor | None = None) -> Tensor:
        """ids (B, T) → what the head reads (B, T, C). With a cache, `ids` go on where it ends; it grows by T.

        Without one, `segments` (B, T) may number several texts in a row: each is read as if it stood alone
        (RoPE sees only distances). Where only some places are `wanted`, a mask (B, T), it returns (n, C), and
        its last layer thinks at those alone. Raises ValueError when the tokens do not fit into the context.
        """
        T = ids.shape[1]
        places = positions(0, T, self.config.context) if cache is None else cache.take(T)
        x = self.embedding(ids)  # (B, T, C)
        cos, sin = self.cos[places], self.sin[places]  # (T, D/2); a cache may have rows of its own
        alike = cache is None and not self.config.experts and ids.device.type == "cpu"
        run = one_program if alike else Block.__call__
        for layer, block in enumerate(self.blocks):
            x = run(block, x, cos, sin, cache, layer, segments, wanted if block is self.blocks[-1] else None)
        return self.norm(x)  # (B, T, C), or (n, C)


def count_parameters(config: GPTConfig) -> int:
    """Return the number of parameters by formula (a test compares it with the module)."""
    C, D = config.width, config.head_width
    block = matrix_weights(config, config.experts)
    block += 2 * C + D * config.qk_norm + config.kv_heads * config.key_shift
    return config.vocab_size * C * (1 if config.tied else 2) + config.depth * block + C


def matrix_weights(config: GPTConfig, experts: int) -> int:
    """Return how many weights the matrices of one layer hold: q, k, v, out; gate, up, down.

    If the layer has experts: of so many `experts`, those shared, and the router.
    """
    C, n = config.width, experts + config.shared if config.experts else 1
    return config.head_width * C * 2 * (config.heads + config.kv_heads) + 3 * C * config.hidden * n + (
        C * config.experts)


def flops_per_token(config: GPTConfig, T: int) -> int:
    """Return the FLOPs of a training token: 6 a matrix weight that it meets, 12·L·C·T (PaLM, appendix B)."""
    C, L = config.width, config.depth
    return 6 * (L * matrix_weights(config, config.top_k) + config.vocab_size * C) + 12 * L * C * T
