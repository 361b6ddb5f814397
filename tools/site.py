"""What ``make docs`` adds to mkdocs: the pages outside docs, and every file of the repository that a page links to.

Pages are written for the repository, so their links lead through it. Here a page outside docs keeps its path, one in
docs is at the top, other files that are linked are copied as they are, and a link to a folder is its text alone.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
CODE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)


def in_site(path: str) -> str:
    """The place in the site of a path in the repository."""
    return path.removeprefix("docs/")


def in_repository(page: File) -> str:
    return page.src_uri if page.generated_by else f"docs/{page.src_uri}"


def target(page: str, link: str) -> str | None:
    """The path in the repository that a link of ``page`` leads to; None for one that leads out of it."""
    path = link.partition("#")[0]
    return None if "://" in link or not path else os.path.normpath(os.path.join(os.path.dirname(page), path))


def on_files(files: Files, *, config: Any) -> Files:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.md"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    pages = listed.split()
    outside = {page for page in pages if not page.startswith("docs/")}
    linked = {target(page, link) for page in pages for _, link in LINK.findall(CODE.sub("", (ROOT / page).read_text()))}
    there = {path for path in linked if path and (ROOT / path).is_file() and not path.startswith("docs/")}
    for path in sorted(outside | there):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    here = in_repository(page.file)

    def link(match: re.Match[str]) -> str:
        path = target(here, match[2])
        if path is None:
            return match[0]
        if (ROOT / path).is_dir():
            if not (ROOT / path / "README.md").is_file():
                return match[1].strip("[]")
            path += "/README.md"
        anchor = match[2].partition("#")[2]
        relative = os.path.relpath(in_site(path), os.path.dirname(page.file.src_uri) or ".")
        return f"{match[1]}({relative}{'#' + anchor if anchor else ''})"

    kept = CODE.split(markdown)
    blocks = CODE.findall(markdown)
    changed = [LINK.sub(link, part) for part in kept]
    return "".join(part + block for part, block in zip(changed, [*blocks, ""], strict=True))
