"""Decoders of files: formats that can be read faster than the general library reads them, to the same bits."""
