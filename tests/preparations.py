"""Data sets prepared in processes of their own, and read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nightshift import config, data, tokenizer

PREPARE = """
import json, sys
from nightshift import config, data, preparing
from nightshift.values import Stop
try:
    print(preparing.prepare(config.load(**json.loads(sys.argv[1]))).digest)
except Stop as stop:
    print(stop, file=sys.stderr)
    sys.exit(stop.code)
"""
SMALL: dict[str, Any] = {"profile": "demo", "vocab_size": 300, "seq_len": 32, "val_tokens": 320}


def start(flags: dict[str, Any], home: Path, hub_url: str = "") -> subprocess.Popen[str]:
    """A process that prepares; without a hub, nobody answers there."""
    env = dict(os.environ) | {"NIGHTSHIFT_DATA": str(home), "HF_ENDPOINT": hub_url or "http://127.0.0.1:9"}
    argv = [sys.executable, "-c", PREPARE, json.dumps(flags)]
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, cwd=config.ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def prepare(flags: dict[str, Any], home: Path, hub_url: str = "") -> tuple[int, str, str]:
    """Return code, standard output and standard error of a whole preparation."""
    process = start(flags, home, hub_url)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def opened(flags: dict[str, Any], home: Path, monkeypatch: pytest.MonkeyPatch) -> data.Dataset:
    monkeypatch.setenv("NIGHTSHIFT_DATA", str(home))
    dataset = data.open_dataset(config.load(**flags))
    data.verify_digests(dataset)
    return dataset


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def train_text(dataset: data.Dataset) -> list[str]:
    """The training documents, decoded, split at doc_starts."""
    decode = tokenizer.Tokenizer.load(dataset.root / "tokenizer.json").encoding.decode
    texts = []
    for shard, starts in zip(dataset.shards, dataset.doc_starts, strict=True):
        tokens = data.read_shard_tokens(shard)
        for document in np.split(tokens, np.load(starts)[1:]):
            assert document[0] == dataset.bos_id
            texts.append(decode(document[1:].tolist()))
    return texts


def story(number: int, words: int = 40) -> str:
    return " ".join(f"word{(number * 7 + n * n) % 97}" for n in range(words)) + f". The end of {number}, naïvely 😀.\n"


def parquet(path: Path, texts: list[str | None]) -> bytes:
    pq.write_table(pa.table({"text": texts, "other": list(range(len(texts)))}), path, row_group_size=50)
    return path.read_bytes()
