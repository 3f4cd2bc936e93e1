"""The command line as a whole: quick help, nothing heavy at import, mistakes as sentences."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from zsr.cli.main import explain, main
from zsr.config import ConfigError

HEAVY = ("torch", "ray", "mlflow", "optuna", "open_clip", "boto3", "pydantic", "numpy")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zsr.cli.main", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    code = f"import sys, zsr.cli.main; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_help_is_quick() -> None:
    # Processor seconds, not those on the clock: other tests run at the same time. Half a second on the clock is the aim,
    # a quarter is usual; the bound leaves room for a slow machine and catches an import of torch.
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 1.0


def test_help_names_every_command() -> None:
    text = run("--help").stdout
    for command in ("train", "sweep", "eval", "data", "config", "doctor", "export", "version"):
        assert f" {command} " in text


@pytest.mark.parametrize(
    "command",
    ["train", "sweep", "eval", "data convert", "data verify", "data info", "data sample", "config show", "config diff"]
    + ["config validate", "config schema", "config presets", "doctor", "export"],
)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    assert "Usage: zsr" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["config", "show", "dmeo"], "did you mean 'demo'"),
        (["train", "--local", "attack.eps=4"], "write 4/255"),
        (["train", "--local", "--preset", "nowhere/run.yaml"], "there is no such file"),
        (["sweep", "nothing"], "is not a sweep file"),
        (["export", "nowhere", "--out", "x"], "there is no such folder"),
        (["eval", "--model", "zsr:emoji-vit", "--eps", "x"], "should be a number or a fraction"),
        (["eval", "--model", "zsr:emoji-vit", "--template", "photo"], "needs {}"),
        (["data", "info", "zsr:emoji/nothing"], "there is no embedded set"),
    ],
)
def test_a_users_mistake_is_a_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert sentence in said
    assert "Traceback" not in said


def test_debug_shows_the_traceback() -> None:
    done = run("--debug", "config", "show", "dmeo")
    assert "Traceback" in done.stderr
    assert done.returncode == 1


def test_what_is_explained_and_what_is_not() -> None:
    assert explain(ConfigError(["one", "two"])) == ["one", "two"]
    assert explain(FileNotFoundError(2, "No such file or directory", "x.yaml")) == ["x.yaml: No such file or directory"]
    assert explain(ModuleNotFoundError("", name="ray.train")) == ["ray.train is not installed; pip install 'zsr[ray]'"]
    assert explain(ModuleNotFoundError("", name="zsr.typo")) == []
    assert explain(KeyError("a bug")) == []
    assert explain(OSError("the disk is full")) == []


def test_a_sweep_file_gets_its_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "try_sweep.py"
    file.write_text("import sys\nif __name__ == '__main__':\n    print(sys.argv[1:])\n")
    with pytest.raises(SystemExit):
        main(["sweep", str(file), "--num-trials", "2", "--help", "seed=1"])
    assert capsys.readouterr().out.strip() == "['--num-trials', '2', '--help', 'seed=1']"
