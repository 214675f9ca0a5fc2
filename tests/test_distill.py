"""Chunked losses equal the whole ones, and their memory does not know the length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elastic_jax.distill import cross_entropy_loss, distillation_loss

VOCAB = 37


@functools.partial(jax.jit, static_argnums=range(6))
def batch(b=3, t=7, d=5, teacher_d=8, vocab=VOCAB, dtype=jnp.float32):
    """Random hidden states, heads of unit-size logits, targets and weights."""
    keys = jax.random.split(jax.random.key(0), 6)
    student = jax.random.normal(keys[0], (b, t, d), dtype)
    student_head = jax.random.normal(keys[1], (d, vocab), dtype) * d**-0.5
    teacher = jax.random.normal(keys[2], (b, t, teacher_d), dtype)
    teacher_head = jax.random.normal(keys[3], (teacher_d, vocab), dtype)
    targets = jax.random.randint(keys[4], (b, t), 0, vocab)
    weights = jax.random.uniform(keys[5], (b, t)) * (jnp.arange(t) > 1)
    head = (teacher_head * teacher_d**-0.5).astype(dtype)
    return student, student_head.astype(dtype), teacher, head, targets, weights


def whole_kl(student, student_head, teacher, teacher_head, weights):
    log_p = jax.nn.log_softmax(teacher @ teacher_head)
    log_q = jax.nn.log_softmax(student @ student_head)
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
    return jnp.sum(weights * kl) / jnp.sum(weights)


def whole_cross_entropy(hidden, head, targets, weights):
    log_q = jax.nn.log_softmax(hidden @ head)
    chosen = jnp.take_along_axis(log_q, targets[..., None], -1)[..., 0]
    return -jnp.sum(weights * chosen) / jnp.sum(weights)


# Rows cut, times cut, ragged both ways, everything at once.
@pytest.mark.parametrize("chunk", [2, 9, 1000])
def test_chunked_equals_whole_with_gradients(chunk):
    with jax.enable_x64(True):
        s, sh, t, th, targets, weights = batch(3, 7, 5, 8, VOCAB, jnp.float64)

        def chunked(student):
            kl = distillation_loss(*student, t, th, weights=weights, chunk=chunk)
            return kl + 2 * cross_entropy_loss(
                *student, targets, weights=weights, chunk=chunk
            )

        def whole(student):
            kl = whole_kl(*student, t, th, weights)
            return kl + 2 * whole_cross_entropy(*student, targets, weights)

        got = jax.jit(jax.value_and_grad(chunked))((s, sh))
        expected = jax.jit(jax.value_and_grad(whole))((s, sh))
        equal = functools.partial(np.testing.assert_allclose, rtol=1e-10)
        jax.tree.map(equal, got, expected)
        equal(jax.jit(chunked)((s, sh)), expected[0])


@pytest.mark.parametrize("vocab, d, chunk", [(64, 48, 512), (131072, 16, 48)])
def test_a_model_is_no_distance_from_itself_in_bfloat16(vocab, d, chunk):
    hidden, head, *_, weights = batch(4, 32, d, 8, vocab, jnp.bfloat16)

    def loss(student, teacher):
        return distillation_loss(*student, *teacher, weights=weights, chunk=chunk)

    same = (hidden, 3 * head)
    assert abs(jax.jit(loss)(same, same)) <= 1e-6
    value, (dh, dw) = jax.jit(jax.value_and_grad(loss))(same, same)
    assert abs(value) <= 1e-6 and value.dtype == jnp.float32
    assert jnp.abs(dh).max() < 1e-5 and jnp.abs(dw).max() < 1e-5
    assert jax.jit(loss)(same, (hidden[:, ::-1], 3 * head)) > 0.1


def test_no_gradient_reaches_the_teacher():
    s, sh, t, th, _, weights = batch()

    def loss(t, th):
        return distillation_loss(s, sh, t, th, weights=weights)

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(t, th)
    assert all(not np.any(g) for g in gradients)


def test_without_weight_there_is_no_loss_and_no_gradient():
    s, sh, t, th, targets, weights = batch()
    nothing = jnp.zeros_like(weights)

    def loss(s, sh):
        kl = distillation_loss(s, sh, t, th, weights=nothing, chunk=4)
        return kl + cross_entropy_loss(s, sh, targets, weights=nothing, chunk=4)

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(s, sh)
    assert value == 0 and not any(np.any(g) for g in gradients)


def test_many_chunks_in_bfloat16_lose_nothing_on_the_way():
    """The head's gradient sums 128 chunks: bfloat16 sums would drown the late ones."""
    data = batch(4, 128, 16, 8, VOCAB, jnp.bfloat16)[:4]
    weights = jnp.ones((4, 128))

    def gradient(*arrays, loss):
        return jax.jit(jax.grad(loss, argnums=1))(*arrays).astype(jnp.float32)

    exact = gradient(*(x.astype(jnp.float32) for x in data), weights, loss=whole_kl)
    plain = gradient(*data, weights, loss=whole_kl)

    def chunked(*arrays):
        return distillation_loss(*arrays, weights=weights, chunk=4)

    def error(got):
        return jnp.linalg.norm(got - exact) / jnp.linalg.norm(exact)

    ours = error(gradient(*data, loss=chunked))
    assert ours <= 2 * error(plain) and ours < 5e-3


def test_heads_may_be_wider_than_the_activations():
    s, sh, t, th, _, weights = batch(3, 7, 5, 8, VOCAB, jnp.bfloat16)
    wide = sh.astype(jnp.float32)

    def loss(s, sh):
        return distillation_loss(s, sh, t, th, weights=weights)

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(s, wide)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]


def test_memory_grows_with_the_chunk_and_not_with_the_length():
    """Vocabulary 131072: whole logits of 4096 tokens would be 2 GiB a model."""
    d, vocab = 8, 131072

    def temporary_bytes(t, chunk):
        hidden = jax.ShapeDtypeStruct((2, t, d), jnp.bfloat16)
        head = jax.ShapeDtypeStruct((d, vocab), jnp.bfloat16)
        weights = jax.ShapeDtypeStruct((2, t), jnp.float32)

        def loss(s, sh, t, th, weights):
            return distillation_loss(s, sh, t, th, weights=weights, chunk=chunk)

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        compiled = step.lower(hidden, head, hidden, head, weights).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long, coarse = (
        temporary_bytes(t, chunk) for t, chunk in [(512, 64), (2048, 64), (512, 256)]
    )
    print("temporaries in MiB:", [n / 2**20 for n in (short, long, coarse)])
    assert long < 1.05 * short
    assert coarse > 2 * short
    assert short < 8 * 64 * vocab * 4  # of 64 for one model's whole logits at t = 512


def test_a_sharded_batch_stays_on_its_devices():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    s, sh, t, th, _, _ = batch(8, 16)
    weights = jnp.ones((8, 16))

    def loss(s, t, weights):
        return distillation_loss(s, sh, t, th, weights=weights, chunk=32)

    rows = NamedSharding(mesh, PartitionSpec("data"))
    placed = jax.device_put((s, t, weights), rows)
    step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, rows))
    compiled = step.lower(*placed).compile()
    assert "all-gather" not in compiled.as_text()
    expected = jax.jit(jax.value_and_grad(loss))(s, t, weights)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8)
    jax.tree.map(close, compiled(*placed), expected)


def test_a_target_outside_the_vocabulary_is_not_silent():
    s, sh, *_, targets, weights = batch()
    loss = functools.partial(cross_entropy_loss, weights=weights)
    assert np.isfinite(jax.jit(loss)(s, sh, targets))
    assert np.isnan(jax.jit(loss)(s, sh, targets.at[0, 3].set(VOCAB)))


def test_shapes_that_do_not_belong_together_are_refused():
    s, sh, t, th, targets, weights = batch()
    with pytest.raises(ValueError, match="vocabulary of 36"):
        distillation_loss(s, sh[:, 1:], t, th, weights=weights)
    with pytest.raises(ValueError, match="weights: shape") as caught:
        distillation_loss(s, th, t, th, weights=weights[:2], chunk=0)
    assert "head" in str(caught.value) and "chunk" in str(caught.value)
    with pytest.raises(ValueError, match="targets: shape"):
        cross_entropy_loss(s, sh, targets[:, 1:], weights=weights)
