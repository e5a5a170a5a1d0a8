"""Tools for an agent: Python functions with typed arguments, and what happens when a model calls one.

    schema       how the model is told of a tool: its form from the signature, its use from the docstring
    call         checks the name, the number and the types of the arguments, runs the tool, returns text; what
                 goes wrong is text too, for the model to read: "error: ..."
    calculator   numbers, + - * / and brackets: parsed, never evaluated as Python

`python` is in sandbox.py, `search` in agent.py. A tool that hangs is left alone after a while: its thread
goes on until the program ends, as threads can't be stopped; what may run for long belongs into a process, as
sandbox.py does it. Left out: arguments that are no text or number. Paper: Schick 2023 (Toolformer).

    python tools.py --code "print(2 ** 10)"     one program in the sandbox (1 second)
"""

import ast
import inspect
import threading
import time
import typing
from collections.abc import Callable
from dataclasses import dataclass

import chain
from sandbox import ToolError, python

LONGEST = 200       # signs of an expression
LARGEST = 10 ** 15  # a result beyond it, up or down, is refused
SECONDS = 10.0      # until a tool is said to hang
FORMS = {str: '"..."', int: "0", float: "0.0"}


@dataclass
class Config:
    """The flags of `python tools.py`."""
    out: str = chain.option("out", "folder for everything that is made")
    code: str = chain.option("print(2 ** 10)", "program to run")


# ------------------------------------------------------------------------------------------- the registry

def arguments_of(tool: Callable) -> dict[str, type]:
    """Return the names and types of a tool's arguments."""
    hints = typing.get_type_hints(tool)
    return {name: hints[name] for name in inspect.signature(tool).parameters}


def schema(name: str, tool: Callable) -> str:
    """Return how the model is told of a tool: what a call looks like, and the docstring up to its colon.

    >>> schema("calculator", calculator)
    'calculator("...") for sums'
    """
    purpose = inspect.getdoc(tool).partition(":")[0]
    return f"{name}({', '.join(FORMS[kind] for kind in arguments_of(tool).values())}) {purpose.lower()}"


def call(tools: dict[str, Callable], name: str, arguments: tuple, seconds: float = SECONDS) -> str:
    """Return what a tool says to these arguments; "error: ..." if it can't be called so, fails or hangs."""
    if name not in tools:
        return f"error: there is no tool {name}; there are {', '.join(tools)}"
    wanted = arguments_of(tools[name])
    if len(arguments) != len(wanted):
        return f"error: {name} takes {len(wanted)} arguments, it was given {len(arguments)}"
    for value, (key, kind) in zip(arguments, wanted.items()):
        if type(value) is not kind:
            return f"error: {key} of {name} must be {kind.__name__}, not {type(value).__name__}"
    said = [f"error: {name} took more than {seconds:g} seconds"]
    thread = threading.Thread(target=lambda: said.append(outcome(name, tools[name], arguments)), daemon=True)
    thread.start()
    thread.join(seconds)
    return said[-1]


def outcome(name: str, tool: Callable, arguments: tuple) -> str:
    """Return what a tool says, or how it failed: a tool's own fault must not end the agent."""
    try:
        return str(tool(*arguments))
    except ToolError as error:
        return f"error: {error}"
    except Exception as error:
        return f"error: {name} failed, {type(error).__name__}: {str(error)[:100]}"


# ------------------------------------------------------------------------------------------- calculator

def calculator(expression: str) -> str:
    """For sums: numbers, + - * / and brackets.

    >>> calculator("(3 + 4) * 5"), calculator("7 / 2")
    ('35', '3.5')
    """
    if len(expression) > LONGEST:
        raise ToolError(f"more than {LONGEST} signs")
    try:
        value = evaluate(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ToolError(f"{expression!r} is no sum")
    return str(int(value) if value == int(value) else value)


def evaluate(node: ast.AST) -> int | float:
    """Return the value of a parsed sum. ToolError for anything but numbers, + - * / and brackets."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = -evaluate(node.operand)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div)):
        x, y = evaluate(node.left), evaluate(node.right)
        if isinstance(node.op, ast.Div) and y == 0:
            raise ToolError("division by zero")
        value = (x + y if isinstance(node.op, ast.Add) else x - y if isinstance(node.op, ast.Sub)
                 else x * y if isinstance(node.op, ast.Mult) else x / y)
    else:
        raise ToolError("numbers, + - * / and brackets are all there is")
    if not abs(value) <= LARGEST:  # so also for nan
        raise ToolError(f"a number beyond {LARGEST:,}")
    return value


@chain.command
def main(argv=None) -> dict:
    """Run one program."""
    config, started = chain.parse(Config, argv, __doc__), time.perf_counter()
    said = call({"python": python}, "python", (config.code,))
    print(schema("python", python), said, sep="\n")
    metrics = {"signs": len(said)}
    chain.report("tools.py", config, metrics, time.perf_counter() - started)
    return metrics


if __name__ == "__main__":
    main()
