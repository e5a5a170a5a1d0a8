"""decode.py: laws that tokens are drawn from, decoding alone and in a batch, and the compiled step."""

import math
from dataclasses import replace

import pytest
import torch

import bench
import decode
import sample
from checkpoint import random_model
from model import GPT, GPTConfig

SMALL = GPTConfig(vocab_size=262, context=32, depth=2, width=32, heads=2, kv_heads=1, hidden=32)


def make() -> GPT:
    torch.manual_seed(0)
    model = GPT(SMALL).double()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model.eval()


def run(model, ids, tokens: int = 12, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The new ids (B, n) and the logits (B, n, V) that they were chosen by."""
    new, logits = zip(*decode.generate(model, ids, tokens, **options))
    return torch.cat(new, dim=1), torch.stack(logits, dim=1)


PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3], [9, 9, 1], [5, 6, 7]]


def test_prompts_of_unequal_length_are_answered_as_if_alone():
    model = make()
    ids, lengths = decode.pad_prompts(PROMPTS)
    new, logits = run(model, ids, lengths=lengths, temperature=0)
    for row, prompt in enumerate(PROMPTS):
        alone, wanted = run(model, torch.tensor([prompt]), temperature=0)
        assert torch.equal(new[row:row + 1], alone), f"prompt {row} is answered otherwise than alone"
        difference = (logits[row] - wanted[0]).abs().max()
        assert difference < 1e-6, f"prompt {row}: its neighbours move its logits by {difference:.1e}"


def test_what_fills_up_a_prompt_is_not_seen():
    """The trap: prompts filled up and read as if that were text."""
    model = make()
    ids, lengths = decode.pad_prompts(PROMPTS)
    other = ids.clone()
    other[1, 1:] = 77
    assert torch.equal(run(model, ids, lengths=lengths, temperature=0)[0],
                       run(model, other, lengths=lengths, temperature=0)[0]), "padding was read"
    wrong, _ = run(model, ids, temperature=0)
    right, _ = run(model, ids, lengths=lengths, temperature=0)
    assert not torch.equal(wrong, right), "the test can't tell padding that is read from padding that is not"


def test_the_penalty_does_not_see_what_fills_up():
    model = make()
    ids, lengths = decode.pad_prompts(PROMPTS)
    new, _ = run(model, ids, lengths=lengths, temperature=0, repetition_penalty=1.5)
    for row, prompt in enumerate(PROMPTS):
        alone, _ = run(model, torch.tensor([prompt]), temperature=0, repetition_penalty=1.5)
        assert torch.equal(new[row:row + 1], alone)


def test_a_static_cache_gives_the_same_logits_to_the_end_of_the_context():
    model, ids = make(), torch.randint(262, (2, 3))
    new, logits = run(model, ids, 100, temperature=0)
    static, same = run(model, ids, 100, temperature=0, step=decode.next_logits)
    assert torch.equal(new, static) and new.shape[1] == 30 and (logits - same).abs().max() < 1e-6


def test_a_static_cache_stays_where_it_is(monkeypatch):
    places = []

    class Cache(decode.RowCache):
        def take(self, T):
            places.append({name: buffer.data_ptr() for name, buffer in self.named_buffers()})
            return super().take(T)
    monkeypatch.setattr(decode, "RowCache", Cache)
    ids, lengths = decode.pad_prompts(PROMPTS)
    run(make(), ids, 10, temperature=0, lengths=lengths, step=decode.next_logits)
    wanted = {"k0", "v0", "k1", "v1", "length"}
    assert wanted <= set(places[0]), f"only {set(places[0])} are buffers: torch takes no others to stay"
    assert len(places) == 10 and all(each == places[0] for each in places), "a buffer moved in memory"


def test_a_cache_has_room_in_steps_of_128():
    model = GPT(replace(SMALL, context=300))
    sizes = [len(decode.RowCache(model, 1, n, static=True).slots) for n in (1, 128, 129, 257, 900)]
    assert sizes == [128, 128, 256, 300, 300], f"{sizes}: too small for the tokens, or no step of 128"


def test_logits_that_were_handed_out_stay(monkeypatch):
    same = torch.zeros(1, 3)  # as a CUDA graph does, it writes to the same place each time
    monkeypatch.setattr(decode, "program", lambda function: lambda *given: same.add_(1))
    step = decode.compile_step(torch.device("cpu"))
    first, _ = step(), step()
    assert first.max() == 1, "a later step writes over logits that were handed out"


def test_the_step_is_one_graph_that_serves_all_steps():
    """Captured whole, and once: also for another prompt. Compiling it for real takes half a minute."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward
    step = torch.compile(decode.next_logits, backend=count, fullgraph=True, dynamic=False)
    model = make()
    for length in (4, 9):
        ids = torch.randint(262, (1, length))
        new, logits = run(model, ids, 20, temperature=0, step=step)
        wanted, same = run(model, ids, 20, temperature=0)
        assert torch.equal(new, wanted) and (logits - same).abs().max() < 1e-6
    assert len(graphs) == 1, f"{len(graphs)} programs were compiled: a shape changes from step to step"


def test_prompts_from_a_file(tmp_path, fails, capsys):
    from test_sample import save
    path = save(tmp_path)
    argv = ["--checkpoint", str(path), "--out", str(tmp_path), "--device", "cpu", "--temperature", "0",
            "--tokens", "6"]
    (tmp_path / "prompts.txt").write_text("abc\n\nHello there\n", encoding="utf-8")
    sample.main([*argv, "--prompts", str(tmp_path / "prompts.txt")])
    together = capsys.readouterr().out
    for prompt in ("abc", "Hello there"):
        sample.main([*argv, "--prompt", prompt])
        alone = capsys.readouterr().out.split("\n\n", 1)[1].split("\n(stopped")[0].split("\n---")[0]
        assert alone in together, f"{prompt!r} is answered otherwise than alone"
    (tmp_path / "prompts.txt").write_text("\n", encoding="utf-8")
    assert "no line" in fails(sample.main, [*argv, "--prompts", tmp_path / "prompts.txt"])
    assert "nowhere.txt" in fails(sample.main, [*argv, "--prompts", "nowhere.txt"])


def test_quantiles_and_rows_by_hand():
    assert bench.quantile([5.0, 1.0, 2.0], 0.95) == 5.0 and bench.quantile([7.0], 0.5) == 7.0
    row = bench.row([1.0, 1.5, 2.0], batch=4, n_bytes=8_000_000, dollars_per_hour=3.6)
    wanted = {"first_ms": 1000, "p50_ms": 500, "p95_ms": 500, "tokens_per_second": 8, "MB_a_token": 2,
              "GB_per_second": 0.016, "dollars_per_million": 125}
    assert row == pytest.approx(wanted), "half a second a step, four rows a step"


def test_the_bench_measures_each_way(capsys, monkeypatch):
    monkeypatch.setattr(bench, "TOKENS", 4)
    monkeypatch.setattr(bench, "BATCHES", (1, 2))
    metrics = bench.measure(random_model("2M"), None, 0.0, False)
    table = capsys.readouterr().out
    for way in ("plain", "int8", "int4"):
        assert metrics[f"{way}_1_tokens_per_second"] > 0 < metrics[f"{way}_2_tokens_per_second"]
        assert table.count(way) == 2
    assert table.count("speculative") == 1 and math.isfinite(metrics["copy_GB_per_second"])
