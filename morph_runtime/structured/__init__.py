"""Structured outputs: grammars compiled beside the step loop, and the token masks they give."""
