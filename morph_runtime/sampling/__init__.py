"""From logits to tokens: penalties and bans, truncation, seeded draws, log probabilities."""
