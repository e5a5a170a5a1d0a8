"""dpo.py: losses by other formulas, log-probabilities of answers alone, a frozen reference, and mistakes."""

import dataclasses
import json
import math

import pytest
import torch

import chain
import dpo
from bpe import SPECIAL_TOKENS, Tokenizer
from model import GPT, GPTConfig
from packed import quantize_model
from sample import chat_prompt

TOKENIZER = Tokenizer([], SPECIAL_TOKENS)  # one byte, one token
END = TOKENIZER.special["<|end|>"]
SMALL = GPTConfig(vocab_size=262, context=64, depth=2, width=32, heads=2, kv_heads=1, hidden=48)
METRICS = {"preference_loss", "reward_accuracy", "reward_margin", "log_prob_chosen", "kl"}


def said(*messages: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in messages]


PAIRS = [(said(("user", "Hi")), "Hello", "What?"), (said(("user", "Who?")), "I don't know.", "Ada"),
         (said(("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c")), "d", "eeee")]


def make() -> GPT:
    """A float64 model in which no weight is zero or one, so that every part of it counts."""
    torch.manual_seed(0)
    model = GPT(SMALL).double()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def encode(pairs=PAIRS) -> list[list[tuple]]:
    return [dpo.encode_pair(TOKENIZER, pair, SMALL.context)[0] for pair in pairs]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return dpo.pad([side for pair in encode() for side in pair], "cpu")


def config(**changes) -> dpo.Config:
    return dpo.Config(**dict(batch_size=3, device="cpu", epochs=15, learning_rate=3e-3) | changes)


@pytest.fixture
def exact(monkeypatch):
    """`float()` keeps float64 here, in RoPE's tables and in the log-probs: identities then hold to 1e-10."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def save(path, model: GPT | None = None, **more) -> None:
    torch.manual_seed(0)
    weights = (model or GPT(SMALL)).state_dict()
    chain.save_checkpoint(path, config=dataclasses.asdict(SMALL), weights=weights, step=7,
                          tokenizer=TOKENIZER.to_dict(), loss=5.5, arguments={"seed": 0}, **more)


@pytest.fixture
def chat(tmp_path) -> list[str]:
    """An untrained out/sft.pt and 20 preferences in my.jsonl; returns the flags that name them."""
    save(tmp_path / "out/sft.pt", chat=True)
    lines = [{"prompt": f"{i}?", "chosen": "I don't know.", "rejected": "x" * (i + 1)} for i in range(20)]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return ["--data", str(tmp_path / "my.jsonl"), "--out", str(tmp_path / "out"), "--device", "cpu",
            "--batch_size", "4", "--epochs", "2", "--learning_rate", "1e-3"]


def other_formula(name: str, pc, pr, rc, rr, beta: float):
    """The same losses, written otherwise: -log σ(x) is log(1 + exp(-x))."""
    x = beta * (pc - pr - (rc - rr))
    wrong, right = torch.log1p(torch.exp(x)), torch.log1p(torch.exp(-x))
    return {"dpo": right, "cdpo": 0.9 * right + 0.1 * wrong, "ipo": (x / beta - 0.5 / beta) ** 2}[name].mean()


@pytest.mark.parametrize("name", dpo.LOSSES)
@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_losses_and_gradients_equal_another_formula(name, beta):
    torch.manual_seed(0)
    given = [-20 * torch.rand(50, dtype=torch.float64) for _ in range(4)]
    policy = [t.requires_grad_() for t in given[:2]]
    (loss, rewards), wanted = dpo.LOSSES[name](*given, beta), other_formula(name, *given, beta)
    assert abs(loss - wanted) < 1e-10, f"{name}: {loss:.8f} is by the other formula {wanted:.8f}"
    ours, theirs = (torch.autograd.grad(each, policy) for each in (loss, wanted))
    for side, a, b in zip(("chosen", "rejected"), ours, theirs):
        assert (a - b).abs().max() < 1e-10, f"{name}: another gradient of the {side}"
    for reward, a, b in zip(rewards, given[:2], given[2:]):  # chosen, rejected
        assert (reward - beta * (a - b)).abs().max() < 1e-12, f"{name}: a reward is β (log π - log π_ref)"


def test_the_gradient_of_dpo_is_the_closed_form():
    torch.manual_seed(0)
    pc, pr, rc, rr = (torch.randn(9, dtype=torch.float64).requires_grad_() for _ in range(4))
    chosen, rejected = torch.autograd.grad(dpo.dpo_loss(pc, pr, rc, rr, 0.3)[0], (pc, pr))
    wanted = -0.3 * torch.sigmoid(-0.3 * ((pc - rc) - (pr - rr))) / 9
    assert (chosen - wanted).abs().max() < 1e-12, "pairs that are the wrong way round must weigh most"
    assert (rejected + wanted).abs().max() < 1e-12, "what lifts the chosen must press the rejected"


def test_losses_by_hand():
    given = [torch.tensor([x], dtype=torch.float64) for x in (-1.0, -3.0, -2.0, -2.0)]  # h = 1 - (-1) = 2
    found = {name: loss(*given, 0.5)[0].item() for name, loss in dpo.LOSSES.items()}
    right, wrong = 0.31326168751822286, 1.3132616875182228  # log(1 + 1/e), log(1 + e)
    assert found == pytest.approx({"dpo": right, "cdpo": 0.9 * right + 0.1 * wrong, "ipo": 1.0}, abs=1e-12)
    assert dpo.dpo_loss(*given, 0.5)[1].tolist() == [[0.5], [-0.5]], "the chosen rose, the other fell"
    same = [t - 700 for t in (given[0], given[1])] * 2  # π = π_ref
    assert dpo.dpo_loss(*same, 0.5)[0].item() == pytest.approx(math.log(2), abs=1e-12), "ln 2 at the start"
    assert dpo.ipo_loss(*same, 0.25)[0].item() == pytest.approx(4), "h is 0 and shall become 1 / (2β) = 2"


def test_swapped_sides_are_noticed():
    pc, pr, rc, rr = (torch.tensor(x).double() for x in ([-1, -2], [-3, -3], [-2, -2], [-2, -2]))
    for name, loss_of in dpo.LOSSES.items():
        (loss, rewards), (other, turned) = loss_of(pc, pr, rc, rr, 0.5), loss_of(pr, pc, rr, rc, 0.5)
        assert other > loss + 0.1, f"{name}: the loss does not tell the chosen from the rejected"
        assert (rewards[0] > rewards[1]).all() and (turned[0] < turned[1]).all(), f"{name}: rewards"


def by_hand(model: GPT, messages: list[dict], answer: str) -> float:
    """log π of an answer: a space, its letters, its end, one after the other, each from its own prompt."""
    ids, total = chat_prompt(TOKENIZER, messages), 0.0
    for token in [*f" {answer}".encode(), END]:
        logits = model(torch.tensor([ids]))[0, -1]
        total += (logits[token] - logits.exp().sum().log()).item()
        ids.append(token)
    return total


def test_log_probs_are_the_sum_over_the_answer_and_its_end(exact):
    """The batch holds answers of many lengths, and a conversation in which the assistant spoke before."""
    found = dpo.all_log_probs(model := make(), encode(), "cpu")
    assert found.shape == (3, 2) and not found.requires_grad, "(N, 2), and nothing to differentiate"
    for (messages, *answers), row in zip(PAIRS, found.tolist()):
        wanted = [by_hand(model, messages, answer) for answer in answers]
        assert row == pytest.approx(wanted, abs=1e-10), f"{answers}: {row} is by hand {wanted}"


def test_all_equal_one_by_one(exact):
    model, pairs = make(), encode(PAIRS * 15)  # more than one batch
    alone = [dpo.answer_log_probs(model, *dpo.pad([side], "cpu")) for pair in pairs for side in pair]
    difference = (dpo.all_log_probs(model, pairs, "cpu") - torch.cat(alone).view(-1, 2)).abs().max()
    assert difference < 1e-10, f"in a batch the log-probs are off by {difference:.1e}, or in another order"


def test_a_longer_answer_is_less_likely(exact):
    """The mean would find both equally likely, so that lengths cost nothing, and answers degenerate."""
    model = make()
    model.head.weight.data.zero_()  # all tokens are equally likely
    found = dpo.all_log_probs(model, encode([(said(("user", "Hi")), "a" * 30, "a")]), "cpu")[0].tolist()
    wanted = [-32 * math.log(262), -3 * math.log(262)]
    assert found == pytest.approx(wanted, abs=1e-9), "a space, 30 letters or one, and the end"


def test_the_mask_is_on_the_answer_and_what_is_cut_is_the_beginning():
    (ids, mask), _ = encode()[2]
    assert TOKENIZER.decode([i for i, one in zip(ids, mask) if one]) == " d<|end|>", "more than the answer"
    pair = (said(("user", "u" * 40)), "no", "yes")
    sides, _ = dpo.encode_pair(TOKENIZER, pair, 16)
    prompts = [[i for i, one in zip(*side) if not one] for side in sides]
    assert prompts[0] == prompts[1], "each side was cut for itself: the two answers have different prompts"
    for (ids, mask), answer in zip(sides, pair[1:]):
        text, n = TOKENIZER.decode(ids), len(answer) + 2
        assert text.startswith("<|endoftext|>uu") and len(ids) <= 16, f"not the oldest tokens are cut: {text}"
        assert text.endswith(f"uu<|end|><|assistant|> {answer}<|end|>"), f"the answer is cut: {text}"
        assert mask == [0] * (len(ids) - n) + [1] * n, "the mask did not move with what was cut"


def test_an_answer_that_leaves_its_prompt_no_room():
    pair = (said(("user", "u" * 40)), "no", "yes" * 20)
    with pytest.raises(chain.UserError, match="60 signs"):
        dpo.encode_pair(TOKENIZER, pair, 16)
    sides, _ = dpo.encode_pair(TOKENIZER, (pair[0], "no", "y" * 12), 16)
    assert TOKENIZER.decode(sides[1][0]) == "<|endoftext|><|assistant|> " + "y" * 12 + "<|end|>"
    with pytest.raises(chain.UserError, match="13 signs"):  # the text would begin with the answer
        dpo.encode_pair(TOKENIZER, (pair[0], "no", "y" * 13), 16)


def test_filling_up_changes_nothing(exact):
    model, (ids, mask) = make(), batch()
    behind = torch.arange(ids.shape[1]) > mask.cumsum(dim=1).argmax(dim=1, keepdim=True)  # after the end
    assert behind.any() and mask[behind].sum() == 0, "filling up is counted"
    before, after = (dpo.answer_log_probs(model, x, mask) for x in (ids, ids.masked_fill(behind, END)))
    assert (before - after).abs().max() < 1e-12, "what a row is filled up with changes an answer"


def test_kl_is_the_formula_and_nothing_at_the_start(exact):
    model, start, (ids, mask) = make(), make(), batch()
    assert abs(dpo.kl_divergence(model, start, ids, mask)) < 1e-12, "a model is not away from itself"
    model.head.weight.data += 0.1 * torch.randn_like(model.head.weight)
    p, q = (each(ids).softmax(dim=-1) for each in (model, start))  # (B, T, V)
    wanted = [(p[b, t - 1] * (p[b, t - 1] / q[b, t - 1]).log()).sum() for b, t in mask.nonzero().tolist()]
    found = dpo.kl_divergence(model, start, ids, mask)
    assert found == pytest.approx(sum(wanted).item() / len(wanted), abs=1e-10), "the mean over answer tokens"
    assert found > 0.01, "a model that moved has no KL"


@pytest.mark.parametrize("loss", dpo.LOSSES)
def test_fit_makes_the_chosen_likelier_and_leaves_the_reference(loss, monkeypatch):
    model, start, pairs, texts = make().float(), make().float(), encode(), []
    c = config(loss=loss, beta=0.1, epochs=30)
    before = (reference := dpo.all_log_probs(start, pairs, "cpu")).clone()
    monkeypatch.setattr(chain.Clock, "tick", lambda self, step, text: texts.append(text))
    dpo.fit(model, pairs, reference, c)
    h = (dpo.all_log_probs(model, pairs, "cpu") - reference) @ torch.tensor([1.0, -1.0])
    assert h.min() > 1, f"the chosen did not gain on the rejected: {h.tolist()}"
    first = {"dpo": math.log(2), "cdpo": math.log(2), "ipo": 25}[loss]  # h = 0, β = 0.1
    assert f"loss {first:.4f}" in texts[0], f"the loss at step 0 is not that of π = π_ref: {texts[0]}"
    assert torch.equal(reference, before), "the reference's log-probs were written to"
    assert all(map(torch.equal, start.parameters(), make().float().parameters())), "the reference moved"
    assert all(p.grad is None for p in start.parameters()), "the reference got a gradient"
    found, turned = (dpo.measure(model, start, [pair[::way] for pair in pairs],
                                 reference[:, [0, 1][::way]], c) for way in (1, -1))
    assert found.keys() == METRICS and found["reward_accuracy"] == 1 and found["kl"] > 0, found
    assert turned["reward_accuracy"] < 0.5 and turned["reward_margin"] < 0, "swapped sides look just as good"


def test_fewer_pairs_than_a_batch_are_learned_too():
    model, pairs = make().float(), encode()
    dpo.fit(model, pairs, reference := dpo.all_log_probs(model, pairs, "cpu"), config(batch_size=16))
    moved = (dpo.all_log_probs(model, pairs, "cpu") - reference).abs().max()
    assert moved > 0, "not one step was made, and nothing was said"


@pytest.mark.parametrize("keep", [0.0, 0.25, 1.0])
def test_the_weights_go_back_a_part_of_the_way(keep):
    model, start = make().float(), GPT(SMALL)
    ends = {name: p.detach().clone() for name, p in model.named_parameters()}
    firsts = {name: p.detach().clone() for name, p in start.named_parameters()}
    dpo.go_back(model, start, keep)
    for name, p in model.named_parameters():
        wanted = torch.lerp(firsts[name].double(), ends[name].double(), keep).float()
        exact = torch.equal(p, wanted) if keep in (0, 1) else torch.allclose(p, wanted, atol=1e-7)
        assert exact, f"{name}: {keep} of the way from the start is not where it ended"
        assert torch.equal(start.get_parameter(name), firsts[name]), f"{name}: the start moved"


def test_main_from_one_assistant_to_the_next(chat, tmp_path, monkeypatch):
    references, measure = [], dpo.measure
    monkeypatch.setattr(dpo, "measure", lambda *given: references.append(given[1]) or measure(*given))
    metrics = dpo.main(chat)
    assert metrics.keys() == METRICS and all(map(math.isfinite, metrics.values())), metrics
    assert metrics["preference_loss"] < math.log(2) and metrics["reward_accuracy"] == 1, metrics
    old, new = (chain.load_checkpoint(tmp_path / f"out/{name}.pt") for name in ("sft", "dpo"))
    assert new["chat"] is True and new["step"] == 7 and new["config"] == old["config"], "no assistant"
    assert not torch.equal(*(each["weights"]["head.weight"] for each in (old, new))), "nothing was learned"
    for name, weight in references[-1].named_parameters():
        assert torch.equal(weight, old["weights"][name]), f"the reference is not frozen: {name} moved"
        assert not weight.requires_grad, f"the reference would be trained: {name}"
    dpo.main([*chat, "--keep", "0"])
    kept = chain.load_checkpoint(tmp_path / "out/dpo.pt")["weights"]
    assert all(torch.equal(kept[name], old["weights"][name]) for name in kept), "--keep 0 is not the start"


def test_a_loss_that_is_no_number_writes_nothing(chat, tmp_path, monkeypatch, fails):
    monkeypatch.setitem(dpo.LOSSES, "ipo", lambda *given: (given[0].sum() * math.nan, torch.zeros(2, 4)))
    line = fails(dpo.main, [*chat, "--loss", "ipo"])
    assert "step 0: loss nan" in line and "--learning_rate" in line, line
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sft.pt"], "something was written"


@pytest.mark.parametrize("flags,says", [
    (["--beta", "0"], "--beta 0"), (["--beta", "nan"], "--beta nan"), (["--pairs", "0"], "--pairs 0"),
    (["--epochs", "0"], "--epochs 0"), (["--questions", "-1"], "--questions -1"),
    (["--batch_size", "-1"], "batch_size -1"), (["--learning_rate", "0"], "--learning_rate 0"),
    (["--keep", "1.5"], "--keep 1.5"), (["--keep", "nan"], "--keep nan"), (["--loss", "ppo"], "ppo"),
    (["--checkpoint", "none.pt"], "python sft.py"), (["--data", "none.jsonl"], "none.jsonl")])
def test_bad_flags(chat, fails, flags, says):
    assert says in fails(dpo.main, chat + flags)


def test_bad_text_and_a_model_that_is_no_assistant(chat, tmp_path, fails):
    save(tmp_path / "out/base.pt")
    line = fails(dpo.main, [*chat, "--checkpoint", tmp_path / "out/base.pt"])
    assert "base.pt" in line and "python sft.py" in line, line
    (tmp_path / "my.jsonl").write_text('{"prompt": "Hi", "chosen": "a", "rejected": "b"}\n{"prompt": "Hi"}\n')
    assert "my.jsonl, line 2: it lacks 'chosen'" in fails(dpo.main, chat)
    save(tmp_path / "out/sft.pt", quantize_model(GPT(SMALL), 8), chat=True, bits=8)
    assert "weights of 8 bits" in fails(dpo.main, chat)
    (tmp_path / "out/sft.pt").unlink()
    assert "python sft.py" in fails(dpo.main, chat), "before sft.py the way out is not named"
