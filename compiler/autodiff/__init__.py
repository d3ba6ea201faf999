"""The backward as a graph, operator by operator."""
