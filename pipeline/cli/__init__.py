"""The command `promptbank`: look at a bank and at runs, move aliases, maintain a bank, exchange prompts."""
