"""Where text comes from, and how it gets onto the disk as tokens.

    python data.py                  a page of every kind of the small world, and its statistics (seconds)
    python data.py --data stdlib    the first lines and statistics of a file, folder, address or Python's library

    world | file | folder | address | stdlib  ->  blocks of text  ->  ids, by all cores  ->  out/tokens-<key>-train.bin

- A document is a text of the small world, a line of a .jsonl file (its field `text`) or a file of a folder. Each
  starts with <|endoftext|>, so that a model can tell where one ends (GPT-3, arXiv:2005.14165, section 2.3).
- The last 10 % of the documents are held out; of one plain file its last 10 % of characters. Nothing is in both.
- Files are read in blocks of 256 K characters, so 2 GB need no more memory than 2 MB. A block ends after a letter
  and before a space or newline. There the split patterns of bpe.py end a piece anyway: letters end the piece they
  are in, and white space belongs to what follows. So the ids are those of the whole text at once.
- Ids are raw uint16 (uint32 for more than 65,536 tokens), read back as np.memmap: only what is used gets loaded.

Left out: shuffling and deduplicating, formats such as .parquet and .html, encodings other than UTF-8.
"""

import errno
import gzip
import hashlib
import http.client
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
import urllib.request
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

import chain
import world
from chain import UserError, require

TEXT_TYPES = (".txt", ".md", ".py", ".jsonl")  # each also with .gz behind it
NOT_LIBRARY = ("site-packages", "dist-packages", "test", "tests", "idle_test")  # folders that "stdlib" leaves out
BLOCK = 1 << 18            # characters read at once, and about what a worker encodes at once
SHORTEST = 20              # bytes: the last tenth must hold one token to read and one to predict
HELD_OUT_TOKENS = 100_000  # of the endless world; a finite text has its last 10 %
WORLD_UNIT = 100           # documents of the world that a worker writes and encodes at once
UP_TO_A_WORD = re.compile(r".*[^\W\d_](?=[ \n])", re.DOTALL)  # greedy: ends at the last place for a cut


@dataclass
class Config:
    """The flags of `python data.py`."""
    data: str = chain.option("world", "world, stdlib, a file, a folder or an http(s) address")
    out: str = chain.option("out", "folder for everything that is made")
    seed: int = chain.option(0, "seed of the small world")


# ------------------------------------------------------------------------------------------- files

def text_type(name: str) -> str | None:
    """Return which of TEXT_TYPES a file name ends in, or None.

    >>> text_type("Book.TXT.gz"), text_type("lines.jsonl"), text_type("pack.zip")
    ('.txt', '.jsonl', None)
    """
    return next((kind for kind in TEXT_TYPES if name.lower().removesuffix(".gz").endswith(kind)), None)


def open_text(path: Path):
    """Open a file for reading text, unpacked if it is a .gz. A byte that is not UTF-8 becomes a lone surrogate."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8", errors="surrogateescape", newline="\n")  # "\n": "\r" stays as it is


def repair(text: str) -> tuple[str, int]:
    """Replace every lone surrogate (a bad byte, or one spelled out in JSON) by U+FFFD; return also their number."""
    return (text, 0) if text.isascii() else re.subn("[\ud800-\udfff]", "\ufffd", text)


def scan(path: Path, digest) -> tuple[int, int, int]:
    """Read a whole file into `digest`; return its bytes, characters (.jsonl: documents) and bytes that are not UTF-8.

    Raises UserError if it can't be read as text, so that this is known before anything is tokenized.
    """
    is_jsonl, size, count, bad = text_type(path.name) == ".jsonl", 0, 0, 0
    try:
        with open_text(path) as file:
            for text in file if is_jsonl else iter(lambda: file.read(BLOCK), ""):
                require("\0" not in text, f"{path}: a binary file (it holds zero bytes); give plain text in UTF-8")
                raw = text.encode("utf-8", "surrogateescape")
                digest.update(raw)
                size, bad = size + len(raw), bad + repair(text)[1]
                count += bool(text.strip()) if is_jsonl else len(text)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: a broken .gz file ({error}); fetch or pack it again")
    require(bad <= 0.3 * size, f"{path}: {bad:,} of {size:,} bytes are not UTF-8 text; save it as UTF-8")
    digest.update(f"{is_jsonl} {size}".encode())  # where a file ends, and how it is read, count as well
    return size, count, bad


def text_blocks(path: Path, start: int = 0, stop: int = sys.maxsize) -> Iterator[str]:
    """Yield characters `start` to `stop` of a (possibly huge) file in blocks that tokenize as the whole would."""
    with open_text(path) as file:
        for skipped in range(0, start, BLOCK):
            file.read(min(BLOCK, start - skipped))
        left, text = stop - start, ""
        while read := file.read(min(BLOCK, left)):
            text, left = text + repair(read)[0], left - len(read)
            # Text in which no word ends for 16 blocks is cut where it stands: there one token may differ.
            if (cut := UP_TO_A_WORD.match(text)) or len(text) >= 16 * BLOCK:
                end = cut.end() if cut else len(text)
                yield text[:end]
                text = text[end:]
        if text:
            yield text


def json_texts(path: Path, first: int, last: int) -> Iterator[str]:
    """Yield documents number `first` to `last` - 1 of a .jsonl file. A UserError names the line that is none."""
    with open_text(path) as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for number, line in itertools.islice(lines, first, last):
            try:
                text, _ = repair(json.loads(line.lstrip("\ufeff"))["text"])
            except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
                raise UserError(f'{path}, line {number}: no JSON with a field `text`; write {{"text": "Once ..."}}')
            yield text


def walk(folder: Path, skip: tuple[str, ...] = ()) -> list[Path]:
    """Return the text files of a folder and its subfolders in a fixed order, without hidden ones."""
    paths = sorted(path for path in folder.rglob("*") if text_type(path.name) and path.is_file())
    return [path for path in paths if not any(part[0] == "." or part in skip for part in path.relative_to(folder).parts)]


def download(url: str, cache: Path) -> Path:
    """Fetch `url` into the folder `cache` once; return the path. What was cut off goes on where it stopped."""
    name = url.partition("?")[0].rpartition("/")[2]
    path = Path(cache) / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    part = path.with_name(path.name + ".part")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    done = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "pocket-llm", "Range": f"bytes={done}-"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as response:
            # subtle: a server that knows no ranges answers with the whole text; appending it would double the start
            if not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
                done = 0
            total = done + int(response.headers.get("Content-Length", 0))  # 0 where the server does not tell
            with open(part, "ab" if done else "wb") as file, tqdm.wrapattr(
                    response, "read", desc=name, total=total or None, initial=done, disable=None) as stream:
                shutil.copyfileobj(stream, file)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        if getattr(error, "code", None) == 416:  # nothing follows what we have: it was another version of the text
            part.unlink(missing_ok=True)
        raise UserError(f"{url}: {error or type(error).__name__}; check the address and the network, run it again")
    done = part.stat().st_size
    require(done and done >= total, f"{url}: cut off at {done:,} of {total:,} bytes; run it again to go on from there")
    part.replace(path)
    return path


# ------------------------------------------------------------------------------------------- sources

class World:
    """The small world of world.py: endless, so `size` is None."""
    name, size, replaced = "world", None, 0

    def __init__(self, seed: int):
        code = b"".join(path.read_bytes() for path in sorted(Path(world.__file__).parent.glob("world.*")))
        self.seed, self.identity = seed, f"world {seed} {hashlib.sha256(code).hexdigest()}"

    def documents(self, split: str) -> Iterator[str]:
        """Yield documents of "train" or "held-out" for ever."""
        return world.documents(split, self.seed)

    def blocks(self, split: str, start: int) -> Iterator[tuple[bool, str]]:
        """Yield documents number `start` to `start` + WORLD_UNIT - 1, as `Files.blocks` does."""
        return ((True, text) for text in itertools.islice(world.documents(split, self.seed, start), WORLD_UNIT))

    def units(self, split: str) -> Iterator[Callable]:
        """Yield work for `encode`: calls that return blocks. The worker who makes the call writes the documents."""
        return (partial(self.blocks, split, start) for start in itertools.count(0, WORLD_UNIT))


class Files:
    """Text in files: one plain file, or documents (the lines of .jsonl files, the files of a folder)."""

    def __init__(self, name: str, paths: list[Path]):
        digest = hashlib.sha256()
        found = [(path, *scan(path, digest)) for path in paths]
        self.name, self.identity = name, digest.hexdigest()
        self.size, self.replaced = sum(size for _, size, _, _ in found), sum(bad for *_, bad in found)
        require(self.size >= SHORTEST, f"{name}: only {self.size} bytes of text; give {SHORTEST} or more, best 1 MB")
        found = [(path, count, text_type(path.name) == ".jsonl") for path, size, count, _ in found if size]
        self.one_text = len(found) == 1 and not found[0][2]  # its characters are counted, and split, not documents
        self.files = [(path, count if is_jsonl or self.one_text else 1, is_jsonl) for path, count, is_jsonl in found]
        self.n = sum(count for _, count, _ in self.files)
        require(self.n > 1, f"{name}: holds one document only; it takes another one to hold out")

    def blocks(self, split: str) -> Iterator[tuple[bool, str]]:
        """Yield (does a document start here?, text) for the documents of "train" or "held-out"."""
        cut = int(0.9 * self.n)
        part = {"train": range(cut), "held-out": range(cut, self.n)}[split]
        for path, count, is_jsonl in self.files:
            first, last = max(part.start, 0), min(part.stop, count)  # those of this file
            part = range(part.start - count, part.stop - count)
            if first < last and is_jsonl:
                yield from ((True, text) for text in json_texts(path, first, last))
            elif first < last:
                texts = text_blocks(path, first, last) if self.one_text else text_blocks(path)
                yield from ((i == 0, text) for i, text in enumerate(texts))

    def documents(self, split: str) -> Iterator[str]:
        """Yield the documents of "train" or "held-out"; one that is larger than BLOCK comes as several texts."""
        return (text for _, text in self.blocks(split))

    def units(self, split: str) -> Iterator[Callable]:
        """Yield work for `encode`: calls that return blocks, here about BLOCK characters that were read before."""
        blocks = self.blocks(split)
        for block in blocks:
            unit, room = [block], BLOCK - len(block[1])
            while room > 0 and (block := next(blocks, None)):
                unit.append(block)
                room -= len(block[1])
            yield partial(list, unit)


def open_source(name: str, cache: Path, seed: int = 0) -> World | Files:
    """Return the text that `name` stands for: "world", "stdlib", a file, a folder or an http(s) address.

    A finite text is read once, so that whatever is wrong with it is a UserError now. Downloads go to `cache`.
    """
    types = " ".join(TEXT_TYPES) + " (or one of these and .gz)"
    is_address, path = name.startswith(("http://", "https://")), Path(name)
    if name == "world":
        return World(seed)
    if name == "stdlib":
        paths = walk(Path(sysconfig.get_path("stdlib")), NOT_LIBRARY)
    elif path.is_dir() and name:
        paths = walk(path)
        require(paths, f"{name}: a folder without any {types}")
    else:
        require(is_address or path.is_file(), f"{name}: no such file or folder; give one, or world, or stdlib")
        require(text_type(name.partition("?")[0]), f"{name}: unknown type of file; its name must end in {types}")
        paths = [download(name, cache) if is_address else path]
    source = Files(name, paths)
    if source.replaced:
        print(f"{name}: {source.replaced:,} bytes are not UTF-8, each was replaced by U+FFFD")
    return source


# ------------------------------------------------------------------------------------------- tokens on disk

@dataclass
class Tokens:
    """One part of a text, as tokens on disk."""
    ids: np.memmap  # (n,) uint16 or uint32
    n_bytes: int    # of text: bits per token * len(ids) / n_bytes = bits per byte


def start_worker(tokenizer, dtype) -> None:
    """Give a new worker what it needs, once. Ctrl-C is for the parent; if that is killed, the worker ends itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    encode.tokenizer, encode.dtype = tokenizer, dtype


def encode(unit: Callable) -> tuple[np.ndarray, int]:
    """In a worker: return the ids of the blocks that `unit()` gives, and how many bytes of text they stand for."""
    ids, n_bytes, tokenizer = [], 0, encode.tokenizer
    for starts, text in unit():
        if starts and "<|endoftext|>" in tokenizer.special:
            ids.append(tokenizer.special["<|endoftext|>"])
        ids += tokenizer.encode(text)
        n_bytes += len(text.encode())
    return np.array(ids, dtype=encode.dtype), n_bytes


def encode_all(pool: ProcessPoolExecutor, units: Iterable[Callable], ahead: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield `encode(unit)` for each unit, in order, made by the pool.

    subtle: a pool's own `map` takes in its whole input at once, and neither 2 GB nor an endless world fit in memory.
    """
    waiting = deque()
    for unit in units:
        waiting.append(pool.submit(encode, unit))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    yield from (future.result() for future in waiting)


def write_tokens(source, tokenizer, dtype, limits: dict, paths: dict) -> dict:
    """Write the token files at `paths`, each up to its limit; return for each how many tokens and bytes of text."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    by_bytes, meta, began = source.size is not None, {}, time.perf_counter()
    total = source.size if by_bytes else sum(limits.values())
    with ProcessPoolExecutor(cores, context, start_worker, (tokenizer, dtype)) as pool, tqdm(
            desc="tokens", total=total, unit="B" if by_bytes else "", unit_scale=True, disable=None) as bar:
        for split, path in paths.items():
            def write(file, split=split, n_ids=0, n_bytes=0):
                for ids, size in encode_all(pool, source.units(split), 2 * cores):
                    extra = ids[limits[split] - n_ids:] if not by_bytes else ids[:0]
                    ...
