"""The inner side of sandbox.py: a new process reads a program from standard input, and runs it with little.

    taken away    what the program could reach the system with: the functions of `os` that are not KEPT,
                  signals to others, and the loading of C code. Most of the standard library does without
    audit hook    the interpreter asks it before it opens a file and does what may be dangerous (PEP 578); it
                  can't be taken off. It refuses what is not HARMLESS, and paths outside of the folder

subtle: the program can follow an error's traceback into the hook's frame, and since Python 3.13 write into
what a function has from around it. So the hook has all from its defaults: constants, and types and their
methods, nothing that can be changed; its counter can only go up.
Left out: defence against faults of the interpreter, as by made-up bytecode. Source: PEP 578 (Dower 2019).
"""

import itertools
import os
import sys

FILES = 10  # that a program may write, remove or rename
PRELOADED = ("array", "base64", "bisect", "calendar", "cmath", "collections", "contextlib", "copy", "csv",
             "dataclasses", "datetime", "decimal", "fractions", "functools", "hashlib", "heapq", "itertools",
             "json", "math", "numbers", "operator", "pprint", "random", "re", "statistics", "string",
             "struct", "textwrap", "time", "traceback", "typing", "unicodedata")
KEPT = ("_exit", "close", "cpu_count", "fspath", "fstat", "getcwd", "getcwdb", "getpid", "isatty", "listdir",
        "lseek", "lstat", "mkdir", "read", "remove", "rename", "replace", "rmdir", "scandir", "stat",
        "strerror", "times", "unlink", "urandom", "write")
# subtle: not os.open. It opens folders too, and the hook is not told of the dir_fd that a path starts from
HARMLESS = ("import", "compile", "exec", "marshal.loads", "code.__new__", "builtins.id", "builtins.input",
            "builtins.input/result", "function.__new__", "object.__getattr__", "sys._getframe",
            "sys._getframemodulename", "sys.excepthook", "sys.unraisablehook", "pickle.find_class",
            "glob.glob", "glob.glob/2", "array.__new__", "time.sleep")
NAMING = ("__doc__", "__module__", "__name__", "__qualname__")  # may be set, as dataclasses do
READS, WRITES = ("open", "os.listdir", "os.scandir"), ("os.remove", "os.rename", "os.mkdir", "os.rmdir")
PACKAGES = ("/site-packages", "/dist-packages")  # they lie in the library, and are none of it
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def make_hook(here: str, library: str):
    """Return the audit hook: paths may lie in the folder `here`, and for reading in the `library`."""
    def hook(event, arguments, here=here, library=library, READS=READS, WRITES=WRITES, HARMLESS=HARMLESS,
             NAMING=NAMING, PACKAGES=PACKAGES, WRITING=WRITING, FILES=FILES, type=type, str=str, bytes=bytes,
             int=int, next=next, count=itertools.count(1), refusal=PermissionError):
        if event in HARMLESS or event == "object.__setattr__" and (
                type(arguments[1]) is str and arguments[1] in NAMING):
            return
        if event not in READS and event not in WRITES:
            raise refusal("not allowed here: " + event)
        is_write = event in WRITES or event == "open" and (
            type(arguments[2]) is not int or arguments[2] & WRITING != 0)
        for path in arguments[:2 if event == "os.rename" else 1]:
            path = "." if path is None else path.decode() if type(path) is bytes else path
            if type(path) is int and not is_write:  # a file that was opened before
                continue
            inside = type(path) is str and ".." not in path.split("/") and (
                path[:1] != "/" or path == here or path.startswith(here + "/")
                or not is_write and (path == library or path.startswith(library + "/"))
                and PACKAGES[0] not in path and PACKAGES[1] not in path)
            if not inside:
                raise refusal("not allowed here: " + event + " outside of the folder")
        if is_write and next(count) > FILES:
            raise refusal("not allowed here: more files")
    return hook


def take_away() -> None:
    """Remove the functions that reach the system, wherever the program could find them."""
    posix, imp, signals = sys.modules["posix"], sys.modules["_imp"], sys.modules["_signal"]
    for module in (os, posix):
        for name, each in list(vars(module).items()):
            if type(each) is type(len) and name not in KEPT:
                delattr(module, name)
    for functions in (os.supports_dir_fd, os.supports_effective_ids, os.supports_fd,
                      os.supports_follow_symlinks):
        functions.clear()  # they hold functions too
    for name in ("pidfd_send_signal", "pthread_kill"):
        if hasattr(signals, name):
            delattr(signals, name)

    def refuse(*arguments):
        raise ImportError("not allowed here: C code that was not loaded before")
    imp.create_builtin = imp.create_dynamic = refuse


def main() -> None:
    """Read a program from standard input, and run it behind the hook."""
    here, library = sys.argv[1:]
    code = sys.stdin.buffer.read().decode()
    for name in PRELOADED:
        __import__(name)
    sys.argv[:] = ["program"]
    take_away()
    sys.addaudithook(make_hook(here, library))
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
