"""The decoder: from requests to results, on slots of one running batch."""
