"""What to write in place of an object that makes examples, or batches, in a way of its own."""

from typing import Any


def equivalent(examples: Any) -> str | None:
    """Return the sentence that says what to write in place of `examples`; None where nothing is known of its kind."""
    if _is_torch_loader(examples):
        return _for_torch_loader(examples)
    name = type(examples).__name__
    if not reads_forward(examples):
        return None
    length = "sizes= (each example exactly once an epoch) or examples_per_epoch="
    if hasattr(examples, "shard") and hasattr(examples, "__iter__"):
        return f"{name} is a stream, which has no length: give data.hugging_face_stream(dataset, ...) with {length}."
    if hasattr(examples, "__next__"):
        return (
            f"{name} can be iterated once only, and a run opens its examples at every start and in every epoch: give "
            f"data.StreamSource(lambda shard: make_examples(), ...) with {length}."
        )
    if hasattr(examples, "__iter__"):
        return f"{name} is a stream, which has no length: give data.iterable_stream(examples, ...) with {length}."
    if callable(examples):
        return f"A function that makes examples is a stream: give data.StreamSource(function, ...) with {length}."
    return None


def reads_forward(examples: Any) -> bool:
    """Return whether these have no random access; torch's IterableDataset has `__getitem__`, which always raises."""
    if any(kind.__name__ == "IterableDataset" for kind in type(examples).__mro__):
        return True
    return not (hasattr(examples, "__getitem__") and hasattr(examples, "__len__"))


def _is_torch_loader(examples: Any) -> bool:
    return all(hasattr(examples, name) for name in ("dataset", "batch_size", "collate_fn", "num_workers"))


def _for_torch_loader(loader: Any) -> str:
    """Return the settings that do what a torch DataLoader does."""
    stream = reads_forward(loader.dataset)
    shuffles = type(getattr(loader, "sampler", None)).__name__ == "RandomSampler"
    train = "data.iterable_stream(loader.dataset, examples_per_epoch=...)" if stream else "loader.dataset"
    workers = "" if stream or not loader.num_workers else f", num_workers={loader.num_workers}"
    batch = f" and global_batch_size={loader.batch_size}" if loader.batch_size else ""
    return (
        f"{type(loader).__name__} makes batches itself, in an order that cannot be resumed; here the run makes them "
        f"from single examples. The equivalent is Data(train={train}, shuffle={shuffles}{workers}){batch}; what "
        "collate_fn does to one example belongs in example_fn."
    )
