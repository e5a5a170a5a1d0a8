"""data.py against the obvious way: read everything at once, encode everything at once."""

import doctest
import errno
import gzip
import itertools
import json
import os
import pickle
import random
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import bpe
import data
import world

WORDS = "the old ship came home with nine red lamps and the cook's cat, Ada; it wasn't late\n"
NASTY = ("  two spaces first\r\nWindows\tand a tab\n\n\nthree newlines   \n \n  it's we'll I'D 'tis ''s\n"
         "caf\u00e9 e\u0301 \u0928\u092e\u0938\u094d\u0924\u0947 \u4f60\u597d\uff0c\u4e16\u754c "
         "\U0001f642\U0001f468\u200d\U0001f469 \u00a0no-break\u2028line\u3000wide 12 345 6789 3.14\n"
         "<|endoftext|> is text here, <|end|> too\nsnake_case x1 1x \u00b2 \u2167 __init__ (a) [b]\n"
         "\ufffd a true U+FFFD\x1c\x85 odd spaces ") * 3
LETTERS = ["a", "Be", "\u00e9", "e\u0301", "'s", "'", "1", " ", "  ", "\n", "\r\n", "\t", ",", "_", "\u4f60",
           "\u00a0", "\u2028", "\x1c", "\U0001f642", "\u00b2"]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, bpe.Tokenizer]:
    texts, special = [WORDS, NASTY], ["<|endoftext|>"]
    return {pattern: bpe.train_bpe(texts, 300, special, pattern) for pattern in bpe.PATTERNS}


@pytest.fixture
def write(tmp_path):
    """Return write(name, text or bytes) -> path as a string; .gz names are packed."""
    def write(name: str, content) -> str:
        path, raw = tmp_path / "in" / name, content if isinstance(content, bytes) else content.encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(raw) if name.lower().endswith(".gz") else raw)
        return str(path)
    return write


def open_file(name: str) -> data.Files:
    return data.open_source(name, Path("unused"))


def parts(source) -> tuple[str, str]:
    return "".join(source.documents("train")), "".join(source.documents("held-out"))


def lines(*texts: str) -> str:
    return "\n".join(json.dumps({"text": text}) for text in texts) + "\n"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_examples():
    assert doctest.testmod(data).failed == 0, "an example in a docstring of data.py is wrong"


@pytest.mark.parametrize("letters", [WORDS, "\u00e9\U0001f642\u4f60"])
@pytest.mark.parametrize("n", [20, 21, 99, 8191, 8192, 8193, 20_001])
def test_a_plain_file_is_split_at_nine_tenths_of_its_characters(write, letters, n):
    text = (letters * n)[:n]
    train, held_out = parts(open_file(write("a.txt", text)))
    assert train == text[:int(0.9 * n)], "train is not the first int(0.9 n) characters"
    assert train + held_out == text, "a character is lost, or in both parts"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "A.JSONL"])
def test_lines_are_split_by_document(write, name):
    texts = [f"document {i}\nwith two lines" for i in range(25)]  # below: a blank line is no document
    source = open_file(write(name, "\ufeff" + lines(*texts).replace("}\n", "}\n \n")))
    assert list(source.documents("train")) == texts[:22], "int(0.9 * 25) documents are for training"
    assert list(source.documents("held-out")) == texts[22:]


def test_a_folder_is_split_by_document_and_walked_in_order(write):
    names = [f"{n}.{kind}" for n in ("a", "b", "sub/c", "sub/d") for kind in ("md", "py", "txt", "txt.gz")]
    for name in (*names, ".hidden.txt", ".git/x.txt", "sub/.cache/x.txt", "picture.png", "sub/x.zip"):
        write(name, f"{name}: {WORDS}")
    write("empty.txt", "")
    source = open_file(str(Path(write("m.jsonl", lines("line 1", "line 2", "line 3"))).parent))
    texts = [f"{name}: {WORDS}" for name in names]
    expected = texts[:8] + ["line 1", "line 2", "line 3"] + texts[8:]
    assert list(source.documents("train")) == expected[:17], "documents are missing, hidden or out of order"
    assert list(source.documents("held-out")) == expected[17:], "of 19 documents the last 2 are held out"
    one = Path(write("only/a.txt", WORDS))
    assert parts(open_file(str(one.parent))) == parts(open_file(str(one))), "a lone file is split inside"


def test_the_library_is_python_without_what_was_installed(write, monkeypatch):
    inside = [write(f"lib/{name}", WORDS) for name in ("os.py", "json/decoder.py", "site-packages/numpy.py",
                                                       "test/test_os.py", "pydoc_data/topics.txt")]
    monkeypatch.setattr(data.os, "__file__", inside[0])
    assert [path.name for path, *_ in open_file("stdlib").files] == ["decoder.py", "os.py", "topics.txt"]


def test_bad_bytes_are_replaced_and_counted(write, capsys):
    raw = b"caf\xe9 au lait, \xff\xfe and \xe2\x82 cut; " + "a true \ufffd and \u20ac\n".encode() * 3
    source = open_file(write("a.txt", raw))
    assert source.replaced == 5, "e9, ff, fe, e2 and 82 are not UTF-8; U+FFFD in the file is"
    assert "5 bytes are not UTF-8" in capsys.readouterr().out, "the count is not told"
    assert parts(source)[0].startswith("caf\ufffd au lait, \ufffd\ufffd and \ufffd\ufffd cut; a true \ufffd")


@pytest.mark.parametrize("block", range(1, 9))
def test_a_character_on_the_edge_of_a_block_is_not_bad(write, monkeypatch, block):
    monkeypatch.setattr(data, "BLOCK", block)
    source = open_file(write("a.txt", "\u20ac\U0001f642 " * 50))
    assert (source.replaced, "".join(parts(source))) == (0, "\u20ac\U0001f642 " * 50)


def test_half_a_surrogate_pair_from_json_is_replaced(write):
    source = open_file(write("a.jsonl", '{"text": "half \\ud83d smile"}\n{"text": "a \\ud83d\\ude42"}\n'))
    assert parts(source) == ("half \ufffd smile", "a \U0001f642"), "no tokenizer can turn this into bytes"


@pytest.mark.parametrize("name", ["a.txt.gz", "A.TXT.GZ"])
def test_packed_text_is_the_same_text(write, name):
    packed, plain = open_file(write(name, NASTY)), open_file(write("a.txt", NASTY))
    assert parts(packed) == parts(plain)
    assert packed.identity == plain.identity, "the same text would be tokenized twice"


@pytest.mark.parametrize("pattern", list(bpe.PATTERNS))
def test_cut_text_has_the_tokens_of_the_whole(tokenizers, pattern):
    rng, encode = random.Random(0), tokenizers[pattern].encode
    for _ in range(1500):
        text = "".join(rng.choices(LETTERS, k=rng.randrange(1, 40)))
        places = sorted(rng.choices(range(len(text) + 1), k=3))
        blocks = list(data.cut(text[i:j] for i, j in zip([0, *places], [*places, len(text)])))
        assert "".join(blocks) == text
        assert [i for block in blocks for i in encode(block)] == encode(text), f"{text!r} cut as {blocks}"


@pytest.mark.parametrize("pattern", list(bpe.PATTERNS))
@pytest.mark.parametrize("block", [8, 29, 8192])
def test_token_files_are_the_whole_text_at_once(write, tokenizers, tmp_path, monkeypatch, pattern, block):
    monkeypatch.setattr(data, "BLOCK", block)
    monkeypatch.setattr(data, "UNIT", 3)
    tokenizer, n = tokenizers[pattern], int(0.9 * len(NASTY))
    made = data.token_files(open_file(write("a.txt", NASTY)), tokenizer, tmp_path)
    for part, text in zip(made, (NASTY[:n], NASTY[n:])):
        assert part.ids.tolist() == [tokenizer.special["<|endoftext|>"]] + tokenizer.encode(text)
        assert part.n_bytes == len(text.encode()), "bits per byte would be wrong"


def test_each_document_starts_with_one_end_of_text(write, tokenizers, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 16)  # so that most documents go on over several blocks
    tokenizer, texts = tokenizers["default"], [NASTY, "", "short", WORDS * 3, "x" * 200, "but one", "last"]
    train, held_out = data.token_files(open_file(write("a.jsonl", lines(*texts))), tokenizer, tmp_path)
    whole = [[tokenizer.special["<|endoftext|>"], *tokenizer.encode(text)] for text in texts]
    assert train.ids.tolist() == [i for ids in whole[:6] for i in ids], "not one <|endoftext|> a document"
    assert held_out.ids.tolist() == whole[6]


class Wide:
    """A tokenizer of 70,000 tokens: too many for uint16."""
    special, n_vocab = {}, 70_000

    def encode(self, text: str) -> list[int]:
        return [69_999 - ord(letter) for letter in text]

    def to_dict(self) -> dict:
        return {"wide": True}


def test_ids_are_raw_integers_wide_enough(write, tmp_path):
    source = open_file(write("a.txt", WORDS))
    narrow, wide = (data.token_files(source, made, tmp_path)[0].ids for made in (bpe.Tokenizer([]), Wide()))
    assert isinstance(narrow, np.memmap) and (narrow.dtype, wide.dtype) == (np.uint16, np.uint32)
    assert bytes(narrow.tolist()).decode() == WORDS[:int(0.9 * len(WORDS))], "without merges ids are bytes"
    assert wide.tolist() == [69_999 - i for i in narrow.tolist()], "an id was cut to 16 bits"


def test_work_can_be_sent_to_a_new_process(write, tokenizers):
    """Where processes are not forked (macOS, Windows) the tokenizer and each unit of work are pickled."""
    for source in (data.World(0), open_file(write("a.txt", WORDS * 9))):
        unit = next(source.units("train"))
        copy = list(pickle.loads(pickle.dumps(unit))())
        assert copy and copy == list(unit()), source.name
    assert pickle.loads(pickle.dumps(tokenizers["gpt2"])).encode(NASTY) == tokenizers["gpt2"].encode(NASTY)


def test_of_the_world_exactly_so_many_tokens_are_made(tokenizers, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "HELD_OUT_DOCUMENTS", 64)
    tokenizer, end = tokenizers["default"], tokenizers["default"].special["<|endoftext|>"]
    train, held_out = data.token_files(data.World(3), tokenizer, tmp_path, tokens=20_001)
    seen, unseen = (list(itertools.islice(world.documents(split, 3), n)) for split, n in
                    (("train", 400), ("held-out", 64)))
    whole = [i for text in seen for i in [end, *tokenizer.encode(text)]]
    assert len(train.ids) == 20_001 and train.ids.tolist() == whole[:20_001], "not the world's first tokens"
    assert held_out.ids.tolist() == [i for text in unseen for i in [end, *tokenizer.encode(text)]]
    assert held_out.n_bytes == len("".join(unseen).encode())
    n_bytes = len(tokenizer.decode(i for i in train.ids if i != end).encode())
    assert abs(train.n_bytes / n_bytes - 1) < 0.01, "the bytes of what was cut off are counted, too"
    longer, same = data.token_files(data.World(3), tokenizer, tmp_path, tokens=20_100)
    assert np.array_equal(longer.ids[:20_001], train.ids), "more tokens of the same world begin otherwise"
    assert np.array_equal(same.ids, held_out.ids), "what is held out depends on how much is trained on"


def test_another_world_has_another_key(monkeypatch, tmp_path):
    assert data.World(0).identity == data.World(0).identity != data.World(1).identity
    monkeypatch.setattr(data.world, "__file__", str(tmp_path / "world.py"))
    (tmp_path / "world.py").write_bytes(b"rules")
    before = data.World(0).identity
    (tmp_path / "world.txt").write_bytes(b"words")
    assert data.World(0).identity != before, "tokens of a world with other words would be used"


def test_tokens_are_written_once(write, tokenizers, tmp_path, monkeypatch):
    path, out = write("a.txt", WORDS * 20), tmp_path / "out"
    first, _ = data.token_files(open_file(path), tokenizers["default"], out)
    os.utime(path)
    monkeypatch.setattr(data.multiprocessing, "get_context", lambda kind: pytest.fail("tokenized again"))
    again, _ = data.token_files(open_file(path), tokenizers["default"], out)
    assert np.array_equal(first.ids, again.ids) and first.n_bytes == again.n_bytes
    assert len(names(out)) == 3, "training tokens, held-out tokens, their sizes"


def test_other_text_or_tokenizer_is_another_key(write, tokenizers, tmp_path):
    out, made, texts = tmp_path / "out", tokenizers["default"], [WORDS, WORDS + "!", WORDS.swapcase()]
    fewer = bpe.Tokenizer(made.merges[:-1], ["<|endoftext|>"])
    cases = [(text, made) for text in texts]
    cases += [(texts[0], other) for other in (tokenizers["gpt2"], bpe.Tokenizer(made.merges), fewer)]
    for n, (text, tokenizer) in enumerate(cases, 1):
        data.token_files(open_file(write("a.txt", text)), tokenizer, out)
        assert len(names(out)) == 3 * n, f"case {n} shares its token files with an earlier one"
    for name, n in (("x/a.txt", 1), ("x/b.txt", 2), ("y/a.txt", 2), ("y/b.txt", 1)):
        folder = Path(write(name, WORDS * n)).parent
    other = open_file(str(folder.with_name("x")))
    assert open_file(str(folder)).identity != other.identity, "where a document ends is part of the key"


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_no_half_file(write, tokenizers, tmp_path, monkeypatch, failure):
    def fail(*_):
        raise failure
    source, out = open_file(write("a.txt", WORDS * 20)), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(type(failure)):
        patch.setattr(os, "fsync", fail)
        data.token_files(source, tokenizers["default"], out)
    assert names(out) == [], "something half-written was left"
    assert len(data.token_files(source, tokenizers["default"], out)[0].ids), "the next run must simply work"


def test_reading_takes_no_more_memory_for_larger_files(write):
    for name, content in (("a.txt", WORDS * 30_000), ("a.jsonl", lines(*[WORDS * 5] * 6_000))):
        source = open_file(write(name, content))
        tracemalloc.start()
        sizes = [len(text) for split in ("train", "held-out") for text in source.documents(split)]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert sum(sizes) == len(WORDS) * 30_000 and max(sizes) < 2 * data.BLOCK
        assert peak < 400_000, f"{name}: reading 2.5 MB took {peak:,} bytes of memory"
    assert max(map(len, data.cut("7" * data.BLOCK for _ in range(50)))) <= 16 * data.BLOCK, "no end"


class Endless:
    """A source that counts how many units of work were taken from it."""
    name, size, identity, taken = "endless", None, "endless", 0

    def units(self, split: str):
        for _ in itertools.count() if split == "train" else range(2):
            self.taken += 1
            yield partial(iter, [(True, WORDS)])


def test_work_is_not_taken_far_ahead_of_need(tmp_path):
    """Pool.imap would take units of an endless source until the memory is full."""
    source = Endless()
    data.token_files(source, bpe.Tokenizer([]), tmp_path, tokens=10 * len(WORDS))
    assert source.taken <= 10 + 2 * os.cpu_count() + 2, f"{source.taken} units were taken, 12 were needed"
