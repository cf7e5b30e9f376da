"""What MkDocs calls while it builds the site: files of the repository that pages link to become pages of the site.

On GitHub a link to `../newllm_jax/newllm/model.py` opens the file, and one to a folder its list. The site has the files
of `docs` only. So every file outside it that a page links to gets a page under `source/`, every folder a page with its
list, and the links lead there. A link to a file that is not there stays as it is, and `mkdocs build --strict` fails.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()(?!\w+:)(?P<path>[^)\s#]+)")  # the path of a relative link
LANGUAGES = {".py": "python", ".sh": "bash", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml", ".json": "json"}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds a page for each file and folder that a page links to, and for those that these pages link to."""
    waiting = [DOCS / file.src_uri for file in files.documentation_pages()]
    added: set[Path] = set()
    while waiting:
        for target in linked(waiting.pop()):
            if target not in added and (target.is_dir() or DOCS not in target.parents):
                added.add(target)
                waiting.append(target)
    for path in sorted(added):
        files.append(File.generated(config, site_path(path).as_posix(), content=content(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lets the links of a page of `docs` lead to the pages under `source/`."""
    if page.file.generated_by:
        return markdown
    return with_site_links(markdown, DOCS / page.file.src_uri)


def linked(page: Path) -> list[Path]:
    """The files and folders of the repository that a page links to, or that a folder has."""
    if page.is_dir():
        return sorted(path for path in page.iterdir() if not path.name.startswith((".", "__")))
    if page.suffix != ".md":
        return []
    targets = [resolved(page, link["path"]) for link in LINK.finditer(page.read_text(encoding="utf-8"))]
    return [target for target in targets if target]


def resolved(page: Path, link: str) -> Path | None:
    """The file or folder of the repository to which a link leads; None where it leads to none."""
    target = Path(os.path.normpath(page.parent / link))
    return target if target.exists() and ROOT in target.parents else None


def site_path(path: Path) -> Path:
    """Where a file of the repository is on the site, relative to its top."""
    inside = DOCS in path.parents
    place = path.relative_to(DOCS) if inside else "source" / path.relative_to(ROOT)
    if path.is_dir():
        return place / "index.md"
    return place if inside or path.suffix == ".md" else place.with_name(f"{place.name}.md")


def with_site_links(text: str, page: Path) -> str:
    """A page whose links lead to where their files are on the site."""
    here = site_path(page).parent

    def replacement(link: re.Match[str]) -> str:
        target = resolved(page, link["path"])
        return _way(here, target) if target else link["path"]

    return LINK.sub(replacement, text)


def _way(here: Path, target: Path) -> str:
    """The link from a folder of the site to where a file of the repository is on it."""
    return Path(os.path.relpath(site_path(target), here)).as_posix()


def content(path: Path) -> str:
    """The page of a folder, or of a file outside `docs`."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        here = site_path(path).parent
        return f"# {name}\n\n" + "\n".join(f"* [{child.name}]({_way(here, child)})" for child in linked(path))
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return with_site_links(text, path)
    language = LANGUAGES.get(path.suffix, "text")
    return f"---\nsearch: {{exclude: true}}\n---\n\n# {name}\n\n`````{language}\n{text}\n`````\n"
