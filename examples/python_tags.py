"""Writes lines of Python's standard library with IOB2 tags: what their names stand for.

    python examples/python_tags.py runs/data/python-tags.jsonl

A line of JSON is a line of code: {"words": its tokens, "tags": one per token}. A name is a MODULE,
a CLASS, a FUNCTION or a PARAMETER if its whole file says so: by an import, a definition or as one
of Python's own names. The line alone seldom does, so a reader has to know how such names are used.
"""

import argparse
import ast
import builtins
import io
import json
import pathlib
import random
import sysconfig
import token
import tokenize
from collections import defaultdict
from collections.abc import Iterator

LAYOUT = (token.NEWLINE, token.NL, token.INDENT, token.DEDENT, token.COMMENT, token.ENDMARKER)
MOST_WORDS, MOST_LETTERS = 40, 30  # of a line, and of a token; docstrings and tables are left out


def kinds_of(tree: ast.AST) -> dict[str, str]:
    """What the names of a file stand for; names that stand for several things are left out."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, value in vars(builtins).items():
        if callable(value):
            found[name].add("CLASS" if isinstance(value, type) else "FUNCTION")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.partition(".")[0]].add("MODULE")
        elif isinstance(node, ast.ClassDef):
            found[node.name].add("CLASS")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found[node.name].add("FUNCTION")
        elif isinstance(node, ast.arg):
            found[node.arg].add("PARAMETER")
    return {name: min(kinds) for name, kinds in found.items() if len(kinds) == 1}


def lines_of(source: str) -> Iterator[list[str]]:
    """The tokens of each line of code; a line ends where its statement does."""
    words: list[str] = []
    for found in tokenize.generate_tokens(io.StringIO(source).readline):
        if found.type not in LAYOUT:
            words.append(found.string)
        elif found.type == token.NEWLINE:
            yield words
            words = []


def tags_of(words: list[str], kinds: dict[str, str]) -> list[str]:
    """One tag per word. A module has all of a dotted name, a parameter the stars before it."""
    tags: list[str] = []
    imported = words[0] in ("import", "from")
    for i, word in enumerate(words):
        before = words[i - 1] if i else ""
        if imported and word == "import" and i:
            imported = False  # what follows is taken out of the module
            tags.append("O")
        elif imported and before in ("import", "from", ",") and word.isidentifier():
            tags.append("B-MODULE")
        elif imported and "." in (word, before) and "MODULE" in tags[-1]:
            tags.append("I-MODULE")
        elif word in kinds and before != ".":
            is_starred = kinds[word] == "PARAMETER" and before in ("*", "**") and (
                words[i - 2] in ("(", ","))
            tags[i - is_starred :] = [f"{sign}-{kinds[word]}" for sign in "BI"[: 1 + is_starred]]
        else:
            tags.append("O")
    return tags


def records(folder: pathlib.Path) -> list[dict[str, list[str]]]:
    """The lines of all modules in a folder that have a tag, each once."""
    found: dict[tuple[str, ...], list[str]] = {}
    for path in sorted(folder.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        kinds = kinds_of(ast.parse(source))
        for words in lines_of(source):
            if 3 < len(words) <= MOST_WORDS and max(map(len, words)) <= MOST_LETTERS:
                tags = tags_of(words, kinds)
                if set(tags) != {"O"}:
                    found.setdefault(tuple(words), tags)
    return [{"words": [*words], "tags": tags} for words, tags in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes tagged lines of Python's own source.")
    parser.add_argument("out", type=pathlib.Path, help="file of JSON lines to write")
    parser.add_argument("--count", type=int, default=8000, help="number of lines")
    args = parser.parse_args()
    found = records(pathlib.Path(sysconfig.get_paths()["stdlib"]))
    random.Random(0).shuffle(found)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(record) + "\n" for record in found[: args.count]),
                        encoding="utf-8")
    print(f"{min(args.count, len(found)):,} of {len(found):,} lines are in {args.out}")


if __name__ == "__main__":
    main()
