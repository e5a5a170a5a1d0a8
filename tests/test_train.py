"""train.py and dial.py: the optimizer, the order of the text, resuming, and what users get wrong."""

import dataclasses
import errno
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import chain
import dial
import moe
import sft
import train
from model import GPT, GPTConfig

SMALL = GPTConfig(vocab_size=40, context=16, depth=1, width=32, heads=2, kv_heads=2, hidden=32)
HERE = Path(train.__file__).parent


def config(**changes) -> train.Config:
    """A Config with every value set, for `fit`."""
    values = dict(context=16, steps=30, batch_size=8, micro_batch=8, learning_rate=1e-2, device="cpu",
                  compile="off", precision="float32")
    return train.Config(**values | changes)


def test_cosine_rises_falls_and_stays_down():
    rates = [train.cosine_lr(s, 100, 1.0, 10) for s in range(130)]
    assert rates[0] == 0.1 and rates[9] == 1.0, "the warm-up must be linear and end at the peak"
    assert all(a >= b for a, b in zip(rates[9:], rates[10:])), "after the warm-up the rate must never rise"
    assert rates[55] == pytest.approx(0.5, abs=1e-9), "half-way down the cosine must be at half the peak"
    assert max(rates[100:]) == 0, "past its last step the cosine must be clamped: it rises again by itself"


@pytest.mark.parametrize("eps", [1e-8, 1e-1])
def test_adamw_is_torchs(eps):
    torch.manual_seed(0)
    p = torch.randn(5, 3, dtype=torch.float64)
    theirs = torch.nn.Parameter(p.clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.99), eps=eps, weight_decay=0.3,
                                  fused=True)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t in range(1, 11):
        theirs.grad = torch.randn_like(p)
        train.adamw_update(p, theirs.grad, m, v, t, 0.1, (0.9, 0.99), eps, 0.3)
        optimizer.step()
    assert (p - theirs).abs().max() < 1e-12, "decay is decoupled, both moments unbiased, eps outside the root"


def test_only_matrices_decay_and_all_parameters_are_optimised():
    model = GPT(SMALL)
    matrices, others = train.make_optimizer(model, 0.1).param_groups
    assert matrices["weight_decay"] == 0.1 and all(p.dim() == 2 for p in matrices["params"])
    assert others["weight_decay"] == 0 and all(p.dim() < 2 for p in others["params"]), "a norm decays"
    n = len(matrices["params"]) + len(others["params"])
    assert n == len(list(model.parameters())), "a parameter is left out of the optimizer"


def test_an_epoch_shows_every_window_once():
    ids, seen = np.arange(1000), []
    for step in range(7):
        x, y = train.batch(ids, step, 8, 16, seed=3)
        assert torch.equal(x + 1, y), "targets are the inputs moved on by one"
        seen += x[:, 0].tolist()
    assert len(set(seen)) == 56, "a window came twice within an epoch"
    assert len({start % 16 for start in seen}) == 1, "the windows of an epoch stand side by side"
    again, _ = train.batch(ids, 6, 8, 16, seed=3)
    assert again[:, 0].tolist() == seen[48:], "a batch depends on its step alone, or resuming is not exact"
    assert train.batch(ids, 0, 8, 16, seed=4)[0].tolist() != train.batch(ids, 0, 8, 16, seed=3)[0].tolist()


def test_windows_start_where_documents_do():
    """Windows that start anywhere cut half of the questions off from the text that they ask about."""
    ids = np.tile([7, 1, 2, 3, 4, 5], 100)
    x, y = train.batch(ids, 0, 8, 16, seed=0, first=7)
    assert (x[:, 0] == 7).all(), "a window starts inside of a document that is shorter than the window"
    assert torch.equal(x[:, 1:], y[:, :-1]), "targets are the inputs moved on by one"
    ids = np.concatenate([[7], np.arange(100, 1000)])  # a document longer than the window
    starts = {train.batch(ids, step, 8, 16, seed=0, first=7)[0][0, 0].item() for step in range(7)}
    assert len(starts) > 5, "of a long document all parts must be seen, not its beginning alone"


def test_a_batch_of_the_shortest_text():
    x, y = train.batch(np.arange(18), 0, 3, 16, seed=0)
    assert x.shape == y.shape == (3, 16)


def test_one_batch_can_be_learnt_by_heart():
    torch.manual_seed(0)
    ids = np.random.default_rng(0).integers(0, 40, 33).astype(np.uint16)
    history, _ = train.fit(GPT(SMALL), ids, config(steps=150, batch_size=2))
    first, last = history[0][1], history[-1][1]
    assert abs(first - math.log(40)) < 0.2, f"loss at step 0 is {first:.2f}, ln V is {math.log(40):.2f}"
    assert last < 0.1, f"after 150 steps on the same batch the loss is still {last:.2f}"


@pytest.mark.parametrize("micro_batch", [1, 3, 5])
def test_accumulation_changes_nothing(micro_batch):
    ids, models = np.random.default_rng(0).integers(0, 40, 400), []
    for micro in (8, micro_batch):
        torch.manual_seed(0)
        models.append(GPT(SMALL).double())
        train.fit(models[-1], ids, config(steps=3, micro_batch=micro))
    difference = max((a - b).abs().max().item() for a, b in zip(*(m.parameters() for m in models)))
    assert difference < 1e-6, f"micro-batches of {micro_batch}: weights differ by {difference:.1e}"


def stop_at(monkeypatch, step: int, error: BaseException) -> None:
    """Make training stop with `error` after this step."""
    tick = chain.Clock.tick

    def stopping(self, number, text):
        if number == step:
            raise error
        tick(self, number, text)
    monkeypatch.setattr(chain.Clock, "tick", stopping)


def test_resume_is_exact(train_small, tmp_path, monkeypatch):
    losses = train_small(out="whole")["training_loss"]
    with monkeypatch.context() as patch:
        stop_at(patch, 13, KeyboardInterrupt())
        with pytest.raises(SystemExit) as stop:
            train_small(out="parts")
    assert stop.value.code == 130, "a stopped run exits with 130"
    assert not (tmp_path / "parts/base.pt").exists(), "a stopped run made a checkpoint"
    assert train_small("--resume", out="parts")["training_loss"] == losses, "the losses differ after --resume"
    whole, parts = (chain.load_checkpoint(tmp_path / out / "base.pt") for out in ("whole", "parts"))
    for name, weight in whole["weights"].items():
        assert torch.equal(weight, parts["weights"][name]), f"{name} differs after a stop and --resume"
    assert not (tmp_path / "parts/base.resume.pt").exists(), "a finished run has nothing to resume"


def test_resume_takes_no_other_text_and_no_older_run(train_small, text_file, monkeypatch, fails, tmp_path):
    with monkeypatch.context() as patch:
        stop_at(patch, 13, KeyboardInterrupt())
        with pytest.raises(SystemExit):
            train_small()
    text = text_file.read_text()
    text_file.write_text(text.replace("boat", "goat"))
    assert "another text" in fails(lambda argv: train_small("--resume"), [])
    with monkeypatch.context() as patch:
        stop_at(patch, 0, KeyboardInterrupt())
        with pytest.raises(SystemExit):
            train_small("--seed", "5")
    assert "no run was saved" in fails(lambda argv: train_small("--resume"), []), "an older run was found"


def test_resume_takes_no_run_of_another_script(train_small, text_file, monkeypatch, fails, tmp_path):
    with monkeypatch.context() as patch:
        stop_at(patch, 13, KeyboardInterrupt())
        with pytest.raises(SystemExit):
            train_small()
    for script, flags in ((moe, ["--data", text_file]), (sft, ["--data", "my.jsonl"])):
        line = fails(script.main, ["--out", tmp_path / "out", "--name", "base", "--resume", *flags])
        assert "no stopped run of this script" in line, line


def test_a_run_goes_on_in_the_folder_where_it_is_found(train_small, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        stop_at(patch, 13, KeyboardInterrupt())
        with pytest.raises(SystemExit):
            train_small()
    (tmp_path / "out").rename(tmp_path / "moved")
    train_small("--resume", out="moved")
    assert (tmp_path / "moved/base.pt").exists() and not (tmp_path / "out").exists(), "it wrote elsewhere"


def test_the_gradient_is_clipped_as_a_whole(monkeypatch):
    torch.manual_seed(0)
    norms = []
    step = torch.optim.AdamW.step

    def watch(self, *_):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.stack([g.norm() for g in grads]).norm().item())
        return step(self)
    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    model = GPT(SMALL)
    model.head.weight.data *= 100  # a loss that is far too large
    train.fit(model, np.random.default_rng(0).integers(0, 40, 400), config(steps=1))
    assert norms[0] == pytest.approx(1, abs=1e-3), f"all gradients together are {norms[0]:.3f} long, not 1"


def test_resume_takes_no_other_sizes(train_small, tmp_path, monkeypatch, fails):
    with monkeypatch.context() as patch:
        stop_at(patch, 13, KeyboardInterrupt())
        with pytest.raises(SystemExit):
            train_small()
    line = fails(train.main, ["--resume", "--depth", "3", "--out", tmp_path / "out"])
    assert "--depth 3" in line and "has 2" in line, line


def test_a_loss_that_is_no_number_stops_before_the_weights(train_small, tmp_path, monkeypatch, fails,
                                                           text_file):
    train_small()
    good = (tmp_path / "out/base.pt").read_bytes()
    defaults = *train.fit.__defaults__[:-1], lambda model, x, y, bf16: model(x).sum() * math.nan
    monkeypatch.setattr(train.fit, "__defaults__", defaults)
    line = fails(lambda argv: train_small(*argv), [])
    assert "step 0" in line and "--learning_rate" in line, line
    assert (tmp_path / "out/base.pt").read_bytes() == good, "the last good checkpoint was touched"


def test_a_full_disk_costs_nothing(train_small, tmp_path, monkeypatch, fails):
    train_small()
    good = (tmp_path / "out/base.pt").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", full)
    line = fails(lambda argv: train_small(*argv), [])
    assert "No space left" in line and "make room" in line, line
    assert (tmp_path / "out/base.pt").read_bytes() == good, "the old checkpoint was harmed"
    assert not list((tmp_path / "out").glob("*.tmp")), "half a file was left behind"


def test_the_checkpoint_is_self_sufficient(train_small, tmp_path):
    train_small()
    content = torch.load(tmp_path / "out/base.pt", weights_only=True)
    assert {"config", "weights", "tokenizer", "step", "loss", "arguments", "seed", "versions"} <= set(content)
    assert content["step"] == 20 and math.isfinite(content["loss"])


@pytest.mark.parametrize("depth,width,heads", [
    (1, 32, 1), (4, 128, 4), (6, 288, 9), (8, 512, 8), (12, 768, 12)])
def test_the_dial(depth, width, heads):
    c = dial.derive(train.Config(depth=depth, device="cpu"), 1024)
    assert (c.width, c.heads) == (width, heads), "depth 12 must be GPT-2's shape, depth 4 the laptop's"
    N = dial.count_parameters(dial.model_config(c, 1024)) - 2 * 1024 * c.width
    assert c.steps == 8 * N // (c.batch_size * c.context), "tokens are tokens_per_parameter * N"


def test_a_cuda_graph_where_a_step_makes_one_pass(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda loss, mode: mode)
    modes = [dial.compiled(len, config(compile="on", device="cuda:0"), passes) for passes in (1, 2)]
    assert modes == ["reduce-overhead", "default"], "a graph overwrites what other passes left"
    assert dial.compiled(len, config(), 1) is len, "it compiles what shall stay plain"


def test_a_compiled_step_on_a_cpu_reuses_no_memory(monkeypatch):  # to see it fail takes a minute
    monkeypatch.setattr(torch, "compile", lambda loss, options: options)
    assert dial.compiled(len, config(compile="on")) == {"allow_buffer_reuse": False}, "wrong gradients"


def test_the_dial_can_be_overruled():
    c = dial.derive(train.Config(depth=4, width=64, steps=7, device="cpu"), 1024)
    assert (c.width, c.heads, c.steps) == (64, 2, 7)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name,content,says", [
    ("none.txt", None, "none.txt"), ("empty.txt", b"", "empty.txt"), ("one.txt", b"a", "one.txt"),
    ("binary.txt", bytes(range(256)) * 20, "binary.txt"), ("text.exe", b"words " * 100, "text.exe"),
    ("bad.jsonl", b'{"text": "a"}\n{"txt": "b"}\n' * 20, "line 2")])
def test_bad_text(tmp_path, fails, name, content, says):
    if content is not None:
        write(tmp_path / name, content)
    given = ["--data", tmp_path / name, "--out", tmp_path / "out", "--device", "cpu"]
    assert says in fails(train.main, given)


@pytest.mark.parametrize("flags,says", [
    (["--depht", "3"], "--depht"), (["--depth", "three"], "three"), (["--depth", "0"], "--depth 0"),
    (["--steps", "-1"], "--steps -1"), (["--vocab_size", "100"], "100"), (["--context", "100000"], "100,000"),
    (["--device", "cuda:99"], "cuda"), (["--heads", "7"], "--heads 7"), (["--resume"], "resume.pt"),
    (["--data", "http://127.0.0.1:9/a.txt"], "127.0.0.1:9"), (["--seed", "-1"], "--seed -1"),
    (["--tokens_per_parameter", "nan"], "--tokens_per_parameter nan"), (["--weight_decay", "-1"], "-1")])
def test_bad_flags(tmp_path, text_file, fails, flags, says):
    given = ["--data", text_file, "--out", tmp_path / "out", "--device", "cpu"]
    assert says in fails(train.main, given + flags)


def test_an_empty_folder_and_an_unknown_flag_as_a_user_meets_them(tmp_path):
    for flags, says in ((["--data", str(tmp_path)], str(tmp_path)), (["--stpes", "3"], "--stpes")):
        done = subprocess.run([sys.executable, "train.py", "--out", str(tmp_path / "out"), *flags], cwd=HERE,
                              capture_output=True, text=True)
        assert done.returncode == 2 and says in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1, "more than one clear line"


def test_a_tokenizer_of_another_size_is_named(train_small, tmp_path, fails, text_file):
    train_small()
    line = fails(train.main, ["--data", text_file, "--out", tmp_path / "out", "--vocab_size", "280"])
    assert "280" in line and "300" in line, line


def test_every_default_can_be_stored():
    values = dataclasses.asdict(train.Config()).values()
    assert all(isinstance(v, (str, int, float, bool, type(None))) for v in values)
