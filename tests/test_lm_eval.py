"""lm-eval through lmjax gives the figures of lm-eval's own backend, on local tasks."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax
from lmjax import huggingface
from lmjax.cli.main import main
from lmjax.data.config import DataConfig
from lmjax.data.reading import make_reader
from lmjax.data.tokenizers import TokenizerConfig, train_tokenizer
from lmjax.models.decoder import DecoderConfig
from lmjax.models.model import build_model

TEXTS = ["the cat sat on the mat", "a dog ran to the red house", "one two three four five",
         "stop here: a cat"]
TASKS = {
    "pick": """
task: pick
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/pick.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""", "read": """
task: read
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/read.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""", "write": """
task: write
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/pick.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["t"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with a model (hf) and tasks on local data."""
    made = tmp_path_factory.mktemp("eval")
    rng = np.random.default_rng(0)
    words = " ".join(TEXTS).split()
    phrase = lambda n: " ".join(rng.choice(words, n))  # noqa: E731
    with open(made / "pick.jsonl", "w") as file:
        for _ in range(24):
            choices = [f" {phrase(rng.integers(1, 6))}" for _ in range(3)]
            pick = {"question": phrase(5), "choices": choices, "answer": int(rng.integers(3))}
            file.write(json.dumps(pick) + "\n")
    with open(made / "read.jsonl", "w") as file:
        file.writelines(json.dumps({"text": phrase(n)}) + "\n" for n in (3, 30, 90, 1))
    for name, text in TASKS.items():
        (made / f"{name}.yaml").write_text(text.replace("FOLDER", str(made)))
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=300), TEXTS * 20)
    config = DecoderConfig(num_layers=2, embed_dim=32, num_heads=2, mlp_dim=48, vocab_size=300,
                           max_positions=64, init_std=0.3)
    model = build_model(config, vocab_size=0, platform="cpu", dtype=jnp.float32)
    huggingface.write_directory(made / "hf", model, jax.jit(model.init)(jax.random.key(0)),
                                make_reader(tokenizer, "decoder", DataConfig(), {}),
                                log=lambda line: None)
    return made


@pytest.mark.long
def test_likelihoods_do_not_depend_on_the_other_requests(folder):
    lm = lmjax.load(folder / "hf")
    rng = np.random.default_rng(1)
    rows = [(rng.integers(4, 300, n).tolist(), int(rng.integers(1, n)))
            for n in rng.integers(2, 60, 12)]
    together = lm.continuations(rows)
    assert [lm.continuations([row])[0] for row in rows] == together
    assert lm.continuations(rows[::-1])[::-1] == together
    for (ids, n), (value, greedy) in list(zip(rows, together, strict=True))[:3]:
        log_p = np.asarray(jax.nn.log_softmax(lm.logits([ids[:-1]])[0]))[-n:]
        assert value == pytest.approx(log_p[np.arange(n), ids[-n:]].sum(), rel=1e-5)
        assert greedy == (log_p.argmax(1) == ids[-n:]).all()


@pytest.mark.filterwarnings("ignore")
def test_rolling_likelihoods_never_score_bos(folder):
    """The sum over a text is that of `lm.score`, also if the tokenizer begins texts with BOS."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lmjax[eval]")
    from lm_eval.api.instance import Instance

    from lmjax.lm_eval import EvalModel

    lm = lmjax.load(folder / "hf")
    texts = [*TEXTS, "the", "a dog ran to the red house " * 2]
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    expected = [score.log_likelihood for score in lm.score(texts)]
    for prefix in ((), (lm.tokenizer.bos_id,)):
        lm.tokenizer.prefix = prefix
        assert EvalModel(lm).loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lm_eval_gives_the_same_numbers_as_its_own_backend(folder, capsys, monkeypatch):
    for name in ("lm_eval", "torch", "transformers", "accelerate"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install lmjax[eval,oracle] accelerate")
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    assert main(["eval", str(folder / "hf"), "--tasks", "pick,read,write",
                 "--task-dir", str(folder), "--out", str(folder / "out.json")]) == 0
    ours = json.loads((folder / "out.json").read_text())
    args = f"pretrained={folder / 'hf'},dtype=float32,device=cpu,max_length=64"
    # Rolling likelihoods of the other backend score BOS after BOS, unless it is told not to add it.
    theirs = {task: lm_eval.simple_evaluate(
        model="hf", model_args=args + ",add_bos_token=False" * (task == "read"), tasks=[task],
        task_manager=TaskManager(include_path=str(folder)), bootstrap_iters=0)["results"][task]
        for task in ("pick", "read", "write")}
    metrics = (("pick", "acc,none"), ("pick", "acc_norm,none"), ("read", "word_perplexity,none"),
               ("read", "bits_per_byte,none"), ("write", "exact_match,none"))
    for task, metric in metrics:
        expected = theirs[task][metric]
        assert ours[task][metric] == pytest.approx(expected, rel=1e-4), (task, metric)
    assert 0 < ours["pick"]["acc,none"] < 1 and ours["read"]["bits_per_byte,none"] > 1
    capsys.readouterr()
    assert main(["eval", str(folder / "hf"), "--tasks", "nothing", "--task-dir", str(folder)]) == 2
    assert "got nothing; correct them" in capsys.readouterr().err
