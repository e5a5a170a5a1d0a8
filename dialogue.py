"""Conversations become rows of tokens: what is learned in them, and how several share a row without a leak.

    ids       <|endoftext|> <|user|> " Hi" <|end|> <|assistant|> " Hello" <|end|>
    learned                                                      ^^^^^^^^ ^^^^^^^    the answer and its end
    y         the next token of x where it is learned; elsewhere IGNORE, which the loss leaves out
    segments  which conversation of its row a token belongs to: model.py lets none see another

Rows have the length of the context. Conversations are put into them longest first, each into the fullest row
that has room (best-fit decreasing), so that few places stay empty. A conversation longer than the context
loses its oldest tokens, and its last answer remains. One in which nothing is learned is left out. Both are
counted.

exam.py and dpo.py look at one answer: `encode_answer` gives its tokens, `answer_log_probs` log π of it.

Your own conversations are lines of a .jsonl file, in the form that others use too:

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    {"prompt": "Hi", "chosen": "Hello", "rejected": "What?"}         or "messages" in place of "prompt"

Left out: pictures, tool calls of another form than text. Paper: Krell 2021 (packing without a leak).
"""

import gzip
import json
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import chain
import data
from bpe import ROLES, Tokenizer

IGNORE = -100  # a target that `cross_entropy` leaves out


@dataclass
class Rows:
    """Conversations in rows. `cut` were too long, `empty` had nothing to learn."""
    x: Tensor         # (rows, T) ids
    y: Tensor         # (rows, T) targets
    segments: Tensor  # (rows, T)
    cut: int
    empty: int


def check_messages(messages) -> list[dict]:
    """Return `messages` if they are a conversation; else raise ValueError that says what is wrong."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("an empty conversation")
    for each in messages:
        if not isinstance(each, dict) or not isinstance(each.get("content"), str):
            raise ValueError('a message is {"role": ..., "content": ...}, both text')
        if each.get("role") not in ROLES:
            raise ValueError(f"role {each.get('role')!r}; give one of {', '.join(ROLES)}")
    return [{"role": each["role"], "content": each["content"]} for each in messages]


def conversation_of(line: dict) -> list[dict]:
    """Return the messages of a line of a file for sft.py. KeyError or ValueError if they are none."""
    messages = check_messages(line["messages"])
    if all(each["role"] != "assistant" for each in messages):
        raise ValueError("the assistant says nothing")
    return messages


def preference_of(line: dict) -> tuple[list[dict], str, str]:
    """Return (messages so far, chosen, rejected) of a line for dpo.py. KeyError or ValueError if not."""
    given = line["prompt"] if "prompt" in line else line["messages"]
    messages = check_messages([{"role": "user", "content": given}] if isinstance(given, str) else given)
    answers = []
    for side in ("chosen", "rejected"):
        said = line[side]
        if isinstance(said, list):  # some files give the answer as messages; its last one counts
            last = check_messages(said)[-1]
            said = last["content"] if last["role"] == "assistant" else None
        if not isinstance(said, str) or not said:
            raise ValueError(f'"{side}" is empty, or not what an assistant says')
        answers.append(said)
    if answers[0] == answers[1]:
        raise ValueError('"chosen" and "rejected" are equal')
    return messages, *answers


def read_lines(path: str, read, form: str) -> list:
    """Return `read(line)` of every line of a .jsonl file. UserError names a bad line by its number."""
    chain.require(Path(path).is_file(), f"--data {path}: no such file; give world or a .jsonl file")
    chain.require(data.JSON_LINES.search(path), f"--data {path}: give a .jsonl file with lines like {form}")
    found = []
    try:
        with data.open_text(Path(path)) as file:
            lines = list(enumerate(file, 1))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise chain.UserError(f"{path}: a broken .gz file ({error}); fetch or pack it again")
    for number, line in lines:
        try:
            found += [read(json.loads(line.lstrip("\ufeff")))] if line.strip() else []
        except KeyError as error:
            raise chain.UserError(f"{path}, line {number}: it lacks {error}; write it like {form}")
        except (ValueError, TypeError, RecursionError) as error:
            raise chain.UserError(f"{path}, line {number}: {error}; write it like {form}")
    chain.require(len(found) > 1, f"{path}: {len(found)} lines, too few to hold one out; give more")
    return found


def shorten(ids: list[int], learned: list[int], context: int) -> tuple[list[int], list[int]]:
    """Return ids and mask without the oldest tokens that do not fit; the first one, <|endoftext|>, stays.

    >>> shorten([0, 1, 2, 3, 4], [0, 0, 0, 1, 1], 3)
    ([0, 3, 4], [0, 1, 1])
    """
    if len(ids) <= context:
        return ids, learned
    start = len(ids) + 1 - context
    return ids[:1] + ids[start:], learned[:1] + learned[start:]


def pack(lengths: list[int], size: int) -> list[list[int]]:
    """Return rows: which of the things with these lengths share one, so that its sum is at most `size`.

    >>> pack([3, 5, 2, 4, 4], 8)
    [[1, 0], [3, 4], [2]]
    """
    rows, with_room = [], defaultdict(list)  # room -> the rows that have just so much
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = next((room for room in range(lengths[i], size) if with_room[room]), size)
        row = with_room[room].pop() if room < size else len(rows)
        rows += [[]] if row == len(rows) else []
        rows[row].append(i)
        with_room[room - lengths[i]].append(row)
    return rows


def make_rows(conversations: list[list[dict]], tokenizer: Tokenizer, context: int) -> Rows:
    """Return the conversations as rows of `context` tokens."""
    coded, cut = [], 0
    for messages in conversations:
        ids, learned = tokenizer.encode_chat(messages)
        n = max((i + 1 for i, is_learned in enumerate(learned) if is_learned), default=0)
        ids, learned = ids[:n], learned[:n]  # what follows the last answer teaches nothing
        cut += len(ids) > context
        ids, learned = shorten(ids, learned, context)
        coded += [(ids, learned)] if any(learned) else []
    packed = pack([len(ids) for ids, _ in coded], context)
    x = torch.full((len(packed), context), tokenizer.special["<|endoftext|>"])
    y, segments = torch.full_like(x, IGNORE), torch.full_like(x, -1, dtype=torch.int32)
    for row, members in enumerate(packed):
        start = 0
        for segment, (ids, learned) in enumerate(coded[i] for i in members):
            stop = start + len(ids)
            x[row, start:stop], segments[row, start:stop] = torch.tensor(ids), segment
            # subtle: the last token of a conversation predicts nothing, least of all the next one's first
            targets = [i if is_learned else IGNORE for i, is_learned in zip(ids[1:], learned[1:])]
            y[row, start:stop - 1] = torch.tensor(targets)
            start = stop
    return Rows(x, y, segments, cut, len(conversations) - len(coded))


def encode_answer(tokenizer: Tokenizer, messages: list[dict], said: str) -> tuple[list[int], list[int]]:
    """Return the ids of a conversation that ends with the answer `said`, and a mask: 1 on it and its <|end|>.

    subtle: the mask of `encode_chat` also marks what the assistant said before; here that is prompt.
    """
    start = len(tokenizer.encode_chat(messages)[0]) + 1  # <|assistant|>
    ids, _ = tokenizer.encode_chat([*messages, {"role": "assistant", "content": said}])
    return ids, [0] * start + [1] * (len(ids) - start)


def encode_pair(tokenizer: Tokenizer, pair: tuple[list[dict], str, str], context: int) -> tuple[list, int]:
    """Return [(ids, mask) of the chosen, of the rejected answer], and how many tokens they lost to fit.

    Both lose as many of the oldest tokens: their prompt stays one and the same. UserError if there is no room
    for one.
    """
    messages, *answers = pair
    sides = [encode_answer(tokenizer, messages, said) for said in answers]
    excess = max(0, max(len(ids) for ids, _ in sides) - context)
    chain.require(excess + 1 < sides[0][1].index(1), f"an answer of {max(map(len, answers)):,} signs leaves "
                  f"its prompt no room in the context of {context}; shorten it")
    return [shorten(ids, mask, len(ids) - excess) for ids, mask in sides], excess


def pad(coded: list[tuple[list[int], list[int]]], device) -> tuple[Tensor, Tensor]:
    """Return ids and masks (B, T), filled up at the right, where no token is seen by those before it."""
    T = max(len(ids) for ids, _ in coded)
    ids, mask = (torch.tensor([list(part) + [0] * (T - len(part)) for part in parts], device=device)
                 for parts in zip(*coded))
    return ids, mask  # (B, T) both


def answer_logits(model, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logits (n, V), the token that stands there (n,), its row (n,)) of n places with mask > 0."""
    wanted = mask[:, 1:] != 0  # (B, T - 1): what a place predicts is the next one's token
    logits = model.head(model.hidden(ids[:, :-1], wanted=wanted))  # (n, V)
    return logits.float(), ids[:, 1:][wanted], wanted.nonzero()[:, 0]


def answer_log_probs(model, ids: Tensor, mask: Tensor) -> Tensor:
    """Return (B,) log π of the answers, summed over the tokens of ids (B, T) whose mask is 1.

    subtle: the sum, not the mean. What DPO derives holds for the probability of the whole answer.
    """
    logits, targets, row = answer_logits(model, ids, mask)
    each = -F.cross_entropy(logits, targets, reduction="none")  # (n,)
    return each.new_zeros(len(ids)).index_add(0, row, each)  # (B,)


@torch.no_grad()
def log_probs(model, coded: list[tuple], device) -> Tensor:
    """Return log π (N,) of all answers, each coded as (ids, mask)."""
    order = sorted(range(len(coded)), key=lambda i: len(coded[i][0]))  # of nearly one length: little to pad
    found = [answer_log_probs(model, *pad([coded[i] for i in order[j:j + 64]], device))
             for j in range(0, len(order), 64)]
    return torch.cat(found)[np.argsort(order)]  # (N,), in the given order again
