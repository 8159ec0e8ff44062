"""The command line of the runtime, before any training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import runtime.__main__ as command
from runtime.settings import catalogue, read_config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.toml"], "cannot read the configuration"),
        (["examples/tiny.toml", "train.stepz=3"], "did you mean 'steps'"),
        (["examples/tiny.toml", "--jsn"], "unknown option '--jsn'"),
        (["a.toml", "b.toml"], "2 configuration files given"),
        (["train.steps=3"], "0 configuration files given"),
        (["examples/tiny.toml", "layout.replicate=3", "layout.shard=1"], "replicate 3 x shard 1 = 3 ranks"),
        (["examples/tiny.toml", "data.source=/nowhere"], "no such file or directory"),
    ],
)
def test_a_wrong_command_exits_with_2_and_says_why(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    extra = [f"output.directory={tmp_path}"] if words[0].startswith("examples") else []
    assert command.main([*words, *extra]) == 2
    assert message in capsys.readouterr().err


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {item.name}=" in text for item in catalogue())
    assert "torchrun" in text


def test_help_and_mistakes_do_not_wait_for_torch() -> None:
    code = (
        "import sys, runtime.__main__ as command\n"
        "assert command.main(['--help']) == 0\n"
        "assert command.main(['examples/tiny.toml', 'train.stepz=1']) == 2\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_examples_are_valid() -> None:
    examples = sorted(Path("examples").glob("*.toml"))
    assert examples
    for path in examples:
        read_config(path.read_text(), source=str(path))
