"""Where text comes from, and how it gets onto the disk as tokens.

    python data.py                  pages of every kind of the small world and its statistics (1 second)
    python data.py --data stdlib    the same for a file, a folder, an http(s) address or Python's library

- A document is a text of the small world, a line of a .jsonl file (its field `text`) or a file of a folder.
  Each starts with <|endoftext|>. The last 10 % of them are held out; of one plain file, of its characters.
- Text is read in blocks: 2 GB need no more memory than 2 MB. Cutting does not change the tokens, see `cut`.

Left out: shuffling, deduplicating, .parquet, .html, encodings but UTF-8. Paper: GPT-3 (arXiv:2005.14165).
"""

import gzip
import hashlib
import http.client
import json
import multiprocessing
import os
import re
import signal
import sys
import textwrap
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

import chain
import world

TYPES = ".txt .md .py .jsonl (or one of these with .gz)"
TEXT = re.compile(r"\.(txt|md|py|jsonl)(\.gz)?$", re.IGNORECASE)
JSON_LINES = re.compile(r"\.jsonl(\.gz)?$", re.IGNORECASE)
NOT_LIBRARY = ("site-packages", "dist-packages", "test", "tests", "idle_test")  # folders "stdlib" leaves out
BLOCK = 1 << 13           # characters read at once
UNIT = 32                 # blocks, or documents where they are shorter, that a worker encodes at once
HELD_OUT_DOCUMENTS = 500  # of the endless world, about 100,000 tokens; the same text for every tokenizer
UP_TO_A_WORD = re.compile(r".*[^\W\d_](?=[ \n])", re.DOTALL)  # greedy: ends at the last place for a cut
NOT_UTF8 = re.compile("[\ud800-\udfff]")  # lone surrogates: `open_text` makes them of bad bytes


@dataclass
class Config:
    """The flags of `python data.py`."""
    data: str = chain.option("world", "world, stdlib, a file, a folder or an http(s) address")
    out: str = chain.option("out", "folder for everything that is made")
    seed: int = chain.option(0, "seed of the small world")


def open_text(path: Path):
    """Open a text file, packed or not. A byte that is not UTF-8 becomes a lone surrogate; "\\r" stays."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8", errors="surrogateescape", newline="\n")


def scan(path: Path, digest) -> tuple[int, int, int]:
    """Read all into `digest`; return its bytes, characters (.jsonl: documents) and bytes not in UTF-8."""
    json_lines, size, n, bad = bool(JSON_LINES.search(path.name)), 0, 0, 0
    try:
        with open_text(path) as file:
            for text in file if json_lines else iter(lambda: file.read(BLOCK), ""):
                chain.require("\0" not in text, f"{path}: a binary file (it has zero bytes); give text")
                digest.update(raw := text.encode("utf-8", "surrogateescape"))
                size, bad = size + len(raw), bad + (0 if text.isascii() else len(NOT_UTF8.findall(text)))
                n += bool(text.strip()) if json_lines else len(text)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise chain.UserError(f"{path}: a broken .gz file ({error}); fetch or pack it again")
    chain.require(bad <= size * 0.3, f"{path}: binary or not UTF-8 ({bad} of {size} bytes); save it as UTF-8")
    digest.update(f"{json_lines} {size}".encode())  # where a file ends, and how it is read, count as well
    return size, n, bad


def characters(path: Path, start: int, stop: int) -> Iterator[str]:
    """Yield characters `start` to `stop` of a file of any size, piece by piece."""
    with open_text(path) as file:
        for skipped in range(0, start, BLOCK):
            file.read(min(BLOCK, start - skipped))
        while text := file.read(min(BLOCK, stop - start)):
            yield text if text.isascii() else NOT_UTF8.sub("\ufffd", text)
            start += len(text)


def json_texts(path: Path, first: int, last: int) -> Iterator[list[str]]:
    """Yield documents `first` to `last` - 1 of a .jsonl file, in pieces. UserError names a bad line."""
    with open_text(path) as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for number, line in islice(lines, first, last):
            try:
                text = NOT_UTF8.sub("\ufffd", json.loads(line.lstrip("\ufeff"))["text"])
            except (ValueError, RecursionError, KeyError, TypeError):
                raise chain.UserError(f'{path}, line {number}: not JSON like {{"text": "Once"}}')
            yield [text[i:i + BLOCK] for i in range(0, len(text), BLOCK)]


def cut(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the same text in blocks that end after a letter, before a space or newline: its tokens stay.

    The split patterns of bpe.py cut there anyway: none of their matches goes on from a letter to white space.
    Only text in which no word ends for 16 pieces is cut where it stands: there one token may differ.
    >>> list(cut(["It is 3 o'cl", "ock now, ", "12"]))
    ['It is', " 3 o'clock", ' now, 12']
    """
    text = ""
    for piece in pieces:
        if (found := UP_TO_A_WORD.match(text)) or len(text) >= 16 * BLOCK:
            end = found.end() if found else len(text)
            yield text[:end]
            text = text[end:]
        text += piece
    yield text


def download(url: str, cache: Path) -> Path:
    """Fetch `url` into `cache`, once; return the path. A download that was cut goes on where it stopped."""
    path = Path(cache) / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{Path(url.partition('?')[0]).name}"
    chain.require(TEXT.search(path.name), f"{url}: the address must end in {TYPES}")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    done = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "pocket-llm", "Range": f"bytes={done}-"})
        with urllib.request.urlopen(request, timeout=30) as reply:
            # subtle: a server that knows no ranges sends the whole text; appending it would double the start
            done *= reply.headers.get("Content-Range", "").startswith(f"bytes {done}-")
            total = done + int(reply.headers.get("Content-Length", 0))  # not every server tells
            with open(part, "ab" if done else "wb") as file, tqdm.wrapattr(
                    reply, "read", desc=path.name, total=total or None, initial=done, disable=None) as stream:
                file.writelines(iter(lambda: stream.read(1 << 16), b""))
    except (OSError, http.client.HTTPException, ValueError) as error:
        if getattr(error, "code", 0) == 416:  # nothing follows what we have: that was from another text
            part.unlink(missing_ok=True)
        raise chain.UserError(f"{url}: {error or type(error).__name__}; check it and run it again")
    chain.require(part.stat().st_size >= max(total, 1), f"{url}: cut off; run it again to go on from there")
    part.replace(path)
    return path


class World:
    """The small world of world.py: endless, so its `size` is None."""
    def __init__(self, seed: int):
        code = b"".join(path.read_bytes() for path in sorted(Path(world.__file__).parent.glob("world.*")))
        self.name, self.size, self.replaced, self.seed = "world", None, 0, seed
        self.identity = f"world {seed} {hashlib.sha256(code).hexdigest()}"  # other rules make other texts

    def documents(self, split: str) -> Iterator[str]:
        """Yield documents of "train" or "held-out" for ever."""
        return world.documents(split, self.seed)

    def blocks(self, split: str, start: int) -> Iterator[tuple[bool, str]]:
        """Yield UNIT documents, number `start` and following, in the form of `Files.blocks`."""
        return ((True, text) for text in islice(world.documents(split, self.seed, start), UNIT))

    def units(self, split: str) -> Iterator[Callable]:
        """Yield work for `encode`: calls that return blocks. The worker writes the documents."""
        starts = count(0, UNIT) if split == "train" else range(0, HELD_OUT_DOCUMENTS, UNIT)
        return (partial(self.blocks, split, start) for start in starts)


class Files:
    """Text in files: one plain file, or documents (the lines of .jsonl files, the files of a folder)."""
    def __init__(self, name: str, paths: list[Path]):
        digest = hashlib.sha256()
        found = [(path, *scan(path, digest)) for path in paths]
        self.name, self.identity = name, digest.hexdigest()
        self.size, self.replaced = sum(size for _, size, _, _ in found), sum(bad for *_, bad in found)
        files = [(path, n, bool(JSON_LINES.search(path.name))) for path, size, n, _ in found if size]
        self.files = [(path, n if is_json or len(files) == 1 else 1, is_json) for path, n, is_json in files]
        self.n = sum(n for _, n, _ in self.files)  # documents, or the characters of a lone plain file
        chain.require(self.size >= 20 and self.n > 1, f"{name}: too short to train on and hold out a tenth: "
                f"{self.size} bytes, {self.n} lines, files or characters; give more text")

    def documents(self, split: str) -> Iterator[str]:
        """Yield the documents of "train" or "held-out"; a file larger than BLOCK comes as several texts."""
        return (text for _, text in self.blocks(split))

    def blocks(self, split: str) -> Iterator[tuple[bool, str]]:
        """Yield (does a document start here?, text) for the documents of "train" or "held-out"."""
        n_train = int(0.9 * self.n)
        part = {"train": range(n_train), "held-out": range(n_train, self.n)}[split]
        for path, n, is_json in self.files:
            first, last = max(part.start, 0), min(part.stop, n)  # those of this file
            part = range(part.start - n, part.stop - n)
            stop = last if n > 1 else sys.maxsize  # a plain file among others is one document
            texts = json_texts(path, first, last) if is_json else [characters(path, first, stop)]
            for pieces in texts if first < last else ():
                yield from ((i == 0, block) for i, block in enumerate(cut(pieces)))

    def units(self, split: str) -> Iterator[Callable]:
        """Yield work for `encode`: calls that return blocks. Here they have been read by the parent."""
        blocks = self.blocks(split)
        while unit := list(islice(blocks, UNIT)):
            yield partial(iter, unit)


def open_source(name: str, cache: Path, seed: int = 0) -> World | Files:
    """Return the text that `name` stands for (see Config). Downloads go to `cache`. UserError if none."""
    if name == "world":
        return World(seed)
    path, skip = (Path(os.__file__).parent, NOT_LIBRARY) if name == "stdlib" else (Path(name), ())
    if name.startswith(("http://", "https://")):
        path = download(name, cache)
    chain.require(name and path.exists(), f"{name!r}: no such file or folder; give one, an address, or world")
    paths = sorted(file for file in (path.rglob("*") if path.is_dir() else [path])
                   if TEXT.search(file.name) and file.is_file()
                   and not any(part[0] == "." or part in skip for part in file.relative_to(path).parts))
    chain.require(paths, f"{name}: not a text; give a file or a folder of files that end in {TYPES}")
    source = Files(name, paths)
    if source.replaced:
        print(f"{name}: {source.replaced:,} bytes are not UTF-8, each was replaced by U+FFFD")
    return source


@dataclass
class Tokens:
    """One part of a text, as tokens on disk."""
    ids: np.memmap  # (n,) uint16, or uint32 for more than 65,536 tokens: only what is used gets loaded
    n_bytes: int    # of text: bits per token * len(ids) / n_bytes = bits per byte


def start_worker(tokenizer) -> None:
    """Give a new worker its tokenizer, once for all units. Ctrl-C is left to the parent, who then ends it."""
    encode.tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def encode(unit: Callable) -> tuple[np.ndarray, int]:
    """In a worker: return the ids of the blocks that `unit()` gives, and how many bytes of text they are."""
    ids, n_bytes, start = [], 0, encode.tokenizer.special.get("<|endoftext|>")
    for is_start, text in unit():
        ids += [start] if is_start and start is not None else []
        ids += encode.tokenizer.encode(text)
        n_bytes += len(text.encode())
    return np.array(ids, dtype=np.uint32), n_bytes


def token_files(source, tokenizer, folder: Path, tokens: int | None = None) -> tuple[Tokens, Tokens]:
    """Return the training and the held-out part of a text as tokens: files written once, by all cores.
    Their key is a hash of the text, the tokenizer and how many training `tokens` to make of an endless text.
    """
    limits = {"train": sys.maxsize if source.size else tokens, "held-out": sys.maxsize}
    dtype = np.uint16 if tokenizer.n_vocab <= 1 << 16 else np.uint32
    key = hashlib.sha256(json.dumps([source.identity, tokenizer.to_dict(), limits]).encode()).hexdigest()[:16]
    paths = {split: Path(folder) / f"tokens-{key}-{split}.bin" for split in limits}
    sizes_path, sizes = Path(folder) / f"tokens-{key}.json", {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

    def write(split, file):
        units, n, sizes[split] = source.units(split), 0, 0
        # subtle: a pool's `map` takes in all units at once; neither 2 GB nor an endless world fit in memory
        waiting = [pool.apply_async(encode, [unit]) for unit in islice(units, 2 * cores)]
        while waiting and n < limits[split]:
            ids, size = waiting.pop(0).get(600)  # a unit takes a second, a killed worker for ever
            waiting += [pool.apply_async(encode, [unit]) for unit in islice(units, 1)]
            kept = ids[:limits[split] - n].astype(dtype)
            file.write(kept)
            bar.update(size)
            n, sizes[split] = n + len(kept), sizes[split] + size * len(kept) // max(1, len(ids))

    if not all(path.is_file() for path in (*paths.values(), sizes_path)):
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")  # macOS: unsafe
        with context.Pool(cores, start_worker, [tokenizer]) as pool, tqdm(  # fork before tqdm's thread
                desc="tokens", total=source.size, unit="B", unit_scale=True, disable=None) as bar:
            for split, path in paths.items():
                chain.write_whole(path, partial(write, split))
        chain.write_whole(sizes_path, lambda file: file.write(json.dumps(sizes).encode()))
    sizes = json.loads(sizes_path.read_text(encoding="utf-8"))
    chain.require(min(sizes.values()) > 1, f"{source.name}: too little text, {source.size} bytes; give more")
    return tuple(Tokens(np.memmap(paths[split], dtype, "r"), sizes[split]) for split in paths)


@chain.command
def main(argv=None) -> dict:
    """Print pages of a text and its statistics."""
    config, began = chain.parse(Config, argv, __doc__), time.perf_counter()
    source = open_source(config.data, Path(config.out), config.seed)
    starts, texts = zip(*(block for unit in islice(source.units("train"), 64) for block in unit()))
    words = {word for text in texts for word in re.findall(r"[^\W\d_]+", text.lower())}
    metrics = {"documents": sum(starts), "bytes": len("".join(texts).encode()), "distinct_words": len(words)}
    pages = {f"{source.name}, its beginning": texts[0][:1000]}
    if config.data == "world":
        metrics["names"] = len({text[a:b] for text in texts for a, b in world.second_mentions(text)})
        pages = {f"{kind}, {world.MIX.count(kind) / len(world.MIX):.0%} of the documents": "\n\n".join(
            world.document("train", config.seed, i, kind) for i in range(3)) for kind in world.KINDS}
    for title, page in pages.items():
        print(f"--- {title}", *(textwrap.fill(line, 110) for line in page.splitlines()), sep="\n", end="\n\n")
    chain.report("data.py", config, metrics, time.perf_counter() - began)
    return metrics


if __name__ == "__main__":
    main()
