"""The command `promptbank`: look at a bank, move its aliases, look after it, exchange prompts with other tools."""
