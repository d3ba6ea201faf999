"""What computing and sending take: a cluster's description, and prices by it."""
