"""The hub: repos, blobs, catalogue, jobs, users, the web page and the protocol façades.

`hub.app.create_app` is the only place where the parts are joined.
Inside, `models` ← `service` ← `routes`; across, `blobs, users` ← `repos` ← `adapters` ← `jobs` ← `hf`, `web`.
"""
