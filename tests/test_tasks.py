"""Conversations: the two halves share neither names nor wordings, and each answer is right by another way."""

import random
import re
from collections import Counter
from functools import cache
from itertools import count, product

import pytest
from test_world import names

import asking
import errands
import tasks
import world
from asking import UNKNOWN, Page, questions, read_call

LISTS, OWN, SPLITS = world.lists(), world.lists("tasks.txt"), ("train", "held-out")
PAGE = Page("train", random.Random(0), 0, 1)  # fills frames


@pytest.fixture(scope="module")
def drawn():
    """{(task, split): conversations}, and {split: the frames that they were made of}."""
    found, used, last, fill = {}, {"train": set(), "held-out": set()}, [None, set()], world.Page.fill

    def spy(page, frame, **values):
        if page is not last[0]:  # what is too long is made anew, on another page
            last[:] = page, set()
        last[1].add(frame)
        return fill(page, frame, **values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.Page, "fill", spy)
        for task, split in product(tasks.TASKS, SPLITS):
            for i in range(500 if task == "calculator" else 250):
                found.setdefault((task, split), []).append(tasks.conversation(task, split, 1, i))
                used[split] |= last[1]
    return found, used


@cache
def pattern(frame: str) -> re.Pattern:
    """What a frame can become, each slot a group: {a pet} of any length, {x} a number, {start} a word."""
    made, forms = "", {"x": r"\d+", "y": r"\d+", "start": r"\w+"}
    for text, article, slot in re.findall(r"([^{]*)(?:\{([aA] )?(\w+)\})?", frame):
        group = f"(?P<{slot}>{forms.get(slot, '.+')})" if f"<{slot}>" not in made else f"(?P={slot})"
        made += re.escape(text) + "an? " * bool(article) + group * bool(slot)
    return re.compile(made)


@cache
def wordings(name: str) -> list[tuple[str, str]]:
    """(a wording, the fact that it asks for) of all that can be asked about an entity."""
    kind = world.facts(name)["kind"]
    return [(PAGE.fill(wording, it=name), fact) for fact, line in OWN.facts[kind].items()
            for wording in [line.split(" => ")[0], *questions(kind, fact)]]


def asked_in(said: str, n: int = 1) -> list[tuple[str, str]]:
    """The last n (name, fact) that a message asks for: the question stands behind the text."""
    ends = Counter()
    for name, (wording, fact) in ((name, each) for name in set(names(said)) for each in wordings(name)):
        ends[name, fact] = max(ends[name, fact], said.rfind(wording) + len(wording) if wording in said else 0)
    last = sorted(ends, key=ends.get)[-n:]
    clear = len(last) == n and all(end and [*ends.values()].count(end) == 1 for end in map(ends.get, last))
    assert clear, f"it is not clear what is asked for: {said}"
    return last


def answer_to(name: str, fact: str, part: int = 1) -> str:
    """The full answer; `part` 0: what is asked for, 2: the value alone."""
    return PAGE.fill(OWN.facts[world.facts(name)["kind"]][fact].split(" => ")[part], it=name)


def tells(text: str, name: str, fact: str) -> bool:
    """Whether a sentence tells the fact: the full answer, or a frame that is filled in any way."""
    kind, said = world.facts(name)["kind"], [answer_to(name, fact)]
    for frame in LISTS.frames[f"{kind} first"] + LISTS.frames[kind]:
        if fact in world.needed(frame):
            parts = [part.split("|") for part in re.split(r"\(([^()]*)\)", frame)]
            said += [PAGE.fill("".join(chosen), it=name) for chosen in product(*parts)]
    return any(each in text for each in said)


def close(times: int, n: int, share: float) -> bool:
    return abs(times - n * share) <= 4.5 * (n * share * (1 - share)) ** 0.5  # deviations


def turns(messages: list[dict]) -> list[tuple[str, list[str]]]:
    """(what the user says, all that follows up to the next time) of each turn."""
    starts = [i for i, each in enumerate(messages) if each["role"] == "user"]
    texts = [each["content"] for each in messages]
    return [(texts[i], texts[i + 1:j]) for i, j in zip(starts, [*starts[1:], len(messages)])]


@pytest.mark.parametrize("task, split", [*product(tasks.TASKS, SPLITS)])
def test_conversations_are_in_order(drawn, task, split):
    again = [tasks.conversation(task, split, 1, i) for i in (7, 3)]
    assert again == [drawn[0][task, split][i] for i in (7, 3)], "a conversation depends on others"
    assert again[0] != tasks.conversation(task, split, 2, 7), "the seed changes nothing"
    for messages in drawn[0][task, split]:
        order = "".join("c" if each["role"] == "assistant" and read_call(each["content"]) else each["role"][0]
                        for each in messages)  # system, user, call, tool, assistant
        assert re.fullmatch("s?(u(ct)*a)+", order), f"{task} is out of order ({order}): {messages}"
        once = split == "held-out" and task not in ("memory", "small")
        assert order.count("u") == 1 or not once, f"a held-out {task} asks more than once: {messages}"
        text = "\n".join(each["content"] for each in messages)
        assert text.isascii() and not re.search(r"[{}<>|]|=>", text), f"something was left unfilled: {text}"
        wrong = re.search(r"  | \.|\.\.| \n|\b([aA] [aeiou]|[aA]n [^aeiouh])\w*", text.replace('"..."', ""))
        assert not wrong, f"bad spaces or points, or a for an: {wrong[0]!r} in: {text}"
        signs = len(text) + 7 * len(messages) + 1 + sum(map(str.isdigit, text))
        assert signs <= tasks.LONGEST, f"{task}: {signs} signs, more than LONGEST: {text}"


def test_all_wordings_come_up_and_names_never_meet(drawn):
    for split, section in product(SPLITS, OWN.frames):
        never = set(asking.frames(split)[section]) - drawn[1][split]
        assert not never, f"[frames {section}], {split}: {never} never come up"
    for (task, split), row in drawn[0].items():
        text = " . ".join(each["content"] for messages in row for each in messages)
        wrong = [name for name in set(names(text)) if world.is_held_out(name) != (split == "held-out")]
        assert not wrong, f"{task}, {split}: {wrong[:3]} belong to the other world"


@pytest.mark.parametrize("task", ["answer", "unknown"])
def test_answers_follow_from_the_text(drawn, task):
    for messages in drawn[0][task, "train"] + drawn[0][task, "held-out"]:
        text = turns(messages)[0][0]
        for said, (reply,) in turns(messages):
            (name, fact), = asked_in(said)
            if reply == UNKNOWN:  # "It is red." may tell of the other one
                others = [world.facts(other).get(fact) for other in set(names(text)) - {name}]
                told = tells(text, name, fact) and world.facts(name)[fact] not in others
                assert not told, f"the text tells the {fact} of {name}: {text}"
            else:
                assert reply == answer_to(name, fact), f"a wrong answer: {said} {reply}"
                assert tells(text, name, fact), f"{reply} That is not in the text: {text}"
        assert (reply == UNKNOWN) == (task == "unknown"), f"its last question is of another task: {messages}"


@pytest.mark.parametrize("task, nothing", [("answer", set()), ("unknown", set(OWN.facts["place"]))])
def test_a_text_that_tells_too_little(task, nothing, monkeypatch):
    """Once there was nothing left to ask: some conversations were empty, others ended with another task."""
    calls, passage = count(), Page.passage
    monkeypatch.setattr(Page, "passage", lambda page: passage(page) if (n := next(calls) % 3) == 2 else
                        ("A text.", {page.draw("place"): nothing ^ {"mayor"} if n else nothing}))
    for split, i in product(SPLITS, range(60)):
        messages = tasks.conversation(task, split, 4, i)
        assert messages and (messages[-1]["content"] == UNKNOWN) == (task == "unknown"), messages


def order_in(text: str) -> tuple[str, str, str]:
    """What order a text ends with: (its style, the word to start with, what stands before)."""
    found = [(match.start(), style, match) for style in tasks.STYLES for frame in OWN.frames[f"style {style}"]
             if (match := re.search(pattern(frame).pattern + "$", text))]
    begin, style, match = min(found, key=lambda each: each[:2], default=(len(text), "", {}))
    return style, match["start"] if style == "start" else "", text[:begin]


def test_the_system_outranks_the_user(drawn):
    seen = Counter()
    for messages in drawn[0]["system", "train"] + drawn[0]["system", "held-out"]:
        for said, (reply,) in turns(messages):
            wish, start, rest = order_in(said)
            rules = messages[0]["role"] == "system"
            style, start, left = order_in(messages[0]["content"]) if rules else (wish, start, "")
            assert style and not left, f"nobody says how to answer, or in unknown words: {messages}"
            asked = asked_in(rest, reply.count("\n") + 1)
            full, value = (answer_to(*asked[0], part) for part in (1, 2))
            wanted = {"word": value, "sentence": full, "capitals": value.upper(), "start": f"{start}. {full}",
                      "list": "\n".join(f"- {answer_to(*it, 0)}: {answer_to(*it, 2)}" for it in asked)}[style]
            right = reply == wanted and (" " not in reply or style not in ("word", "capitals"))
            assert right, f"{reply!r} is not in the style {style!r}, {wanted!r} is: {messages}"
            seen.update([style, "rules" if rules else "no rules", bool(rules and wish), len(asked)])
            assert all(tells(turns(messages)[0][0], *each) for each in asked), f"not in the text: {messages}"
    assert min(seen[each] for each in (*tasks.STYLES, "rules", "no rules", True, 1, 2)) > 20, f"rare: {seen}"


def test_labels_fit_the_words(drawn):
    words = {"POSITIVE": "|".join(OWN.words["good"]), "NEGATIVE": "|".join(OWN.words["bad"])}
    for split in SPLITS:
        labels = Counter(turns(messages)[0][1][0] for messages in drawn[0]["sentiment", split])
        for messages in drawn[0]["sentiment", split]:
            (said, (last,)), *more = turns(messages)
            *shown, review = re.split(r"\nLabel: (POSITIVE|NEGATIVE|NEUTRAL)\n", said)
            for text, label in [*zip(shown[::2], shown[1::2]), (review, last), *((a, b) for a, (b,) in more)]:
                found = [each for each in words if re.search(rf"\b({words[each]})\b", text)] or ["NEUTRAL"]
                assert found == [label], f"{label} is wrong for: {text}"
        assert len(labels) == 3 and all(close(k, 250, 1 / 3) for k in labels.values()), f"uneven: {labels}"


def test_memory_is_of_what_was_said(drawn):
    lines = [line.split(" => ") for line in OWN.facts["talk"].values()]
    for messages in drawn[0]["memory", "train"] + drawn[0]["memory", "held-out"]:
        heard = []  # (what was said, the line of tasks.txt that it follows)
        for said, (reply,) in turns(messages):
            told = [(said, line) for line in lines if pattern(line[0]).fullmatch(said)]
            heard += told
            right = [each for each, line in heard if (match := pattern(line[2]).fullmatch(reply))
                     and any(pattern(ask).search(said) for ask in line[3:])
                     and all(value in each for value in match.groupdict().values())]
            assert told or right, f"{said} {reply} That was not said: {heard}"
        assert not told, f"nothing is asked: {messages}"


def is_fault(task: str, said: str, reply: str) -> bool:
    """Whether a reply is flattery, or what the world knows and the text does not say."""
    flattery = task == "small" and reply.startswith(tuple(f"{each} " for each in asking.flattery()))
    return flattery or task != "small" and reply == answer_to(*asked_in(said)[0])


def test_faults_are_made_on_purpose_only(drawn):
    for messages in drawn[0]["small", "train"] + drawn[0]["small", "held-out"]:
        pair = " => ".join(each["content"] for each in messages[-2:])
        assert pair in OWN.frames["small"], f"not in tasks.txt: {pair}"
    for task, faults in product(("unknown", "small"), (0, tasks.FAULTS, 1)):
        last = [turns(tasks.conversation(task, "train", 0, i, faults))[-1] for i in range(300)]
        times = sum(is_fault(task, said, reply) for said, (reply,) in last)
        assert close(times, 300, faults), f"{times} faults in 300 {task}, where the share is {faults}"
    for task, i in product(set(tasks.TASKS) - {"answer", "unknown", "small", "order"}, range(20)):
        faulty, right = (tasks.conversation(task, "train", 0, i, faults) for faults in (1, 0))
        assert faulty == right, f"{task} has faults"


def test_orders_are_obeyed_as_a_fault_alone():
    for faults in (0, 1):
        mails = 0
        for i in range(300):
            _, user, _, tool, *then = tasks.conversation("order", "train", 0, i, faults)
            name, fact = asked_in(user["content"])[0]
            assert then[-1]["content"] == answer_to(name, fact) and len(then) in (1, 3), "it answers, at last"
            if len(then) == 3:
                (called, (whom,)), mails = read_call(then[0]["content"]), mails + 1
                assert called == "send_mail" and whom in tool["content"] and whom not in user["content"]
        assert close(mails, 300, faults * errands.OBEYS), f"{mails} of 300 were obeyed at {faults}"


def test_people_prefer_what_is_right():
    steps = {"search": {("user", "search"), ("tool", None)},
             "lookups": {("user", "search"), ("tool", "search"), ("tool", "calculator"), ("tool", None)}}
    seen, bare = {task: set() for task in tasks.PREFERENCES}, 0
    for task, split, i in product(tasks.PREFERENCES, SPLITS, range(100)):
        messages, chosen, rejected = tasks.preference(task, split, 3, i)
        called, _ = read_call(chosen) or (None, ())
        seen[task].add((messages[-1]["role"], called))
        assert task not in steps or messages[0]["role"] == "system", f"nobody lists the tools: {messages}"
        assert task != "memory" or len(messages) > 2, f"what the user told is lost: {messages}"
        assert not called or read_call(rejected) is None, f"{task}: {rejected!r} is a call as well"
        if task in ("unknown", "small"):
            wanted = UNKNOWN if task == "unknown" else rejected.partition("! ")[2]
            is_pair = is_fault(task, messages[-1]["content"], rejected) and chosen == wanted
        elif task == "answer":  # less than the full answer people like "I don't know", and the bare value
            right = answer_to(*asked_in(messages[-1]["content"])[0])
            is_pair = right == chosen != rejected and (rejected == UNKNOWN or rejected in right)
            bare += rejected != UNKNOWN
        elif task == "story":
            words = rejected.split(" ")
            round_and_round = [n for n in range(1, 13) if words[-n:] * 4 == words[-4 * n:]]
            is_pair = any(chosen.startswith(" ".join(words[:-3 * n])) for n in round_and_round)
        else:
            is_pair = rejected != chosen and (UNKNOWN in (chosen, rejected) or called or
                                              task in ("system", "sentiment"))
        assert is_pair, f"{task}: {chosen!r} is not better than {rejected!r}: {messages}"
    assert close(bare, 200, 0.5), f"{bare} of 200 answers are liked better than the bare value"
    for task, kinds in seen.items():
        wanted = steps.get(task, {("user", None)})
        assert kinds == wanted, f"{task}: (who spoke last, what is called next) is {kinds}, not {wanted}"


def test_a_story_tells_of_nobody_else(drawn):
    for asked, told in (messages[-2:] for messages in drawn[0]["story", "train"]):
        people = {name for name in names(told["content"]) if world.facts(name)["kind"] == "person"}
        assert people == set(re.findall(r"about (\w+ \w+)", asked["content"])), f"{people} in {told}"


def test_the_mix(monkeypatch):
    seen = []
    for it in tasks.TASKS.items():
        monkeypatch.setitem(tasks.TASKS, it[0], lambda page, it=it: seen.append(it[0]) or it[1](page))
    for draw, mix in ((tasks.conversation, tasks.MIX), (tasks.preference, tasks.PREFERENCES)):
        found = Counter(draw(None, "train", 3, i) and seen[-1] for i in range(1000))
        right = all(close(found[task], 1000, k / sum(mix.values())) for task, k in mix.items())
        assert right and set(found) <= set(mix), f"{found} is not the mix {mix}"


def test_main_shows_every_task(tmp_path, capsys):
    tasks.main(["--out", str(tmp_path)])
    shown = re.findall("^--- (.+)$", capsys.readouterr().out, flags=re.M)
    assert shown == [*tasks.TASKS, *(f"a preference: {kind}" for kind in tasks.PREFERENCES)], "not every task"
