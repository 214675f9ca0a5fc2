"""An implementation is chosen for a stated device, and its refusal is never silent."""

import importlib.util
import warnings

import jax
import jax.numpy as jnp
import pytest

from elastic_kernels import dispatch
from elastic_kernels.ssd import cases
from elastic_kernels.ssd.api import ssd


def declining(*_):
    raise NotImplementedError("it does not do that")


AVAILABLE = {"triton": lambda x: x + 1, "xla": lambda x: x + 2, "other": lambda x: x}


def test_a_name_is_obeyed_and_none_is_the_device():
    assert dispatch.select("op", "other", AVAILABLE)(0) == 0
    assert dispatch.select("op", None, AVAILABLE)(0) == 2  # a CPU runs these tests
    with dispatch.target(90):
        assert dispatch.select("op", None, AVAILABLE)(0) == 1
    assert dispatch.select("op", None, AVAILABLE)(0) == 2


def test_an_unknown_name_is_told_the_known():
    with pytest.raises(ValueError, match=r"op: implementation 'tritn' does not exist"):
        dispatch.select("op", "tritn", AVAILABLE)


def test_a_named_implementation_that_declines_is_an_error():
    available = AVAILABLE | {"triton": declining}
    with pytest.raises(NotImplementedError, match="it does not do that"):
        dispatch.select("op", "triton", available)(0)


def test_the_next_runs_under_a_warning_that_says_why():
    available = AVAILABLE | {"triton": declining}
    with dispatch.target(90):
        chosen = dispatch.select("op", None, available)
        with pytest.warns(UserWarning, match=r"op: triton declined \(it does not do"):
            assert chosen(0) == 2
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert dispatch.select("op", None, AVAILABLE)(0) == 1


def test_only_the_last_may_decline_in_earnest():
    with (
        dispatch.target(90),
        pytest.warns(UserWarning, match="declined"),
        pytest.raises(NotImplementedError),
    ):
        available = {"triton": declining, "xla": declining}
        dispatch.select("op", None, available)(0)


def test_other_errors_do_not_fall_through():
    def broken(_):
        raise TypeError("a mistake")

    with dispatch.target(90), pytest.raises(TypeError, match="a mistake"):
        dispatch.select("op", None, AVAILABLE | {"triton": broken})(0)


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(NotImplementedError, match=r"no_such_library.*\[gpu\]"):
        dispatch.lazy("needs_more", "f")()


def test_capability():
    assert dispatch.capability() is None
    dispatch.require_capability("op")  # without a GPU there is nothing to refuse
    for number in (80, 90, 120):
        with dispatch.target(number):
            assert dispatch.capability() == number
            dispatch.require_capability("op")
    with dispatch.target(75), pytest.raises(NotImplementedError, match="has 7.5"):
        dispatch.require_capability("op")


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: pip install .[test]",
)
def test_a_cpu_cannot_run_what_was_compiled_for_a_gpu():
    """Forcing the kernels where they cannot run fails; it does not run another form."""
    arguments, options = cases.inputs(cases.TESTED["tail"])
    with pytest.raises((NotImplementedError, ImportError)):
        jax.jit(lambda *a: ssd(*a, **options, implementation="triton"))(*arguments)


def test_on_an_old_gpu_the_portable_form_runs_and_says_so():
    arguments, options = cases.inputs(cases.TESTED["tail"])
    want, _ = ssd(*arguments, **options)
    with dispatch.target(70), pytest.warns(UserWarning, match="ssd: triton declined"):
        got, _ = ssd(*arguments, **options)
    assert jnp.array_equal(got, want)
