"""Lets the pages lie beside ``mkdocs.yml``, where links between them also work in a plain view of the repository."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Read pages from the configuration's own folder.

    MkDocs refuses this as a setting, so that a build does not copy itself; here the site lies outside, and the
    configuration is excluded.
    """
    config.docs_dir = str(Path(config.config_file_path).resolve().parent)
    return config
