"""For mkdocs: the site holds every page of the repository under its own path, so that links between them stay.

A link to what is no page (a source file, a folder, values) becomes its text, since it is not on the site.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "*.md",
    "docs/**/*.md",
    "fully_sup/**/*.md",
    "semi_sup/**/*.md",
    "uda/**/*.md",
    "ltss_benchmark/**/*.md",
)
PICTURES = ("docs/images/*",)
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])+)\]\(([^)\s]+)\)")


def on_files(files: Files, config) -> Files:
    """All pages and pictures, in place of those below docs/, beside what the theme brings."""
    of_theme = [file for file in files if file.src_dir != config.docs_dir]
    paths = sorted({path for pattern in (*PAGES, *PICTURES) for path in ROOT.glob(pattern)})
    ours = [
        File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))
        for path in paths
    ]
    return Files([*of_theme, *ours])


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    folder = posixpath.dirname(page.file.src_uri)

    def kept(match: re.Match) -> str:
        text, target = match.groups()
        if re.match(r"\w+:|#", target):
            return match[0]

        path, hash_sign, anchor = target.partition("#")
        place = posixpath.normpath(posixpath.join(folder, path))
        if files.get_file_from_path(place):
            return match[0]

        # a link to a folder, which GitHub shows with its page
        readme = posixpath.join(place, "README.md")
        if files.get_file_from_path(readme):
            return f"[{text}]({posixpath.relpath(readme, folder or '.')}{hash_sign}{anchor})"

        return text

    return LINK.sub(kept, markdown)
