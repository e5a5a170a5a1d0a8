"""What users give to data.py: addresses, broken files, nothing at all; and what its script shows."""

import gzip
import http.server
import json
import threading
from pathlib import Path

import pytest

import bpe
import chain
import data
import world

WORDS = "the old ship came home with nine red lamps and the cook's cat, Ada; it wasn't late\n"
BOOK = "It cost 5 \u20ac, caf\u00e9 and \U0001f642 included.\r\n" * 2000


def lines(*texts: str) -> str:
    return "\n".join(json.dumps({"text": text}) for text in texts) + "\n"


def whole(source) -> str:
    return "".join([*source.documents("train"), *source.documents("held-out")])


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `text` at any path; knows ranges or not; may promise all and break off after `cut_at` bytes."""
    text, ranges, cut_at, status, asked = b"", True, None, 200, []

    def do_GET(self):
        asked = self.headers.get("Range", "bytes=0-")
        Server.asked.append(asked)
        start = int(asked[6:-1]) if self.ranges else 0
        if self.status != 200 or start > len(self.text):
            return self.send_error(416 if self.status == 200 else self.status)
        self.send_response(206 if self.ranges else 200)
        if self.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(self.text) - 1}/{len(self.text)}")
        self.send_header("Content-Length", str(len(self.text) - start))
        self.end_headers()
        self.wfile.write(self.text[start:self.cut_at])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """Yield the address of a server of BOOK on this machine."""
    for name, value in (("text", BOOK.encode()), ("ranges", True), ("cut_at", None), ("status", 200),
                        ("asked", [])):
        monkeypatch.setattr(Server, name, value)
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    thread.join()
    running.server_close()


def test_an_address_is_fetched_once(server, tmp_path):
    source = data.open_source(f"{server}/a/book.txt?raw=1", tmp_path / "cache")
    assert whole(source) == BOOK
    again = data.open_source(f"{server}/a/book.txt?raw=1", tmp_path / "cache")
    assert len(Server.asked) == 1 and again.identity == source.identity, "it was fetched twice"
    data.open_source(f"{server}/b/book.txt?raw=1", tmp_path / "cache")
    assert len(Server.asked) == len(list((tmp_path / "cache").iterdir())) == 2, "two addresses, one file"


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_was_cut_goes_on(server, tmp_path, monkeypatch, ranges):
    monkeypatch.setattr(Server, "ranges", ranges)
    monkeypatch.setattr(Server, "cut_at", 10_001)
    with pytest.raises(chain.UserError, match="book.txt: .*run it again"):
        data.open_source(f"{server}/book.txt", tmp_path)
    part, = tmp_path.iterdir()
    assert (part.suffix, part.stat().st_size) == (".part", 10_001), "a part is kept, and not taken for all"
    monkeypatch.setattr(Server, "cut_at", None)
    assert whole(data.open_source(f"{server}/book.txt", tmp_path)) == BOOK, "the parts do not fit together"
    assert Server.asked == ["bytes=0-", "bytes=10001-"], "it did not ask for the rest alone"
    assert [path.suffix for path in tmp_path.iterdir()] == [".txt"], "the part was not renamed"


def test_a_part_of_another_text_does_not_block_the_way(server, tmp_path, monkeypatch):
    """The text on the server got shorter than the part that we hold: one run says so, the next one works."""
    monkeypatch.setattr(Server, "cut_at", 10_001)
    for message in ("run it again", "416"):
        with pytest.raises(chain.UserError, match=message):
            data.open_source(f"{server}/book.txt", tmp_path)
        monkeypatch.setattr(Server, "text", WORDS.encode())
        monkeypatch.setattr(Server, "cut_at", None)
    assert whole(data.open_source(f"{server}/book.txt", tmp_path)) == WORDS


@pytest.mark.parametrize("address, message", [
    ("{server}/no.txt", "404"), ("http://127.0.0.1:1/a.txt", "refused"),
    ("{server}/program.exe", "must end in"), ("{server}/", "must end in"),
    ("http://[bad/a.txt", "run it again"), ("http:///a.txt", "no host"),
    ("http://127.0.0.1:port/a.txt", "port"), ("http://127.0.0.1/a b.txt", "run it again"),
])
def test_an_address_that_fails_is_one_clear_line(server, tmp_path, monkeypatch, fails, address, message):
    monkeypatch.setattr(Server, "status", 404)
    address = address.format(server=server)
    error = fails(data.main, ["--data", address, "--out", tmp_path])
    assert address in error and message in error, error


def test_an_empty_answer_is_not_kept(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Server, "text", b"")
    with pytest.raises(chain.UserError, match="cut off"):
        data.open_source(f"{server}/a.txt", tmp_path)
    assert not list(tmp_path.glob("*.txt"))


@pytest.mark.parametrize("name, content, message", [
    ("missing.txt", None, "no such file or folder; give one"),
    ("empty.txt", "", "0 bytes"),
    ("one.txt", "x", "1 bytes"),
    ("short.txt", "x" * 19, "19 bytes"),
    ("binary.txt", b"\x7fELF\x00\x01" * 50, "binary"),
    ("utf16.txt", WORDS.encode("utf-16"), "binary"),
    ("latin.txt", "\u00e9\u00e8\u00ea \u00e0\u00f9".encode("latin-1") * 50, "save it as UTF-8"),
    ("picture.png", WORDS, "end in .txt .md .py .jsonl"),
    ("notes", WORDS, "end in .txt .md .py .jsonl"),
    ("folder/picture.png", WORDS, "end in .txt .md .py .jsonl"),
    ("folder/empty.txt", "", "0 bytes"),
    ("broken.jsonl", lines("one", "two") + "\n{not json\n" + lines("five"), "line 4: not JSON"),
    ("list.jsonl", '["text"]\n' + lines(WORDS), "line 1"),
    ("number.jsonl", lines(WORDS) + '{"text": 5}\n' + lines(WORDS), "line 2"),
    ("other.jsonl", lines(WORDS) + '{"body": "no text"}\n' + lines(WORDS), "line 2"),
    ("deep.jsonl", lines(WORDS) + "[" * 100_000 + "\n" + lines(WORDS), "line 2"),
    ("one.jsonl", lines(WORDS), "1 lines"),
    ("blank.jsonl", "\n" * 30, "0 lines"),
    ("empty.txt.gz", gzip.compress(b"", mtime=0), "0 bytes"),
    ("short.txt.gz", gzip.compress(BOOK.encode(), mtime=0)[:-20], "broken .gz"),
    ("plain.txt.gz", WORDS, "broken .gz"),
    ("holes.txt.gz", gzip.compress(BOOK.encode(), mtime=0)[:60] + bytes(40), "broken .gz"),
])
def test_bad_input_is_one_clear_line(tmp_path, fails, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    path = path.parent if name.startswith("folder/") else path
    error = fails(data.main, ["--data", path, "--out", tmp_path / "out"])
    assert str(path) in error and message in error, error


@pytest.mark.parametrize("name", ["", "worlds", "ftp://example.org/a.txt"])
def test_a_source_that_is_none_is_told_with_the_way_out(fails, name):
    error = fails(data.main, ["--data", name])
    assert f"'{name}': no such file or folder; give one, an address, or world" in error


@pytest.mark.parametrize("content, message", [
    (lines(*[WORDS] * 30) + "{oops\n" + lines(*[WORDS] * 30), "line 31: not JSON"),  # met after 30 good ones
    (lines("", "", ""), "too little text, 39 bytes"),
])
def test_text_that_fails_while_it_is_tokenized_leaves_no_tokens(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content, encoding="utf-8")
    for _ in range(2):  # nothing of the first try may be taken for tokens by the second one
        with pytest.raises(chain.UserError, match=message):
            data.token_files(data.open_source(str(path), tmp_path), bpe.Tokenizer([]), tmp_path / "out")


def test_the_script_shows_the_world(capsys, tmp_path):
    metrics = data.main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for kind in world.KINDS:
        assert f"--- {kind}, " in printed, f"no page of the kind {kind}"
    assert max(map(len, printed.splitlines())) <= 110, "a line was not wrapped"
    assert metrics["documents"] == 64 * data.UNIT and metrics["names"] > 500 < metrics["distinct_words"]
    assert f"names: {metrics['names']:,}" in printed


def test_the_script_shows_a_file(capsys, tmp_path):
    Path(tmp_path, "a.txt").write_text(WORDS * 10, encoding="utf-8")
    metrics = data.main(["--data", str(tmp_path / "a.txt"), "--out", str(tmp_path)])
    assert WORDS.strip() in capsys.readouterr().out
    assert metrics == {"documents": 1, "bytes": int(0.9 * len(WORDS) * 10), "distinct_words": 18}
