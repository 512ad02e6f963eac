"""The services that versions are pushed to, a module for each."""
