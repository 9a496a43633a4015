"""The scripts in examples/ write records that their recipes can read."""

import json
import pathlib
import random
import re
import runpy
import sysconfig

from lmjax.tasks.entities import entities, is_iob2
from lmjax.tasks.questions import Questions
from lmjax.tasks.tagging import Tagging

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = pathlib.Path(sysconfig.get_paths()["stdlib"]) / "json"


def test_tags_of_python_are_iob2_and_tell_what_names_stand_for(tmp_path):
    script = runpy.run_path(str(ROOT / "examples/python_tags.py"))
    (tmp_path / "a.py").write_text(
        "import os.path, sys\nfrom xml.dom import Node as node\nclass Thing(Exception): pass\n"
        "def do(first, *others, **named):\n    x = os.stat(first, sys)\n    return print(Thing)\n")
    wanted = {
        "import os . path , sys": "O B-MODULE I-MODULE I-MODULE O B-MODULE",
        "from xml . dom import Node as node": "O B-MODULE I-MODULE I-MODULE O O O O",
        "class Thing ( Exception ) : pass": "O B-CLASS O B-CLASS O O O",
        "def do ( first , * others , ** named ) :":
            "O B-FUNCTION O B-PARAMETER O B-PARAMETER I-PARAMETER O B-PARAMETER I-PARAMETER O O",
        "x = os . stat ( first , sys )": "O O B-MODULE O O O B-PARAMETER O B-MODULE O",
        "return print ( Thing )": "O B-FUNCTION O B-CLASS O"}
    assert {" ".join(r["words"]): " ".join(r["tags"])
            for r in script["records"](tmp_path)} == wanted
    found = script["records"](FOLDER)
    for record in found:
        assert Tagging().truth(record) and is_iob2(record["tags"]) and entities(record["tags"])
    assert len(found) > 100 and len({json.dumps(record) for record in found}) == len(found)


def test_questions_about_python_have_their_answers_in_the_source():
    script = runpy.run_path(str(ROOT / "examples/python_questions.py"))
    found = [*script["records"](FOLDER, random.Random(0))]
    answers = [Questions().truth(record) for record in found]  # refuses what is not in its place
    assert any(answers) and not all(answers) and len(found) > 20
    for record, its in zip(found, answers, strict=True):
        if record["question"].startswith("What does the class"):
            name = record["question"].split()[4]
            assert f"class {name}({its[0]}" in record["context"]
        elif its and record["question"].startswith("What is the default"):
            name = record["question"].split()[5]
            assert f"{name}={its[0]}" in record["context"].replace(f"{name} = ", f"{name}=")


def test_functions_of_python_have_their_own_and_others_summaries():
    script = runpy.run_path(str(ROOT / "examples/python_functions.py"))
    folder = FOLDER.parent / "logging"
    own = {(code, summary) for _, code, summary in script["functions"](folder)}
    by_kind = {kind: [*script["records"](kind, folder, random.Random(0))]
               for kind in ("swaps", "preferences", "partners", "summaries", "chats")}
    codes = {code for code, _ in own}
    of_words = {tuple(sorted(re.findall(r"\w+", code))) for code in codes}
    for record in by_kind["swaps"]:
        assert (record["code"] in codes) == (record["label"] == "own")
        assert tuple(sorted(re.findall(r"\w+", record["code"]))) in of_words
        assert "def f(" in record["code"]
    for record in by_kind["preferences"]:
        assert (record["prompt"], record["chosen"]) in own
        assert (record["prompt"], record["rejected"]) not in own
    assert {(record["second"], record["first"]) for record in by_kind["partners"]} == own
    assert {(record["code"], record["summary"]) for record in by_kind["summaries"]} == own
    for record in by_kind["chats"]:
        ask, answer, _, arguments = (message["content"] for message in record["messages"])
        code = ask.partition("\n")[2]
        assert (code, answer) in own
        assert arguments == "It takes none." or f"def f({arguments.split(', ')[0]}" in code
    assert len(own) > 10 and all('"""' not in code for code, _ in own)
    assert {record["label"] for record in by_kind["swaps"]} == {"own", "swapped"}


def test_definitions_of_nouns_have_their_kinds_and_no_examples(tmp_path):
    script = runpy.run_path(str(ROOT / "examples/wordnet_glosses.py"))
    (tmp_path / "data.noun").write_text(
        "  1 a line of the licence | which is no noun  \n"
        "00000001 03 n 01 thing 0 000 | above all kinds  \n"
        '00000002 06 n 01 chair 0 000 | what one sits on; "a chair, please"  \n'
        "00000003 18 n 02 sitter 0 seated 0 000 | who sits; waits  \n"
        "00000004 04 n 01 seat 0 000 | what one sits on  \n"
        "00000005 28 n 01 sunday 0 000 | when one sits  \n")
    assert list(script["records"](tmp_path / "data.noun")) == [
        {"definition": "what one sits on", "kind": "artifact"},
        {"definition": "who sits; waits", "kind": "person"},
        {"definition": "when one sits", "kind": "time"}]
