"""agent.py: the loop, with a scripted model in the real one's place; its limits, its transcripts."""

import json
import re
import time

import pytest

import agent
import library
import world
from agent import holds, replay, run, script, search_in, system, write_down
from asking import message
from chain import UserError
from errands import NOTHING, TOOLS, list_tools
from retrieve import Index
from test_retrieve import by_letters
from tools import calculator

START = [message("system", "You can call tools."), message("user", "What is 12 + 30?")]


def broken(text: str) -> str:
    """For nothing: it fails."""
    raise RuntimeError("no power")


TOOLBOX = {"calculator": calculator, "broken": broken}


def said_by(found, role: str) -> list[str]:
    return [each["content"] for each in found.messages if each["role"] == role]


def test_an_answer_ends_the_run():
    found = run(script(["It is 42.", "never said"]), TOOLBOX, START)
    assert (found.ended, found.answer) == ("answer", "It is 42.") and len(found.messages) == 3
    assert len(START) == 2, "the caller's messages stay as they were"


def test_a_call_is_run_and_its_result_is_the_next_message():
    seen = []

    def say(messages):
        seen.append([each["role"] for each in messages])
        return 'call calculator("12 + 30")' if len(seen) == 1 else "It is 42."

    found = run(say, TOOLBOX, START)
    assert said_by(found, "tool") == ["42"] and found.answer == "It is 42."
    assert seen[1] == ["system", "user", "assistant", "tool"], "the model reads what the tool said"


@pytest.mark.parametrize("said, told", [
    ("call calculator(", "is no call"), ("call calculator", "is no call"),
    ('call nothing("x")', "no tool nothing"),
    ("call calculator(1)", "must be str"), ('call calculator("1", "2")', "takes 1 arguments"),
    ('call calculator("1/0")', "division by zero"), ('call broken("x")', "RuntimeError: no power"),
    ('call calculator(expression="1")', "is no call"), ('call a.b("x")', "is no call"),
    ('call calculator("1"); import os', "is no call")])
def test_what_goes_wrong_is_told_to_the_model(said, told):
    found = run(script([said, "I give up."]), TOOLBOX, START)
    assert found.answer == "I give up.", "the run goes on"
    (observation,) = said_by(found, "tool")
    assert observation.startswith("error: ") and told in observation, observation


def test_two_calls_in_one_message_are_none():
    """One message, one call: what stands behind it would be an answer of the model's own making."""
    said = 'call calculator("1 + 1")\nThe result is 3.'
    assert said_by(run(script([said, "I see."]), TOOLBOX, START), "tool")[0].startswith("error: ")


def test_the_steps_are_limited():
    found = run(script(['call calculator("1 + 1")'] * 9), TOOLBOX, START, steps=3)
    assert found.ended == "3 steps" and len(said_by(found, "assistant")) == 3
    assert "what is known: 2" in found.answer, "a run that is stopped tells what is known"


def test_the_time_is_limited():
    def say(messages):
        time.sleep(0.03)
        return 'call calculator("1 + 1")'

    found = run(say, TOOLBOX, START, steps=1000, seconds=0.1)
    assert found.ended == "0.1 seconds" and 1 < len(said_by(found, "assistant")) < 20


def test_a_message_without_an_end_ends_the_run():
    found = run(script(['call calculator("40 + 2")', None]), TOOLBOX, START)
    assert found.ended.startswith("no end") and "what is known: 42" in found.answer


def test_guards_refuse_before_the_call():
    called = []

    def tool(text: str) -> str:
        """For tests: it notes."""
        called.append(text)
        return "done"

    def guard(name, arguments, messages):
        return "not today" if arguments == ("a",) else ""

    found = run(script(['call tool("a")', 'call tool("b")', "End."]), {"tool": tool}, START, guards=[guard])
    assert called == ["b"] and said_by(found, "tool") == ["error: not today", "done"]


def test_the_system_message_is_that_of_training():
    index = Index(by_letters)
    index.update({"a.txt": "Amber Hollow\nIt is old. It is small."})
    tools = {"calculator": calculator, "search": search_in(index)}
    assert system(tools)["content"] == f"You can call {list_tools(['calculator', 'search'])}."
    assert system({"search": tools["search"]})["content"] == f"You can call {TOOLS['search']}."
    assert tools["search"]("Amber Hollow is old") == "Amber Hollow. It is old. It is small."
    assert tools["search"]("Amber zzz") == NOTHING, "what is far from the query is not shown"
    assert search_in(Index(by_letters))("x") == NOTHING


def test_replay_runs_the_tools_without_the_model(tmp_path):
    path = tmp_path / "runs.jsonl"
    for said in (['call calculator("12 + 30")', "42."], ["call nothing(", 'call calculator("1/0")', "No."],
                 ['call calculator("1 + 1")'] * 3):
        write_down(path, "a task", run(script(said), TOOLBOX, START, steps=3))
    assert replay(path, TOOLBOX) == {"runs": 3, "same": 3}
    assert replay(path, {"calculator": broken}) == {"runs": 3, "same": 0}, "the tools say something else now"
    assert json.loads(path.read_text().splitlines()[0])["answer"] == "42."


@pytest.mark.parametrize("line", [
    b"no json", b"[" * 99_999, b"[]", b"{}", b'{"messages": [1]}', b'{"messages": []}', b"\x80PK\x03\xff",
    b'{"messages": [{"role": "user", "content": 1}]}', b'{"messages": [{"role": "tool", "content": "42"}]}'])
def test_replay_names_a_bad_line(line, tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(UserError, match="line 1"):
        replay(path, TOOLBOX)


def test_the_tasks_are_right():
    documents = library.library("held-out", 1, 60)
    tasks = agent.make_tasks(documents, 1, 20)
    for task, sign in (("sums", "+"), ("products", "*")):
        for question, value in tasks[task]:
            x, y = map(int, re.findall(r"\d+", question))
            assert int(value) == (x + y if sign == "+" else x * y) and min(x, y) >= 100, question
    text = "\n".join(each.text for each in documents.values())
    for question, value in tasks["two_lookups"]:
        names = [each.name for each in documents.values() if each.name in question]
        numbers = [int(n) for n in re.findall(r"\d+", text)]
        assert len(names) >= 2 and any(int(value) - n in numbers for n in numbers), question
    assert all(world.is_held_out(each.name) for each in documents.values())


def test_an_answer_holds_a_value_as_whole_words():
    assert holds("It is 42.", "42") and holds("I don't know.", "I don't know.")
    assert not holds("It is 142.", "42")


@pytest.mark.parametrize("flags, told", [
    (["--steps", "0"], "--steps 0"), (["--questions", "-1"], "--questions -1"),
    (["--docs", "x"], "add --ask"), (["--seconds", "0"], "--seconds 0"),
    ([], "no such checkpoint"), (["--checkpoint", "nowhere.pt"], "nowhere.pt")])
def test_mistakes_end_in_one_line(flags, told, fails, tmp_path):
    assert told in fails(agent.main, ["--out", tmp_path, "--device", "cpu", *flags])


def test_a_base_model_can_not_act(train_small, fails, tmp_path):
    train_small()
    assert "no assistant" in fails(agent.main, ["--out", tmp_path / "out", "--device", "cpu"])
