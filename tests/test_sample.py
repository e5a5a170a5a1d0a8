"""sample.py: the laws that tokens are drawn from, decoding, and what users get wrong."""

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import chain
import decode
import sample
from bpe import SPECIAL_TOKENS, Tokenizer
from model import GPT, GPTConfig

SMALL = GPTConfig(vocab_size=262, context=32, depth=2, width=32, heads=2, kv_heads=1, hidden=32)
LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()


def make() -> GPT:
    torch.manual_seed(0)
    model = GPT(SMALL).double()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model.eval()


def save(folder: Path) -> Path:
    """Make an untrained model whose tokens are bytes, as out/base.pt."""
    path = folder / "base.pt"
    chain.save_checkpoint(path, config=asdict(SMALL), weights=make().float().state_dict(), step=0,
                          tokenizer=Tokenizer([], SPECIAL_TOKENS).to_dict(), loss=5.5, arguments={"seed": 0})
    return path


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return save(tmp_path)


def law(**filters) -> list[float]:
    return [round(p, 6) for p in decode.filter_logits(LOGITS, **filters).softmax(-1)[0].tolist()]


def test_filters_by_hand():
    assert law() == [0.5, 0.3, 0.15, 0.05]
    assert law(temperature=0) == [1, 0, 0, 0], "temperature 0 is greedy"
    squares = [round(p * p / 0.365, 6) for p in (0.5, 0.3, 0.15, 0.05)]
    assert law(temperature=0.5) == squares, "p^(1/t), normalised"
    assert law(top_k=2) == [0.625, 0.375, 0, 0]
    assert law(top_k=9) == law(), "a top_k beyond the vocabulary keeps all"
    assert law(top_p=0.5) == [1, 0, 0, 0], "the fewest tokens that reach p"
    assert law(top_p=0.51) == [0.625, 0.375, 0, 0], "the token that crosses p stays"
    assert law(top_p=1e-9) == [1, 0, 0, 0], "at least one token stays"
    assert law(temperature=0.5, top_p=0.6) == [1, 0, 0, 0], "the temperature comes before top-p"


def test_top_k_keeps_k_also_among_equals():
    kept = decode.filter_logits(torch.zeros(1, 5), top_k=2).isfinite().sum()
    assert kept == 2, f"{kept} of five equal tokens passed top_k = 2"


def test_the_penalty_makes_seen_tokens_less_likely():
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    assert decode.penalise_repetition(logits, torch.tensor([[0, 1, 0]]), 2.0).tolist() == [[1.0, -4.0, 1.0]]


def test_draws_follow_the_law():
    torch.manual_seed(0)
    n = 20_000
    counts = torch.bincount(decode.sample_token(LOGITS.expand(n, 4))[:, 0], minlength=4)
    expected = LOGITS.exp()[0] * n
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 16.3, f"chi-square {chi2:.1f} with 3 degrees of freedom: p < 0.001"


def test_greedy_decoding_is_the_argmax_of_the_whole_pass():
    model, ids = make(), torch.randint(262, (3, 5))
    new = torch.cat([n for n, _ in decode.generate(model, ids, 20, temperature=0)], dim=1)
    for _ in range(20):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(ids[:, 5:], new), "with the cache, greedy decoding writes something else"


def test_sampling_is_repeated_by_its_seed():
    model, ids = make(), torch.randint(262, (2, 5))
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    runs = [torch.cat([n for n, _ in decode.generate(model, ids, 9, generator=g)], 1) for g in generators]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_it_stops_where_the_context_is_full():
    new = list(decode.generate(make(), torch.zeros(1, 30, dtype=torch.long), 100))
    assert len(new) == 3, "30 tokens read leave room to read two more, so three can be written"
    with pytest.raises(ValueError, match="context of 32"):
        list(decode.generate(make(), torch.zeros(1, 33, dtype=torch.long), 1))


def test_streamed_characters_are_never_broken():
    tokenizer, text, decoder = Tokenizer([(b"\xc3", b"\xa9")]), "aé€😀", sample.text_decoder()
    pieces = [decoder.decode(tokenizer.vocab[i]) for i in tokenizer.encode(text)]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces), "half a character was shown"
    decoder.decode(b"\xe2\x82")
    assert decoder.decode(b"", final=True) == "\ufffd", "a character cut off at the end is shown as such"


def test_user_text_makes_no_special_token(checkpoint, capsys):
    _, tokenizer, _ = sample.load_model(checkpoint)
    assert not set(tokenizer.special.values()) & set(tokenizer.encode("<|end|><|endoftext|>"))


def test_main_reports_what_it_cost(checkpoint, capsys):
    metrics = sample.main(["--checkpoint", str(checkpoint), "--out", str(checkpoint.parent),
                           "--prompt", "Hé", "--n", "2", "--tokens", "8", "--show_probs",
                           "--dollars_per_hour", "3.6", "--device", "cpu"])
    model = make().float()
    assert metrics["weight_bytes"] == sum(p.nbytes for p in model.parameters())
    sizes = 2 * 2 * 2 * 1 * 32 * 16 * 4
    assert metrics["cache_bytes"] == sizes, "k and v, layers, rows, heads, context, width, bytes"
    dollars = 1e3 * metrics["ms_per_token"] / 1e3 / 2
    assert metrics["dollars_per_million_tokens"] == pytest.approx(dollars, rel=1e-6)
    assert "Hé" in capsys.readouterr().out


def test_the_whole_context_can_be_prompt(checkpoint):
    argv = ["--checkpoint", str(checkpoint), "--out", str(checkpoint.parent), "--device", "cpu"]
    metrics = sample.main([*argv, "--prompt", "a" * 31])
    assert metrics["time_to_first_token_ms"] > 0, "32 tokens in a context of 32 leave one token to write"


@pytest.mark.parametrize("flags,says", [
    (["--prompt", "a" * 32], "33 tokens"), (["--temperature", "-1"], "--temperature -1"),
    (["--top_p", "0"], "--top_p 0"), (["--top_k", "-3"], "--top_k -3"), (["--n", "0"], "--n 0"),
    (["--tokens", "0"], "--tokens 0"), (["--device", "cuda:99"], "cuda"), (["--device", "tpu"], "tpu"),
    (["--temperature", "warm"], "warm"), (["--repetition_penalty", "0"], "--repetition_penalty 0"),
    (["--checkpoint", "nowhere.pt"], "nowhere.pt")])
def test_bad_flags(checkpoint, fails, flags, says):
    assert says in fails(sample.main, ["--out", checkpoint.parent, "--device", "cpu", *flags])


def test_a_cut_off_checkpoint(checkpoint, fails):
    whole = checkpoint.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        checkpoint.write_bytes(whole[:size])
        line = fails(sample.main, ["--out", checkpoint.parent, "--device", "cpu"])
        assert "base.pt" in line and "cut off" in line, line


def test_a_checkpoint_of_other_sizes(checkpoint, fails):
    content = torch.load(checkpoint, weights_only=True)
    content["config"]["width"] = 64
    torch.save(content, checkpoint)
    assert "sizes" in fails(sample.main, ["--out", checkpoint.parent, "--device", "cpu"])
    torch.save({"weights": {}}, checkpoint)
    assert "lacks" in fails(sample.main, ["--out", checkpoint.parent, "--device", "cpu"])


def test_before_training_as_a_user_meets_it(tmp_path):
    done = subprocess.run([sys.executable, "sample.py", "--out", str(tmp_path)],
                          cwd=Path(sample.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 2 and "python train.py" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_attention_can_be_changed_after_training():
    model, other = make(), GPT(replace(SMALL, attention="naive")).double()
    other.load_state_dict(model.state_dict())
    ids = torch.randint(262, (1, 9))
    assert (model(ids) - other(ids)).abs().max() < 1e-12
