"""Does a tag name the release that the tree holds? `python tools/check_release.py v0.1.0`

It must be "v" and the version of pyproject.toml, and CHANGELOG.md must give that version a date.
Exits with 2 and a sentence if not.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def check(tag: str, root: Path = ROOT) -> None:
    """Raises ValueError."""
    (version,) = re.findall(r'^version = "(.+)"$', (root / "pyproject.toml").read_text(), re.M)
    if tag != f"v{version}":
        raise ValueError(f"tag: expected v{version}, the version in pyproject.toml, got {tag}")
    newest = re.search(r"^## .*$", (root / "CHANGELOG.md").read_text(), re.M)
    heading = newest.group() if newest else "no heading"
    if not re.fullmatch(rf"## {re.escape(version)} — \d{{4}}-\d{{2}}-\d{{2}}", heading):
        raise ValueError(f"CHANGELOG.md: expected '## {version} — YYYY-MM-DD', got '{heading}'")


if __name__ == "__main__":
    try:
        check(sys.argv[1] if len(sys.argv) == 2 else "")
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
