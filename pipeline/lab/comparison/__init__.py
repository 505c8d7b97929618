"""Compare prompt tuning with other methods on a user's model and tasks: hard prompts, LoRA, full fine-tuning."""
