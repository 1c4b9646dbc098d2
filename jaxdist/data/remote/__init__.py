"""Files that are elsewhere or compressed: any address of fsspec, a local cache of them, tar files read by index."""
