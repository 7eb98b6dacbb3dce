"""What a night and a run read: token shards, packed rows, and the manifest that holds their digests.

A prepared data set is a folder, which appears under its name all at once (nightshift.preparing):

    manifest.json                   settings, counts, and the SHA-256 of every other file
    tokenizer.json                  nightshift.tokenizer
    train_000000.bin ...            token shards, in the NanoGPT speedrun's format
    train_000000.doc_starts.npy     uint32: where in the shard its documents start
    val.npy, test.npy               uint16 [N, seq_len + 1]: the held-out splits, in the rows in which they are scored
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nightshift import config as configuration
from nightshift.config import Config
from nightshift.tokenizer import Tokenizer, Tokens
from nightshift.values import Stop

SHARD_MAGIC, SHARD_VERSION = 20240520, 1
HEADER_BYTES = 1024  # 256 int32: magic, version, number of tokens, zeros
SETTINGS = ("source", "vocab_size", "seq_len", "val_tokens", "train_tokens")  # what of a Config shapes the data


@dataclass(frozen=True)
class Dataset:
    """A prepared data set. `digest` is a SHA-256 over the digests of all its files: it names the data."""

    root: Path
    manifest: dict[str, Any]
    vocab_size: int
    bos_id: int
    seq_len: int
    shards: tuple[Path, ...]
    doc_starts: tuple[Path, ...]
    digest: str
    command: str  # that prepares it

    def rows(self, split: str) -> Tokens:
        """uint16 [N, seq_len + 1], mapped from disk: the rows of "val" or "test"."""
        rows: Tokens = np.load(self.root / f"{split}.npy", mmap_mode="r")
        return rows

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """int32 [vocab_size]: the raw length of each token in bytes; 0 for special tokens."""
        return Tokenizer.load(self.root / "tokenizer.json").token_bytes()


def home() -> Path:
    """Where data sets and downloads lie: NIGHTSHIFT_DATA, or ~/.cache/nightshift."""
    return Path(os.environ.get("NIGHTSHIFT_DATA") or "~/.cache/nightshift").expanduser().absolute()


def local_folder(source: str) -> Path:
    """The DIR of local:DIR; a relative one starts at the root of the repository."""
    return (configuration.ROOT / Path(source.removeprefix("local:")).expanduser()).resolve()


def folder(config: Config) -> Path:
    """Where the data set of `config` lies, prepared or not."""
    name = config.source
    if name.startswith("local:"):
        corpus = local_folder(name)
        name = f"local-{corpus.name}-{hashlib.sha256(os.fsencode(corpus)).hexdigest()[:8]}"
    return home() / f"{name}-v{config.vocab_size}-t{config.seq_len}"


def command(config: Config) -> str:
    """The command that prepares the data of `config`, with the source where the profile's own is another one."""
    parts = ["python", "prepare.py", "--profile", config.profile]
    try:
        usual = configuration.load(profile=config.profile).source
    except Stop:
        usual = config.source
    return shlex.join(parts if config.source == usual else [*parts, "--source", config.source])


def settings(config: Config) -> dict[str, Any]:
    """The part of `config` that the data depends on, as the manifest keeps it."""
    kept = {key: getattr(config, key) for key in SETTINGS}
    if config.source.startswith("local:"):
        kept["source"] = f"local:{local_folder(config.source)}"  # however the profile spells it
    if config.objective == "time_to_target":
        kept["rows"] = "consecutive"
    return kept


def open_dataset(config: Config) -> Dataset:
    """The prepared data set of `config`. Stop, with the command that prepares it, where it is missing or not whole."""
    root, mend = folder(config), command(config)
    try:
        manifest = json.loads((root / "manifest.json").read_text())
    except FileNotFoundError:
        raise Stop(f"no data prepared for source {config.source!r} (looked in {root}): {_ways(config)}") from None
    except (OSError, ValueError) as error:
        raise Stop(f"{root / 'manifest.json'}: not readable ({error}): `{mend}` prepares the data again") from None
    for key, wanted in settings(config).items():
        if (had := manifest["settings"].get(key)) != wanted:
            raise Stop(
                f"{root}: prepared with {key} {had!r}, and {wanted!r} is wanted now: `{mend}` prepares it again; "
                "nights before and after do not compare"
            )
    for name, entry in manifest["files"].items():
        path = root / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise Stop(f"{path}: missing, or its size has changed since it was prepared: `{mend}` prepares it again")
    return Dataset(
        root=root,
        manifest=manifest,
        vocab_size=config.vocab_size,
        bos_id=manifest["bos_id"],
        seq_len=config.seq_len,
        shards=tuple(root / name for name in sorted(manifest["files"]) if name.endswith(".bin")),
        doc_starts=tuple(root / name for name in sorted(manifest["files"]) if name.endswith(".doc_starts.npy")),
        digest=digest(manifest["files"]),
        command=mend,
    )


def _ways(config: Config) -> str:
    if config.source == "python":
        return f"`{command(config)}` prepares it from the source code that this Python carries"
    if config.source.startswith("local:"):
        return f"`{command(config)}` prepares it from {local_folder(config.source)}"
    return f"`{command(config)}` downloads and prepares it; with no network, `python loop.py --profile demo` runs"


def digest(files: dict[str, dict[str, Any]]) -> str:
    """One SHA-256 over the names and digests of a manifest's `files`."""
    lines = [f"{name} {entry['sha256']}\n" for name, entry in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_all(paths: list[Path]) -> list[str]:
    """The SHA-256 of each file, several at a time: hashing lets other threads run."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(sha256, paths))


def verify_digests(dataset: Dataset) -> None:
    """Stop, naming the file, where one is not what was prepared, to the byte."""
    files = dataset.manifest["files"]
    paths = [dataset.root / name for name in files]
    mend = f"`{dataset.command}` prepares it again"
    try:
        found = sha256_all(paths)
    except OSError as error:
        raise Stop(f"{error.filename}: {error.strerror}, though the manifest lists it: {mend}") from None
    for path, entry, actual in zip(paths, files.values(), found, strict=True):
        if actual != entry["sha256"]:
            raise Stop(f"{path}: changed since it was prepared (its SHA-256 differs), so scores do not compare: {mend}")


def read_shard_tokens(source: Path | int) -> Tokens:
    """The tokens of a .bin shard, mapped from disk, by path or by open descriptor (which stays open).

    Stop where the header is wrong or the file holds another number of tokens than it says.
    """
    fd = os.dup(source) if isinstance(source, int) else os.open(source, os.O_RDONLY)
    with os.fdopen(fd, "rb") as file:
        name = f"descriptor {source}" if isinstance(source, int) else str(source)
        header = np.frombuffer(os.pread(fd, 12, 0).ljust(12, b"\0"), dtype=np.int32)
        if header.tolist()[:2] != [SHARD_MAGIC, SHARD_VERSION]:
            raise Stop(f"{name}: not a token shard: it does not begin with {SHARD_MAGIC}, {SHARD_VERSION}")
        count, size = int(header[2]), os.fstat(fd).st_size
        if count < 1 or size != HEADER_BYTES + 2 * count:
            raise Stop(f"{name}: a damaged token shard: its header says {count:,} tokens, the file has {size:,} bytes")
        return np.memmap(file, dtype=np.uint16, mode="r", offset=HEADER_BYTES, shape=(count,))


def write_shard(path: Path, tokens: Tokens) -> None:
    """Writes tokens in the speedrun's .bin format: 256 int32 of header, then uint16."""
    header = np.zeros(HEADER_BYTES // 4, dtype=np.int32)
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    with path.open("wb") as file:
        file.write(header.tobytes())
        file.write(tokens.astype(np.uint16, copy=False).data)
