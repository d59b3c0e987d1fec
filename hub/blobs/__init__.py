"""Immutable bytes named by their SHA-256. Blob first, catalogue row last."""
