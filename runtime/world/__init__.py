"""The world of a run: where ranks meet, which are alive, and what they agree on."""
