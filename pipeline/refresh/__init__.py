"""The nightly refresh: what changed is tuned again, what did not is carried, and nothing worse gets in."""
