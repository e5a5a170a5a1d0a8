"""Weights in 8 or 4 bits: decode reads every weight for each token, so fewer bytes are more tokens a second.

    int8   q = round(w / s), s = max |row| / 127                    one scale a row, that is an output channel
    int4   q = round(w / s) + z in 0 … 15, s = (high - low) / 15    a scale and a zero point for 32 weights
    w ≈ s · q or s · (q - z)                                        what flows between the layers stays float

One outlier widens the steps of all that share its scale: so int8 shares within a row, int4 within 32 weights.
Each layer has two paths. The readable one makes the float weights again and multiplies; for one row torch's
compiler fuses that. The fast one is torch's own kernel for a CPU, which reads the few bytes and no more. It
takes x in bfloat16 (with float32 it is ten times slower), and a few rows at a time: for many the readable one
is faster.

Left out: quantised activations, calibration on text (GPTQ, AWQ). Papers: Dettmers 2022 (LLM.int8()), Frantar
2022 (GPTQ: why 4 bits need groups). quantize.py measures what it costs, and writes small files.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 32  # weights that share a scale and a zero point in int4
FEW = 32    # rows of x up to which torch's kernels beat the readable path (measured on two cores)


# ------------------------------------------------------------------------------ numbers → few bits, and back

def quantize_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """Return q (out, in) int8 from -127 to 127 and scale (out, 1): w ≈ q · scale (Dettmers 2022, section 2).

    >>> quantize_int8(torch.tensor([[1.27, -0.01], [0., 0.]]))[0].tolist()
    [[127, -1], [0, 0]]
    """
    scale = w.abs().amax(dim=-1, keepdim=True) / 127  # (out, 1)
    scale = torch.where(scale == 0, 1, scale)  # a row of zeros
    return (w / scale).round().clamp(-127, 127).to(torch.int8), scale  # subtle: -128 has no opposite


def quantize_int4(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q (out, in) from 0 to 15, scale (out, in / GROUP) and zero alike: w ≈ (q - zero) · scale.

    Raises ValueError if `in` is no multiple of GROUP.
    """
    if w.shape[-1] % GROUP:
        raise ValueError(f"rows of {w.shape[-1]} weights are no multiple of the group of {GROUP}")
    groups = w.float().unflatten(-1, (-1, GROUP))  # (out, in / GROUP, GROUP)
    # subtle: if all lie on one side of 0, its number would lie outside of 0 … 15; so the range reaches to 0
    low, high = groups.amin(dim=-1).clamp(max=0), groups.amax(dim=-1).clamp(min=0)  # (out, in / GROUP)
    scale = ((high - low) / 15).half()  # rounded before it is used: q shall fit what is stored
    scale = torch.where(scale == 0, 1, scale)
    zero = (-low / scale).round().clamp(0, 15)
    q = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 15)
    return q.flatten(-2).to(torch.uint8), scale, zero.to(torch.uint8)


def pack_int4(q: Tensor) -> Tensor:
    """Put two numbers from 0 to 15 into a byte. q (out, in) → (out, in / 2).

    >>> pack_int4(torch.tensor([[1, 2, 15, 0]])).tolist(), unpack_int4(torch.tensor([[33, 15]])).tolist()
    ([[33, 15]], [[1, 2, 15, 0]])
    """
    return q[..., ::2] | q[..., 1::2] << 4


def unpack_int4(packed: Tensor) -> Tensor:
    """Undo `pack_int4`. (out, in / 2) → (out, in)."""
    # by shifts, as the compiler fuses them into what follows, and would write `torch.stack` to memory
    shifts = torch.arange(0, 8, 4, dtype=torch.uint8, device=packed.device)  # (2,): 0 and 4
    return ((packed[..., None] >> shifts) & 15).flatten(-2)  # (out, in)


def product(x: Tensor, w: Tensor) -> Tensor:
    """Return x wᵀ. x (..., in), w (out, in) → (..., out).

    Compiled, with one row of x, it is a sum of products: the compiler makes a float of each weight while it
    multiplies. Before a matrix product it writes all of the float weights to memory.
    """
    if torch.compiler.is_compiling() and x.shape[:-1].numel() == 1:
        return (x[..., None, :] * w).sum(dim=-1)
    return F.linear(x, w)


# ---------------------------------------------------------------------------------------------- the layers

class Int8Linear(nn.Module):
    """A linear layer without a bias, its weights in int8."""

    def __init__(self, weight: Tensor):
        super().__init__()
        q, scale = quantize_int8(weight.float())
        self.register_buffer("q", q)  # (out, in)
        self.register_buffer("scale", scale)  # (out, 1)
        self.packed = None  # the scale as the kernel wants it, made when first needed

    def dequantize(self, rows=slice(None)) -> Tensor:
        """Return the float weights (out, in), or some of their rows (..., in)."""
        return self.q[rows] * self.scale[rows]

    def readable(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., out). One scale a row: it can wait until the product is made."""
        return product(x, self.q.to(x.dtype)) * self.scale[:, 0].to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if has_kernel(8, x.device) and self.packed is None:
            self.packed = self.scale[:, 0].bfloat16()  # (out,)
        if self.packed is None or x.shape[:-1].numel() > FEW:
            return self.readable(x)
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()  # (n, in)
        y = torch._weight_int8pack_mm(rows, self.q, self.packed)  # (n, out)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


class Int4Linear(nn.Module):
    """A linear layer without a bias, its weights in int4: two in a byte, a scale and a zero for each 32."""

    def __init__(self, weight: Tensor):
        super().__init__()
        q, scale, zero = quantize_int4(weight)
        self.register_buffer("q", pack_int4(q))  # (out, in / 2)
        self.register_buffer("scale", scale)  # (out, in / GROUP)
        self.register_buffer("zero", zero)  # (out, in / GROUP)
        self.packed = None  # what the kernel wants, made when first needed

    def dequantize(self, rows=slice(None)) -> Tensor:
        """Return the float weights (out, in), or some of their rows (..., in)."""
        q = unpack_int4(self.q[rows]).unflatten(-1, (-1, GROUP))  # (..., in / GROUP, GROUP)
        scale = self.scale[rows].float()
        return ((q - self.zero[rows].float()[..., None]) * scale[..., None]).flatten(-2)

    def readable(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., out)."""
        return product(x, self.dequantize().to(x.dtype))

    def pack(self) -> tuple[Tensor, Tensor]:
        """Return the weights in the order of torch's kernel, and (in / GROUP, out, 2): w ≈ (q - 8) s + z."""
        scale = self.scale.float()
        zero = (8 - self.zero.float()) * scale
        q = unpack_int4(self.q).int()
        return torch._convert_weight_to_int4pack_for_cpu(q, 1), torch.stack([scale.T, zero.T], -1).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        if has_kernel(4, x.device) and self.packed is None and self.q.shape[0] % 16 == 0:
            self.packed = self.pack()  # by the prefill, or a compiled step would do it each time
        if self.packed is None or x.shape[:-1].numel() > FEW:
            return self.readable(x)
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()  # (n, in)
        y = torch._weight_int4pack_mm_for_cpu(rows, self.packed[0], GROUP, self.packed[1])  # (n, out)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


class PackedEmbedding(nn.Module):
    """An embedding whose table is kept in few bits: a look-up makes floats of the rows it needs."""

    def __init__(self, table: Int8Linear | Int4Linear):
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) → (B, T, C)."""
        return self.table.dequantize(ids)


LAYERS = {8: Int8Linear, 4: Int4Linear}
KERNELS = {8: ("_weight_int8pack_mm",),
           4: ("_weight_int4pack_mm_for_cpu", "_convert_weight_to_int4pack_for_cpu")}


def has_kernel(bits: int, device: torch.device) -> bool:
    """Return whether torch has a kernel for such weights here."""
    return device.type == "cpu" and all(hasattr(torch, name) for name in KERNELS[bits])


def quantize_model(model: nn.Module, bits: int) -> nn.Module:
    """Put every matrix of a GPT into 8 or 4 bits, in place, and return it. Norms and key shifts stay float.

    Raises ValueError if there is none left to put so, or if int4's groups do not divide a row.
    """
    layer, linear = LAYERS[bits], [(name, module) for name, module in model.named_modules()
                                   if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError("its weights are quantised already")
    for name, module in linear:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer(module.weight.detach()))
    model.embedding = PackedEmbedding(layer(model.embedding.weight.detach()))
    return model


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all weights, in however many bits they are."""
    packed = [buffer for layer in model.modules() if isinstance(layer, (Int8Linear, Int4Linear))
              for buffer in layer.buffers()]
    return sum(weights.nbytes for weights in [*model.parameters(), *packed])
