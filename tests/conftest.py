"""A small prepared data set for every test that trains or scores, and the bench on which the runs are made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from preparations import story

from nightshift import config, data, devices, preparing, sandbox
from nightshift.config import Config
from nightshift.runner import Bench
from nightshift.scorer import Scorer

STARTUP_S = 20.0

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # train.py's kernels on a CPU; Triton asks while train.py is imported


@pytest.fixture(scope="session")
def data_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the session's data set lies, for NIGHTSHIFT_DATA."""
    return tmp_path_factory.mktemp("data-home")


@pytest.fixture(scope="session")
def tiny(data_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A config of 300 words and rows of 32 tokens, whose data set is prepared."""
    corpus = tmp_path_factory.mktemp("corpus")
    (corpus / "stories.jsonl").write_text("\n".join(json.dumps({"text": story(n, 2 + n % 30)}) for n in range(1500)))
    flags = {"source": f"local:{corpus}", "vocab_size": 300, "seq_len": 32, "val_tokens": 2048}
    made = config.load(profile="demo", **flags, budget_s=1.0, startup_s=STARTUP_S)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NIGHTSHIFT_DATA", str(data_home))
        preparing.prepare(made, quiet=True)
    return made


@pytest.fixture(scope="module")
def bench(tiny: Config, data_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The bench of a CPU night on the small data set, in the best sandbox that the machine has."""
    with pytest.MonkeyPatch.context() as patch, devices.lease(0) as lease:
        patch.setenv("NIGHTSHIFT_DATA", str(data_home))
        yield Bench(tiny, data.open_dataset(tiny), lease, sandbox.probe(), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def scorer(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scorer]:
    """One scorer for all runs of a module, as a night has one."""
    with Scorer(bench.config, bench.lease, bench.tier, tmp_path_factory.mktemp("night"), bench.cache) as scorer:
        yield scorer
