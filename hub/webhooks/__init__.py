"""Webhooks: what happens to repos is told to the addresses that people gave."""
