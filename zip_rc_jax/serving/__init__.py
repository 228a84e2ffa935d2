"""A model behind HTTP: the protocol of OpenAI's API, with what the head knows in every answer.

The way of a request: `schema` (its body) -> `translation` (jobs of the engine) -> `service` (one
engine thread, continuous batching) -> `streams` or `answers` (what the client reads). `app` has the
routes, `limits` what stands before them, `server` starts and stops.
"""
