"""How to add an extra to this installation. The one place that knows where packages come from."""

import json
import shlex
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname


def install_command(extra: str) -> str:
    """Returns the command that adds an extra to what is installed.

    It installs from where this installation came from: a checkout, a wheel or an index. The public
    index has no distribution of ours, so the name alone would bring another one or none.

    Args:
        extra: As in pyproject.toml, for instance `server`.
    """
    try:
        origin = metadata.distribution("conveyor").read_text("direct_url.json")
    except metadata.PackageNotFoundError:  # only its folders are on the path
        return _from_checkout(None, extra)
    if origin is None:  # it was found by its name
        return f"pip install 'conveyor[{extra}]'"
    given = json.loads(origin)
    url: str = given["url"]
    if "vcs_info" in given:
        return f"pip install 'conveyor[{extra}] @ {given['vcs_info']['vcs']}+{url}'"
    if urlsplit(url).scheme != "file":
        return f"pip install 'conveyor[{extra}] @ {url}'"
    path = Path(url2pathname(urlsplit(url).path))
    if "archive_info" in given:
        file = str(path) if path.exists() else path.name
        return f"pip install {shlex.quote(f'{file}[{extra}]')}"
    return _from_checkout(path, extra)


def _from_checkout(folder: Path | None, extra: str) -> str:
    command = f"pip install -c constraints.txt -e '.[{extra}]'"
    if folder is None or not (folder / "pyproject.toml").exists():
        return f"{command} in a checkout"
    return f"cd {shlex.quote(str(folder))} && {command}"
