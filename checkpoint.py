"""From a checkpoint to a model that can be used: its shape, its weights, their bits, its tokenizer.

    python checkpoint.py                       what the newest checkpoint of the chain holds (1 second)
    python checkpoint.py --checkpoint X.pt     any other

A checkpoint of quantize.py tells its bits: its matrices are then read as int8 or int4. For measurements of
speed a model may also be made with random weights, as it is no slower for what it has not learned.
Left out: foreign formats. A Llama's weights fit by renaming, see model.py.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

import chain
from bpe import Tokenizer
from experts import make_model
from model import GPT, GPTConfig, count_parameters
from packed import quantize_model

ROOMS = ("base", "sft", "dpo")  # the checkpoints of the chain, in order; the last that exists is the newest


@dataclass
class Config:
    """The flags of `python checkpoint.py`."""
    out: str = chain.option("out", "folder for everything that is made")
    checkpoint: str | None = chain.option(None, "checkpoint to read (default: the newest room's in --out)")


def newest_checkpoint(out: str) -> Path:
    """Return the checkpoint in the folder `out` that has come furthest along the chain."""
    there = [Path(out, f"{room}.pt") for room in ROOMS if Path(out, f"{room}.pt").exists()]
    return there[-1] if there else Path(out, f"{ROOMS[0]}.pt")


def load_model(path, device: str = "cpu") -> tuple[GPT, Tokenizer, dict]:
    """Return (model in eval mode on `device`, its tokenizer, the checkpoint's content). Raises UserError."""
    content = chain.load_checkpoint(path)
    try:
        model = make_model(GPTConfig(**content["config"]))
        if content.get("bits"):
            quantize_model(model, content["bits"])
        model.load_state_dict(content["weights"])
        tokenizer = Tokenizer.from_dict(content["tokenizer"])
    except (TypeError, RuntimeError, ValueError, AssertionError, KeyError) as error:
        raise chain.UserError(f"{path}: its sizes and its weights do not belong together "
                              f"({str(error).splitlines()[-1].strip()[:120]}); make it again")
    return model.to(device).eval(), tokenizer, content


def load_float(path, device: str = "cpu") -> tuple[GPT, Tokenizer, dict]:
    """Return what `load_model` does, of float weights: to be trained, or quantised. UserError if not."""
    model, tokenizer, content = load_model(path, device)
    bits = content.get("bits")
    chain.require(not bits, f"{path}: weights of {bits} bits already, not float; give what it was made from")
    return model, tokenizer, content


def random_model(size: str, device: str = "cpu") -> GPT:
    """Return an untrained Llama of about that size, "110M" or "1B": d layers of 64 d, a vocabulary of 32,000.

    Raises UserError if `size` is none.
    """
    units = {"M": 1e6, "B": 1e9}
    number = size[:-1].replace(".", "", 1)
    chain.require(size[-1:] in units and number.isascii() and number.isdigit() and float(size[:-1]) > 0,
                  f"--random {size}: give a number of parameters, like 110M or 1B")
    wanted = float(size[:-1]) * units[size[-1]]
    shapes = [GPTConfig(vocab_size=32_000, context=1024, depth=d, width=64 * d, heads=d, kv_heads=d,
                        hidden=-(-64 * d * 8 // 96) * 32, tied=True, qk_norm=False, key_shift=False)
              for d in range(2, 60, 2)]
    torch.manual_seed(0)
    return GPT(min(shapes, key=lambda shape: abs(count_parameters(shape) - wanted))).to(device).eval()


@chain.command
def main(argv=None) -> dict:
    """Tell what a checkpoint holds."""
    config, started = chain.parse(Config, argv, __doc__), time.perf_counter()
    path = Path(config.checkpoint) if config.checkpoint else newest_checkpoint(config.out)
    model, tokenizer, content = load_model(path)
    for name, weights in model.state_dict().items():
        print(f"{name:<40} {str(tuple(weights.shape)):<16} {weights.dtype}")
    metrics = {"parameters": count_parameters(model.config), "vocabulary": tokenizer.n_vocab,
               "step": content["step"], "bits": content.get("bits", 32), "bytes": path.stat().st_size}
    chain.report("checkpoint.py", config, metrics, time.perf_counter() - started)
    return metrics


if __name__ == "__main__":
    main()
