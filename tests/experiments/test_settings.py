"""A wrong command line: every mistake at once, exit code 2, and nothing begun."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

from experiments import settings

ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT / "experiments" / "configs" / "tiny.py"
CONTROL = TINY.with_name("budget_control.py")

# What is wrong -> what its message must say.
MISTAKES = {
    "--confg.seed=1": ["--confg.seed", "did you mean 'config'"],
    "--config.stages.short.stpes=5": ["stages.short.stpes", "did you mean 'steps'"],
    "--config.modle.embed=64": ["modle.embed", "did you mean 'model'"],
    "--config.save_every=often": ["save_every=often", "expected int", "100"],
    "--config.parent_training.learning_rate=3e": ["learning_rate=3e", "expected float"],
    "--config.smoke=perhaps": ["smoke=perhaps", "expected bool"],
    "--config.stages.long.sampling=(5.0,": ["sampling=(5.0,", "expected tuple"],
    "--config.budgets.targets=(1.0,0.78,0.01)": [
        "small: none of",
        "within 5% of its target",
        "nearest",
    ],
    "--config.elastic.expert_ffn=(64,40)": ["expert_ffn", "40", "multiple of 16"],
    "--config.model.kv_heads=0": ["kv_heads", "got 0"],
    "--config.modulus=12": ["modulus", "expected a prime", "12"],
    "--config.evaluation.context=20": ["context 20 is too short"],
    "--config.parent_training.batch=60": ["Stage 'parent'", "60"],
    "--config.calibration.rows=33": ["calibration.rows", "multiple"],
    "--config.controls=half": ["controls", "'full'", "'half'"],
    "--config.on_nonfinite=ignore": ["on_nonfinite", "'skip'", "'ignore'"],
    "--config.parent_training.floor=1.5": ["floor", "exact answers in 0..1", "1.5"],
    "--config.parent_training.target=nan": ["target", "exact answers in 0..1", "nan"],
    "--config.router.hard_probability=7": ["router.hard_probability", "0..1", "7"],
    "--config.router.fit_first=-1": ["router.fit_first", "at least 0", "-1"],
    "--config.calibration.rows=0": ["calibration.rows", "at least 1", "got 0"],
    "--config.orders.rows=0": ["orders.rows", "at least 1", "got 0"],
    "--config.orders.random=-1": ["orders.random", "at least 1", "got -1"],
    "--config.latency.prompt=0": ["latency.prompt", "at least 1", "got 0"],
    "--config.latency.phase=prefil": ["phase 'prefil'", "did you mean 'prefill'"],
    "--config.budgets.names=('full',2,'')": ["budgets.names", "[2, '']"],
    "--config.parent_training.sampling=(1.0,)": ["unknown", "parent_training.samp"],
    "--config.parent_training.router=frozen": ["unknown", "parent_training.router"],
    "--config.stages.short.mixed_prefixes=0.5": [
        "Stage 'short'",
        "mixed_prefixes 0.5",
        "use router='frozen'",
    ],
    "--config.stages.long.mixed_prefixes=2.0": ["Stage 'long'", "0..1, got 2.0"],
    "--config.parent_training.mixed_prefixes=0.5": ["unknown", "parent_training.mixed"],
    "--config.parent=no/where": ["no/where"],
    "--config.data.source=file": ["data.source 'file'", "did you mean 'files'"],
    "--config.data.source=files": ["no files given"],
    "--config.data.files=('a.txt',)": ["data.files", "needs data.source='files'"],
    "--config.data.weights=(1.0,-1.0)": ["data.weights", "positive", "[-1.0]"],
    "--config.model.vocab=63": ["model.vocab 63", "the data need 64 tokens"],
    "--config.code_values=4": ["code_values 4", "14641 codes", "5832"],
    "workdir": ["'workdir'", "--name=value"],
}

# The same where pairs of budgets are measured.
CONTROL_MISTAKES = {
    "--config.control.caps=(0,12)": ["control.caps", "ints from 1 on", "(0, 12)"],
    "--config.control.caps=(12,12)": ["control.caps", "different ints"],
    "--config.control.budgets=('full','smal')": [
        "control.budgets",
        "two of ('full', 'small')",
        "did you mean 'small'",
    ],
    "--config.control.budgets=('full','full')": ["control.budgets", "expected two"],
    "--config.control.budgets=('full',)": ["control.budgets", "expected two"],
    "--config.control.budgets=('small','full')": ["control.budgets", "larger"],
    "--config.control.hand_overs=('teleport',)": ["control.hand_overs", "transplant"],
    "--config.control.hand_overs=()": ["control.hand_overs", "reprefill"],
    "--config.control.stages=('mixed','long')": ["control.stages", "in this order"],
    "--config.control.stages=('last',)": ["control.stages", "'mixed'", "('last',)"],
    "--config.control.seeds=0": ["control.seeds", "at least 1, got 0"],
    "--config.control.problems=1": ["control.problems", "at least 2, got 1"],
    "--config.control.repeats=0": ["control.repeats", "at least 1, got 0"],
    "--config.control.grace=-1": ["control.grace", "at least 0, got -1"],
    "--config.control.max_answer=0": ["control.max_answer", "at least 1, got 0"],
    "--config.data.source=files": ["control.caps", "'reasoning', got 'files'"],
}


def refused(*arguments: str) -> str:
    with pytest.raises(settings.InvalidConfig) as found:
        settings.check_command_line(arguments)
    return str(found.value)


def run(*arguments: str, cwd=ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "experiments" / "run.py", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
    )


@pytest.mark.parametrize("argument", MISTAKES)
def test_each_mistake_is_named(argument, tmp_path):
    workdir = tmp_path / "run"
    message = refused(f"--config={TINY}", f"--workdir={workdir}", argument)
    for words in MISTAKES[argument]:
        assert words in message
    assert not workdir.exists()


@pytest.mark.parametrize("argument", CONTROL_MISTAKES)
def test_each_mistake_about_pairs_is_named(argument, tmp_path):
    message = refused(f"--config={CONTROL}", f"--workdir={tmp_path}", argument)
    for words in CONTROL_MISTAKES[argument]:
        assert words in message


def test_without_caps_nothing_is_asked_of_pairs(tmp_path):
    settings.check_command_line(
        [f"--config={TINY}", f"--workdir={tmp_path}", "--config.control.seeds=0"]
    )


def test_mistakes_of_every_kind_come_together_and_nothing_is_written(tmp_path):
    """The process itself: exit code 2, all messages, no stack trace, no workdir."""
    together = [
        "--confg.seed=1",
        "--config.stages.short.stpes=5",
        "--config.save_every=often",
        "--config.budgets.targets=(1.0,0.78,0.01)",
        "--config.modulus=12",
    ]
    workdir = tmp_path / "run"
    done = run(f"--config={TINY}", f"--workdir={workdir}", *together, cwd=tmp_path)
    output = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 2, output
    for argument in together:
        for words in MISTAKES[argument]:
            assert words in output
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_reported_with_the_other_flags(tmp_path):
    workdir = tmp_path / "run"
    missing = TINY.with_name("tinny.py")
    done = run(f"--config={missing}", f"--workdir={workdir}", "--wrokdir=x")
    output = "".join((done.stdout + done.stderr).split())
    assert done.returncode == 2, output
    for words in (f"{missing}:nosuchfile", f"didyoumean{TINY}", "'workdir'"):
        assert words in output
    assert "Traceback" not in output and not workdir.exists()


@pytest.mark.parametrize(
    "text, words",
    [
        ("def get_config(:", "SyntaxError at FILE"),
        ("import nowhere_at_all", "ModuleNotFoundError at FILE:1"),
        ("x = 1", "AttributeError"),
        ("\ndef get_config():\n    return 1 / 0", "ZeroDivisionError at FILE:3"),
        ("def get_config():\n    return {}", "returned dict"),
        (
            "from experiments.configs import base\n"
            "def get_config():\n"
            "    config = base.get_config()\n"
            "    config.save_every = 'often'\n"
            "    return config",
            "TypeError at FILE:4",
        ),
    ],
)
def test_a_file_that_makes_no_configuration_is_named(text, words, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(text)
    message = refused(f"--config={file}", "--workdir=x")
    assert words.replace("FILE", str(file)) in message
    assert "returns a ConfigDict" in message


def test_what_is_laid_over_for_smoke_must_fit(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from experiments.configs import base\n"
        "def get_config():\n"
        "    config = base.get_config()\n"
        "    config.smoke = True\n"
        "    config.when_smoke.update({'save_every': 'often', 'stages': 3})\n"
        "    return config"
    )
    message = refused(f"--config={file}", "--workdir=x")
    assert "when_smoke.save_every: expected int, such as 100, got 'often'" in message
    assert "when_smoke.stages: expected dict" in message


def test_required_flags_are_asked_for():
    message = refused()
    assert "--config=" in message and "--workdir=" in message
    assert "--workdir=" in refused(f"--config={TINY}", "--workdir=")


def test_a_value_of_a_parameter_cannot_be_code(tmp_path):
    trap = tmp_path / "trap"
    code = f"--config.stages.long.sampling=(open({str(trap)!r}, 'w'),)"
    assert "expected tuple" in refused(f"--config={TINY}", "--workdir=x", code)
    assert not trap.exists()


def test_the_experiment_as_it_stands_is_right():
    spec = importlib.util.spec_from_file_location("tiny", TINY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for smoke in (False, True):
        config = module.get_config()
        config.smoke = smoke
        plan = settings.plan(config)
        assert plan.stages[0].router == "train"
        assert (plan.values["parent_training"]["floor"] == 0) == smoke


def test_flags_change_what_is_planned():
    accepted = (
        "--config.stages.short.steps=7",
        "--config.budgets.targets=(1.0,0.8,0.6)",
        "--config.smoke=true",
        "--config.title=another",
    )
    settings.check_command_line([f"--config={TINY}", "--workdir=x", *accepted])
