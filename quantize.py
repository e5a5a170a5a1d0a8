"""Quantisation measured: what 8 and 4 bits a weight cost in loss and marks, and what they save; small files.

    python quantize.py                     the newest checkpoint -> <name>.int8.pt, <name>.int4.pt (3 minutes)
    python quantize.py --checkpoint X.pt   any other
    python sample.py --checkpoint out/dpo.int4.pt

packed.py rounds the weights. Two more ideas, as functions, with an experiment each:

    LLM.int8()  x is rounded too, and a few columns of x are huge: these stay float, apart from the rest
    NF4         16 levels that stand where a normal law has its mass, not side by side

So small a model has no huge columns by itself: the experiment puts one in. Left out: what is quantised while
training. Papers: Dettmers 2022 (LLM.int8(), section 3), Dettmers 2023 (QLoRA: NF4, section 3).
"""

import copy
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import chain
import data
from bench import arrivals
from bpe import Tokenizer
from checkpoint import load_float, load_model, newest_checkpoint
from decode import generate
from evaluate import mean_loss
from exam import hold_exam
from model import GPT
from packed import GROUP, Int4Linear, has_kernel, quantize_int8, quantize_model


@dataclass
class Config:
    """The flags of `python quantize.py`."""
    out: str = chain.option("out", "folder for everything that is made")
    checkpoint: str | None = chain.option(None, "checkpoint to read (default: the newest room's in --out)")
    data: str = chain.option("world", "text for the loss: world, a file, a folder, an address, or stdlib")
    questions: int = chain.option(200, "questions a task for an assistant's marks; 0 for none")
    seed: int = chain.option(0, "seed of the world and of the questions")
    device: str = chain.option("auto", "auto, cpu, cuda or mps")


# ------------------------------------------------------------------------- LLM.int8(): outliers stay apart

def int8_product(x: Tensor, w: Tensor) -> Tensor:
    """Return x wᵀ with both rounded to int8. x (n, in), a scale a row; w (out, in) → (n, out)."""
    (xq, xs), (wq, ws) = quantize_int8(x), quantize_int8(w)
    return (xq.to(w.dtype) @ wq.to(w.dtype).T) * xs * ws.T  # in int32 on a chip; floats hold these sums too


def llm_int8(x: Tensor, w: Tensor, threshold: float = 6.0) -> Tensor:
    """Return x wᵀ: columns of x that reach `threshold` in float, others in int8 (Dettmers 2022, eq. 8)."""
    huge = (x.abs() >= threshold).any(dim=0)  # (in,)
    return x[:, huge] @ w[:, huge].T + int8_product(x[:, ~huge], w[:, ~huge])


# --------------------------------------------------------------------------- NF4: levels of a normal law

def nf4_levels() -> Tensor:
    """Return the 16 levels from -1 to 1: quantiles of N(0, 1), 7 below 0, 0 itself, 8 above (Dettmers 2023).

    The two halves are made apart, so that 0 is a level. The outermost quantile is the mean of 1 - 1/32 and
    1 - 1/30, the middles of the last of 16 and of 15 parts.
    """
    last, double = 1 - (1 / 32 + 1 / 30) / 2, torch.float64
    above, below = (torch.special.ndtri(torch.linspace(last, 0.5, n, dtype=double))[:-1] for n in (9, 8))
    levels = torch.cat([-below, torch.zeros(1, dtype=double), above]).sort().values
    return (levels / levels.abs().max()).float()  # (16,)


def quantize_nf4(w: Tensor, block: int = 64) -> tuple[Tensor, Tensor]:
    """Return the number of each weight's nearest level, and a scale for each `block` weights: max |w|."""
    blocks = w.reshape(-1, block)  # (n, block)
    scale = blocks.abs().amax(dim=-1, keepdim=True)  # (n, 1)
    scale = torch.where(scale == 0, 1, scale)
    return ((blocks / scale)[..., None] - nf4_levels()).abs().argmin(dim=-1), scale


def dequantize_nf4(q: Tensor, scale: Tensor, shape: torch.Size) -> Tensor:
    """Return the float weights of `quantize_nf4`."""
    return (nf4_levels()[q] * scale).view(shape)


def relative_error(found: Tensor, right: Tensor) -> float:
    """Return ‖found - right‖ / ‖right‖."""
    return float((found - right).norm() / right.norm())


def experiments(w: Tensor) -> dict[str, float]:
    """Return the errors of LLM.int8() with a huge column, and of NF4 and int4 on normal weights like `w`."""
    torch.manual_seed(0)
    x = torch.randn(256, w.shape[1])
    x[:, 3] *= 30
    normal = torch.randn(w.shape) * w.std()
    found = {"int8_error_with_outlier": relative_error(int8_product(x, w), x @ w.T),
             "llm_int8_error_with_outlier": relative_error(llm_int8(x, w), x @ w.T),
             "int4_error": relative_error(Int4Linear(normal).dequantize(), normal),
             "nf4_error": relative_error(dequantize_nf4(*quantize_nf4(normal, GROUP), normal.shape), normal)}
    for name, value in found.items():
        print(f"{name:<28} {value:.2%}")
    return found


# ---------------------------------------------------------------------------------------------- the table

def measure(model: GPT, tokenizer: Tokenizer, ids, is_chat: bool, c: Config) -> dict:
    """Return the loss, the marks of an assistant (their mean, and one by one), and the tokens a second."""
    marks = hold_exam(model, tokenizer, c.questions, c.seed) if is_chat and c.questions else {}
    shares = {mark: right / n for mark, (right, n) in marks.items()}
    prompt = torch.tensor([ids[:min(16, model.config.context // 2)].tolist()], device=model.device)  # (1, T)
    times = arrivals(generate(model, prompt, 128, temperature=0), model.device)
    return {"loss": mean_loss(model, ids, model.config.context, 50_000), "marks": shares,
            "tokens_per_second": (len(times) - 1) / (times[-1] - times[0])}


def save(path: Path, model: GPT, content: dict, bits: int) -> int:
    """Write a checkpoint of a quantised model; return its bytes."""
    kept = {key: content[key] for key in ("config", "tokenizer", "step", "arguments", "loss")}
    more = {"chat": True} if content.get("chat") else {}
    chain.save_checkpoint(path, weights=model.state_dict(), bits=bits, **kept, **more)
    return path.stat().st_size


@chain.command
def main(argv=None) -> dict:
    """Quantise a checkpoint, and measure it before and after."""
    c, started = chain.parse(Config, argv, __doc__), time.time()
    chain.require(c.questions >= 0, f"--questions {c.questions}: give 0 or more")
    c.device = chain.pick_device(c.device)
    path = Path(c.checkpoint) if c.checkpoint else newest_checkpoint(c.out)
    model, tokenizer, content = load_float(path, c.device)
    source = data.open_source(c.data, Path(c.out), c.seed)
    _, held_out = data.token_files(source, tokenizer, Path(c.out), tokens=1_000_000)
    metrics, first = experiments(model.head.weight.detach().float().cpu()), None
    print(f"\n{'weights':<9} {'bytes':>12} {'loss':>8} {'marks':>7} {'worst':>7} {'tokens/s':>9}")
    for name in ("float32", "bfloat16", "int8", "int4"):
        form, size = copy.deepcopy(model), path.stat().st_size
        if name == "bfloat16":
            form, size = form.to(torch.bfloat16), size // 2
        elif name != "float32":
            bits = int(name[-1])
            if not has_kernel(bits, form.device):
                print(f"(torch has no kernel for {name} on {form.device}: the readable path serves)")
            try:
                quantize_model(form, bits)
            except ValueError as error:
                print(f"{name:<9} none: {error}")
                continue
            small = path.with_suffix(f".{name}.pt")
            size = save(small, form, content, bits)
            form, _, _ = load_model(small, c.device)
        found = measure(form, tokenizer, held_out.ids, bool(content.get("chat")), c)
        first = first or found
        marks, added = list(found["marks"].values()), found["loss"] - first["loss"]
        worst = max((first["marks"][mark] - share for mark, share in found["marks"].items()), default=0.0)
        mean = f"{sum(marks) / len(marks):7.1%}" if marks else f"{'':>7}"
        print(f"{name:<9} {size:>12,} {found['loss']:>8.4f} {mean} {0 - worst:>7.1%} "
              f"{found['tokens_per_second']:>9,.0f}")
        if found is not first:
            metrics |= {f"{name}_loss_added": added, f"{name}_worst_task_fall": worst,
                        f"{name}_bytes": size / path.stat().st_size}
    chain.report("quantize.py", c, metrics, time.time() - started)
    return metrics


if __name__ == "__main__":
    main()
