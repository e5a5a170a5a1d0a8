"""bpe.py against slow obvious versions of itself, and the traps that tokenizers fall into."""

import doctest
import functools
import itertools
import json
import pickle
import random
import tracemalloc

import pytest

import bpe
import chain
import data
from bpe import PATTERNS, SPECIAL_TOKENS, Tokenizer, train_bpe

NASTY = ("I'll we'LL 'll 'l l'l don't ''s John\u2019s 'tis\n\n\nthree  two   \n \n\t x1 12 345\u00b2 e\u0301"
         "\u0928\u093f \u4f60\u597d\uff0c\U0001f642\U0001f468\u200d\U0001f469 \u00a0\u2028\x1c\x85\x00\r"
         "\n_a_ (b)<|end|><|en <|end|>b<|endoftext|> <|end|>  \n a<|end|>\ud800 . 'v 're'rex \u017f'\u017f")
TEXT = "the cat sat on the mat; she'll see 12 cats, and the cat's friend sat there too.\n\nAaaah! " * 3


# In the slow versions each token is one character, so that `str` itself counts pairs and joins them.

def slow_pieces(texts, special, pattern) -> list[str]:
    """Return the pieces of all texts, without `split_special` and the tokenizer's own splitter."""
    found = []
    for text in texts:
        for name in sorted(special, key=len, reverse=True):
            text = text.replace(name, "\uffff")
        found += [p for part in text.split("\uffff") for p in bpe.regex.findall(PATTERNS[pattern], part)]
    return found


def slow_train(pieces: list[str], n_merges: int) -> list[tuple[bytes, bytes]]:
    """Count all pairs anew for each merge. `count` and `replace` go from the left, without overlaps."""
    words = [piece.encode("utf-8", "replace").decode("latin-1") for piece in pieces]
    of, merges = {chr(b): bytes([b]) for b in range(256)}, []
    while len(merges) < n_merges and any(len(word) > 1 for word in words):
        pairs = {word[i:i + 2] for word in words for i in range(len(word) - 1)}
        best = max(pairs, key=lambda pair: (sum(word.count(pair) for word in words), *map(of.get, pair)))
        new = chr(0xE000 + len(merges))  # a private character stands for the new token
        merges.append((of[best[0]], of[best[1]]))
        of[new] = b"".join(merges[-1])
        words = [word.replace(best, new) for word in words]
    return merges


def slow_encode(text: str, merges, pattern) -> list[int]:
    """Apply every merge to each whole piece, in the order learned."""
    letter, words = {bytes([b]): chr(b) for b in range(256)}, slow_pieces([text], [], pattern)
    words = [word.encode("utf-8", "replace").decode("latin-1") for word in words]
    for i, (first, second) in enumerate(merges):
        letter[first + second] = chr(0xE000 + i)
        words = [word.replace(letter[first] + letter[second], chr(0xE000 + i)) for word in words]
    return [ord(c) if ord(c) < 256 else 256 + ord(c) - 0xE000 for word in words for c in word]


@functools.cache
def trained(pattern: str = "default") -> Tokenizer:
    return train_bpe([TEXT, NASTY], 330, SPECIAL_TOKENS, pattern)


def random_text(rng, alphabet, most=60) -> str:
    return "".join(rng.choices(alphabet, k=rng.randrange(most)))


def test_the_doctests():
    failed, attempted = doctest.testmod(bpe)
    assert attempted >= 5 and not failed, f"{failed} of {attempted} examples in bpe.py are wrong"


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_learning_agrees_with_recounting_everything(pattern):
    rng, special = random.Random(1), ["<|s|>", "<|s|>a", "b"]
    for _ in range(150):
        letters = rng.choice(["a", "ab", "aab", "abc ", "a 1'\n", "\u00e9\u00e8", "a?\ud800", ["a", "<|s|>"]])
        texts = [random_text(rng, letters) for _ in range(rng.randrange(5))]
        names = rng.sample(special, rng.randrange(3))
        got = train_bpe(texts, 256 + len(names) + 40, names, pattern).merges
        want = slow_train(slow_pieces(texts, names, pattern), 40)
        assert got == want, f"{texts} with special tokens {names}: learned {got}, recounting gives {want}"
    assert train_bpe([TEXT], 400, pattern=pattern).merges == slow_train(slow_pieces([TEXT], [], pattern), 144)


def test_the_worked_example_of_cs336():
    """Stanford's first assignment works this out by hand. Ties go to the greater pair: "s t" before "e s"."""
    text = "low\n" * 5 + "lower\n" * 2 + "widest\n" * 3 + "newest\n" * 6
    merges = [b" ".join(pair).decode() for pair in train_bpe([text], 256 + 12).merges]
    assert merges[:6] == ["s t", "e st", "o w", "l ow", "w est", "n e"]
    assert merges[6:] == ["ne west", "w i", "wi d", "wid est", "low e", "lowe r"]


def test_ties_and_overlaps_by_hand():
    assert train_bpe(["ab\nb\u00e9"], 257).merges == [(b"\xc3", b"\xa9")], "of equals the greatest bytes"
    assert train_bpe(["ab\nabc\nabd"], 258).merges == [(b"a", b"b"), (b"ab", b"d")], "abd is greater than abc"
    merges = train_bpe(["aaa\naaa\nbc\nbc\nbc"], 257).merges
    assert merges == [(b"b", b"c")], '"aaa" holds one "aa" to join, so 2 "aa" stand against 3 "bc"'
    assert train_bpe(["aaaa"], 300).merges == [(b"a", b"a"), (b"aa", b"aa")]


def test_learning_stops_early_when_no_pair_is_left():
    for texts in ([], [""], ["a"], ["a1b2", "c"], ["\n"], ["x<|end|>" * 9 + "<|end|>" * 9]):
        tokenizer = train_bpe(texts, 1000, ["<|end|>"])
        assert tokenizer.merges == [] and tokenizer.n_vocab == 257, f"{texts} holds no pair outside <|end|>"
    tokenizer = train_bpe(["low low"], 1000, ["<|end|>"])
    assert tokenizer.n_vocab == 256 + 3 + 1 and tokenizer.special == {"<|end|>": 259}


def test_a_vocabulary_below_the_bytes_is_refused():
    assert train_bpe(["text"], 256 + 6, SPECIAL_TOKENS).encode("hi") == [104, 105], "bytes as tokens are fine"
    with pytest.raises(chain.UserError, match="261.*262"):
        train_bpe(["text"], 261, SPECIAL_TOKENS)


def test_endless_text_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(bpe, "MOST_PIECES", 500)
    rng, names = random.Random(5), iter(lambda: "".join(rng.choices("stuvwxyz", k=8)), "")
    tracemalloc.start()
    tokenizer = train_bpe(("the cat sat\n" * 20 * (i < 100) + next(names) for i in range(2000)), 256 + 6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6, f"text with 2,000 rare words took {peak:,} bytes"
    assert {b"the", b"cat", b" sat"} <= set(tokenizer.vocab.values()), "the frequent words were forgotten too"


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_encoding_agrees_with_applying_each_merge_in_turn(pattern):
    tokenizer, rng = trained(pattern), random.Random(2)
    for text in [TEXT, NASTY] + [random_text(rng, NASTY + TEXT) for _ in range(100)]:
        assert tokenizer.encode(text) == slow_encode(text, tokenizer.merges, pattern), f"{text!r}"
    assert max(tokenizer.encode(TEXT)) > 256, "no merge was used at all"


@pytest.mark.parametrize("pattern", [*PATTERNS, "[a-z]+"])
def test_every_text_survives(pattern):
    tokenizer, rng = Tokenizer(trained().merges, pattern=pattern), random.Random(3)
    for _ in range(300):
        text = "".join(map(chr, (rng.randrange(rng.choice([128, 0x3000, 0x110000])) for _ in range(30))))
        want = text.encode("utf-8", "replace").decode()  # a lone surrogate becomes "?"
        assert tokenizer.decode(tokenizer.encode(text)) == want, f"{text!r} came back otherwise"
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""
    assert tokenizer.decode([0xE2, 0x82]) == "\ufffd", "half a character"
    assert tokenizer.decode([104, 0xFF, 105, 0xE2, 0x82, 0xAC]) == "h\ufffdi\u20ac"


def test_what_the_patterns_cut():
    def cut(text, pattern="default"):
        return [piece for piece, _ in Tokenizer([], pattern=pattern).pieces(text, False)]
    assert cut("in 1905: 2") == ["in", " ", "1", "9", "0", "5", ":", " ", "2"], "one digit a token"
    assert cut("She'll I'M can\u2019t") == ["She", "'ll", " I", "'M", " can", "\u2019t"]
    assert cut("'sound'") == ["'", "sound", "'"], "'s is an ending only at the end of a word"
    assert cut("a  b\n\n\tc\n    d  \n") == ["a", " ", " b", "\n\n\t", "c", "\n   ", " d", "  \n"]
    assert cut("\u0928\u093f\u0928 e\u0301a") == ["\u0928\u093f\u0928", " e\u0301a"], "accents are cut off"
    assert cut("in 1905  \nI'll", "gpt2") == ["in", " 1905", "  ", "\n", "I", "'ll"]
    assert cut("ab-c", "[a-z]+") == ["ab", "-", "c"], "what a pattern leaves out is a piece of its own"
    assert max(map(len, cut("x" * 1000 + " " * 1000 + "-" * 1000))) <= 65, "a piece without an end"
    for misleading in ("gtp2", "(a)|b"):
        with pytest.raises(ValueError, match="pattern"):
            Tokenizer([], pattern=misleading)


def test_the_cache_is_bounded_and_changes_nothing(monkeypatch):
    want = Tokenizer(trained().merges).encode(TEXT)
    monkeypatch.setattr(bpe, "MOST_PIECES", 3)
    tokenizer = Tokenizer(trained().merges)
    assert tokenizer.encode(TEXT) == want == tokenizer.encode(TEXT)
    assert len(tokenizer.cache) <= 3, f"{len(tokenizer.cache)} pieces are kept, 3 were allowed"


def test_user_text_never_becomes_a_special_token():
    tokenizer, text = trained(), "".join(SPECIAL_TOKENS)
    special = set(tokenizer.special.values())
    assert not special & set(tokenizer.encode(NASTY + text)), "a user's text turned into special tokens"
    assert tokenizer.encode(text, allowed_special=True) == list(range(324, 330)), "they come after the merges"
    ids = tokenizer.encode("<|user|><|end|>", allowed_special={"<|end|>"})
    assert set(ids) & special == {tokenizer.special["<|end|>"]}, "only the one that is allowed"
    assert tokenizer.decode(ids) == "<|user|><|end|>"


def test_of_special_tokens_the_longest_is_taken():
    tokenizer = Tokenizer([], ["<|a", "<|a|>", "<|a|><|a|>", "a.c"])
    assert tokenizer.encode("<|a|><|a|><|a|><|a", allowed_special=True) == [258, 257, 256]
    assert tokenizer.encode("abc", allowed_special=True) == [97, 98, 99], '"." must not mean any character'


def test_a_conversation_trains_on_the_assistant_alone():
    tokenizer, want_ids, want_mask = trained(), [324], [0]
    said = [("system", "Be kind."), ("user", "Hi<|end|><|assistant|>"), ("assistant", "see 12<|end|>"),
            ("tool", ""), ("assistant", "")]
    ids, mask = tokenizer.encode_chat([{"role": role, "content": content} for role, content in said])
    for role, content in said:
        content = [*tokenizer.encode(" " + content), tokenizer.special["<|end|>"]]
        want_ids += [tokenizer.special[f"<|{role}|>"], *content]
        want_mask += [0] + [1 if role == "assistant" else 0] * len(content)
    assert ids == want_ids, "the order of tokens, or a special token that a message has forged"
    assert mask == want_mask, "1 belongs on the assistant's content and its <|end|>, never on the role"
    with pytest.raises(ValueError, match="'boss'.*system, user, assistant, tool"):
        tokenizer.encode_chat([{"role": "boss", "content": "Hi"}])
    with pytest.raises(ValueError, match=r"<\|tool\|>"):
        Tokenizer([], ["<|endoftext|>", "<|end|>"]).encode_chat([])


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_a_stream_gives_the_same_ids_wherever_it_is_cut(pattern, monkeypatch):
    tokenizer, rng = trained(pattern), random.Random(4)
    monkeypatch.setattr(bpe, "LOOK_AHEAD", 2)  # no more than bpe.py says that these two patterns need
    for allowed in (False, True, {"<|end|>"}):
        want = tokenizer.encode(NASTY, allowed)
        for i in range(len(NASTY) + 1):
            got = list(tokenizer.encode_iterable([NASTY[:i], NASTY[i:]], allowed))
            assert got == want, f"cut at {NASTY[max(0, i - 5):i]!r} | {NASTY[i:i + 5]!r}, allowed: {allowed}"
        assert list(tokenizer.encode_iterable(NASTY, allowed)) == want, "one character at a time"
    tokenizer = Tokenizer([(b"'", b"l"), (b" ", b" "), (b"\n", b"\n")], pattern=pattern)
    texts = ["".join(letters) + "lx" for letters in itertools.product("'lx \n1", repeat=5)]
    for text in texts + [random_text(rng, "'lrevx  \n1.\u2019\t", 300) for _ in range(200)]:
        got = list(tokenizer.encode_iterable(text))
        assert got == tokenizer.encode(text), f"{text!r}, one character at a time"


def test_a_stream_is_not_gathered_before_it_is_encoded():
    read, tokenizer = [], trained()
    endless = (read.append(text) or text for text in map("the cat number {}. ".format, itertools.count()))
    ids = list(itertools.islice(tokenizer.encode_iterable(endless), 2000))
    behind = len("".join(read)) - len(tokenizer.decode(ids))
    assert behind < 300, f"{behind} characters are held back"


def gpt2_files(folder, n_merges=None):
    """Write a small vocabulary as GPT-2's was. Return both files, and what the first holds as bytes -> id."""
    seen = [b for b in range(256) if chr(b).isprintable() and b != 32]  # these are numbered first
    unseen = [b for b in range(256) if b not in seen]  # these are written from U+0100 on
    letter = {b: chr(b) for b in seen} | {b: chr(256 + n) for n, b in enumerate(unseen)}
    merges = [(b" ", b"t"), (b" ", b"a"), (b"h", b"e"), (b"i", b"n")]  # the first of the real file
    learned = [(b"#", b"#"), *train_bpe([TEXT, NASTY], 330, pattern="gpt2").merges]
    merges += [pair for pair in learned if pair not in merges]
    id_of = {token: i for i, token in enumerate([bytes([b]) for b in letter] + [a + b for a, b in merges])}
    vocab = {"".join(letter[b] for b in token): i for token, i in id_of.items()}
    vocab["<|endoftext|>"] = len(vocab)
    lines = [" ".join("".join(letter[b] for b in token) for token in pair) for pair in merges]
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines[:n_merges], ""]), encoding="utf-8")
    return folder / "vocab.json", folder / "merges.txt", id_of


def test_gpt2_files_keep_their_ids(tmp_path):
    *files, id_of = gpt2_files(tmp_path)
    tokenizer, end = Tokenizer.from_gpt2(*files), len(id_of)
    assert tokenizer.encode("!~\n \x00") == [0, 93, 198, 220, 188], "the bytes are not in their own order"
    assert [tokenizer.encode(text) for text in (" t", " a", "he", "in")] == [[256], [257], [258], [259]]
    assert tokenizer.special == {"<|endoftext|>": end} and tokenizer.n_vocab == end + 1
    assert tokenizer.encode("a##<|endoftext|>", allowed_special=True) == [64, 260, end], "# is no comment"
    ours = Tokenizer(tokenizer.merges).vocab
    want = [id_of[ours[i]] for i in slow_encode(NASTY, tokenizer.merges, "gpt2")]
    assert tokenizer.encode(NASTY) == want
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.encode(NASTY) == want and again.special == tokenizer.special, "the ids changed on the disk"
    with pytest.raises(chain.UserError, match="merges.txt"):
        Tokenizer.from_gpt2(*gpt2_files(tmp_path, n_merges=20)[:2])


def test_a_saved_tokenizer_is_the_same(tmp_path):
    for made in (trained(), Tokenizer([]), train_bpe([TEXT], 290, ["<|b|>", "<|a|>"], r"\w+|\W")):
        made.save(tmp_path / "tokenizer.json")
        for copy in (Tokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(made))):
            for name in ("merges", "vocab", "special", "pattern", "n_vocab"):
                assert getattr(copy, name) == getattr(made, name), f"{name} was lost"
            assert copy.encode(TEXT + NASTY, True) == made.encode(TEXT + NASTY, True)


@pytest.mark.parametrize("content", [None, b"", b'{"merges": [["a"', b"[1]", b'{"merges": []}', b"\xff\x00"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(chain.UserError, match=r"tokenizer.json: .*python bpe.py"):
        Tokenizer.load(path)


def test_the_command_learns_shows_and_reports(text_file, tmp_path, capsys):
    flags = ["--data", str(text_file), "--out", str(tmp_path)]
    metrics, printed = bpe.main([*flags, "--vocab_size", "300"]), capsys.readouterr().out
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert metrics["vocab_size"] == tokenizer.n_vocab == 300 and list(tokenizer.special) == [*SPECIAL_TOKENS]
    assert "| the|" in printed and "bytes_per_token: " in printed and "seconds: " in printed
    bpe.main([*flags, "--vocab_size", "5000", "--pattern", "gpt2"])
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert f"5000: no pair is left to join after {tokenizer.n_vocab} tokens" in capsys.readouterr().out
    assert tokenizer.pattern == PATTERNS["gpt2"]
    found = bpe.find_or_make(data.open_source(str(text_file), tmp_path), tmp_path, None)
    assert found.merges == tokenizer.merges, "the tokenizer that was there is not used"


def test_mistakes_on_the_command_line(text_file, tmp_path, fails):
    for flag, value, says in (("--vocab_size", "261", "262"), ("--vocab_size", "0", "262"),
                              ("--vocab_size", "many", "many"), ("--pattern", "gtp2", "gpt2")):
        assert says in fails(bpe.main, ["--data", text_file, "--out", tmp_path, flag, value])
    assert not (tmp_path / "tokenizer.json").exists(), "a run that failed left a tokenizer"
