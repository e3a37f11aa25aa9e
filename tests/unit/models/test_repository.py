"""Folders of bundles."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from conveyor_models import (
    FoundBundle,
    RepositoryError,
    SpecError,
    WeightsError,
    add_bundle,
    load_bundle,
    save_bundle,
    scan,
)
from conveyor_models.repository import FOLDERS_MAX
from tests.unit.models.bundles import features_spec, random_weights


def _put(folder: Path, name: str, version: int = 1) -> Path:
    spec = features_spec().model_copy(update={"name": name, "version": version})
    save_bundle(folder, spec, random_weights(spec))
    return folder


def _named(found: tuple[FoundBundle, ...]) -> list[tuple[str, int]]:
    return [(bundle.spec.name, bundle.spec.version) for bundle in found]


def test_names_and_versions_are_found_in_order(tmp_path: Path) -> None:
    for version in (10, 2, 9):
        _put(tmp_path / "many" / str(version), "many", version)
    _put(tmp_path / "one", "one", 7)
    listing = scan(tmp_path)
    assert listing.problems == ()
    assert _named(listing.bundles) == [("many", 2), ("many", 9), ("many", 10), ("one", 7)]
    assert listing.names == ("many", "one")


def test_the_latest_version_is_the_greatest_number(tmp_path: Path) -> None:
    for version in (9, 10):
        _put(tmp_path / "many" / str(version), "many", version)
    listing = scan(tmp_path)
    latest = listing.latest("many")
    assert latest is not None
    assert latest.spec.version == 10
    assert listing.latest("other") is None


def test_an_empty_repository_is_no_problem(tmp_path: Path) -> None:
    listing = scan(tmp_path)
    assert (listing.bundles, listing.problems) == ((), ())


def test_files_and_hidden_folders_are_passed_over(tmp_path: Path) -> None:
    _put(tmp_path / "one", "one")
    (tmp_path / "README.md").write_text("models")
    (tmp_path / ".git").mkdir()
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "one" / "__pycache__").mkdir()
    listing = scan(tmp_path)
    assert _named(listing.bundles) == [("one", 1)]
    assert listing.problems == ()


def test_broken_bundles_hide_no_others(tmp_path: Path) -> None:
    _put(tmp_path / "good", "good")
    _put(tmp_path / "many" / "1", "many", 1)
    _put(tmp_path / "many" / "2", "many", 3)
    (_put(tmp_path / "no-weights", "no-weights") / "weights.safetensors").unlink()
    (_put(tmp_path / "no-spec", "no-spec") / "model.toml").unlink()
    (_put(tmp_path / "garbled", "garbled") / "model.toml").write_text("=")
    _put(tmp_path / "renamed", "original")
    listing = scan(tmp_path)
    assert _named(listing.bundles) == [("good", 1), ("many", 1)]
    said = {str(problem).removeprefix(f"{tmp_path}/") for problem in listing.problems}
    assert {line for line in said if "not valid TOML" not in line} == {
        "many/2/model.toml: version: found 3; expected 2, the name of its folder",
        "no-weights/weights.safetensors: missing",
        "no-spec/model.toml: missing",
        "renamed/model.toml: name: found 'original'; expected 'renamed', the name of its folder",
    }
    assert len(said) == 5
    assert any(isinstance(problem, SpecError) for problem in listing.problems)


def test_a_bundle_with_versions_inside_is_ambiguous(tmp_path: Path) -> None:
    _put(tmp_path / "one", "one")
    _put(tmp_path / "one" / "2", "one", 2)
    listing = scan(tmp_path)
    assert _named(listing.bundles) == [("one", 1)]
    assert [str(problem) for problem in listing.problems] == [
        f"{tmp_path}/one/2: ignored, because one/ is a bundle itself"
    ]


@pytest.mark.parametrize("inner", [False, True])
def test_links_may_not_leave_the_repository(tmp_path: Path, inner: bool) -> None:
    target = _put(tmp_path / "outside", "one")
    root = tmp_path / "repository"
    link = root / "one" / "1" if inner else root / "one"
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    listing = scan(root)
    assert listing.bundles == ()
    assert [str(problem) for problem in listing.problems] == [
        f"{link}: is a link that leaves the repository"
    ]


def test_the_fingerprint_tells_when_files_change(tmp_path: Path) -> None:
    folder = _put(tmp_path / "one", "one")
    (before,) = scan(tmp_path).bundles
    (again,) = scan(tmp_path).bundles
    assert again.fingerprint == before.fingerprint
    _put(folder, "one")
    (after,) = scan(tmp_path).bundles
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("make", [Path.touch, lambda path: None])
def test_a_repository_that_is_no_folder_is_an_error(tmp_path: Path, make: object) -> None:
    path = tmp_path / "models"
    make(path)  # type: ignore[operator]
    with pytest.raises(RepositoryError, match="models: cannot be listed"):
        scan(path)


def test_too_many_folders_are_refused(tmp_path: Path) -> None:
    for index in range(FOLDERS_MAX):
        (tmp_path / f"m{index}").mkdir()
    assert len(scan(tmp_path).problems) == FOLDERS_MAX
    (tmp_path / "one-more").mkdir()
    with pytest.raises(RepositoryError, match="4097 folders, expected at most 4096"):
        scan(tmp_path)


def test_a_bundle_that_could_not_give_way_is_there_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = features_spec()
    before = add_bundle(tmp_path, spec, random_weights(spec, seed=1))
    rename = os.rename

    def full(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise OSError(errno.ENOSPC, "no space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(RepositoryError, match="no space left"):
        add_bundle(tmp_path, spec, random_weights(spec, seed=2), replace=True)
    assert load_bundle(before.path).digest == before.digest
    assert [path.name for path in tmp_path.iterdir()] == [spec.name]


def test_what_is_not_added_leaves_no_folder_behind(tmp_path: Path) -> None:
    spec = features_spec()
    with pytest.raises(WeightsError):
        add_bundle(tmp_path, spec, {}, versioned=True)
    assert not list(tmp_path.iterdir())
