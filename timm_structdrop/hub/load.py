"""Loading a model from the Hub with proof that its files are the ones that were pushed."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HTTPError
from huggingface_hub.hf_api import RepoSibling
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
class PushedFiles:
    """The files of one commit.

    Attributes:
        api: knows the token.
        repo_id: user/name.
        commit: the commit's hash.
        listed: what the Hub says of each file, by name: its SHA-256 if it is an LFS file, or else
            the SHA-1 of ``blob <size>\\0`` and the content; None where the Hub was not asked.
    """

    api: HfApi
    repo_id: str
    commit: str
    listed: dict[str, RepoSibling] | None = None

    def fetch(self, name: str, force: bool = False) -> Path:
        """A file from the cache, or downloaded into it."""
        path = self.api.hf_hub_download(
            self.repo_id,
            name,
            revision=self.commit,
            force_download=force,
            local_files_only=self.listed is None,
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
        files = _resolve(HfApi(token=token), repo_id, revision)
        _refuse_pickles(files)
        config_path = _verified(files, CONFIG, None)
        config = _read_config(config_path, repo_id)
        weights = _verified(files, WEIGHTS, config.get("sha256"))
    if weights.parent != config_path.parent:
        raise UserError(f"config and weights must be of one commit; got {config_path}, {weights}")
    _check_config(config, repo_id)
    try:
        model = timm.create_model(f"local-dir:{weights.parent}", pretrained=True, **model_kwargs)
    except (SafetensorError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{repo_id} does not give a model: {one_line(error)}") from error
    source = {"hf_hub_id": f"{repo_id}@{files.commit}", "source": "hf-hub"}
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


def _resolve(api: HfApi, repo_id: str, revision: str) -> PushedFiles:
    """The commit that a revision stands for, and what the Hub knows of its files."""
    try:
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
    except (HTTPError, OSError) as error:
        cached = try_to_load_from_cache(repo_id, CONFIG, revision=revision)
        if not is_away(error) or not isinstance(cached, str):
            raise
        commit = Path(cached).parent.name
        _logger.warning(f"The Hub cannot be reached: {repo_id} is taken from the cache, {commit}")
        return PushedFiles(api, repo_id, commit)
    listed = {file.rfilename: file for file in info.siblings or []}
    return PushedFiles(api, repo_id, str(info.sha), listed)


def _refuse_pickles(files: PushedFiles) -> None:
    if files.listed is None or WEIGHTS in files.listed:
        return
    pickles = [name for name in files.listed if name.endswith(PICKLES)]
    if pickles:
        raise UserError(
            f"{files.repo_id} must have {WEIGHTS}; it has {pickles[0]}, and unpickling that can "
            "run code"
        )
    raise UserError(f"{files.repo_id} must have {WEIGHTS}; it has {', '.join(files.listed)}")


def _verified(files: PushedFiles, name: str, stated: str | None) -> Path:
    """The path of a file whose content is the stated one."""
    path = files.fetch(name)
    wrong = _wrong(path, files, name, stated)
    if wrong and files.listed is not None:
        _logger.warning(f"{path} is not what was pushed ({wrong}); it is downloaded again")
        path = files.fetch(name, force=True)
        wrong = _wrong(path, files, name, stated)
    if not wrong:
        return path
    for bad in (path.resolve(), path):
        bad.unlink(missing_ok=True)
    raise UserError(
        f"{path} is not the {name} that was pushed to {files.repo_id} ({wrong}); it has been "
        "removed from the cache: try again, and if that does not help, push the model again"
    )


def _wrong(path: Path, files: PushedFiles, name: str, stated: str | None) -> str:
    """What does not agree; empty if all does."""
    told = (files.listed or {}).get(name)
    lfs = told.lfs if told is not None else None
    wanted = [sha256 for sha256 in (stated, lfs and lfs.sha256) if sha256]
    if wanted:
        found = file_sha256(path)
        differs = [sha256 for sha256 in wanted if sha256 != found]
        return f"its SHA-256 is {found}, not {differs[0]}" if differs else ""
    if told is not None and told.blob_id:
        content = path.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return f"its git hash is {found}, not {told.blob_id}" if found != told.blob_id else ""
    if name == WEIGHTS:
        raise UserError(
            f"{files.repo_id} cannot be verified: its config states no SHA-256, and the Hub "
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
