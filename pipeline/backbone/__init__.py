"""The frozen model: found, quantised to int8, hosted whole or under ZeRO-3, and run behind soft prompts."""
