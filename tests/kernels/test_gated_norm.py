"""The gated norm: what it says, elastic, and in kernels without a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_kernels import dispatch, resources
from elastic_kernels.gated_norm import cases
from elastic_kernels.gated_norm.api import gated_rms_norm

EPS = 1e-5


def test_kernels_compute_the_norm(interpret):
    interpret("interpreted_gated_norm.py")


def test_every_group_has_its_own_mean_square():
    y, z, scale, _, _ = cases.inputs(cases.TESTED["plain"])
    got = gated_rms_norm(y, z, jnp.ones_like(scale), live=12, eps=0.0)
    np.testing.assert_allclose((got**2).mean((-2, -1)), 1, rtol=1e-5)
    u = y * z / (1 + jnp.exp(-z))
    ratio = got / u
    np.testing.assert_allclose(ratio / ratio[..., :1, :1], 1, rtol=1e-4)


@pytest.mark.parametrize("active", [1, 2])
def test_fewer_heads_are_the_norm_of_a_slice(active):
    y, z, scale, *_ = cases.inputs(cases.TESTED["plain"])
    norm = functools.partial(gated_rms_norm, live=active * y.shape[-1], eps=EPS)
    whole = jax.jit(lambda n: norm(y, z, scale, active=n))(active)
    cut = (a[..., :active, :] for a in (y, z, scale))
    np.testing.assert_array_equal(whole[..., active:, :], 0)
    want = norm(*cut)
    np.testing.assert_allclose(whole[..., :active, :], want, rtol=1e-5)


@pytest.mark.parametrize("capability", resources.SHARED_BYTES)
def test_training_compiles_and_spills_nothing(capability):
    """In the widths of Nemotron 3 Nano, and of a model with a single group."""
    pytest.importorskip("triton", reason="triton is not installed: pip install .[test]")

    def both(y, z, scale, mask, live):
        def f(*a):
            options = {"eps": EPS, "implementation": "triton"}
            return gated_rms_norm(*a[:3], mask=a[3], live=a[4], **options)

        out, pull = jax.vjp(f, y, z, scale, mask, live)
        return pull(out)

    for g, r, p in ((8, 8, 64), (1, 64, 64)):
        of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        heads = of(2, 128, g, r, p)
        with dispatch.target(capability):
            launches = resources.recorded(
                both, heads, heads, of(g, r, p), of(r, p), of()
            )
        assert len(launches) == 2
        for launch in launches:
            assert resources.compiled(launch, capability).spilled_bytes == 0


def test_what_the_kernels_do_not_have_is_refused():
    pytest.importorskip("triton", reason="triton is not installed: pip install .[test]")
    wide = jnp.zeros((1, 1, 1, 2, 16384))
    with pytest.raises(NotImplementedError, match="up to 16384 channels"):
        gated_rms_norm(wide, wide, wide[0, 0], live=1, eps=1, implementation="triton")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"z": (2, 3, 2, 3, 5)}, r"z \(2, 3, 2, 3, 5\), expected \(2, 3, 2, 3, 4\)"),
        ({"mask": (2, 3, 4)}, r"mask \(2, 3, 4\), expected \(3, 4\) or \(2, 3, 3, 4\)"),
        ({"live": (2,)}, r"live \(2,\), expected \(\) or \(2, 3\)"),
    ],
)
def test_mistakes_are_named(change, message):
    names = "y", "z", "scale", "mask", "live"
    named = dict(zip(names, cases.inputs(cases.TESTED["plain"]), strict=True))
    named |= {name: jnp.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(**named, eps=EPS)
    with pytest.raises(ValueError, match="4 active heads, expected 1 to 3"):
        inputs = cases.inputs(cases.TESTED["plain"])
        gated_rms_norm(*inputs[:3], live=1, eps=EPS, active=4)
