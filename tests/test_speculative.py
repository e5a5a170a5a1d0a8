"""speculative.py: the law of what comes out, by enumeration; greedy the same text; every trap; bad flags."""

import dataclasses
from itertools import product
from pathlib import Path

import pytest
import torch

import chain
import decode
import drafts
import sample
import speculative
from bpe import SPECIAL_TOKENS, Tokenizer
from decode import filter_logits, generate
from drafts import ModelDraft, NgramDraft, chain_guesses
from model import GPT, GPTConfig
from speculative import Rounds, accept, agree, all_logits, speculate, tokens_a_round

TINY = GPTConfig(vocab_size=4, context=12, depth=2, width=16, heads=2, kv_heads=1, hidden=16)
P = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.4, 0.1]], dtype=torch.float64)
Q = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)


def make(seed: int, **shape) -> GPT:
    torch.manual_seed(seed)
    model = GPT(dataclasses.replace(TINY, **shape)).double().eval()
    for p in model.parameters():
        p.data += 0.4 * torch.randn_like(p)
    return model


def write(model, draft, n: int, ids, tokens: int, rounds=None, **options) -> list[int]:
    stream = speculate(model, draft, torch.tensor([ids]), tokens, rounds or Rounds(n), **options)
    return [int(new) for new, _ in stream]


def plain(model, ids, tokens: int) -> list[int]:
    return [int(new) for new, _ in generate(model, torch.tensor([ids]), tokens, temperature=0)]


def chi_square(counts: torch.Tensor, law: torch.Tensor) -> float:
    expected = law.flatten() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("q", [Q[0], torch.eye(4)[1].double()], ids=["a model's law", "certain, as look-up"])
def test_one_round_has_the_law_of_the_model_by_enumeration(q):
    """The first token's law: sum over guesses of q · (accepted: the guess; rejected: the rest's law) is p."""
    accepted = torch.minimum(P[0], q)
    rest = (P[0] - q).clamp(min=0)
    law = accepted + (1 - accepted.sum()) * rest / rest.sum()
    assert (law - P[0]).abs().max() < 1e-12
    draws, n, counts = torch.Generator().manual_seed(0), 8_000, torch.zeros(4)
    for guess in torch.multinomial(q, n, replacement=True, generator=draws):
        k, token = accept(P[:2], q[None], guess[None], draws)
        counts[guess if k else token] += 1
    assert chi_square(counts, P[0]) < 16.3, f"{counts / n} is not {P[0]}: 3 degrees of freedom, p < 0.001"


def test_the_first_two_tokens_have_the_models_joint_law():
    draws, n, counts = torch.Generator().manual_seed(1), 5_000, torch.zeros(4, 4)
    model, draft = make(0), make(5)
    prompt = torch.tensor([[1, 2]])
    with torch.no_grad():
        first = model(prompt)[0, -1].softmax(-1)
        second = torch.stack([model(torch.tensor([[1, 2, i]]))[0, -1].softmax(-1) for i in range(4)])
        q = [draft(prompt)[0, -1].softmax(-1)]
        q += [torch.stack([draft(torch.tensor([[1, 2, i]]))[0, -1].softmax(-1) for i in range(4)])]
        third = torch.stack([model(torch.tensor([[1, 2, i, j]]))[0, -1].softmax(-1)
                             for i, j in product(range(4), range(4))]).view(4, 4, 4)
    for _ in range(n):  # the rounds of `speculate`, from tables
        i = torch.multinomial(q[0], 1, generator=draws)
        j = torch.multinomial(q[1][i[0]], 1, generator=draws)
        p = torch.stack([first, second[i[0]], third[i[0], j[0]]])
        k, token = accept(p, torch.stack([q[0], q[1][i[0]]]), torch.cat([i, j]), draws)
        made = torch.cat([i, j])[:k].tolist() + token.tolist()
        if len(made) == 1:  # the next round begins after the one token
            made += torch.multinomial(second[made[0]], 1, generator=draws).tolist()
        counts[made[0], made[1]] += 1
    chi2 = chi_square(counts.flatten(), (first[:, None] * second))
    assert chi2 < 37.7, f"chi-square {chi2:.1f} with 15 degrees of freedom: p < 0.001"


@pytest.mark.parametrize("draft,filters", [("model", {}), ("ngram", {}), ("model", {"top_p": 0.8}),
                                           ("model", {"temperature": 0.7, "top_k": 3}),
                                           ("compiled", {"top_p": 0.8})])
def test_what_is_written_has_the_models_law(draft, filters, not_compiled):
    """End to end, caches and all: three tokens, 64 texts, each as often as the model alone writes it."""
    model, other, n = make(0), make(5, depth=1), 500
    draws, counts, law = torch.Generator().manual_seed(2), torch.zeros(4, 4, 4), torch.zeros(4, 4, 4)
    prompt = [1, 2, 1]
    with torch.no_grad():
        for text in product(range(4), repeat=3):
            logits = model(torch.tensor([prompt + list(text)]))[0, 2:5]
            law[text] = torch.stack([filter_logits(row[None], **filters).softmax(-1)[0, i]
                                     for row, i in zip(logits, text)]).prod()
    for _ in range(n):
        compiled = draft == "compiled"
        guess = NgramDraft(4, "cpu") if draft == "ngram" else ModelDraft(other, compiled, **filters)
        counts[tuple(write(model, guess, 2, prompt, 3, generator=draws, compiled=compiled, **filters))] += 1
    possible = law > 1e-9
    assert counts[~possible].sum() == 0, "it wrote what the model's filters leave out"
    common = law * n > 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([law[common], law[~common].sum()[None]])
    kept = expected > 1e-6
    degrees = int(kept.sum()) - 1
    chi2 = chi_square(observed[kept], expected[kept])
    most = degrees + 3.3 * (2 * degrees) ** 0.5 + 4
    assert chi2 < most, f"chi-square {chi2:.1f}, {degrees} degrees of freedom: another law than the model's"


def test_guesses_have_the_drafts_law():
    """A race: the token whose Exp(1) time / probability is least is drawn from the law."""
    model, draws, counts = make(5, depth=1), torch.Generator().manual_seed(4), torch.zeros(4, 4)
    with torch.no_grad():
        first = (model(torch.tensor([[1, 2]]))[0, -1] / 3).softmax(-1)
        second = torch.stack([(model(torch.tensor([[1, 2, i]]))[0, -1] / 3).softmax(-1) for i in range(4)])
        for _ in range(1_600):
            (i, j), q = ModelDraft(model, temperature=3.0).guess([1, 2], 2, draws)
            assert (q[0] - first).abs().max() < 1e-6 and (q[1] - second[i]).abs().max() < 1e-6
            counts[i, j] += 1
    chi2 = chi_square(counts.flatten(), first[:, None] * second)
    assert chi2 < 37.7, f"chi-square {chi2:.1f} with 15 degrees of freedom: not drawn from q"


def test_greedy_agrees_as_certain_laws_accept():
    certain, draws = torch.eye(4)[[2, 0, 3]], torch.Generator().manual_seed(0)
    for guessed in product(range(4), repeat=2):
        guessed = torch.tensor(guessed)
        k, token = accept(certain, torch.eye(4)[guessed], guessed, draws)
        assert agree(5 * certain, guessed) == (k, token), f"guesses {guessed.tolist()}: not as `accept` does"


@pytest.fixture
def not_compiled(monkeypatch):
    """`compiled` means programs' shapes and caches. To compile them for real takes half a minute."""
    for module in (drafts, speculative):
        monkeypatch.setattr(module, "program", lambda function: function)


def test_programs_are_compiled_once(monkeypatch):
    """One form serves all rounds: also the first and the last, and those after which two tokens are new."""
    graphs = []
    torch._dynamo.reset()

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward
    programs = {function: torch.compile(function, backend=count, fullgraph=True, dynamic=False)
                for function in (chain_guesses, all_logits)}
    for module in (drafts, speculative):
        monkeypatch.setattr(module, "program", programs.get)
    model = make(0, context=32)
    for draft in (model, make(5, context=32)):
        for prompt in ([1], [1, 2, 3]):
            guess = ModelDraft(draft, compiled=True, temperature=0)
            found = write(model, guess, 3, prompt, 40, temperature=0, compiled=True)
            assert found == plain(model, prompt, 40)
    assert len(graphs) == 2, f"{len(graphs)} programs were compiled, not 2: a shape changes between rounds"


def test_drawing_from_p_after_a_rejection_has_another_law():
    """The trap: it must be seen by the chi-square of these tests."""
    accepted = torch.minimum(P[0], Q[0])
    wrong = accepted + (1 - accepted.sum()) * P[0]
    assert chi_square(wrong * 8_000, P[0]) > 16.3, "the test could not tell the wrong law"


def test_all_accepted_brings_one_token_more():
    k, token = accept(P, P[:2], torch.tensor([0, 3]), torch.Generator().manual_seed(0))
    assert k == 2, "a guess whose law is the model's own is always accepted"
    rounds = Rounds(3)
    model = make(0)
    assert len(write(model, ModelDraft(model), 3, [1], 8, rounds)) == 8
    assert rounds.accepted == [3, 3], "its own draft: 3 guesses bring 4 tokens, with the bonus token"
    frequencies = torch.zeros(4)
    draws = torch.Generator().manual_seed(0)
    for _ in range(2000):
        frequencies[accept(P, P[:2], torch.tensor([0, 3]), draws)[1]] += 1
    assert chi_square(frequencies, P[2]) < 16.3, "the bonus token is drawn from the law after the last guess"


@pytest.mark.parametrize("n", [1, 2, 5, 20])
@pytest.mark.parametrize("draft", ["self", "other", "ngram"])
@pytest.mark.parametrize("compiled", [False, True])
def test_greedy_writes_the_same_text(draft, n, compiled, not_compiled):
    model = make(0, context=32)
    other = make(5, context=32)
    guesses = {"self": lambda: ModelDraft(model, compiled, temperature=0),
               "other": lambda: ModelDraft(other, compiled, temperature=0),
               "ngram": lambda: NgramDraft(4, "cpu")}
    for prompt in ([1], [1, 2, 3, 1, 2], [0] * 31, [2] * 32):
        wanted = plain(model, prompt, 40)
        found = write(model, guesses[draft](), n, prompt, 40, temperature=0, compiled=compiled)
        assert found == wanted, f"{draft}, {n} guesses, a prompt of {len(prompt)}: {found}, not {wanted}"


def test_tokens_and_context_end_within_a_round():
    model = make(0)
    with pytest.raises(ValueError, match="13 tokens do not fit"):
        write(model, ModelDraft(model), 5, [1] * 13, 1)
    for tokens in range(1, 9):
        assert len(write(model, ModelDraft(model), 5, [1, 2], tokens)) == tokens, "the limit cuts a round"
    for length in range(1, 13):
        found = write(model, ModelDraft(model), 5, [1] * length, 100)
        assert len(found) == 13 - length, f"{length} tokens in a context of 12 leave room for {13 - length}"


def test_a_cache_that_is_not_rolled_back_is_noticed(monkeypatch):
    """The trap: keys of rejected guesses stay. The text must change, or the tests above see nothing."""
    model, draft = make(0, context=256), make(5, context=256)
    wanted = plain(model, [1, 2, 3], 25)

    class Stubborn(decode.KVCache):
        length = property(lambda self: self.n, lambda self, value: setattr(self, "n", max(value, getattr(
            self, "n", 0))))
    monkeypatch.setattr(decode, "KVCache", Stubborn)
    found = write(model, ModelDraft(draft, temperature=0), 4, [1, 2, 3], 25, temperature=0)
    assert found != wanted, "the text is the same, though keys of rejected guesses stay"


def test_the_count_of_tokens_follows_the_formula():
    """Laws that are everywhere the same, as the formula wants it: within three standard errors."""
    alpha, draws = float(torch.minimum(P[0], Q[0]).sum()), torch.Generator().manual_seed(3)
    p, q, brought = P[:1].expand(5, 4), Q[:1].expand(4, 4), []
    for _ in range(4000):
        guessed = torch.multinomial(Q[0], 4, replacement=True, generator=draws)
        brought.append(accept(p, q, guessed, draws)[0] + 1)
    brought = torch.tensor(brought).double()
    error = float(brought.std() / len(brought) ** 0.5)
    assert abs(float(brought.mean()) - tokens_a_round(alpha, 4)) < 3 * error
    rounds = Rounds(4, accepted=[int(k) - 1 for k in brought])
    assert abs(rounds.alpha - alpha) < 0.02, "the share of checked guesses that were accepted is α"


def test_look_up_prefers_the_longest_and_the_latest():
    look_up = NgramDraft.look_up
    assert look_up([7, 1, 2, 3, 8, 5, 2, 3, 9, 1, 2, 3]) == [8, 5, 2, 3, 9, 1, 2, 3], "3 tokens before 2"
    assert look_up([3, 5, 3, 6, 3])[:1] == [6], "the latest of equals"
    assert look_up([1, 1]) == [1] and look_up([4]) == [] and look_up([]) == []


@pytest.fixture
def checkpoints(tmp_path) -> Path:
    """base.pt, draft.pt, short.pt (a shorter context) and foreign.pt (another tokenizer)."""
    shape = GPTConfig(vocab_size=262, context=32, depth=1, width=32, heads=2, kv_heads=1, hidden=32)
    for name, context, pattern in (("base", 32, 0), ("draft", 32, 0), ("short", 16, 0), ("foreign", 32, 1)):
        config = dataclasses.replace(shape, context=context)
        torch.manual_seed(len(name))
        tokenizer = Tokenizer([(b"a", b"b")] if pattern else [], SPECIAL_TOKENS)
        config.vocab_size = tokenizer.n_vocab
        chain.save_checkpoint(tmp_path / f"{name}.pt", config=dataclasses.asdict(config), loss=5.5, step=0,
                              weights=GPT(config).state_dict(), tokenizer=tokenizer.to_dict(),
                              arguments={"seed": 0})
    return tmp_path


def test_the_door_reports_what_it_brought(checkpoints, capsys, monkeypatch):
    arrived, speed = [], sample.speed
    monkeypatch.setattr(sample, "speed", lambda *given: arrived.append(len(given[-1])) or speed(*given))
    argv = ["--out", str(checkpoints), "--device", "cpu", "--prompt", "ab", "--tokens", "12"]
    its_own = ["--draft", str(checkpoints / "base.pt"), "--n_draft", "4", "--temperature", "0"]
    metrics = sample.main([*argv, *its_own])
    assert metrics["accepted"] == 1 and metrics["tokens_a_round"] == 5 == metrics["tokens_a_round_by_formula"]
    assert arrived == [9], "start, 5 first tokens at once, 7 more: the first round's tokens count as free"
    text = capsys.readouterr().out.split("\n\n")[1].split("\n")[0]
    sample.main([*argv, "--temperature", "0"])
    assert capsys.readouterr().out.split("\n\n")[1].split("\n")[0] == text, "a draft changed the greedy text"
    assert "speed_up" in sample.main([*argv, "--draft", "ngram"])
    one = sample.main([*argv, "--draft", "ngram", "--tokens", "1"])
    assert "speed_up" not in one, "one token has no speed"


@pytest.mark.parametrize("flags,says", [
    (["--draft", "short.pt"], "16 tokens is shorter than the model's 32"),
    (["--draft", "foreign.pt"], "tokenizer"),
    (["--draft", "nowhere.pt"], "nowhere.pt: no such checkpoint; make the chain's with `make out/draft.pt`"),
    (["--draft", "ngram", "--n_draft", "0"], "--n_draft 0"),
    (["--draft", "ngram", "--n", "2"], "one text at a time"),
    (["--draft", "ngram", "--bench", "--compile"], "leave out --compile or --draft"),
    (["--draft", "ngram", "--repetition_penalty", "1.1"], "--repetition_penalty")])
def test_bad_flags(checkpoints, fails, monkeypatch, flags, says):
    monkeypatch.chdir(checkpoints)
    assert says in fails(sample.main, ["--out", checkpoints, "--device", "cpu", *flags])


def test_the_measurement_runs(checkpoints, capsys, monkeypatch, not_compiled):
    monkeypatch.setattr(speculative, "compile_step", lambda device: decode.next_logits)
    argv = ["--out", str(checkpoints), "--device", "cpu", "--prompts", "2", "--tokens", "12"]
    metrics = speculative.main(argv)
    assert set(metrics) >= {"draft_all_greedy_speed_up", "ngram_lists_drawn_accepted",
                            "ngram_lists_drawn_tokens_a_pass"}
    table = capsys.readouterr().out.split("---")[0]
    assert table.count("100%\n") >= 4, "greedy, all texts are the same"
