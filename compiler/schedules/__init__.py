"""In which order ranks run the graphs of stages, and what they send one another meanwhile."""
