"""The page that `graft report --html` writes: one file, no script, nothing fetched."""
