"""sft.py: the loss on the assistant's words alone, adapters that merge exactly, resuming, and mistakes."""

import dataclasses
import json
import math

import pytest
import torch

import chain
import decode
import dial
import sample
import sft
from bpe import SPECIAL_TOKENS, Tokenizer
from dialogue import IGNORE, Rows, make_rows
from exam import answer_all
from lora import LoRA
from model import GPT, GPTConfig
from test_train import stop_at
from train import make_optimizer

TOKENIZER = Tokenizer([], SPECIAL_TOKENS)  # one byte, one token
SMALL = GPTConfig(vocab_size=262, context=64, depth=2, width=32, heads=2, kv_heads=1, hidden=48)


def said(*messages: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in messages]


TALKS = [said(("user", "What is it?"), ("assistant", "Salt.")), said(("user", "Who?"), ("assistant", "Ada")),
         said(("system", "Be brief"), ("user", "Who?"), ("assistant", "A")),
         said(("user", "Hi"), ("assistant", "Yo"), ("user", "Again"), ("assistant", "Yo!"))]


def make(config: GPTConfig = SMALL) -> GPT:
    """A float64 model in which no weight is zero or one, so that every part of it counts."""
    torch.manual_seed(0)
    model = GPT(config).double()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def config(**changes) -> sft.Config:
    """A Config with every value set, for `fit`."""
    return sft.Config(**dict(batch_size=2, device="cpu", compile="off", precision="float32") | changes)


@pytest.fixture
def exact(monkeypatch):
    """`float()` keeps float64 here, in RoPE's tables and in the loss: identities then hold to 1e-10."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture
def base(tmp_path) -> list[str]:
    """An untrained out/base.pt and 24 conversations in my.jsonl; returns the flags that name them."""
    torch.manual_seed(0)
    chain.save_checkpoint(tmp_path / "out/base.pt", config=dataclasses.asdict(SMALL), loss=5.5, step=0,
                          weights=GPT(SMALL).state_dict(), tokenizer=TOKENIZER.to_dict(), arguments={})
    talks = [said(("user", f"What is {i}?"), ("assistant", "ab" * (i % 7 + 1))) for i in range(24)]
    (tmp_path / "my.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    return ["--data", str(tmp_path / "my.jsonl"), "--out", str(tmp_path / "out"), "--device", "cpu",
            "--batch_size", "4"]


def losses_by_hand(model: GPT, learned_only: bool) -> list[torch.Tensor]:
    """-log p of each token of each conversation, read alone."""
    found = []
    for talk in TALKS:
        ids, learned = TOKENIZER.encode_chat(talk)
        logits = model(torch.tensor([ids]))[0]  # (T, V)
        for t in range(1, len(ids)):
            if learned[t] or not learned_only:
                found.append(logits[t - 1].exp().sum().log() - logits[t - 1, ids[t]])
    return found


def test_the_loss_is_that_of_the_assistants_tokens_alone(exact):
    model, rows = make(), make_rows(TALKS, TOKENIZER, SMALL.context)
    loss = sft.learned_loss(model, rows.x, rows.y, rows.segments, False, rows.y.numel())
    by_hand = losses_by_hand(model, True)
    learned = sum(len(each["content"]) + 2 for t in TALKS for each in t if each["role"] == "assistant")
    assert len(by_hand) == learned == (rows.y != IGNORE).sum(), "learned: spaces, letters, ends"
    assert abs(loss - sum(by_hand)) < 1e-9, f"the loss {loss:.6f} is by hand {sum(by_hand):.6f}"
    fewest = sft.learned_loss(model, rows.x, rows.y, rows.segments, False, learned)
    assert abs(loss - fewest) < 1e-9, "of only as many places as are learned the loss is another"
    mean = sft.mean_loss(model, rows, "cpu")
    assert abs(mean - sum(by_hand) / learned) < 1e-10, "mean_loss is the mean over the learned tokens"


def test_fit_drops_no_mask(exact):
    """Where the mask gets lost on the way, all looks well, and the model learns to ask questions too."""
    rows = make_rows(TALKS, TOKENIZER, SMALL.context)
    history, _ = sft.fit(make(), rows, config(batch_size=len(rows.x)))
    right, wrong = (torch.stack(losses_by_hand(make(), only)).mean().item() for only in (True, False))
    assert abs(right - wrong) > 0.01, "both means are equal: this test measures nothing"
    loss = history[0][1]
    assert abs(loss - right) < 1e-10, f"the first loss is {loss:.4f}, of the assistant's tokens {right:.4f}"


def test_the_users_words_get_no_gradient(exact):
    model, talk, seen = make(), TALKS[3], []
    rows = make_rows([talk], TOKENIZER, SMALL.context)
    last = model.blocks[-1].attention  # nothing behind it mixes places
    last.register_forward_hook(lambda _, inputs, x: seen.append(x) or x.retain_grad())  # (B, T, C)
    sft.learned_loss(model, rows.x, rows.y, rows.segments, False, rows.y.numel()).backward()
    pushed = (seen[0].grad[0] != 0).any(dim=-1).tolist()
    learned = TOKENIZER.encode_chat(talk)[1]
    wanted = [bool(one) for one in learned[1:]] + [False] * (SMALL.context - len(learned) + 1)
    assert pushed == wanted, "a gradient comes from a token that the assistant did not say, or one is missing"


def test_a_batch_with_nothing_to_learn_harms_nothing():
    rows = make_rows(TALKS, TOKENIZER, SMALL.context)
    empty = Rows(rows.x, torch.full_like(rows.y, IGNORE), rows.segments, 0, 0)
    model = make().float()
    history, _ = sft.fit(model, empty, config(epochs=2))
    assert {loss for _, loss in history} == {0.0}, f"the mean over nothing: {history}"
    assert all(p.isfinite().all() for p in model.parameters()), "a batch without targets made weights nan"
    assert sft.mean_loss(model, empty, "cpu") == 0, "the held-out loss over nothing is no number"


@pytest.mark.parametrize("lora", [0, 8])
def test_a_few_conversations_can_be_learnt_by_heart(lora):
    torch.manual_seed(0)
    model, rows = GPT(SMALL), make_rows(TALKS, TOKENIZER, SMALL.context)
    if lora:
        sft.add_lora(model, lora)
    history, _ = sft.fit(model, rows, config(epochs=120, learning_rate=1e-2, weight_decay=0.0))
    if lora:
        sft.merge_lora(model)
    assert history[0][1] == pytest.approx(math.log(262), abs=0.2), "the loss at step 0 is not that of a guess"
    prompts, wanted = [talk[:-1] for talk in TALKS], [talk[-1]["content"] for talk in TALKS]
    answers = answer_all(model, TOKENIZER, prompts, 20)
    assert None not in answers, f"an answer does not end: {answers}"
    assert answers == wanted, f"the answers learnt by heart are {answers}"


def test_each_epoch_shows_every_row_once(monkeypatch):
    seen, rows = [], make_rows(TALKS * 4, TOKENIZER, 32)
    rows.x[:, 0] = torch.arange(len(rows.x))  # a row's number
    monkeypatch.setattr(sft, "learned_loss", lambda model, x, *_: seen.append(x[:, 0].tolist()) or
                        model(x).mean())
    sft.fit(make().float(), rows, config(epochs=2, batch_size=5))
    n, half = len(rows.x), len(seen) // 2
    orders = [[i for batch in part for i in batch] for part in (seen[:half], seen[half:])]
    assert all(sorted(order[:n]) == list(range(n)) for order in orders), "a row is missing, or comes twice"
    assert {len(batch) for batch in seen} == {5}, "a batch is not full"
    assert orders[0] != orders[1], "the second epoch has the order of the first"


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_change_nothing_at_first_and_merge_exactly(tied):
    plain, ids = make(dataclasses.replace(SMALL, tied=tied)), torch.randint(262, (2, 20))
    model = make(plain.config)
    sft.add_lora(model, 3)
    assert (model(ids) - plain(ids)).abs().max() < 1e-12, "with B = 0 the adapters must change nothing"
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.endswith((".A", ".B")) for name in learning), "more than A and B would learn"
    linears = [m for m in plain.modules() if isinstance(m, torch.nn.Linear)][:-1 if tied else None]
    n = sum(p.numel() for p in learning.values())
    assert n == sum(3 * sum(each.weight.shape) for each in linears), f"{n} parameters, R (in + out) a matrix"
    assert type(model.head) is (torch.nn.Linear if tied else LoRA), "a tied head is left alone, no other"
    for p in learning.values():
        p.data.normal_()
    changed = model(ids).detach()
    sft.merge_lora(model)
    assert not any(isinstance(m, LoRA) for m in model.modules()), "an adapter is left"
    assert list(model.state_dict()) == list(plain.state_dict()), "the merged model has another shape"
    off = (model(ids) - changed).abs().max() / changed.abs().max()
    assert off < 1e-12, f"merged, the logits are off by {off:.1e}"
    assert (changed - plain(ids)).abs().max() > 0.1, "the adapters did nothing: this test measures nothing"
    assert torch.equal(model.embedding.weight, plain.embedding.weight), "the embedding was changed"
    assert all(p.requires_grad for p in model.parameters()), "after merging a weight is still frozen"


def test_only_adapters_are_optimised():
    model = make().float()
    sft.add_lora(model, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimised = {id(p) for group in make_optimizer(model, 0.1).param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in optimised}
    assert names == {name for name in before if name.endswith((".A", ".B"))}, "not just A and B are optimised"
    sft.fit(model, make_rows(TALKS, TOKENIZER, SMALL.context), config(epochs=3))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == names, f"frozen but moved: {moved - names}; an adapter that stayed: {names - moved}"


@pytest.mark.parametrize("flags", [[], ["--lora", "2"]])
def test_resume_is_exact(base, tmp_path, monkeypatch, flags):
    flags = [*base, "--epochs", "3", *flags]
    loss = sft.main([*flags, "--name", "whole"])["training_loss"]
    with monkeypatch.context() as patch:
        stop_at(patch, 5, KeyboardInterrupt())
        with pytest.raises(SystemExit) as stop:
            sft.main([*flags, "--name", "parts"])
    assert stop.value.code == 130 and not (tmp_path / "out/parts.pt").exists(), "a stopped run made parts.pt"
    assert sft.main([*flags, "--name", "parts", "--resume"])["training_loss"] == loss, "other losses"
    whole, parts, start = (chain.load_checkpoint(tmp_path / f"out/{name}.pt")
                           for name in ("whole", "parts", "base"))
    for name, weight in whole["weights"].items():
        assert torch.equal(weight, parts["weights"][name]), f"{name} differs after a stop and --resume"
    assert list(parts["weights"]) == list(start["weights"]), "it has another shape than base.pt"
    assert whole["chat"] is True and parts["chat"] is True, "dpo.py and sample.py know an assistant by `chat`"
    assert not (tmp_path / "out/parts.resume.pt").exists(), "a finished run has nothing to resume"


def test_resume_takes_no_other_text(base, tmp_path, monkeypatch, fails):
    with monkeypatch.context() as patch:
        stop_at(patch, 5, KeyboardInterrupt())
        with pytest.raises(SystemExit):
            sft.main([*base, "--epochs", "3"])
    path = tmp_path / "my.jsonl"
    path.write_text(path.read_text().replace("What", "Who"))
    assert "another text" in fails(sft.main, [*base, "--resume"])


@pytest.mark.parametrize("other", [{"config": dataclasses.asdict(dataclasses.replace(SMALL, depth=3))},
                                   {"tokenizer": Tokenizer([(b"a", b"b")], SPECIAL_TOKENS).to_dict()}])
def test_resume_takes_no_other_model(base, tmp_path, monkeypatch, fails, other):
    """base.pt is another one than when the run stopped: of another shape, or with other tokens."""
    with monkeypatch.context() as patch:
        stop_at(patch, 5, KeyboardInterrupt())
        with pytest.raises(SystemExit):
            sft.main([*base, "--epochs", "3"])
    content = chain.load_checkpoint(tmp_path / "out/sft.resume.pt")
    torch.save(content | other, tmp_path / "out/sft.resume.pt")
    assert "another model" in fails(sft.main, [*base, "--resume"])


def test_show_shows_and_makes_nothing(base, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        sft.main([*base, "--show"])
    out, green, plain = capsys.readouterr().out, "\x1b[32m", "\x1b[0m"
    read = f"{plain}<|endoftext|><|user|> What is 0?<|end|><|assistant|>"
    assert stop.value.code == 0 and out.endswith(f"{read}{green} ab<|end|>{plain}\n"), repr(out)
    assert out.count(green) == 1, "more is green than the answer and its end"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["base.pt"], "--show made a file"


def test_a_loss_that_is_no_number_stops_before_the_weights(base, tmp_path, monkeypatch, fails):
    model, rows = make().float(), make_rows(TALKS, TOKENIZER, SMALL.context)
    before = [p.detach().clone() for p in model.parameters()]
    monkeypatch.setattr(sft, "learned_loss", lambda model, x, *_: model(x).sum() * math.nan)
    with pytest.raises(chain.UserError, match="step 0: loss nan.*--learning_rate"):
        sft.fit(model, rows, config())
    assert all(map(torch.equal, before, model.parameters())), "the loss that is no number reached the weights"
    assert "step 0" in fails(sft.main, base)
    assert not (tmp_path / "out/sft.pt").exists(), "a checkpoint was made all the same"


@pytest.mark.parametrize("flags,says", [
    (["--epochs", "0"], "epochs 0"), (["--batch_size", "0"], "--batch_size 0"), (["--lora", "-1"], "lora -1"),
    (["--questions", "-1"], "--questions -1"), (["--conversations", "0"], "--conversations 0"),
    (["--learning_rate", "0"], "--learning_rate 0"), (["--learning_rate", "nan"], "nan: it must be above 0"),
    (["--checkpoint", "none.pt"], "python train.py"), (["--resume"], "no run was saved"),
    (["--data", "none.jsonl"], "none.jsonl"), (["--epoch", "3"], "--epoch")])
def test_bad_flags(base, fails, flags, says):
    line = fails(sft.main, base + flags)
    assert says in line, line


def test_no_compiler(base, fails, monkeypatch):
    monkeypatch.setattr(dial, "can_compile", lambda device: False)
    decode.program.cache_clear()
    assert "C++ compiler" in fails(sft.main, [*base, "--compile", "on"])
    assert "C++ compiler" in fails(sample.main, [*base[2:6], "--compile"])


def test_bad_text(base, tmp_path, fails):
    (tmp_path / "my.jsonl").write_text(json.dumps({"messages": TALKS[0]}) + '\n{"text": "b"}\n')
    assert "my.jsonl, line 2: it lacks 'messages'" in fails(sft.main, base)
    (tmp_path / "out/base.pt").unlink()
    assert "python train.py" in fails(sft.main, base), "without base.pt the way out is not named"
