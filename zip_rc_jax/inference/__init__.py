"""The decoder: from requests to results, on slots of one running batch.

The life of a request:

requests, prompts        checked, and turned into token ids: a `TokenizedRequest`
scheduler                waits until the running batch has room; is prefilled
engine                   once per interval: read the joints, decide (`search`), move slots, step
state, sampler, network  the jitted programs of an interval: forward, draw the next tokens
tree, stopping           the record of a prompt's prefixes on the host, and where they end
outputs, collect         a `Result`: the answer, every prefix, every decision, the cost

Around it: `api` and `sharing` (the public `Decoder`, for threads and asyncio), `memory` (whether it
fits, before anything is allocated), `arrays` and `placement` (bookkeeping of slots).

To come: `pages`, `prefix_cache`, `host_pages` (who holds which page of the cache) and `paging`,
`page_policy`, `paged_sequences` (who is admitted, and who leaves when pages run short). So far
`benchmarks/paged.py` uses them, and the engine does not.
"""
