"""Writes questions about functions and classes of Python's standard library.

    python examples/python_questions.py runs/data/python-questions.jsonl

A line of JSON is {"question", "context", "answers": {"text", "answer_start"}}, as SQuAD has them.
The context is the source of a function or a class, in which the answer stands. A parameter without
a default gives a question without an answer.
"""

import argparse
import ast
import itertools
import json
import pathlib
import random
import sysconfig
from collections.abc import Iterator
from typing import Any

Definition = ast.ClassDef | ast.FunctionDef
SHORTEST, LONGEST = 80, 6000  # characters of a context
MOST = 2  # questions with an answer per definition
OPEN = 0.4  # share of the definitions that get a question without an answer


def questions_of(node: Definition) -> Iterator[tuple[str, ast.expr | None]]:
    """Questions about a definition, each with the expression that answers it."""
    if isinstance(node, ast.ClassDef):
        if node.bases:
            yield f"What does the class {node.name} derive from?", node.bases[0]
        return
    its = node.args
    named = [*its.posonlyargs, *its.args][::-1]  # the defaults are those of the last ones
    pairs = [*itertools.zip_longest(named, its.defaults[::-1]),
             *zip(its.kwonlyargs, its.kw_defaults, strict=True)]
    for parameter, default in pairs:
        if parameter.arg not in ("self", "cls"):
            yield f"What is the default of {parameter.arg} in {node.name}?", default
    for inner in ast.walk(node):
        if isinstance(inner, ast.Raise) and isinstance(inner.exc, ast.Call):
            yield f"What does {node.name} raise?", inner.exc.func
            return


def records(folder: pathlib.Path, rng: random.Random) -> Iterator[dict[str, Any]]:
    """A few questions about each definition of all modules in a folder."""
    for path in sorted(folder.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if not source.isascii():  # ast counts bytes
            continue
        lines = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]

        def span(node: Definition | ast.expr, lines: list[int] = lines) -> tuple[int, int]:
            return (lines[node.lineno - 1] + node.col_offset,
                    lines[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0))

        for node in ast.walk(ast.parse(source)):
            found = [*questions_of(node)] if isinstance(node, Definition) else []
            begin, end = span(node) if found else (0, 0)
            if not SHORTEST <= end - begin <= LONGEST:
                continue
            open_ones = [question for question, answer in found if answer is None]
            asked = [(question, [span(answer)]) for question, answer in found if answer is not None]
            chosen = rng.sample(asked, min(len(asked), MOST))
            if open_ones and rng.random() < OPEN:
                chosen.append((rng.choice(open_ones), []))
            for question, spans in chosen:
                yield {"question": question, "context": source[begin:end], "answers": {
                    "text": [source[first:last] for first, last in spans],
                    "answer_start": [first - begin for first, _ in spans]}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes questions about Python's own source.")
    parser.add_argument("out", type=pathlib.Path, help="file of JSON lines to write")
    parser.add_argument("--count", type=int, default=8000, help="number of questions")
    args = parser.parse_args()
    rng = random.Random(0)
    found = [*records(pathlib.Path(sysconfig.get_paths()["stdlib"]), rng)]
    rng.shuffle(found)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(record) + "\n" for record in found[: args.count]),
                        encoding="utf-8")
    print(f"{min(args.count, len(found)):,} of {len(found):,} questions are in {args.out}")


if __name__ == "__main__":
    main()
