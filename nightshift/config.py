"""config.yaml and flags into one frozen Config; a mistake names the key, the file and the nearest valid one."""

from __future__ import annotations

import difflib
import math
import types
import typing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from nightshift.values import Stop

ROOT = Path(__file__).resolve().parent.parent
Objective = Literal["val_bpb", "time_to_target"]


@dataclass(frozen=True)
class Config:
    """Everything a night is run under. A field is a key of config.yaml; the comments there say what each is for."""

    profile: str
    source: str
    vocab_size: int
    seq_len: int
    val_tokens: int
    train_tokens: int | None
    objective: Objective
    budget_s: float
    budget_steps: int | None
    startup_s: float
    gpus: int
    target_loss: float
    baselines: int
    sentinel_every: int
    claim_per_arm: int | None
    sigma0: float
    max_experiments: int | None
    max_hours: float | None
    max_usd: float | None
    proposer: str
    model: str
    max_output_tokens: int
    prices: dict[str, dict[str, float]]

    def as_dict(self) -> dict[str, Any]:
        """The resolved settings, as the journal keeps them."""
        return asdict(self)


def _nearest(word: str, valid: typing.Iterable[str]) -> str:
    names = sorted(valid)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(names)}"


def _accepts(hint: Any, value: Any) -> bool:
    """Whether a YAML value has the type that a field's annotation asks for; an int passes for a float."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return any(_accepts(a, value) for a in args)
    if origin is Literal:
        return value in args
    if origin is dict:
        return isinstance(value, dict) and all(_accepts(args[0], k) and _accepts(args[1], v) for k, v in value.items())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _hint_name(hint: Any) -> str:
    plain = isinstance(hint, type) and not typing.get_args(hint)
    return hint.__name__ if plain else str(hint).replace("typing.", "").replace("None", "null")


def load(path: Path | None = None, profile: str | None = None, **flags: Any) -> Config:
    """The Config of `profile`: the file's `defaults`, then what the profile `extends`, then the profile, then flags.

    Raises Stop with code 2 on an unknown key or profile, or a value of the wrong type. A flag of None is not given.
    """
    path, profile = path or ROOT / "config.yaml", profile or "demo"
    document = _read(path)
    merged = dict(document["defaults"])
    _check(merged, f"{path}: defaults")
    for title, entry in reversed(_chain(document["profiles"], profile, path)):
        _check(entry, f"{path}: profile {title!r}")
        merged |= entry
    given = {k: v for k, v in flags.items() if v is not None}
    _check(given, "flags")
    merged |= given
    missing = [f.name for f in fields(Config) if f.name not in merged and f.name != "profile"]
    if missing:
        raise Stop(f"{path}: no value for {', '.join(missing)}: add it under defaults", 2)
    return Config(profile=profile, **merged)


def _read(path: Path) -> dict[str, dict[Any, Any]]:
    """The file's two mappings."""
    try:
        document = yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        raise Stop(f"{path}: there is no such file; `git checkout -- config.yaml` brings it back", 2) from None
    except OSError as error:
        raise Stop(f"{path}: {error.strerror}", 2) from None
    except (yaml.YAMLError, ValueError) as error:
        raise Stop(f"{path}: not readable as YAML: {' '.join(str(error).split())}", 2) from None
    if not isinstance(document, dict) or set(document) != {"defaults", "profiles"}:
        raise Stop(f"{path}: the top level holds two keys, defaults and profiles", 2)
    for key, value in document.items():
        _must_map(value, f"{path}: {key}")
    return document


def _chain(profiles: dict[Any, Any], profile: str, path: Path) -> list[tuple[str, dict[Any, Any]]]:
    """The profile, what it extends, what that extends, and so on: names and entries."""
    chain: dict[str, dict[Any, Any]] = {}
    name = profile
    while name:
        where = f"{path}: profile {name!r}"
        if name in chain:
            raise Stop(f"{path}: profile {profile!r} extends itself through {' -> '.join([*chain, name])}", 2)
        if name not in profiles:
            raise Stop(f"{path}: no profile {name!r}; {_nearest(name, map(str, profiles))}", 2)
        entry = profiles[name] if profiles[name] is not None else {}
        _must_map(entry, where)
        chain[name] = {key: value for key, value in entry.items() if key != "extends"}
        name = entry.get("extends", "")
        if not isinstance(name, str):
            raise Stop(f"{where}: extends is {name!r}; it takes the name of a profile", 2)
    return list(chain.items())


def _must_map(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise Stop(f"{where} is {value!r}; it takes a mapping of keys to values", 2)


def _check(entry: dict[Any, Any], where: str) -> None:
    hints = typing.get_type_hints(Config)
    hints.pop("profile")
    for key, value in entry.items():
        if key not in hints:
            raise Stop(f"{where}: unknown key {key!r}; {_nearest(str(key), hints)}", 2)
        if not _accepts(hints[key], value):
            raise Stop(f"{where}: {key} is {value!r}; it takes {_hint_name(hints[key])}", 2)
