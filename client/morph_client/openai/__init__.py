"""`morph openai`: OpenAI's HTTP interface in front of a Triton with the model. Needs the extra `openai-server`."""
