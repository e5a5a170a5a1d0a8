"""A mixture of experts: what more parameters buy at the same compute, what they cost, and how they fail.

Four models learn the same text in the same order, all from one seed:

    dense                  a small model of train.py's kind
    experts                each feed-forward layer becomes 8 of half its width, and a token goes through 2
                           (experts.py): the same FLOPs a token, four times the parameters of these layers
    dense, longer          dense with a quarter more tokens: about the seconds of experts
    experts, left alone    without the balance loss, a third as long: watch where the tokens go

    python moe.py                         the four, out/moe.pt (4 minutes; 2.03 ± 0.10, dense 2.16)
    python moe.py --resume                go on where it was stopped, bit for bit (on a GPU without --noise)
    python moe.py --upcycle out/base.pt   each starts as that model's layer (6 minutes; 1.138 -> 1.088)
    python sample.py --checkpoint out/moe.pt         it is a model like any other, also for sft.py and dpo.py

Left out: experts on different devices; a batch that is compiled (who goes where changes with each).
Papers: those of experts.py, and Clark 2022 (what experts buy as models grow), Komatsuzaki 2022 (upcycling).
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import chain
from checkpoint import load_float
from dial import model_config
from evaluate import mean_loss
from experts import (balance_bias, balance_loss, by_expert, by_token, capacity_of, expert_layers, load,
                     make_model, within_capacity, z_loss)
from model import GPT, GPTConfig, count_parameters, flops_per_token
from train import Config as TrainConfig
from train import fit, prepare, read_state, token_loss

RUNS = {"dense": 0.8, "experts": 0.8, "dense, longer": 1.0, "experts, left alone": 0.25}  # of all steps
UPCYCLED, UPCYCLED_STEPS, UPCYCLED_RATE = {"dense goes on": 1.0, "experts": 1.0}, 400, 1e-3


@dataclass
class Config(TrainConfig):
    """The flags of `python moe.py`: those of train.py, and what experts need."""
    name: str = chain.option("moe", "the checkpoint is <out>/<name>.pt")
    depth: int | None = chain.option(2, "layers of all models: small ones, for them experts pay soonest")
    width: int | None = chain.option(64, "size of a token's vector")
    tokens_per_parameter: float = chain.option(24.0, "length of the longest run, by the dense parameters")
    weight_decay: float = chain.option(0.1, "how fast matrices shrink; all figures here stand for 0.1")
    compile: str = chain.option("off", "experts can't be compiled whole", choices=("on", "off"))
    experts: int = chain.option(8, "feed-forward layers side by side")
    top_k: int = chain.option(2, "experts that a token goes through")
    shared: int = chain.option(0, "experts more that every token goes through")
    balance: str = chain.option("loss", "what keeps the load even", choices=("loss", "bias", "none"))
    balance_weight: float = chain.option(0.01, "weight of the balance loss, or step of the bias")
    z_weight: float = chain.option(1e-3, "weight of the router's z-loss")
    noise: float = chain.option(0.0, "noise added to the router's logits in training")
    capacity: float | None = chain.option(None, "fair shares that an expert takes in training; no limit")
    upcycle: str | None = chain.option(None, "dense checkpoint from which every expert starts")


# ---------------------------------------------------------------------------- the models and their loss

def shape_of(c: Config, dense: GPTConfig, has_experts: bool) -> GPTConfig:
    """Return the dense shape, or one with experts in its place that costs the same FLOPs a token.

    An upcycled expert is as wide as the layer that it starts from, so a token costs top_k times as much.
    """
    if not has_experts:
        return dense
    hidden = dense.hidden if c.upcycle else dense.hidden // (c.top_k + c.shared)
    return dataclasses.replace(dense, experts=c.experts, top_k=c.top_k, shared=c.shared, hidden=hidden)


@torch.no_grad()
def upcycle(model: GPT, dense: GPT) -> None:
    """Give `model` the dense model's weights, every expert those of its layer's MLP (Komatsuzaki 2022).

    As the weights of the chosen experts add up to 1 and the experts are equal, it computes what `dense` does.
    """
    weights = dense.state_dict()
    for name, weight in model.state_dict().items():
        layer, _, part = name.partition(".mlp.")  # part: experts.3.down.weight, router.weight, bias
        if part.startswith("experts."):
            weight.copy_(weights[f"{layer}.mlp.{part.split('.', 2)[2]}"])
        elif not part:
            weight.copy_(weights[name])


def loss_with(c: Config, is_balanced: bool):
    """Return a summed loss for `fit`: the tokens' own, and for each token the losses of the routers."""
    def summed_loss(model, x: Tensor, y: Tensor, bfloat16: bool) -> Tensor:
        total, layers = token_loss(model, x, y, bfloat16), expert_layers(model)
        for layer in layers:
            logits, p, chosen, _ = layer.last
            extra = c.z_weight * z_loss(logits)
            if is_balanced and c.balance == "loss":
                extra = extra + c.balance_weight * balance_loss(p, chosen)
            if is_balanced and c.balance == "bias":
                layer.bias.copy_(balance_bias(layer.bias, chosen, c.balance_weight))
            total = total + extra * y.numel() / len(layers)
        return total
    return summed_loss


# -------------------------------------------------------------------------------------- what the routers do

@torch.no_grad()
def routing(model: GPT, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return (p (n, E), chosen (n, k)) of each layer of experts for ids (B, T)."""
    model(ids)
    return [(layer.last[1], layer.last[2]) for layer in expert_layers(model)]


def print_load(found: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Print each expert's load as a bar, layer by layer; return the heaviest, and the routers' entropy.

    The entropy is the mean of each token's, as a share of that of an even choice.
    """
    busiest, entropies = [], []
    for number, (p, chosen) in enumerate(found):
        shares = load(chosen, p.shape[-1])  # (E,)
        busiest.append(shares.max().item())
        entropies.append((torch.special.entr(p).sum(dim=-1).mean() / np.log(p.shape[-1])).item())
        print(f"  layer {number}: busiest {busiest[-1]:.2f} x its fair share, entropy {entropies[-1]:.2f}")
        for expert, share in enumerate(shares.tolist()):
            print(f"    expert {expert} {share:5.2f} {'#' * round(20 * share)}")
    return {"busiest": max(busiest), "entropy": float(np.mean(entropies))}


def print_dropped(found: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Print and return the share of choices that each capacity would drop, over all layers."""
    shares = {}
    for factor in (1.0, 1.25, 2.0):
        kept = [within_capacity(chosen, p.shape[-1], capacity_of(*chosen.shape, p.shape[-1], factor))
                for p, chosen in found]
        shares[f"dropped_at_{factor}"] = 1 - torch.stack(kept).float().mean().item()
        print(f"  capacity {factor}: {shares[f'dropped_at_{factor}']:.1%} of the choices dropped")
    return shares


def print_favourites(ids: Tensor, chosen: Tensor, E: int, tokenizer) -> None:
    """Print for each expert the tokens most of whose first choices are that expert, of those often seen."""
    counts = torch.zeros(E, tokenizer.n_vocab)  # (E, V)
    counts.index_put_((chosen[:, 0], ids.flatten()), torch.ones(ids.numel()), accumulate=True)
    seen = counts.sum(dim=0)  # (V,)
    shares = (counts / seen).where(seen >= 20, 0.0)  # (E, V)
    for expert, row in enumerate(shares):
        best = [i for i in row.topk(8).indices.tolist() if row[i] > 0]
        print(f"    expert {expert}  " + "  ".join(f"{tokenizer.decode([i])!r} {row[i]:.0%}" for i in best))


@torch.no_grad()
def speed_up(model: GPT, n: int = 2048) -> float:
    """Return how many times as fast `by_expert` is as `by_token`, on n tokens in the first layer."""
    layer, x = expert_layers(model)[0], torch.randn(n, model.config.width, device=model.device)  # (n, C)
    layer(x[None])
    p, chosen = layer.last[1:3]
    seconds = []
    for path in (by_expert, by_token):
        started = time.perf_counter()
        path(x, p.gather(-1, chosen), chosen, layer.experts).sum().item()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return seconds[1] / seconds[0]


# ------------------------------------------------------------------------------------------------ the runs

def check(c: Config) -> None:
    """Raise UserError for numbers that make no mixture."""
    chain.require(c.experts > 1, f"--experts {c.experts}: give at least 2; one alone is train.py's model")
    chain.require(1 <= c.top_k <= c.experts, f"--top_k {c.top_k}: give 1 up to --experts {c.experts}")
    chain.require(c.capacity is None or c.capacity > 0, f"--capacity {c.capacity}: give more than 0, or none")
    chain.require(c.top_k > 1 or not c.upcycle, "--upcycle needs --top_k 2 or more: the weight of a single "
                  "choice is not 1, so the model would not start as the dense one")
    for field in ("shared", "balance_weight", "z_weight", "noise"):
        chain.require(getattr(c, field) >= 0, f"--{field} {getattr(c, field)}: give 0 or more")


def start(c: Config, run: str, dense: GPTConfig, parent: GPT | None) -> GPT:
    """Return the untrained model of a run, or with `parent` one that goes on from it."""
    torch.manual_seed(c.seed)
    model = make_model(shape_of(c, dense, run.startswith("experts"))).to(c.device)
    if parent and run == "experts":
        upcycle(model, parent)
    elif parent:
        model.load_state_dict(parent.state_dict())
    for layer in expert_layers(model):
        layer.capacity, layer.noise = c.capacity or 0.0, c.noise
    return model


def look_at(model: GPT, tokenizer, held_out, run: str, c: Config) -> dict[str, float]:
    """Print what a trained model's routers do with held-out text, and return it as numbers."""
    n = min(32, len(held_out.ids) // c.context)
    ids = torch.from_numpy(held_out.ids[:n * c.context].astype(np.int64)).view(n, c.context).to(c.device)
    found = routing(model, ids)
    metrics = print_load(found)
    if run == "experts":
        metrics |= print_dropped(found)
        p, chosen = found[len(found) // 2]
        print(f"  layer {len(found) // 2}: the tokens that go there first, and how many of them do")
        print_favourites(ids.cpu(), chosen.cpu(), p.shape[-1], tokenizer)
        metrics["fast_path"] = speed_up(model)
    return metrics


def print_runs(done: dict[str, dict]) -> None:
    """Print all runs in one table."""
    print(f"\n{'':<20} {'parameters':>10} {'FLOPs a token':>13} {'tokens':>10} {'seconds':>8} {'loss':>7}")
    for run, m in done.items():
        print(f"{run:<20} {m['parameters']:>10,} {m['flops']:>13,} {m['tokens']:>10,} {m['seconds']:>8.0f} "
              f"{m['loss']:>7.4f}")


def summary(done: dict[str, dict]) -> dict[str, float]:
    """Return the numbers of all runs that the report card shows."""
    dense, experts = list(done.values())[:2]
    step_time = experts["seconds"] / experts["tokens"] / (dense["seconds"] / dense["tokens"])
    metrics = {"dense_loss": dense["loss"], "experts_loss": experts["loss"],
               "better_at_equal_tokens": 1 - experts["loss"] / dense["loss"], "step_time": step_time}
    if longer := done.get("dense, longer"):
        metrics |= {"longer_loss": longer["loss"], "longer_time": longer["seconds"] / experts["seconds"],
                    "busiest_left_alone": done["experts, left alone"]["busiest"]}
    return metrics | {key: value for key, value in experts.items()
                      if key in ("start", "busiest", "entropy", "fast_path") or key.startswith("dropped")}


def run_one(run: str, model: GPT, c: Config, prepared: tuple, done: dict, state: dict | None) -> dict:
    """Train a model up to step c.steps, from `state` on if there is one; return its numbers.

    `prepared` is what train.py's `prepare` returns, `done` the numbers of the runs before this one.
    """
    _, tokenizer, train, held_out, text = prepared
    path, stopped = Path(c.out, f"{c.name}.pt"), Path(c.out, f"{c.name}.resume.pt")

    def checkpoint(path: Path, step: int, loss: float, **more) -> None:
        chain.save_checkpoint(path, config=dataclasses.asdict(model.config) | {"attention": "sdpa"},
                              weights=model.state_dict(), tokenizer=tokenizer.to_dict(), step=step, loss=loss,
                              arguments=dataclasses.asdict(prepared[0]), **more)

    def save(step: int, optimizer, history: list) -> None:
        checkpoint(stopped, step, history[-1][1], optimizer=optimizer.state_dict(), history=history,
                   text=text, done=done, draws=torch.get_rng_state())

    print(f"\n{run}: {count_parameters(model.config):,} parameters, {c.steps:,} steps", flush=True)
    numbers = {"parameters": count_parameters(model.config), "tokens": c.steps * c.batch_size * c.context,
               "flops": flops_per_token(model.config, c.context),
               "start": mean_loss(model.eval(), held_out.ids, c.context, 100_000)}
    if state:
        model.load_state_dict(state["weights"])
        torch.set_rng_state(state["draws"])
    elif not done:
        stopped.unlink(missing_ok=True)  # of an older run: --resume must not go on with that
    history, speed = fit(model.train(), train.ids, c, None, save, state,
                         tokenizer.special.get("<|endoftext|>"), loss_with(c, "alone" not in run))
    numbers |= {"seconds": numbers["tokens"] / max(speed, 1e-9),
                "loss": mean_loss(model.eval(), held_out.ids, c.context, 300_000)}
    if run.startswith("experts"):
        numbers |= look_at(model, tokenizer, held_out, run, c)
    if run == "experts":
        checkpoint(path, c.steps, history[-1][1])
    checkpoint(stopped, c.steps, 0.0, optimizer={}, history=[], text=text, done=done | {run: numbers})
    return numbers


@chain.command
def main(argv=None) -> dict:
    """Train the models one after the other, and compare them."""
    given, started, state = chain.parse(Config, argv, __doc__), time.time(), None
    check(given)
    if given.resume:
        state, given = read_state(given)
    given.device = chain.pick_device(given.device)
    if parent := load_float(given.upcycle, given.device)[0] if given.upcycle else None:
        given = dataclasses.replace(given, depth=parent.config.depth, width=parent.config.width,
                                    steps=given.steps or UPCYCLED_STEPS,
                                    learning_rate=given.learning_rate or UPCYCLED_RATE)
    c, tokenizer, *_ = prepared = prepare(given, state, 0)
    dense = parent.config if parent else model_config(c, tokenizer.n_vocab)
    found, wanted = (dense.vocab_size, dense.context, dense.experts), (tokenizer.n_vocab, c.context, 0)
    chain.require(found == wanted, f"--upcycle {c.upcycle}: its vocabulary, context and experts are {found}; "
                  f"{c.out}/tokenizer.json, --context and a dense model want {wanted}")
    done = state["done"] if state else {}
    for run, share in (UPCYCLED if parent else RUNS).items():
        if run not in done:
            now = dataclasses.replace(c, steps=max(1, round(share * c.steps)))
            going_on = state if state and state["history"] else None
            done[run] = run_one(run, start(c, run, dense, parent), now, prepared, done, going_on)
            state = None
    Path(c.out, f"{c.name}.resume.pt").unlink()
    print_runs(done)
    metrics = summary(done)
    chain.report("moe.py", c, metrics, time.time() - started)
    return metrics


if __name__ == "__main__":
    main()
