"""config.yaml: a mistake is exit code 2, and the message names the key, the file and the nearest valid one."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nightshift import config
from nightshift.values import Stop

SHIPPED: dict[str, Any] = yaml.safe_load((config.ROOT / "config.yaml").read_text())


def written(path: Path, defaults: dict[str, Any] | None = None, **profiles: Any) -> Path:
    """The file as shipped, with defaults and profiles changed or added."""
    document = {"defaults": SHIPPED["defaults"] | (defaults or {}), "profiles": SHIPPED["profiles"] | profiles}
    path.write_text(yaml.safe_dump(document))
    return path


def refusal(path: Path, profile: str = "demo") -> str:
    with pytest.raises(Stop) as stop:
        config.load(path, profile)
    assert stop.value.code == 2 and str(path) in str(stop.value)
    return str(stop.value)


@pytest.mark.parametrize("profile", sorted(SHIPPED["profiles"]))
def test_every_shipped_profile_loads(profile: str) -> None:
    made = config.load(profile=profile)
    assert made.profile == profile
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.seq_len = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("buget_s", 9.0, "profile 'demo': unknown key 'buget_s'; did you mean 'budget_s'?"),
        ("zzzzzz", 9.0, "unknown key 'zzzzzz'; valid: baselines, budget_s,"),
        (5, 9.0, "profile 'demo': unknown key 5; valid: baselines"),
        (True, 9.0, "profile 'demo': unknown key True; "),
        ("profile", "x", "unknown key 'profile'"),
        ("budget_s", "8 seconds", "budget_s is '8 seconds'; it takes float"),
        ("budget_s", True, "budget_s is True; it takes float"),
        ("budget_s", float("nan"), "budget_s is nan; it takes float"),
        ("budget_s", None, "budget_s is None; it takes float"),
        ("seq_len", 2.5, "seq_len is 2.5; it takes int"),
        ("seq_len", [256], "seq_len is [256]; it takes int"),
        ("max_usd", "none", "max_usd is 'none'; it takes float | null"),
        ("objective", "bpb", "objective is 'bpb'; it takes Literal['val_bpb', 'time_to_target']"),
        ("objective", ["val_bpb"], "objective is ['val_bpb']; it takes"),
        ("prices", {"m": {"input": "4"}}, "prices is {'m': {'input': '4'}}; it takes dict[str, dict[str, float]]"),
    ],
)
@pytest.mark.parametrize("where", ["profile", "defaults"])
def test_a_wrong_entry(tmp_path: Path, key: Any, value: Any, message: str, where: str) -> None:
    entry = {key: value}
    demo = {"demo": SHIPPED["profiles"]["demo"] | entry}
    path = written(tmp_path / "c.yaml", entry) if where == "defaults" else written(tmp_path / "c.yaml", **demo)
    assert message.replace("profile 'demo'", "profile 'demo'" if where == "profile" else "defaults") in refusal(path)


def test_an_unknown_profile_names_the_nearest(tmp_path: Path) -> None:
    path = written(tmp_path / "config.yaml")
    assert refusal(path, "sigle") == f"{path}: no profile 'sigle'; did you mean 'single'?"
    assert "valid: bench, demo, local, local_speedrun, single, speedrun" in refusal(path, "??????")


def test_extends_is_followed_and_must_end(tmp_path: Path) -> None:
    path = written(
        tmp_path / "c.yaml",
        near={"extends": "mid", "seq_len": 7},
        mid={"extends": "demo", "seq_len": 8, "vocab_size": 9},
        a={"extends": "b"},
        b={"extends": "a"},
        lost={"extends": "dmo"},
    )
    near, demo = config.load(path, "near"), config.load(path, "demo")
    assert (near.seq_len, near.vocab_size, near.budget_s) == (7, 9, demo.budget_s)
    assert near == dataclasses.replace(demo, profile="near", seq_len=7, vocab_size=9)
    assert "profile 'a' extends itself through a -> b -> a" in refusal(path, "a")
    assert "no profile 'dmo'; did you mean 'demo'?" in refusal(path, "lost")


def test_flags_override_and_none_is_no_flag(tmp_path: Path) -> None:
    made = config.load(profile="demo", max_experiments=3, max_usd=None, source=None)
    assert (made.max_experiments, made.max_usd, made.source) == (3, None, "python")
    assert config.Config(**made.as_dict()) == made


def test_an_int_passes_for_a_float(tmp_path: Path) -> None:
    path = written(tmp_path / "c.yaml", {"budget_s": 8, "max_usd": 1})
    assert config.load(path, "single").budget_s == 8


def test_a_missing_value_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "c.yaml", bare={})
    assert refusal(path, "bare").endswith(
        "no value for source, vocab_size, seq_len, val_tokens, gpus: add it under defaults"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defaults: [", "not readable as YAML"),
        ("", "the top level holds two keys, defaults and profiles"),
        ("- 1", "the top level holds two keys"),
        ("defaults: {}\nprofiles: {}\nmore: {}", "the top level holds two keys"),
        ("defaults: {}\nprofiles:\n", "profiles is None; it takes a mapping"),
        ("defaults:\nprofiles: {demo: {}}", "defaults is None; it takes a mapping"),
        ("defaults: {}\nprofiles: {demo: [1]}", "profile 'demo' is [1]; it takes a mapping"),
        (
            "defaults: {}\nprofiles: {demo: {extends: [single]}}",
            "extends is ['single']; it takes the name of a profile",
        ),
        ("defaults: {}\nprofiles: {demo: {extends: 5}}", "extends is 5; it takes the name of a profile"),
        ("defaults: {}\nprofiles: {1: {}}", "no profile 'demo'"),
        ("\x00", "not readable as YAML"),
        (b"\xff\xfe\x00\xd8", "not readable as YAML"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in refusal(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "git checkout -- config.yaml" in refusal(tmp_path / "config.yaml")
    assert "Is a directory" in refusal(tmp_path)


YAML = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["demo", "single"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=2),
    max_leaves=3,
)
KEYS = st.sampled_from(["extends", "seq_len", "budget_s", "objective", "prices", "max_usd", "proposer"])


@given(defaults=YAML | st.dictionaries(KEYS, YAML), demo=YAML | st.dictionaries(KEYS, YAML))
@settings(max_examples=50, deadline=None)
def test_any_yaml_is_a_config_or_a_stop(tmp_path_factory: pytest.TempPathFactory, defaults: Any, demo: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    whole = SHIPPED["profiles"]["demo"] | demo if isinstance(demo, dict) else demo
    merged = SHIPPED["defaults"] | defaults if isinstance(defaults, dict) else defaults
    path.write_text(yaml.safe_dump({"defaults": merged, "profiles": {"demo": whole, "single": {}}}))
    try:
        made = config.load(path, "demo")
    except Stop as stop:
        assert stop.code == 2 and str(path) in str(stop)
    else:
        assert type(made.seq_len) is int and math.isfinite(made.budget_s) and type(made.proposer) is str
        assert made.objective in ("val_bpb", "time_to_target") and isinstance(made.prices, dict)


def test_the_command_line_exits_with_2(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "NIGHTSHIFT_DATA": str(tmp_path)}
    argv = [sys.executable, str(config.ROOT / "prepare.py"), "--profile", "sigle"]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "no profile 'sigle'; did you mean 'single'?" in done.stderr and str(config.ROOT) in done.stderr
