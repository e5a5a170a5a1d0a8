"""A sandbox: Python that a model writes runs in a process of its own, with little to reach, not for long.

    limits        1 s of computing, 3 s in all, 256 MB of memory, 1 MB a file, 10,000 signs of output
    jail.py       in the new process: what reaches the system is taken away before the program begins
    nothing else  an empty folder, an empty environment, the standard library without packages, none of the
                  caller's variables; when it ends, all that it has started is killed

What this stops: endless loops, output, memory and files; forks; signals to others; the network; programs and
C code; reading or writing files outside of its folder (the standard library may be read).
What it does not stop: a fault in the interpreter, as by bytecode that no compiler makes; whether a file is
there can be seen. For code by strangers put a container or a virtual machine around it. Needs Linux, or
macOS, which can't limit memory. `python tools.py --code` tries it: so small a model writes no programs.

Left out: programs that go on between calls.
"""

import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS, WAIT = 1, 3   # of computing, in all
MEMORY = 256 * 2**20   # bytes
FILE = 2**20           # bytes of a file
OUTPUT = 10_000        # signs that come back


class ToolError(Exception):
    """What a tool tells the model when it can't do what was asked."""


def limit() -> None:
    """In the new process: no more than this of time, memory and files."""
    most = {resource.RLIMIT_CPU: SECONDS, resource.RLIMIT_FSIZE: FILE, resource.RLIMIT_NOFILE: 32,
            resource.RLIMIT_CORE: 0}
    if sys.platform != "darwin":  # which refuses it
        most[resource.RLIMIT_AS] = MEMORY
    for what, n in most.items():
        resource.setrlimit(what, (n, n))


def python(code: str) -> str:
    """For programs: Python, of which what it prints comes back."""
    jail, library = Path(__file__).with_name("jail.py"), Path(os.__file__).parent
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        here = str(Path(folder).resolve())
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(jail), here, str(library)], cwd=here, env={"HOME": here},
            stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, preexec_fn=limit,
            start_new_session=True)
        try:
            process.communicate(code.encode("utf-8", "replace"), timeout=WAIT)
        except subprocess.TimeoutExpired:
            pass
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # and whatever it has left behind
            except ProcessLookupError:
                pass
            process.wait()
        output.seek(0)
        said = output.read(4 * OUTPUT).decode("utf-8", "replace")
    if process.returncode:
        last = said.strip().splitlines()[-1][:200] if said.strip() else "it printed nothing"
        raise ToolError(f"the program failed or was stopped ({process.returncode}): {last}")
    return said[:OUTPUT].strip() + (" ..." if len(said) > OUTPUT else "")
