"""An agent: a model that says what to do, and a loop that does it.

    say        the model writes one message, up to its end token: what a tool answers is never its invention
    call       a message "call name(arguments)" is a call of a tool (tools.py), any other one is the answer
    look       what the tool said is the next message; the model goes on from all messages so far (Yao 2022)
    limits     of steps, of tokens a message, of seconds, and of the context; a run that meets one ends, and
               tells what is known

The whole loop is `run_all`. The model that sft.py and dpo.py made calls calculator("12 + 30") and
search("mayor of Amber Hollow"); it thinks without words. It searches the held-out world's library.

    python agent.py                       measure it, with tools and without (20 seconds)
    python agent.py --ask "What is the number of people in Sugar Isle plus the number of people in White Den?"
    python agent.py --replay FILE         run what was written down again: the tools, without the model

Each question is a line in out/agent.jsonl. Orders hidden in what a tool says: injection.py. Plans, by a
search over steps: tree.py. Left out: tools that run beside each other, a memory from run to run. Papers: Yao
2022 (ReAct), Schick 2023 (Toolformer).
"""

import json
import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import chain
import library
import rag
import world
from asking import UNKNOWN, Page, message, read_call
from bpe import Tokenizer
from dialogue import check_messages
from errands import NOTHING, NUMBERS, in_words
from exam import answer_all
from model import GPT
from retrieve import Index, join
from tools import calculator, call, schema

NEAR = 0.67  # 99 % of the sentences that answer a query have at least this cosine with it (training world)
COLOURS = {"system": 90, "user": 36, "assistant": 32, "tool": 33}


@dataclass
class Config:
    """The flags of `python agent.py`."""
    out: str = chain.option("out", "folder for everything that is made")
    checkpoint: str | None = chain.option(None, "assistant that acts (default: the newest room's in --out)")
    docs: str | None = chain.option(None, "folder of .txt and .md files to search in place of the library")
    ask: str | None = chain.option(None, "a question for the agent")
    replay: str | None = chain.option(None, "a file of runs to run again, without the model")
    questions: int = chain.option(100, "questions a task")
    steps: int = chain.option(8, "messages of the model in a run, at most")
    seconds: float = chain.option(60.0, "of a run, on average")
    seed: int = chain.option(0, "seed of the library and the questions")
    device: str = chain.option("auto", "auto, cpu, cuda or mps")


@dataclass
class Run:
    """What was said, how it ended ("answer", or the limit that was met), and the answer."""
    messages: list[dict]
    ended: str = ""
    answer: str = ""


# ------------------------------------------------------------------------------------------- the loop

def step(found: Run, said: str | None, tools: dict[str, Callable], guards: Sequence[Callable] = ()) -> None:
    """Take the model's next message into a run: an answer ends it, a call is made. None: it found no end.

    A guard `(name, arguments, messages) -> str` returns why a call must not be made, or "".
    """
    if said is None:
        found.ended = "no end: too many tokens for a message or for the context"
        return
    found.messages.append(message("assistant", said))
    try:
        called = read_call(said)
    except ValueError as error:
        found.messages.append(message("tool", f"error: {error}"))
        return
    if called is None:
        found.ended, found.answer = "answer", said
        return
    refusal = next(filter(None, (guard(*called, found.messages) for guard in guards)), "")
    found.messages.append(message("tool", f"error: {refusal}" if refusal else call(tools, *called)))


def run_all(say_all: Callable[[list[list[dict]]], list[str | None]], tools: dict[str, Callable],
            starts: list[list[dict]], steps: int = 8, seconds: float = 60.0,
            guards: Sequence[Callable] = ()) -> list[Run]:
    """Let a model act in several conversations, side by side, until it answers in each.

    `starts` are what was said before: system and user. `say_all(conversations)` returns the model's next
    message in each. There are `steps` messages and, on average, `seconds` for each run.
    """
    runs, deadline = [Run(list(messages)) for messages in starts], time.monotonic() + seconds * len(starts)
    for _ in range(steps):
        going = [each for each in runs if not each.ended]
        if not going or time.monotonic() > deadline:
            break
        for each, said in zip(going, say_all([each.messages for each in going])):
            step(each, said, tools, guards)
    limit = f"{seconds:g} seconds" if time.monotonic() > deadline else f"{steps} steps"
    for each in runs:
        each.ended = each.ended or limit
        if each.ended != "answer":
            last = each.messages[-1]
            known = last["content"] if last["role"] == "tool" else "nothing"
            each.answer = f"(stopped: {each.ended}; what is known: {known})"
    return runs


def run(say: Callable[[list[dict]], str | None], tools: dict[str, Callable], messages: list[dict],
        **limits) -> Run:
    """Do the same in one conversation: `say(messages)` returns its next message."""
    return run_all(lambda many: [say(each) for each in many], tools, [messages], **limits)[0]


def speaker(model: GPT, tokenizer: Tokenizer) -> Callable[[list[list[dict]]], list[str | None]]:
    """Return the `say_all` of a model: greedy, up to the end token."""
    return lambda many: answer_all(model, tokenizer, many, rag.ANSWER)


def script(said: Iterable[str]) -> Callable[[list[dict]], str | None]:
    """Return a `say` that says these messages one after the other, whatever comes back; then None."""
    left = iter(said)
    return lambda messages: next(left, None)


def system(tools: dict[str, Callable]) -> dict:
    """Return the system's message that tells of the tools, in the form that training had (errands.py)."""
    told = in_words([schema(name, tool) for name, tool in tools.items()])
    return message("system", f"You can call {told}.")


def search_in(index: Index) -> Callable[[str], str]:
    """Return the tool that searches an index for the best chunk: words choose some, meaning orders them.

    subtle: what is not NEAR is not told at all, as so small a model takes the next best for an answer.
    """
    def search(query: str) -> str:
        """For facts: what the documents tell of something."""  # the model reads it up to the colon
        return join(index.search(query, 1, "reranked", NEAR)) or NOTHING
    return search


# ---------------------------------------------------------------------------------------- transcripts

def write_down(path: Path, task: str, found: Run) -> None:
    """Append a run to a file of JSON lines."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"task": task, **asdict(found)}) + "\n")


def replay(path: Path, tools: dict[str, Callable]) -> dict[str, int]:
    """Run the lines of a file again with what the model said then; return how many ran as before."""
    chain.require(path.is_file(), f"--replay {path}: no such file; `python agent.py` writes out/agent.jsonl")
    same = total = 0
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            messages = check_messages(json.loads(line)["messages"])
            if messages[0]["role"] not in ("system", "user"):
                raise ValueError("nobody has asked")
            said = [each["content"] for each in messages if each["role"] == "assistant"]
            start = [each for each in messages[:2] if each["role"] in ("system", "user")]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise chain.UserError(f"--replay {path}, line {number}: no run; delete that line")
        is_same = run(script(said), tools, start, steps=len(said)).messages == messages
        if not is_same:
            print(f"line {number}: a tool says something else now")
        same, total = same + is_same, total + 1
    return {"runs": total, "same": same}


def show(found: Run) -> None:
    """Print a run in colour: the model green, tools yellow."""
    print()
    for each in found.messages:
        print(f"\x1b[{COLOURS[each['role']]}m{each['role']}: {each['content']}\x1b[0m")
    if found.ended != "answer":
        print(found.answer)


# ---------------------------------------------------------------------------------------- how good is it

def three_digits(page: Page, op: str) -> tuple[str, str]:
    """Return a question for the sum or product of two numbers of three digits, and the result."""
    while True:
        x, y = page.rng.randrange(100, 1000), page.rng.randrange(100, 1000)
        if world.is_held_out(f"{x} {y}"):
            bare = page.any(f"sum {op}", x=x, y=y)
            return page.any("sum", x=x, y=y, sum=bare), str(x + y if op == "+" else x * y)


def two_lookups(page: Page, documents: dict[str, library.Document]) -> tuple[str, str]:
    """Return a question for the sum of two numbers that two documents tell, and the result."""
    while True:
        kind = page.pick(tuple(NUMBERS))
        fact = page.pick(NUMBERS[kind])
        names = [each.name for each in documents.values()
                 if fact in each.told and world.facts(each.name)["kind"] == kind]
        if len(names) > 1:
            name, other = page.sample_of(names, 2)
            named = {"named": page.asked(name, fact)[0], "named2": page.asked(other, fact)[0]}
            return (page.fill(page.pick(page.frames["lookups"]), **named),
                    str(world.facts(name)[fact] + world.facts(other)[fact]))


def make_tasks(documents: dict[str, library.Document], seed: int, n: int) -> dict[str, list[tuple[str, str]]]:
    """Return n (question, the value that a right answer holds) of each task."""
    page = Page("held-out", random.Random(f"agent {seed}"), 0, 1)
    asked = library.questions(documents, "held-out", seed, n)
    return {"sums": [three_digits(page, "+") for _ in range(n)],
            "products": [three_digits(page, "*") for _ in range(n)],
            "lookups": [(each.question, each.value) for each in asked],
            "two_lookups": [two_lookups(page, documents) for _ in range(n)],
            "unanswerable": [(each, UNKNOWN) for each in library.unanswerable(documents, seed, n)]}


def holds(said: str, value: str) -> bool:
    """Return whether an answer holds a value, as whole words.

    >>> holds("The answer is 1023.", "1023"), holds("The answer is 10234.", "1023")
    (True, False)
    """
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", said) is not None


def measure(say_all, tools: dict[str, Callable], tasks: dict, c: Config, path: Path) -> tuple[dict, dict]:
    """Print and return the share of right answers of each task, with tools and without; and its first run."""
    metrics, first = {}, {}
    print(f"\n{'':<14} {'with tools':>10} {'without':>10}")
    for task, asked in tasks.items():
        users, marks = [message("user", question) for question, _ in asked], []
        runs = run_all(say_all, tools, [[system(tools), user] for user in users], c.steps, c.seconds)
        for found, alone, (_, value) in zip(runs, say_all([[user] for user in users]), asked):
            write_down(path, task, found)
            is_right = found.ended == "answer" and holds(found.answer, value)
            marks.append([is_right, holds(alone or "", value)])
        row = np.mean(marks, axis=0).tolist()
        print(f"{task:<14} {row[0]:>10.1%} {row[1]:>10.1%}", flush=True)
        metrics |= {task: row[0], f"{task}_without": row[1]}
        first[task] = runs[0]
    metrics["one_step"] = float(np.mean([metrics[task] for task in ("sums", "products", "lookups")]))
    return metrics, first


@chain.command
def main(argv=None) -> dict:
    """Answer one question, replay, or measure."""
    c, started = chain.parse(Config, argv, __doc__), time.time()
    for field in ("questions", "steps", "seconds"):
        chain.require(getattr(c, field) > 0, f"--{field} {getattr(c, field)}: give more than 0")
    chain.require(c.ask is None or c.ask.strip(), '--ask "": give a question')
    chain.require(c.ask or c.replay or not c.docs, f"--docs {c.docs}: add --ask; the tasks are the library's")
    c.device, path = chain.pick_device(c.device), Path(c.out, "agent.jsonl")
    say_all = None if c.replay else speaker(*rag.load_assistant(c))
    documents, index = rag.open_documents(c, c.docs, 1, 0)
    tools = {"calculator": calculator, "search": search_in(index)}
    if c.replay:
        metrics = replay(Path(c.replay), tools)
    elif c.ask:
        start = [system(tools), message("user", c.ask)]
        (found,) = run_all(say_all, tools, [start], c.steps, c.seconds)
        write_down(path, "asked", found)
        show(found)
        return {}
    else:
        path.unlink(missing_ok=True)
        tasks = make_tasks(documents, c.seed, c.questions)
        metrics, first = measure(say_all, tools, tasks, c, path)
        for task in ("products", "lookups", "two_lookups"):
            show(first[task])
    chain.report("agent.py", c, metrics, time.time() - started)
    return metrics


if __name__ == "__main__":
    main()
