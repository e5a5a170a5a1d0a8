"""The small world: the same everywhere, two halves that never meet, and every answer right."""

import collections
import doctest
import hashlib
import itertools
import operator
import random
import re
from pathlib import Path

import pytest

import world

LISTS = world.lists()
OPERATIONS = {"+": operator.add, "-": operator.sub, "x": operator.mul, "/": operator.truediv}
SPOKEN = {"plus": "+", "minus": "-", "less": "-", "times": "x", "divided by": "/"}
FORMS = {"plus": "+", "minus": "-", "times": "x", "share": "/"}


def first_words(kind: str) -> set[str]:
    return {word for part in world.NAMES[kind][0] for word in LISTS.words[part]}


FIRST = {kind: first_words(kind) for kind in world.NAMES}


def names(text: str) -> list[str]:
    """Every name in a text, found word by word; "marsh lanterns" counts as "marsh lantern"."""
    found = []
    for match in re.finditer(r"\b(?=([A-Za-z]+) ([A-Za-z]+))", text):
        first, second = match.groups()
        if second[-1] == "s" and second[:-1] in LISTS.words["creature second"]:
            second = second[:-1]
        if second in LISTS.kinds and first in FIRST[LISTS.kinds[second]]:
            found.append(f"{first} {second}")
    return found


@pytest.fixture(scope="module")
def pages() -> dict[str, list[str]]:
    return {split: [world.document(split, 1, i) for i in range(1200)] for split in ("train", "held-out")}


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(world).failed == 0


def test_the_text_is_the_same_on_every_machine():
    """If you changed world.py or world.txt on purpose, put the new hash here."""
    text = "".join(itertools.chain(itertools.islice(world.documents("train"), 150),
                                   itertools.islice(world.documents("held-out"), 50)))
    found = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert found == "864cefdaa1d6952d", "the small world writes another text now"


def test_documents_are_endless_and_each_stands_for_itself():
    row = list(itertools.islice(world.documents("train", seed=3, start=7), 5))
    alone = [world.document("train", 3, i) for i in range(7, 12)]
    assert row == alone, "a document depends on its neighbours"
    assert world.document("train", 3, 10**15) != world.document("train", 3, 10**15 + 1)
    assert len({world.document("train", seed, 0) for seed in range(20)}) == 20, "the seed changes nothing"
    with pytest.raises(AssertionError, match="held-out"):
        world.document("test", 0, 0)


def test_each_kind_can_be_asked_for():
    for kind in world.KINDS:
        assert kind in world.MIX, f"{kind} never comes by chance"
        assert len({world.document("train", 0, i, kind) for i in range(20)}) == 20, f"{kind} repeats itself"


def test_train_and_held_out_never_meet(pages):
    for split, documents in pages.items():
        for name, times in collections.Counter(names(" . ".join(documents))).items():
            right = world.is_held_out(name) == (split == "held-out")
            assert right, f"{name} stands {times} times in {split} documents and belongs to the other world"


def test_every_word_of_a_held_out_name_is_known_from_training():
    drawn = {split: set(names(" . ".join(world.document(split, 2, i) for i in range(n))))
             for split, n in (("train", 3000), ("held-out", 300))}
    known = {word for name in drawn["train"] for word in name.split()}
    new = {word for name in drawn["held-out"] for word in name.split()} - known
    assert not new, f"only the pair may be new, but these words are new too: {sorted(new)}"
    assert not drawn["train"] & drawn["held-out"]


def test_about_one_name_in_ten_is_held_out():
    for kind, (_, second) in world.NAMES.items():
        every = [f"{a} {b}" for a in sorted(FIRST[kind]) for b in LISTS.words[second]]
        share = sum(map(world.is_held_out, every)) / len(every)
        assert 0.085 < share < 0.115, f"{share:.3f} of the {len(every)} names of kind {kind} are held out"


def test_facts_follow_from_the_name_and_stay_in_its_world():
    for name in ("Amber Hollow", "Nora Whitlock", "Silver Gull", "marsh otter"):
        known = dict(world.facts(name))
        world.facts.cache_clear()
        assert world.facts(name) == known, f"the facts of {name} changed"
    for held_out, kind in itertools.product((False, True), world.NAMES):
        for name in world.Page("held-out" if held_out else "train", random.Random(4)).sample(kind, 50):
            known = world.facts(name)
            assert known["kind"] == kind
            for fact, rule in LISTS.facts[kind].items():
                strayed = rule in world.NAMES and world.is_held_out(known[fact]) != held_out
                assert not strayed, f"{name}'s {fact} is of the other world"
    with pytest.raises(KeyError):
        world.facts("Nora Nobody")


def test_the_second_word_of_a_name_tells_its_kind():
    seconds = [word for _, part in world.NAMES.values() for word in LISTS.words[part]]
    assert len(seconds) == len(set(seconds)), "a second word of two kinds"
    both = set(seconds) & set().union(*FIRST.values())
    assert not both, f"first and second words of names, which makes {sorted(both)} ambiguous"


def test_second_mentions_are_found():
    text = ("On Sunday Nora Whitlock met Amber Hollow's mayor. Nora Whitlock of Amber Hollow sang. "
            "Nora Whitlock ran.")
    assert [text[a:b] for a, b in world.second_mentions(text)] == ["Nora Whitlock", "Amber Hollow"]
    assert world.second_mentions(text)[0][0] == text.index("Nora Whitlock of"), "that is not the second one"
    assert world.second_mentions("Nora Nobody and Nora Nobody, Nora. Whitlock, Nora Whitlock") == []


def test_the_world_gives_the_model_names_to_copy(pages):
    spans = [len(world.second_mentions(text)) for text in pages["held-out"]]
    assert sum(spans) / len(spans) > 2, "too few names come twice to measure copying by"


def test_the_text_is_clean(pages):
    for text in pages["train"] + pages["held-out"]:
        assert text.isascii() and text == text.strip()
        assert not re.search(r"[{}()<]|=>|\|", text), f"something was left unfilled in: {text}"
        assert "  " not in text and " ." not in text and ".." not in text, f"bad spaces or points in: {text}"
        wrong = re.search(r"\b(a [aeiou]|an [^aeiouh])\w*", text, re.IGNORECASE)
        assert not wrong, f"a or an? {wrong[0]} in: {text}"


def test_documents_fit_the_context(pages):
    lengths = sorted(map(len, pages["train"]))
    assert lengths[0] > 80 and lengths[-1] < 1500
    inside = sum(300 <= n <= 900 for n in lengths) / len(lengths)
    assert inside > 0.85, f"only {inside:.0%} of the documents have 300 to 900 characters"


def test_every_frame_fills_and_every_section_is_used():
    called = set(re.findall(r"<([^<>]+)>", " ".join(itertools.chain(*LISTS.frames.values()))))
    code = Path(world.__file__).read_text(encoding="utf-8")
    for section, frames in LISTS.frames.items():
        kind = section.split()[0]
        by_code = section in code or kind in world.NAMES or kind in ("sum", "list")
        assert section in called or by_code, f"nobody uses [frames {section}]"
        for frame in frames:
            page = world.Page("train", random.Random(frame))
            given = "x y z xw yw zw row rows again last text head question answer".split()
            it = page.draw(kind if kind in world.NAMES else "place")
            text = page.fill(frame, **dict.fromkeys(given, "one"), it=it)
            assert text and not re.search(r"[{}()<|]", text), f"[frames {section}] {frame} became {text}"


def test_every_frame_comes_up():
    used = set()
    enough = dict(story=3000, reading=1000, article=500, talk=400, sums=150, lists=250, guests=150)
    for kind in world.KINDS:
        for i in range(enough[kind]):
            page = world.Page("train", random.Random(f"{kind} {i}"))
            world.KINDS[kind](page)
            used |= page.used
    every = {frame for section, frames in LISTS.frames.items() if section != "unknown" for frame in frames}
    assert not every - used, f"these frames never come up: {sorted(every - used)[:5]}"


def test_no_sentence_comes_twice_in_a_story_or_an_article():
    for kind, i in itertools.product(("story", "article"), range(300)):
        text = world.document("train", 5, i, kind)
        sentences = collections.Counter(re.split(r"(?<=[.!?]) |\n", text))
        most, times = sentences.most_common(1)[0]
        assert times == 1, f"{most!r} comes {times} times in: {text}"


def test_the_promise_of_variety_is_kept():
    frames = {frame for frames in LISTS.frames.values() for frame in frames}
    words = {word for words in LISTS.words.values() for word in words}
    assert len(frames) > 1500 and len(words) > 3000, f"{len(frames)} frames, {len(words)} words"
    for name, words in LISTS.words.items():
        twice = [word for word, times in collections.Counter(words).items() if times > 1 and name != "listed"]
        assert not twice, f"[words {name}] holds {twice} twice"


def test_sums_are_right():
    numbers = {word: n for n, word in enumerate(LISTS.words["number"])}
    text = "\n".join(world.document("train", 6, i, "sums") for i in range(400)).lower()
    found = []
    for form in (r"(\d+) ([-+x/]) (\d+) = (\d+)", r"what is (\d+) (.) (\d+)\? (\d+)\."):
        found += [(int(x), op, int(y), int(z)) for x, op, y, z in re.findall(form, text)]
    form = rf"^([\w-]+) ({'|'.join(SPOKEN)}) ([\w-]+) (?:is|leaves) ([\w-]+)\.$"
    for x, op, y, z in re.findall(form, text, re.MULTILINE):
        read = [numbers[word] if word in numbers else int(word) for word in (x, y, z)]
        found.append((read[0], SPOKEN[op], read[1], read[2]))
    assert len(found) > 1200 and {op for _, op, _, _ in found} == set(OPERATIONS)
    for x, op, y, z in found:
        assert OPERATIONS[op](x, y) == z, f"the world says {x} {op} {y} = {z}"


def test_every_sum_is_told_with_its_three_numbers():
    for form, op in FORMS.items():
        for frame in LISTS.frames[f"sum {form}"]:
            slots = set(re.findall(r"\{([xyzXYZ]w?)\}", frame.lower()))
            assert slots in ({"x", "y", "z"}, {"xw", "yw", "zw"}), f"a number is missing in: {frame}"


def expected(name: str) -> dict[str, tuple[str, list[str]]]:
    """All that can be asked about an entity: question -> its answer and the facts in the two."""
    known, found = world.facts(name), {}
    for frame in LISTS.frames[f"{known['kind']} asks"]:
        used = []
        for slot, article, it, fact in re.findall(r"(\{([aA] )?([iI]t)(?:\.(\w+))?\})", frame):
            value = str(known[fact]) if fact else name
            used += [value] if fact else []
            if article:
                value = ("an " if value[0].lower() in "aeiou" else "a ") + value
            if it == "It" or article == "A ":
                value = value[0].upper() + value[1:]
            frame = frame.replace(slot, value)
        question, answer = frame.split(" => ")
        found[question] = answer, used
    return found


def test_answers_follow_from_the_text_and_the_facts():
    """An answer is what the facts say and stands in the text; where the text "does not say", it must not."""
    answered, unknown = 0, 0
    for i in range(500):
        page = world.Page("train", random.Random(i))
        text, asked = world.facts_asked(page)
        answers = collections.defaultdict(list)
        for name in set(names(text)):
            for question, right in expected(name).items():
                answers[question].append(right)
        assert len({question for question, *_ in asked}) == len(asked) > 0, f"asked twice or never: {asked}"
        for question, answer, short in asked:
            said = short.lower() in answer.lower() and short not in question
            assert said, f"{question} {answer} In short: {short}? That is not what the answer tells"
            if answer in LISTS.frames["unknown"]:
                told = [value for _, values in answers[question] for value in values
                        if re.search(rf"\b{value}\b", text) and value not in question and "\n" not in text]
                assert not told, f"{question} The text does say {told}: {text}"
                assert set(names(question)) - set(names(text)), f"{question} That is nobody new: {text}"
                unknown += 1
            else:
                right = dict(answers[question])
                assert answer in right, f"{question} {answer} But the facts say: {list(right)}"
                assert all(value in text for value in right[answer]), f"{answer} That is not in: {text}"
                answered += 1
    assert answered > 1000 and 0.35 < unknown / (answered + unknown) < 0.45, (
        f"{answered} answered, {unknown} not in the text: of few strangers nobody learns to notice them")


def test_guests_are_new_once():
    for i, split in itertools.product(range(50), ("train", "held-out")):
        text = world.document(split, 0, i, "guests")
        rows = re.findall(r"^(\w+ \w+)\W+(new|again)$", text, flags=re.M)
        assert len(rows) >= 16, f"no list of guests: {text}"
        for n, (name, said) in enumerate(rows):
            before = name in [other for other, _ in rows[:n]]
            assert before == (said == "again"), f"guest {n}, {name}, is not {said}: {text}"
        assert 4 < sum(said == "again" for _, said in rows) < len(rows) - 4, f"too easy to guess: {text}"


def test_scenes_answer_from_their_own_words():
    for frame in LISTS.frames["scene"]:
        scene, *rest = frame.split(" => ")
        assert len(rest) >= 2 and len(rest) % 2 == 0, f"a question without an answer: {frame}"
        slot = re.compile(r"\{(?:[aA] )?([\w.]+)\}")
        told = set(slot.findall(scene))
        for question, answer in zip(rest[::2], rest[1::2]):
            asked = {name[0].lower() + name[1:] for name in slot.findall(question + answer)}
            assert asked <= told, f"{question} {answer} asks for more than was told: {scene}"


def test_a_frame_tells_the_same_facts_whatever_is_chosen():
    """Questions are asked of what a frame tells, so a fact must not hide in one of several choices."""
    for kind in world.NAMES:
        for section in (f"{kind} first", kind, f"{kind} again", f"{kind} asks"):
            for frame in LISTS.frames[section]:
                hidden = [choice for choice in world.CHOICE.findall(frame) if world.needed(choice)]
                assert not hidden, f"a fact in a choice: {frame}"


def test_needed_reads_the_facts_of_a_frame():
    frame = "{It} and {a it.pet} of {it.mayor.his} {it.mayor.pet}; {it.he} {it.first}"
    assert world.needed(frame) == {"pet", "mayor", "mayor.pet"}
