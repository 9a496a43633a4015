"""Conversations: templates as transformers has them, what is learned, what is refused."""

import json

import numpy as np
import pytest

from lmjax.data.chat import (
    BUILT_IN,
    FILE,
    ChatTemplate,
    end_of_turn,
    find_template,
    marks_without_token,
    need_template,
)
from lmjax.data.config import DataConfig
from lmjax.data.reading import make_reader
from lmjax.data.tokenizers import (
    HuggingFaceTokenizer,
    TokenizerConfig,
    tokenizer_from_bytes,
    train_tokenizer,
)
from lmjax.errors import UserError
from lmjax.tasks.chat import Chat
from lmjax.tasks.task import Sizes

pytest.importorskip("jinja2")
NAMES = (("bos_token", "<s>"), ("eos_token", "</s>"))
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "héllo <b> 日本"},
        {"role": "assistant", "content": " yes, é"}, {"role": "user", "content": "and\nthen?"},
        {"role": "assistant", "content": "no"}]
# Templates in the manner of published ones, each with something of its own.
TEMPLATES = {
    **BUILT_IN,
    "alternating": "{{ bos_token }}{% for m in messages if m.role != 'system' %}{% if (m.role == "
                   "'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles!') }}{% endif %}"
                   "{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% else %}"
                   " {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}",
    "marked": "{% for m in messages %}\n    {% if m.role == 'assistant' %}\nA: {% generation %}"
              "{{ m.content }}{{ eos_token }}{% endgeneration %}\n\n{% else %}\n{{ m | tojson }}\n"
              "    {% endif %}\n{% endfor %}{% if add_generation_prompt %}A: {% endif %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'system' %}"
                 "{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}{{ ns.n }} {{ m['role'] }}: "
                 "{{ m['content'] }}{% if ns.n > 99 %}{% break %}{% endif %}\n{% endfor %}"
                 "{% if add_generation_prompt %}{{ ns.n + 1 }} assistant: {% endif %}",
}


@pytest.fixture(scope="module")
def tokenizer():
    text = "hello world yes no and then Be brief. user assistant system User Assistant\n"
    return train_tokenizer(TokenizerConfig(vocab_size=300), [text * 30])


def learned(text, tokenizer, spans):
    ids, places = tokenizer.spans_with_specials(text)
    return [tokenizer.decode([i for i, (a, b) in zip(ids, places, strict=True)
                              if a < stop and b > start]) for start, stop in spans]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_assistant_speaks_where_the_template_lets_it(name, tokenizer):
    template = ChatTemplate(TEMPLATES[name], NAMES)
    text, spans = template.spans(TALK)
    assert text == template.render(TALK)
    assert [text[a:b].strip().partition("<")[0] for a, b in spans] == ["yes, é", "no"]
    assert template.spans(TALK, last=True).spans == spans[-1:]
    assert text.startswith(template.render(TALK[:4], prompt=True))
    said = [text[a:b].replace("</s>", "") for a, b in spans]  # a token without a text
    assert learned(text, tokenizer, spans) == said


@pytest.mark.long
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_and_marks_as_in_transformers(name, tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    ours = _hugging_face(tokenizer, tmp_path, TEMPLATES[name])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    template = need_template(ours)
    for prompt, messages in ((False, TALK), (True, TALK[:4])):
        expected = theirs.apply_chat_template(messages, tokenize=False,
                                              add_generation_prompt=prompt)
        assert template.render(messages, prompt=prompt) == expected
        ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
        assert ours.spans_with_specials(expected)[0] == ids
    if name == "marked":
        mask = theirs.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
        got = encode(ours, TALK, 200)
        assert got["loss_mask"].tolist() == mask["assistant_masks"][1:]
        assert got["tokens"].tolist() == mask["input_ids"][:-1]


def _hugging_face(tokenizer, folder, template):
    """The tokenizer as the files of a directory, and read from there."""
    from lmjax.huggingface import read_tokenizer
    from lmjax.huggingface.tokenizer_export import write_tokenizer

    made = tokenizer.with_file(FILE, template.encode())
    write_tokenizer(folder, make_reader(made, "decoder", DataConfig(), {}), log=lambda line: None)
    (folder / "tokenizer.model").unlink()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    read = read_tokenizer(folder)
    assert isinstance(read, HuggingFaceTokenizer)
    return read


def reader_of(tokenizer):
    return make_reader(tokenizer, "decoder", DataConfig(), {})


def encode(tokenizer, messages, tokens, *, prefix=False, **task):
    return Chat(**task).encode({"messages": messages}, reader_of(tokenizer), {},
                               Sizes(tokens, prefix=prefix)).columns


@pytest.fixture(scope="module")
def chatml(tokenizer):
    return Chat(template="chatml").tokenizer(tokenizer, lambda line: None)


@pytest.mark.parametrize("turns", ["all", "last"])
def test_only_the_assistant_counts_in_the_loss(turns, chatml):
    got = encode(chatml, TALK, 400, turns=turns)
    text = need_template(chatml).render(TALK)
    counted = [i for i, c in zip(got["targets"], got["loss_mask"], strict=True) if c]
    said = [" yes, é<|im_end|>\n", "no<|im_end|>\n"][turns == "last":]
    assert chatml.decode(counted) == "".join(said)
    whole = [got["tokens"][0], *got["targets"]]
    assert chatml.decode(whole) == text.removeprefix("<s>") and whole[0] == chatml.bos_id


def test_a_long_conversation_loses_its_end_and_that_is_counted(chatml):
    whole = encode(chatml, TALK, 400)
    n = len(whole["tokens"])
    cut = Chat().encode({"messages": TALK}, reader_of(chatml), {}, Sizes(n - 30))
    assert cut.columns["tokens"].tolist() == whole["tokens"][: n - 30].tolist()
    lost = int(whole["loss_mask"][n - 30:].sum())
    assert (cut.cut, cut.cut_target) == (30 - lost, lost) and lost
    short = Chat().encode({"messages": TALK}, reader_of(chatml), {}, Sizes(12))
    assert short.columns["tokens"].tolist() == whole["tokens"][:12].tolist()
    assert not short.columns["loss_mask"].any()  # all of its answers are lost
    assert (short.cut, short.cut_target) == (n - 12 - int(whole["loss_mask"].sum()),
                                             int(whole["loss_mask"].sum()))


def test_an_answer_follows_the_ids_that_it_followed_in_training(chatml):
    row = encode(chatml, TALK, 400)
    n = int(np.flatnonzero(np.diff(row["loss_mask"]) == 1)[-1]) + 2  # ids before the last answer

    def asked(room, positions=0):
        return Chat(max_tokens=8).prompt({"messages": TALK}, reader_of(chatml),
                                         Sizes(room, positions=positions))

    assert asked(n) == asked(400, 400) == row["tokens"][:n].tolist()
    # Where an answer would have no positions, the oldest turns are left out.
    assert asked(n + 4, n + 4) == row["tokens"][4:n].tolist()


def test_a_prefix_lm_reads_all_before_the_last_turn_in_both_directions(chatml):
    got = encode(chatml, TALK, 400, turns="last", prefix=True)
    first = int(np.argmax(got["loss_mask"])) + 1  # the first token that is written
    assert got["bidirectional"].tolist() == [1] * first + [0] * (len(got["tokens"]) - first)
    with pytest.raises(UserError, match="task.turns=last"):
        encode(chatml, TALK, 400, prefix=True)


def test_every_form_of_a_conversation_is_the_same(chatml):
    asked, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    forms = [{"messages": [asked, said]}, {"prompt": "a", "completion": "b"},
             {"prompt": [asked], "completion": [said]},
             {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
    rows = [Chat().encode(form, reader_of(chatml), {}, Sizes(200)).columns for form in forms]
    for row in rows[1:]:
        assert row["targets"].tolist() == rows[0]["targets"].tolist()
    other = Chat(messages="talk").encode({"talk": [asked, said]}, reader_of(chatml), {}, Sizes(200))
    assert other.columns["targets"].tolist() == rows[0]["targets"].tolist()


def test_the_end_of_a_turn_is_a_token_or_a_text(tokenizer, chatml):
    assert end_of_turn(chatml).strings == ("<|im_end|>",)
    plain = tokenizer.with_file(FILE, BUILT_IN["plain"].encode())
    assert end_of_turn(plain).ids == (tokenizer.eos_id,)
    lines = []
    Chat(template="chatml").tokenizer(tokenizer, lines.append)
    assert "<|im_start|>, <|im_end|> are no tokens" in lines[0]
    assert not marks_without_token(need_template(plain), plain)


def test_a_template_belongs_to_the_tokenizer(tokenizer, chatml):
    again = tokenizer_from_bytes(chatml.to_bytes())
    assert find_template(again).text == BUILT_IN["chatml"] and again.hash == tokenizer.hash
    config = {"chat_template": [{"name": "tools", "template": "x"},
                                {"name": "default", "template": "y"}]}
    told = tokenizer.with_file("tokenizer_config.json", json.dumps(config).encode())
    assert find_template(told).text == "y"
    assert find_template(told.with_file(FILE, b"z")).text == "z"
    assert find_template(tokenizer) is None


def says(code):
    return "{% for m in messages %}{{ m.content }}{% endfor %}" + code


REFUSED = {
    "Python behind a text": (says("{{ ''.__class__.__mro__ }}"), "SecurityError"),
    "Python behind a function": (says("{{ raise_exception.__globals__['os'] }}"), "SecurityError"),
    "Python behind a namespace": (says("{% set n = namespace(_x=1) %}"), "SecurityError"),
    "a changed message": (says("{{ messages.append(1) }}"), "SecurityError"),
    "an endless range": (says("{{ range(10 ** 9) | list }}"), "OverflowError"),
    "its own refusal": (says("{{ raise_exception('never') }}"), "never"),
    "an open block": (says("{% if true %}"), "a Jinja template"),
    "no assistant": ("{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}",
                     "leaves it out"),
    "turns that change": ("{{ messages | length }}" + says("x"), "another text of turn"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_template_is_one_line(name, tokenizer, tmp_path):
    text, message = REFUSED[name]
    (tmp_path / "chat.jinja").write_text(text)
    task = Chat(template=str(tmp_path / "chat.jinja"))
    with pytest.raises(UserError) as caught:
        task.tokenizer(tokenizer, lambda line: None)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.where == "config.task.template"


@pytest.mark.parametrize("record, message", [
    ({"messages": [{"role": "user", "content": "a"}]}, "none of its turns"),
    ({"messages": [{"role": "assistant", "content": " "}]}, "an empty turn"),
    ({"messages": "hello"}, "a list of messages"),
    ({"messages": [{"role": "user"}]}, "a role and a content"),
    ({"prompt": "a"}, "a column 'completion'"),
])
def test_a_bad_conversation_is_one_line(record, message, chatml):
    with pytest.raises(UserError, match=message):
        Chat().encode(record, reader_of(chatml), {}, Sizes(200))


def test_a_model_without_a_template_says_what_to_do(tokenizer):
    with pytest.raises(UserError, match="task.name=chat"):
        need_template(tokenizer)
    with pytest.raises(UserError, match="chatml, plain or a file"):
        Chat().tokenizer(tokenizer, lambda line: None)
    with pytest.raises(UserError, match="a Jinja file"):
        Chat(template="chatlm").tokenizer(tokenizer, lambda line: None)
