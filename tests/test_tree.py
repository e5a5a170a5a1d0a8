"""tree.py: the puzzle by enumeration, and the search with scripted proposals and verdicts."""

import random
from fractions import Fraction

import pytest

import tree
import world
from asking import read_call
from tools import calculator
from tree import can_reach, chains, lesson, puzzles, read_puzzle, read_step, steps

GOOD = (13, 9, 5, 4)


class Scripted:
    """A thinker that proposes any legal step by chance, and judges as it is told to."""

    def __init__(self, verdict, seed: int = 0):
        self.verdict, self.rng, self.asked = verdict, random.Random(seed), 0

    def propose(self, states, temperature):
        self.asked += len(states)
        return [self.rng.choice(sorted(steps(state).items())) for state in states]

    def judge(self, states):
        self.asked += len(states)
        return [self.verdict(state) for state in states]


def by_fractions(numbers: list[Fraction]) -> bool:
    """Whether 24 can be made, with fractions and negative numbers too: another way to count."""
    if len(numbers) == 1:
        return numbers[0] == 24
    for i, x in enumerate(numbers):
        for j, y in enumerate(numbers):
            rest = [each for k, each in enumerate(numbers) if k not in (i, j)]
            if i != j and any(by_fractions([*rest, z]) for z in {x + y, x - y, x * y, x / y if y else x + y}):
                return True
    return False


# --- the puzzle ---------------------------------------------------------------------------------------

def test_each_step_is_what_the_calculator_says():
    for state in [GOOD, (12, 6, 3), (8, 0), (7, 7)]:
        for step, after in steps(state).items():
            x, op, y = step.split()
            rest = list(state)
            rest.remove(int(x))
            rest.remove(int(y))
            assert sorted([*rest, int(calculator(step))], reverse=True) == list(after), step
    assert "8 / 0" not in steps((8, 0)) and "7 / 2" not in steps((7, 2)), "no fractions"


def test_what_can_be_reached():
    assert can_reach(GOOD) and can_reach((24,)) and not can_reach((1, 1, 1, 1)) and not can_reach((23,))
    rng = random.Random(0)
    for _ in range(40):
        state = tuple(sorted((rng.randint(1, 13) for _ in range(4)), reverse=True))
        assert not can_reach(state) or by_fractions(list(map(Fraction, state))), state
    assert not can_reach((8, 8, 3, 3)) and by_fractions(list(map(Fraction, (8, 8, 3, 3)))), "8 / (3 - 8 / 3)"


def test_all_puzzles_are_there():
    every = puzzles("train") + puzzles("held-out")
    assert len(every) == len(set(every)) == 1346, "1,362 have a solution, 16 of them only with fractions"
    assert 0.05 < len(puzzles("held-out")) / len(every) < 0.15
    assert all(world.is_held_out(str(state)) for state in puzzles("held-out"))


def test_the_lessons_are_true():
    rng, said = random.Random(0), []
    for _ in range(300):
        user, assistant = (each["content"] for each in lesson(rng))
        state = tuple(int(word.strip("?.,")) for word in user.split(" from " if "from" in user else "Can ")[1]
                      .split(" make ")[0].replace(" and ", ", ").split(", "))
        if assistant in ("Yes.", "No."):
            assert can_reach(state) == (assistant == "Yes."), user
        else:
            assert can_reach(steps(state)[read_call(assistant)[1][0]]), f"{user}: {assistant}"
        said.append(assistant)
        assert state not in puzzles("held-out"), "what is held out must not be learned"
    assert 50 < said.count("Yes.") < 110 and 40 < said.count("No.") < 110


@pytest.mark.parametrize("said", ["", "13 - 9", 'call calculator("13 - 8")', "call calculator(", "call x()",
                                  'call calculator("4 - 13")', "call calculator(13)",
                                  'call search("13 - 9")'])
def test_what_is_no_step(said):
    assert read_step(GOOD, said) == ("", ())
    assert read_step(GOOD, 'call calculator("13 - 9")') == ("13 - 9", (5, 4, 4))


# --- the search ---------------------------------------------------------------------------------------

def test_a_tree_with_a_right_judge_finds_what_chains_by_chance_do_not():
    asked = random.Random(0).sample(puzzles("held-out"), 20)
    by_tree = sum(tree.tree(Scripted(lambda state: 1.0 * can_reach(state)), asked))
    by_wrong_judge = sum(tree.tree(Scripted(lambda state: -1.0 * can_reach(state)), asked))
    by_chains = sum(chains(Scripted(None), asked, 25, 1.0))  # 25 x 3 steps: asked as often as a tree
    assert by_tree > by_chains > by_wrong_judge and by_tree > 1.3 * by_chains, (
        f"of 20: tree {by_tree}, with a judge that is always wrong {by_wrong_judge}, 25 chains {by_chains}")


def test_as_often_as_it_is_said_the_model_is_asked():
    thinker = Scripted(None)
    chains(thinker, [GOOD, GOOD], 5, 1.0)
    assert thinker.asked == 2 * 5 * 3, "two puzzles, five chains, three steps"
    thinker = Scripted(lambda state: 0.0)
    tree.tree(thinker, [GOOD])
    proposals, verdicts = 1 + 2 * tree.BREADTH, 1 + tree.BREADTH  # the last level is not judged
    assert thinker.asked <= tree.PROPOSALS * (proposals + verdicts)


def test_a_model_that_proposes_nothing_solves_nothing():
    thinker = Scripted(lambda state: 0.0)
    thinker.propose = lambda states, temperature: [("", ())] * len(states)
    assert tree.tree(thinker, [GOOD]) == [False]
    assert chains(thinker, [GOOD], 2, 1.0) == [False]


# --- what is typed ------------------------------------------------------------------------------------

def test_the_numbers_that_are_asked():
    assert read_puzzle(" 4, 9 5 13") == GOOD


@pytest.mark.parametrize("flags, told", [
    (["--ask", "1 2 3"], "four numbers"), (["--ask", "14 1 1 1"], "from 1 to 13"), (["--ask", "x"], '"x"'),
    (["--ask", "1.5 3 4 5"], "four numbers"), (["--ask", "-13 9 5 4"], "four numbers"),
    (["--ask", ""], "four numbers"), (["--questions", "0"], "--questions 0"), ([], "no such checkpoint")])
def test_mistakes_end_in_one_line(flags, told, fails, tmp_path):
    assert told in fails(tree.main, ["--out", tmp_path, "--device", "cpu", *flags])


def test_a_base_model_can_not_learn_it(train_small, fails, tmp_path):
    train_small()
    assert "no assistant" in fails(tree.main, ["--out", tmp_path / "out", "--device", "cpu"])
