"""Models from the Hugging Face hub: `owner/repo[:quant]` becomes the paths of a text model and its mmproj.

Follows llama.cpp's `-hf`; where it differs, `choose_model` and `choose_mmproj` say so. Fetching, resuming, caching,
tokens and endpoints are huggingface_hub's (HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE). Knows file names, not what
is in the files.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..arguments import checked
from ..errors import ConfigError, HubError, MissingDependencyError

DEFAULT_QUANTS = ("Q4_K_M", "Q8_0")  # llama.cpp's, in this order; after them the first file
_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_SPLIT = re.compile(r"(?P<prefix>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_QUANT = re.compile(r"[-._]((?:UD-)?I?Q\d\w*|T?Q\d_\d|MXFP4\w*|NVFP4|BF16|F16|F32)$", re.IGNORECASE)
# GGUF files that are not models of their own: calibration data, and draft models of speculative decoding
_NO_MODEL = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
_MMPROJ_TYPES = ("f16", "bf16", "f32", "q8_0")
_log = logging.getLogger(__name__)


class HubFiles(NamedTuple):
    """Local paths of a model: `StarVLM(*fetch("owner/repo"))`.

    Attributes:
        model: The text model; of a split model, the first part.
        mmproj: The mmproj file, or None if not asked for.
    """

    model: Path
    mmproj: Path | None


@checked()
def fetch(spec: str, *, mmproj: bool = True) -> HubFiles:
    """Downloads a text model and its mmproj, or finds them in huggingface_hub's cache.

    Progress is shown on a terminal. Without a network, or with HF_HUB_OFFLINE=1, only cached files are used.

    Args:
        spec: "owner/repo" or "owner/repo:quant". The quant's case does not matter.
        mmproj: False leaves the vision projector out.

    Returns:
        The local paths.

    Raises:
        ConfigError: The spec has another form.
        MissingDependencyError: huggingface_hub is not installed.
        HubError: The repository, quant or mmproj does not exist, access is refused, there is neither a network nor a
            cached file, or the disk is full.
    """
    repo, _, quant = spec.partition(":")
    if not _REPO.fullmatch(repo) or (":" in spec and not re.fullmatch(r"[\w.-]+", quant)):
        raise ConfigError(
            f"{spec!r} does not name a repository of the hub",
            "write owner/repo or owner/repo:quant, such as owner/repo:Q4_K_M",
        )
    try:
        import huggingface_hub  # noqa: F401 - imported here because most runs need none of it
    except ImportError as error:
        raise MissingDependencyError(
            "models from the hub need huggingface_hub", 'pip install "star-edge[hub]"'
        ) from error
    cached = _offline()
    files = None if cached else _list_online(repo)
    if files is None:
        cached = True
        files = _list_cached(repo)
    where = f"{repo} (cached files only)" if cached else repo
    wanted = choose_model(files, quant, where)
    projector = choose_mmproj(files, wanted[0], where) if mmproj else None
    paths = [_download(repo, name, cached) for name in [*wanted, *([projector] if projector else [])]]
    return HubFiles(paths[0], paths[-1] if projector else None)


# ---- which files ----


def choose_model(files: Sequence[str], quant: str, repo: str) -> list[str]:
    """The text model among a repository's files.

    As in llama.cpp, it is the first file whose name has the quant before a "." or "-". Without a quant it is Q4_K_M,
    else Q8_0, else the first file. Unlike in llama.cpp, a quant must not begin inside a word: F16 does not match BF16.

    Returns:
        One name, or the names of all parts of a split model, in order.

    Raises:
        HubError: There is no such model (the message names those that exist), or parts of it are missing.
    """
    firsts = [name for name in sorted(files) if _is_model(name) and _part(name)[1] == 1]
    if not firsts:
        ggufs = [name for name in sorted(files) if name.lower().endswith(".gguf")]
        there = f"it has {_some(ggufs)}" if ggufs else f"it has {_some(sorted(files))}" if files else "it is empty"
        raise HubError(f"{repo} has no text model in GGUF form: {there}", "choose a repository with GGUF files")
    for tag in (quant,) if quant else DEFAULT_QUANTS:
        pattern = re.compile(rf"(?<![A-Za-z0-9]){re.escape(tag)}[./-]", re.IGNORECASE)
        found = next((name for name in firsts if pattern.search(name)), None)
        if found:
            break
    else:
        if quant:
            raise HubError(f"{repo} has no {quant}", f"it has {_some(list(dict.fromkeys(map(_quant_name, firsts))))}")
        found = firsts[0]
    prefix, _, count = _part(found)
    parts = {_part(name)[1]: name for name in files if _is_model(name) and _part(name)[::2] == (prefix, count)}
    missing = [i for i in range(1, count + 1) if i not in parts]
    if missing:
        raise HubError(
            f"{repo} has {len(parts)} of the {count} parts of {found}",
            "connect to the network, or choose another quant or repository",
        )
    return [parts[i] for i in range(1, count + 1)]


def choose_mmproj(files: Sequence[str], model: str, repo: str) -> str:
    """The mmproj of a text model: in its folder, or in the nearest folder above it, as in llama.cpp.

    Of several, f16 is taken, else bf16, f32, q8_0, or the first. llama.cpp instead takes the one whose bits are nearest
    to the text model's, such as q8_0 beside Q4_K_M. An encoder is small, and all image tokens depend on its precision.

    Raises:
        HubError: There is none. The message names files that lie elsewhere.
    """
    every = [
        name
        for name in sorted(files)
        if name.lower().endswith(".gguf") and "mmproj" in PurePosixPath(name).name.lower()
    ]
    for folder in PurePosixPath(model).parents:
        here = [name for name in every if PurePosixPath(name).parent == folder]
        if here:
            return min(here, key=_mmproj_rank)
    if every:
        raise HubError(
            f"{repo} has no mmproj beside {model}: there is {_some(every)}",
            f"`hf download {repo.split()[0]} {every[0]}`, and give its path with --mmproj",
        )
    ggufs = [name for name in sorted(files) if name.lower().endswith(".gguf")]
    raise HubError(
        f"{repo} has no mmproj: it has {_some(ggufs)}", "give another with --mmproj FILE, or --no-mmproj for text alone"
    )


def _is_model(name: str) -> bool:
    base = PurePosixPath(name).name.lower()
    return base.endswith(".gguf") and not any(word in base for word in _NO_MODEL)


def _part(name: str) -> tuple[str, int, int]:
    """Name without the part's number, the number, and the number of parts. A single file is (name, 1, 1)."""
    split = _SPLIT.fullmatch(name)
    return (split["prefix"], int(split["index"]), int(split["count"])) if split else (name, 1, 1)


def _quant_name(name: str) -> str:
    """What to write after the colon for a model file, or its whole name if it does not end in a quant."""
    prefix, _, count = _part(name)
    stem = prefix if count > 1 else name[: -len(".gguf")]
    quant = _QUANT.search(stem)
    return quant[1] if quant else name


def _mmproj_rank(name: str) -> int:
    words = re.split(r"[-.]", PurePosixPath(name).name.lower())
    return next((rank for rank, kind in enumerate(_MMPROJ_TYPES) if kind in words), len(_MMPROJ_TYPES))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


# ---- the hub ----


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _list_online(repo: str) -> list[str] | None:
    """Names of all files; None, with a warning, if the hub does not answer."""
    from huggingface_hub import HfApi, constants

    try:
        info = HfApi().model_info(repo, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (
        Exception
    ) as error:  # without a network: the HTTP library's own, another one in each major version of huggingface_hub
        if refusal := _refusal(repo, error):
            raise refusal from error
        _log.warning("%s gives no answer (%s): looking in the cache", constants.ENDPOINT, _short(error))
        return None
    return [file.rfilename for file in info.siblings or []]


def _list_cached(repo: str) -> list[str]:
    """Names of the files of branch "main" that are in the cache."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    remedy = "connect to the network, or set HF_HOME to where the model was downloaded"
    try:
        repos = [r for r in scan_cache_dir().repos if r.repo_type == "model" and r.repo_id == repo]
    except CacheNotFound:
        repos = []
    revisions = [revision for r in repos for revision in r.revisions if "main" in revision.refs and revision.files]
    if not revisions:
        raise HubError(f"{repo} is not in the cache, and the hub cannot be reached", remedy)
    snapshot = revisions[0].snapshot_path
    return [file.file_path.relative_to(snapshot).as_posix() for file in revisions[0].files]


def _download(repo: str, name: str, cached: bool) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, name, local_files_only=cached))
    except Exception as error:  # as above
        if refusal := _refusal(repo, error):
            raise refusal from error
        if isinstance(error, OSError) and error.strerror:
            raise HubError(
                f"{name} cannot be written ({error.strerror})", "free some space, or set HF_HOME to another folder"
            ) from error
        raise HubError(
            f"{name} of {repo} cannot be fetched ({_short(error)})", "try again, or look at the network"
        ) from error


def _refusal(repo: str, error: Exception) -> HubError | None:
    """The error for an answer that would not change if asked again; None for any other error."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, errors.GatedRepoError):
        return HubError(f"{repo} is gated", f"ask for access at {page}, then set HF_TOKEN (or `hf auth login`)")
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"{constants.ENDPOINT} has no model {repo}, or it is private",
            "check the name; for a private one set HF_TOKEN (or `hf auth login`)",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{repo} has no branch main", "choose another repository")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return HubError(
            f"{constants.ENDPOINT} refuses access to {repo} (HTTP {status})", "check HF_TOKEN (or `hf auth login`)"
        )
    return None


def _short(error: Exception) -> str:
    """The first line of a message. HTTP libraries write several."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
