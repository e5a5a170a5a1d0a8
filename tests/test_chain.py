"""chain.py: the command line, files that are whole or not there, and results."""

import json
from dataclasses import dataclass

import pytest
import torch

import chain


@dataclass
class Config:
    out: str = chain.option("out", "folder")
    depth: int | None = chain.option(None, "layers")
    rate: float = chain.option(0.5, "a share, 50 % say")
    loud: bool = chain.option(False, "a switch")
    mode: str = chain.option("a", "a choice", choices=("a", "b"))
    seed: int = chain.option(0, "seed")




def test_flags_are_the_fields():
    assert chain.parse(Config, [], "") == Config()
    assert chain.parse(Config, ["--depth", "3", "--rate", "1e-3", "--loud", "--mode", "b"], "") == Config(
        depth=3, rate=1e-3, loud=True, mode="b")


@pytest.mark.parametrize("argv,says", [
    (["--dep", "3"], "--dep"), (["--depth", "x"], "'x'"), (["--mode", "c"], "'c'"), (["word"], "word"),
    (["--rate"], "--rate")])
def test_a_bad_flag_is_one_line(argv, says, fails):
    assert says in fails(chain.command(lambda given: chain.parse(Config, given, "")), argv)


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        chain.parse(Config, ["--help"], "The idea.")
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "The idea." in out and "50 % say" in out
    assert all(f"--{name}" in out for name in Config.__dataclass_fields__)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    chain.write_whole(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the new one")
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        chain.write_whole(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path], "the old file must stay, alone"


def test_a_checkpoint_comes_back(tmp_path):
    weights = {"a": torch.randn(3, 2)}
    chain.save_checkpoint(tmp_path / "x.pt", config={"depth": 1}, weights=weights, tokenizer={"merges": []},
                          step=7, loss=1.5, arguments={"seed": 3})
    content = chain.load_checkpoint(tmp_path / "x.pt")
    assert torch.equal(content["weights"]["a"], weights["a"])
    assert content["step"] == 7 and content["seed"] == 3


@pytest.mark.parametrize("content", [b"", b"J\x01", b"\x80\x02.", b"no checkpoint" * 99])
def test_a_foreign_file_is_no_checkpoint(content, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(chain.UserError, match="not a checkpoint|no checkpoint"):
        chain.load_checkpoint(tmp_path / "x.pt")


def test_results_are_kept_and_shown(tmp_path, capsys):
    config = Config(out=str(tmp_path))
    chain.report("one.py", config, {"loss": 2.5, "tokens": 12_345}, 1.0)
    chain.report("one.py", config, {"loss": 2.25}, 1.0)
    assert "tokens: 12,345" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {"script", "arguments", "seed", "device", "versions", "seconds", "metrics"} <= set(lines[0])
    newest = chain.main(["--out", str(tmp_path)])
    assert newest == {"one.py": {"loss": 2.25}}, "the newest result of each script"
    assert "2.25" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["{", "[]", "{}", "7", "[" * 99_999])
def test_a_broken_result_is_one_line(line, tmp_path, fails):
    (tmp_path / "results.jsonl").write_text(line + "\n", encoding="utf-8")
    assert "line 1: no whole result" in fails(chain.main, ["--out", tmp_path])


@pytest.mark.parametrize("name", ["cpu:x", "cpu:-1", "cpu:7", "cuda:", "gpu", "cuda:99", ""])
def test_a_device_that_is_not_there_is_one_line(name, fails):
    assert f"--device {name}: " in fails(chain.command(lambda argv: chain.pick_device(*argv)), [name])


@pytest.mark.parametrize("take", [lambda argv: torch.zeros(2 ** 60), lambda argv: bytearray(2 ** 60)])
def test_too_little_memory_is_one_line(take, fails):
    assert "use a smaller --micro_batch" in fails(chain.command(take), [])


def test_the_card_without_results_is_one_line(tmp_path, fails):
    assert "python train.py" in fails(chain.main, ["--out", tmp_path])


def test_the_readme_table_is_set_between_its_marks():
    readme = "a\n<!-- results -->\nold\n<!-- results -->\nb"
    assert chain.set_table(readme, "new") == "a\n<!-- results -->\nnew\n<!-- results -->\nb"
