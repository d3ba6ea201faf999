"""Where ranks meet, who is alive, and what they agree on."""
