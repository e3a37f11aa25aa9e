"""Pages that the documentation's site makes while it is built; mkdocs.yml names this file.

- The front page is the repository's README.
- The reference of the contract comes from the .proto files (`reference.py`), that of the client and
  of the server's settings from docstrings (`reference_client.py`, `reference_settings.py`).
- What a page links to elsewhere in the repository (a card, a setting's source, figures) comes along
  below `repository/`, so that the site needs no network and no link of it leads nowhere.
- Pages that the navigation of mkdocs.yml does not name are added to the section of their folder.
"""

import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

REPOSITORY: Final = Path(__file__).resolve().parent.parent
ROOMS: Final = ("proto", "client", "server", "models")
# mkdocs loads a hook by its path; and the packages described are the ones beside it.
sys.path[:0] = [str(REPOSITORY / room) for room in ("scripts", *ROOMS)]

import reference  # noqa: E402
import reference_client  # noqa: E402
import reference_settings  # noqa: E402

DOCS: Final = PurePosixPath("docs")
FRONT: Final = "index.md"
LINK: Final = re.compile(r"(?<=\]\()(?![a-z]+:|/)([^)#\s]+)(#[^)\s]*)?(?=\))")
LANGUAGES: Final = {
    ".proto": "protobuf",
    ".py": "python",
    ".toml": "toml",
    ".yaml": "yaml",
    ".yml": "yaml",
}
COPIED: Final = frozenset({".html", ".json", ".png", ".svg"})
"""Files that a browser shows as they are."""
FENCE: Final = "~" * 8


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds to the navigation what it does not name."""
    made = {f"reference/{name}" for name in _references()}
    written = {path.relative_to(config.docs_dir).as_posix() for path in _markdown(config.docs_dir)}
    for section in config.nav or []:
        for entries in section.values():
            if isinstance(entries, list):
                _complete(entries, sorted(written | made))
    return config


def _references() -> dict[str, str]:
    """The pages made from sources, by name."""
    return {
        reference_client.NAME: reference_client.page(),
        reference_settings.NAME: reference_settings.page(),
        **{page.name: page.text for page in reference.pages()},
    }


def _markdown(folder: str) -> Iterator[Path]:
    return Path(folder).rglob("*.md")


def _complete(entries: list[Any], pages: list[str]) -> None:
    """Adds the pages that lie beside a section's first one and are not in it."""
    named = [next(iter(entry.values())) if isinstance(entry, dict) else entry for entry in entries]
    folder = posixpath.dirname(named[0])
    entries += [page for page in pages if posixpath.dirname(page) == folder and page not in named]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Makes the generated pages, and brings along what the pages link to."""
    for name, text in _references().items():
        files.append(File.generated(config, f"reference/{name}", content=text))
    waiting = [PurePosixPath("README.md"), *_named(config.nav)]
    for path in _markdown(config.docs_dir):
        here = DOCS / path.relative_to(config.docs_dir).as_posix()
        waiting += _outside(path.read_text(encoding="utf-8"), here)
    brought: set[PurePosixPath] = set()
    while waiting:
        source = waiting.pop()
        if source in brought:
            continue
        brought.add(source)
        files.append(_brought(config, source))
        if source.suffix == ".md":
            waiting += _outside(_text(source), source)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the links of pages below docs/ to where their targets are on the site."""
    del config, files
    uri = page.file.src_uri
    if uri == FRONT or uri.startswith("repository/"):
        return markdown  # turned when they were brought
    return _turned(markdown, DOCS / uri)


def _text(source: PurePosixPath) -> str:
    """A file's text, or the list of a folder's files where there is no page about it."""
    if source.name != FRONT or (REPOSITORY / source).exists():
        return (REPOSITORY / source).read_text(encoding="utf-8")
    inside = (REPOSITORY / source.parent).iterdir()
    names = sorted(path.name for path in inside if path.name[0] not in "._")
    return "\n".join([f"# {source.parent}", "", *(f"- [{name}]({name})" for name in names)]) + "\n"


def _brought(config: MkDocsConfig, source: PurePosixPath) -> File:
    """A file of the repository on the site: a page as it is, another text in a frame."""
    level = InclusionLevel.NOT_IN_NAV
    uri = _uri(source)
    if source.suffix in COPIED:
        return File.generated(config, uri, abs_src_path=str(REPOSITORY / source), inclusion=level)
    if source.suffix == ".md":
        return File.generated(config, uri, content=_turned(_text(source), source), inclusion=level)
    language = LANGUAGES.get(source.suffix, "text")
    framed = f"---\nsearch:\n  exclude: true\n---\n\n# {source}\n\n"
    framed += f"{FENCE}{language}\n{_text(source)}\n{FENCE}\n"
    return File.generated(config, uri, content=framed, inclusion=level)


def _named(entries: Any) -> Iterator[PurePosixPath]:
    """What the navigation takes from elsewhere in the repository."""
    if isinstance(entries, dict):
        entries = list(entries.values())
    if isinstance(entries, list):
        for entry in entries:
            yield from _named(entry)
    elif isinstance(entries, str) and entries.startswith("repository/"):
        yield PurePosixPath(entries).relative_to("repository")


def _uri(source: PurePosixPath) -> str:
    """Where a file of the repository is on the site."""
    if source == PurePosixPath("README.md"):
        return FRONT
    if source.is_relative_to(DOCS):
        return source.relative_to(DOCS).as_posix()
    shown_as_it_is = source.suffix == ".md" or source.suffix in COPIED
    return f"repository/{source}" + ("" if shown_as_it_is else ".md")


def _target(link: str, here: PurePosixPath) -> PurePosixPath | None:
    """The file of the repository that a link in `here` means; None where there is none.

    That of a folder is its README, or else the list of its files.
    """
    target = PurePosixPath(posixpath.normpath(here.parent / link))
    if ".." in target.parts:
        return None
    if (REPOSITORY / target).is_dir():
        readme = target / "README.md"
        return readme if (REPOSITORY / readme).is_file() else target / FRONT
    return target if (REPOSITORY / target).is_file() else None


def _outside(text: str, here: PurePosixPath) -> Iterator[PurePosixPath]:
    """The files that a page links to and that are not pages of the site anyway."""
    for found in LINK.finditer(text):
        target = _target(found[1], here)
        if target is not None and not target.is_relative_to(DOCS):
            yield target


def _turned(text: str, here: PurePosixPath) -> str:
    """A page with its links turned; a link to nothing stays, for mkdocs to complain of."""

    def turn(found: re.Match[str]) -> str:
        target = _target(found[1], here)
        if target is None:
            return found[0]
        start = posixpath.dirname(_uri(here)) or "."
        return posixpath.relpath(_uri(target), start) + (found[2] or "")

    return LINK.sub(turn, text)
