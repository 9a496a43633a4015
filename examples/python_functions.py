"""Writes functions of Python's standard library with what their docstrings say of them.

    python examples/python_functions.py swaps runs/data/python-swaps.jsonl
    python examples/python_functions.py preferences runs/data/python-preferences.jsonl
    python examples/python_functions.py partners runs/data/python-partners.jsonl
    python examples/python_functions.py summaries runs/data/python-summaries.jsonl
    python examples/python_functions.py chats runs/data/python-chats.jsonl

Each line of JSON is made of a function, without its docstring, and of the docstring's first line:

    swaps        {"code", "label"}: the function as it is ("own"), or after two of its words have
                 changed places ("swapped")
    preferences  {"prompt", "chosen", "rejected"}: the function, its summary, and another's
    partners     {"first", "second"}: a summary and its function
    summaries    {"code", "summary"}
    chats        {"messages"}: a user asks what the function does, and then for its arguments

The name of a function is replaced by `f`, since it would tell too much.
"""

import argparse
import ast
import json
import pathlib
import random
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator

LEAST, MOST_CODE, MOST_SUMMARY = 15, 600, 120  # characters


def functions(folder: pathlib.Path) -> Iterator[tuple[str, str, str]]:
    """(module, code, summary) of each function of all modules in a folder, each code once."""
    seen = set()
    for path in sorted(folder.rglob("*.py")):
        if {"site-packages", "test", "tests", "lib2to3"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # some files are broken on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                summary, node.name, node.body = text.split("\n")[0].strip(), "f", node.body[1:]
                if node.body and LEAST <= len(summary) <= MOST_SUMMARY:
                    code = ast.unparse(node)
                    if code not in seen and LEAST <= len(code) <= MOST_CODE:
                        seen.add(code)
                        yield path.stem, code, summary


def conversation(code: str, summary: str) -> list[dict[str, str]]:
    """Two questions about a function with their answers."""
    arguments = ast.parse(code).body[0].args
    names = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    said = [("user", f"What does this function do?\n{code}"), ("assistant", summary),
            ("user", "Which arguments does it take?"),
            ("assistant", ", ".join(names) or "It takes none.")]
    return [{"role": role, "content": content} for role, content in said]


def swapped(code: str, rng: random.Random) -> str:
    """The code after two different words have changed places; "" if it has no two.

    A word is a name or a keyword after `def f`.
    """
    words = [*re.compile(r"\b[^\W\d]\w*").finditer(code, code.index("def f(") + len("def f("))]
    if len({word[0] for word in words}) < 2:
        return ""
    one = rng.choice(words)
    first, second = sorted((one, rng.choice([word for word in words if word[0] != one[0]])),
                           key=lambda word: word.start())
    return (code[: first.start()] + second[0] + code[first.end() : second.start()] + first[0]
            + code[second.end() :])


def records(kind: str, folder: pathlib.Path, rng: random.Random) -> Iterator[dict[str, object]]:
    """The records of a kind; a wrong summary is drawn from the function's own module."""
    by_module = defaultdict(list)
    for module, code, summary in functions(folder):
        by_module[module].append((code, summary))
    for found in by_module.values():
        summaries = sorted({summary for _, summary in found})
        for code, summary in found:
            others = [other for other in summaries if other != summary]
            if kind == "partners":
                yield {"first": summary, "second": code}
            elif kind == "summaries":
                yield {"code": code, "summary": summary}
            elif kind == "chats":
                yield {"messages": conversation(code, summary)}
            elif kind == "swaps":
                if other := swapped(code, rng):
                    is_own = rng.random() < 0.5
                    yield {"code": code if is_own else other,
                           "label": "own" if is_own else "swapped"}
            elif others:
                yield {"prompt": code, "chosen": summary, "rejected": rng.choice(others)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes functions of Python's own source.")
    parser.add_argument("kind", choices=("swaps", "preferences", "partners", "summaries",
                                         "chats"))
    parser.add_argument("out", type=pathlib.Path, help="file of JSON lines to write")
    args = parser.parse_args()
    rng = random.Random(0)
    found = list(records(args.kind, pathlib.Path(sysconfig.get_paths()["stdlib"]), rng))
    rng.shuffle(found)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(record) + "\n" for record in found), encoding="utf-8")
    print(f"{len(found):,} records are in {args.out}")


if __name__ == "__main__":
    main()
