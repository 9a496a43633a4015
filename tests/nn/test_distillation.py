"""The loss against a teacher: its value and gradient are those of the formula, by autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.nn.distillation import Known, Mix, Scorer, distilled_cross_entropy, largest
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
    each = mix.hard * (nats + mix.z_loss * log_z**2) + (1 - mix.hard) * mix.temperature**2 * kl
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


@pytest.mark.parametrize("chunk", (0, 2))
@pytest.mark.parametrize("teacher_size", (V - 3, V, V + 4))
def test_loss_and_gradients_are_those_of_the_formula(teacher_size, chunk):
    student, teacher, targets, mask = inputs(teacher_size)
    p = jax.nn.softmax(logits_of(*teacher[:3], teacher.softcap)[..., :V] / MIX.temperature)
    p = jnp.pad(p, ((0, 0), (0, 0), (0, V - p.shape[-1])))
    check(student, teacher, lambda q: (q, p), targets, mask, chunk)


@pytest.mark.parametrize("chunk", (0, 3))
def test_stored_tokens_leave_the_rest_to_one_outcome(chunk):
    student, teacher, targets, mask = inputs()
    known = largest(teacher, 3, MIX.temperature, V)
    p = jax.nn.softmax(logits_of(*teacher[:3], teacher.softcap) / MIX.temperature)
    order = jnp.argsort(-p, axis=-1)
    np.testing.assert_array_equal(known.ids_BTK, order[..., :3])

    def outcomes(q):
        return [jnp.concatenate([top := jnp.take_along_axis(x, order[..., :3], -1),
                                 1 - jnp.sum(top, -1, keepdims=True)], -1) for x in (q, p)]

    check(student, known, outcomes, targets, mask, chunk)


def test_all_tokens_stored_are_the_whole_teacher():
    student, teacher, targets, mask = inputs()
    known = largest(teacher, V, MIX.temperature, V)
    whole, stored = (distilled_cross_entropy(Scorer(*student, CAP), targets, mask, of, MIX)
                     for of in (teacher, known))
    np.testing.assert_allclose(stored.total, whole.total, rtol=1e-5)
    np.testing.assert_allclose(stored.extra["teacher_kl"], whole.extra["teacher_kl"], rtol=1e-5)


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
    stored = Known(*largest(teacher, 4, 2.0, V))
    assert abs(float(distilled_cross_entropy(teacher, targets, mask, stored,
                                             Mix(0.0, 2.0)).total)) < 1e-5
