"""The method's own questions asked of a user's model and tasks: prompts against what else there is."""
