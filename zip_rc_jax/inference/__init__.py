"""The decoder: from requests to results, on slots and pages of one running batch.

The life of a request:

requests, prompts        checked, and turned into token ids: a `TokenizedRequest`
scheduler                waits until the running batch has room; is prefilled
engine                   once per interval: read the joints, decide, edit tables, step
running_batch            carries edits out: forks, pages that are copied, sequences that leave
decisions, intervals     what the search says (`search`), and what an interval makes of prefixes
state, sampler, network  the jitted programs of an interval: forward, draw the next tokens
tree, stopping           the record of a prompt's prefixes on the host, and where they end
outputs, collect         a `Result`: the answer, every prefix, every decision, the cost

Pages: `pages`, `prefix_cache`, `host_pages` (who holds which page of the cache), `paging`,
`page_policy`, `paged_sequences` (who is admitted, and who leaves when pages run short) and
`host_memory` (what left).

Around it: `api` and `sharing` (the public `Decoder`, for threads and asyncio), `memory` (whether it
fits, before anything is allocated), `prepared` (the network and its parameters, made once) and
`arrays` (lanes of a step, and inputs of the search).
"""
