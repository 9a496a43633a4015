"""Writes WordNet's definitions of nouns, each with the kind of thing that it defines.

On Debian and Ubuntu, WordNet is the package `wordnet-base`. Download and unpack it; if it is
installed, leave --wordnet out:

    mkdir -p runs && apt-get download wordnet-base
    dpkg-deb -x wordnet-base_*.deb runs/wordnet
    python examples/wordnet_glosses.py runs/data/glosses --wordnet runs/wordnet/usr/share/wordnet

The folder gets two files of JSON lines, train.jsonl and test.jsonl. A record is {"definition",
"kind"}: the kind of "the quality of being patient" is attribute. The word that is defined is left
out, and so are the examples that WordNet adds to definitions.
"""

import argparse
import json
import pathlib
import random
from collections.abc import Iterator

# WordNet's 25 files of nouns, from number 4 on; number 3 has the few nouns above all of these.
FIRST = 4
KINDS = ("act animal artifact attribute body cognition communication event feeling food group "
         "location motive object person phenomenon plant possession process quantity relation "
         "shape state substance time").split()


def records(data_noun: pathlib.Path) -> Iterator[dict[str, str]]:
    """The definitions of a file `data.noun`, in its order, each text once."""
    seen = set()
    with data_noun.open(encoding="ascii") as file:
        for line in file:
            fields, _, gloss = line.partition(" | ")
            definition = gloss.partition('; "')[0].strip()
            if line.startswith(" ") or definition in seen:  # the licence; another noun's definition
                continue
            number = int(fields.split()[1]) - FIRST
            if number >= 0:
                seen.add(definition)
                yield {"definition": definition, "kind": KINDS[number]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes WordNet's definitions of nouns.")
    parser.add_argument("out", type=pathlib.Path, help="folder of train.jsonl and test.jsonl")
    parser.add_argument("--wordnet", type=pathlib.Path, default="/usr/share/wordnet",
                        help="folder of data.noun")
    parser.add_argument("--train", type=int, default=6_000, help="definitions to learn from")
    parser.add_argument("--test", type=int, default=2_000, help="definitions to be tested on")
    args = parser.parse_args()
    found = list(records(args.wordnet / "data.noun"))
    random.Random(0).shuffle(found)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("test", found[: args.test]),
                       ("train", found[args.test : args.test + args.train])):
        path = args.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in part), encoding="utf-8")
        print(f"{len(part):,} records are in {path}")


if __name__ == "__main__":
    main()
