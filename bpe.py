"""Byte-level BPE: text -> tokens, and conversations -> tokens + loss mask.

    learn    cut texts into pieces (about a word each), written as bytes. Then again and again: join the most
             frequent pair of neighbours into a new token. Among equals the greatest pair of byte strings.
    encode   cut a text into pieces; in each, join the pair that was learned first, until none is left.
    ids      0 to 255 are the bytes; then the merges, in the order learned; then the special tokens.

    python bpe.py                                     the small world: 3 seconds, 2.5 bytes a token
    python bpe.py --data my.txt --vocab_size 8192     your own text: a file, a folder, an address, or `stdlib`

All text has ids and decodes to itself (half a surrogate pair is no text and gives "?"). A special token like
<|end|> is one id that no merge makes. Text holds one only where allowed: a user's "<|system|>" is plain text.
Left out: normalising text. Papers: Sennrich 2016 (BPE), Radford 2019 (GPT-2: bytes, cut by a pattern).
"""

import heapq
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import regex

import chain
import data

DEFAULT = "default"
PATTERNS = {
    # A word and the space before it | a digit | the end of "don't" or "she's" | signs | white space (its last
    # space goes to the word). No piece has more than 64 characters: the time to encode one grows with its
    # square, and no long line without spaces shall stop the program.
    "default": r" ?[\p{L}\p{M}]{1,64}+|\p{N}|['’](?i:[sdmt]|ll|re|ve)(?![\p{L}\p{M}])"
               r"| ?[^\s\p{L}\p{M}\p{N}]{1,64}+|\s{1,64}(?!(?<= )\S)|\s",
    "gpt2": r"'(?:[sdmt]|ll|re|ve)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+",
}
LOOK_AHEAD = 16        # characters behind a piece that a pattern may look at; those above need 2
MOST_PIECES = 200_000  # different ones in memory: about 300 MB while learning, 50 MB as the cache of `encode`
TEXTS = 8_000          # to learn from: 3 MB of the small world, 130 MB of a long file
ROLES = ("system", "user", "assistant", "tool")
SPECIAL_TOKENS = ("<|endoftext|>", *(f"<|{role}|>" for role in ROLES), "<|end|>")
BYTES = [bytes([b]) for b in range(256)]


@dataclass
class Config:
    """The flags of `python bpe.py`."""
    data: str = chain.option("world", "world, stdlib, a file, a folder or an http(s) address")
    vocab_size: int = chain.option(1024, "number of tokens: 256 bytes, the merges, 6 special tokens")
    pattern: str = chain.option(DEFAULT, "what cuts text into pieces", choices=tuple(PATTERNS))
    out: str = chain.option("out", "folder for everything that is made")
    seed: int = chain.option(0, "seed of the small world")


def split_special(text: str, special_tokens: Iterable[str]) -> list[str]:
    """Cut `text` at special tokens. Even places of the result hold text, odd places special tokens.

    >>> split_special("<|user|>Hi<|end|>", ["<|user|>", "<|end|>"])
    ['', '<|user|>', 'Hi', '<|end|>', '']
    """
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return regex.split(f"({'|'.join(map(regex.escape, longest_first))})", text) if longest_first else [text]


def merge(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """Return `word` with every `pair` of neighbours joined, from the left.

    >>> merge([b"a", b"a", b"a", b"b"], (b"a", b"a"))
    [b'aa', b'a', b'b']
    """
    merged = []
    for token in word:
        if token == pair[1] and merged and merged[-1] == pair[0]:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


def count_pairs(word: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Return the pairs of neighbours that `merge` could join. "aaa" has one, as two would overlap.

    >>> count_pairs([b"a", b"a", b"a", b"b"])
    [(b'a', b'a'), (b'a', b'b')]
    """
    pairs, last = [], None
    for pair in pairwise(word):
        last = None if pair == last else pair
        if last:
            pairs.append(pair)
    return pairs


def learn_merges(pieces: Counter[str], n_merges: int) -> list[tuple[bytes, bytes]]:
    """Return `n_merges` merges, or fewer if no pair is left. `pieces` tells how often each piece occurs.

    >>> learn_merges(Counter({"low": 5, "lot": 2, "cow": 1}), 3)
    [(b'l', b'o'), (b'lo', b'w'), (b'lo', b't')]
    """
    words, times, merges, heap = [[] for _ in pieces], list(pieces.values()), [], []
    counts = defaultdict(int)  # pair -> how often it occurs
    where = defaultdict(set)   # pair -> the words that hold it now, or held it once
    # A heap gives its least entry. So bytes are negated, and a 1 at the end puts "ab" before "a".
    order = {token: [-b for b in token] + [1] for token in BYTES}
    rewritten = {i: [BYTES[b] for b in piece.encode("utf-8", "replace")] for i, piece in enumerate(pieces)}
    while True:
        changes = defaultdict(int)
        for i, word in rewritten.items():
            for pair in count_pairs(words[i]):
                changes[pair] -= times[i]
            for pair in count_pairs(word):
                changes[pair] += times[i]
                where[pair].add(i)
            words[i] = word
        for pair, change in changes.items():
            counts[pair] += change
            if change and counts[pair]:
                heapq.heappush(heap, (-counts[pair], order[pair[0]], order[pair[1]], pair))
        # subtle: a count that changed was pushed anew, and its old entry must not be believed.
        while heap and counts[heap[0][-1]] != -heap[0][0]:
            heapq.heappop(heap)
        if not heap or len(merges) == n_merges:
            return merges
        merges.append(heapq.heappop(heap)[-1])
        order[b"".join(merges[-1])] = [-b for token in merges[-1] for b in token] + [1]
        # Only words with this pair change. Counting all words again would take hours instead of seconds.
        rewritten = {i: merge(words[i], merges[-1]) for i in where.pop(merges[-1])}


def train_bpe(texts: Iterable[str], vocab_size: int, special_tokens=(), pattern=DEFAULT) -> "Tokenizer":
    """Return a tokenizer of `vocab_size` tokens: bytes, merges, special tokens. Fewer if no pair is left."""
    bare, pieces = Tokenizer([], special_tokens, pattern), Counter()
    chain.require(vocab_size >= bare.n_vocab, f"--vocab_size {vocab_size}: give at least {bare.n_vocab}")
    for text in texts:
        for part in split_special(text, bare.special)[::2]:  # subtle: no merge may reach over a special token
            pieces.update(bare.splitter.findall(part))
        if len(pieces) > MOST_PIECES:  # of a text so large the rarest may go, they hardly change a count
            pieces = Counter(dict(pieces.most_common(MOST_PIECES // 2)))
    return Tokenizer(learn_merges(pieces, vocab_size - bare.n_vocab), bare.special, pattern)


class Tokenizer:
    """Text -> ids -> text. `merges`, in the order learned; `vocab`: id -> bytes; `special`: name -> id.

    >>> tokenizer = Tokenizer([(b"h", b"i")], ["<|end|>"])
    >>> tokenizer.encode("hi!<|end|>", allowed_special=True), tokenizer.decode([256, 33, 257])
    ([256, 33, 257], 'hi!<|end|>')
    """

    def __init__(self, merges, special_tokens=(), pattern: str = DEFAULT, ids: list[int] | None = None):
        """`pattern`: a name or a regex. `ids`: of bytes, merges, special tokens, where not 0, 1, 2, ..."""
        self.merges, self.ids, self.pattern = [(a, b) for a, b in merges], ids, PATTERNS.get(pattern, pattern)
        tokens, names = BYTES + [a + b for a, b in self.merges], list(dict.fromkeys(special_tokens))
        ids = ids or range(len(tokens) + len(names))
        self.vocab = dict(zip(ids, tokens + [name.encode() for name in names], strict=True))
        self.n_vocab = max(ids) + 1  # every id is below it
        self.special, self.id_of = dict(zip(names, ids[len(tokens):])), dict(zip(tokens, ids))
        self.ranks, self.cache = {pair: rank for rank, pair in enumerate(self.merges)}, {}
        self.splitter = regex.compile(f"{self.pattern}|(?s:.)")  # what a pattern leaves out is not lost
        if self.splitter.groups or pattern not in PATTERNS and pattern.isidentifier():
            raise ValueError(f"pattern {pattern!r}: give default, gpt2 or a regex with (?:...) for (...)")

    def encode_piece(self, piece: str) -> list[int]:
        """Return the ids of a piece, and keep them: join the pair of lowest rank until no pair has a rank."""
        word, ranks = [BYTES[b] for b in piece.encode("utf-8", "replace")], self.ranks
        while (best := min(pairwise(word), key=lambda p: ranks.get(p, len(ranks)), default=None)) in ranks:
            word = merge(word, best)
        if len(self.cache) >= MOST_PIECES:
            self.cache.clear()
        return self.cache.setdefault(piece, [self.id_of[token] for token in word])

    def pieces(self, text: str, allowed_special) -> Iterator[tuple[str, list[int]]]:
        """Yield (piece, its ids) from left to right. An allowed special token is a piece too."""
        names = self.special if allowed_special is True else allowed_special or ()
        for i, part in enumerate(split_special(text, names)):
            if i % 2:
                yield part, [self.special[part]]
            else:
                for piece in self.splitter.findall(part):
                    yield piece, self.cache.get(piece) or self.encode_piece(piece)

    def encode(self, text: str, allowed_special: bool | Iterable[str] = False) -> list[int]:
        """Return the ids of `text`. Special tokens in it are mere text, save those allowed (True: all)."""
        return [i for _, ids in self.pieces(text, allowed_special) for i in ids]

    def encode_iterable(self, iterable: Iterable[str], allowed_special=False) -> Iterator[int]:
        """Yield the ids of the strings joined, wherever they were cut, in constant memory."""
        # subtle: what comes can change the pieces before it. "'l" is two pieces until an "l" comes, and "<|e"
        # may become a special token. A piece is sure only when this many characters stand behind it.
        held_back, text, enough = LOOK_AHEAD + max(map(len, self.special), default=0), "", 0
        for string in iterable:
            text += string
            if len(text) >= enough:
                done = 0
                for piece, ids in self.pieces(text, allowed_special):
                    if done + len(piece) + held_back > len(text):
                        break
                    yield from ids
                    done += len(piece)
                text = text[done:]
                enough = 2 * len(text)  # so that a long piece isn't cut anew for each string that it comes in
        yield from self.encode(text, allowed_special)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. What is not UTF-8, such as half a character, becomes U+FFFD."""
        return b"".join([self.vocab[i] for i in ids]).decode("utf-8", "replace")

    def encode_chat(self, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        """Return (ids, loss mask) of {"role", "content"} messages. It is 1 where the assistant learns."""
        # <|endoftext|> 0   <|user|> 0   " Hi" 0   <|end|> 0   <|assistant|> 0   " Hello" 1   <|end|> 1
        # subtle: without the space (Llama 2 has it too) a first word has other tokens than in the text above
        if missing := [name for name in SPECIAL_TOKENS if name not in self.special]:
            raise ValueError(f"this tokenizer has no {', '.join(missing)}; make one with `python bpe.py`")
        ids, mask = [self.special["<|endoftext|>"]], [0]
        for message in messages:
            if message["role"] not in ROLES:
                raise ValueError(f"role {message['role']!r}: give one of {', '.join(ROLES)}")
            said = self.encode(" " + message["content"]) + [self.special["<|end|>"]]
            ids += [self.special[f"<|{message['role']}|>"], *said]
            mask += [0] + [int(message["role"] == "assistant")] * len(said)
        return ids, mask

    def to_dict(self) -> dict:
        """Return strings, lists and numbers only, fit for JSON and `torch.load(weights_only=True)`."""
        merges = [[a.decode("latin-1"), b.decode("latin-1")] for a, b in self.merges]
        return {"pattern": self.pattern, "special_tokens": [*self.special], "ids": self.ids, "merges": merges}

    @classmethod
    def from_dict(cls, content: dict) -> "Tokenizer":
        """Undo `to_dict`. Raises KeyError, TypeError or ValueError if `content` is something else."""
        merges = [(a.encode("latin-1"), b.encode("latin-1")) for a, b in content["merges"]]
        return cls(merges, content["special_tokens"], content["pattern"], content["ids"])

    def save(self, path) -> None:
        """Write the tokenizer as JSON."""
        chain.write_whole(path, lambda file: file.write(json.dumps(self.to_dict()).encode()))

    @classmethod
    def load(cls, path) -> "Tokenizer":
        """Read what `save` wrote. Raises UserError if the file is missing, cut off or something else."""
        chain.require(Path(path).is_file(), f"{path}: no such tokenizer; make one with `python bpe.py`")
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError, regex.error):
            raise chain.UserError(f"{path}: cut off or not a tokenizer; delete it, then run `python bpe.py`")

    @classmethod
    def from_gpt2(cls, vocab_json, merges_txt) -> "Tokenizer":
        """Return GPT-2's tokenizer, with its ids, from the two files in which it was published."""
        vocab = json.loads(Path(vocab_json).read_text(encoding="utf-8"))
        lines = Path(merges_txt).read_text(encoding="utf-8").split("\n")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        # subtle: a byte that can't be seen (space, newline, ...) is written there as a letter from U+0100 on.
        unseen = [b for b in range(256) if not (33 <= b <= 126 or 161 <= b <= 172 or 174 <= b)]
        letters = [chr(256 + unseen.index(b)) if b in unseen else chr(b) for b in range(256)]
        byte_of = {letter: b for b, letter in enumerate(letters)}
        merges = [[bytes(byte_of[letter] for letter in token) for token in pair] for pair in pairs]
        names = letters + ["".join(pair) for pair in pairs]
        special = sorted(vocab.keys() - set(names), key=vocab.get)
        chain.require(vocab.keys() >= set(names) and all(name.startswith("<") for name in special),
                      f"{merges_txt}: does not make the tokens of {vocab_json}; fetch both files again")
        return cls(merges, special, "gpt2", [vocab[name] for name in names + special])


def find_or_make(source, out, vocab_size: int | None, pattern=DEFAULT, anew: bool = False) -> Tokenizer:
    """Return <out>/tokenizer.json. If it isn't there, or `anew` is set, learn it from `source`."""
    path, wanted = Path(out, "tokenizer.json"), Config.vocab_size if vocab_size is None else vocab_size
    if path.exists() and not anew:
        tokenizer = Tokenizer.load(path)
        chain.require(vocab_size in (None, tokenizer.n_vocab), f"--vocab_size {wanted}: {path} has "
                      f"{tokenizer.n_vocab} tokens; leave the flag out, or choose another --out")
    else:
        tokenizer = train_bpe(islice(source.documents("train"), TEXTS), wanted, SPECIAL_TOKENS, pattern)
        tokenizer.save(path)
        if tokenizer.n_vocab < wanted:
            print(f"--vocab_size {wanted}: no pair is left to join after {tokenizer.n_vocab} tokens")
    return tokenizer


@chain.command
def main(argv=None) -> dict:
    """Learn a tokenizer, save it, and show what it does to text that it has not seen."""
    config, began = chain.parse(Config, argv, __doc__), time.perf_counter()
    source = data.open_source(config.data, Path(config.out), config.seed)
    tokenizer = find_or_make(source, config.out, config.vocab_size, config.pattern, anew=True)
    text = "".join(islice(source.documents("held-out"), 200))
    ids = tokenizer.encode(text)
    shown = [repr(tokenizer.decode([i]))[1:-1] for i in ids[:150]]
    coloured = [f"\x1b[30;4{n % 6 + 1}m{token}\x1b[0m" for n, token in enumerate(shown)]
    print("".join(coloured) if sys.stdout.isatty() else "|".join(shown))
    metrics = {"vocab_size": tokenizer.n_vocab, "bytes_per_token": len(text.encode()) / len(ids)}
    chain.report("bpe.py", config, metrics, time.perf_counter() - began)
    return metrics


if __name__ == "__main__":
    main()
