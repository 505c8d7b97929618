"""Many trials (one soft prompt each) tuned together on one frozen model."""
