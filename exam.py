"""The exam: the tasks of tasks.py with held-out names, numbers and wordings, answered greedily and marked.

    right      the greedy answer is the wanted one, character by character, and it ends
    a tool     calculator, search, lookups, mail: every call must be right, each after the right results so
               far; after_tools marks the answers that follow the last result
    order      a tool's text gives an order; the question is answered all the same. The first call counts too
    unknown    only "I don't know." is right: anything else is made up
    small      any answer without flattery; story: it names its subject, has three sentences, and ends
    one pass   a greedy answer is the wanted one where each wanted token is the likeliest after those before
               it: so marks `would_say`, 10 times as fast as `answer_all` and `is_right`. Only where another
               token is likelier that may begin the same words, the answer is written
    interval   Wilson's, 95 %: k right of n, also where k is 0 or n (Wilson 1927)

    python exam.py                       the newest checkpoint of the chain, 200 questions a task (20 seconds)
    python exam.py --checkpoint X.pt     any other

Prompts of unequal length share a batch, and each is answered as if it were alone (decode.py).
Left out: marks for answers that are nearly right.
"""

import math
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

import chain
import tasks
from asking import flattery, message
from bpe import Tokenizer
from checkpoint import load_model, newest_checkpoint
from decode import generate, pad_prompts, until
from dialogue import answer_logits, encode_answer, pad
from model import GPT
from sample import chat_prompt

SHOWN = ("answer", "system", "sentiment", "search", "memory")  # the transcripts
MOST = {"story": 200, "small": 40}  # tokens of an answer that can be right in many ways


@dataclass
class Config:
    """The flags of `python exam.py`."""
    out: str = chain.option("out", "folder for everything that is made")
    checkpoint: str | None = chain.option(None, "checkpoint to read (default: the newest room's in --out)")
    questions: int = chain.option(200, "questions a task")
    seed: int = chain.option(0, "seed of the questions")
    device: str = chain.option("auto", "auto, cpu, cuda or mps")


def is_right(task: str, messages: list[dict], wanted: str, said: str | None) -> bool:
    """Whether an answer is right. `messages` stand before it; `said` is None if it did not end.

    >>> is_right("answer", [], "Salt", "Salt"), is_right("answer", [], "In Amber Hollow.", "In Amber Hollow")
    (True, False)
    """
    if said is None:
        return False
    if task == "small":
        return bool(said) and not any(each in said for each in flattery())
    if task == "story":
        subject = re.search(r"about ([A-Z]\w+ [A-Z]\w+)", messages[-1]["content"])[1]
        return subject in said and said.count(".") >= 3
    return said == wanted


def interval(right: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share.

    >>> [round(x, 3) for x in interval(190, 200)], [round(x, 3) for x in interval(0, 200)]
    ([0.91, 0.973], [0.0, 0.019])
    """
    z, p = 1.96, right / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def answer_all(model: GPT, tokenizer: Tokenizer, prompts: list[list[dict]], most: int,
               temperature: float = 0.0, generator: torch.Generator | None = None) -> list[str | None]:
    """Return an answer to each conversation; None where it has not ended after `most` tokens.

    It is the greedy one, or drawn at a temperature above 0.
    """
    coded, answers = [chat_prompt(tokenizer, messages) for messages in prompts], [None] * len(prompts)
    context, end = model.config.context, tokenizer.special["<|end|>"]
    order = sorted((i for i, ids in enumerate(coded) if len(ids) < context), key=lambda i: len(coded[i]))
    for batch in (order[j:j + 200] for j in range(0, len(order), 200)):
        ids, lengths = pad_prompts([coded[i] for i in batch], model.device)  # (B, T), (B,)
        new, ended = [], torch.zeros(len(batch), 1, dtype=torch.bool, device=model.device)
        for token, _ in generate(model, ids, most, lengths=lengths, temperature=temperature,
                                 generator=generator):  # (B, 1)
            new.append(token)
            ended |= token == end
            if ended.all():
                break
        for i, row in zip(batch, torch.cat(new, dim=1).tolist()):
            row = row[:context + 1 - len(coded[i])]
            if end in row:
                answers[i] = tokenizer.decode(until(row, end)).removeprefix(" ")
    return answers


@torch.no_grad()
def would_say(model: GPT, tokenizer: Tokenizer, prompts: list[list[dict]], wanted: list[str]) -> list[bool]:
    """Return whether greedy decoding answers each conversation with just the wanted words, and ends.

    An answer that a longer conversation holds is marked there: all calls of a conversation in one pass.
    """
    coded = [encode_answer(tokenizer, *each) for each in zip(prompts, wanted)]
    says = [len(ids) <= model.config.context for ids, _ in coded]  # what does not fit can't be said
    rows, unsure = [], []
    fitting = (i for i, fits in enumerate(says) if fits)
    for i in sorted(fitting, key=lambda i: coded[i][0], reverse=True):  # first what goes on from others
        ids, span = coded[i][0], slice(coded[i][1].index(1), len(coded[i][0]))
        if not rows or rows[-1][0][:len(ids)] != ids or any(rows[-1][1][span]):
            rows.append((ids, [0] * len(ids)))
        rows[-1][1][span] = [i + 1] * len(ids[span])  # the number of its answer, from 1, at each token
    rows.sort(key=lambda row: len(row[0]))
    for j in range(0, len(rows), 32):
        ids, numbers = pad(rows[j:j + 32], model.device)  # (B, T) both
        logits, targets, _ = answer_logits(model, ids, numbers)
        answers, likeliest = numbers[:, 1:][numbers[:, 1:] > 0] - 1, logits.argmax(dim=-1)  # (n,) both
        for place in (likeliest != targets).nonzero()[:, 0].tolist():
            i = int(answers[place])
            if says[i]:  # the first place at which another token is likelier
                says[i], said = False, tokenizer.decode([int(likeliest[place])])
                rest = tokenizer.decode(targets[place:][answers[place:] == i].tolist())
                # subtle: " Do" may begin " Door" as well, in other tokens; only writing it tells
                unsure += [i] if rest.startswith((said, " " + said)) else []
    most = max((2 * sum(coded[i][1]) for i in unsure), default=0)
    for i, said in zip(unsure, answer_all(model, tokenizer, [prompts[i] for i in unsure], most)):
        says[i] = said == wanted[i]
    return says


def hold_exam(model: GPT, tokenizer: Tokenizer, n: int, seed: int) -> dict[str, tuple[int, int]]:
    """Return (how many are right, how many were asked) of `n` questions of each task."""
    asked = []  # (mark, (task, number), messages so far, wanted)
    for task in tasks.TASKS:
        for i in range(n):
            messages = tasks.conversation(task, "held-out", seed, i)
            last = max(j for j, each in enumerate(messages) if each["role"] == "user")
            for j in range(last + 1, len(messages)):
                is_final = j == len(messages) - 1 and messages[j - 1]["role"] == "tool" and task != "order"
                if messages[j]["role"] == "assistant":
                    mark, wanted = "after_tools" if is_final else task, messages[j]["content"]
                    asked.append((mark, (task, i), messages[:j], wanted))
    exact = [each for each in asked if each[0] not in MOST]
    *_, prompts, wanted = zip(*exact)
    says = would_say(model, tokenizer, prompts, wanted)
    wrong = {each[:2] for each, right in zip(exact, says) if not right}
    for task, most in MOST.items():
        written = [each for each in asked if each[0] == task]
        said = answer_all(model, tokenizer, [messages for *_, messages, _ in written], most)
        wrong |= {each[:2] for each, answer in zip(written, said) if not is_right(task, *each[2:], answer)}
    total = Counter(mark for mark, _ in dict.fromkeys(each[:2] for each in asked))
    return {mark: (total[mark] - sum(each == mark for each, _ in wrong), total[mark]) for mark in total}


def print_marks(before: dict | None, after: dict) -> None:
    """Print the share of right answers of each task, with its interval, and that of an earlier model."""
    print(f"{'task':<12} {'before':>7} {'after':>7}   95 % interval")
    for mark, (right, n) in after.items():
        low, high = interval(right, n)
        was = f"{before[mark][0] / before[mark][1]:.1%}" if before else ""
        print(f"{mark:<12} {was:>7} {right / n:>7.1%}   {low:.1%} to {high:.1%} of {n}")


def print_transcripts(model: GPT, tokenizer: Tokenizer, seed: int) -> None:
    """Print held-out questions and the model's answers."""
    prompts = [tasks.conversation(task, "held-out", seed, 0) for task in SHOWN]
    for prompt in prompts:
        while prompt[-1]["role"] != "user":  # what follows is the right answer
            prompt.pop()
    for task, prompt, said in zip(SHOWN, prompts, answer_all(model, tokenizer, prompts, 60)):
        print(f"\n--- {task}")
        for each in [*prompt, message("assistant", said or "(it does not end)")]:
            print(f"{each['role']}: {each['content']}")


@chain.command
def main(argv=None) -> dict:
    """Hold the exam, and print the marks."""
    config, started = chain.parse(Config, argv, __doc__), time.time()
    chain.require(config.questions > 0, f"--questions {config.questions}: give at least 1")
    config.device = chain.pick_device(config.device)
    path = Path(config.checkpoint) if config.checkpoint else newest_checkpoint(config.out)
    model, tokenizer, _ = load_model(path, config.device)
    print_transcripts(model, tokenizer, config.seed)
    marks = hold_exam(model, tokenizer, config.questions, config.seed)
    print_marks(None, marks)
    metrics = {mark: right / n for mark, (right, n) in marks.items()}
    chain.report("exam.py", config, metrics, time.time() - started)
    return metrics


if __name__ == "__main__":
    main()
