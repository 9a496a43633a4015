"""The loss against a teacher: its value and gradient are those of the formula, by autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.nn.distillation import Mix, Scorer, distilled_cross_entropy, known_of
from lmjax.nn.losses import cross_entropy

B, T, D, V = 2, 6, 5, 11
MIX = Mix(hard=0.3, temperature=1.7, z_loss=0.01)
CAP = 4.0


def inputs(teacher_size=V):
    rng = np.random.default_rng(0)

    def scorer(dim, size):
        return [jnp.asarray(rng.normal(size=shape), jnp.float32)
                for shape in ((B, T, dim), (size, dim), (size,))]

    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    mask = jnp.asarray(rng.random((B, T)) < 0.7, jnp.float32)
    return scorer(D, V), Scorer(*scorer(D + 2, teacher_size), 3.0), targets, mask


def logits_of(x, table, bias, cap):
    return cap * jnp.tanh((jnp.einsum("btd,vd->btv", x, table) + bias[None, None]) / cap)


def plain(student, p_of, targets, mask, mix):
    """The formula without any care; `p_of` gives (outcomes of q, p) out of the student's q."""
    logits = logits_of(*student, CAP)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nats = log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    q, p = p_of(jax.nn.softmax(logits / mix.temperature))
    kl = jnp.sum(jnp.where(p > 0, p * (jnp.log(jnp.maximum(p, 1e-30)) - jnp.log(q)), 0.0), -1)
    each = (mix.hard * nats + mix.z_loss * log_z**2
            + (1 - mix.hard) * mix.temperature**2 * kl)
    return jnp.sum(each * mask), (jnp.sum(nats * mask), jnp.sum(kl * mask))


def check(student, teacher, p_of, targets, mask, chunk):
    def ours(student):
        loss = distilled_cross_entropy(Scorer(*student, CAP), targets, mask, teacher, MIX,
                                       chunk=chunk)
        return loss.total, (loss.nats, loss.extra["teacher_kl"])

    got = jax.jit(jax.value_and_grad(ours, has_aux=True))(student)
    want = jax.value_and_grad(lambda s: plain(s, p_of, targets, mask, MIX), has_aux=True)(student)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-6), got, want)
    return got


@pytest.mark.long
@pytest.mark.parametrize("chunk", (0, 2))
@pytest.mark.parametrize("teacher_size", (V - 3, V, V + 4))
def test_loss_and_gradients_are_those_of_the_formula(teacher_size, chunk):
    student, teacher, targets, mask = inputs(teacher_size)
    p = jax.nn.softmax(logits_of(*teacher[:3], teacher.softcap)[..., :V] / MIX.temperature)
    p = jnp.pad(p, ((0, 0), (0, 0), (0, V - p.shape[-1])))
    check(student, teacher, lambda q: (q, p), targets, mask, chunk)


def keys(seed=0):
    return jax.random.split(jax.random.key(seed), B)


@pytest.mark.long
@pytest.mark.parametrize("chunk", (0, 3))
def test_stored_tokens_are_the_likeliest_and_some_of_the_others(chunk):
    student, teacher, targets, mask = inputs()
    known = known_of(teacher, 5, MIX.temperature, keys(), vocab_size=V, chunk=chunk)
    p = jax.nn.softmax(logits_of(*teacher[:3], teacher.softcap) / MIX.temperature)
    np.testing.assert_allclose(jnp.exp(known.log_p_BTK),
                               jnp.take_along_axis(p, known.ids_BTK, -1), rtol=1e-5)
    order = jnp.argsort(-p, axis=-1)
    np.testing.assert_array_equal(known.ids_BTK[..., :3], order[..., :3])
    drawn = known.ids_BTK[..., 3:, None]
    assert known.num_drawn == 2 and not jnp.any(drawn == order[:, :, None, :3])
    # The loss is that of the formula, with the drawn tokens sharing what the likeliest leave.
    top = jnp.exp(known.log_p_BTK[..., :3])
    weight = jnp.concatenate([top, jnp.repeat((1 - top.sum(-1, keepdims=True)) / 2, 2, -1)], -1)

    def estimate(student):
        log_q = jax.nn.log_softmax(logits_of(*student, CAP) / MIX.temperature)
        of_known = jnp.take_along_axis(log_q, known.ids_BTK, -1)
        kl = jnp.sum(weight * (known.log_p_BTK - of_known), -1)
        hard = plain(student, lambda q: (q, q), targets, mask, MIX)[0]
        return hard + (1 - MIX.hard) * MIX.temperature**2 * jnp.sum(kl * mask)

    def ours(student):
        return distilled_cross_entropy(Scorer(*student, CAP), targets, mask, known, MIX,
                                       chunk=chunk).total

    got, want = (jax.jit(jax.value_and_grad(f))(student) for f in (ours, estimate))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-6), got, want)


@pytest.mark.long
def test_the_gradient_of_stored_tokens_is_right_on_average():
    student, teacher, targets, mask = inputs()

    def gradient(of, student):
        return jax.grad(lambda x: distilled_cross_entropy(
            Scorer(x, *student[1:], CAP), targets, mask, of, MIX).total)(student[0])

    def drawn(seed):
        return gradient(known_of(teacher, 4, MIX.temperature, keys(seed), vocab_size=V), student)

    each = jax.jit(jax.vmap(drawn))(jnp.arange(4000))
    error = np.std(each, axis=0) / np.sqrt(len(each)) + 1e-6
    off = np.abs(np.mean(each, axis=0) - gradient(teacher, student)) / error
    assert np.max(off) < 4.5 and np.mean(off) < 1.1, "in standard errors"
    assert np.max(np.std(each, axis=0)) > 0.01


def test_without_a_share_the_teacher_does_not_count():
    student, teacher, targets, mask = inputs()
    x, table, bias = student
    want = cross_entropy(x, table, targets, mask, bias_V=bias, softcap=CAP, z_loss=0.01)
    got = distilled_cross_entropy(Scorer(*student, CAP), targets, mask, teacher,
                                  Mix(hard=1.0, temperature=2.0, z_loss=0.01))
    np.testing.assert_allclose(got.total, want.total, rtol=1e-6)
    assert got.nats == want.nats and got.weight == want.weight


def test_a_student_that_equals_its_teacher_has_no_divergence():
    student, _, targets, mask = inputs()
    teacher = Scorer(*student, CAP)
    loss = distilled_cross_entropy(teacher, targets, mask, teacher, Mix(0.0, 2.0))
    assert abs(float(loss.total)) < 1e-5
    stored = known_of(teacher, 4, 2.0, keys(), vocab_size=V)
    got = distilled_cross_entropy(teacher, targets, mask, stored, Mix(0.0, 2.0))
    assert abs(float(got.extra["teacher_kl"])) < 1e-5
