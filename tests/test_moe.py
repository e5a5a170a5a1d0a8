"""moe.py: runs that go on where they stopped, losses that count, and a dense model that becomes a mixture."""

import dataclasses

import pytest
import torch

import chain
import checkpoint
import moe
import sample
import train
from experts import expert_layers, make_model
from model import GPTConfig
from test_train import stop_at

TINY = ["--device", "cpu", "--depth", "1", "--context", "32", "--batch_size", "2", "--steps", "12",
        "--vocab_size", "300", "--experts", "4"]


@pytest.fixture
def moe_small(text_file, tmp_path):
    """Call moe.main on a small text with a tiny model."""
    def run(*flags: str, out: str = "out") -> dict:
        return moe.main(["--data", str(text_file), "--out", str(tmp_path / out), *TINY, *flags])
    return run


def test_the_whole_run(moe_small, tmp_path, capsys):
    metrics = moe_small()
    printed = capsys.readouterr().out
    for run in moe.RUNS:
        assert f"\n{run}" in printed, f"the run {run!r} is not printed"
    assert {"better_at_equal_tokens", "step_time", "longer_loss", "busiest", "busiest_left_alone", "entropy",
            "fast_path", "dropped_at_1.0", "dropped_at_1.25", "dropped_at_2.0"} <= set(metrics)
    assert metrics["dropped_at_1.0"] >= metrics["dropped_at_1.25"] >= metrics["dropped_at_2.0"]
    path = tmp_path / "out/moe.pt"
    model = checkpoint.load_model(path)[0]
    assert len(expert_layers(model)) == 1, "out/moe.pt holds the mixture"
    sample.main(["--checkpoint", str(path), "--out", str(tmp_path), "--prompt", "the old", "--tokens", "5"])
    assert not (tmp_path / "out/moe.resume.pt").exists(), "a finished run has nothing to resume"


def test_the_mixture_costs_what_the_dense_model_does():
    dense = GPTConfig(hidden=352)
    for flags in ({}, {"top_k": 1}, {"shared": 1, "top_k": 1}):
        shape = moe.shape_of(moe.Config(**flags), dense, True)
        assert shape.hidden * (shape.top_k + shape.shared) == 352, f"{flags}: not the same FLOPs a token"
    assert moe.shape_of(moe.Config(), dense, False) == dense


def test_resume_is_exact(moe_small, tmp_path, monkeypatch):
    """Stopped within the first run, and within the third; with noise, whose draws go on too."""
    flags = ("--noise", "0.5", "--balance", "bias")
    wanted, tick = moe_small(*flags, out="whole"), chain.Clock.tick
    whole = chain.load_checkpoint(tmp_path / "whole/moe.pt")["weights"]
    for stop in (3, 20):
        count = iter(range(1000))

        def stopping(self, number, text):
            if next(count) == stop:
                raise KeyboardInterrupt
            tick(self, number, text)
        with monkeypatch.context() as patch:
            patch.setattr(chain.Clock, "tick", stopping)
            with pytest.raises(SystemExit):
                moe_small(*flags, out=f"parts {stop}")
        found = moe_small(*flags, "--resume", out=f"parts {stop}")
        for key in ("dense_loss", "experts_loss", "longer_loss", "busiest", "busiest_left_alone"):
            assert found[key] == wanted[key], f"{key} differs after a stop at {stop} and --resume"
        parts = chain.load_checkpoint(tmp_path / f"parts {stop}/moe.pt")["weights"]
        assert all(torch.equal(whole[name], parts[name]) for name in whole), "weights differ after --resume"


def test_an_older_run_is_not_gone_on_with(moe_small, monkeypatch, fails, tmp_path):
    for stop in (3, 0):  # the second one ends before it has saved anything
        with monkeypatch.context() as patch:
            stop_at(patch, stop, KeyboardInterrupt())
            with pytest.raises(SystemExit):
                moe_small("--seed", str(stop))
        assert (tmp_path / "out/moe.resume.pt").exists() == (stop == 3)
    assert "no run was saved" in fails(lambda argv: moe_small("--resume"), []), "an older run was found"


def losses(**flags):
    """The loss of a batch, and the gradient of the router."""
    torch.manual_seed(0)
    model = make_model(GPTConfig(vocab_size=50, depth=1, width=32, heads=2, kv_heads=2, hidden=16, experts=4))
    x = torch.randint(50, (2, 17))
    loss = moe.loss_with(moe.Config(**flags), True)(model, x[:, :-1], x[:, 1:], False)
    loss.backward()
    return loss.item() / 32, expert_layers(model)[0]


def test_the_balance_loss_is_added():
    """A loss that is computed and never added trains nothing."""
    (plain, layer), (balanced, other) = (losses(z_weight=0.0, balance_weight=w) for w in (0.0, 1.0))
    assert 1.9 < balanced - plain < 4, "the balance loss is near k = 2 with a fresh router"
    assert layer.router.weight.grad.abs().max() == 0, "a fresh model's experts give 0: no gradient from them"
    assert other.router.weight.grad.abs().max() > 0, "the balance loss reaches the router"
    assert losses(z_weight=1.0, balance_weight=0.0)[0] > plain + 1, "log(4)² and more: the z-loss"


def test_the_bias_moves_in_training():
    layer = losses(balance="bias", balance_weight=0.1)[1]
    moved = layer.bias[layer.bias != 0].abs()
    assert len(moved) and torch.allclose(moved, torch.tensor(0.1)), f"each step moves it by 0.1: {layer.bias}"


def test_a_dense_model_becomes_a_mixture(train_small, text_file, tmp_path):
    train_small()
    path = tmp_path / "out/base.pt"
    metrics = moe.main(["--data", str(text_file), "--out", str(tmp_path / "out"), "--device", "cpu",
                        "--context", "32", "--steps", "30", "--batch_size", "4", "--upcycle", str(path),
                        "--experts", "3"])
    parent = checkpoint.load_model(path)[0]
    model = make_model(dataclasses.replace(parent.config, experts=3))
    moe.upcycle(model, parent)
    ids = torch.randint(300, (2, 32))
    assert (model.eval()(ids) - parent(ids)).abs().max() < 1e-4, "at step 0 the mixture is the dense model"
    assert metrics["experts_loss"] < metrics["start"], "training goes on below the dense model's loss"


@pytest.mark.parametrize("flags, told", [
    (["--experts", "1"], "--experts 1"), (["--top_k", "9"], "--top_k 9"), (["--top_k", "0"], "--top_k 0"),
    (["--capacity", "0"], "--capacity 0"), (["--noise", "-1"], "--noise -1"), (["--balance", "x"], "balance"),
    (["--upcycle", "nowhere.pt"], "nowhere.pt"), (["--upcycle", "x.pt", "--top_k", "1"], "--upcycle"),
    (["--resume"], "--resume")])
def test_mistakes_end_in_one_line(flags, told, fails, tmp_path):
    assert told in fails(moe.main, ["--out", tmp_path, *flags])


def test_upcycling_needs_the_same_tokens_and_context(train_small, text_file, fails, tmp_path):
    train_small()
    line = fails(moe.main, ["--data", text_file, "--out", tmp_path / "out", "--depth", "2", "--context", "16",
                            "--upcycle", tmp_path / "out/base.pt"])
    assert "context" in line, "a width or context that does not match is named"


def test_train_config_is_kept():
    fields = {field.name for field in dataclasses.fields(moe.Config)}
    assert {field.name for field in dataclasses.fields(train.Config)} <= fields
