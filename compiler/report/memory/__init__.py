"""What a rank needs to hold, found by walking the instructions it is going to run."""
