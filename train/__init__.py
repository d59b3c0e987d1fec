"""Training and publishing. Talks to a hub only over HTTP; sees only merge's formats and algorithms."""
