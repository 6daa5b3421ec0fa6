"""Loading a model from the Hub with proof that its files are the ones that were pushed."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from torch import nn

from timm_structdrop.errors import UserError, nearest, one_line
from timm_structdrop.hub.export import CONFIG, WEIGHTS, file_sha256
from timm_structdrop.hub.failures import hub_errors, is_away

__all__ = ["load_verified"]

_logger = logging.getLogger(__name__)

PICKLES = (".bin", ".pth", ".pt", ".pkl", ".ckpt", ".tar")
# What a config may not set: other files of weights, and ways to load only a part of them.
FOREIGN_SOURCES = ("file", "hf_hub_filename", "state_dict")
LOADING_ARGUMENTS = ("checkpoint_path", "cache_dir", "pruned", "kwargs_filter")


@dataclass(frozen=True)
class Snapshot:
    """The files of one commit.

    Attributes:
        api: knows the token.
        repo_id: user/name.
        commit: the commit's hash.
        files: names of all files; None where the Hub could not be asked.
        sha256: what the Hub says of its LFS files, by name.
        git_oid: the same of its other files: SHA-1 of ``blob <size>\\0`` and the content.
    """

    api: HfApi
    repo_id: str
    commit: str
    files: tuple[str, ...] | None = None
    sha256: dict[str, str] = field(default_factory=dict)
    git_oid: dict[str, str] = field(default_factory=dict)

    def fetch(self, name: str, force: bool = False) -> Path:
        """A file from the cache, or downloaded into it."""
        path = self.api.hf_hub_download(
            self.repo_id,
            name,
            revision=self.commit,
            force_download=force,
            local_files_only=self.files is None,
        )
        return Path(path)


def load_verified(
    repo_id: str, revision: str | None = None, token: str | None = None, **model_kwargs: Any
) -> nn.Module:
    """``timm.create_model("hf-hub:<repo_id>", pretrained=True)`` with the files checked.

    ``config.json`` and ``model.safetensors`` come from one commit. The weights must have the
    SHA-256 that the config states and the one the Hub states of them; a cached file that has not
    is downloaded once more. Without the Hub, files that are in the cache are checked against the
    config alone.

    Args:
        repo_id: ``user/name`` or ``user/name@revision``.
        revision: a branch, a tag or a commit; ``main`` if None.
        token: for a private repository; None for the one that ``hf auth login`` stored, or
            ``HF_TOKEN``.
        model_kwargs: keywords of ``timm.create_model``; ``num_classes`` gives another classifier.

    Returns:
        The model, in training mode as always with timm.

    Raises:
        UserError: there is no such repository, revision or model; the repository has only pickled
            weights; a file is not the one that was pushed; the Hub cannot be reached.
    """
    repo_id, revision = _split(repo_id, revision)
    with hub_errors("load", repo_id):
        snapshot = _resolve(HfApi(token=token), repo_id, revision)
        _refuse_pickles(snapshot)
        config_path = _verified(snapshot, CONFIG, None)
        config = _read_config(config_path, repo_id)
        weights = _verified(snapshot, WEIGHTS, config.get("sha256"))
    if weights.parent != config_path.parent:
        raise UserError(f"config and weights must be of one commit; got {config_path}, {weights}")
    _check_config(config, repo_id)
    try:
        model = timm.create_model(f"local-dir:{weights.parent}", pretrained=True, **model_kwargs)
    except (SafetensorError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{repo_id} does not give a model: {one_line(error)}") from error
    source = {"hf_hub_id": f"{repo_id}@{snapshot.commit}", "source": "hf-hub"}
    known = {key: value for key, value in model.pretrained_cfg.items() if key != "file"}
    model.pretrained_cfg = model.default_cfg = {**known, **source}
    return model


def _split(repo_id: str, revision: str | None) -> tuple[str, str]:
    name, at, own = repo_id.removeprefix("hf-hub:").partition("@")
    if at and revision is not None and own != revision:
        raise UserError(f"a revision is given once; got {own!r} and {revision!r}")
    if name.count("/") != 1 or (at and not own):
        raise UserError(f"a repository is named user/name or user/name@revision; got {repo_id!r}")
    return name, own or revision or "main"


def _resolve(api: HfApi, repo_id: str, revision: str) -> Snapshot:
    """The commit that a revision stands for, and what the Hub knows of its files."""
    try:
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
    except (HTTPError, OSError) as error:
        cached = _cached_commit(api, repo_id, revision) if is_away(error) else None
        if cached is None:
            raise
        _logger.warning(f"The Hub cannot be reached: {repo_id} is taken from the cache, {cached}")
        return Snapshot(api, repo_id, cached)
    files = info.siblings or []
    return Snapshot(
        api,
        repo_id,
        str(info.sha),
        tuple(file.rfilename for file in files),
        {file.rfilename: file.lfs.sha256 for file in files if file.lfs is not None},
        {file.rfilename: file.blob_id for file in files if file.lfs is None and file.blob_id},
    )


def _cached_commit(api: HfApi, repo_id: str, revision: str) -> str | None:
    try:
        path = api.hf_hub_download(repo_id, CONFIG, revision=revision, local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(path).parent.name


def _refuse_pickles(snapshot: Snapshot) -> None:
    if snapshot.files is None or WEIGHTS in snapshot.files:
        return
    pickles = [name for name in snapshot.files if name.endswith(PICKLES)]
    if pickles:
        raise UserError(
            f"{snapshot.repo_id} must have {WEIGHTS}; it has {pickles[0]}, and unpickling that can "
            "run code"
        )
    raise UserError(f"{snapshot.repo_id} must have {WEIGHTS}; it has {', '.join(snapshot.files)}")


def _verified(snapshot: Snapshot, name: str, stated: str | None) -> Path:
    """A file of the snapshot whose content is the stated one."""
    path = snapshot.fetch(name)
    wrong = _wrong(path, snapshot, name, stated)
    if wrong and snapshot.files is not None:
        _logger.warning(f"{path} is not what was pushed ({wrong}); it is downloaded again")
        path = snapshot.fetch(name, force=True)
        wrong = _wrong(path, snapshot, name, stated)
    if not wrong:
        return path
    for bad in (path.resolve(), path):
        bad.unlink(missing_ok=True)
    raise UserError(
        f"{path} is not the {name} that was pushed to {snapshot.repo_id} ({wrong}); it has been "
        "removed from the cache: try again, and if that does not help, push the model again"
    )


def _wrong(path: Path, snapshot: Snapshot, name: str, stated: str | None) -> str:
    """What does not agree; empty if all does."""
    wanted = [hash_ for hash_ in (stated, snapshot.sha256.get(name)) if hash_]
    if wanted:
        found = file_sha256(path)
        differs = [hash_ for hash_ in wanted if hash_ != found]
        return f"its SHA-256 is {found}, not {differs[0]}" if differs else ""
    if name in snapshot.git_oid:
        content = path.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        wanted_oid = snapshot.git_oid[name]
        return f"its git hash is {found}, not {wanted_oid}" if found != wanted_oid else ""
    if name == WEIGHTS:
        raise UserError(
            f"{snapshot.repo_id} cannot be verified: its config states no SHA-256, and the Hub "
            "cannot be asked"
        )
    return ""


def _read_config(path: Path, repo_id: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{repo_id} must have a {CONFIG} of timm; {path} is not JSON") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise UserError(f"{repo_id} must have a {CONFIG} of timm; {path} names no architecture")
    if not isinstance(config.get("sha256", ""), str):
        raise UserError(f"sha256 in {path} must be text; got {config['sha256']!r}")
    return config


def _check_config(config: dict[str, Any], repo_id: str) -> None:
    """A config describes a model; it does not say where else weights are, or to load only some."""
    name = config["architecture"]
    if not timm.is_model(name):
        hint = nearest(name, timm.list_models())
        raise UserError(f"{repo_id} is a {name!r}, no model of timm{hint}")
    given = config.get("pretrained_cfg", config)
    arguments = config.get("model_args") or {}
    if not isinstance(given, dict) or not isinstance(arguments, dict):
        raise UserError(f"pretrained_cfg and model_args of {repo_id} must be mappings")
    foreign = [key for key in FOREIGN_SOURCES if given.get(key)]
    foreign += [k for k in arguments if k in LOADING_ARGUMENTS or k.startswith("pretrained")]
    if foreign:
        raise UserError(
            f"the {CONFIG} of {repo_id} must not say where weights come from or how they are "
            f"loaded; it has {', '.join(foreign)}"
        )
