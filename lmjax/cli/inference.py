"""The commands that use a trained model: generate, score, explain, eval, import-hf, export-hf.

Each command has a function that adds its arguments and one that runs it. JAX and everything that
imports it are imported in the function that runs, so that `lmjax --help` answers at once.
"""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lmjax.cli.arguments import AnyPath, LocalPath, add_kv_cache, read_text
from lmjax.errors import UserError
from lmjax.runtime.files import check_new, check_writable

GENERATE_OPTIONS = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
                    "seed", "stop", "num_beams", "length_penalty",
                    "kv_cache")  # those of `LM.generate`


def _add_checkpoint(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=AnyPath, metavar="CHECKPOINT",
                        help="a run's directory or one of its checkpoints")


def add_generate(parser: ArgumentParser) -> None:
    """Adds the arguments of `lmjax generate`."""
    _add_checkpoint(parser)
    add = parser.add_argument
    add("--prompt", action="append", required=True, help="repeat it for several in one batch")
    add("--max-tokens", type=int, default=128, help="tokens to generate at most (default: 128)")
    add("--temperature", type=float, default=0.8,
        help="0 takes the most likely token each time (default: 0.8)")
    add("--top-k", type=int, default=0,
        help="sample from this many of the most likely tokens (default: 0, all of them)")
    add("--top-p", type=float, default=1.0,
        help="sample from the most likely tokens that have this probability together (default: 1)")
    add("--min-p", type=float, default=0.0,
        help="drop tokens less likely than this share of the most likely one (default: 0)")
    add("--repetition-penalty", type=float, default=1.0,
        help="above 1: tokens of the text so far become less likely (default: 1)")
    add("--stop", action="append", default=[], help="end before this string; repeat it for several")
    add("--num-beams", type=int, default=1, help="beams of a beam search (default: 1, sampling)")
    add("--length-penalty", type=float, default=1.0,
        help="divide a beam's log-likelihood by length^THIS (default: 1)")
    add_kv_cache(parser)
    add("--draft", default="", type=AnyPath, metavar="CHECKPOINT",
        help="a small model that proposes tokens; the distribution stays the same")
    add("--stream", action="store_true", help="print the text while it is generated")
    add("--seed", type=int, default=0, help="of the sampling (default: 0)")


def generate(arguments: Namespace, overrides: Sequence[str]) -> None:
    """Prints each prompt with its continuation."""
    from lmjax.decoding.answers import DecodingOptions
    from lmjax.decoding.inputs import check_texts
    from lmjax.lm import load
    from lmjax.training.pretrained import find

    prompts = check_texts(arguments.prompt, "--prompt")
    options = {name: getattr(arguments, name) for name in GENERATE_OPTIONS}
    if arguments.stream:
        if len(prompts) > 1:
            raise UserError("one --prompt", len(prompts), "leave --stream out", where="--stream")
        options["stream"] = lambda row, text: print(text, end="", flush=True)
    # Refuses wrong options before a model is loaded; any true value stands for the draft.
    DecodingOptions(**options, draft=cast(Any, arguments.draft or None))
    if arguments.draft:
        find(arguments.draft)
    lm = load(arguments.checkpoint)
    if arguments.draft:
        options["draft"] = load(arguments.draft)
    if arguments.stream:
        print(prompts[0], end="", flush=True)
        lm.generate(prompts, **options)
        print()
        return
    for prompt, answer in zip(prompts, lm.generate(prompts, **options), strict=True):
        print(prompt + answer)


def add_score(parser: ArgumentParser) -> None:
    """Adds the arguments of `lmjax score`."""
    _add_checkpoint(parser)
    parser.add_argument("file", nargs="+", type=LocalPath, metavar="FILE", help="a UTF-8 text file")


def score(arguments: Namespace, overrides: Sequence[str]) -> None:
    """Prints bits per byte, perplexity and the number of tokens of each file."""
    from lmjax.lm import load

    texts = [read_text(path) for path in arguments.file]  # before the model, which takes longer
    lm = load(arguments.checkpoint)
    for path, text in zip(arguments.file, texts, strict=True):
        found = lm.score([text])[0]
        unit = "bits/byte" + " of decoded text" * found.of_decoded_text
        print(f"{path}: {found.bits_per_byte:.4f} {unit}, perplexity {found.perplexity:.2f}, "
              f"{found.tokens} tokens")


def add_explain(parser: ArgumentParser) -> None:
    """Adds the arguments of `lmjax explain`."""
    _add_checkpoint(parser)
    add = parser.add_argument
    add("--text", required=True, help="what the model reads; [MASK] is a token that an encoder "
        "predicts")
    add("--answer", default="", help="what is explained: how a decoder's text goes on (default: "
        "the text itself), an encoder-decoder's answer, or the tokens of masks or a "
        "classifier's class (default: the likeliest)")
    add("--method", default="integrated_gradients",
        choices=("likelihood", "integrated_gradients", "gradient_x_input"),
        help="likelihood: of each token of a decoder's text, with its rank; else: how much each "
        "token adds to the answer's log-likelihood (default: integrated_gradients)")
    add("--picture", default="", type=LocalPath, metavar="FILE",
        help="draw the tokens coloured by their values (.png, .svg)")


def explain(arguments: Namespace, overrides: Sequence[str]) -> None:
    """Prints a value for each token of a text."""
    if arguments.picture:
        check_writable(arguments.picture, "--picture", file=True)
    likelihood = arguments.method == "likelihood"
    if likelihood and arguments.answer:
        raise UserError("no answer with --method likelihood, which is of the text",
                        repr(arguments.answer), "leave it out", where="--answer")
    from lmjax.lm import load

    lm = load(arguments.checkpoint)
    if likelihood:
        [score] = lm.score([arguments.text], tokens=True, picture=arguments.picture)
        print("log-likelihood      rank  token")
        for token in score.by_token:
            print(f"{token.log_likelihood:14.3f}  {token.rank:8,}  {token.text!r}")
        return
    found = lm.explain(arguments.text, arguments.answer, method=arguments.method,
                       picture=arguments.picture)
    print("  nats  token")
    for value, label in zip(found.values, found.tokens, strict=True):
        print(f"{value:6.2f}  {label!r}")
    print(f"log-likelihood of {''.join(found.target)!r}: {found.log_likelihood:.3f} nats")
    if arguments.method == "integrated_gradients":
        print(f"with the mean embedding in place of every token: {found.baseline:.3f}; the values "
              f"add up to the difference, but for {found.gap:.3f}")


def add_eval(parser: ArgumentParser) -> None:
    """Adds the arguments of `lmjax eval`."""
    _add_checkpoint(parser)
    add = parser.add_argument
    add("--tasks", required=True, metavar="NAME,...", help="tasks of lm-eval or of --task-dir")
    add("--task-dir", default="", type=LocalPath, metavar="DIR",
        help="a directory of your own task files")
    add("--num-fewshot", type=int, default=None, help="worked examples before each question")
    add("--limit", type=int, default=None, help="examples per task")
    add("--out", default="", type=LocalPath, metavar="FILE", help="write the results as JSON, too")


def evaluate(arguments: Namespace, overrides: Sequence[str]) -> None:
    """Prints the results of lm-eval's tasks as JSON."""
    if arguments.out:
        check_writable(arguments.out, "--out", file=True)
    from lmjax.config import at_least
    from lmjax.lm import load
    from lmjax.lm_eval import check_tasks, evaluate_tasks

    tasks = [name.strip() for name in arguments.tasks.split(",")]
    at_least(0, **{"--num-fewshot": arguments.num_fewshot or 0})
    at_least(1, **{"--limit": 1 if arguments.limit is None else arguments.limit})
    check_tasks(tasks, arguments.task_dir)  # before the model, which takes longer
    results = evaluate_tasks(load(arguments.checkpoint), tasks,
                             task_dir=arguments.task_dir, num_fewshot=arguments.num_fewshot,
                             limit=arguments.limit)
    text = json.dumps(results, indent=2)
    print(text)
    if arguments.out:
        out = Path(arguments.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")


def add_import_hf(parser: ArgumentParser) -> None:
    """Adds the arguments of `lmjax import-hf`."""
    parser.add_argument("checkpoint", type=AnyPath, metavar="DIR",
                        help="a directory with config.json and safetensors")
    parser.add_argument("--out", required=True, type=LocalPath, metavar="DIR",
                        help="where the checkpoint goes")


def import_hf(arguments: Namespace, overrides: Sequence[str]) -> None:
    """Writes a checkpoint from a Hugging Face directory."""
    check_new(Path(arguments.out))
    from lmjax.lm import load

    load(arguments.checkpoint).save(arguments.out)


def add_export_hf(parser: ArgumentParser) -> None:
    """Adds the arguments of `lmjax export-hf`."""
    _add_checkpoint(parser)
    add = parser.add_argument
    add("--out", required=True, type=LocalPath, metavar="DIR",
        help="where the Hugging Face directory goes")
    add("--model-type", default="",
        help="the family to write the model as (default: the first that fits)")
    add("--dtype", default="",
        help="float32, bfloat16 or float16 (default: the import's dtype, else float32)")
    add("--max-shard-gb", type=float, default=5.0,
        help="GB per weights file at most (default: 5)")
    add("--peft-base", default="", metavar="NAME",
        help="write the adapters alone, in the format of PEFT, for the base of this name or "
        "directory (default: adapters are merged into the weights)")
    add("--packed", action="store_true",
        help="write packed weights as they are, in the format of compressed-tensors")


def export_hf(arguments: Namespace, overrides: Sequence[str]) -> None:
    """Writes a Hugging Face directory from a checkpoint."""
    check_new(Path(arguments.out))
    from lmjax.huggingface import ExportOptions
    from lmjax.lm import load

    options = {"model_type": arguments.model_type, "dtype": arguments.dtype,
               "max_shard_bytes": int(arguments.max_shard_gb * 1e9)}
    ExportOptions(**options)  # refuses a wrong option before the model is loaded
    lm = load(arguments.checkpoint)
    if arguments.packed:
        from lmjax.compression.compressed_tensors import export_packed

        export_packed(lm, Path(arguments.out), **options)
    else:
        lm.export(arguments.out, peft_base=arguments.peft_base, **options)
