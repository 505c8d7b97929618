"""The site: Markdown as it lies in the repository, built by Sphinx with MyST (`make docs`).

The source folder is the repository's root, so that links between README.md and docs/ work on the site as they do in
the repository.
"""

import shutil
from pathlib import Path

ORDER_OF_READING = {
    "Use it": [
        "docs/get-started",
        "docs/settings",
        "docs/corpora",
        "docs/models",
        "docs/encoder-decoders",
        "docs/teachers",
        "docs/chats",
        "docs/bank",
        "pipeline/bank/FORMAT",
        "docs/stores",
    ],
    "Run it": [
        "docs/serving",
        "docs/nightly",
        "docs/cluster",
        "cluster/gpu/README",
        "docs/watching",
        "docs/faults",
        "SECURITY",
    ],
    "What it is worth": ["docs/comparison", "docs/adaptation", "docs/benchmarks"],
    "Carry it on": ["docs/design", "docs/decisions/README", "CONTRIBUTING", "findings/README", "CHANGELOG"],
}

project = "The prompt bank"
project_copyright = "the authors of the prompt bank"
root_doc = "README"
extensions = ["myst_parser"]
include_patterns = [
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"),
    *("docs/**.md", "cluster/gpu/README.md", "findings/README.md", "pipeline/bank/FORMAT.md"),
]
# Folders that are not even walked through.
exclude_patterns = [".*", "bank", "build", "jobs", "quickstart", "runs", "site", "tests"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = project
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False


def _lists_pages(app, name, content):
    """Appends the order of reading to the front page and to decisions; in the repository it would show as code."""
    if name == root_doc:
        for caption, pages in ORDER_OF_READING.items():
            content[0] += _toctree(pages, f":caption: {caption}")
    if name == "docs/decisions/README":
        content[0] += _toctree(["*"], ":glob:")
    if name == "docs/comparison":
        content[0] += _toctree(["comparison/**"], ":glob:")


def _toctree(pages, option):
    entries = "\n".join(page if "*" in page else f"/{page}" for page in pages)
    return f"\n\n```{{toctree}}\n:hidden:\n{option}\n\n{entries}\n```\n"


def _makes_the_readme_the_front_page(app, error):
    if error is None:
        shutil.copy(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))


def setup(app):
    app.connect("source-read", _lists_pages)
    app.connect("build-finished", _makes_the_readme_the_front_page)
