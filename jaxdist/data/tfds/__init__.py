"""Data sets that TensorFlow Datasets has prepared, read without TensorFlow."""
