"""The input pipeline: sources, order, assembly of batches and placement on the mesh.

The public names below are imported when first used: worker processes start without JAX, which only `placement` needs.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxdist.data import augmentation as augmentation
    from jaxdist.data import batch_transforms as batch_transforms
    from jaxdist.data import order as order
    from jaxdist.data import transforms as transforms
    from jaxdist.data.batch_transforms import CutMix as CutMix
    from jaxdist.data.batch_transforms import MixUp as MixUp
    from jaxdist.data.batch_transforms import OneOf as OneOf
    from jaxdist.data.loader import Loader as Loader
    from jaxdist.data.order import BlockShuffled as BlockShuffled
    from jaxdist.data.order import Dealt as Dealt
    from jaxdist.data.order import Mixed as Mixed
    from jaxdist.data.order import Order as Order
    from jaxdist.data.order import Resampled as Resampled
    from jaxdist.data.order import Sequential as Sequential
    from jaxdist.data.order import Shuffled as Shuffled
    from jaxdist.data.placement import feed as feed
    from jaxdist.data.placement import host_shards as host_shards
    from jaxdist.data.placement import process_rows as process_rows
    from jaxdist.data.position import Position as Position
    from jaxdist.data.prepare import read_shard_list as read_shard_list
    from jaxdist.data.remote.file_cache import FileCache as FileCache
    from jaxdist.data.remote.tar_source import TarSource as TarSource
    from jaxdist.data.sources.combine import Concatenated as Concatenated
    from jaxdist.data.sources.combine import Filtered as Filtered
    from jaxdist.data.sources.combine import Sharded as Sharded
    from jaxdist.data.sources.combine import ShardList as ShardList
    from jaxdist.data.sources.folders import ImageFolder as ImageFolder
    from jaxdist.data.sources.images import ImageType as ImageType
    from jaxdist.data.sources.memmap import NpySource as NpySource
    from jaxdist.data.sources.memmap import TokenDocuments as TokenDocuments
    from jaxdist.data.sources.memmap import TokenSource as TokenSource
    from jaxdist.data.sources.memmap import text_bytes as text_bytes
    from jaxdist.data.sources.mixture import ScheduledMix as ScheduledMix
    from jaxdist.data.sources.mixture import mix as mix
    from jaxdist.data.sources.mixture import ramp as ramp
    from jaxdist.data.sources.pack import Bucketed as Bucketed
    from jaxdist.data.sources.pack import Packed as Packed
    from jaxdist.data.sources.pack import example_lengths as example_lengths
    from jaxdist.data.sources.parquet import ParquetSource as ParquetSource
    from jaxdist.data.sources.records import ArrayRecordSource as ArrayRecordSource
    from jaxdist.data.sources.sounds import SoundFolder as SoundFolder
    from jaxdist.data.sources.source import ArraySource as ArraySource
    from jaxdist.data.sources.source import CorruptExample as CorruptExample
    from jaxdist.data.sources.source import Source as Source
    from jaxdist.data.sources.subset import Subset as Subset
    from jaxdist.data.sources.subset import balanced as balanced
    from jaxdist.data.sources.subset import folds as folds
    from jaxdist.data.sources.subset import held_out as held_out
    from jaxdist.data.sources.tables import csv_source as csv_source
    from jaxdist.data.sources.wrap import MapSource as MapSource
    from jaxdist.data.statistics import DataStatistics as DataStatistics
    from jaxdist.data.statistics import field_statistics as field_statistics
    from jaxdist.data.streams.foreign_batches import batches as batches
    from jaxdist.data.streams.iterables import count_examples as count_examples
    from jaxdist.data.streams.iterables import hugging_face_stream as hugging_face_stream
    from jaxdist.data.streams.iterables import iterable_stream as iterable_stream
    from jaxdist.data.streams.stream import StreamSource as StreamSource
    from jaxdist.data.streams.tar_stream import tar_stream as tar_stream
    from jaxdist.data.text import open_tokenizer as open_tokenizer
    from jaxdist.data.tfds.prepared import TfdsSource as TfdsSource
    from jaxdist.data.transforms import CentreCrop as CentreCrop
    from jaxdist.data.transforms import Chain as Chain
    from jaxdist.data.transforms import CheckLabel as CheckLabel
    from jaxdist.data.transforms import DecodeCropFlip as DecodeCropFlip
    from jaxdist.data.transforms import DecodeImage as DecodeImage
    from jaxdist.data.transforms import MelSpectrogram as MelSpectrogram
    from jaxdist.data.transforms import Normalise as Normalise
    from jaxdist.data.transforms import RandomCrop as RandomCrop
    from jaxdist.data.transforms import RandomFlip as RandomFlip
    from jaxdist.data.transforms import Resize as Resize
    from jaxdist.data.transforms import Spectrogram as Spectrogram

_NAMES = {
    "batch_transforms": ("CutMix", "MixUp", "OneOf"),
    "streams.foreign_batches": ("batches",),
    "loader": ("Loader",),
    "order": ("BlockShuffled", "Dealt", "Mixed", "Order", "Resampled", "Sequential", "Shuffled"),
    "placement": ("feed", "host_shards", "process_rows"),
    "position": ("Position",),
    "prepare": ("read_shard_list",),
    "sources.combine": ("Concatenated", "Filtered", "ShardList", "Sharded"),
    "sources.mixture": ("ScheduledMix", "mix", "ramp"),
    "sources.folders": ("ImageFolder",),
    "sources.images": ("ImageType",),
    "sources.memmap": ("NpySource", "TokenDocuments", "TokenSource", "text_bytes"),
    "sources.pack": ("Bucketed", "Packed", "example_lengths"),
    "sources.records": ("ArrayRecordSource",),
    "sources.sounds": ("SoundFolder",),
    "sources.source": ("ArraySource", "CorruptExample", "Source"),
    "sources.parquet": ("ParquetSource",),
    "sources.subset": ("Subset", "balanced", "folds", "held_out"),
    "sources.tables": ("csv_source",),
    "tfds.prepared": ("TfdsSource",),
    "sources.wrap": ("MapSource",),
    "statistics": ("DataStatistics", "field_statistics"),
    "remote.file_cache": ("FileCache",),
    "remote.tar_source": ("TarSource",),
    "streams.tar_stream": ("tar_stream",),
    "streams.iterables": ("count_examples", "hugging_face_stream", "iterable_stream"),
    "streams.stream": ("StreamSource",),
    "text": ("open_tokenizer",),
    "transforms": (
        *("CentreCrop", "Chain", "CheckLabel", "DecodeCropFlip", "DecodeImage"),
        *("MelSpectrogram", "Normalise", "RandomCrop", "RandomFlip", "Resize", "Spectrogram"),
    ),
}

_MODULES = ("augmentation", "batch_transforms", "order", "transforms")
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted([*_HOMES, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"jaxdist.data.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxdist.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxdist.data.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
