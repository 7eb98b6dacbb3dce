"""config.yaml and flags into one frozen Config; a mistake names the key, the file and the nearest valid one."""

from __future__ import annotations

import difflib
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
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _hint_name(hint: Any) -> str:
    return str(getattr(hint, "__name__", hint)).replace("typing.", "").replace("NoneType", "null")


def load(path: Path | None = None, profile: str | None = None, **flags: Any) -> Config:
    """The Config of `profile`: the file's `defaults`, then what the profile `extends`, then the profile, then flags.

    Raises Stop with code 2 on an unknown key or profile, or a value of the wrong type. A flag of None is not given.
    """
    path = path or ROOT / "config.yaml"
    try:
        document = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise Stop(f"{path}: there is no such file; `git checkout -- config.yaml` brings it back", 2) from None
    except yaml.YAMLError as error:
        raise Stop(f"{path}: not readable as YAML: {' '.join(str(error).split())}", 2) from None
    if not isinstance(document, dict) or set(document) != {"defaults", "profiles"}:
        raise Stop(f"{path}: the top level holds two keys, defaults and profiles", 2)
    profiles = document["profiles"]
    chain: list[dict[str, Any]] = []
    name = profile or "demo"
    seen: list[str] = []
    while name:
        if name not in profiles:
            raise Stop(f"{path}: no profile {name!r}; {_nearest(name, profiles)}", 2)
        if name in seen:
            raise Stop(f"{path}: profile {name!r} extends itself through {' -> '.join(seen)}", 2)
        seen.append(name)
        entry = dict(profiles[name] or {})
        name = entry.pop("extends", "")
        chain.append(entry)
    merged = dict(document["defaults"])
    _check(merged, f"{path}: defaults")
    for entry, title in zip(reversed(chain), reversed(seen), strict=True):
        _check(entry, f"{path}: profile {title!r}")
        merged |= entry
    merged |= {k: v for k, v in flags.items() if v is not None}
    missing = [f.name for f in fields(Config) if f.name not in merged and f.name != "profile"]
    if missing:
        raise Stop(f"{path}: no value for {', '.join(missing)}: add it under defaults", 2)
    return Config(profile=profile or "demo", **merged)


def _check(entry: dict[str, Any], where: str) -> None:
    hints = typing.get_type_hints(Config)
    hints.pop("profile")
    for key, value in entry.items():
        if key not in hints:
            raise Stop(f"{where}: unknown key {key!r}; {_nearest(key, hints)}", 2)
        if not _accepts(hints[key], value):
            raise Stop(f"{where}: {key} is {value!r}; it takes {_hint_name(hints[key])}", 2)
