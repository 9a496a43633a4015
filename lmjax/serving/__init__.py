"""The server: an engine that answers many requests in one running batch."""
