"""Key statistics: the second moment C = E[k kᵀ] of an edited module's inputs on text that edits must spare."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .files import replace_file
from .fingerprint import check_fingerprint, is_quantised, model_fingerprint
from .hub_errors import hub_errors
from .hub_names import public_name
from .tiny import is_bundled


STATISTICS_JSON = "key_statistics.json"
STATISTICS_TENSORS = "key_statistics.safetensors"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class KeyStatistics:
    """Second moments of the keys of some modules.

    Args:
        second_moments (`dict[str, torch.Tensor]`): Per module (d_in, d_in), float32, mean of k kᵀ over tokens.
        tokens (`int`): Tokens seen.
        source (`str`): What text, for people.
        fingerprint (`dict`): The base model's, see `fingerprint.py`.
    """

    second_moments: Mapping[str, torch.Tensor]
    tokens: int
    source: str
    fingerprint: Mapping[str, Any]

    def check(self, model: Any, module_names: Sequence[str]) -> None:
        """Whether these are statistics of this model for these modules.

        Raises:
            ValueError: naming the module that is missing, or what differs in the base model.
        """
        for name in module_names:
            if name not in self.second_moments:
                raise ValueError(
                    f"The key statistics cover {sorted(self.second_moments)}, not '{name}': collect them for this "
                    "adapter's modules with collect_statistics."
                )
        actual = model_fingerprint(model, module_names)
        check_fingerprint(self.fingerprint, actual, "The key statistics", quantised=is_quantised(model))

    def subset(self, module_names: Sequence[str]) -> KeyStatistics:
        """The statistics of these modules only."""
        return replace(self, second_moments={name: self.second_moments[name] for name in module_names})

    def merge(self, other: KeyStatistics) -> KeyStatistics:
        """Statistics of both texts together: the mean, weighted by tokens.

        Raises:
            ValueError: if the modules or the base models differ.
        """
        if set(self.second_moments) != set(other.second_moments):
            differ = sorted(set(self.second_moments) ^ set(other.second_moments))
            raise ValueError(
                f"Key statistics of different modules cannot be merged: '{differ[0]}' is in one of them only."
            )
        check_fingerprint(self.fingerprint, other.fingerprint, "The key statistics to merge")
        total = self.tokens + other.tokens
        merged = {
            name: (
                (moment.double() * self.tokens + other.second_moments[name].double() * other.tokens) / total
            ).float()
            for name, moment in self.second_moments.items()
        }
        source = " + ".join(dict.fromkeys(part for part in (self.source, other.source) if part))
        return KeyStatistics(merged, total, source, self.fingerprint)

    # --- files -------------------------------------------------------------------------------------------------

    def save(self, directory: str | os.PathLike) -> None:
        """Writes `key_statistics.safetensors` (upper triangles, float32) and `key_statistics.json`, atomically."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        packed = {
            name: moment[tuple(torch.triu_indices(*moment.shape))].float().cpu().contiguous()
            for name, moment in self.second_moments.items()
        }
        about = {
            "format_version": FORMAT_VERSION,
            "tokens": self.tokens,
            "source": self.source,
            "modules": {name: moment.shape[0] for name, moment in self.second_moments.items()},
            "fingerprint": dict(self.fingerprint),
        }
        replace_file(folder / STATISTICS_TENSORS, lambda path: save_file(packed, path, metadata={"format": "pt"}))
        replace_file(folder / STATISTICS_JSON, lambda path: path.write_text(json.dumps(about, indent=2) + "\n"))

    save_pretrained = save

    @classmethod
    def load(cls, directory: str | os.PathLike) -> KeyStatistics:
        """Reads what `save` wrote and checks it.

        Raises:
            ValueError: naming the file that is missing, truncated or inconsistent, and how.
        """
        folder = Path(directory)
        try:
            about = json.loads((folder / STATISTICS_JSON).read_text(encoding="utf-8"))
            version, modules = about["format_version"], dict(about["modules"])
            tokens, source, fingerprint = int(about["tokens"]), str(about["source"]), dict(about["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _broken(folder / STATISTICS_JSON, repr(error)) from error
        if version != FORMAT_VERSION:
            raise _broken(folder / STATISTICS_JSON, f"format version {version}, this release reads {FORMAT_VERSION}")
        path = folder / STATISTICS_TENSORS
        try:
            with safe_open(path, framework="pt") as file:
                packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError) as error:
            raise _broken(path, str(error)) from error
        if set(packed) != set(modules):
            raise _broken(path, f"it holds {sorted(packed)}, {STATISTICS_JSON} names {sorted(modules)}")
        moments = {}
        for name, size in modules.items():
            triangle = packed[name]
            if triangle.shape != (size * (size + 1) // 2,) or not triangle.is_floating_point():
                raise _broken(path, f"'{name}' has shape {tuple(triangle.shape)}, which is no triangle of {size} rows")
            if not bool(triangle.isfinite().all()):
                raise _broken(path, f"'{name}' holds values that are not finite numbers")
            moment = torch.zeros(size, size, dtype=torch.float32)
            rows, columns = torch.triu_indices(size, size)
            moment[rows, columns] = triangle.float()
            moment[columns, rows] = triangle.float()
            moments[name] = moment
        return cls(moments, tokens, source, fingerprint)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, **hub_kwargs: Any) -> KeyStatistics:
        """From a directory, or from a Hub repository (`revision`, `token`, `cache_dir`, `local_files_only`, …).

        Raises:
            FileNotFoundError: if repository, revision or files are not there.
            PermissionError: if the Hub refuses the token.
            ConnectionError: if the Hub cannot be reached and the cache does not have the files.
            ValueError: if the files are broken, or the name is none of a repository.
        """
        if Path(name_or_path).is_dir():
            return cls.load(name_or_path)
        repo_id = str(name_or_path)
        with hub_errors(repo_id, HfApi().endpoint, hub_kwargs.get("revision")):
            files = [hf_hub_download(repo_id, name, **hub_kwargs) for name in (STATISTICS_JSON, STATISTICS_TENSORS)]
        return cls.load(Path(files[0]).parent)

    def push_to_hub(self, repo_id: str, token: str | None = None, private: bool | None = None) -> str:
        """Uploads both files to a model repository of the Hub and returns the commit's address.

        A base model that was loaded from a directory is named `./` and that directory's name in what is pushed, with
        a warning.

        Raises:
            ValueError: if the name is none of a repository, or the Hub refuses the content.
            PermissionError: if the Hub refuses the token.
            ConnectionError: if the Hub cannot be reached.
            OSError: if the Hub or the disk fails otherwise. In every case the repository's files are as before.
        """
        published, name = self, self.fingerprint.get("name_or_path")
        if name and name != (public := public_name(name)):
            published = replace(self, fingerprint={**self.fingerprint, "name_or_path": public})
            if not is_bundled(name):
                warnings.warn(
                    "The base model of these key statistics was loaded from a directory of this computer, "
                    f"'{name}': '{repo_id}' names it '{public}', which does not tell others what model it is. If it "
                    "is on the Hub, set fingerprint['name_or_path'] of the statistics to its name there, and push "
                    "again.",
                    stacklevel=2,
                )
        api = HfApi(token=token)
        with hub_errors(repo_id, api.endpoint), tempfile.TemporaryDirectory() as folder:
            published.save(folder)
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Key statistics"))


def _broken(path: Path, why: str) -> ValueError:
    return ValueError(
        f"The key statistics file '{path}' cannot be used ({why}): collect or fetch the statistics again."
    )
