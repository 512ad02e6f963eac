"""One thin ZenML wrapper a step: unpack, call the library, log metadata, return."""
