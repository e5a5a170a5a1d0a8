"""From texts to vectors: a model's hidden states, their mean, tuned until a question lies near its answer.

    encode(text) = mean over tokens of what the head would read, made of length 1; a product is then a cosine
    InfoNCE      = mean of -log( exp(20 cos(q_i, d_i)) / Σ_j exp(20 cos(q_i, d_j)) )

q_i is a question, d_i a chunk that tells its answer. All other chunks of the batch are what it must not find
(in-batch negatives), and for each question one more of the right document, that tells something else (a hard
negative). The pairs are of the training world; rag.py searches documents that no weight has seen.

    python embed.py          the newest assistant -> out/embedder.pt (1.5 minutes)

Left out: a model that reads in both directions, a memory of earlier batches' vectors. Papers: van den Oord
2018 (InfoNCE), Reimers 2019 (mean pooling), Karpukhin 2020 (in-batch and hard negatives).
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import chain
import library
from bpe import Tokenizer
from checkpoint import load_float, load_model, newest_checkpoint
from dialogue import pad
from model import GPT
from train import cosine_lr, make_optimizer

BATCH, STEPS, RATE = 64, 300, 4e-3  # pairs a step, steps, the highest learning rate


@dataclass
class Config:
    """The flags of `python embed.py`."""
    out: str = chain.option("out", "folder for everything that is made")
    checkpoint: str | None = chain.option(None, "model to start from (default: the newest room's in --out)")
    seed: int = chain.option(0, "seed of the pairs")
    device: str = chain.option("auto", "auto, cpu, cuda or mps")


def mean_pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of hidden (B, T, C) where mask (B, T) is 1, made of length 1: (B, C)."""
    total = (hidden * mask[..., None]).sum(dim=1)  # (B, C)
    return F.normalize(total / mask.sum(dim=1, keepdim=True), dim=-1)


def encode(model, tokenizer, texts: list[str]) -> Tensor:
    """Return the vectors (B, C) of texts, of length 1. What does not fit into the context is not read."""
    coded = [tokenizer.encode(text)[:model.config.context] or [0] for text in texts]
    order, found = sorted(range(len(coded)), key=lambda i: len(coded[i])), []
    for some in (order[j:j + 64] for j in range(0, len(order), 64)):  # of nearly one length: little to pad
        ids, mask = pad([(coded[i], [1] * len(coded[i])) for i in some], model.device)  # (b, T) both
        found.append(mean_pooled(model.hidden(ids).float(), mask.float()))  # (b, C)
    return torch.cat(found)[np.argsort(order)]  # (B, C), in the order of the texts


def info_nce(queries: Tensor, chunks: Tensor, scale: float = 20.0) -> Tensor:
    """Return the loss of queries (B, C) whose own chunks are the first B rows of chunks (B + more, C).

    All other rows are what it must not find, those of other queries too (van den Oord 2018, eq. 4).
    """
    cosines = F.normalize(queries, dim=-1) @ F.normalize(chunks, dim=-1).T  # (B, B + more)
    return F.cross_entropy(scale * cosines, torch.arange(len(queries), device=queries.device))


def tune(model: GPT, tokenizer: Tokenizer, seed: int) -> float:
    """Tune a model in place, so that questions lie near the chunks that tell the answer; return the loss."""
    optimizer, pairs = make_optimizer(model, 0.1), library.pairs(seed, BATCH * STEPS)
    losses, steps = [], len(pairs) // BATCH
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, steps, RATE, max(1, steps // 10))
        asked, right, wrong = zip(*pairs[step * BATCH:(step + 1) * BATCH])
        vectors = encode(model, tokenizer, [*asked, *right, *wrong])  # (3 B, C)
        loss = info_nce(vectors[:BATCH], vectors[BATCH:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % max(1, steps // 10) == 0:
            print(f"tuning {step + 1:>5}/{steps}  InfoNCE {np.mean(losses[-steps // 10:]):.3f}", flush=True)
    return float(np.mean(losses[-steps // 10:]))


def make_embedder(c) -> float:
    """Write out/embedder.pt, and drop the indices that hold another model's vectors; return the loss."""
    model, tokenizer, content = load_float(c.checkpoint or newest_checkpoint(c.out), c.device)
    loss = tune(model, tokenizer, c.seed)
    for path in (*Path(c.out).glob("library_*.npz"), *Path(c.out).glob("docs_*.npz")):
        path.unlink()
    chain.save_checkpoint(Path(c.out, "embedder.pt"), config=asdict(model.config), weights=model.state_dict(),
                          tokenizer=tokenizer.to_dict(), step=content["step"], loss=loss, arguments=asdict(c))
    return loss


def open_embedder(c):
    """Return the function texts -> vectors of out/embedder.pt, which is made if it is not there."""
    path = Path(c.out, "embedder.pt")
    if not path.exists():
        make_embedder(c)
    return vectors_by(*load_model(path, c.device)[:2])


def vectors_by(model: GPT, tokenizer: Tokenizer):
    """Return the function texts → vectors (n, C) that an Index wants."""
    @torch.no_grad()
    def vectors(texts: list[str]) -> np.ndarray:
        return encode(model, tokenizer, texts).cpu().numpy()
    return vectors


@chain.command
def main(argv=None) -> dict:
    """Tune vectors anew."""
    c, started = chain.parse(Config, argv, __doc__), time.time()
    c.device = chain.pick_device(c.device)
    metrics = {"info_nce": make_embedder(c)}
    chain.report("embed.py", c, metrics, time.time() - started)
    return metrics


if __name__ == "__main__":
    main()
