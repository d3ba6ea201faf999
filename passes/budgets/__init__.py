"""Choose what the plan leaves open so that a step fits into the memory of a rank."""
