"""Messages as bytes, and the streams, tokens and TLS that carry them."""
