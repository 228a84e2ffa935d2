"""One page that shows why a search decided as it did, and what an evaluation found.

record   what the page shows of a search beside its result, for results.jsonl
searches results, as the page reads them
page     the page itself: built assets with data inside, one file that needs no network

The sources of the page are in `web/`; `make explorer` builds `assets/explorer.html` from them.
"""
