"""What was published: repos with branches, tags and commits that are never changed."""
