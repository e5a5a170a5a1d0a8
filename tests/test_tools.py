"""tools.py and sandbox.py: calls that are checked, sums that are parsed, programs that can't get out."""

import os
import time

import pytest

from errands import TOOLS
from sandbox import OUTPUT, ToolError, python
from tools import calculator, call, schema


def repeat(text: str, times: int) -> str:
    """For echoes: a text, so many times."""
    return text * times


@pytest.mark.parametrize("arguments, told", [
    (("a",), "takes 2 arguments"), (("a", 2, 3), "takes 2"), (("a", "2"), "times of repeat must be int"),
    ((1, 2), "text of repeat must be str"), (("a", True), "must be int, not bool"), (("a", 2.0),
    "not float")])
def test_bad_arguments_are_told(arguments, told):
    said = call({"repeat": repeat}, "repeat", arguments)
    assert said.startswith("error: ") and told in said, said


def test_calls():
    def breaks(text: str) -> str:
        raise KeyError(text)

    def hangs() -> str:
        time.sleep(60)

    tools = {"repeat": repeat, "breaks": breaks, "hangs": hangs}
    assert call(tools, "repeat", ("ab", 2)) == "abab"
    assert call(tools, "nothing", ()) == "error: there is no tool nothing; there are repeat, breaks, hangs"
    assert call(tools, "breaks", ("x",)) == "error: breaks failed, KeyError: 'x'", "a tool's fault is told"
    assert "took more than 0.1 seconds" in call(tools, "hangs", (), seconds=0.1)
    assert schema("repeat", repeat) == 'repeat("...", 0) for echoes', "read from signature and docstring"


def test_the_assistant_was_taught_these_forms():
    assert schema("calculator", calculator) == TOOLS["calculator"]


@pytest.mark.parametrize("sum, result", [
    ("12 + 30", "42"), ("7 / 2", "3.5"), ("6 / 2", "3"), ("-3 * (2 - 5)", "9"), ("0.1 + 0.2 - 0.3 + 5",
    "5.0")])
def test_sums(sum, result):
    assert float(calculator(sum)) == pytest.approx(float(result))


@pytest.mark.parametrize("sum", [
    "9**9**9", "10**100", "2 ** 3", "1 << 99", "9" * 40, "1e999", "1/0", "0/0", "x", "", "1 +",
    "(" * 150, "1, 2",
    "__import__('os').system('ls')", "().__class__.__bases__[0].__subclasses__()", "[].append(1)", "'a' * 9",
    "True + 1", "lambda: 1", "1 if 1 else 2", "9" * 201, "\x00", "1j", "-" * 190, "abs(1)"])
def test_what_is_no_sum_is_refused(sum):
    with pytest.raises(ToolError):
        calculator(sum)


# --- the sandbox --------------------------------------------------------------------------------------

def test_programs():
    assert python("print(sum(i * i for i in range(10)))") == "285"
    assert python("import math, json\nprint(json.dumps(math.pi))").startswith("3.14")
    said = python("open('a.txt', 'w').write('hi')\nprint(open('a.txt').read())")
    assert said == "hi", "its own folder is open"
    assert python("import os\nprint(os.listdir('.'))") == "[]", "each run has an empty folder"
    assert python("import os, sys\nprint(sys.argv[1:], list(os.environ))").startswith("[] ['HOME'")
    said = python("""
import argparse, collections, dataclasses, enum, shlex, time
P = collections.namedtuple("P", "x y")
C = enum.Enum("C", "RED BLUE")
@dataclasses.dataclass
class D:
    z: int = 3
time.sleep(0)
print(P(1, 2), C.RED, D(), shlex.split("a b"))""")
    assert said == "P(x=1, y=2) C.RED D(z=3) ['a', 'b']", "plain programs run"


BOMBS = [
    "1/0", "while True: pass", "print('x' * 10 ** 9)", "x = 'a' * 10 ** 10", "def f(): f()\nf()",
    "x = []\nwhile True: x.append('a' * 10 ** 6)", "import time\ntime.sleep(60)",
    "for i in range(100): open(f'{i}', 'w').write('x')", "open('big', 'w').write('x' * 10 ** 8)",
    "import os\nos.fork()", "import os\nwhile True: os.fork()"]
ESCAPES = [
    "print(open('/etc/passwd').read())", "open('/tmp/escaped', 'w').write('x')", "open('../escaped', 'w')",
    "import os\nprint(os.listdir('/'))", "import os\nos.system('touch /tmp/escaped')",
    "import os\nos.kill(os.getppid(), 9)", "import os\nos.killpg(0, 9)", "import os\nos.chmod('/tmp', 0)",
    "import os\nos.execv('/bin/sh', ['sh', '-c', 'touch /tmp/escaped'])",
    "import os\nos.symlink('/etc', 'etc')",
    "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)",
    "import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "import os\nos.mknod('disk', 0o60666, 2049)",
    "import os\nos.chdir('/')\nopen('tmp/escaped', 'w')",
    "import os\nopen(os.open('/etc/passwd', os.O_RDONLY))",
    "import os\nos.open(os.__file__, os.O_RDONLY | os.O_TRUNC)",
    "import os\nos.open(os.__file__, os.O_APPEND)",
    "import subprocess\nsubprocess.run(['ls'])", "import _posixsubprocess", "import resource",
    "import socket",
    "import sys\nsys.modules['subprocess'].run(['ls'])",
    "import sys\nsys._getframe(1).f_globals['subprocess']",
    "import urllib.request\nurllib.request.urlopen('http://127.0.0.1')", "import ctypes\nctypes.CDLL(None)",
    "import multiprocessing\nmultiprocessing.Process(target=print).start()", "import torch", "import sqlite3",
    "import sys\ndel sys.modules['posix']\nimport posix\nposix.system('touch /tmp/escaped')",
    "import _imp, importlib.machinery as m\n_imp.create_builtin(m.ModuleSpec('posix', None)).system('ls')",
    "import os\nnext(f for f in os.supports_dir_fd if f.__name__ == 'mknod')",
    "().__class__.__base__.__subclasses__()[0].__init__.__globals__",
    "import sys\nsys.addaudithook(None)\nopen('/etc/passwd')", "import gc\ngc.get_objects()",
    "import builtins\nbuiltins.type = lambda x: str\nbuiltins.PermissionError = OSError\nopen('/etc/passwd')",
    "try: open('/etc/passwd')\nexcept OSError as error: frame = error.__traceback__.tb_next.tb_frame\n"
    "frame.f_locals['here'] = '/etc'\nframe.f_globals['READS'] = ()\nopen('/etc/passwd')",
    "class P(str):\n    def startswith(self, x): return True\n    def split(self, x): return []\n"
    "open(P('/etc/passwd'))",
    "import os, sys\nfolder = os.open(sys.orig_argv[-1], os.O_RDONLY)\n"
    "os.open('escaped', os.O_WRONLY | os.O_CREAT, dir_fd=folder)",
    "import os, sys\nsys.path.append(os.path.join(sys.orig_argv[-1], 'site-packages'))\nimport pip",
    "def f(): pass\nf.__code__ = (lambda: 1).__code__",
    "class N(str):\n    def __eq__(self, other): return True\n    __hash__ = str.__hash__\n"
    "def f(): pass\nsetattr(f, N('__code__'), (lambda: 1).__code__)"]


@pytest.mark.parametrize("code", BOMBS + ESCAPES)
def test_nothing_gets_out(code):
    """An escape or a bomb: it ends in an error that is told, and the parent goes on."""
    with pytest.raises(ToolError):
        python(code)
    assert not os.path.exists("/tmp/escaped"), "a file was written outside of the folder"


def test_nothing_of_the_hook_can_be_changed():
    """The error's traceback leads into the hook: what it uses must be constant."""
    said = python("""
try:
    open('/etc/passwd')
except PermissionError as error:
    traceback = error.__traceback__
    while traceback.tb_next:
        traceback = traceback.tb_next
    frame = traceback.tb_frame
    print({type(value).__name__ for value in frame.f_locals.values()} & {'list', 'dict', 'set'})
    print(frame.f_code.co_freevars)
""")
    assert said.splitlines() == ["set()", "()"], f"the program can change {said}"


def test_endless_output_is_cut():
    said = python(f"print('x' * {2 * OUTPUT})")
    assert len(said) <= OUTPUT + 4 and said.endswith(" ...")
