"""Repos of another hub, fetched when somebody first asks for them, kept, and served without it."""
