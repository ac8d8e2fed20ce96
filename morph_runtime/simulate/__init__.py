"""The engine as a discrete-event model: the real controller over a trace of hours in seconds, without a device."""
