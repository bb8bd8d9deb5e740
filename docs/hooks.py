"""Pages that mkdocs builds besides those of this folder: methods, catalogue, scoreboard, trained models, worlds, reference."""

from __future__ import annotations

from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pages import catalogue, method, models, reference, results, worlds

from regard.catalog.papers import papers


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The section Methods lists what is built."""
    for section in config.nav or []:
        if "Methods" in section:
            section["Methods"] = method.navigation()
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    made: dict[str, Any] = {
        **method.pages(),
        "catalogue.md": catalogue.page(papers()),
        "scoreboard.md": results.scoreboard(),
        "models.md": models.page(),
        **reference.pages(),
        **worlds.pages(),
    }
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    for path, source in method.copies().items():
        files.append(File.generated(config, path, abs_src_path=str(source)))
    return files
