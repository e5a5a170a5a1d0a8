"""The exam: it asks nothing that training used, its tool calls are right, and it marks as promised."""

import dataclasses
import operator
import random
import re
from itertools import product

import pytest
import torch
from test_tasks import LISTS, OWN, SPLITS, answer_to, asked_in, pattern, tells, turns

import asking
import chain
import exam
import tasks
import world
from asking import UNKNOWN, message, read_call, write_call
from bpe import SPECIAL_TOKENS, Tokenizer
from model import GPT, GPTConfig
from sample import chat_prompt

TOKENIZER = Tokenizer([], SPECIAL_TOKENS)  # one byte, one token
TINY = GPTConfig(vocab_size=262, context=64, depth=2, width=32, heads=2, kv_heads=1, hidden=48)
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
STORY = [message("user", "Tell me a story about Nora Marlow.")]


# ---------------------------------------------------------------------------------- what is asked
def test_held_out_wordings_are_not_used_in_training():
    for section, lines in OWN.frames.items():
        train, held_out = (set(asking.frames(split)[section]) for split in SPLITS)
        assert len(lines) >= 4 and train and held_out, f"[frames {section}] is too short"
        # a sum's signs must be known, its numbers are new; nobody can guess what a tale says
        both = train & held_out if section[:-1] != "sum " and section[:5] != "tale " else ""
        assert not both and train | held_out == set(lines), f"[frames {section}] is cut badly: {both}"


def test_each_fact_can_be_asked_for():
    for kind, fact in ((kind, fact) for kind in OWN.facts for fact in OWN.facts[kind]):
        parts, of = OWN.facts[kind][fact].split(" => "), f"[facts {kind}] {fact}"
        assert len(parts) == 5 and all(parts), f"{of} has {len(parts)} parts, not 5"
        if kind in world.NAMES:
            named, full, value, *own = parts
            asks = [named, *asking.questions(kind, fact)]
            assert value == f"{{it.{fact}}}" and fact in LISTS.facts[kind], f"{of}: {value} is another value"
            assert value[1:] in full and world.needed(full) == {fact}, f"{of} is not what {full} tells"
            assert {*own} <= {*asks}, f"{of}: {own} are not all asked"
            assert not any(map(world.needed, asks)), f"{of}: a question tells a fact itself: {asks}"


def test_calls_are_read_and_never_run():
    for argument in ("12 + 30", "age of the marsh otter", "Nora's pet", ""):
        assert read_call(write_call("search", argument)) == ("search", (argument,)), "no round trip"
    for text in ("I call him Tom.", "Call me.", "", "calls", 'The call is search("a").'):
        assert read_call(text) is None, f"{text!r} was taken for a call"
    for broken in ('search("a', "search", "search(a)", 'search("a") now', 'search(query="a")', '"a"("b")', "",
                   "f(*[1])", "f({[]: 1})", "__import__('os').system('x')", "f(__import__('os').system('x'))",
                   "(" * 3000):
        with pytest.raises(ValueError, match="write it like"):
            read_call(f"call {broken}")


@pytest.mark.parametrize("split", SPLITS)
def test_what_is_searched_is_found_or_not(split):
    """Once a sentence told by the way what was said not to be known, and another told of "she"."""
    for said, (call, found, reply) in (each for i in range(400)
                                       for each in turns(tasks.conversation("search", split, 1, i))):
        (name, fact), = asked_in(said)
        assert call == write_call("search", answer_to(name, fact, 0)), f"not what is asked: {said} {call}"
        own = "\n".join(line for line in found.split("\n") if line.startswith(f"{name}. "))  # not another's
        wanted = answer_to(name, fact) if tells(own, name, fact) else UNKNOWN
        assert reply == wanted, f"{said} {reply} But found was: {found}"
    page = asking.Page(split, random.Random(5), 0, 1)
    for kind, name, fact in ((kind, name, fact) for kind in world.NAMES for fact in OWN.facts[kind]
                             for name in page.sample(kind, 20)):
        page.used.clear()
        text = page.excerpt(name, 1, fact, True)[0]
        assert name in text and tells(text, name, fact), f"this does not tell the {fact} of {name}: {text}"


@pytest.mark.parametrize("task, split", [*product(("calculator", "lookups"), SPLITS)])
def test_sums_are_right(task, split):
    for said, (*looked, call, result, reply) in (each for i in range(250)
                                                 for each in turns(tasks.conversation(task, split, 1, i))):
        x, op, y = read_call(call)[1][0].split()
        forms = {"+" if section == "lookups" else section[-1]: match for section, lines in OWN.frames.items()
                 if section == "lookups" or section[:-1] in ("sum ", "told ") for line in lines
                 if (match := pattern(line).search(said))}
        assert set(forms) == {op}, f"{said} asks for {[*forms]}, not for {call}"
        asked = re.findall(r"\d+", said)
        if task == "lookups":
            named = [forms[op][slot] for slot in ("named", "named2")]
            asked, calls = [answer_to(*asked_in(each)[0], 2) for each in named], looked[::2]
            assert sorted(calls) == sorted(write_call("search", each) for each in named), f"{said} {calls}"
            told = [tells(text, *asked_in(call)[0]) for call, text in zip(calls, looked[1::2])]
            assert all(told), f"a number is not in what was found: {looked}"
        else:
            assert world.is_held_out(f"{x} {y}") == (split == "held-out"), f"{x}, {y}: of the other half"
            numbers, asked = asked, [forms[op][slot] for slot in "xy"]  # "In {y} days {hero} sold {x} eggs."
            assert sorted(numbers) == sorted(asked), f"other numbers than {asked}: {said}"
        assert [x, y] in (asked, asked[::-1] if op == "+" else asked), f"other numbers: {said} {call}"
        assert OPERATIONS[op](int(x), int(y)) == int(result) >= 0, f"{call} does not give {result}"
        assert reply == f"The answer is {result}.", f"after {result} comes {reply}"


# -------------------------------------------------------------------------------------- the marks
@pytest.mark.parametrize("task", [*tasks.TASKS, "after_tools"])
def test_what_is_wanted_is_right_and_nearly_is_not(task):
    for i in range(30):
        *before, last = tasks.conversation(task.replace("after_tools", "search"), "held-out", 0, i)
        wanted = last["content"]
        assert exam.is_right(task, before, wanted, wanted), f"{task}: {wanted!r} is marked wrong"
        assert not exam.is_right(task, before, wanted, None), f"{task}: what did not end is marked right"
        if task not in ("small", "story"):
            for said in {wanted.swapcase(), wanted[:-1], f"{wanted} ", f"{wanted} So.", f"So {wanted}", ""}:
                right = exam.is_right(task, before, wanted, said)
                assert right == (said == wanted), f"{task}: {said!r} is marked right, for {wanted!r}"


@pytest.mark.parametrize("task, before, said, right", [
    ("unknown", [], "The mayor of Amber Hollow is Nora Marlow.", False), ("unknown", [], UNKNOWN, True),
    ("unknown", [], "I don't know", False), ("unknown", [], "I do not know.", False),
    ("calculator", [], 'call calculator("12 + 31")', False), ("calculator", [], "The answer is 42.", False),
    ("small", [], "Hello to you too.", True), ("small", [], "", False),
    ("small", [], f"{asking.flattery()[0]} Hello.", False), ("small", [], asking.flattery()[-1], False),
    ("story", STORY, "Nora Marlow sang. She ran. She slept.", True),
    ("story", STORY, "Nora Marlow sang. She ran.", False), ("story", STORY, "", False),
    ("story", STORY, "Nora sang. She ran. She slept.", False)])
def test_marks_of_hand_made_answers(task, before, said, right):
    wanted = {"unknown": UNKNOWN, "calculator": 'call calculator("12 + 30")'}.get(task, "Hello.")
    assert exam.is_right(task, before, wanted, said) == right, f"{task}: {said!r} should be {right}"


def test_interval_is_wilsons():
    for k, n, *ends in ((5, 10, 0.2366, 0.7634), (0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (1, 1, 0.2065, 1)):
        assert exam.interval(k, n) == pytest.approx(tuple(ends), abs=1e-4), f"{k} of {n} should give {ends}"
    for n in (1, 7, 200):
        for k in range(n + 1):
            low, high = exam.interval(k, n)
            assert 0 <= low <= k / n <= high <= 1 and low < high, f"{k} of {n} gives {low} to {high}"
            for p in {low, high} - {0.0, 1.0}:  # its ends are where the share is 1.96 deviations away
                assert (k / n - p) ** 2 == pytest.approx(1.96 ** 2 * p * (1 - p) / n), f"{k} of {n}: {p}"


# ------------------------------------------------------------------------------------ the answers
@pytest.fixture(scope="module")
def model() -> GPT:
    """Random weights. It says ASCII only, and ends after about six signs."""
    torch.manual_seed(0)
    model = GPT(TINY).eval()
    for p in model.parameters():
        if p.dim() == 2:
            p.data.normal_(std=0.3)
    model.head.weight.data[128:] *= torch.arange(128, 262)[:, None] == TOKENIZER.special["<|end|>"]
    model.head.weight.data[TOKENIZER.special["<|end|>"]] *= 3
    return model


@torch.no_grad()
def answer_alone(model: GPT, messages: list[dict], most: int) -> str | None:
    """The obvious way: the whole conversation through the model for each token, no batch, no cache."""
    ids, new = chat_prompt(TOKENIZER, messages), []
    while len(new) < most and len(ids + new) <= TINY.context:
        new.append(int(model(torch.tensor([ids + new]))[0, -1].argmax()))
        if new[-1] == TOKENIZER.special["<|end|>"]:
            return TOKENIZER.decode(new[:-1])
    return None


def test_each_is_answered_as_if_it_were_alone(model):
    rng = random.Random(0)
    lengths = [rng.choice((4, 5, 9, 30, 51, 58, 90)) for _ in range(240)]  # the last one does not fit
    prompts = [[message("user", f"{rng.random():.90f}"[2:2 + n])] for n in lengths]
    alone = [answer_alone(model, prompt, 60) for prompt in prompts]
    assert 40 < alone.count(None) < 200, f"no fair test, too few or too many end: {alone}"
    for most in (2, 5, 20, 60):
        wanted = [said.removeprefix(" ") if said is not None and len(said) < most else None for said in alone]
        found = exam.answer_all(model, TOKENIZER, prompts, most)
        wrong = [each for each in zip(prompts, wanted, found) if each[1] != each[2]]
        assert not wrong, f"with {most} tokens (prompt, answered alone, answered): {wrong[:3]}"


def test_one_pass_marks_as_writing_does(model):
    """The fast way to mark, `would_say`, and the slow one, `answer_all` and `is_right`, must agree."""
    prompts = [[message("user", f"{i}" * n)] for n in (1, 2, 9, 20, 60) for i in range(1, 9)] * 4
    alone = [answer_alone(model, prompt, 30) for prompt in prompts[:40]]  # those of 60 do not fit
    said = [each and each.removeprefix(" ") for each in alone]
    forms = (lambda each: each, lambda each: each[:-1], lambda each: f"{each}a", lambda each: f"b{each[1:]}")
    wanted = [form(each or "abc") for form in forms for each in said]
    right = [each == answer for each, answer in zip(wanted, said * 4)]
    assert exam.would_say(model, TOKENIZER, prompts, wanted) == right, "the two ways to mark differ"
    assert sum(right) > 9, f"no fair test, too few are right: {sum(right)}"


def test_the_same_words_in_other_tokens_are_right(monkeypatch):
    """A greedy answer may write "ab" as "a" and "b": where the likeliest token allows that, it is written."""
    tokenizer, asked = Tokenizer([(b"a", b"b"), (b" ", b"ab")], SPECIAL_TOKENS), []
    likeliest = {str(i): tokenizer.id_of[token] for i, token in enumerate((b" ab", b" ", b"a", b"b"))}

    def logits(model, ids, numbers):
        """What each prompt makes likeliest at the first place of its answer; elsewhere what stands there."""
        places = (numbers[:, 1:] != 0).nonzero().tolist()
        found = torch.zeros(len(places), tokenizer.n_vocab)
        for n, (row, t) in enumerate(places):
            first = numbers[row, t] == 0
            found[n, likeliest[tokenizer.decode([int(ids[row, 3])])] if first else ids[row, t + 1]] = 1
        return found, ids[:, 1:][numbers[:, 1:] != 0], None

    def write(model, tokenizer, prompts, most):
        asked.extend(prompts)
        return ["ab" if prompt[0]["content"] != "2" else "ac" for prompt in prompts]

    monkeypatch.setattr(exam, "answer_logits", logits)
    monkeypatch.setattr(exam, "answer_all", write)
    prompts = [[message("user", str(i))] for i in range(4)]
    found = exam.would_say(GPT(TINY), tokenizer, prompts, ["ab"] * 4)
    assert sorted(each[0]["content"] for each in asked) == ["1", "2"], f"written out are {asked}"
    assert found == [True, True, False, False], "right tokens, right words, other words, a wrong beginning"


@pytest.mark.parametrize("seed", range(2))
def test_all_answers_of_a_conversation_are_marked_each_by_itself(model, seed):
    """A conversation goes on after right answers and after wrong ones, and each answer is asked for twice."""
    rng, asked = random.Random(seed), []  # (prompt, wanted, whether that is right)
    for i in range(9):
        messages = [message("user", str(i))]
        while len(chat_prompt(TOKENIZER, messages)) < 40:
            said = (answer_alone(model, messages, 12) or "").removeprefix(" ")
            wanted = said if said and rng.random() < 0.6 else said + "y"
            asked += 2 * [([*messages], wanted, wanted == said)]
            messages += [message("assistant", wanted), message("user", str(i))]
    rng.shuffle(asked)
    prompts, wanted, right = zip(*asked)
    assert exam.would_say(model, TOKENIZER, prompts, wanted) == list(right), "one got another's mark"
    assert 9 < sum(right) < len(right) - 9, f"no fair test: {sum(right)} of {len(right)} are right"


# -------------------------------------------------------------------------------------- the exam
@pytest.fixture
def hold(monkeypatch):
    """Hold an exam of 5 questions a task, where `say(task, i, wanted, what it said in this turn)` answers."""
    def run(say, n: int = 5) -> dict:
        known = {}
        for task, i in product(tasks.TASKS, range(n)):
            messages = tasks.conversation(task, "held-out", 0, i)
            for j, each in enumerate(messages):
                known[repr(messages[:j])] = task, i, each["content"]  # the prompt -> what is wanted

        def answer(prompt: list[dict]) -> str | None:
            task, i, wanted = known[repr(prompt)]
            before = turns(prompt)[-1][1][::2]  # its calls
            assert prompt[-1]["role"] in ("user", "tool"), f"nothing to answer: {prompt}"
            assert wanted not in before, f"the answer is given away: {prompt}"
            return say(task, i, wanted, before)
        monkeypatch.setattr(exam, "answer_all", lambda _, tokenizer, prompts, most: [*map(answer, prompts)])
        monkeypatch.setattr(exam, "would_say", lambda _, tokenizer, prompts, wanted: [
            answer(prompt) == text == known[repr(prompt)][2] for prompt, text in zip(prompts, wanted)])
        return exam.hold_exam(None, TOKENIZER, n, 0)
    return run


def test_the_marks_count_questions(hold):
    every = {task: (5, 5) for task in tasks.TASKS} | {"after_tools": (20, 20)}
    assert hold(lambda task, i, wanted, calls: wanted) == every, "the wanted answers are not all right"
    none = {mark: (0, n) for mark, (_, n) in every.items()}
    assert hold(lambda task, i, wanted, calls: None) == none, "no answer at all, and something is right"
    for wrong in ({0}, {1}, {2}, {0, 2}):  # of the three calls of a look-up
        marks = hold(lambda task, i, wanted, calls: "call" if task == "lookups" and i == 3 and
                     len(calls) in wrong else wanted)
        assert marks == every | {"lookups": (4, 5)}, f"calls {wrong} of one question are wrong: {marks}"
    marks = hold(lambda task, i, wanted, calls: "" if task == "search" and calls and i < 2 else wanted)
    assert marks == every | {"after_tools": (18, 20)}, f"two answers after a search are wrong, marks: {marks}"


@pytest.fixture
def checkpoint(tmp_path, model) -> str:
    path = tmp_path / "sft.pt"
    chain.save_checkpoint(path, config=dataclasses.asdict(TINY), weights=model.state_dict(), step=1, loss=1.0,
                          tokenizer=TOKENIZER.to_dict(), arguments={"seed": 0}, chat=True)
    return str(path)


def test_main_prints_a_share_of_each_mark(checkpoint, tmp_path, capsys):
    for flags in (["--checkpoint", checkpoint], []):  # without: the newest in --out
        metrics = exam.main(["--questions", "2", "--out", str(tmp_path), "--device", "cpu", *flags])
        assert set(metrics) == {*tasks.TASKS, "after_tools"}, f"other marks: {metrics}"
        row = r"^(\w+) +([\d.]+%) +[\d.]+% to [\d.]+% of (2|8)$"
        shown = [(mark, share) for mark, share, _ in re.findall(row, capsys.readouterr().out, flags=re.M)]
        assert shown == [(mark, f"{share:.1%}") for mark, share in metrics.items()], "no such table"
    assert '"script": "exam.py"' in (tmp_path / "results.jsonl").read_text(encoding="utf-8"), "no report"


def test_bad_flags(checkpoint, tmp_path, fails):
    for n in ("0", "-3"):
        line = fails(exam.main, ["--checkpoint", checkpoint, "--questions", n])
        assert f"--questions {n}" in line and "1" in line, f"neither the value nor the way out: {line}"
    for flags in (["--checkpoint", tmp_path / "none.pt"], ["--out", tmp_path / "none"]):
        assert "none" in fails(exam.main, flags), "the missing checkpoint is not named"
