"""A bank's tasks in vLLM's server, as its plugin `promptbank`. Only vLLM's own environment imports this."""
