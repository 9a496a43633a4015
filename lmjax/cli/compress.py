"""`lmjax compress`: a packed or a pruned model, or a picture of what each format costs."""

import importlib.util
import json
import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from lmjax.cli.arguments import AnyPath, LocalPath, read_text
from lmjax.errors import UserError
from lmjax.runtime.files import check_new, check_writable

MEASURED = 0.25  # share of each text file, at its end, that --ladder measures quality on


def add_compress(parser: ArgumentParser) -> None:
    """Adds the arguments of `lmjax compress`."""
    add = parser.add_argument
    add("checkpoint", type=AnyPath, metavar="CHECKPOINT",
        help="a run's directory, one of its checkpoints, or a Hugging Face directory")
    add("--out", default="", type=LocalPath, metavar="DIR", help="where the new model goes")
    add("--weights", choices=("int8", "int8_dynamic", "int4"),
        help="int8_dynamic also rounds activations to 8 bits, for hardware that multiplies "
        "integers (default: int8)")
    add("--group", type=int,
        help="inputs that share a scale in int4 (default: 128)")
    add("--texts", action="extend", nargs="+", default=[], type=LocalPath, metavar="FILE",
        help="texts like those that the model reads: int4 is rounded so that the outputs on these "
        "change least (GPTQ), and --prune removes what does least on them")
    add("--prune", default="", metavar="PARTS",
        help="remove what matters least instead: layers=2,heads=0.25,mlp=0.25 (the "
        "number of layers; shares of the key heads, with their query heads, and of the channels of "
        "MLPs), weights=0.5 (zeros among the inputs of each output) or weights=2:4")
    add("--ladder", default="", type=LocalPath, metavar="PICTURE",
        help="measure float32, bfloat16, int8 and int4 instead, on the last quarter of each "
        "text, and draw a picture (.png, .svg)")


def compress(arguments: Namespace, overrides: Sequence[str]) -> None:
    """Packs the weights of a model, prunes it, or measures what packing costs and gains."""
    if bool(arguments.out) == bool(arguments.ladder):
        raise UserError("--out DIR or --ladder PICTURE", "both" if arguments.out else "neither",
                        "give one of them", where="lmjax compress")
    if arguments.prune:
        _check_prune(arguments)
    if arguments.ladder:
        check_writable(arguments.ladder, "--ladder", file=True)
        if Path(arguments.ladder).suffix not in (".png", ".svg"):
            raise UserError("a picture, .png or .svg", arguments.ladder, "name one of these",
                            where="--ladder")
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError("the package matplotlib, which draws the picture", "none",
                            "pip install matplotlib", where="--ladder")
        if not arguments.texts:
            raise UserError("texts to measure quality on", "none", "add --texts FILE ...",
                            where="--ladder")
    else:
        check_new(Path(arguments.out))
    from lmjax.nn.packed import Quantization

    group = 128 if arguments.group is None else arguments.group
    quantization = Quantization(arguments.weights or "int8", group)
    texts = [read_text(path) for path in arguments.texts]
    if arguments.prune:
        return _prune(arguments, texts)
    from lmjax.compression.ladder import draw, ladder, table
    from lmjax.compression.quantize import quantize
    from lmjax.lm import load
    from lmjax.tree import num_bytes

    lm = load(arguments.checkpoint)
    if arguments.ladder:
        cuts = [round(len(text) * (1 - MEASURED)) for text in texts]
        pairs = [*zip(texts, cuts, strict=True)]
        rungs = ladder(lm, [text[cut:] for text, cut in pairs],
                       calibration=[text[:cut] for text, cut in pairs], group=group)
        print("\n".join(table(rungs)))
        draw(rungs, arguments.ladder)
        print(arguments.ladder)
        return
    packed = quantize(lm, quantization, texts=texts)
    packed.save(arguments.out)
    before, after = num_bytes(lm.params), num_bytes(packed.params)
    print(f"{arguments.out}: {after / 1e6:,.1f} MB of parameters, {before / after:.1f} times "
          f"fewer than the {before / 1e6:,.1f} MB of float32")


def _check_prune(arguments: Namespace) -> None:
    names = ("weights", "group", "ladder")
    if given := [name for name in names if getattr(arguments, name) not in (None, "")]:
        raise UserError("--prune alone", f"--{given[0]} beside it", "prune first, then compress "
                        "what came out", where="lmjax compress")


def _prune(arguments: Namespace, texts: Sequence[str]) -> None:
    """Writes a pruned model, and says how a run goes on with it."""
    from lmjax.compression.prune import parse_pruning, prune

    pruning = parse_pruning(arguments.prune)
    from lmjax.config import plain
    from lmjax.lm import load
    from lmjax.tree import num_bytes, num_elements

    lm = load(arguments.checkpoint)
    small = prune(lm, pruning, texts=texts)
    small.save(arguments.out)
    sizes = [f"{num_elements(p) / 1e6:,.2f}M parameters in {num_bytes(p) / 1e6:,.1f} MB"
             for p in (small.params, lm.params)]
    print(f"{arguments.out}: {sizes[0]}, of {sizes[1]}")
    before, after = (plain(each.model.config) for each in (lm, small))
    keys = [f"model.{key}={json.dumps(after[key])}" for key in after if after[key] != before[key]]
    keys += [f"train.init_from={arguments.out}", f"data.tokenizer.path={arguments.out}"]
    keys += ["train.keep_zeros=true"] if pruning.weights else []
    print("train it on with: " + " ".join(shlex.quote(f"--config.{key}") for key in keys))
