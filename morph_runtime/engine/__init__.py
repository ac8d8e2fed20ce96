"""The engine: `step()` (schedule, run, sample, publish), its process, and the client that talks to it."""
