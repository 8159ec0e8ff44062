"""Configurations: what is read, and how mistakes are told."""

from __future__ import annotations

import pytest

from runtime.config import Config
from runtime.errors import ConfigInvalid
from runtime.settings import catalogue, read_config


def test_nothing_written_is_the_defaults() -> None:
    assert read_config("").train == Config().train


def test_overrides_win_over_the_file_and_the_file_over_the_preset() -> None:
    config = read_config("[model]\npreset = 'tiny'\nnum_layers = 3\n[train]\nsteps = 5\n", ["train.steps=7"])
    assert (config.model.num_layers, config.model.hidden_size, config.train.steps) == (3, 128, 7)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lr=1", 1.0),
        ("optimizer.lr=3e-4", 3e-4),
        ("parallel.reshard_after_forward=false", False),
        ("parallel.precision=bfloat16", "bfloat16"),
        ("data.source=/some/where", "/some/where"),
        ("output.prompt='def '", "def "),
        ("data.source=12", "12"),
    ],
)
def test_an_override_is_written_as_one_would_expect(override: str, expected: object) -> None:
    section, key = override.partition("=")[0].split(".")
    value = getattr(getattr(read_config("", [override]), section), key)
    assert (value, type(value)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("text", "overrides", "parts"),
    [
        ("\n[train]\nstepz = 3\n", [], ["'stepz'", "a.toml, line 3", "did you mean 'steps'"]),
        ("[trian]\n", [], ["'trian'", "line 1", "'train'"]),
        ("", ["train.step=3"], ["override 'train.step=3'", "did you mean 'steps'"]),
        ("", ["train.lr=3"], ["'lr'", "optimizer.lr"]),
        ("", ["trains.steps=3"], ["'trains'", "'train'"]),
        ("[train]\nsteps = 'many'\n", [], ["train.steps", "'many'", "a whole number", "line 2"]),
        ("[train]\nsteps = true\n", [], ["True", "a whole number"]),
        ("", ["train.steps=2.5"], ["2.5", "a whole number", "override"]),
        ("", ["parallel.precision=float8"], ["'float8'", "'bfloat16'"]),
        ("", ["model.preset=tinny"], ["'tinny'", "'tiny'"]),
        ("", ["steps"], ["'steps'", "section.key=value"]),
        ("steps = 3", [], ["outside a section"]),
        ("[train\n", [], ["not TOML", "a.toml"]),
        ("", ["train.steps=0"], ["train.steps is 0", "at least 1"]),
        ("", ["model.num_heads=3"], ["not a multiple"]),
        ("[steps]\n", [], ["'steps'"]),
    ],
)
def test_a_mistake_is_told_with_place_value_and_what_is_expected(
    text: str, overrides: list[str], parts: list[str]
) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        read_config(text, overrides, source="a.toml")
    for part in parts:
        assert part in str(caught.value)


def test_every_setting_explains_itself() -> None:
    assert all(item.help for item in catalogue())
    assert len({item.name for item in catalogue()}) == len(catalogue()) > 40
