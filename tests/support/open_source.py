"""Opens a training set on disk by the name of its format, or loads one."""

from bench.data.loaders import load
from bench.data.sources.folder import FolderSource
from bench.data.sources.insightface import RecordIOSource
from bench.data.sources.webdataset import WebDatasetSource

SOURCES = {"insightface": RecordIOSource, "folder": FolderSource, "webdataset": WebDatasetSource}


def open_source(kind, path, *, image_size=112, on_error="refuse"):
    return SOURCES[kind](path, image_size).reading(on_error)


def load_set(kind, path, image_size=32, *, stream=False, **options):
    return load(kind, data_root=path, image_size=image_size, seed=0, options=options, stream=stream)
