"""The HTML pages of `compare`, `inspect` and `search`."""
