"""A folder of bundles: `NAME/` or `NAME/VERSION/`.

Scanning reads every model.toml but no weights, so it is cheap enough to repeat; `fingerprint` tells
whether a bundle's files have changed since. One broken bundle is a problem on the list and hides
none of the others.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from conveyor.os_errors import os_reason
from conveyor_models.bundle import (
    SPEC_FILE,
    WEIGHTS_FILE,
    Bundle,
    load_bundle,
    load_spec,
    save_bundle,
)
from conveyor_models.errors import BundleError, RepositoryError
from conveyor_models.spec import ModelSpec

FOLDERS_MAX: Final = 4_096
"""Most folders looked at in a repository, and most versions of one name."""
_VERSION = re.compile(r"[1-9][0-9]{0,9}")


@dataclass(frozen=True, slots=True)
class FoundBundle:
    """A folder whose model.toml is valid. Its weights have not been looked at."""

    spec: ModelSpec
    path: Path
    fingerprint: tuple[tuple[int, int, int], ...]
    """Inode, size in bytes and modification time in nanoseconds of each of its files."""


@dataclass(frozen=True, slots=True)
class RepositoryListing:
    """What a scan found."""

    bundles: tuple[FoundBundle, ...]
    """In order of name, then version."""
    problems: tuple[BundleError, ...]
    """One for each folder that could not be taken; `path` says which."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of which at least one version was found, in order."""
        return tuple(sorted({bundle.spec.name for bundle in self.bundles}))

    def latest(self, name: str) -> FoundBundle | None:
        """The bundle of that name with the greatest version; None where there is none."""
        found = [bundle for bundle in self.bundles if bundle.spec.name == name]
        return max(found, key=lambda bundle: bundle.spec.version, default=None)


def scan(folder: Path) -> RepositoryListing:
    """Looks for bundles in a repository.

    Plain files are passed over, and so are folders whose names begin with `.` or `_`. A folder's
    name has to be the model's name, and the name of a folder within it the model's version.

    Raises:
        RepositoryError: the repository is not a folder, cannot be read, or holds too many folders.
    """
    bundles: list[FoundBundle] = []
    problems: list[BundleError] = []
    for path in _folders(folder):
        try:
            _scan_name(folder, path, bundles, problems)
        except BundleError as error:
            problems.append(error)
    bundles.sort(key=lambda bundle: (bundle.spec.name, bundle.spec.version))
    return RepositoryListing(tuple(bundles), tuple(problems))


def add_bundle(
    folder: Path,
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    *,
    versioned: bool = False,
    replace: bool = False,
) -> Bundle:
    """Puts a bundle into a repository.

    It is written aside and renamed into place, so that a server that looks never finds half of it.

    Args:
        folder: the repository; made if it is not there.
        spec: the structure; it has the name and the version.
        weights: as for `save_bundle`.
        versioned: to NAME/VERSION/ rather than NAME/.
        replace: whether a bundle that is there may give way.

    Raises:
        RepositoryError: that version is there, or NAME/ is laid out in the other way.
        WeightsError: the weights are not the ones the spec asks for.
    """
    base = folder / spec.name
    target = base / str(spec.version) if versioned else base
    _check_room(folder, base, target, versioned=versioned, replace=replace)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder))
    except OSError as error:
        raise RepositoryError(f"cannot be written: {os_reason(error)}", path=folder) from error
    try:
        save_bundle(draft / "new", spec, weights)
        target.parent.mkdir(exist_ok=True)
        _exchange(draft / "new", target, draft / "old")
    except OSError as error:
        raise RepositoryError(f"cannot be written: {os_reason(error)}", path=target) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return load_bundle(target)


def _exchange(new: Path, target: Path, old: Path) -> None:
    """Puts `new` in the place of what is at `target`, if anything is, and that at `old`."""
    taken = target.exists()
    if taken:
        os.rename(target, old)
    try:
        os.rename(new, target)
    except OSError:
        if taken:
            os.rename(old, target)
        raise


def _check_room(folder: Path, base: Path, target: Path, *, versioned: bool, replace: bool) -> None:
    if base.exists():
        _check_inside(folder, base)
        if versioned and (base / SPEC_FILE).exists():
            raise RepositoryError(
                "is a bundle itself, so it cannot hold versions; move it to NAME/VERSION/ first",
                path=base,
            )
        if not versioned and any(_VERSION.fullmatch(path.name) for path in _folders(base)):
            raise RepositoryError(
                "has versions already; give this one a version too (--version)", path=base
            )
    if os.path.lexists(target) and not replace and (not target.is_dir() or any(target.iterdir())):
        raise RepositoryError(
            "exists already; replace it (--replace), or choose another name or version", path=target
        )


def _scan_name(
    root: Path, folder: Path, bundles: list[FoundBundle], problems: list[BundleError]
) -> None:
    _check_inside(root, folder)
    versions = [path for path in _folders(folder) if _VERSION.fullmatch(path.name)]
    if (folder / SPEC_FILE).exists() or not versions:
        # With neither model.toml nor versions this says what is missing.
        bundles.append(_found(folder, name=folder.name, version=None))
        problems.extend(
            RepositoryError(f"ignored, because {folder.name}/ is a bundle itself", path=path)
            for path in versions
        )
        return
    for path in versions:
        try:
            _check_inside(root, path)
            bundles.append(_found(path, name=folder.name, version=int(path.name)))
        except BundleError as error:
            problems.append(error)


def _found(folder: Path, name: str, version: int | None) -> FoundBundle:
    spec = load_spec(folder)
    path = folder / SPEC_FILE
    if spec.name != name:
        raise RepositoryError(
            f"name: found {spec.name!r}; expected {name!r}, the name of its folder",
            path=path,
            key="name",
        )
    if version is not None and spec.version != version:
        raise RepositoryError(
            f"version: found {spec.version}; expected {version}, the name of its folder",
            path=path,
            key="version",
        )
    try:
        files = [(folder / file).stat() for file in (SPEC_FILE, WEIGHTS_FILE)]
    except OSError as error:
        raise RepositoryError("missing", path=folder / WEIGHTS_FILE, key=WEIGHTS_FILE) from error
    fingerprint = tuple((file.st_ino, file.st_size, file.st_mtime_ns) for file in files)
    return FoundBundle(spec, folder, fingerprint)


def _folders(folder: Path) -> list[Path]:
    try:
        found = sorted(
            path for path in folder.iterdir() if path.name[0] not in "._" and path.is_dir()
        )
    except OSError as error:
        raise RepositoryError(f"cannot be listed: {os_reason(error)}", path=folder) from error
    if len(found) > FOLDERS_MAX:
        raise RepositoryError(
            f"holds {len(found)} folders, expected at most {FOLDERS_MAX}", path=folder
        )
    return found


def _check_inside(root: Path, folder: Path) -> None:
    if not folder.resolve().is_relative_to(root.resolve()):
        raise RepositoryError("is a link that leaves the repository", path=folder)
