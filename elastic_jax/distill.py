"""Losses over a large vocabulary, without ever holding the logits of a whole batch.

    b batch   t time   d student embed   D teacher embed   v vocab
    n chunks   r rows of a chunk   c times of a chunk

Logits exist for one chunk of tokens at a time, forward and backward: peak memory
grows with the chunk, not with the length. The gradient of a softmax loss is known as
soon as its logits are, so it is taken in the same scan; nothing is recomputed later,
and the head's gradient is summed in float32 over all chunks.

A chunk takes a stretch of time from all rows, so that a batch that is sharded over
devices stays where it is.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


def distillation_loss(
    student_hidden: Float[Array, "b t d"],
    student_head: Float[Array, "d v"],
    teacher_hidden: Float[Array, "b t D"],
    teacher_head: Float[Array, "D v"],
    *,
    weights: Float[Array, "b t"],
    chunk: int = 512,
) -> Float[Array, ""]:
    """Mean forward KL divergence, teacher || student, in nats at temperature 1.

    The weighted mean over tokens; 0 where all weights are. No gradient reaches the
    teacher. Logits are at least float32 whatever the inputs are.

    Args:
      student_hidden, teacher_hidden: hidden states after the final norm.
      weights: how much each token counts; 0 for padding.
      chunk: tokens whose logits exist at one time. Memory is about five times
        chunk * v float32 numbers.

    The objective of arXiv 2511.16664, equations 14 to 16, without a hard-label term.
    """
    _check(student_hidden, student_head, chunk, weights=weights)
    _check(teacher_hidden, teacher_head, chunk, weights=weights)
    if student_head.shape[1] != teacher_head.shape[1]:
        raise ValueError(
            f"distillation_loss: the student's vocabulary of {student_head.shape[1]} "
            f"is not the teacher's of {teacher_head.shape[1]}"
        )
    teacher_head = teacher_head.astype(teacher_hidden.dtype)
    teacher = jax.lax.stop_gradient((teacher_hidden, teacher_head))
    return _mean_loss(_kl, student_hidden, student_head, *teacher, weights, chunk)


def cross_entropy_loss(
    hidden: Float[Array, "b t d"],
    head: Float[Array, "d v"],
    targets: Int[Array, "b t"],
    *,
    weights: Float[Array, "b t"],
    chunk: int = 512,
) -> Float[Array, ""]:
    """Mean cross entropy in nats of `targets`; all else as in `distillation_loss`.

    A target outside the vocabulary gives NaN.
    """
    _check(hidden, head, chunk, targets=targets, weights=weights)
    return _mean_loss(_cross_entropy, hidden, head, targets, (), weights, chunk)


def _kl(student: Float[Array, "*token v"], teacher_hidden, teacher_head):
    """KL divergence per token, exactly 0 in every term where the two agree."""
    teacher = _logits(teacher_hidden, teacher_head)
    log_p = jax.nn.log_softmax(teacher)
    log_q = jax.nn.log_softmax(student)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _cross_entropy(logits: Float[Array, "*token v"], targets, _):
    """The negative log-probability of each token's target."""
    chosen = jnp.take_along_axis(
        logits, targets[..., None], axis=-1, mode="fill", fill_value=jnp.nan
    )
    return jax.nn.logsumexp(logits, axis=-1) - chosen[..., 0]


def _logits(hidden: Float[Array, "*token d"], head: Float[Array, "d v"]):
    """Logits accumulated in at least float32, from products in the hidden dtype."""
    return jnp.einsum(
        "...d,dv->...v", hidden, head, preferred_element_type=_wide(hidden)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 6))
def _mean_loss(
    token_loss: Callable[[Array, Any, Any], Array],
    hidden: Float[Array, "b t d"],
    head: Float[Array, "d v"],
    per_token: Array,
    shared: Any,
    weights: Float[Array, "b t"],
    chunk: int,
) -> Float[Array, ""]:
    """The weighted mean of `token_loss(logits, per_token, shared)` over all tokens.

    `per_token` [b t ...] is cut into chunks like `hidden`; `shared` is not.
    """

    def step(total, part):
        hidden, per_token, weights = part
        losses = token_loss(_logits(hidden, head), per_token, shared)
        return total + jnp.sum(weights * losses), None

    head = head.astype(hidden.dtype)
    weights = weights.astype(_wide(hidden))
    parts = jax.tree.map(lambda x: _cut(x, chunk), (hidden, per_token, weights))
    total, _ = jax.lax.scan(step, jnp.zeros((), weights.dtype), parts)
    return total / _weight(weights)


def _mean_loss_forward(token_loss, hidden, head, per_token, shared, weights, chunk):
    """The loss, and its gradients with respect to `hidden` and `head`."""
    wide = _wide(hidden)

    def step(carry, part):
        total, head_gradient = carry
        hidden, per_token, weights = part

        def loss(logits):
            return jnp.sum(weights * token_loss(logits, per_token, shared))

        value, gradient = jax.value_and_grad(loss)(_logits(hidden, head))
        gradient = gradient.astype(hidden.dtype)
        head_gradient += jnp.einsum(
            "rcd,rcv->dv", hidden, gradient, preferred_element_type=wide
        )
        hidden_gradient = jnp.einsum("rcv,dv->rcd", gradient, head)
        return (total + value, head_gradient), hidden_gradient

    stored, head = head, head.astype(hidden.dtype)
    weights = weights.astype(wide)
    parts = jax.tree.map(lambda x: _cut(x, chunk), (hidden, per_token, weights))
    start = jnp.zeros((), wide), jnp.zeros(head.shape, wide)
    (total, head_gradient), pieces = jax.lax.scan(step, start, parts)
    scale = 1 / _weight(weights)
    # An empty slice of the head tells the backward pass its dtype.
    saved = _joined(pieces, *weights.shape), head_gradient, stored[:0], scale
    return total * scale, saved


def _mean_loss_backward(token_loss, chunk, saved, cotangent):
    hidden, head, stored, scale = saved
    scale = scale * cotangent
    hidden, head = (hidden * scale).astype(hidden.dtype), head * scale
    return hidden, head.astype(stored.dtype), None, None, None


_mean_loss.defvjp(_mean_loss_forward, _mean_loss_backward)


def _cut(x: Shaped[Array, "b t *rest"], chunk: int) -> Shaped[Array, "n r c *rest"]:
    """Chunks of at most `chunk` tokens, zeros behind the last row and time."""
    b, t, *rest = x.shape
    rows = min(b, chunk)
    times = min(t, chunk // rows)
    padding = [(0, -b % rows), (0, -t % times)] + [(0, 0)] * len(rest)
    x = jnp.pad(x, padding)
    x = x.reshape(x.shape[0] // rows, rows, x.shape[1] // times, times, *rest)
    return x.swapaxes(1, 2).reshape(-1, rows, times, *rest)


def _joined(pieces: Float[Array, "n r c d"], b: int, t: int) -> Float[Array, "b t d"]:
    """The inverse of `_cut`."""
    _, rows, times, d = pieces.shape
    pieces = pieces.reshape(-(-b // rows), -1, rows, times, d).swapaxes(1, 2)
    return pieces.reshape(pieces.shape[0] * rows, -1, d)[:b, :t]


def _weight(weights: Float[Array, "b t"]) -> Float[Array, ""]:
    """The sum of all weights; 1 if there are none, where the loss is 0 anyway."""
    total = jnp.sum(weights)
    return jnp.where(total == 0, 1, total)


def _wide(x: Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _check(hidden, head, chunk: int, **per_token) -> None:
    """Raises ValueError if the shapes do not belong to one batch and one model."""
    problems = [
        f"{name}: shape {value.shape}, expected {hidden.shape[:2]}"
        for name, value in per_token.items()
        if value.shape != hidden.shape[:2]
    ]
    fits = hidden.ndim == 3 and head.ndim == 2 and hidden.shape[-1] == head.shape[0]
    if not fits or not hidden.size:
        problems.append(
            f"hidden {hidden.shape} and head {head.shape}: expected [b, t, d] with at "
            "least one token, and [d, v]"
        )
    if chunk < 1:
        problems.append(f"chunk: expected at least 1 token, got {chunk}")
    if problems:
        raise ValueError("loss over chunks:\n  " + "\n  ".join(problems))
