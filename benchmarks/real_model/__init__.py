"""A language model that people know, from its download to the table: SmolLM2-135M-Instruct on WikiText-2."""
