"""The dial: `--depth` sets the shape of a model and how long it trains; the device sets how it computes.

    width  = depth * min(64, 8 * depth)               tokens = tokens_per_parameter * N       (Chinchilla: 20)
    heads  = width / 32, from depth 8 on / 64         batch  = 2048 tokens * sqrt(tokens / 6e6), 2048 at least
    hidden = 8/3 * width, in steps of 32              learning rate = 4.5e-3 * 128 / width

N counts the parameters without embedding and head. Every value is printed with its formula, and a flag of
train.py overrules it. The anchors were found on the small world: 2,048 tokens a batch, 4.5e-3 at width 128.
Left out: a search. Papers: Hoffmann 2022 (Chinchilla), Yang 2022 (muP), Zhang 2024 (critical batch size).
"""

import dataclasses
import functools
import re
from pathlib import Path

import torch

import chain
from model import GPTConfig, count_parameters, flops_per_token

# The most FLOPs a second of matrix products: 16 bit, dense, by the maker's data sheet (of the SXM form).
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12, "4090": 165e12, "T4": 65e12}


def derive(config, vocab_size: int):
    """Return train.py's `config` with every None filled in, and print each value with its formula."""
    c = dataclasses.replace(config)

    def fill(field: str, value, formula: str) -> None:
        given = getattr(c, field)
        chain.require(given is None or given > 0, f"--{field} {given}: it must be above 0")
        setattr(c, field, value if given is None else given)
        print(f"{field:>14} = {getattr(c, field):<10,} {formula if given is None else 'as given'}")

    for field in ("tokens_per_parameter", "weight_decay"):
        chain.require(0 <= getattr(c, field) < 1e6, f"--{field} {getattr(c, field)}: give a number from 0 on")
    fill("depth", 8 if c.device.startswith("cuda") else 4, "this device trains it in minutes")
    head = 32 if c.depth < 8 else 64
    width = c.depth * min(64, 8 * c.depth)
    fill("width", -(-width // head) * head, f"depth * min(64, 8 * depth), rounded up to heads of {head}")
    fill("heads", max(1, c.width // head), f"width / {head}")
    chain.require(c.width % (2 * c.heads) == 0,
                  f"--width {c.width} --heads {c.heads}: width / heads must be even")
    fill("hidden", -(-c.width * 8 // 96) * 32, "8/3 * width costs what a plain 4 * width does (Shazeer 2020)")
    fill("context", 256 if c.depth < 8 else 1024, "256 for small models, 1024 as in GPT-2")
    N = count_parameters(model_config(c, vocab_size)) - 2 * vocab_size * c.width
    tokens = int(c.tokens_per_parameter * N)
    print(f"{'N':>14} = {N:<10,} parameters without embedding and head")
    fill("batch_size", max(1, round(2048 * max(1.0, tokens / 6e6) ** 0.5 / c.context)),
         "2048 * sqrt(tokens / 6e6) / context (grows as in Zhang 2024)")
    fill("micro_batch", min(c.batch_size, 32), "all of the batch, at most 32")
    fill("steps", max(1, tokens // (c.batch_size * c.context)),
         f"{c.tokens_per_parameter:g} * N / (batch_size * context) (Hoffmann 2022 finds 20)")
    fill("learning_rate", 4.5e-3 * 128 / c.width, "4.5e-3 * 128 / width (Adam's rule in Yang 2022)")
    return c


def model_config(c, vocab_size: int) -> GPTConfig:
    """Return the shape of the model that train.py's Config `c` describes."""
    return GPTConfig(vocab_size=vocab_size, context=c.context, depth=c.depth, width=c.width, heads=c.heads,
                     kv_heads=c.heads, hidden=c.hidden, attention=c.attention)


def settle(c, shape: GPTConfig, tokens: int) -> None:
    """Turn "auto" into what pays on this device for so many tokens, in place.

    Compiling takes half a minute, which a short run on a CPU does not earn back. A long one does: the
    compiler also fuses the formula of attention, in blocks, into something faster than torch's kernel, as
    long as T² is small. Measured on two cores, tokens/s of a step of 8 × 256: where they multiply bfloat16,
    13,800 plain, 34,800 with all three, the formula still in one piece; on older ones, in float32, all of
    train.py ran at 7,700 plain and at 8,500 compiled.
    """
    on_cuda, on_cpu = c.device.startswith("cuda"), c.device == "cpu"
    long = tokens * flops_per_token(shape, shape.context) > 7e12  # two cores take about a minute
    if c.compile == "on":
        require_compiler(c.device)
    if c.compile == "auto":
        c.compile = "on" if (on_cuda or on_cpu and long) and can_compile(c.device) else "off"
    if c.precision == "auto":
        pays = torch.cuda.is_bf16_supported(including_emulation=False) if on_cuda else (
            on_cpu and c.compile == "on" and has_bfloat16())
        c.precision = "bfloat16" if pays else "float32"
    if c.attention == "auto":
        c.attention = "blocks" if on_cpu and c.compile == "on" and shape.context <= 512 else "sdpa"
    for field in ("compile", "precision", "attention"):
        print(f"{field:>14} = {getattr(c, field)}")


def compiled(loss, c, passes: int = 1):
    """Return the function `loss` as `c` wants it: compiled or plain.

    On one GPU, where a step makes one pass, its kernels are recorded as a CUDA graph: none waits for Python.
    """
    if c.compile != "on":
        return loss
    if c.device == "cpu":
        # subtle: torch 2.13 gives layers that share a program wrong gradients (its pull request 193960)
        return torch.compile(loss, options={"allow_buffer_reuse": False})
    # subtle: a graph writes each pass's gradients to the same place, so they cannot be summed up
    graph = c.device.startswith("cuda") and passes == 1 and not torch.distributed.is_initialized()
    return torch.compile(loss, mode="reduce-overhead" if graph else "default")


@functools.cache
def can_compile(device: str) -> bool:
    """Return whether torch.compile works here: on a CPU it needs a C++ compiler, on CUDA Triton."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
        return True
    except Exception:  # whatever the reason, the plain path does the same
        return False


def require_compiler(device: str) -> None:
    """Raise UserError where torch.compile does not work."""
    chain.require(can_compile(device), f"--compile: torch.compile does not work on {device} here (a CPU "
                  "needs a C++ compiler, CUDA needs Triton); leave out --compile")


def has_bfloat16() -> bool:
    """Return whether this CPU has instructions for it (Linux tells; elsewhere we take float32)."""
    info = Path("/proc/cpuinfo")
    return info.exists() and any(flag in info.read_text() for flag in ("avx512_bf16", "amx_bf16"))


def peak_flops(device: str) -> float:
    """Return the FLOPs a second of the GPU's data sheet; infinity where it is not known."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else ""
    return next((flops for chip, flops in PEAK_FLOPS.items() if chip in re.split("[ -]", name)), float("inf"))
