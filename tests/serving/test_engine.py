"""The engine against `lm.generate_ids`, under random load."""

import dataclasses
import math
import queue
import random
import threading

import numpy as np
import pytest
from tiny_lm import V, ask, collect, tiny_lm

from lmjax.decoding.sampling import Sampling
from lmjax.errors import UserError
from lmjax.serving import programs
from lmjax.serving.engine import Engine
from lmjax.serving.requests import Busy, Finished, Request
from lmjax.sharding import MeshConfig

GREEDY = Sampling(0.0)
SIZES = {"slots": 4, "max_length": 64, "chunk": 16}
# Every setting of a request, in turn.
MIXED = (Sampling(1.0), Sampling(0.7, 5), GREEDY, Sampling(1.3, 0, 0.8), Sampling(0.9, min_p=0.1),
         Sampling(1.0, repetition_penalty=1.5), Sampling(0.8, 20, 0.9, 0.05, 1.2))


def running(lm, **settings):
    engine = Engine(lm, **(SIZES | settings))
    engine.start()
    return engine


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def engine(lm):
    made = running(lm)
    yield made
    made.close()


def random_prompts(count, seed=0, longest=40):
    rng = random.Random(seed)
    return [tuple(rng.randrange(3, V - 40) for _ in range(rng.randrange(1, longest)))
            for _ in range(count)]


def under_load(engine, requests, clients=7, seed=0, mixed=MIXED):
    """The answers to requests that several clients send, each with noise in between."""
    answers, rng = [None] * len(requests), random.Random(seed)
    noise = [Request(prompt, rng.randrange(1, 20), rng.choice(mixed), seed=i,
                     alternatives=rng.choice((0, 0, 3)))
             for i, prompt in enumerate(random_prompts(len(requests), seed + 1))]

    def client(mine):
        for i in mine:
            boxes = [queue.Queue(), queue.Queue()]
            for box, request in zip(boxes, (noise[i], requests[i]), strict=True):
                ticket = engine.submit(request, box.put)
                if request is noise[i] and i % 3 == 0:
                    engine.cancel(ticket)
            answers[i] = [collect(box) for box in boxes][1]

    threads = [threading.Thread(target=client, args=(range(k, len(requests), clients),))
               for k in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def texts(lm, prompts, answers):
    return [lm.reader.names.continuation(prompt, answer.ids)
            for prompt, answer in zip(prompts, answers, strict=True)]


@pytest.mark.parametrize("count", [pytest.param(20, marks=pytest.mark.long),
                                   pytest.param(200, marks=pytest.mark.slow)])
def test_greedy_answers_under_load_are_those_of_generate(lm, engine, count):
    prompts = random_prompts(count)
    answers = under_load(engine, [Request(p, 20, GREEDY) for p in prompts])
    assert texts(lm, prompts, answers) == lm.generate_ids(prompts, max_tokens=20, temperature=0.0)
    assert {answer.end.reason for answer in answers} == {"stop", "length"}


@pytest.mark.long
def test_a_seed_has_one_answer_whatever_else_is_asked(lm, engine):
    """It is that of `generate_ids` for the prompt alone, with the same probabilities to a bit."""
    prompts = random_prompts(2 * len(MIXED), seed=5)
    requests = [Request(p, 12, MIXED[i % len(MIXED)], seed=i) for i, p in enumerate(prompts)]
    alone = [ask(engine, [request])[0] for request in requests]
    loaded = under_load(engine, requests, seed=3)
    assert [a.pieces for a in loaded] == [a.pieces for a in alone]
    assert texts(lm, prompts, alone) == [
        lm.generate_ids([r.prompt], max_tokens=12, seed=r.seed, **r.sampling._asdict())[0]
        for r in requests]


@pytest.mark.long
def test_a_known_prefix_is_not_read_again_and_changes_nothing(lm):
    system, (first, second) = random_prompts(1, 9)[0] * 2, random_prompts(2, 8, 8)
    system = (system * 40)[:35]
    engine, without = running(lm, prefix_tokens=64), running(lm, prefix_tokens=0)
    request = Request(system + first, 12, Sampling(1.0), seed=4)
    fresh = ask(without, [request])[0]
    ask(engine, [Request(system + second, 3)])
    again = ask(engine, [request])[0]
    assert (fresh.end.reused_tokens, again.end.reused_tokens) == (0, 32)
    assert again.pieces == fresh.pieces
    # A pool of four blocks forgets the prompt after others.
    ask(engine, [Request(p, 1) for p in random_prompts(8, 7)])
    assert ask(engine, [request])[0] == fresh
    for made in (engine, without):
        made.close()


@pytest.mark.slow
def test_reading_in_chunks_changes_nothing(lm, engine):
    whole = running(lm, chunk=64)
    requests = [Request(p, 10, GREEDY, alternatives=2) for p in random_prompts(6, 2, 50)]
    for one, other in zip(ask(engine, requests), ask(whole, requests), strict=True):
        assert one.ids == other.ids
        np.testing.assert_allclose([p.logprob for p in one.pieces],
                                   [p.logprob for p in other.pieces], atol=1e-5)
    whole.close()


@pytest.mark.long
def test_scores_are_the_log_softmax_of_the_logits(lm, engine):
    """Those of the prompt, of the answer, and of the likeliest tokens beside each."""
    prompt = random_prompts(1, 1)[0] + tuple(range(5, 25))
    answer = ask(engine, [Request(prompt, 6, Sampling(2.0), alternatives=20, echo_scores=True,
                                  bias=((7, 3.0),))])[0]
    row = [*prompt, *answer.ids]
    logits = np.asarray(lm.logits([row]), np.float64)[0]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    pieces = [*answer.end.prompt_pieces, *answer.pieces]
    assert [piece.token for piece in pieces] == row and math.isnan(pieces[0].logprob)
    for at, piece in enumerate(pieces[1:]):
        assert piece.logprob == pytest.approx(logprobs[at, piece.token], abs=1e-4)
        ids, theirs = zip(*piece.alternatives, strict=True)
        real = logprobs[at, : lm.tokenizer.vocab_size]
        np.testing.assert_allclose(theirs, np.sort(real)[::-1][:20], atol=1e-4)
        np.testing.assert_allclose(theirs, logprobs[at, list(ids)], atol=1e-4)
    only_scores = ask(engine, [Request(prompt, 0, echo_scores=True, alternatives=20)])[0]
    assert only_scores.pieces == [] and only_scores.end.reason == "length"
    assert only_scores.end.prompt_pieces[1:] == answer.end.prompt_pieces[1:]


@pytest.mark.long
def test_biases_and_ends_of_a_request(engine):
    prompt = random_prompts(1, 3)[0]
    free = ask(engine, [Request(prompt, 20, GREEDY)])[0].ids
    banned = ask(engine, [Request(prompt, 20, GREEDY, bias=((free[0], -100.0),))])[0].ids
    wanted = ask(engine, [Request(prompt, 5, Sampling(1.0), bias=((9, 100.0),))])[0].ids
    assert free[0] not in banned and wanted == [9] * 5
    stopped = ask(engine, [Request(prompt, 20, GREEDY, stop_ids=(free[4],))])[0]
    assert stopped.ids == free[: free.index(free[4])] and stopped.end.reason == "stop"


@pytest.mark.long
def test_cancelled_requests_free_their_slots(lm):
    engine, entered = running(lm, slots=1), threading.Event()
    box, late = queue.Queue(), queue.Queue()

    def slow(item):
        box.put(item)
        entered.wait(10)

    ticket = engine.submit(Request((5,), 60, GREEDY, bias=((9, 100.0),)), slow)
    waiting = engine.submit(Request((6,), 5, GREEDY), late.put)
    box.get(timeout=20)
    engine.cancel(ticket)
    engine.cancel(waiting)
    entered.set()
    answer = collect(box)
    assert answer.end.reason == "cancelled" and len(answer.pieces) < 5
    assert collect(late).end == Finished("cancelled", 1, 0)
    assert len(ask(engine, [Request((7,), 5, bias=((9, 100.0),))])[0].ids) == 5
    engine.cancel(ticket)  # has ended already
    assert engine.stats()["running"] == 0
    engine.close()


@pytest.mark.long
def test_a_full_queue_and_a_drain_refuse(lm):
    engine, go = Engine(lm, **SIZES | {"slots": 1}, queue=2), threading.Event()
    boxes = [queue.Queue() for _ in range(3)]

    def wait_and_put(item):
        go.wait(20)
        boxes[0].put(item)

    for put in (wait_and_put, boxes[1].put, boxes[2].put):  # one for the slot, two that wait
        engine.submit(Request((5,), 8, GREEDY), put)
    with pytest.raises(Busy, match="the queue is full; try again in 4 s") as busy:
        engine.submit(Request((5,), 8), print)
    assert busy.value.retry_after_seconds == 4
    engine.start()
    drained = []
    thread = threading.Thread(target=lambda: drained.append(engine.drain(30)))
    thread.start()
    while not engine._draining:
        pass
    with pytest.raises(Busy, match="stopping"):
        engine.submit(Request((5,), 8), print)
    go.set()
    thread.join()
    assert drained == [True]
    assert {collect(box).end.reason for box in boxes} <= {"length", "stop"}


@pytest.mark.slow
def test_a_drain_that_takes_too_long_cancels(lm):
    engine, box = running(lm), queue.Queue()
    hold = threading.Event()
    engine.submit(Request((5,), 60, bias=((9, 100.0),)), lambda x: (box.put(x), hold.wait(1)))
    threading.Timer(0.5, hold.set).start()
    assert not engine.drain(0.05)
    assert collect(box).end.reason == "cancelled"


@pytest.mark.long
def test_faults_end_what_was_running_and_nothing_else(lm, engine, monkeypatch, capsys):
    request = Request((5, 6), 4, GREEDY)
    fine = ask(engine, [request])[0]
    before, broken = engine._programs, engine._programs._replace(step=None)
    monkeypatch.setattr(engine, "_programs", broken)
    assert ask(engine, [request])[0].end.reason == "fault"
    monkeypatch.setattr(engine, "_programs", before)
    assert ask(engine, [request])[0] == fine and engine.stats()["faults"] == 1
    gone = threading.Event()

    def broken_sink(item):
        if isinstance(item, Finished):
            gone.set()
        raise OSError("the client is gone")

    engine.submit(request, broken_sink)
    assert gone.wait(20) and ask(engine, [request])[0] == fine
    assert "the client is gone" in capsys.readouterr().err


FAMILIES = {
    "window": dict(sliding_window=5), "learned": dict(positions="learned", max_positions=64),
    "pattern": dict(num_layers=3, layer_pattern=("local", "global"), sliding_window=16,
                    scan_layers=True),
    "window of all slots": dict(sliding_window=64),
    "experts": dict(moe=dict(experts=4)),
    "gpt-oss": dict(attention_sinks=True, layer_pattern=("local", "global"), sliding_window=8,
                    mlp="swiglu_clamped", moe=dict(experts=4, bias=True)),
    "capacity": dict(moe=dict(experts=4, capacity=2.0)),
    "latent": dict(num_kv_heads=0, latent=dict(kv_rank=16, nope_dim=8, rope_dim=8, value_dim=8),
                   moe=dict(experts=4, first_dense=1)),
    "softcap": dict(attention_softcap=5.0, positions="sinusoidal"),
}


@pytest.mark.parametrize("keys", [
    pytest.param(keys, id=name, marks=pytest.mark.long if name == "pattern" else pytest.mark.slow)
    for name, keys in FAMILIES.items()])
def test_every_kind_of_decoder(keys):
    lm = tiny_lm(**keys)
    engine, prompts = running(lm, slots=3), random_prompts(6, 4)
    answers = ask(engine, [Request(p, 12, GREEDY) for p in prompts])
    assert texts(lm, prompts, answers) == [
        lm.generate_ids([p], max_tokens=12, temperature=0.0)[0] for p in prompts]
    engine.close()


@pytest.mark.slow
def test_a_prefix_lm_reads_its_prompts_whole():
    lm = tiny_lm(objective="prefix_lm")
    engine, prompts = running(lm, chunk=8), random_prompts(4, 4)
    answers = ask(engine, [Request(p, 12, GREEDY) for p in prompts + prompts])
    assert texts(lm, prompts, answers[:4]) == lm.generate_ids(prompts, max_tokens=12,
                                                              temperature=0.0)
    assert answers[4:] == answers[:4] and not any(a.end.reused_tokens for a in answers)
    with pytest.raises(UserError, match="echo_scores"):
        engine.submit(Request((5,), 1, echo_scores=True), print)
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [dict(tensor=2), dict(data=1, fsdp=4)], ids=["tensor", "fsdp"])
def test_a_mesh_of_several_devices(lm, engine, mesh):
    mesh = MeshConfig(**{"data": 1} | mesh)
    split = tiny_lm(mesh, mesh.tensor * mesh.fsdp, num_kv_heads=2)
    single, prompts = tiny_lm(num_kv_heads=2), random_prompts(5, 6)
    engine = running(split)
    compiled = [p._cache_size() for p in engine._programs]
    requests = [Request(p, 10, GREEDY) for p in prompts]
    answers = ask(engine, requests + requests)
    assert texts(single, prompts, answers[:5]) == single.generate_ids(
        prompts, max_tokens=10, temperature=0.0)
    assert [p._cache_size() for p in engine._programs] == compiled
    engine.close()


@pytest.mark.parametrize("own, steps", [
    pytest.param(True, 8, marks=pytest.mark.slow, id="the model itself"),
    pytest.param(False, 40, marks=pytest.mark.slow, id="another")])
def test_a_draft_changes_no_greedy_answer(lm, own, steps):
    engine = running(lm, draft=lm if own else tiny_lm(seed=1, num_layers=1), propose=4)
    prompts = random_prompts(10, 11)
    requests = [Request(p, 14, GREEDY, alternatives=1) for p in prompts]
    answers = under_load(engine, requests, mixed=MIXED[:5])
    assert texts(lm, prompts, answers) == lm.generate_ids(prompts, max_tokens=14, temperature=0.0)
    assert all(p.alternatives[0] == (p.token, p.logprob) for a in answers for p in a.pieces)
    before = engine.stats()["steps"]
    # The first token comes with the prompt, and each step gains up to five; one step too many is
    # dispatched before the end is seen.
    assert len(ask(engine, [Request((5, 6), 41, GREEDY, bias=((9, 100.0),))])[0].ids) == 41
    assert engine.stats()["steps"] - before <= steps + 1
    sampled = [dataclasses.replace(r, sampling=Sampling(1.0), seed=i)
               for i, r in enumerate(requests)]
    assert ([a.pieces for a in under_load(engine, sampled, mixed=MIXED[:5])]
            == [ask(engine, [r])[0].pieces for r in sampled])
    with pytest.raises(UserError, match="repetition_penalty: expected 1 with a draft"):
        engine.submit(Request((5,), 1, Sampling(repetition_penalty=2.0)), print)
    engine.close()


@pytest.mark.long
def test_nothing_compiles_after_the_start(lm, engine):
    """Whatever is asked: all of it is data."""
    ask(engine, [Request((5, 6), 2, echo_scores=True)])  # compiled when it is first asked for
    compiled = [program._cache_size() for program in engine._programs]
    rng = random.Random(1)
    requests = [Request(p, rng.randrange(1, 20), rng.choice(MIXED), rng.randrange(2**40),
                        rng.randrange(20), ((3, 1.0),) * rng.randrange(3), (7,) * rng.randrange(3))
                for p in random_prompts(20, 12)]
    ask(engine, requests)
    assert [program._cache_size() for program in engine._programs] == compiled


@pytest.mark.long
def test_requests_that_can_never_be_answered(lm):
    engine = Engine(lm, **SIZES)
    for request, words in (
            (Request((), 1), "prompt: expected at least one token id"),
            (Request((V,), 1), "prompt: expected ids of 0 to 299"),
            (Request((5,) * 60, 5), "max_tokens: expected prompt and answer within 64 tokens"),
            (Request((5,), 0), "max_tokens: expected at least 1"),
            (Request((5,), 1, Sampling(math.nan)), "temperature: expected"),
            (Request((5,), 1, Sampling(top_p=0.0)), "top_p: expected"),
            (Request((5,), 1, alternatives=21), "alternatives: expected at most 20"),
            (Request((5,), 1, bias=((V, 1.0),)), "bias: expected ids"),
            (Request((5,), 1, bias=((5, math.inf),)), "bias: expected a number"),
            (Request((5,), 1, stop_ids=(1,) * 17), "stop_ids: expected at most 16")):
        with pytest.raises(UserError) as error:
            engine.submit(request, print)
        assert str(error.value).startswith(words)
    assert engine.stats()["queued"] == 0


@pytest.mark.long
def test_models_and_sizes_that_are_refused(lm):
    for make, words in (
            (lambda: Engine(tiny_lm(family="encoder", objective="masked_lm")),
             "expected a decoder to serve"),
            (lambda: Engine(lm, slots=0), "slots: expected at least 1"),
            (lambda: Engine(lm, slots=10**9), "slots: expected caches within"),
            (lambda: Engine(tiny_lm(positions="learned", max_positions=64), max_length=65),
             "max_length: expected rows within max_positions=64")):
        with pytest.raises(UserError) as error:
            make()
        assert str(error.value).startswith(words)


@pytest.mark.slow
def test_every_program_is_warmed_up_but_the_one_for_scores(engine):
    """A request would wait for the compiler otherwise."""
    sizes = {name: program._cache_size()
             for name, program in zip(programs.Programs._fields, engine._programs, strict=True)}
    sizes.pop("read_scored")
    assert set(sizes.values()) == {1}
