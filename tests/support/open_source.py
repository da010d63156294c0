"""Opens a training set on disk by the name of its format."""

from bench.data.sources.folder import FolderSource
from bench.data.sources.recordio import RecordIOSource
from bench.data.sources.webdataset import WebDatasetSource

SOURCES = {"insightface": RecordIOSource, "folder": FolderSource, "webdataset": WebDatasetSource}


def open_source(kind, path, *, image_size=112, on_error="refuse"):
    return SOURCES[kind](path, image_size, on_error=on_error)
