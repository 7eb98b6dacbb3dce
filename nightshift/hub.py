"""Files of the Hugging Face hub, through huggingface_hub: it resumes downloads and keeps them in the data home.

HF_ENDPOINT and the library's other environment variables apply.
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

from nightshift import data
from nightshift.config import Config
from nightshift.values import Stop


def fetch(config: Config, repo: str, names: list[str], repo_type: str = "dataset", quiet: bool = False) -> list[Path]:
    """The files `names` of `repo`, downloaded where they are not here already, checked where the hub tells a SHA-256.

    Stop, in one line, where one cannot be had; a damaged one is removed first, so that the command fetches it again.
    The hub library carries on after a connection drops, not after its process is gone: then that file starts over.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError, RemoteEntryNotFoundError  # type: ignore[attr-defined]
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings are of retries, which are its affair
    (disable_progress_bars if quiet or not sys.stderr.isatty() else enable_progress_bars)()
    cache, paths = data.home() / "hub", []
    try:
        _probe(cache, repo, names, repo_type)
        for name in names:
            paths.append(Path(hf_hub_download(repo, name, repo_type=repo_type, cache_dir=cache)))
            blob = paths[-1].resolve()  # the cache names a large file by its SHA-256, a small one by its git hash
            if re.fullmatch("[0-9a-f]{64}", blob.name) and data.sha256(blob) != blob.name:
                raise damaged(config, paths[-1], "its SHA-256 is not what the hub published")
    except RemoteEntryNotFoundError as error:
        missing = error.response.url.path.rpartition("/")[2]
        raise Stop(f"{config.source}: the hub's {repo} has no file {missing}; {_without()}") from None
    except (OSError, HTTPError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise Stop(
            f"{config.source}: {repo} did not arrive from the hub ({cause}): "
            f"`{data.command(config)}` tries again; {_without()}"
        ) from None
    return paths


def _probe(cache: Path, repo: str, names: list[str], repo_type: str) -> None:
    """Asks the hub once for the first missing file: without a network, hf_hub_download tries for half a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    for name in names:
        if not isinstance(try_to_load_from_cache(repo, name, cache_dir=cache, repo_type=repo_type), str):
            get_hf_file_metadata(hf_hub_url(repo, name, repo_type=repo_type))
            return


def remove_leftovers() -> None:
    """Removes what killed downloads left behind; nobody else may be downloading."""
    for path in (data.home() / "hub").glob("*/blobs/*.incomplete"):
        path.unlink()


def damaged(config: Config, path: Path, fault: str) -> Stop:
    """Removes a downloaded file that is not what it should be, and says so."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    again = f"`{data.command(config)}` fetches it again"
    return Stop(f"{path.name} of {config.source} is damaged and was removed ({fault}): {again}")


def _without() -> str:
    return "without a network, `python prepare.py --profile demo` prepares text that Python carries"
