"""Tree of thoughts: a search over a model's steps finds what its first idea misses.

The puzzle: make 24 of four numbers from 1 to 13, each used once. The numbers that are left are the state. It
takes three steps, and the first must be right long before it shows. A step is a call of the calculator, whose
result goes back among the numbers:

    user        Make 24 from 13, 9, 5 and 4.
    assistant   call calculator("13 - 9")            then: Make 24 from 5, 4 and 4.

    chain       the likeliest step, three times
    chains      many, drawn by chance, that together ask the model about as often as a tree; one success is
                enough
    tree        PROPOSALS steps are drawn from each state; the model judges where they lead, "Can 5, 4 and 4
                make 24?", and the BREADTH states with the highest P("Yes.") go on (Yao 2023, algorithm 1)

    python tree.py                      teach the newest assistant the puzzle, then all three (3 minutes)
    python tree.py --ask "13 9 5 4"     search, and show the tree; it teaches only if out/puzzle.pt is missing

Of 100 puzzles chain solves 10, tree 70 and 25 chains 76 (18, 61 and 74 with another assistant): where the end
can be checked, trying often is as good as a judge who is right in 61 to 76 of 100 cases, or better.

The assistant learns steps and judgements from puzzles solved by enumeration; those it is asked are held out,
though what is left of them after a step may come in training too. Left out: going back from a dead end
(algorithm 2), a vote among states.
Papers: Yao 2023 (tree of thoughts, and this puzzle), Wei 2022 (chains of thought).
"""

import dataclasses
import itertools
import random
import re
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

import chain
import sft
import world
from asking import message, write_call
from bpe import Tokenizer
from checkpoint import load_float, load_model
from errands import OPERATIONS, in_words
from exam import answer_all
from model import GPT
from rag import load_assistant, log_probs

TARGET, LARGEST = 24, 13
LESSONS, RATE = 36_000, 2e-3   # conversations, the highest learning rate
PROPOSALS, BREADTH = 6, 5      # steps drawn from a state, states that go on
LONGEST = 20                   # tokens of a step
State = tuple[int, ...]        # the numbers that are left, the largest first


@dataclass
class Config:
    """The flags of `python tree.py`."""
    out: str = chain.option("out", "folder for everything that is made")
    checkpoint: str | None = chain.option(None, "assistant that learns (default: the newest room's in --out)")
    ask: str | None = chain.option(None, 'four numbers, "13 9 5 4"')
    questions: int = chain.option(100, "held-out puzzles")
    seed: int = chain.option(0, "seed of the lessons and the draws")
    device: str = chain.option("auto", "auto, cpu, cuda or mps")


# ------------------------------------------------------------------------------------------- the puzzle

@cache
def steps(state: State) -> dict[str, State]:
    """Return what the calculator can be asked in a state, and the state that comes of it.

    Nothing below zero, no fractions; the larger number stands first.

    >>> steps((4, 3))
    {'4 + 3': (7,), '4 - 3': (1,), '4 * 3': (12,)}
    """
    found = {}
    for i, j in itertools.combinations(range(len(state)), 2):
        x, y, rest = state[i], state[j], state[:i] + state[i + 1:j] + state[j + 1:]
        for op, operation in OPERATIONS.items():
            if op != "/" or y and x % y == 0:
                found[f"{x} {op} {y}"] = tuple(sorted((*rest, operation(x, y)), reverse=True))
    return found


@cache
def can_reach(state: State) -> bool:
    """Return whether 24 can be made of a state, by trying everything.

    >>> can_reach((13, 9, 5, 4)), can_reach((1, 1, 1, 1))
    (True, False)
    """
    return state == (TARGET,) or any(map(can_reach, steps(state).values()))


@cache
def puzzles(split: str) -> list[State]:
    """Return the puzzles of a split that have a solution; about one in ten is held out."""
    every = itertools.combinations_with_replacement(range(LARGEST, 0, -1), 4)
    return [state for state in every
            if world.is_held_out(str(state)) == (split == "held-out") and can_reach(state)]


def told(state: State) -> str:
    """Return a state in words.

    >>> told((13, 9, 4))
    '13, 9 and 4'
    """
    return in_words(list(map(str, state)))


def ask_step(state: State) -> list[dict]:
    """Return the conversation that asks for a step."""
    return [message("user", f"Make {TARGET} from {told(state)}.")]


def ask_verdict(state: State) -> list[dict]:
    """Return the conversation that asks whether a state is worth going on from."""
    return [message("user", f"Can {told(state)} make {TARGET}?")]


def lesson(rng: random.Random) -> list[dict]:
    """Return a conversation: a right step on the way of a puzzle, or whether a state can still make it."""
    is_verdict, is_good, state = rng.random() < 0.6, rng.random() < 0.5, world.pick(rng, puzzles("train"))
    # verdicts are on 3 or 2 numbers, steps start from 4, 3 or 2
    for _ in range(world.pick(rng, (0, 0, 0, 1) if is_verdict else (0, 0, 1, 2))):
        state = world.pick(rng, [after for after in steps(state).values() if can_reach(after)])
    if is_verdict:
        nexts = list(steps(state).values())
        state = world.pick(rng, [after for after in nexts if can_reach(after) == is_good] or nexts)
        return [*ask_verdict(state), message("assistant", "Yes." if can_reach(state) else "No.")]
    right = [step for step, after in steps(state).items() if can_reach(after)]
    return [*ask_step(state), message("assistant", write_call("calculator", world.pick(rng, right)))]


def teach(c: Config) -> None:
    """Write out/puzzle.pt: the assistant, and what it has learned of the puzzle."""
    model, tokenizer = load_assistant(c, load_float)
    rng = random.Random(f"puzzle {c.seed}")
    history = sft.teach(model, tokenizer, [lesson(rng) for _ in range(LESSONS)], RATE, c.seed)
    chain.save_checkpoint(Path(c.out, "puzzle.pt"), config=dataclasses.asdict(model.config),
                          weights=model.state_dict(), tokenizer=tokenizer.to_dict(), step=len(history),
                          loss=history[-1][1], arguments=dataclasses.asdict(c), chat=True)


# --------------------------------------------------------------------------- chains and trees of thoughts

class Thinker:
    """A model that proposes steps and judges states. `asked` counts how often it was asked."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, seed: int):
        self.model, self.tokenizer, self.asked = model, tokenizer, 0
        self.generator = torch.Generator(model.device).manual_seed(seed)

    def propose(self, states: list[State], temperature: float) -> list[tuple[str, State]]:
        """Return for each state a step and what comes of it; ("", ()) where the step is none."""
        self.asked += len(states)
        said = answer_all(self.model, self.tokenizer, list(map(ask_step, states)), LONGEST, temperature,
                          self.generator)
        return [read_step(state, text or "") for state, text in zip(states, said)]

    def judge(self, states: list[State]) -> list[float]:
        """Return log P("Yes.") for each state, asked whether it can make 24."""
        self.asked += len(states)
        return log_probs(self.model, self.tokenizer, list(map(ask_verdict, states)), ["Yes."] * len(states))


def read_step(state: State, said: str) -> tuple[str, State]:
    """Return the step of a message, and the state that comes of it; ("", ()) if the message is no step.

    >>> read_step((4, 3), 'call calculator("4 * 3")'), read_step((4, 3), 'call calculator("5 * 3")')
    (('4 * 3', (12,)), ('', ()))
    """
    for step, after in steps(state).items():
        if said == write_call("calculator", step):
            return step, after
    return "", ()


def chains(thinker: Thinker, starts: list[State], n: int, temperature: float) -> list[bool]:
    """Return for each puzzle whether one of n chains of steps makes 24. A chain ends at what is no step."""
    alive = list(enumerate(starts)) * n
    for _ in range(len(starts[0]) - 1):
        proposed = thinker.propose([state for _, state in alive], temperature)
        alive = [(i, after) for (i, _), (_, after) in zip(alive, proposed) if after]
    return [(i, (TARGET,)) in alive for i in range(len(starts))]


def grow(thinker: Thinker, frontiers: list[list[State]]) -> dict[tuple[int, State], str]:
    """Return {(which puzzle, where a step leads): such a step}, of PROPOSALS steps drawn from each state."""
    tried = [(i, state) for i, states in enumerate(frontiers) for state in states] * PROPOSALS
    proposed = thinker.propose([state for _, state in tried], 1.0)
    return {(i, after): f"{told(state)}: {step}"
            for (i, state), (step, after) in zip(tried, proposed) if after}


def tree(thinker: Thinker, starts: list[State], shows: bool = False) -> list[bool]:
    """Return for each puzzle whether a search over steps makes 24. All go down their trees level by level."""
    frontiers = [[state] for state in starts]
    for _ in range(len(starts[0]) - 2):  # all steps but the last
        grown = grow(thinker, frontiers)
        scores = dict(zip(grown, thinker.judge([state for _, state in grown])))
        best = sorted(grown, key=lambda each: -scores[each])
        frontiers = [[state for puzzle, state in best if puzzle == i][:BREADTH] for i in range(len(starts))]
        for i, state in best if shows else []:
            mark = ">" if state in frontiers[i] else " "
            print(f"{mark} {grown[i, state]:<26} P(yes) {np.exp(scores[i, state]):4.0%}")
    grown = grow(thinker, frontiers)  # the last step: that it makes 24 is seen, not judged
    for i, state in grown if shows else []:
        print(f"{'>' if state == (TARGET,) else ' '} {grown[i, state]} = {state[0]}")
    return [(i, (TARGET,)) in grown for i in range(len(starts))]


# ---------------------------------------------------------------------------------------- what it brings

def measure(thinker: Thinker, starts: list[State], seed: int) -> dict[str, float]:
    """Print and return the share of puzzles solved each way, and how often the model was asked for one.

    The last number is the share of right verdicts on what comes of any first step.
    """
    metrics = {}

    def count(way: str, solved: list[bool]) -> None:
        metrics[way], metrics[f"{way}_asked"] = float(np.mean(solved)), thinker.asked / len(starts)
        thinker.asked = 0
        print(f"{way:<8} solved {metrics[way]:6.1%}, the model asked {metrics[f'{way}_asked']:5.1f} times "
              "a puzzle", flush=True)

    count("chain", chains(thinker, starts, 1, 0.0))
    count("tree", tree(thinker, starts))
    count("chains", chains(thinker, starts, round(metrics["tree_asked"] / 3), 1.0))
    rng = random.Random(f"verdicts {seed}")
    states = [world.pick(rng, list(steps(state).values())) for state in starts]
    verdicts = [score > np.log(0.5) for score in thinker.judge(states)]
    metrics["verdicts_right"] = float(np.mean([said == can_reach(s) for said, s in zip(verdicts, states)]))
    return metrics


def read_puzzle(text: str) -> State:
    """Return the numbers of a puzzle. UserError if they are not four from 1 to 13."""
    numbers = re.split(r"[, ]+", text.strip())
    chain.require(len(numbers) == 4 and set(numbers) <= set(map(str, range(1, LARGEST + 1))),
                  f'--ask "{text}": give four numbers from 1 to {LARGEST}, like "13 9 5 4"')
    return tuple(sorted(map(int, numbers), reverse=True))


@chain.command
def main(argv=None) -> dict:
    """Search for one puzzle, or measure."""
    c, started = chain.parse(Config, argv, __doc__), time.time()
    chain.require(c.questions > 0, f"--questions {c.questions}: give at least 1")
    c.device, path = chain.pick_device(c.device), Path(c.out, "puzzle.pt")
    puzzle = None if c.ask is None else read_puzzle(c.ask)
    if not puzzle or not path.exists():
        teach(c)
    thinker = Thinker(*load_model(path, c.device)[:2], c.seed)
    if puzzle:
        print("solved" if tree(thinker, [puzzle], shows=True)[0] else
              "not found" if can_reach(puzzle) else "not found: it can't be done")
        return {}
    held_out = puzzles("held-out")
    starts = random.Random(c.seed).sample(held_out, min(c.questions, len(held_out)))
    metrics = measure(thinker, starts, c.seed)
    chain.report("tree.py", c, metrics, time.time() - started)
    return metrics


if __name__ == "__main__":
    main()
