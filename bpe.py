"""Byte-level BPE: text -> tokens, and conversations -> tokens + loss mask.

    learn   cut the texts into pieces (about words), write each piece as bytes; then again and again
            join the most frequent pair of neighbours into a new token. Ties: the greatest pair of byte strings.
    encode  cut a text into pieces; in each, join the pair that was learned first, until none is left.
    ids     0-255 the bytes, then the merges in the order learned, then the special tokens.

    python bpe.py                                        the small world, into out/tokenizer.json: 3 seconds,
                                                         1,024 tokens, about 2.9 bytes a token
    python bpe.py --data my.txt --vocab_size 8192        your own text: a file, a folder, an address, or `stdlib`

- No merge crosses the border of a piece, so " the" is learned once and "dog." and "dog!" share their "dog".
- Any text can be encoded, since all bytes are tokens, and decode(encode(text)) == text. The one exception is a lone
  surrogate (half a character, seen in broken input): UTF-8 has no bytes for it, and it becomes "?".
- A special token such as <|end|> is one id that no merge makes. User text becomes one only where the caller allows
  it by name: a message that spells "<|system|>" must not turn into an order.

Left out: normalising the text, byte fallback and scores as in SentencePiece, dropping merges at random.
Papers: Sennrich 2016 (BPE), Radford 2019 (on bytes, with a split pattern: GPT-2).
"""

import heapq
import itertools
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import regex
from tqdm import tqdm

import chain
import data

DEFAULT = "default"
PATTERNS = {
    # A word with the space before it; one digit; the ending of "don't", "she's"; punctuation; white space, of which
    # a last space is left to the word behind it. Pieces end after 64 characters: joining takes time that grows with
    # the square of a piece's length, and a text without spaces must not be able to stop the program.
    "default": r" ?[\p{L}\p{M}]{1,64}+|\p{N}|['’](?i:[sdmt]|ll|re|ve)(?![\p{L}\p{M}])"
               r"| ?[^\s\p{L}\p{M}\p{N}]{1,64}+|\s{1,64}(?!(?<= )\S)|\s",
    "gpt2": r"'(?:[sdmt]|ll|re|ve)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+",
}
LOOK_AHEAD = 16        # no pattern may look further than this behind the piece that it ends; the two above need 3
CACHED_PIECES = 100_000  # about 25 MB
TEXTS = 8_000          # to learn from: 3 MB of the small world, 130 MB of a long file
SPECIAL_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>")
ROLES = ("system", "user", "assistant", "tool")

BYTES = [bytes([b]) for b in range(256)]
# GPT-2's files are text, so they write the bytes that can't be seen (space, newline, ...) as letters from U+0100 on.
UNSEEN = [b for b in range(256) if not (33 <= b <= 126 or 161 <= b <= 172 or 174 <= b)]
LETTER_OF_BYTE = {b: chr(256 + n) for n, b in enumerate(UNSEEN)}
BYTE_OF_LETTER = {256 + n: b for n, b in enumerate(UNSEEN)}

Pair = tuple[bytes, bytes]


@dataclass
class Config:
    """The flags of `python bpe.py`."""
    data: str = chain.option("world", "world, stdlib, a file, a folder or an http(s) address")
    vocab_size: int = chain.option(1024, "number of tokens: 256 bytes + merges + 6 special tokens")
    pattern: str = chain.option(DEFAULT, "how text is cut into pieces: default, gpt2 or a regular expression")
    out: str = chain.option("out", "folder for everything that is made")
    seed: int = chain.option(0, "seed of the small world")


# --- learning merges -------------------------------------------------------------------------------------------

def count_pairs(word: list[bytes]) -> list[Pair]:
    """Return the pairs of neighbours in `word`, without those that overlap an equal pair before them.

    >>> count_pairs([b"a", b"a", b"a", b"b"])
    [(b'a', b'a'), (b'a', b'b')]
    """
    pairs, last = [], None
    for pair in pairwise(word):
        last = None if pair == last else pair  # "aaa" has one pair that can be joined, "aaaa" has two
        if last:
            pairs.append(pair)
    return pairs


def merge(word: list[bytes], pair: Pair) -> list[bytes]:
    """Return `word` with every `pair` in it joined, from the left.

    >>> merge([b"a", b"a", b"a", b"b"], (b"a", b"a"))
    [b'aa', b'a', b'b']
    """
    first, second = pair
    merged = []
    for token in word:
        if token == second and merged and merged[-1] == first:
            merged[-1] = first + second
        else:
            merged.append(token)
    return merged


def falling(token: bytes) -> str:
    """Return a key that sorts tokens from the greatest to the least, because a heap gives its least entry first.

    >>> sorted([b"a", b"ab", b"b"], key=falling)
    [b'b', b'ab', b'a']
    """
    return "".join([chr(255 - b) for b in token]) + chr(256)  # the end is above every byte: "ab" comes before "a"


def pop_most_frequent(heap: list, counts: dict[Pair, int]) -> Pair | None:
    """Take the next pair off the heap, or None if no pair is left."""
    while heap:
        negative_count, _, _, pair = heapq.heappop(heap)
        # subtle: a count that changed was pushed again, but its old entry is still in the heap. Skip what is stale.
        if counts[pair] == -negative_count:
            return pair
    return None


def learn_merges(pieces: Counter[str], n_merges: int) -> list[Pair]:
    """Return up to `n_merges` merges, best first; fewer when no pair is left. `pieces`: how often each one occurs.

    >>> learn_merges(Counter({"low": 5, "lot": 2, "cow": 1}), 3)
    [(b'l', b'o'), (b'lo', b'w'), (b'lo', b't')]
    """
    words = [[BYTES[b] for b in piece.encode("utf-8", "replace")] for piece in pieces]
    times = list(pieces.values())
    counts: dict[Pair, int] = defaultdict(int)
    where: dict[Pair, set[int]] = defaultdict(set)  # the words that hold a pair, or held it once
    for i, word in enumerate(words):
        for pair in count_pairs(word):
            counts[pair] += times[i]
            where[pair].add(i)

    def entry(pair: Pair) -> tuple:
        return -counts[pair], falling(pair[0]), falling(pair[1]), pair

    heap, merges = [entry(pair) for pair in counts], []
    heapq.heapify(heap)
    for _ in tqdm(range(n_merges), desc="merges", leave=False, disable=None):
        best = pop_most_frequent(heap, counts)
        if best is None:
            break
        merges.append(best)
        # Only words that hold the pair change: recounting all words here would take hours instead of seconds.
        changes: dict[Pair, int] = defaultdict(int)
        for i in where.pop(best):
            old, n = words[i], times[i]
            words[i] = new = merge(old, best)
            for pair in count_pairs(old):
                changes[pair] -= n
            for pair in count_pairs(new):
                changes[pair] += n
                where[pair].add(i)
        for pair, change in changes.items():
            counts[pair] += change
            if change and counts[pair]:
                heapq.heappush(heap, entry(pair))
    return merges


def train_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Iterable[str] = (),
              pattern: str = DEFAULT) -> "Tokenizer":
    """Return a tokenizer learned from `texts`, with `vocab_size` tokens: 256 bytes + merges + special tokens.

    It has fewer where the texts leave no pair to join. Only the distinct pieces are kept in memory.

    >>> train_bpe(["aaab aaab"], vocab_size=258).merges
    [(b'a', b'a'), (b'aa', b'a')]
    """
    special_tokens = tuple(special_tokens)
    least = 256 + len(special_tokens)
    chain.require(vocab_size >= least, f"vocab_size {vocab_size}: give {least} or more, for 256 bytes "
                  f"and {len(special_tokens)} special tokens")
    split, pieces = compile_pattern(pattern), Counter()
    for text in texts:
        for part in split_special(text, special_tokens)[::2]:
            pieces.update(split.findall(part))
    return Tokenizer(learn_merges(pieces, vocab_size - least), special_tokens, pattern)


# --- cutting text ----------------------------------------------------------------------------------------------

def compile_pattern(pattern: str) -> regex.Pattern:
    """Return the compiled split pattern for a name in PATTERNS or a regular expression. Raises UserError."""
    way_out = f"; give {', '.join(PATTERNS)} or a regular expression without groups, such as \\w+|\\W+"
    chain.require(pattern in PATTERNS or not pattern.isidentifier(), f"pattern {pattern!r}: not known" + way_out)
    try:
        # Characters that a pattern leaves out become pieces of their own: nothing of a text is lost.
        compiled = regex.compile(f"{PATTERNS.get(pattern, pattern)}|(?s:.)")
    except regex.error as error:
        raise chain.UserError(f"pattern {pattern!r}: {error}{way_out}")
    chain.require(not compiled.groups, f"pattern {pattern!r}: has a group; write (?:...) for (...)")
    chain.require(not compiled.match(""), f"pattern {pattern!r}: matches no text at all" + way_out)
    return compiled


def split_special(text: str, special_tokens: Iterable[str]) -> list[str]:
    """Cut `text` at special tokens. Even places of the result hold text, odd places special tokens.

    >>> split_special("<|user|>Hi<|end|>", ["<|end|>", "<|user|>"])
    ['', '<|user|>', 'Hi', '<|end|>', '']
    """
    longest_first = sorted(special_tokens, key=len, reverse=True)  # of "<|a|>" and "<|a|>b" take the longer
    return regex.split(f"({'|'.join(map(regex.escape, longest_first))})", text) if longest_first else [text]


def printable(token: bytes) -> str:
    """Write a token as GPT-2's files do.

    >>> printable(b" the"), from_printable("Ġthe")
    ('Ġthe', b' the')
    """
    return token.decode("latin-1").translate(LETTER_OF_BYTE)


def from_printable(letters: str) -> bytes:
    """Undo `printable`. Raises ValueError for a letter that stands for no byte."""
    return letters.translate(BYTE_OF_LETTER).encode("latin-1")


# --- the tokenizer ---------------------------------------------------------------------------------------------

class PieceCache(dict):
    """The ids of the pieces seen so far. Words come again and again, so most of the work is looking up."""

    def __init__(self, ranks: dict[Pair, int], id_of: dict[bytes, int]):
        self.ranks, self.id_of = ranks, id_of

    def __missing__(self, piece: str) -> list[int]:
        """Encode a new piece: join the pair with the lowest rank until no pair is known."""
        word = [BYTES[b] for b in piece.encode("utf-8", "replace")]
        unknown = len(self.ranks)
        while len(word) > 1:
            best = min(pairwise(word), key=lambda pair: self.ranks.get(pair, unknown))
            if best not in self.ranks:
                break
            word = merge(word, best)
        if len(self) >= CACHED_PIECES:  # endless text must not fill the memory
            self.clear()
        self[piece] = ids = [self.id_of[token] for token in word]
        return ids


class Tokenizer:
    """Turns text into ids and back.

    merges: pairs of tokens, in the order learned        vocab: id -> bytes, special tokens too
    special: special token -> id                         pattern: the regular expression that cuts text into pieces

    >>> t = Tokenizer([(b"h", b"e"), (b"l", b"l"), (b"he", b"ll")], ["<|end|>"])
    >>> t.encode("hello<|end|>")[:2], t.encode("hello<|end|>", allowed_special=True)
    ([258, 111], [258, 111, 259])
    >>> t.decode([258, 111, 259])
    'hello<|end|>'
    """

    def __init__(self, merges: Iterable[Pair], special_tokens: Iterable[str] = (), pattern: str = DEFAULT,
                 ids: list[int] | None = None):
        """`ids`: those of the 256 bytes, the merges and the special tokens, where they are not 0, 1, 2, ..."""
        self.merges = [(first, second) for first, second in merges]
        special_tokens = list(special_tokens)
        if not all(special_tokens) or len(set(special_tokens)) < len(special_tokens):
            raise ValueError(f"special tokens {special_tokens}: one is empty or there twice; remove it")
        tokens = BYTES + [first + second for first, second in self.merges]
        known = set(BYTES)
        for first, second in self.merges:
            if not {first, second} <= known:
                raise ValueError(f"merge of {first!r} and {second!r}: one of them is no token yet; check the order")
            known.add(first + second)
        self.ids = list(range(len(tokens) + len(special_tokens)) if ids is None else ids)
        self.vocab = dict(zip(self.ids, tokens + [name.encode() for name in special_tokens], strict=True))
        self.special = dict(zip(special_tokens, self.ids[len(tokens):]))
        self.pattern, self.splitter = PATTERNS.get(pattern, pattern), compile_pattern(pattern)
        self.cache = PieceCache({pair: rank for rank, pair in enumerate(self.merges)}, dict(zip(tokens, self.ids)))

    @property
    def n_vocab(self) -> int:
        """Every id is smaller than this number."""
        return max(self.vocab) + 1

    def allowed(self, allowed_special: bool | Iterable[str]) -> set[str]:
        """Return the names of the special tokens meant by False (none), True (all) or a set of names."""
        if isinstance(allowed_special, bool):
            return set(self.special) if allowed_special else set()
        if unknown := set(allowed_special) - set(self.special):
            raise ValueError(f"special tokens {sorted(unknown)}: not known; there are {list(self.special)}")
        return set(allowed_special)

    def pieces(self, text: str, special_tokens: set[str]) -> Iterator[tuple[str, list[int]]]:
        """Yield (piece, its ids) from left to right. Each of `special_tokens` is a piece of its own."""
        for i, part in enumerate(split_special(text, special_tokens)):
            if i % 2:
                yield part, [self.special[part]]
            else:
                for piece in self.splitter.findall(part):
                    yield piece, self.cache[piece]

    def encode(self, text: str, allowed_special: bool | Iterable[str] = False) -> list[int]:
        """Return the ids of `text`. Only special tokens that `allowed_special` names are recognised in it."""
        return [i for _, ids in self.pieces(text, self.allowed(allowed_special)) for i in ids]

    def encode_iterable(self, iterable: Iterable[str], allowed_special: bool | Iterable[str] = False) -> Iterator[int]:
        """Yield the ids of all strings joined, wherever they were cut, in constant memory."""
        special_tokens = self.allowed(allowed_special)
        # subtle: the end of a text may change what was cut before it. "'" and "l" are two pieces until "l" follows,
        # and "<|en" may become a special token. So a piece is settled only when this many characters follow it.
        held_back = LOOK_AHEAD + max(map(len, special_tokens), default=0)
        text, enough = "", 0
        for string in iterable:
            text += string
            if len(text) < enough:
                continue
            end = 0
            for piece, ids in self.pieces(text, special_tokens):
                if end + len(piece) + held_back > len(text):
                    break
                yield from ids
                end += len(piece)
            text = text[end:]
            enough = 2 * len(text)  # a long piece that comes in many strings is not cut anew for each of them
        for _, ids in self.pieces(text, special_tokens):
            yield from ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. Bytes that are not UTF-8, such as half a character, become U+FFFD."""
        try:
            return b"".join([self.vocab[i] for i in ids]).decode("utf-8", "replace")
        except KeyError as error:
            raise ValueError(f"id {error}: not in this vocabulary of {len(self.vocab)} tokens; was it made by another?")

    def encode_chat(self, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        """Return (ids, loss_mask) of a conversation. The mask is 1 where the assistant learns to write.

        <|endoftext|> <|user|> Hi <|end|> <|assistant|> Hello <|end|>       special tokens in the content stay text,
              0           0     0    0          0         1      1          so nobody can forge another's message
        """
        if missing := set(SPECIAL_TOKENS) - set(self.special):
            raise ValueError(f"this tokenizer lacks {sorted(missing)}: train one with special_tokens=SPECIAL_TOKENS")
        ids, mask = [self.special["<|endoftext|>"]], [0]
        for message in messages:
            if message["role"] not in ROLES:
                raise ValueError(f"role {message['role']!r}: not known; choose one of {', '.join(ROLES)}")
            said = self.encode(message["content"]) + [self.special["<|end|>"]]
            ids += [self.special[f"<|{message['role']}|>"], *said]
            mask += [0] + [int(message["role"] == "assistant")] * len(said)
        return ids, mask
