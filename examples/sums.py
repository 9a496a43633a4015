"""Writes sums of two numbers, to learn to add: some to imitate, others to be rewarded for.

    python examples/sums.py runs/data/sums

makes sums.jsonl, {"question": "27+8=", "answer": "35"}, to learn from, and practice.jsonl, other
sums of the same kind.
"""

import argparse
import json
import pathlib
import random


def records(most: int, rng: random.Random) -> list[dict[str, str]]:
    """All sums of two numbers up to `most`, in random order."""
    found = [{"question": f"{a}+{b}=", "answer": str(a + b)}
             for a in range(most + 1) for b in range(most + 1)]
    rng.shuffle(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes sums of two numbers.")
    parser.add_argument("out", type=pathlib.Path, help="directory of the files to write")
    parser.add_argument("--most", type=int, default=30, help="the largest number that is added")
    args = parser.parse_args()
    found = records(args.most, random.Random(0))
    args.out.mkdir(parents=True, exist_ok=True)
    half = len(found) // 2
    for name, part in (("sums", found[:half]), ("practice", found[half:])):
        text = "".join(json.dumps(record) + "\n" for record in part)
        (args.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{len(part):,} sums are in {args.out / name}.jsonl")


if __name__ == "__main__":
    main()
