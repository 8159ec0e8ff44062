"""Reading a configuration: TOML text, then `section.key=value`, into frozen dataclasses (pure)."""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from runtime.config import Config
from runtime.errors import ConfigInvalid
from runtime.models.presets import PRESETS


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One key that a configuration can hold."""

    section: str
    key: str
    kind: object  # its type annotation, resolved
    default: object
    help: str

    @property
    def name(self) -> str:
        """As an override is written."""
        return f"{self.section}.{self.key}"


def catalogue() -> tuple[Setting, ...]:
    """Every setting there is, in the order of the dataclasses."""
    found = []
    for section in dataclasses.fields(Config):
        component = _component(section.name)
        kinds = typing.get_type_hints(component)
        for item in dataclasses.fields(component):
            words = item.metadata.get("help", "")
            kind = kinds[item.name]
            found.append(Setting(section=section.name, key=item.name, kind=kind, default=item.default, help=words))
    return tuple(found)


def read_config(text: str, overrides: Sequence[str] = (), *, source: str = "the configuration") -> Config:
    """The configuration that `text` (TOML) and then each `section.key=value` describe.

    Raises ConfigInvalid: unknown section or key (names the nearest), wrong type or value (shows line or
    override, value, expected), not TOML.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigInvalid(f"not TOML: {error}", where=source) from error
    sections = [field.name for field in dataclasses.fields(Config)]
    known = {item.name: item for item in catalogue()}
    chosen: dict[str, dict[str, object]] = {section: {} for section in sections}
    for section, values in table.items():
        if not isinstance(values, Mapping):
            raise ConfigInvalid(
                f"{section} = {values!r} stands outside a section",
                where=_line(text, source, None, section),
                next=f"write it under one of [{'], ['.join(sections)}]",
            )
        if section not in chosen:
            raise _unknown("section", section, sections, _line(text, source, section, None))
        for key, value in values.items():
            where = _line(text, source, section, key)
            chosen[section][key] = _checked(_find(known, section, key, where), value, where)
    for override in overrides:
        name, equals, written = override.partition("=")
        section, dot, key = name.strip().partition(".")
        if not equals or not dot:
            raise ConfigInvalid(f"{override!r} is not section.key=value", next="for example train.steps=200")
        if section not in chosen:
            raise _unknown("section", section, sections, f"override {override!r}")
        found = _find(known, section, key, f"override {override!r}")
        chosen[section][key] = _checked(found, _spoken(written.strip(), found.kind), f"override {override!r}")
    chosen["model"] = _with_preset(chosen["model"])
    return Config(**{section: _component(section)(**values) for section, values in chosen.items()})


def _component(section: str) -> Any:
    return typing.get_type_hints(Config)[section]


def _with_preset(model: Mapping[str, object]) -> dict[str, object]:
    name = str(model.get("preset", Config().model.preset))
    if name not in PRESETS:
        raise _unknown("preset", name, PRESETS, "model.preset")
    return {"preset": name, **PRESETS[name], **model}


def _find(known: Mapping[str, Setting], section: str, key: str, where: str) -> Setting:
    found = known.get(f"{section}.{key}")
    if found is None:
        siblings = [item.key for item in known.values() if item.section == section]
        elsewhere = [item.name for item in known.values() if item.key == key]
        raise _unknown(f"key in [{section}]", key, siblings, where, elsewhere)
    return found


def _unknown(what: str, name: str, choices: Iterable[str], where: str, elsewhere: Sequence[str] = ()) -> ConfigInvalid:
    names = list(choices)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        advice = f"did you mean {near[0]!r}?"
    elif elsewhere:
        advice = f"did you mean {elsewhere[0]}?"
    else:
        advice = f"there are {', '.join(sorted(names))}"
    return ConfigInvalid(f"unknown {what}: {name!r}", where=where, next=advice)


def _spoken(written: str, kind: object) -> object:
    """The value that an override's text stands for: as in TOML, and bare words are text."""
    if kind is str:
        return written[1:-1] if len(written) > 1 and written[0] == written[-1] and written[0] in "\"'" else written
    try:
        return tomllib.loads(f"value = {written}")["value"]
    except tomllib.TOMLDecodeError:
        return written


def _checked(setting: Setting, value: object, where: str) -> object:
    if setting.kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(setting.kind, type) and type(value) is setting.kind:
        return value
    if typing.get_origin(setting.kind) is Literal and value in typing.get_args(setting.kind):
        return value
    raise ConfigInvalid(
        f"{setting.name} is {value!r} ({type(value).__name__}), expected {describe_kind(setting.kind)}", where=where
    )


def describe_kind(kind: object) -> str:
    """A setting's type in words."""
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(kind))
    names: Mapping[object, str] = types.MappingProxyType(
        {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    )
    return names[kind]


def _line(text: str, source: str, section: str | None, key: str | None) -> str:
    """`file, line n` of a key or a section's header, as far as a scan of the text tells."""
    current: str | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        header = re.match(r"\s*\[\s*([\w.\"'-]+)\s*\]", line)
        if header:
            current = header.group(1).strip("\"'")
            if key is None and current == section:
                return f"{source}, line {number}"
        elif key is not None and current == section and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
            return f"{source}, line {number}"
    return source
