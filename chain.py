"""What all rooms share: the command line, the device, checkpoints and results. Nothing to learn here.

    python chain.py              the report card: the newest result of every script, as one table
    python chain.py --record     also keep it as docs/results.json and set it into README.md

Rules that the whole house keeps:
- A script's flags are the fields of its `Config` dataclass: name, type, default and help stand in one place.
- A user's mistake is a `UserError`: one line that names the value and the way out, exit code 2, no traceback.
- A file is written under a temporary name, synced, then renamed. Nobody ever sees half a file.
- A checkpoint holds tensors and plain types only, so that `torch.load(weights_only=True)` opens it.

Left out on purpose: configuration files, plug-ins, loggers. torch is imported where it is used, because the
tokenizer and the data do without it and should start fast.
"""

import argparse
import dataclasses
import datetime
import errno
import functools
import json
import os
import platform
import re
import sys
import time
import typing
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm


class UserError(Exception):
    """A mistake of the user's. The message is one line: what is wrong, its value, the way out."""


def option(default, help: str, choices: tuple | None = None):
    """Return a dataclass field that is also a flag: `depth: int = option(4, "number of layers")`."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """The flags of `python chain.py`."""
    out: str = option("out", "folder for everything that is made")
    record: bool = option(False, "keep the results in docs/results.json and in README.md")


# ------------------------------------------------------------------------------------------ command line

class Parser(argparse.ArgumentParser):
    """The standard one, but a bad flag is a UserError."""

    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def parse(config_class: type, argv: list[str] | None, doc: str):
    """Return a `config_class` filled from `argv` (default: the command line). A bad flag exits with code 2.

    A `bool` field is a switch. A field of type `X | None` may stay None: the script then derives its value.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    types = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        text = field.metadata["help"] + ("" if field.default is None else f" (default: {field.default})")
        if types[field.name] is bool:
            parser.add_argument(f"--{field.name}", action="store_true", help=field.metadata["help"])
        else:
            either = typing.get_args(types[field.name]) or [types[field.name]]
            kind = next(t for t in either if t is not type(None))
            parser.add_argument(f"--{field.name}", type=kind, default=field.default,
                                metavar=kind.__name__.upper(), choices=field.metadata["choices"],
                                help=text.replace("%", "%%"))
    config = config_class(**vars(parser.parse_args(argv)))
    seed = getattr(config, "seed", 0)
    require(0 <= seed < 2 ** 63, f"--seed {seed}: give a number from 0 to 2^63 - 1")
    return config


def command(main):
    """Wrap `main(argv)`: the user's mistakes and the machine's refusals become one line and exit code 2."""
    @functools.wraps(main)
    def run(argv=None):
        try:
            return main(argv)
        except UserError as error:
            message = str(error)
        except BrokenPipeError:  # `python data.py | head`: the reader has gone, and that is no mistake
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0)
        except OSError as error:
            is_full = error.errno == errno.ENOSPC
            way_out = "make room, then run the same command again" if is_full else "check the path"
            message = f"{error.filename or 'writing'}: {error.strerror or error}; {way_out}"
        except (RuntimeError, MemoryError) as error:
            message = (str(error) or "out of memory").splitlines()[0][:120]
            if not re.search("(out of|not enough|allocate) memory|Unable to allocate", message):
                raise
            message += "; use a smaller --micro_batch, --n or --context"
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            raise SystemExit(130)
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)
    return run


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def pick_device(name: str) -> str:
    """Return a device torch can use: "auto" takes CUDA, then Apple's MPS, then the CPU."""
    import torch
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, there in found.items() if there)
    parts = re.fullmatch(r"(cuda|mps|cpu)(?::(\d+))?", name)
    require(parts is not None, f"--device {name}: choose auto, cpu, cuda or mps")
    require(found[parts[1]] and int(parts[2] or 0) < max(1, torch.cuda.device_count()),
            f"--device {name}: torch {torch.__version__} finds no such device here; use --device cpu")
    return name


def start_rank() -> int:
    """Join the other processes if torchrun started this one; return its number, 0 when alone."""
    if "RANK" not in os.environ:
        return 0
    import torch
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not torch.distributed.is_initialized():  # the others wait while the first one writes all tokens
        torch.distributed.init_process_group(timeout=datetime.timedelta(hours=12))
    if torch.distributed.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # one process speaks for all
    return torch.distributed.get_rank()


class Clock:
    """Shows how training goes: a bar on a terminal, else lines in columns. Five steps warm up, untimed."""

    def __init__(self, steps: int, tokens: int, mfu: float, show: bool):
        """`tokens` a step; `mfu`: the share of the GPU's peak that one token a second takes, 0 if unknown."""
        self.steps, self.tokens, self.mfu, self.show = steps, tokens, mfu, show
        self.ticks, self.seconds, self.last = 0, 0.0, 0.0
        self.bar = tqdm(total=steps, unit="step", disable=None if show else True)

    @property
    def tokens_per_second(self) -> float:
        """Of training alone."""
        return max(0, self.ticks - 5) * self.tokens / self.seconds if self.seconds else 0.0

    def tick(self, step: int, text: str) -> None:
        """Count a step that has just ended, and show it with `text`."""
        now, self.ticks = time.perf_counter(), self.ticks + 1
        self.seconds += now - self.last if self.ticks > 5 else 0
        self.last = now
        text += f"  {self.tokens_per_second:,.0f} tokens/s"
        text += f"  MFU {self.tokens_per_second * self.mfu:.0%}" if self.mfu else ""
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(step + 1 - self.bar.n)
        if self.show and self.bar.disable and (step + 1) % max(1, self.steps // 50) == 0:
            left = (self.steps - step - 1) * self.seconds / max(1, self.ticks - 5)
            print(f"step {step + 1:>6}/{self.steps}  {text}  {left:5.0f} s left", flush=True)


def write_whole(path, write) -> None:
    """Call `write(file)` on a temporary file, sync it, rename it to `path`. A failure leaves the old file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # Name the file that the user knows, unless it is another file that failed.
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    import torch
    return {"python": platform.python_version(), "torch": str(torch.__version__)}


def save_checkpoint(path, *, config: dict, weights: dict, tokenizer: dict, step: int, loss: float,
                    arguments: dict, **more) -> None:
    """Write a self-sufficient checkpoint: all that is needed to rebuild the model and its tokenizer.

    `config` are the fields of `GPTConfig`, `tokenizer` is `Tokenizer.to_dict()`, `loss` is in nats a token.
    """
    import torch
    content = dict(config=config, weights=weights, tokenizer=tokenizer, step=step, loss=loss,
                   arguments=arguments, seed=arguments.get("seed"), versions=versions(), **more)

    def write(file):
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch hides the disk's own error behind its zip writer
            reason = str(error).splitlines()[0][:80]
            raise OSError(errno.ENOSPC, f"could not be written whole ({reason})") from error
    write_whole(path, write)


def load_checkpoint(path) -> dict:
    """Return a checkpoint's content, on the CPU. Raises UserError for a missing, cut-off or foreign file."""
    import torch
    path = Path(path)
    require(path.is_file(), f"{path}: no such checkpoint; make it with `python train.py`, "
            "or name one with --checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch has many words for a file that it can't read
        raise UserError(f"{path}: cut off or not a checkpoint ({path.stat().st_size:,} bytes); "
                        "delete it, make it again")
    missing = {"config", "weights", "tokenizer", "step"} - set(content if isinstance(content, dict) else ())
    require(not missing, f"{path}: no checkpoint of this project, it lacks {', '.join(sorted(missing))}")
    return content


def show(value) -> str:
    """Return a metric as people read it: 4 significant digits for small numbers, commas in large ones."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def report(script: str, config, metrics: dict, seconds: float) -> None:
    """Print `metrics` as `key: value` lines; append them, with what made them, to `<out>/results.jsonl`."""
    print("---")
    for key, value in {**metrics, "seconds": seconds}.items():
        print(f"{key}: {show(value)}")
    line = dict(script=script, arguments=dataclasses.asdict(config), seed=getattr(config, "seed", None),
                device=getattr(config, "device", "cpu"),
                versions={"python": platform.python_version()} if "torch" not in sys.modules else versions(),
                seconds=round(seconds, 2), metrics=metrics, when=time.strftime("%Y-%m-%d %H:%M:%S"))
    path = Path(config.out) / "results.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_results(path: Path) -> list[dict]:
    """Return the newest result of each script, in the order in which they were first run."""
    require(path.is_file(), f"{path}: no results yet; run `python train.py` first")
    newest = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            result = json.loads(line)
            newest[result["script"]] = result
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f"{path}, line {number}: no whole result, its run was killed; delete that line")
    return list(newest.values())


def markdown_table(results: list[dict]) -> str:
    """Return the README's table: one row a metric."""
    rows = ["| script | metric | value |", "|---|---|---|"]
    for result in results:
        metrics = {**result["metrics"], "seconds": result["seconds"]}
        rows += [f"| `{result['script']}` | {key} | {show(value)} |" for key, value in metrics.items()]
    return "\n".join(rows)


def set_table(readme: str, table: str) -> str:
    """Return `readme` with the lines between its two `<!-- results -->` marks replaced by `table`."""
    marks = r"(<!-- results -->\n).*?(\n<!-- results -->)"
    return re.sub(marks, lambda m: m[1] + table + m[2], readme, flags=re.S)


@command
def main(argv=None) -> dict:
    """Print the report card; with --record also keep it."""
    config = parse(Config, argv, __doc__)
    results = read_results(Path(config.out) / "results.jsonl")
    print("script      metric                          value")
    for result in results:
        for key, value in {**result["metrics"], "seconds": result["seconds"]}.items():
            print(f"{result['script']:<11} {key:<28} {show(value):>9}")
    if config.record:
        text = json.dumps(results, indent=1) + "\n"
        write_whole("docs/results.json", lambda file: file.write(text.encode()))
        readme = set_table(Path("README.md").read_text(encoding="utf-8"), markdown_table(results))
        write_whole("README.md", lambda file: file.write(readme.encode()))
    return {result["script"]: result["metrics"] for result in results}


if __name__ == "__main__":
    main()
