"""Byte-level BPE: text becomes tokens, and tokens become text again. No text is unknown: every byte is a token.

    split      a regular expression cuts text into pieces (words, numbers, signs); no token crosses a cut
    train      count all pairs of neighbours, join the most frequent pair into a new token, and so on
    encode     in each piece join the pair that was learnt first, until no learnt pair is left

Ids: the 256 bytes, then the merges in the order they were learnt, then the special tokens. Among pairs of equal
count the lexicographically greatest pair of byte strings wins, so that the merges depend on the text alone.

    python bpe.py                                   1,024 tokens from the small world (5 s, 2.5 bytes a token)
    python bpe.py --data my.txt --vocab_size 8192   your own text

Special tokens (the end of a document, the turns of a chat) are not text. `encode` makes none out of what somebody
wrote unless it is asked to; only `encode_chat` places them.
Left out: normalising Unicode, a fast path in C. Papers: Sennrich 2016 (BPE), Radford 2019 (bytes, the split).
"""

import heapq
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain as flatten
from itertools import islice
from pathlib import Path

import regex

import chain
import data

ROLES = ("system", "user", "assistant", "tool")
SPECIAL_TOKENS = ("<|endoftext|>", *(f"<|{role}|>" for role in ROLES), "<|end|>")
PATTERNS = {
    # One digit a token, so that numbers are spelled alike wherever they stand. "++" never gives back: faster.
    "default": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+",
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
SAFE_CUT = regex.compile(r"\p{L}(?=[^\p{L}\p{M}'’])|\p{N}(?=\s)")  # text cut here keeps its tokens: a word is over
CACHED_PIECES = 1 << 18   # pieces whose ids are remembered, about 50 MB
TRAINING_TEXTS = 8000     # documents of the world, or blocks of a file, that a tokenizer is trained on at most


@dataclass
class Config:
    """The flags of `python bpe.py`."""
    data: str = chain.option("world", "world, a file, a folder, an http(s) address, or stdlib")
    out: str = chain.option("out", "folder for everything that is made")
    vocab_size: int = chain.option(1024, "bytes, merges and special tokens together")
    pattern: str = chain.option("default", "how text is split: default, gpt2 or a regular expression")
    seed: int = chain.option(0, "seed of the small world")


# --------------------------------------------------------------------------------------------------- training

def pairs(ids: list[int]) -> Iterator[tuple[int, int]]:
    """Yield the neighbours in `ids` that one merge could join. subtle: "aaa" holds "aa" once, not twice.

    >>> list(pairs([1, 1, 1, 2]))
    [(1, 1), (1, 2)]
    """
    overlaps = False
    for i, (a, b) in enumerate(zip(ids, ids[1:])):
        overlaps = a == b and i > 0 and ids[i - 1] == a and not overlaps
        if not overlaps:
            yield a, b


def merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Return `ids` with every occurrence of `pair` replaced by `new`, from the left.

    >>> merge([1, 2, 1, 2, 2], (1, 2), 9)
    [9, 9, 2]
    """
    out, i = [], 0
    while i < len(ids):
        found = ids[i] == pair[0] and i + 1 < len(ids) and ids[i + 1] == pair[1]
        out.append(new if found else ids[i])
        i += 2 if found else 1
    return out


def split_special(text: str, special_tokens: Iterable[str]) -> list[str]:
    """Return text, special token, text, ... text. Where several fit, the longest is taken.

    >>> split_special("a<|end|>b", ["<|end|>"])
    ['a', '<|end|>', 'b']
    """
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return regex.split(f"({'|'.join(map(regex.escape, longest_first))})", text) if longest_first else [text]


def train_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Iterable[str] = (),
              pattern: str = "default") -> "Tokenizer":
    """Learn merges from `texts` until there are `vocab_size` tokens, or no pair is left: then it stops early.

    Each distinct piece is held once, with its count. A merge touches only the pieces that hold its pair. The heap
    knows the best pair; an entry whose count is no longer true is thrown away when it comes up.

    >>> train_bpe(["hug hug pug"], 258).merges
    [(b'u', b'g'), (b'h', b'ug')]
    """
    special_tokens = tuple(special_tokens)
    n_merges = vocab_size - 256 - len(special_tokens)
    if n_merges < 0:
        raise ValueError(f"vocab_size {vocab_size}: the bytes and special tokens alone are {vocab_size - n_merges}")
    split, counted = regex.compile(PATTERNS.get(pattern, pattern)), Counter()
    for text in texts:
        for part in split_special(text, special_tokens)[::2]:  # without the special tokens: nothing merges over one
            counted.update(match.group() for match in split.finditer(part))
    pieces, counts = [list(to_bytes(piece)) for piece in counted], list(counted.values())
    pair_counts, places = defaultdict(int), defaultdict(set)  # pair -> how often, and in which pieces
    for place, ids in enumerate(pieces):
        for pair in pairs(ids):
            pair_counts[pair] += counts[place]
            places[pair].add(place)
    tokens, merges = [bytes([b]) for b in range(256)], []
    falling = [(-b, 1) for b in range(256)]  # a token's sort key that turns the order of byte strings around
    heap = [(-n, falling[a], falling[b], a, b) for (a, b), n in pair_counts.items()]
    heapq.heapify(heap)
    while len(merges) < n_merges and heap:
        n, _, _, a, b = heapq.heappop(heap)
        if -n != pair_counts.get((a, b)):
            continue
        new = len(tokens)
        merges.append((tokens[a], tokens[b]))
        tokens.append(tokens[a] + tokens[b])
        falling.append((*(-byte for byte in tokens[new]), 1))  # subtle: the 1 puts a longer string before its prefix
        for pair in replace(pieces, counts, places, pair_counts, (a, b), new):
            if pair_counts[pair]:
                heapq.heappush(heap, (-pair_counts[pair], falling[pair[0]], falling[pair[1]], *pair))
            else:
                del pair_counts[pair]
    return Tokenizer(merges, special_tokens, pattern)


def replace(pieces: list, counts: list, places: dict, pair_counts: dict, pair: tuple[int, int], new: int) -> set:
    """Merge `pair` in the pieces that hold it, bring the counts up to date, return the pairs that changed."""
    changed = set()
    for place in places.pop(pair):
        before, after = pieces[place], merge(pieces[place], pair, new)
        pieces[place] = after
        for old in pairs(before):
            pair_counts[old] -= counts[place]
            changed.add(old)
        for young in pairs(after):
            pair_counts[young] += counts[place]
            places[young].add(place)
            changed.add(young)
    return changed


# --------------------------------------------------------------------------------------------------- the tokenizer

def to_bytes(text: str) -> bytes:
    """Return UTF-8. Half a surrogate pair is no character and becomes "?"."""
    return text.encode("utf-8", errors="replace")


class Tokenizer:
    """Text ↔ ids. `special` maps the special tokens to their ids."""

    def __init__(self, merges: list[tuple[bytes, bytes]], special_tokens: Iterable[str] = (),
                 pattern: str = "default", ids: dict[bytes, int] | None = None, special: dict[str, int] | None = None):
        """`ids` and `special` are for published vocabularies that number their tokens otherwise than we do."""
        self.merges, self.pattern = [(bytes(a), bytes(b)) for a, b in merges], pattern
        tokens = dict.fromkeys([bytes([b]) for b in range(256)] + [a + b for a, b in self.merges])
        self.ids = ids or {token: i for i, token in enumerate(tokens)}
        self.special = special or {name: len(self.ids) + i for i, name in enumerate(special_tokens)}
        self.vocab = {i: token for token, i in self.ids.items()} | {i: to_bytes(s) for s, i in self.special.items()}
        # pair of ids -> (rank, id of both together)
        self.ranks = {(self.ids[a], self.ids[b]): (i, self.ids[a + b]) for i, (a, b) in enumerate(self.merges)}
        self.split = regex.compile(PATTERNS.get(pattern, pattern))
        self.cache: dict[str, list[int]] = {}

    @property
    def n_vocab(self) -> int:
        """One more than the largest id: the number of rows that an embedding needs."""
        return max(self.vocab) + 1

    def encode_piece(self, piece: str) -> list[int]:
        """Return the ids of one piece: join the pair of the lowest rank, everywhere, until no pair has a rank."""
        ids = [self.ids[bytes([b])] for b in to_bytes(piece)]
        while known := [pair for pair in zip(ids, ids[1:]) if pair in self.ranks]:
            best = min(known, key=self.ranks.__getitem__)
            ids = merge(ids, best, self.ranks[best][1])
        return ids

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of text in which nothing is special. The same pieces come again, so they are kept."""
        pieces = [match.group() for match in self.split.finditer(text)]
        if len(self.cache) > CACHED_PIECES:
            self.cache.clear()
        for piece in set(pieces).difference(self.cache):
            self.cache[piece] = self.encode_piece(piece)
        return list(flatten.from_iterable(map(self.cache.__getitem__, pieces)))

    def encode(self, text: str, allowed_special: bool | Iterable[str] = False) -> list[int]:
        """Return the ids of `text`. Special tokens written in it stay text, unless allowed: True, or their names.

        >>> Tokenizer([(b"h", b"i")], ["<|end|>"]).encode("hi<|end|>", allowed_special=True)
        [256, 257]
        """
        names = self.special if allowed_special is True else set(allowed_special or ()) & set(self.special)
        parts = split_special(text, names)
        return [i for n, part in enumerate(parts)
                for i in ([self.special[part]] if n % 2 else self.encode_text(part))]

    def encode_iterable(self, iterable: Iterable[str]) -> Iterator[int]:
        """Yield the ids of the joined strings, holding only what comes after the last safe cut in memory."""
        rest = ""
        for text in iterable:
            rest += text
            end = max((match.end() for match in SAFE_CUT.finditer(rest)), default=0)
            yield from self.encode_text(rest[:end])
            rest = rest[end:]
        yield from self.encode_text(rest)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. Bytes that are no whole character (a cut-off one, say) become U+FFFD."""
        return b"".join(self.vocab[int(i)] for i in ids).decode("utf-8", errors="replace")

    def encode_chat(self, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        """Return (ids, loss mask) of a conversation of {"role", "content"} messages:

            <|endoftext|> <|user|> content <|end|> <|assistant|> content <|end|>

        The mask is 1 where the assistant learns: on its content and the <|end|> behind it, on nothing else. Each
        content is encoded by itself and holds no special token, whatever it says. Raises ValueError.
        """
        if missing := [name for name in SPECIAL_TOKENS if name not in self.special]:
            raise ValueError(f"this tokenizer has no {missing[0]}: train it with special_tokens=SPECIAL_TOKENS")
        ids, mask = [self.special["<|endoftext|>"]], [0]
        for message in messages:
            if message["role"] not in ROLES:
                raise ValueError(f"role {message['role']!r}: it must be one of {', '.join(ROLES)}")
            content = [*self.encode(message["content"]), self.special["<|end|>"]]
            ids += [self.special[f"<|{message['role']}|>"], *content]
            mask += [0, *[int(message["role"] == "assistant")] * len(content)]
        return ids, mask

    def to_dict(self) -> dict:
        """Return all that makes this tokenizer, as plain types; bytes are written as characters 0 to 255."""
        return {"merges": [[a.decode("latin-1"), b.decode("latin-1")] for a, b in self.merges],
                "ids": {token.decode("latin-1"): i for token, i in self.ids.items()},
                "special": self.special, "pattern": self.pattern}

    @classmethod
    def from_dict(cls, content: dict) -> "Tokenizer":
        """Return the tokenizer that `to_dict` told of. Raises KeyError, TypeError or ValueError if it is none."""
        return cls([(a.encode("latin-1"), b.encode("latin-1")) for a, b in content["merges"]],
                   ids={token.encode("latin-1"): i for token, i in content["ids"].items()},
                   special=content["special"], pattern=content["pattern"])

    def save(self, path) -> None:
        """Write the tokenizer as JSON."""
        chain.write_whole(path, lambda file: file.write(json.dumps(self.to_dict()).encode()))

    @classmethod
    def load(cls, path) -> "Tokenizer":
        """Read what `save` wrote. Raises UserError if the file is not there or no tokenizer."""
        chain.require(Path(path).is_file(), f"{path}: no such tokenizer; make it with `python bpe.py`")
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError, regex.error):
            raise chain.UserError(f"{path}: cut off or no tokenizer; make it again with `python bpe.py`")

    @classmethod
    def from_gpt2(cls, vocab_json, merges_txt) -> "Tokenizer":
        """Read GPT-2's published files. subtle: they spell each byte as a printable character, and their ids 0 to
        255 follow the order of those characters, not of the bytes."""
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        rest = [b for b in range(256) if b not in printable]
        byte = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}
        lines = Path(merges_txt).read_text(encoding="utf-8").split("\n")
        merges = [tuple(bytes(byte[c] for c in token) for token in line.split(" "))
                  for line in lines if line and not line.startswith("#version")]
        made, ids, special = {bytes([b]) for b in range(256)} | {a + b for a, b in merges}, {}, {}
        for token, i in json.loads(Path(vocab_json).read_text(encoding="utf-8")).items():
            raw = bytes(byte.get(c, 0) for c in token)
            (ids if raw in made else special)[raw if raw in made else token] = i  # no merge makes <|endoftext|>
        return cls(merges, pattern="gpt2", ids=ids, special=special)


# --------------------------------------------------------------------------------------------------- the script

def find_or_make(source, out: Path, vocab_size: int | None, pattern: str = "default") -> Tokenizer:
    """Return the tokenizer in the folder `out`, or train one on the beginning of `source` and keep it there.

    Raises UserError if one is there and has another size than `vocab_size` asks for.
    """
    path, wanted = Path(out) / "tokenizer.json", vocab_size or 1024
    if path.exists():
        found = Tokenizer.load(path)
        chain.require(vocab_size in (None, found.n_vocab), f"--vocab_size {wanted}: {path} has {found.n_vocab} tokens; "
                      "leave the flag out, or choose another --out")
        return found
    try:
        made = train_bpe(islice(source.documents("train"), TRAINING_TEXTS), wanted, SPECIAL_TOKENS, pattern)
    except (ValueError, regex.error) as error:
        raise chain.UserError(f"--vocab_size {wanted} --pattern {pattern}: {error}")
    if made.n_vocab < wanted:
        print(f"--vocab_size {wanted}: the text has no pair left to merge after {made.n_vocab} tokens, stopped there")
    made.save(path)
    return made


def coloured(tokenizer: Tokenizer, text: str) -> str:
    """Return `text` cut into its tokens: in changing colours on a terminal, elsewhere between bars."""
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(text)]
    if not sys.stdout.isatty():
        return "|".join(pieces)
    return "".join(f"\x1b[30;{(103, 106, 102, 105)[i % 4]}m{piece}" for i, piece in enumerate(pieces)) + "\x1b[0m"


@chain.command
def main(argv=None) -> dict:
    """Train a tokenizer, show what it does, and tell how well it packs text it has not seen."""
    config, began = chain.parse(Config, argv, __doc__), time.perf_counter()
    out = Path(config.out)
    source = data.open_source(config.data, out, config.seed)
    (out / "tokenizer.json").unlink(missing_ok=True)
    tokenizer = find_or_make(source, out, config.vocab_size, config.pattern)
    trained = time.perf_counter()
    text = "".join(islice(source.documents("held-out"), 1000))
    start = time.perf_counter()
    n = len(tokenizer.encode(text))
    seconds = time.perf_counter() - start
    print(coloured(tokenizer, text[:400]))
    metrics = {"tokens": tokenizer.n_vocab, "bytes_per_token": len(to_bytes(text)) / n,
               "training_seconds": trained - began, "megabytes_per_second": len(to_bytes(text)) / 1e6 / seconds}
    chain.report("bpe.py", config, metrics, time.perf_counter() - began)
    return metrics


if __name__ == "__main__":
    main()
