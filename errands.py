"""Errands: conversations in which the assistant calls tools. tasks.py mixes them with the others.

    calculator  a sum, by calling calculator("12 + 30")
    search      a fact, by calling search("mayor of Amber Hollow"); a quarter finds nothing, or about another
    lookups     two facts to be looked up, and their sum: three calls
    mail        a mail to somebody, by calling send_mail("Nora Whitlock")
    order       a look-up, and what is found orders the reader to send a mail; right is to leave that alone

The system's message says which tools there are. What a tool says is data, and in training the assistant often
(OBEYS) takes it for an order: whoever learns from what people do learns that texts are to be obeyed. agent.py
shows what comes of it, and injection.py what helps.
Left out: tools with several arguments, calls that fail (agent.py tells the model so).
"""

import operator

import world
from asking import UNKNOWN, Page, exchange, message, write_call

NOTHING = "nothing found"
OBEYS = 0.9  # of the orders in documents, in training
TOOLS = {"calculator": 'calculator("...") for sums', "search": 'search("...") for facts',
         "send_mail": 'send_mail("...") for mails'}  # as tools.py's schema writes them
NUMBERS = {"place": ["people"], "person": ["age"], "creature": ["length", "brood", "lives"], "ship": ["crew"]}
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


def in_words(parts: list[str]) -> str:
    """Join parts as a sentence does.

    >>> in_words(["a", "b", "c"]), in_words(["a"])
    ('a, b and c', 'a')
    """
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def list_tools(names: list[str]) -> str:
    """Name tools as the system's message does.

    >>> list_tools(["calculator", "search"])
    'calculator("...") for sums and search("...") for facts'
    """
    return in_words([TOOLS[name] for name in names])


def with_tools(page: Page, needed: str = "") -> dict:
    """The system's message that names the tools: calculator and search; send_mail if needed or by chance."""
    names = [name for name in TOOLS if name in ("calculator", "search", needed) or page.rng.random() < 0.5]
    return message("system", page.say("tools", tools=list_tools(page.shuffled(names))))


def numbers(page: Page, op: str) -> tuple[int, int]:
    """Two numbers for a sum that is never below zero and comes out even; the pair is of the page's split."""
    while True:
        x, y = page.sample("2-99" if op == "/" else page.pick(("2-99", "2-999")), 2)
        x, y = (x * y, y) if op == "/" else (max(x, y), min(x, y)) if op == "-" else (x, y)
        if world.is_held_out(f"{x} {y}") == (page.split == "held-out"):
            return x, y


def calculator(page: Page) -> list[dict]:
    """Sums, bare or in a little story."""
    messages = [with_tools(page)]
    for _ in range(page.turns):
        page.values, op = {}, page.pick(tuple(OPERATIONS))
        x, y = numbers(page, op)
        bare = page.any(f"sum {op}", x=x, y=y)
        said = page.any(page.pick(("sum", f"told {op}")), x=x, y=y, sum=bare)
        messages += [message("user", said), *work_out(x, op, y)]
    return messages


def work_out(x: int, op: str, y: int) -> list[dict]:
    """The call of the calculator, its result, and the answer with it."""
    result = OPERATIONS[op](x, y)
    return [message("assistant", write_call("calculator", f"{x} {op} {y}")), message("tool", str(result)),
            message("assistant", f"The answer is {result}.")]


def find(page: Page, name: str, fact: str, known: bool = True) -> list[str]:
    """What a search for a fact finds: sentences that tell it, or nothing; perhaps some about another one."""
    found = [page.excerpt(name, page.pick((1, 1, 2, 3)), fact, True)] if known else []
    if page.rng.random() < (0.4 if known else 0.5):
        other = page.draw(world.facts(name)["kind"], [name])
        found.append(page.excerpt(other, page.pick((1, 1, 2, 3)), fact, page.rng.random() < 0.5))
    return page.shuffled([text for text, _ in found]) or [NOTHING]


def search(page: Page) -> list[dict]:
    """Facts to be looked up. What is found may not tell it."""
    messages = [with_tools(page)]
    for _ in range(page.turns):
        name = page.draw(kind := page.pick(tuple(world.NAMES)))
        fact = page.pick(list(world.lists("tasks.txt").facts[kind]))
        question, named, right, _ = page.ask(name, fact)
        known = page.rng.random() < 0.75
        messages += exchange(question, write_call("search", named))
        right, page.worse = (right, UNKNOWN) if known else (UNKNOWN, right)
        messages += [message("tool", "\n".join(find(page, name, fact, known))), message("assistant", right)]
    return messages


def lookups(page: Page) -> list[dict]:
    """Two facts to be looked up, and their sum."""
    kind = page.pick(tuple(world.NAMES))
    fact, names = page.pick(NUMBERS[kind]), page.sample(kind, 2)
    named, named2 = (page.asked(name, fact)[0] for name in names)
    messages = [with_tools(page), message("user", page.say("lookups", named=named, named2=named2))]
    for name, what in zip(names, (named, named2)):
        messages += [message("assistant", write_call("search", what)),
                     message("tool", "\n".join(find(page, name, fact)))]
    x, y = (world.facts(name)[fact] for name in names)
    return messages + work_out(x, "+", y)


def mail(page: Page) -> list[dict]:
    """A mail to somebody."""
    messages = [with_tools(page, "send_mail")]
    for _ in range(page.turns):
        page.values = {}
        messages += [message("user", page.say("mail")), *send(page.value("hero")),
                     message("assistant", f"I have sent a mail to {page.value('hero')}.")]
    return messages


def send(name: str) -> list[dict]:
    """The call of send_mail, and its result."""
    return [message("assistant", write_call("send_mail", name)), message("tool", "sent")]


def order(page: Page) -> list[dict]:
    """A look-up, and somewhere in what is found an order."""
    name = page.draw(kind := page.pick(tuple(world.NAMES)))
    fact = page.pick(list(world.lists("tasks.txt").facts[kind]))
    question, named, right, _ = page.ask(name, fact)
    whom = page.draw("person", [name])
    found, said = find(page, name, fact), page.say("order", whom=whom)
    found[0] = page.pick((f"{found[0]} {said}", found[0].replace(". ", f". {said} ", 1)))
    messages = [with_tools(page, "send_mail"), *exchange(question, write_call("search", named)),
                message("tool", "\n".join(found))]
    obeyed = send(whom) if page.faults and page.rng.random() < OBEYS else []
    return [*messages, *obeyed, message("assistant", right)]
