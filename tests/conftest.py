"""Tests import the scripts from the folder above. Each works in its own folder, on the CPU."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture
def text_file(tmp_path) -> Path:
    """A text of 20,000 bytes in short sentences."""
    rng, words = random.Random(0), "the old man saw a small red boat on the wide river and sang".split()
    text = ""
    while len(text) < 20_000:
        text += " ".join(rng.choice(words) for _ in range(rng.randrange(3, 9))).capitalize() + ".\n"
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def train_small(text_file, tmp_path):
    """Call train.main on that text with a tiny model: `train_small("--steps", "3")` returns the metrics."""
    import train

    def run(*flags: str, out: str = "out") -> dict:
        return train.main(["--data", str(text_file), "--out", str(tmp_path / out), "--device", "cpu",
                           "--depth", "2", "--context", "32", "--vocab_size", "300", "--batch_size", "4",
                           "--steps", "20", *flags])
    return run


@pytest.fixture
def fails(capsys):
    """Call `fails(main, argv)`: it must end in one clear line on stderr and exit code 2. Returns the line."""
    def check(main, argv) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in argv])
        lines = capsys.readouterr().err.strip().split("\n")
        assert stop.value.code == 2, f"exit code {stop.value.code} for {argv}"
        assert len(lines) == 1 and lines[0].startswith("error: "), f"not one clear line: {lines}"
        return lines[0]
    return check
