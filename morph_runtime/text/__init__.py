"""Text in and out: sampling parameters, prompts to tokens, tokens to text, stop strings."""
