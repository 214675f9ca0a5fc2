"""What runs on a GPU compiles for one that is not here."""

import importlib.util

import pytest

NEEDED = "triton", "jax_triton", "jax_cuda13_plugin"
ABSENT = [name for name in NEEDED if importlib.util.find_spec(name) is None]

# Of `ej.presets.tiny("ME*M-")`: forward, and what each saves or learns behind it.
MAMBA, EXPERTS = 4 + 2, 6  # a scan and its norm; the products of experts
TRAIN_STEP = 2 * MAMBA + EXPERTS

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        bool(ABSENT), reason=f"{ABSENT} are not installed: pip install .[aot]"
    ),
]


def test_the_train_step_lowers_for_cuda(deviceless):
    assert deviceless("lower", "train") == {"kernels": TRAIN_STEP}


@pytest.mark.parametrize("program, kernels", [("train", TRAIN_STEP), ("mosaic", 3)])
def test_it_compiles_for_an_h100(deviceless, program, kernels):
    found = deviceless("compile", program)
    assert found["kernels"] == kernels
    assert found["temporaries_bytes"] > 0


def test_the_scan_and_its_gradient_need_little_memory_beside_their_own(deviceless):
    found = deviceless("compile", "scan")
    assert found["kernels"] == 4
    assert found["temporaries_bytes"] <= 2 * found["given_bytes"]
